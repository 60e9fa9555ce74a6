"""A recorded run, read again: to look at, and to go on with."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from gradinv import metrics
from gradinv.attack.state import RunState
from gradinv.config import AttackConfig, recorded
from gradinv.images import from_grid
from gradinv.models import MODELS, imagenet_classes, tiny_classes
from gradinv.recording.stores import DirectoryStore, MemoryStore, Store
from gradinv.types import GradinvError, Observation, Snapshot, TermValues

FORMAT = 1
OBSERVATION = "observation.safetensors"
STATE = "state.safetensors"


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
        self._frames = frames(store)
        self.steps: list[int] = sorted(
            step for step in self._frames if len(self._rows.get(step, ())) == run["config"]["seeds"]
        )

    @classmethod
    def open(cls, source: Store | str | Path) -> Recording:
        """A folder, its zip or any store. Raises GradinvError for what is no run, damaged, or of a newer version."""
        if isinstance(source, str | Path):
            source = MemoryStore.unpack(source) if Path(source).suffix == ".zip" else DirectoryStore(source)
        store = source
        if "run.json" not in store.names():
            raise GradinvError(f"{store} is not a recorded run: it holds no run.json.")
        try:
            run = json.loads(store.read("run.json"))
            if run["format"] != FORMAT:
                raise GradinvError(
                    f"{store} was recorded in format {run['format']}, and this version reads format {FORMAT}; "
                    "use the version of gradinv that recorded it."
                )
            if missing := {"status", "config", "model", "environment", "labels", "iterations", "metrics"} - set(run):
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

    def snapshot(self, step: int) -> Snapshot:
        """One recorded step. Raises GradinvError for one that is not in `steps` or whose frame is damaged."""
        if step not in self.steps:
            raise GradinvError(f"{self.store} holds no record of step {step}.")
        labels = self.run["labels"]
        restored = tuple(int(label) for label in labels["restored"] or ())
        rows = [row for _, row in sorted(self._rows[step].items())]
        grid = self._decode(self._frames[step])
        try:
            tiles = from_grid(grid, len(restored))
            if len(tiles) != len(rows) + 1:
                raise ValueError("as many rows of pictures as seeds and a consensus are expected")
        except (RuntimeError, ValueError, ZeroDivisionError) as error:
            raise GradinvError(f"The frame of step {step} in {self.store} does not fit the run ({error}).") from error

        def column(name: str) -> tuple[float, ...]:
            return tuple(row[name] for row in rows)

        known = [name.removesuffix(".raw") for name in rows[0] if name.endswith(".raw") and rows[0][name] is not None]
        return Snapshot(
            step=step,
            steps=int(self.run["iterations"]["total"]),
            seeds=tiles[:-1],
            consensus=tiles[-1],
            terms={name: TermValues(column(f"{name}.raw"), column(f"{name}.weighted")) for name in known},
            distance=tuple(row["distance"] for row in rows if row["distance"] is not None),
            seconds=rows[0]["seconds"],
            labels=restored,
            label_method=labels.get("method", ""),
            label_confidence=labels.get("confidence"),
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


def frames(store: Store) -> dict[int, str]:
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
