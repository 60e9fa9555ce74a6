"""What is optimised: every seed's images from stage to stage, and what resuming needs of them."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional as F

from gradinv.attack.consensus import consensus
from gradinv.config import AttackConfig
from gradinv.distributed import ALONE, Ranks
from gradinv.models import Model
from gradinv.stepping import Stepped, Stepper
from gradinv.types import GradinvError


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
    """The state that is optimised: the images of this rank's seeds, their generators, one Adam over all of them.

    `_group` is the group's mean that the seeds are drawn to: once registration has begun it is held between two.
    Where there are several ranks, all of them call each method that tells of the group or of other ranks' seeds.
    """

    def __init__(
        self,
        model: Model,
        batch_size: int,
        config: AttackConfig,
        start: Tensor | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.model = model
        self.config = config
        self.ranks = ranks
        self._mine = ranks.share(config.seeds)
        size = model.preprocessing.size
        self._plan = stage_plan(config, size)
        self._generators = [
            torch.Generator(model.device).manual_seed(_seed_of(config.seed, index)) for index in self._mine
        ]
        side = self._plan[0][1]
        noise = [self._normal(index, (batch_size, 3, side, side)) for index in range(len(self._mine))]
        self.images = torch.stack(noise) * config.start_scale
        if start is not None:
            self.images += F.interpolate(start, (side, side), mode="area")
        self._group: Tensor | None = None
        self._gathered: dict[str, Tensor] | None = None
        self._limits = model.preprocessing.bounds(self.images)
        self._project()
        self._adam = self._optimiser()

    def _optimiser(self) -> torch.optim.Adam:
        self.images.requires_grad_()
        return torch.optim.Adam([self.images], lr=self.config.learning_rate)

    def _normal(self, index: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self._generators[index], device=self.model.device)

    def _project(self) -> None:
        if self.config.box:
            low, high = self._limits
            self.images.data.clamp_(low, high)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that changes from step to step, of all seeds, copied to the CPU; `restore` takes it, whatever the
        number of ranks. With several it is what they held at the last `gather`."""
        return self._copied() if self._gathered is None else self._gathered

    def gather(self) -> Tensor:
        """Every seed's normalised images (G, B, 3, S, S) at full size, also those of the other ranks."""
        if self.ranks.count == 1:
            return self.full_size().detach()
        self._gathered = self._copied()
        return upsample(self._gathered["images"], self.model.preprocessing.size)

    def _copied(self) -> dict[str, Tensor]:
        adam = self._adam.state_dict()["state"].get(0, {})
        found = {"images": self.images, **{f"adam.{name}": value for name, value in adam.items()}}
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
        # Copies: the run goes on in place.
        tensors, device = {name: value.clone() for name, value in state.tensors.items()}, self.model.device
        sides = {side for _, side in self._plan}
        count, batch_size = self.config.seeds, self.images.shape[1]
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
        except (GradinvError, KeyError, IndexError, RuntimeError, TypeError) as error:
            raise GradinvError(f"The saved state is that of another run ({error}); start this one again.") from error
        self.images = images[mine].to(device)
        self._adam = self._optimiser()
        adam = {name.removeprefix("adam."): value for name, value in tensors.items() if name.startswith("adam.")}
        adam = {name: value[mine] if value.dim() else value for name, value in adam.items()}
        if adam:
            self._adam.load_state_dict({**self._adam.state_dict(), "state": {0: adam}})
        self._group = tensors["group"].to(device) if "group" in tensors else None

    def full_size(self) -> Tensor:
        """This rank's normalised images (g, B, 3, S, S), upsampled where the stage is coarser."""
        return upsample(self.images, self.model.preprocessing.size)

    def step(self, step: int, stepper: Stepper, stop: threading.Event) -> list[Stepped] | None:
        """One iteration of this rank's seeds; None, and nothing changed, where `stop` was set on the way on any rank.

        Raises GradinvError where the objective is not finite on any rank, or one is lost.
        """
        config = self.config
        self._enter_stage(step)
        full = self.full_size()
        judgements = stepper.each(full.detach(), self._drawn_to(step), stop)
        gradient = None
        if len(judgements) == len(full):
            gradient = torch.stack([judged.gradient for judged in judgements])
            # Through the upsampling of a coarse stage.
            (gradient,) = torch.autograd.grad(full, self.images, gradient)
        stopped, diverged = self.ranks.any(gradient is None, gradient is not None and not gradient.isfinite().all())
        if stopped or gradient is None:
            return None
        if diverged:
            raise GradinvError(
                f"The objective stopped being finite at iteration {step + 1}; "
                "take a lower learning rate or other weights."
            )
        self.images.grad = gradient.sign() if config.optimiser_step == "sign" else gradient
        rate = learning_rate(step, config)
        self._adam.param_groups[0]["lr"] = rate
        self._adam.step()
        with torch.no_grad():
            if config.noise > 0:
                noise = [self._normal(index, tuple(images.shape)) for index, images in enumerate(self.images)]
                self.images += rate * config.noise * torch.stack(noise)
            self._project()
        return judgements

    def consensus(self, step: int) -> Tensor:
        """What the seeds agree on after `step` steps, normalised (B, 3, S, S): registered once that has begun."""
        begun = step >= self.config.registration_start * self.config.iterations
        with torch.no_grad():
            registration = self.config.registration if begun else "lazy"
            return consensus(self.full_size(), registration, count=self.config.seeds, ranks=self.ranks)

    def _drawn_to(self, step: int) -> Tensor:
        """E(x̂_{g∈G}) of Eqn 11: the plain mean of this step, or the registered mean (Eqn 12), renewed at intervals."""
        config = self.config
        if config.group == 0:  # nothing is drawn to it
            return self.full_size().detach().mean(0)
        first = math.ceil(config.registration_start * config.iterations)
        interval = max(1, round(config.registration_interval * config.iterations))
        held = config.registration != "lazy" and step > first and (step - first) % interval > 0
        if self._group is None or not held:
            self._group = self.consensus(step)
        return self._group

    def _enter_stage(self, step: int) -> None:
        side = next(side for first, side in reversed(self._plan) if step >= first)
        if side != self.images.shape[-1]:
            self.images = upsample(self.images.detach(), side)
            # Adam's moments belong to the coarser pixels: a new stage starts them afresh.
            self._adam = self._optimiser()


def upsample(images: Tensor, side: int) -> Tensor:
    """(…, 3, h, h) → (…, 3, side, side), bilinear; the images themselves where they have that size."""
    if images.shape[-1] == side:
        return images
    flat = F.interpolate(images.reshape(-1, *images.shape[-3:]), (side, side), mode="bilinear", align_corners=False)
    return flat.reshape(*images.shape[:-2], side, side)


def stage_plan(config: AttackConfig, size: int) -> list[tuple[int, int]]:
    """Coarse to fine: the first step and the side in pixels of each stage, the last at full size."""
    shares = config.stages or (1.0,)
    plan, first = [], 0.0
    for index, share in enumerate(shares):
        side = max(1, size >> (len(shares) - 1 - index))
        plan.append((round(first * config.iterations), side))
        first += share
    return plan


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
