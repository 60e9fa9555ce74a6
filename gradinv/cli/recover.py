"""`gradinv recover`: what the gradient says without a search, layer by layer."""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradinv.cli.invert import signals_set
from gradinv.cli.say import aligned, complain, exact, percent, solved_to, speaker
from gradinv.cli.task import Task, add_client, add_network, begin, describe, describe_labels, facts, write_barred

# torch takes seconds to import: what needs it is imported by the functions, so that help and mistakes answer at once.
if TYPE_CHECKING:
    from torch import Tensor

    from gradinv.types import Recovered, SolvedNode


HELP = "solve the layers that a gradient determines, without a search"
EXAMPLES = """\
examples:
  gradinv recover goldfish tabby --model resnet18-tiny
  gradinv recover --samples 8 --boundary layer3.0.conv1 --out layers.safetensors
  gradinv recover lion --defence noise:1e-4 --json
  gradinv recover --observation mine.safetensors

No picture is searched for. The final layer's gradient is solved for the labels and for what the network sees in each
picture, then each layer below it for its input, as long as there are as many equations as unknowns. Columns:
  equations, unknowns   of each channel of the node, which is an activation behind a ReLU
  residual              the share of the equations' right side that is left unexplained
  error, worst          the estimated relative error, the median over the pictures and the largest
  mended                the share of entries of the mask above that were wrong at first and were set right
  true error            measured on the pictures, where they are known (median): the solver never sees them

exit codes: 0; 2 bad use; 130 stopped by Ctrl-C, with the layers so far kept
"""

HEADER = ("node", "shape", "method", "equations", "unknowns", "residual", "error", "worst", "mended", "seconds")
TRUE = "true error"
_WIDE = 9  # of a column of percentages


def add_arguments(parser: argparse.ArgumentParser, chosen: bool) -> None:
    """Whose gradient, and how far down."""
    add_client(parser)
    options = parser.add_argument_group("the layers")
    add_network(options)
    options.add_argument(
        "--boundary",
        default="auto",
        metavar="NODE",
        help="down to where: auto (as far as the gradient determines), a node such as layer2 or layer3.0.conv1, or "
        "logits (the labels and the final layer only) (default: %(default)s)",
    )
    options.add_argument(
        "--labels",
        default="auto",
        metavar="METHOD",
        help="how labels are restored: the methods of `gradinv invert` (default: %(default)s)",
    )
    options.add_argument(
        "--seed", type=int, default=0, metavar="N", help="where all randomness comes from (default: %(default)s)"
    )
    options.add_argument("--out", metavar="FILE", help="write what was solved to a safetensors file")


def run(args: argparse.Namespace) -> int:
    from gradinv.checks import check_observation
    from gradinv.config import AttackConfig
    from gradinv.network import parts_of

    say = speaker(args)
    out = _choose_file(args.out)
    config = AttackConfig(boundary=args.boundary, labels=args.labels, seed=args.seed)
    task = begin(args, lambda _: config, say)
    check_observation(task.model, task.observation)
    if config.boundary not in ("auto", "logits", "loss"):
        parts_of(task.model.network).node(config.boundary)
    describe(say, task)
    rows = _Rows(say, task)
    stop = threading.Event()
    with signals_set(stop) as received:
        began = time.perf_counter()
        recovered = _recover(say, task, rows, stop)
        seconds = time.perf_counter() - began
        _conclude(say, recovered, seconds)
        if out is not None:
            _write(out, task, recovered)
            say(f"What was solved is in {out}.")
        if args.json:
            print(json.dumps(_facts(task, recovered, rows.errors, seconds), indent=2, allow_nan=False))
        if received:
            kept = "" if out is None else f" and kept in {out}"
            return complain(f"Stopped; what was solved until then is shown{kept}.", 128 + received[0])
    return 0


def _choose_file(name: str | None) -> Path | None:
    """The file that was asked for. Raises GradinvError where it cannot be written."""
    from gradinv.types import GradinvError

    if name is None:
        return None
    path = Path(name).expanduser()
    try:
        barred = f"{path} is a folder" if path.is_dir() else write_barred(path.parent)
    except OSError as error:
        barred = f"{path} cannot be used ({error.strerror})"
    if barred:
        raise GradinvError(f"Nothing can be written to {path}, since {barred}; name another file with --out.")
    return path


def _recover(say: Callable[[str], None], task: Task, rows: _Rows, stop: threading.Event) -> Recovered:
    """Solve, and tell the labels and the final layer before the layers below, which may take minutes."""
    import torch

    from gradinv.recovery.recover import recover

    given = None if task.given is None else torch.tensor(task.given)

    def told(first: Recovered) -> None:
        rows.restored = first.labels.tolist()
        describe_labels(say, task, rows.restored, first.method, first.confidence, first.notes)
        if first.residual is not None:
            left, factor = _share(first.residual), f"{first.scale:.4g}"
            say(
                f"The final layer is solved but for {left} of its gradient; the client's own factor in that is "
                f"{factor}."
            )

    found = recover(task.model, task.observation, task.config, labels=given, stop=stop, progress=rows.show, told=told)
    # A layer that was left half-way gives another reason.
    return replace(found, stopped="The way down was stopped.") if stop.is_set() else found


class _Rows:
    """The table of layers, a row as each one is solved."""

    def __init__(self, say: Callable[[str], None], task: Task) -> None:
        self._say = say
        self._labels = task.labels
        self._truth = _truth(task)
        self._order: Tensor | None = None
        self.restored: list[int] = []
        self.errors: dict[str, list[float]] = {}
        """Per node each image's true relative error, in the order of the restored labels, where it is known."""

        shapes = _shapes(task)
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
            self._say("")
            self._line(self._header)
            self._begun = True
        self._line(cells)

    def _line(self, cells: list[str] | tuple[str, ...]) -> None:
        self._say(aligned(cells, self._widths, numbers=range(3, len(self._header))))

    def _measured(self, node: SolvedNode, truth: Tensor) -> Tensor:
        """‖x − x*‖ / ‖x*‖ of each image, (B,), in the order of the restored labels."""
        from gradinv import metrics

        found, true = node.activation.detach().cpu().double().flatten(1), truth.double().flatten(1)
        if self._order is None:
            assert self._labels is not None
            # Which is whose is settled once, at the top, as for pictures: here of one row and three equal channels.
            rows = (values[:, None, None].expand(-1, 3, -1, -1) for values in (found, true))
            self._order = metrics.pair(next(rows), self.restored, next(rows), self._labels)
        true = true[self._order.argsort()]
        return (found - true).norm(dim=1) / true.norm(dim=1).clamp(min=1e-30)  # nothing may be on


def _shapes(task: Task) -> Mapping[str, tuple[int, int, int]]:
    """Each node's (C, H, W); of a network that is no ResNet none, which `recover` says."""
    from gradinv.network import node_shapes
    from gradinv.types import GradinvError

    try:
        return node_shapes(task.model.network, task.model.preprocessing.size)
    except GradinvError:
        return {}


def _truth(task: Task) -> Mapping[str, Tensor] | None:
    """What the network's nodes hold for the originals, in their order; None where they are not known."""
    import torch

    from gradinv.network import Segment

    names = list(_shapes(task))
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


def _conclude(say: Callable[[str], None], recovered: Recovered, seconds: float) -> None:
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
    from gradinv.recording.recorder import solved

    table = solved(recovered)
    nodes = [
        {**node, "true_error": errors[node["name"]]} if node["name"] in errors else node for node in table["nodes"]
    ]
    return {
        **facts(task),
        "labels": {"true": task.labels, **_labels(recovered)},
        **table,
        "nodes": nodes,
        "seconds": seconds,
    }


def _labels(recovered: Recovered) -> dict[str, Any]:
    restored = recovered.labels.tolist()
    return {"restored": restored, "method": recovered.method, "confidence": recovered.confidence}


def _write(path: Path, task: Task, recovered: Recovered) -> None:
    """`activation/`, `cotangent/` and `error/` of each node, and in the metadata as JSON `recovered`: format, model,
    labels and the table. Raises GradinvError."""
    import safetensors.torch

    from gradinv.recording.recorder import solved
    from gradinv.recording.stores import DirectoryStore

    tensors: dict[str, Tensor] = {}
    for node in recovered.nodes:
        parts = {"activation": node.activation, "cotangent": node.cotangent, "error": node.error}
        tensors |= {
            f"{kind}/{node.name}": value.detach().cpu().contiguous()
            for kind, value in parts.items()
            if value is not None
        }
    facts = {
        "format": 1,
        "model": {"name": task.model.name, "sha256": task.model.sha256},
        "labels": _labels(recovered),
        **solved(recovered),
    }
    data = safetensors.torch.save(tensors, metadata={"recovered": json.dumps(facts, allow_nan=False)})
    DirectoryStore(path.parent).write(path.name, data)
