"""What the page knows of a run: its batch, how far it is, and how good."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gradinv import metrics
from gradinv.jobs import JobState
from gradinv.sources import Credit
from gradinv.types import GradinvError
from gradinv.web.parts import markup, shared, solved
from gradinv.web.parts.inversion import Inversion, Layer, Progress, Solving
from gradinv.web.parts.pick import Chosen
from gradinv.web.parts.solved import MISFIT

ENDINGS = {"done": "Finished", "stopped": "Stopped", "failed": "Failed"}


@dataclass(frozen=True)
class Facts:
    """What the page knows of a run. `size` is the pictures' side in pixels, `originals` are tiles, `baseline` the
    constant colours' PSNR in dB, `chosen` what the pictures were chosen as, but for uploads, which only their own
    session keeps. Of a gradient that a visitor brought nobody has the pictures: then these are empty."""

    model: str
    size: int
    preset: str
    chosen: tuple[Chosen, ...]
    classes: tuple[str, ...]
    originals: tuple[str, ...]
    titles: tuple[str, ...]
    credits: tuple[Credit | None, ...]
    baseline: Sequence[float | None]

    @property
    def mean_baseline(self) -> float | None:
        """The mean of the baseline where every image has one."""
        return metrics.mean(self.baseline)


@dataclass(frozen=True)
class Run:
    """A run at one moment. `progress` is None as long as there is no picture, `solving` as long as that has not
    begun."""

    state: JobState
    work: Inversion
    facts: Facts
    progress: Progress | None
    solving: Solving | None

    @classmethod
    def of(cls, state: JobState) -> Run:
        """Raises GradinvError where another page started it."""
        work, update = state.work, state.update
        if not isinstance(work, Inversion) or not isinstance(work.facts, Facts):
            raise GradinvError("This run was not started from this page.")
        if isinstance(update, Progress):
            return cls(state, work, work.facts, update, update.solving)
        return cls(state, work, work.facts, None, update)

    @property
    def count(self) -> int:
        """How many pictures the batch has."""
        return self.work.client.batch_size

    @property
    def own(self) -> bool:
        """Whether this visitor started it: others who have its link watch, and neither stop it nor start it again."""
        return self.state.owner == shared.owner()

    @property
    def lowest(self) -> Layer | None:
        """The layer to look at, of those that are drawn: what was solved last, and what pixels are searched below."""
        if self.solving is None:
            return None
        drawn = [layer for layer in self.solving.layers if layer.tiles]
        below = [layer for layer in drawn if layer.name == self.solving.boundary]
        return next(iter(below or drawn[-1:]), None)

    @property
    def misfit(self) -> str:
        """The column of `MISFIT` that it has."""
        held = self.work.config.needs_layers and self.work.config.activations > 0
        instead = self.solving is not None and solved.matching_instead(self.solving)
        return "activations.raw" if held and not instead else "distance"

    @property
    def quality(self) -> list[tuple[str, str]]:
        """How good it is: against the originals, or else all that the attacker has to go by."""
        pictures = self.progress.pictures if self.progress is not None else None
        if self.work.originals is None:
            name, value = MISFIT[self.misfit][0], None
            if pictures is not None:
                value = pictures.distance if self.misfit == "distance" else pictures.activations
            return [(name[0].lower() + name[1:], "–" if value is None else markup.number(value))]
        psnr = metrics.mean(pictures.psnr) if pictures is not None else None
        return [
            ("PSNR of the consensus" if self.work.config.seeds > 1 else "PSNR", markup.decibel(psnr)),
            ("of a constant colour", markup.decibel(self.facts.mean_baseline)),
        ]
