"""What moves the images: Adam over normalised pixels, or L-BFGS over pixels that a sigmoid keeps in [0, 1].

Both work by turns: `trial` is where the next gradient is wanted, `step` takes it. So one step is one evaluation of each
seed, whatever the optimiser does with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from gradinv.config import AttackConfig
from gradinv.types import Preprocessing

HISTORY = 20
"""How many steps L-BFGS derives its curvature from."""

# A trial is accepted where the value falls by this share of what the slope promises (Armijo; Nocedal and Wright 2006,
# Eqn 3.4), or stays the same to float32 rounding.
_SUFFICIENT = 1e-4
_ROUNDING = 3e-7
# How far the first step along the gradient goes, as the root mean square over the unknowns.
_FIRST = 0.05
# So many trials along a direction are refused before the history is dropped.
_REFUSED = 10
# Pixels as the sigmoid begins with them: at 0 and 1 it has no slope.
_MARGIN = 0.02


class Optimiser(Protocol):
    """The images of some seeds, normalised (g, B, 3, h, h), and how they move."""

    @property
    def images(self) -> Tensor:
        """What has been reached."""

    @property
    def trial(self) -> Tensor:
        """Where the gradient is wanted for the next step."""

    def usable(self, gradient: Tensor, values: list[float]) -> bool:
        """Whether a step can be made of this; where not, the objective has stopped being finite for good."""

    def step(self, gradient: Tensor, values: list[float], rate: float, noise: Tensor | None) -> None:
        """One step: the gradient at the trial, in its shape, and each seed's value there. Only Adam takes the learning
        rate and, in the images' shape, the noise."""

    def enter(self, images: Tensor) -> None:
        """Begin a stage from these images: maybe of another size, with an objective that may have changed."""

    def tensors(self) -> dict[str, Tensor]:
        """All that changes from step to step; one row a seed, but for scalars."""

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go back to where `tensors` was called."""


def optimiser_of(config: AttackConfig, preprocessing: Preprocessing, images: Tensor) -> Optimiser:
    """The one that the config names, at normalised images (g, B, 3, h, h)."""
    kinds: dict[str, type[Adam] | type[LBFGS]] = {"adam": Adam, "l-bfgs": LBFGS}
    return kinds[config.optimiser](config, preprocessing, images)


class Adam:
    """Adam (Kingma and Ba 2015), fed with the gradient or its sign, with pixel noise and clamping after each step."""

    def __init__(self, config: AttackConfig, preprocessing: Preprocessing, images: Tensor) -> None:
        self._config = config
        self._limits = preprocessing.bounds(images)
        self._images = images
        self._project()
        self._begin()

    def _begin(self) -> None:
        self._images.requires_grad_()
        self._adam = torch.optim.Adam([self._images], lr=self._config.learning_rate)

    @property
    def images(self) -> Tensor:
        return self._images.detach()

    @property
    def trial(self) -> Tensor:
        return self._images.detach()

    def usable(self, gradient: Tensor, values: list[float]) -> bool:
        return bool(gradient.isfinite().all())

    def step(self, gradient: Tensor, values: list[float], rate: float, noise: Tensor | None) -> None:
        self._images.grad = gradient.sign() if self._config.optimiser_step == "sign" else gradient
        self._adam.param_groups[0]["lr"] = rate
        self._adam.step()
        with torch.no_grad():
            if noise is not None:
                self._images += noise
            self._project()

    def _project(self) -> None:
        if self._config.box:
            low, high = self._limits
            self._images.data.clamp_(low, high)

    def enter(self, images: Tensor) -> None:
        # Adam's moments belong to pixels of a size, not to how the objective is annealed.
        if images.shape != self._images.shape:
            self._images = images.detach().clone()
            self._begin()

    def tensors(self) -> dict[str, Tensor]:
        state = self._adam.state_dict()["state"].get(0, {})
        return {"images": self._images, **{f"adam.{name}": value for name, value in state.items()}}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self._images = tensors["images"].clone()
        self._begin()
        state = {name.removeprefix("adam."): v for name, v in tensors.items() if name.startswith("adam.")}
        if state:
            self._adam.load_state_dict({**self._adam.state_dict(), "state": {0: state}})


# What L-BFGS keeps of each seed as one number, in the order of a row.
_VALUE, _STEP, _SLOPE, _COUNT, _REFUSALS, _BROKEN = range(6)


class LBFGS:
    """L-BFGS (Nocedal and Wright 2006, Algorithm 7.4) with a history and a backtracking line search for each seed.

    The unknowns are w with pixels = sigmoid(w). From an accepted point the trial is point + step · direction; one that
    is refused shortens the step to the minimum of the parabola through both, one that is accepted gives the next
    direction. Where no step is accepted (a corner of a ReLU or of a maximum, rounding, values that are not finite) the
    history is dropped and steepest descent tried; where that fails as well the point is the best there is.
    """

    def __init__(self, config: AttackConfig, preprocessing: Preprocessing, images: Tensor) -> None:
        self._preprocessing = preprocessing
        self._begin(images)

    def enter(self, images: Tensor) -> None:
        begun = bool(self._numbers[:, _VALUE].isnan().all())
        if not begun or images.shape != self._point.shape:  # a run that was stopped here enters the stage once more
            self._begin(images)

    def _begin(self, images: Tensor) -> None:
        pixels = self._preprocessing.denormalise(images.detach())
        self._point = torch.logit(pixels.clamp(_MARGIN, 1 - _MARGIN))
        self._gradient, self._direction = torch.zeros_like(self._point), torch.zeros_like(self._point)
        shape = (len(images), HISTORY, self._point[0].numel())
        self._steps, self._changes = self._point.new_zeros(shape), self._point.new_zeros(shape)
        self._numbers = torch.zeros(len(images), 6, dtype=torch.float64)
        self._numbers[:, _VALUE] = math.nan  # not evaluated yet

    @property
    def images(self) -> Tensor:
        return self._preprocessing.normalise(self._point.sigmoid())

    @property
    def trial(self) -> Tensor:
        return self._preprocessing.normalise(self._tried().sigmoid())

    def _tried(self) -> Tensor:
        step = self._numbers[:, _STEP].to(self._point)
        return self._point + step.view(-1, 1, 1, 1, 1) * self._direction

    def usable(self, gradient: Tensor, values: list[float]) -> bool:
        for row, value, own in zip(self._numbers.tolist(), values, gradient, strict=True):
            last = row[_BROKEN] and row[_REFUSALS] + 1 >= _REFUSED
            if (last or math.isnan(row[_VALUE])) and not self._finite(value, own):
                return False
        return True

    @staticmethod
    def _finite(value: float, gradient: Tensor) -> bool:
        return math.isfinite(value) and bool(gradient.isfinite().all())

    def step(self, gradient: Tensor, values: list[float], rate: float, noise: Tensor | None) -> None:
        pixels = (tried := self._tried()).sigmoid()
        one = pixels.new_zeros(3, 1, 1)
        scale = self._preprocessing.normalise(one + 1) - self._preprocessing.normalise(one)  # 1 / std
        gradient = gradient * scale * pixels * (1 - pixels)  # with respect to w
        for seed, value in enumerate(values):
            self._advance(seed, tried[seed], value, gradient[seed])

    def _advance(self, seed: int, tried: Tensor, value: float, gradient: Tensor) -> None:
        row = self._numbers[seed]
        before, step, slope = (float(row[place]) for place in (_VALUE, _STEP, _SLOPE))
        finite = self._finite(value, gradient)
        if math.isnan(before):
            self._accept(seed, tried, value, gradient)
            self._descend(seed)
        elif finite and value <= before + _SUFFICIENT * step * slope + _ROUNDING * abs(before):
            moved, changed = step * self._direction[seed], gradient - self._gradient[seed]
            curvature = _dot(moved, changed)
            if curvature > 1e-10 * _dot(changed, changed):  # else the model would have no minimum
                slot = int(row[_COUNT]) % HISTORY
                self._steps[seed, slot], self._changes[seed, slot] = moved.flatten(), changed.flatten()
                row[_COUNT] += 1
            self._accept(seed, tried, value, gradient)
            self._direction[seed] = self._newton(seed)
            row[_STEP], row[_SLOPE] = 1.0, _dot(self._direction[seed], gradient)
            if row[_SLOPE] >= 0 or row[_COUNT] == 0:
                self._descend(seed)
        else:
            row[_REFUSALS] += 1
            if row[_REFUSALS] >= _REFUSED:
                row[_BROKEN], row[_REFUSALS] = 1.0, 0.0
                self._descend(seed)
                return
            bend = (value - before) / step - slope if finite else math.inf
            shorter = -0.5 * slope * step / bend if bend > 0 else 0.5 * step
            row[_STEP] = min(max(shorter, 0.1 * step), 0.5 * step)

    def _accept(self, seed: int, point: Tensor, value: float, gradient: Tensor) -> None:
        self._point[seed], self._gradient[seed] = point, gradient
        row = self._numbers[seed]
        row[_VALUE], row[_REFUSALS], row[_BROKEN] = value, 0.0, 0.0

    def _descend(self, seed: int) -> None:
        """Steepest descent without a history."""
        gradient, row = self._gradient[seed], self._numbers[seed]
        self._direction[seed] = -gradient
        row[_COUNT], row[_SLOPE] = 0.0, -_dot(gradient, gradient)
        # Long enough for the change of the gradient to be more than rounding.
        row[_STEP] = _FIRST * math.sqrt(gradient.numel() / max(-float(row[_SLOPE]), 1e-30))

    def _newton(self, seed: int) -> Tensor:
        """−H ∇ by the two-loop recursion (Algorithm 7.4), in the shape of a seed's images."""
        count = int(self._numbers[seed, _COUNT])
        steps, changes = self._steps[seed], self._changes[seed]
        newest_first = [index % HISTORY for index in range(count - 1, max(-1, count - 1 - HISTORY), -1)]
        direction = -self._gradient[seed].flatten()
        products = {index: torch.dot(steps[index], changes[index]) for index in newest_first}
        alphas: dict[int, Tensor] = {}
        for index in newest_first:
            alphas[index] = torch.dot(steps[index], direction) / products[index]
            direction = torch.addcmul(direction, changes[index], alphas[index], value=-1)
        if newest_first:
            newest = newest_first[0]
            direction = direction * (products[newest] / torch.dot(changes[newest], changes[newest]))
        for index in reversed(newest_first):
            beta = torch.dot(changes[index], direction) / products[index]
            direction = torch.addcmul(direction, steps[index], alphas[index] - beta)
        return direction.view_as(self._gradient[seed])

    def tensors(self) -> dict[str, Tensor]:
        kept = {name: getattr(self, f"_{name}") for name in _KEPT}
        return {"images": self.images, **{f"lbfgs.{name}": value for name, value in kept.items()}}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        device = self._point.device
        for name in _KEPT:
            value = tensors[f"lbfgs.{name}"]
            setattr(self, f"_{name}", value.clone() if name == "numbers" else value.to(device, copy=True))


_KEPT = ("point", "gradient", "direction", "steps", "changes", "numbers")


def _dot(one: Tensor, other: Tensor) -> float:
    return float(torch.dot(one.flatten(), other.flatten()))


def upsample(images: Tensor, side: int) -> Tensor:
    """(…, 3, h, h) → (…, 3, side, side), bilinear; the images themselves where they have that size."""
    if images.shape[-1] == side:
        return images
    flat = F.interpolate(images.reshape(-1, *images.shape[-3:]), (side, side), mode="bilinear", align_corners=False)
    return flat.reshape(*images.shape[:-2], side, side)
