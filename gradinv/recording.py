"""Record a run and play it back: JSON, CSV and pictures in a folder or in memory, never a pickle.

A run is readable at any moment, also after the process was killed: run.json and pictures are replaced whole, the
curves grow line by line and a torn last line is ignored. Layout of format 1:

    run.json            what was run, where, and how it went
    curves.csv          one row a record and seed: step, seed, seconds, distance, psnr (mean over the seed's images),
                        consensus_psnr (the same for the consensus, in every row), <term>.raw and <term>.weighted
    frames/000120.webp  mosaic at that step, in the order of the restored labels; rows: each seed, then the consensus
    images/             original_00.png, seed0_00.png, …, consensus_00.png, lossless: the originals from the start, the
                        reconstructions at the end, with prior_00.png, … what a learned prior painted, where there is
                        one. Where originals are known, number n is paired with original n.
    observation.safetensors, state.safetensors
                        while a run that can be resumed is not done: what it inverts, and where it last stood

A live run and its replay are the same thing to everything that draws: an iterator of snapshots.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import json
import math
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from gradinv import __version__, metrics
from gradinv.attack.state import RunState
from gradinv.config import AttackConfig, recorded
from gradinv.images import from_grid, to_grid, to_image
from gradinv.models import MODELS, Model, imagenet_classes, tiny_classes
from gradinv.paths import write_whole
from gradinv.types import GradinvError, Observation, Prior, Recovered, Snapshot, Term, memory_exhausted

FORMAT = 1
OBSERVATION = "observation.safetensors"
_EXECUTED = ("stepping", "parallel_seeds")
STATE = "state.safetensors"
ZIP_LIMIT = 1_000_000_000  # bytes unpacked
WEBP_LIMIT = 16_383  # pixels a side; a larger mosaic is stored as PNG

_FIXED_COLUMNS = ("step", "seed", "seconds", "distance", "psnr", "consensus_psnr")

# How many times as long as saving the state took, the next saving waits at the least.
_STATE_PAUSE = 100


class Store(Protocol):
    """Where a run's files lie. Names are relative with forward slashes; every failure is a GradinvError."""

    def write(self, name: str, data: bytes) -> None:
        """Replace the file as a whole: a reader sees the old or the new content."""

    def append(self, name: str, data: bytes) -> None:
        """Add to the end of the file, which is made where it is not there."""

    def read(self, name: str) -> bytes:
        """The file's content."""

    def remove(self, name: str) -> None:
        """Delete the file, if it is there."""

    def names(self) -> list[str]:
        """All files, sorted."""


class DirectoryStore:
    """A folder. It is made with the first write, so that looking into a folder that is not there leaves no trace."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()

    def __str__(self) -> str:
        return str(self.path)

    def write(self, name: str, data: bytes) -> None:
        target = self.path / name
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            write_whole(target, data)
        except OSError as error:
            raise self._unwritable(error) from error

    def append(self, name: str, data: bytes) -> None:
        target = self.path / name
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("ab") as file:
                file.write(data)
        except OSError as error:
            raise self._unwritable(error) from error

    def read(self, name: str) -> bytes:
        try:
            return (self.path / name).read_bytes()
        except OSError as error:
            raise GradinvError(f"{self.path / name} cannot be read: {_reason(error)}.") from error

    def remove(self, name: str) -> None:
        try:
            (self.path / name).unlink(missing_ok=True)
        except OSError as error:
            raise GradinvError(f"{self.path / name} cannot be removed: {_reason(error)}.") from error

    def names(self) -> list[str]:
        files = (path for path in self.path.rglob("*") if path.is_file() and not path.name.startswith("."))
        return sorted(path.relative_to(self.path).as_posix() for path in files)

    def _unwritable(self, error: OSError) -> GradinvError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return GradinvError(f"The disk of {self.path} is full; free some space or choose another folder.")
        return GradinvError(f"Nothing can be written to {self.path} ({_reason(error)}); choose another folder.")


class MemoryStore:
    """A run that lives in memory only. One thread may write while others read."""

    def __init__(self, files: Mapping[str, bytes] | None = None) -> None:
        self._files: dict[str, bytes] = dict(files or {})

    def __str__(self) -> str:
        return "The run in memory"

    def write(self, name: str, data: bytes) -> None:
        self._files[name] = bytes(data)

    def append(self, name: str, data: bytes) -> None:
        self._files[name] = self._files.get(name, b"") + data

    def read(self, name: str) -> bytes:
        try:
            return self._files[name]
        except KeyError as error:
            raise GradinvError(f"{self} holds no {name}.") from error

    def remove(self, name: str) -> None:
        self._files.pop(name, None)

    def names(self) -> list[str]:
        return sorted(self._files.copy())

    def copy(self) -> MemoryStore:
        """All files as they are now, in another store."""
        return MemoryStore(self._files.copy())

    def zip(self) -> bytes:
        """All files as a zip archive; pictures are compressed already, so they are stored as they are."""
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            for name, data in sorted(self._files.copy().items()):
                compressed = not name.endswith((".webp", ".png"))
                archive.writestr(name, data, zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED)
        return packed.getvalue()

    @classmethod
    def unpack(cls, path: str | Path) -> MemoryStore:
        """The inverse of `zip`, from a file. Raises GradinvError for what is none, or unpacks to more than a run."""
        try:
            with zipfile.ZipFile(Path(path).expanduser()) as archive:
                if sum(item.file_size for item in archive.infolist()) > ZIP_LIMIT:
                    raise GradinvError(f"{path} unpacks to more than {ZIP_LIMIT / 1e6:.0f} MB; unpack it yourself.")
                return cls({item.filename: archive.read(item) for item in archive.infolist() if not item.is_dir()})
        except OSError as error:
            raise GradinvError(f"{path} cannot be read: {_reason(error)}.") from error
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            raise GradinvError(f"The recorded run {path} is not a complete zip file ({error}).") from error


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
        _check_truth(originals, labels, observation)
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
        for step, name in _frames(self._store).items():
            if step > done or step not in resumed.steps:
                self._store.remove(name)
        for name in self._store.names():
            if name.startswith("images/") and not name.startswith("images/original_"):
                self._store.remove(name)
        self.curves = [row for row in resumed.curves if row["step"] in resumed.steps]
        # As in a run that was never interrupted, whose table has the terms' columns from their first values on.
        names = [name for row in self.curves[-1:] for name in row if name not in _FIXED_COLUMNS]
        self._columns = [*_FIXED_COLUMNS, *names] if any(row["step"] > 0 for row in self.curves) else [*_FIXED_COLUMNS]
        head = ",".join(self._columns) + "\n"
        self._store.write("curves.csv", (head + self._lines(self.curves)).encode())
        self._update(
            labels=resumed.run["labels"],
            # Solved once more, it took another time.
            **{name: resumed.run[name] for name in ("recovered",) if name in resumed.run},
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
            environment={**self.run["environment"], **_executed(snapshot)},
            **({"boundary": snapshot.boundary} if snapshot.boundary else {}),
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
            row: dict[str, Any] = {
                "step": snapshot.step,
                "seed": seed,
                "seconds": snapshot.seconds,
                # No gradient has been compared before the first step, nor where none is matched.
                "distance": snapshot.distance[seed] if snapshot.distance else None,
                "psnr": self._mean_psnr(pixels, snapshot.labels),
                "consensus_psnr": consensus_psnr,
            }
            for name, term in snapshot.terms.items():
                row[f"{name}.raw"] = term.raw[seed]
                row[f"{name}.weighted"] = term.weighted[seed]
            rows.append(row)
        return rows

    def _mean_psnr(self, images: Tensor, restored: Sequence[int]) -> float | None:
        if self._originals is None:
            return None
        return float(metrics.psnr(self._paired(images, restored), self._originals).mean())

    def _paired(self, images: Tensor, restored: Sequence[int]) -> Tensor:
        """In the originals' order where there are any, else as they are."""
        if self._originals is None or self._labels is None:
            return images
        return images[metrics.pair(images, restored, self._originals, self._labels)]

    def _append_rows(self, rows: list[dict[str, Any]]) -> None:
        columns = [*_FIXED_COLUMNS, *(name for row in rows[:1] for name in row if name not in _FIXED_COLUMNS)]
        unknown = [name for name in columns if name not in self._columns]
        self.curves.extend(rows)
        if unknown:
            # The start may know no terms yet: then the table is written anew with its new columns.
            self._columns += unknown
            head = ",".join(self._columns) + "\n"
            self._store.write("curves.csv", (head + self._lines(self.curves)).encode())
        else:
            self._store.append("curves.csv", self._lines(rows).encode())

    def _lines(self, rows: list[dict[str, Any]]) -> str:
        """Floats are written so that they read back the same; what is not known is empty."""
        cells = ([row.get(name) for name in self._columns] for row in rows)
        return "".join(",".join("" if cell is None else str(cell) for cell in line) + "\n" for line in cells)

    def _write_frame(self, step: int, frame: Image.Image) -> None:
        if max(frame.size) <= WEBP_LIMIT:
            self._store.write(f"frames/{step:06d}.webp", _encode(frame, "WEBP", quality=80))
        else:
            self._store.write(f"frames/{step:06d}.png", _encode(frame, "PNG"))

    def _write_images(self, prefix: str, images: Tensor) -> None:
        for index, pixels in enumerate(images):
            self._store.write(f"images/{prefix}_{index:02d}.png", _encode(to_image(pixels), "PNG"))

    def _finish(self, error: BaseException | None = None) -> None:
        if error is None or isinstance(error, GeneratorExit | KeyboardInterrupt):
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
        else:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        sentence = str(error) if isinstance(error, GradinvError) else memory_exhausted(error)
        sentence = sentence or f"{type(error).__name__}: {error}"
        # The first failure is the one to report: on a full disk these would only fail once more.
        with contextlib.suppress(GradinvError):
            self._update(status="failed", error=sentence)
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
        painted = prior.pixels
        if self._originals is not None and self._labels is not None:  # in the order of what was found
            painted = painted[metrics.pair(last.consensus, last.labels, self._originals, self._labels)]
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


@dataclass(frozen=True, eq=False)
class Resumption:
    """What is left of a run that was stopped or killed: enough to go on as if it never had been.

    `run` is the content of run.json and `curves` the rows of curves.csv; `steps` are the recorded ones that an
    uninterrupted run would have as well, up to the `state`. `originals` are pixels, or None where they were not known.
    """

    store: Store
    run: Mapping[str, Any]
    curves: Sequence[dict[str, Any]]
    steps: frozenset[int]
    config: AttackConfig
    observation: Observation
    state: RunState
    originals: Tensor | None

    @classmethod
    def open(cls, path: str | Path) -> Resumption:
        """Raises GradinvError where the folder is not a run that can be resumed, and says why."""
        recording = Recording.open(path)
        run, store = recording.run, DirectoryStore(path)
        if run["status"] == "done":
            raise GradinvError(f"The run in {store} is done; show it with: gradinv replay {store}.")
        if missing := {STATE, OBSERVATION} - set(store.names()):
            raise GradinvError(f"The run in {store} cannot be resumed: it holds no {min(missing)}; start it again.")
        if not {"every", "client"} <= set(run) or "weights" not in run["model"]:
            raise GradinvError(
                f"The run in {store} was recorded by gradinv {run['environment'].get('gradinv', '(unknown)')}, which "
                "could not resume; start it again."
            )
        state = RunState.load(store.path / STATE)
        config = AttackConfig.from_dict(run["config"])
        originals = recording.originals()
        if (originals is None) != (run["labels"]["true"] is None):
            raise GradinvError(f"The run in {store} cannot be resumed: its originals are missing; start it again.")
        regular = {step for step in recording.steps if step % (run["every"] or 1) == 0 or step == config.iterations}
        return cls(
            store=store,
            run=run,
            curves=recording.curves,
            steps=frozenset(step for step in regular if step <= state.step),
            config=config,
            observation=Observation.load(store.path / OBSERVATION),
            state=state,
            originals=originals,
        )


class Recording:
    """A recorded run, finished or not. `run` is the content of run.json, `curves` the rows of curves.csv.

    `steps` are those at which everything was recorded. Read once when opened; pictures are read on demand.
    """

    def __init__(self, store: Store, run: dict[str, Any], curves: list[dict[str, Any]]) -> None:
        self.store = store
        self.run = run
        self.curves = curves
        self._rows: dict[int, dict[int, dict[str, Any]]] = {}
        for row in curves:
            self._rows.setdefault(row["step"], {})[row["seed"]] = row
        self._frames = _frames(store)
        self.steps: list[int] = sorted(
            step for step in self._frames if len(self._rows.get(step, ())) == run["config"]["seeds"]
        )

    @classmethod
    def open(cls, source: Store | str | Path) -> Recording:
        """A folder, its zip or any store. Raises GradinvError for what is no run, damaged, or of a newer version."""
        store = source
        if isinstance(store, str | Path):
            store = MemoryStore.unpack(store) if Path(store).suffix == ".zip" else DirectoryStore(store)
        if "run.json" not in store.names():
            raise GradinvError(f"{store} is not a recorded run: it holds no run.json.")
        try:
            run = json.loads(store.read("run.json"))
            if run["format"] != FORMAT:
                raise GradinvError(
                    f"{store} was recorded in format {run['format']}, and this version reads format {FORMAT}; "
                    "use the version of gradinv that recorded it."
                )
            missing = {"status", "config", "model", "environment", "labels", "iterations", "metrics"} - set(run)
            if missing:
                raise KeyError(min(missing))
            run["config"] = recorded(run["config"])
            curves = _read_curves(store.read("curves.csv")) if "curves.csv" in store.names() else []
            return cls(store, run, curves)
        except GradinvError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, UnicodeDecodeError) as error:
            raise GradinvError(f"The recorded run {store} is damaged ({error!r}); record it again.") from error

    def frame(self, step: int) -> bytes:
        """The mosaic of a recorded step as an encoded image (WebP; PNG where it is too large for that)."""
        if step not in self._frames:
            raise GradinvError(f"{self.store} holds no frame of step {step}.")
        return self.store.read(self._frames[step])

    def snapshots(self) -> Iterator[Snapshot]:
        """The run once more: terms from the curves, pixels from the (lossy) frames."""
        for step in self.steps:
            yield self.snapshot(step)

    def snapshot(self, step: int) -> Snapshot:
        """One recorded step. Raises GradinvError for one that is not in `steps` or whose frame is damaged."""
        if step not in self.steps:
            raise GradinvError(f"{self.store} holds no record of step {step}.")
        labels = tuple(int(label) for label in self.run["labels"]["restored"] or ())
        rows = [row for _, row in sorted(self._rows[step].items())]
        grid = self._decode(self._frames[step])
        try:
            tiles = from_grid(grid, len(labels))
            if len(tiles) != len(rows) + 1:
                raise ValueError("as many rows of pictures as seeds and a consensus are expected")
        except (RuntimeError, ValueError, ZeroDivisionError) as error:
            raise GradinvError(f"The frame of step {step} in {self.store} does not fit the run ({error}).") from error
        names = [name.removesuffix(".raw") for name in rows[0] if name.endswith(".raw")]
        present = [name for name in names if rows[0][f"{name}.raw"] is not None]
        return Snapshot(
            step=step,
            steps=int(self.run["iterations"]["total"]),
            seeds=tiles[:-1],
            consensus=tiles[-1],
            terms={
                name: Term(tuple(row[f"{name}.raw"] for row in rows), tuple(row[f"{name}.weighted"] for row in rows))
                for name in present
            },
            distance=tuple(row["distance"] for row in rows if row["distance"] is not None),
            seconds=rows[0]["seconds"],
            labels=labels,
            label_method=self.run["labels"].get("method", ""),
            label_confidence=self.run["labels"].get("confidence"),
        )

    def originals(self) -> Tensor | None:
        """The originals' pixels (B, 3, S, S) in [0, 1] in their own order, or None where they were not known."""
        return self.images("original")

    def images(self, prefix: str) -> Tensor | None:
        """The lossless pixels (B, 3, S, S) of `original`, `seed0`, … or `consensus`, or None where there are none yet.

        They are in the originals' order where originals are known, unlike the snapshots.
        """
        names = [name for name in self.store.names() if name.startswith(f"images/{prefix}_")]
        names.sort(key=lambda name: (len(name), name))
        if not names:
            return None
        tiles = [from_grid(self._decode(name), 1)[0, 0] for name in names]
        if len({tile.shape for tile in tiles}) > 1:
            raise GradinvError(f"The pictures {prefix} of {self.store} differ in size; record the run again.")
        return torch.stack(tiles)

    def order(self) -> list[int]:
        """For each image of `images/` its place in the snapshots, by `metrics.pair` on the last recorded consensus."""
        true, restored = self.run["labels"]["true"], self.run["labels"]["restored"] or []
        originals = self.originals() if true is not None else None
        if originals is None or not self.steps:
            return list(range(len(restored)))
        return metrics.pair(self.snapshot(self.steps[-1]).consensus, restored, originals, true).tolist()

    def class_name(self, label: int) -> str:
        """The class of a label, from the model's name; of the user's own weights only the number is known."""
        info = MODELS.get(self.run["model"]["name"])
        classes = () if info is None else tiny_classes() if info.bundled else imagenet_classes()
        return classes[label].name if label < len(classes) else f"class {label}"

    def _decode(self, name: str) -> Image.Image:
        try:
            with Image.open(io.BytesIO(self.store.read(name)), formats=("WEBP", "PNG")) as image:
                return image.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise GradinvError(f"The picture {name} of {self.store} is damaged; record the run again.") from error


def _frames(store: Store) -> dict[int, str]:
    """From step to the name of its frame."""
    frames = ((name, name.removeprefix("frames/").split(".")[0]) for name in store.names())
    return {int(step): name for name, step in frames if name.startswith("frames/") and step.isdigit()}


def _read_curves(data: bytes) -> list[dict[str, Any]]:
    text = data.decode()
    complete = text[: text.rfind("\n") + 1]  # a killed run may leave half a line
    return [
        {name: int(cell) if name in ("step", "seed") else float(cell) if cell else None for name, cell in row.items()}
        for row in csv.DictReader(io.StringIO(complete), strict=True)
    ]


def _encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    packed = io.BytesIO()
    image.save(packed, kind, **options)
    return packed.getvalue()


def _executed(snapshot: Snapshot) -> dict[str, Any]:
    """How the steps so far were run, where there were any."""
    return {name: getattr(snapshot, name) for name in _EXECUTED} if snapshot.stepping else {}


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


def _check_truth(originals: Tensor | None, labels: Sequence[int] | None, observation: Observation) -> None:
    if (originals is None) != (labels is None):
        raise GradinvError("Originals and their true labels are recorded together; give both or neither.")
    if originals is not None and labels is not None and not len(originals) == len(labels) == observation.batch_size:
        raise GradinvError(
            f"The observation is of {observation.batch_size} images, but {len(originals)} originals "
            f"with {len(labels)} labels are given."
        )


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


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
