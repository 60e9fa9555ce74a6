"""What the page knows of a run: its batch, how far it is, and how good."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gradinv import metrics
from gradinv.jobs import JobState
from gradinv.sources import Credit
from gradinv.types import GradinvError
from gradinv.web.parts import markup, solved
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


def work_of(state: JobState) -> tuple[Inversion, Facts]:
    """The job of a run and what the page knows of it. Raises GradinvError where another page started it."""
    work = state.work
    if not isinstance(work, Inversion) or not isinstance(work.facts, Facts):
        raise GradinvError("This run was not started from this page.")
    return work, work.facts


def size_of(work: Inversion) -> int:
    """How many pictures the batch has."""
    return work.client.batch_size


def progress_of(state: JobState) -> Progress | None:
    """How far the search is, None as long as there is no picture."""
    return state.update if isinstance(state.update, Progress) else None


def solving_of(state: JobState) -> Solving | None:
    """How far the layers are solved, None as long as that has not begun."""
    return state.update.solving if isinstance(state.update, Progress) else state.update


def lowest(solving: Solving | None) -> Layer | None:
    """The layer to look at, of those that are drawn: what was solved last, and what the pixels are searched below."""
    if solving is None:
        return None
    drawn = [layer for layer in solving.layers if layer.tiles]
    below = [layer for layer in drawn if layer.name == solving.boundary]
    return next(iter(below or drawn[-1:]), None)


def quality(state: JobState, progress: Progress | None) -> list[tuple[str, str]]:
    """How good it is: against the originals, or else all that the attacker has to go by."""
    work, facts = work_of(state)
    pictures = progress.pictures if progress is not None else None
    if work.originals is None:
        column = column_of(work, solving_of(state))
        name, value = MISFIT[column][0], None
        if pictures is not None:
            value = pictures.distance if column == "distance" else pictures.activations
        return [(name[0].lower() + name[1:], "–" if value is None else markup.number(value))]
    psnr = metrics.mean(pictures.psnr) if pictures is not None else None
    return [
        ("PSNR of the consensus" if work.config.seeds > 1 else "PSNR", markup.decibel(psnr)),
        ("of a constant colour", markup.decibel(facts.mean_baseline)),
    ]


def column_of(work: Inversion, solving: Solving | None) -> str:
    """The column of `MISFIT` that this run has."""
    held = work.config.needs_layers and work.config.activations > 0
    instead = solving is not None and solved.matching_instead(solving)
    return "activations.raw" if held and not instead else "distance"
