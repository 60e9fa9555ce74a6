"""What is optimised: every seed's images from stage to stage, and what resuming needs of them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional as F

from gradinv.attack.consensus import consensus
from gradinv.attack.optimiser import LBFGS, Adam, Optimiser, upsample
from gradinv.config import AttackConfig
from gradinv.execution.distributed import ALONE, Ranks
from gradinv.models import Model
from gradinv.types import GradinvError

T = TypeVar("T")

# What the tensors of an optimiser are called, up to a dot.
OPTIMISED = ("images", "adam", "lbfgs")


@dataclass(frozen=True, eq=False)
class RunState:
    """All that the steps after the first `step` depend on, on the CPU; `seconds` is how long those had taken."""

    step: int
    seconds: float
    tensors: Mapping[str, Tensor]

    def pack(self) -> bytes:
        """The content of a safetensors file that `load` reads."""
        facts = {"step": self.step, "seconds": self.seconds}
        return safetensors.torch.save(dict(self.tensors), metadata={"state": json.dumps(facts)})

    @classmethod
    def load(cls, path: str | Path) -> RunState:
        """Raises GradinvError where there is no such file or it is not a whole state."""
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                facts = json.loads((file.metadata() or {})["state"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            return cls(int(facts["step"]), float(facts["seconds"]), tensors)
        except FileNotFoundError as error:
            raise GradinvError(f"There is no saved state {path}, so the run has to be started again.") from error
        except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
            raise GradinvError(f"The saved state {path} is damaged ({error}); start the run again.") from error


class Run:
    """The state that is optimised: the images of this rank's seeds with their optimiser, and their generators.

    `begun` is how many steps were done before, where it was restored. `_group` is the group's mean that the seeds are
    drawn to: once registration has begun it is held between two, and with L-BFGS for a stage. Where there are several
    ranks, all of them call each method that tells of the group or of other ranks' seeds.
    """

    def __init__(
        self,
        model: Model,
        batch_size: int,
        config: AttackConfig,
        start: Tensor | None = None,
        ranks: Ranks = ALONE,
        separable: bool = False,
    ) -> None:
        """start: what every seed's noise is added to; separable: whether the objective is a sum over images."""
        self.model = model
        self.config = config
        self.ranks = ranks
        self._mine = ranks.share(config.seeds)
        size = model.preprocessing.size
        self.plan = stage_plan(config, size)
        self._generators = [
            torch.Generator(model.device).manual_seed(_seed_of(config.seed, index)) for index in self._mine
        ]
        side = self.plan[0].side
        images = self.normal((len(self._mine), batch_size, 3, side, side)) * config.start_scale
        if start is not None:
            images += F.interpolate(start, (side, side), mode="area")
        self.optimiser: Optimiser
        if config.optimiser == "adam":
            self.optimiser = Adam(config, model.preprocessing, images)
        else:
            self.optimiser = LBFGS(model.preprocessing, images, separable)
        self.begun = 0
        self._group: Tensor | None = None
        self._gathered: dict[str, Tensor] | None = None

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Normal numbers (g, …), each seed's from its own generator."""
        device = self.model.device
        return torch.stack([torch.randn(tuple(shape[1:]), generator=own, device=device) for own in self._generators])

    def tensors(self) -> dict[str, Tensor]:
        """Everything that changes from step to step, of all seeds, copied to the CPU; `restore` takes it, whatever the
        number of ranks. With several it is what they held at the last `gather`."""
        return self._copied() if self._gathered is None else self._gathered

    def gather(self) -> Tensor:
        """Every seed's normalised images (G, B, 3, S, S) at full size, also those of the other ranks."""
        if self.ranks.count == 1:
            return self.full_size()
        self._gathered = self._copied()
        return upsample(self._gathered["images"], self.model.preprocessing.size)

    def _copied(self) -> dict[str, Tensor]:
        found = self.optimiser.tensors()
        found["generators"] = torch.stack([generator.get_state() for generator in self._generators])
        if self._group is not None:
            found["group"] = self._group
        copied = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in found.items()}
        for name, value in copied.items():  # in the same order on each rank
            if name not in ("adam.step", "group"):  # which are no seed's own
                copied[name] = self.ranks.gather(value, self.config.seeds)
        return copied | {f"generator.{index}": state.clone() for index, state in enumerate(copied.pop("generators"))}

    def restore(self, state: RunState) -> None:
        """Go back to where `tensors` was called. Raises GradinvError for the state of another run."""
        tensors, device = dict(state.tensors), self.model.device
        sides = {stage.side for stage in self.plan}
        count, batch_size = self.config.seeds, self.optimiser.images.shape[1]
        mine = slice(self._mine.start, self._mine.stop)
        try:
            images = tensors["images"]
            side = images.shape[-1]
            if images.shape != (count, batch_size, 3, side, side) or side not in sides:
                raise GradinvError(f"images of the shape {tuple(images.shape)}")
            if not 0 <= state.step <= self.config.iterations:
                raise GradinvError(f"{state.step} steps")
            for index, generator in zip(self._mine, self._generators, strict=True):
                generator.set_state(tensors[f"generator.{index}"])
            own = {name: value for name, value in tensors.items() if name.partition(".")[0] in OPTIMISED}
            # Copies: the run goes on in place.
            own = {name: (value[mine] if value.dim() else value).clone() for name, value in own.items()}
            self.optimiser.restore({**own, "images": own["images"].to(device)})
        except (GradinvError, KeyError, IndexError, RuntimeError, TypeError) as error:
            raise GradinvError(f"The saved state is that of another run ({error}); start this one again.") from error
        self._group = tensors["group"].to(device, copy=True) if "group" in tensors else None
        self.begun = state.step

    def enter(self, step: int) -> Stage:
        """The stage of the step after `step` others; with its first step the images get its size."""
        stage = stage_at(self.plan, step)
        if step == stage.first:
            self.optimiser.enter(upsample(self.optimiser.images, stage.side))
        return stage

    def full_size(self) -> Tensor:
        """This rank's normalised images (g, B, 3, S, S), upsampled where the stage is coarser."""
        return upsample(self.optimiser.images, self.model.preprocessing.size)

    def meet(self, step: int) -> None:
        """Let each seed go on from what all agree on after `step` steps: their mean is nearer than any of them, and
        lies in no local minimum of theirs."""
        shape = self.optimiser.images.shape
        agreed = F.interpolate(self.consensus(step), shape[-2:], mode="area")
        self.optimiser.begin(agreed + self.config.meeting_scale * self.normal(shape))

    def consensus(self, step: int) -> Tensor:
        """What the seeds agree on after `step` steps, normalised (B, 3, S, S): registered once that has begun."""
        begun = step >= self.config.registration_start * self.config.iterations
        with torch.no_grad():
            registration = self.config.registration if begun else "lazy"
            return consensus(self.full_size(), registration, count=self.config.seeds, ranks=self.ranks)

    def group_target(self, step: int, stage: Stage) -> Tensor:
        """E(x̂_{g∈G}) of Eqn 11: the plain mean of this step, or the registered mean (Eqn 12), renewed at intervals.
        L-BFGS compares values from step to step, so for it the objective stays the same throughout a stage."""
        config = self.config
        if config.group == 0:  # nothing is drawn to it
            return self.full_size().mean(0)
        if config.optimiser == "l-bfgs":
            held = step > stage.first
        else:
            first = math.ceil(config.registration_start * config.iterations)
            interval = max(1, round(config.registration_interval * config.iterations))
            held = config.registration != "lazy" and step > first and (step - first) % interval > 0
        if self._group is None or not held:
            self._group = self.consensus(step)
        return self._group


@dataclass(frozen=True)
class Stage:
    """A part of a run: from which step on, the side in pixels, the sharpness of the stem's maximum (None: the maximum
    itself), and what the weight of total variation is multiplied by."""

    first: int
    side: int
    sharpness: float | None = None
    variation: float = 1.0

    @property
    def annealed(self) -> tuple[float | None, float]:
        """How the objective differs in this stage: sharpness and variation."""
        return self.sharpness, self.variation


def stage_plan(config: AttackConfig, size: int) -> list[Stage]:
    """The stages of a run at full size `size`: coarse to fine by `stages`, annealed by `pooling` and `tv_schedule` in
    equal shares. One begins wherever either changes."""
    shares = config.stages or (1.0,)
    sides, share = {}, 0.0
    for index, own in enumerate(shares):
        sides[round(share * config.iterations)] = max(1, size >> (len(shares) - 1 - index))
        share += own
    count = max(len(config.pooling), len(config.tv_schedule), 1)
    pooling, variation = config.pooling or (0.0,) * count, config.tv_schedule or (1.0,) * count
    annealed = {
        round(index * config.iterations / count): (pooling[index] or None, variation[index]) for index in range(count)
    }

    def latest(found: Mapping[int, T], step: int) -> T:
        return found[max(first for first in found if first <= step)]

    return [Stage(first, latest(sides, first), *latest(annealed, first)) for first in sorted({*sides, *annealed})]


def meeting_steps(config: AttackConfig) -> tuple[int, ...]:
    """After how many steps the seeds meet, in order; of one seed there is no meeting."""
    return tuple(sorted({round(share * config.iterations) for share in config.meetings if config.seeds > 1}))


def stage_at(plan: Sequence[Stage], step: int) -> Stage:
    """The stage that a step after `step` others belongs to."""
    return next(stage for stage in reversed(plan) if step >= stage.first)


def learning_rate(step: int, config: AttackConfig) -> float:
    """Linear warm-up, then cosine decay to 0 at the end of the run."""
    warmup = min(config.warmup, config.iterations // 10)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, config.iterations - warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def _seed_of(seed: int, index: int) -> int:
    # Spread so that seed 0 of run 1 is not seed 1 of run 0.
    return (seed * 1_000_003 + index * 7_919 + 1) % 2**63
