"""Write a run down while it goes on."""

from __future__ import annotations

import contextlib
import io
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from gradinv import __version__, metrics
from gradinv.attack.state import RunState
from gradinv.config import AttackConfig
from gradinv.images import to_grid, to_image
from gradinv.models import Model
from gradinv.recording.replay import FORMAT, OBSERVATION, STATE, Resumption, frames
from gradinv.recording.stores import Store
from gradinv.types import GradinvError, Observation, Prior, Recovered, Snapshot, memory_exhausted

_EXECUTED = ("stepping", "parallel_seeds")
WEBP_LIMIT = 16_383  # pixels a side; a larger mosaic is stored as PNG

_FIXED_COLUMNS = ("step", "seed", "seconds", "distance", "psnr", "consensus_psnr")

# How many times as long as saving the state took, the next saving waits at the least.
_STATE_PAUSE = 100


class Recorder:
    """Writes a run into a store while it goes on.

    `originals` are pixels (B, 3, S, S) in [0, 1] with their true `labels`, where they are known: they serve the
    metrics and never reach the attack. `run` (the content of run.json) and `curves` (the rows of curves.csv) may be
    read from another thread at any time. Making a recorder writes the originals and run.json, so an unwritable
    store shows before any work is done; it raises GradinvError.

    `every` (steps between two records), `defences`, `weights` (what to load the model by, where that is not its name)
    and the number of `ranks` that share the seeds are recorded, and of what was `recovered` before the search its
    table. With `state`, which tells where the run stands at the snapshot that is recorded, the run can be resumed after
    it was stopped or killed at any moment; with `resumed` as well it goes on in the store of such a run.
    """

    def __init__(
        self,
        store: Store,
        *,
        config: AttackConfig,
        model: Model,
        observation: Observation,
        originals: Tensor | None = None,
        labels: Sequence[int] | None = None,
        every: int | None = None,
        defences: Sequence[str] = (),
        weights: str | None = None,
        ranks: int = 1,
        state: Callable[[], RunState] | None = None,
        resumed: Resumption | None = None,
        recovered: Recovered | None = None,
    ) -> None:
        if (originals is None) != (labels is None):
            raise GradinvError("Originals and their true labels are recorded together; give both or neither.")
        if originals is not None and labels is not None and not len(originals) == len(labels) == observation.batch_size:
            raise GradinvError(
                f"The observation is of {observation.batch_size} images, but {len(originals)} originals with "
                f"{len(labels)} labels are given."
            )
        self._store = store
        self._config = config
        self._device = model.device
        self._originals = None if originals is None else originals.detach().cpu()
        self._labels = [int(label) for label in labels] if labels is not None else None
        self._columns: list[str] = []
        self._last: Snapshot | None = None
        self._recorded = -1  # the last step of which there is a frame
        self._state = state
        self._saved, self._pause = -math.inf, 0.0
        self._spent = 0.0
        self.curves: list[dict[str, Any]] = []
        self.run: dict[str, Any] = {
            **_setting(config, model, observation, every, defences, weights or model.name, ranks),
            "labels": {"true": self._labels, "restored": None, "method": config.labels, "confidence": None},
            **({} if recovered is None else {"recovered": solved(recovered)}),
            "iterations": {"done": 0, "total": config.iterations},
            "seconds": 0.0,
            "seconds_per_iteration": None,
            "recording_seconds": 0.0,
            "peak_memory_mb": _peak_memory_mb(self._device),
            "metrics": None,
        }
        if resumed is not None:
            self._go_on(resumed)
            return
        if state is not None:
            store.write(OBSERVATION, observation.pack())
            self._save_state()
        if originals is not None:
            self._write_images("original", originals.detach().cpu())
        # Last: a folder with it is a run, and has all that it takes to go on.
        self._update()

    def _go_on(self, resumed: Resumption) -> None:
        """Take back what was recorded after the state: it will come again."""
        done = resumed.state.step
        # The very first state is written before the start has a frame.
        self._recorded = done if resumed.steps else -1
        self._spent = float(resumed.run.get("recording_seconds", 0))
        before = resumed.run["environment"]  # where no step is left to do, what ran was the old one's
        self.run["environment"] |= {name: before[name] for name in _EXECUTED if name in before}
        for step, name in frames(self._store).items():
            if step > done or step not in resumed.steps:
                self._store.remove(name)
        for name in self._store.names():
            if name.startswith("images/") and not name.startswith("images/original_"):
                self._store.remove(name)
        self.curves = [row for row in resumed.curves if row["step"] in resumed.steps]
        # As in a run that was never interrupted, whose table has the terms' columns from their first values on.
        begun = any(row["step"] > 0 for row in self.curves)
        self._columns = list(self.curves[-1] if begun else _FIXED_COLUMNS)
        self._write_table()
        self._update(
            labels=resumed.run["labels"],
            # Solved once more, it took another time.
            **({"recovered": resumed.run["recovered"]} if "recovered" in resumed.run else {}),
            iterations={"done": done, "total": self._config.iterations},
            seconds=resumed.state.seconds,
        )

    def follow(self, snapshots: Iterator[Snapshot]) -> Iterator[Snapshot]:
        """Record each snapshot, then pass it on. Afterwards the status is done, stopped or failed.

        done: the last iteration was recorded. stopped: the snapshots ended before, the consumer closed this iterator,
        or Ctrl-C. failed: anything else was raised, which goes on to the consumer and stands in run.json as `error`.
        """
        try:
            for snapshot in snapshots:
                began = time.perf_counter()
                self._record(snapshot)
                self._spent += time.perf_counter() - began
                yield snapshot
        except BaseException as error:
            self._finish(error)
            raise
        else:
            self._finish()
        finally:
            if callable(close := getattr(snapshots, "close", None)):
                close()

    def _record(self, snapshot: Snapshot) -> None:
        executed = {name: getattr(snapshot, name) for name in _EXECUTED} if snapshot.stepping else {}
        # run.json first: a frame cannot be read without the number of labels.
        self._update(
            labels={
                "true": self._labels,
                "restored": list(snapshot.labels),
                "method": snapshot.label_method or self._config.labels,
                "confidence": snapshot.label_confidence,
            },
            iterations={"done": snapshot.step, "total": snapshot.steps},
            seconds=snapshot.seconds,
            seconds_per_iteration=snapshot.seconds / snapshot.step if snapshot.step else None,
            recording_seconds=self._spent,
            peak_memory_mb=_peak_memory_mb(self._device),
            environment={**self.run["environment"], **executed},
            **({"boundary": snapshot.boundary} if snapshot.boundary else {}),
            meetings=list(snapshot.meetings),
        )
        # A stopped run may end with the state that was recorded last, and a resumed one begins with it.
        if snapshot.step > self._recorded:
            self._write_frame(snapshot.step, to_grid(torch.cat([snapshot.seeds, snapshot.consensus[None]])))
            self._append_rows(self._rows(snapshot))
            self._recorded = snapshot.step
        if time.perf_counter() >= self._saved + self._pause:
            self._save_state()
        self._last = snapshot

    def _save_state(self) -> None:
        """So seldom that it costs little of the time."""
        if self._state is None:
            return
        began = time.perf_counter()
        self._store.write(STATE, self._state().pack())
        self._saved = time.perf_counter()
        self._pause = _STATE_PAUSE * (self._saved - began)

    def _rows(self, snapshot: Snapshot) -> list[dict[str, Any]]:
        consensus_psnr = self._mean_psnr(snapshot.consensus, snapshot.labels)
        rows: list[dict[str, Any]] = []
        for seed, pixels in enumerate(snapshot.seeds):
            row = {
                "step": snapshot.step,
                "seed": seed,
                "seconds": snapshot.seconds,
                # No gradient has been compared before the first step, nor where none is matched.
                "distance": snapshot.distance[seed] if snapshot.distance else None,
                "psnr": self._mean_psnr(pixels, snapshot.labels),
                "consensus_psnr": consensus_psnr,
            }
            for name, term in snapshot.terms.items():
                row |= {f"{name}.raw": term.raw[seed], f"{name}.weighted": term.weighted[seed]}
            rows.append(row)
        return rows

    def _mean_psnr(self, images: Tensor, restored: Sequence[int]) -> float | None:
        if self._originals is None:
            return None
        return float(metrics.psnr(self._paired(images, restored), self._originals).mean())

    def _paired(self, images: Tensor, restored: Sequence[int], by: Tensor | None = None) -> Tensor:
        """In the originals' order where there are any, else as they are; `by` says which images tell the order."""
        if self._originals is None or self._labels is None:
            return images
        return images[metrics.pair(images if by is None else by, restored, self._originals, self._labels)]

    def _append_rows(self, rows: list[dict[str, Any]]) -> None:
        unknown = [name for name in rows[0] if name not in self._columns]
        self.curves.extend(rows)
        if unknown:
            # The start may know no terms yet: then the table is written anew with its new columns.
            self._columns += unknown
            self._write_table()
        else:
            self._store.append("curves.csv", self._lines(rows).encode())

    def _write_table(self) -> None:
        self._store.write("curves.csv", (",".join(self._columns) + "\n" + self._lines(self.curves)).encode())

    def _lines(self, rows: list[dict[str, Any]]) -> str:
        """Floats are written so that they read back the same; what is not known is empty."""
        cells = ([row.get(name) for name in self._columns] for row in rows)
        return "".join(",".join("" if cell is None else str(cell) for cell in line) + "\n" for line in cells)

    def _write_frame(self, step: int, frame: Image.Image) -> None:
        suffix = "webp" if max(frame.size) <= WEBP_LIMIT else "png"
        self._store.write(f"frames/{step:06d}.{suffix}", _encode(frame, suffix))

    def _write_images(self, prefix: str, images: Tensor) -> None:
        for index, pixels in enumerate(images):
            self._store.write(f"images/{prefix}_{index:02d}.png", _encode(to_image(pixels), "png"))

    def _finish(self, error: BaseException | None = None) -> None:
        if error is not None and not isinstance(error, GeneratorExit | KeyboardInterrupt):
            self._fail(error)
            return
        complete = self._last is not None and self._last.final
        try:
            self._write_results()
            self._update(status="done" if complete else "stopped", recording_seconds=self._spent)
            if complete and self._state is not None:
                for name in (STATE, OBSERVATION):
                    self._store.remove(name)
        except GradinvError as unwritten:
            self._fail(unwritten)
            raise

    def _fail(self, error: BaseException) -> None:
        sentence = str(error) if isinstance(error, GradinvError) else memory_exhausted(error)
        # The first failure is the one to report: on a full disk these would only fail once more.
        with contextlib.suppress(GradinvError):
            self._update(status="failed", error=sentence or f"{type(error).__name__}: {error}")
        with contextlib.suppress(GradinvError):
            self._write_results()

    def _write_results(self) -> None:
        """The last snapshot's images and their metrics."""
        if (last := self._last) is None:
            return
        seeds = [self._paired(pixels, last.labels) for pixels in last.seeds]
        consensus = self._paired(last.consensus, last.labels)
        if last.prior is not None:
            self._write_prior(last, last.prior)
        for seed, pixels in enumerate(seeds):
            self._write_images(f"seed{seed}", pixels)
        self._write_images("consensus", consensus)
        if (originals := self._originals) is not None:
            self._update(
                metrics={
                    "seeds": [metrics.measure(pixels, originals) for pixels in seeds],
                    "consensus": metrics.measure(consensus, originals),
                    "baseline": metrics.measure(metrics.constant_colour(originals), originals),
                }
            )

    def _write_prior(self, last: Snapshot, prior: Prior) -> None:
        """What the learned prior painted alone, and how far it agrees with what was found: the PSNR between both
        pictures, and what each leaves unexplained of what was solved or observed."""
        painted = self._paired(prior.pixels, last.labels, by=last.consensus)
        self._write_images("prior", painted)
        found = {name: metrics.mean(last.terms[name].raw) for name in prior.misfit if name in last.terms}
        self._update(
            prior={
                "node": prior.node,
                "agreement_psnr": _finite(float(metrics.psnr(last.consensus, prior.pixels).mean())),
                "misfit": {"painted": dict(prior.misfit), "found": found},
                "metrics": None if self._originals is None else metrics.measure(painted, self._originals),
            }
        )

    def _update(self, **changes: Any) -> None:
        # A new dict each time: whoever holds the old one keeps a consistent state.
        self.run = {**self.run, **changes}
        self._store.write("run.json", (json.dumps(self.run, indent=2, allow_nan=False) + "\n").encode())


def thinned(snapshots: Iterator[Snapshot], gap: float) -> Iterator[Snapshot]:
    """The first snapshot, then one for every `gap` steps, and the last: those worth recording of many.

    Which steps those are does not depend on where the run begins.
    """
    due = 0.0
    held: Snapshot | None = None
    for snapshot in snapshots:
        if snapshot.final or snapshot.step >= due:
            due, held = (math.floor(snapshot.step / gap) + 1) * gap, None
            yield snapshot
        else:
            held = snapshot
    if held is not None:
        yield held


def _encode(image: Image.Image, kind: str) -> bytes:
    packed = io.BytesIO()
    image.save(packed, kind, quality=80)
    return packed.getvalue()


def solved(recovered: Recovered) -> dict[str, Any]:
    """What was solved in closed form, without its tensors: as run.json and the command `recover` tell it.

    `error` has each image's, in the order of the restored labels; what is not finite is null.
    """
    return {
        "features_residual": _finite(recovered.residual),
        "scale": _finite(recovered.scale),
        "nodes": [
            {
                "name": node.name,
                "shape": list(node.activation.shape[1:]),
                "method": node.method,
                "equations": node.equations,
                "unknowns": node.unknowns,
                "residual": _finite(node.residual),
                "error": [_finite(value) for value in node.error.tolist()],
                "mended": node.mended,
                "seconds": node.seconds,
            }
            for node in recovered.nodes
        ],
        "stopped": recovered.stopped,
        "notes": list(recovered.notes),
        "seconds": sum(node.seconds for node in recovered.nodes),
    }


def _setting(
    config: AttackConfig,
    model: Model,
    observation: Observation,
    every: int | None,
    defences: Sequence[str],
    weights: str,
    ranks: int,
) -> dict[str, Any]:
    """What run.json says of a run before it begins."""
    return {
        "format": FORMAT,
        "status": "running",
        "config": config.to_dict(),
        "every": every,
        "model": {
            "name": model.name,
            "weights": weights,
            "sha256": model.sha256,
            "accuracy": model.accuracy,
            "image_size": model.preprocessing.size,
        },
        "client": {"batch_size": observation.batch_size, "mode": observation.mode, "defences": list(defences)},
        "environment": {
            "gradinv": __version__,
            "torch": torch.__version__,
            "device": str(model.device),
            "threads": torch.get_num_threads(),
            "ranks": ranks,
        },
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _peak_memory_mb(device: torch.device) -> float | None:
    """The most memory used so far in 10⁶ bytes: torch's on a GPU, else the process's resident set since it began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 1e6  # with what a CUDA graph keeps for itself
    try:
        import resource
    except ImportError:  # Windows does not have it
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
