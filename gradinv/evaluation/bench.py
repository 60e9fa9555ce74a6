"""What the tasks of a process share: the network, the folder, and the pictures of each batch."""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gradinv.evaluation.plan import Plan, Row, classes_of, defences_of
from gradinv.gallery import Gallery, Progress
from gradinv.models import Model
from gradinv.sources import ImageFolder, Picture, pixels_of
from gradinv.types import GradinvError, Observation, Preprocessing


@dataclass(frozen=True, eq=False)
class Batch:
    """The client's batch: which pictures, and their labels (B,)."""

    pictures: tuple[Picture, ...]
    labels: Tensor
    preprocessing: Preprocessing

    @cached_property
    def pixels(self) -> Tensor:
        """Decoded: (B, 3, S, S) in [0, 1]."""
        return pixels_of(self.pictures, self.preprocessing)


class Bench:
    """What all tasks of a process share: the network, the folder, and the gallery once somebody asks for it."""

    def __init__(
        self, plan: Plan, model: Model, stop: threading.Event | None = None, report: Progress | None = None
    ) -> None:
        """`report` is told how far the gallery is while it is made.

        Raises GradinvError where the folder is not there or lacks classes that the largest batch needs.
        """
        self.plan = plan
        self.model = model
        self.stop = stop or threading.Event()
        self._report = report
        self.folder = ImageFolder(plan.imagenet)
        self._files: dict[int, list[Picture]] = {}
        wnids = {item.wnid for item in self.folder.classes}
        self._classes = [label for label, item in enumerate(model.classes) if item.wnid in wnids]
        needed = max(classes_of(row) for row in plan.rows)
        if len(self._classes) < needed:
            raise GradinvError(
                f"{self.folder.root} has pictures of {len(self._classes)} classes that {model.name} knows, and a batch "
                f"needs {needed}; take smaller batches or another folder."
            )

    @cached_property
    def gallery(self) -> Gallery:
        """The pooled features of every picture of the folder, also of those that no batch is drawn from."""
        return Gallery.of(self.model, self.folder.root, progress=self._progress)

    def _progress(self, done: int, total: int) -> None:
        if self.stop.is_set():
            raise KeyboardInterrupt  # the gallery keeps what is done
        if self._report is not None:
            self._report(done, total)

    def places(self, batch: Batch) -> list[int]:
        """Where the batch's pictures are in the gallery."""
        return [self.gallery.index(self.folder.root / picture.key) for picture in batch.pictures]

    def files(self, label: int) -> list[Picture]:
        """The pictures of a class that batches are drawn from, by file name."""
        if label not in self._files:
            files = self.folder.pictures(self.model.classes[label].wnid)
            middle = len(files) // 2
            halves = {"report": files[:middle], "tune": files[middle:], "all": files}
            self._files[label] = halves[self.plan.half]
        return self._files[label]

    def draw(self, row: Row, batch: int) -> Batch:
        """The pictures of a batch. They depend on the evaluation's seed, the batch's number, its size and whether
        labels repeat, and on nothing else; without repeats a smaller batch holds the first of a larger one.

        Raises GradinvError where a class has too few pictures.
        """
        generator = random.Random(f"{self.plan.seed}/{batch}/{row.repeats}")
        classes = [label for label in generator.sample(self._classes, len(self._classes)) if self.files(label)]
        chosen = classes[: classes_of(row)]
        left = {label: generator.sample(self.files(label), len(self.files(label))) for label in chosen}
        pictures: list[Picture] = []
        labels: list[int] = []
        while len(labels) < row.batch_size:
            open_labels = [label for label in chosen if left[label]]
            if not open_labels or (not row.repeats and len(labels) >= len(chosen)):
                raise GradinvError(
                    f"{self.folder.root} has too few pictures for a batch of {row.batch_size}; take a smaller batch or "
                    "both halves (--half all)."
                )
            label = generator.choice(open_labels) if row.repeats else chosen[len(labels)]
            labels.append(label)
            pictures.append(left[label].pop())
        return Batch(tuple(pictures), torch.tensor(labels), self.model.preprocessing)

    def others(self, batch: Batch) -> list[Picture]:
        """For each picture of the batch one of the same class that is not in it: the next by file name.

        Raises GradinvError where a class has none.
        """
        drawn = {picture.key for picture in batch.pictures}
        found = []
        for picture, label in zip(batch.pictures, batch.labels.tolist(), strict=True):
            files = self.files(label)
            place = next(index for index, file in enumerate(files) if file.key == picture.key)
            after = [file for file in (*files[place + 1 :], *files[:place]) if file.key not in drawn]
            if not after:
                raise GradinvError(
                    f"{self.folder.root} has no picture of {picture.wnid} beside those of the batch, which the learned "
                    "prior is checked on; take a folder with more pictures."
                )
            found.append(after[0])
        return found

    def defend(self, observation: Observation, row: Row, batch: int) -> Observation:
        """The observation behind the row's defence; each batch has its own noise."""
        for defence in defences_of(row.defence, self.plan.seed + batch):
            observation = defence(observation)
        return observation
