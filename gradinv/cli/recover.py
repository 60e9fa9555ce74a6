"""`gradinv recover`: what the gradient says without a search, layer by layer."""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from gradinv import metrics
from gradinv.checks import check_observation
from gradinv.cli.progress import signals_set
from gradinv.cli.say import aligned, answer, complain, exact, percent, say, solved_to
from gradinv.cli.task import Task, begin, check_writable, describe, describe_labels, facts
from gradinv.config import AttackConfig
from gradinv.network import Segment, node_shapes, parts_of
from gradinv.recording.recorder import solved
from gradinv.recording.stores import DirectoryStore
from gradinv.recovery.recover import recover
from gradinv.types import GradinvError, Recovered, SolvedNode

HEADER = ("node", "shape", "method", "equations", "unknowns", "residual", "error", "worst", "mended", "seconds")
TRUE = "true error"
_WIDE = 9  # of a column of percentages


def run(args: argparse.Namespace) -> int:
    out = None if args.out is None else Path(args.out).expanduser()
    if out is not None:
        check_writable(out, file=True)
    config = AttackConfig(boundary=args.boundary, labels=args.labels, seed=args.seed)
    task = begin(args, lambda _: config)
    check_observation(task.model, task.observation)
    if config.boundary not in ("auto", "logits", "loss"):
        parts_of(task.model.network).node(config.boundary)
    describe(task)
    rows = _Rows(task)
    stop = threading.Event()
    with signals_set(stop) as received:
        began = time.perf_counter()
        recovered = _recover(task, rows, stop)
        seconds = time.perf_counter() - began
        _conclude(recovered, seconds)
        if out is not None:
            _write(out, task, recovered)
            say(f"What was solved is in {out}.")
        answer(args, _facts(task, recovered, rows.errors, seconds))
        if received:
            kept = "" if out is None else f" and kept in {out}"
            return complain(f"Stopped; what was solved until then is shown{kept}.", 128 + received[0])
    return 0


def _recover(task: Task, rows: _Rows, stop: threading.Event) -> Recovered:
    """Solve, and tell the labels and the final layer before the layers below, which may take minutes."""

    def told(first: Recovered) -> None:
        rows.restored = first.labels.tolist()
        describe_labels(task, rows.restored, first.method, first.confidence, first.notes)
        if first.residual is not None:
            say(
                f"The final layer is solved but for {_share(first.residual)} of its gradient; the client's own factor "
                f"in that is {first.scale:.4g}."
            )

    return recover(
        task.model, task.observation, task.config, labels=task.given, stop=stop, progress=rows.show, told=told
    )


class _Rows:
    """The table of layers, a row as each one is solved."""

    def __init__(self, task: Task) -> None:
        self._labels = task.labels
        try:
            shapes = node_shapes(task.model.network, task.model.preprocessing.size)
        except GradinvError:  # a network that is no ResNet, which `recover` says
            shapes = {}
        self._truth = _truth(task, list(shapes))
        self._order: Tensor | None = None
        self.restored: list[int] = []
        self.errors: dict[str, list[float]] = {}
        """Per node each image's true relative error, in the order of the restored labels, where it is known."""

        wide = {
            "node": max(map(len, shapes), default=0),
            "shape": max((len(_sides(shape)) for shape in shapes.values()), default=0),
            **dict.fromkeys(("error", "worst", "mended"), _WIDE),
        }
        self._header = HEADER if self._truth is None else (*HEADER, TRUE)
        self._widths = [max(len(name), wide.get(name, 0)) for name in self._header]
        self._begun = False

    def show(self, node: SolvedNode) -> None:
        """Say the node's row, below the header where it is the first."""
        cells = [
            node.name,
            _sides(tuple(node.activation.shape[1:])),
            node.method,
            f"{node.equations:,}",
            f"{node.unknowns:,}",
            f"{node.residual:.1e}",
            _share(node.typical_error),
            _share(float(node.error.max())),
            _share(node.mended),
            f"{node.seconds:.1f}",
        ]
        if self._truth is not None:
            found = self._measured(node, self._truth[node.name])
            self.errors[node.name] = found.tolist()
            cells.append(_share(float(found.median())))
        if not self._begun:
            say("\n" + self._line(self._header))
            self._begun = True
        say(self._line(cells))

    def _line(self, cells: Sequence[str]) -> str:
        return aligned(cells, self._widths, right=range(3, len(self._header)))

    def _measured(self, node: SolvedNode, truth: Tensor) -> Tensor:
        """‖x − x*‖ / ‖x*‖ of each image, (B,), in the order of the restored labels."""
        found, true = node.activation.detach().cpu().double().flatten(1), truth.double().flatten(1)
        if self._order is None:
            assert self._labels is not None
            # Which is whose is settled once, at the top, as for pictures: here of one row and three equal channels.
            one, other = (values[:, None, None].expand(-1, 3, -1, -1) for values in (found, true))
            self._order = metrics.pair(one, self.restored, other, self._labels)
        true = true[self._order.argsort()]
        return (found - true).norm(dim=1) / true.norm(dim=1).clamp(min=1e-30)  # nothing may be on


def _truth(task: Task, names: Sequence[str]) -> Mapping[str, Tensor] | None:
    """What the network's nodes hold for the originals, in their order; None where they are not known."""
    if task.pixels is None or not names:
        return None
    model = task.model
    with torch.no_grad():
        inputs = model.preprocessing.normalise(task.pixels.to(model.device))
        found = Segment(model.network, names[-1], names)(inputs)
    return {name: value.relu().cpu() for name, value in found.items()}


def _share(value: float) -> str:
    """As `percent`, but what is next to nothing with its number: here that tells how exact a layer is."""
    return f"{100 * value:.1e} %" if 0 < value < 1e-4 else percent(value)


def _sides(shape: tuple[int, ...]) -> str:
    return " × ".join(str(side) for side in shape)


def _conclude(recovered: Recovered, seconds: float) -> None:
    """Why it ends, and what is known then."""
    nodes = recovered.nodes
    if nodes:
        say("")
    if recovered.stopped:
        say(recovered.stopped)
    if not nodes:
        say(f"No layer below the final one is solved ({seconds:.1f} s).")
        return
    fine = [node for node in nodes if exact(node.error.tolist())]
    known = f", {fine[-1].activation[0].numel():,} numbers of each picture" if fine else ""
    say(f"Layers solved {solved_to(nodes)} in {seconds:.1f} s{known}.")


def _facts(task: Task, recovered: Recovered, errors: Mapping[str, list[float]], seconds: float) -> dict[str, Any]:
    """What `--json` prints: as in run.json, with the true errors where they are known."""
    told = {**facts(task), **_solved(recovered), "seconds": seconds}
    told["labels"] = {"true": task.labels, **told["labels"]}
    for node in told["nodes"]:
        if node["name"] in errors:
            node["true_error"] = errors[node["name"]]
    return told


def _solved(recovered: Recovered) -> dict[str, Any]:
    """The labels and the table of layers."""
    restored = recovered.labels.tolist()
    labels = {"restored": restored, "method": recovered.method, "confidence": recovered.confidence}
    return {"labels": labels, **solved(recovered)}


def _write(path: Path, task: Task, recovered: Recovered) -> None:
    """`activation/`, `cotangent/` and `error/` of each node, and in the metadata as JSON `recovered`: format, model,
    labels and the table. Raises GradinvError."""
    tensors: dict[str, Tensor] = {}
    for node in recovered.nodes:
        parts = {"activation": node.activation, "cotangent": node.cotangent, "error": node.error}
        tensors |= {
            f"{kind}/{node.name}": value.detach().cpu().contiguous()
            for kind, value in parts.items()
            if value is not None
        }
    told = {"format": 1, "model": facts(task)["model"], **_solved(recovered)}
    data = safetensors.torch.save(tensors, metadata={"recovered": json.dumps(told, allow_nan=False)})
    DirectoryStore(path.parent).write(path.name, data)
