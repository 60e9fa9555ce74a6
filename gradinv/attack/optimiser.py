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
# 3.4), or stays the same to float32 rounding.
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

    def usable(self, gradient: Tensor, values: Tensor) -> bool:
        """Whether a step can be made of this; where not, the objective has stopped being finite for good."""

    def step(self, gradient: Tensor, values: Tensor, rate: float) -> None:
        """One step: the gradient at the trial, in its shape, and the value there of each seed (g, 1) or of each image
        (g, B). Only Adam takes the learning rate."""

    def project(self) -> None:
        """Onto the pixels' range, where the config asks for it."""

    def enter(self, images: Tensor) -> None:
        """Begin a stage from these images: maybe of another size, with an objective that may have changed."""

    def begin(self, images: Tensor) -> None:
        """Begin anew from these images, and forget the steps before."""

    def tensors(self) -> dict[str, Tensor]:
        """All that changes from step to step; one row a seed, but for scalars."""

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go back to where `tensors` was called."""


class Adam:
    """Adam (Kingma and Ba 2015), fed with the gradient or its sign."""

    def __init__(self, config: AttackConfig, preprocessing: Preprocessing, images: Tensor) -> None:
        self._config = config
        self._limits = preprocessing.bounds(images)
        self.begin(images)

    def begin(self, images: Tensor) -> None:
        self._images = images
        self.project()
        self._reset()

    def _reset(self) -> None:
        self._images.requires_grad_()
        self._adam = torch.optim.Adam([self._images], lr=self._config.learning_rate)

    @property
    def images(self) -> Tensor:
        return self._images.detach()

    @property
    def trial(self) -> Tensor:
        return self._images.detach()

    def usable(self, gradient: Tensor, values: Tensor) -> bool:
        return bool(gradient.isfinite().all())

    def step(self, gradient: Tensor, values: Tensor, rate: float) -> None:
        self._images.grad = gradient.sign() if self._config.optimiser_step == "sign" else gradient
        self._adam.param_groups[0]["lr"] = rate
        self._adam.step()

    def add(self, noise: Tensor) -> None:
        """Add noise, in the images' shape."""
        self._images.data += noise

    def project(self) -> None:
        if self._config.projection:
            low, high = self._limits
            self._images.data.clamp_(low, high)

    def enter(self, images: Tensor) -> None:
        # Adam's moments belong to pixels of a size, not to how the objective is annealed.
        if images.shape != self._images.shape:
            self._images = images.detach().clone()
            self._reset()

    def tensors(self) -> dict[str, Tensor]:
        state = self._adam.state_dict()["state"].get(0, {})
        return {"images": self._images, **{f"adam.{name}": value for name, value in state.items()}}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self._images = tensors["images"].clone()
        self._reset()
        state = {name.removeprefix("adam."): v for name, v in tensors.items() if name.startswith("adam.")}
        if state:
            self._adam.load_state_dict({**self._adam.state_dict(), "state": {0: state}})


# What L-BFGS keeps of each row as one number.
_VALUE, _STEP, _SLOPE, _REFUSALS, _BROKEN, _CURVATURE = range(6)


class LBFGS:
    """L-BFGS (Nocedal and Wright 2006, Algorithm 7.4), with a history and a backtracking line search for each row: for
    each image of each seed where the objective is a sum over images, else for each seed.

    The unknowns are w with pixels = sigmoid(w). From an accepted point the trial is point + step · direction; one that
    is refused shortens the step to the minimum of the parabola through both, one that is accepted gives the next
    direction. No row waits for another. Where no step is accepted (a corner of a ReLU or of a maximum, rounding, values
    that are not finite) the row's history is dropped and steepest descent tried; where that fails as well the point is
    the best there is.
    """

    def __init__(self, preprocessing: Preprocessing, images: Tensor, separable: bool) -> None:
        self._preprocessing = preprocessing
        self._rows = images.shape[:2].numel() if separable else len(images)
        self.begin(images)

    def enter(self, images: Tensor) -> None:
        begun = bool(self._numbers[:, _VALUE].isnan().all())
        if not begun or images.shape != self._shape:  # a run that was stopped here enters the stage once more
            self.begin(images)

    def begin(self, images: Tensor) -> None:
        self._shape = images.shape
        pixels = self._preprocessing.denormalise(images.detach())
        self._point = torch.logit(pixels.clamp(_MARGIN, 1 - _MARGIN)).reshape(self._rows, -1)
        self._gradient, self._direction = torch.zeros_like(self._point), torch.zeros_like(self._point)
        # Pairs of a step and the gradient's change, in a ring; ρ = 1 / their product, 0 where there is none.
        self._moves = self._point.new_zeros(HISTORY, *self._point.shape)
        self._changes = torch.zeros_like(self._moves)
        self._inverse = self._point.new_zeros(HISTORY, self._rows)
        self._turn = 0
        self._numbers = torch.zeros(self._rows, 6, dtype=torch.float64, device=self._point.device)
        self._numbers[:, _VALUE] = math.nan  # not evaluated yet

    @property
    def images(self) -> Tensor:
        return self._normalised(self._point)

    @property
    def trial(self) -> Tensor:
        return self._normalised(self._tried())

    def _normalised(self, point: Tensor) -> Tensor:
        return self._preprocessing.normalise(point.view(self._shape).sigmoid())

    def _tried(self) -> Tensor:
        return self._point + self._numbers[:, _STEP, None].to(self._point) * self._direction

    def usable(self, gradient: Tensor, values: Tensor) -> bool:
        first = self._numbers[:, _VALUE].isnan()
        last = (self._numbers[:, _BROKEN] > 0) & (self._numbers[:, _REFUSALS] + 1 >= _REFUSED)
        return not bool(((first | last) & ~self._finite(gradient, values)).any())

    def _finite(self, gradient: Tensor, values: Tensor) -> Tensor:
        return values.reshape(-1).isfinite() & gradient.reshape(self._rows, -1).isfinite().all(1)

    def project(self) -> None:
        """The sigmoid keeps them there."""

    def step(self, gradient: Tensor, values: Tensor, rate: float) -> None:
        finite = self._finite(gradient, values)
        tried = self._tried()
        gradient = self._through_sigmoid(gradient, tried)
        new = values.reshape(-1).to(self._numbers)
        value, step, slope, refusals, broken, curvature = self._numbers.clone().unbind(1)
        promised = value + _SUFFICIENT * step * slope + _ROUNDING * value.abs()
        first = value.isnan()
        accepted = first | (finite & (new <= promised))

        moved, changed = tried - self._point, gradient - self._gradient
        product, length = _dot(moved, changed), _dot(changed, changed)
        kept = accepted & ~first & (product > 1e-10 * length)  # else the model would have no minimum
        self._moves[self._turn] = torch.where(kept[:, None], moved, 0)
        self._changes[self._turn] = torch.where(kept[:, None], changed, 0)
        self._inverse[self._turn] = torch.where(kept, 1 / product, 0)
        self._turn = (self._turn + 1) % HISTORY
        curvature = torch.where(kept, product / length, curvature)
        self._point = torch.where(accepted[:, None], tried, self._point)
        self._gradient = torch.where(accepted[:, None], gradient, self._gradient)

        # A refused row tries a shorter step, and after too many steepest descent.
        bend = (new - value) / step - slope
        shorter = torch.where(finite & (bend > 0), -0.5 * slope * step / bend, 0.5 * step)
        shorter = torch.minimum(torch.maximum(shorter, 0.1 * step), 0.5 * step)
        refusals = torch.where(accepted, 0, refusals + 1)
        lost = refusals >= _REFUSED
        newton = self._newton(curvature)
        promises = _dot(newton, self._gradient).to(slope)
        downhill = (curvature > 0) & (promises < 0) & ~lost
        # Long enough for the change of the gradient to be more than rounding.
        square = _dot(self._gradient, self._gradient).to(slope)
        begin = _FIRST * (self._point.shape[1] / square.clamp(min=1e-30)).sqrt()
        turned = (accepted | lost)[:, None]
        towards = torch.where(downhill[:, None], newton, -self._gradient)
        self._direction = torch.where(turned, towards, self._direction)
        dropped = (accepted | lost) & ~downhill
        self._inverse = torch.where(dropped, 0, self._inverse)
        again = torch.where(downhill, 1.0, begin)
        self._numbers = torch.stack(
            [
                torch.where(accepted, new, value),
                torch.where(accepted | lost, again, shorter),
                torch.where(accepted | lost, torch.where(downhill, promises, -square), slope),
                torch.where(lost, 0, refusals),
                torch.where(accepted, 0, torch.where(lost, 1, broken)),
                torch.where(dropped, 0, curvature),
            ],
            1,
        )

    def _through_sigmoid(self, gradient: Tensor, point: Tensor) -> Tensor:
        """The gradient with respect to normalised images as one with respect to w, by rows."""
        pixels = point.view(self._shape).sigmoid()
        zero, one = pixels.new_zeros(3, 1, 1), pixels.new_ones(3, 1, 1)
        scale = self._preprocessing.normalise(one) - self._preprocessing.normalise(zero)  # 1 / std
        return (gradient * scale * pixels * (1 - pixels)).reshape(self._rows, -1)

    def _newton(self, curvature: Tensor) -> Tensor:
        """−H ∇ by the two-loop recursion (Algorithm 7.4), by rows; a pair that was not kept does nothing."""
        newest_first = [(self._turn - 1 - back) % HISTORY for back in range(HISTORY)]
        direction, alphas = -self._gradient, dict[int, Tensor]()
        for turn in newest_first:
            alphas[turn] = self._inverse[turn] * _dot(self._moves[turn], direction)
            direction = torch.addcmul(direction, self._changes[turn], alphas[turn][:, None], value=-1)
        direction = direction * curvature.to(direction)[:, None]
        for turn in reversed(newest_first):
            beta = self._inverse[turn] * _dot(self._changes[turn], direction)
            direction = torch.addcmul(direction, self._moves[turn], (alphas[turn] - beta)[:, None])
        return direction

    def tensors(self) -> dict[str, Tensor]:
        seeds = self._shape[0]
        found = {name: getattr(self, f"_{name}").view(seeds, -1) for name in ("point", "gradient", "direction")}
        found |= {name: getattr(self, f"_{name}").movedim(0, 1).reshape(seeds, -1) for name in _RINGS}
        found |= {"numbers": self._numbers.view(seeds, -1), "turn": torch.full((seeds,), self._turn)}
        return {"images": self.images, **{f"lbfgs.{name}": value for name, value in found.items()}}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self.begin(tensors["images"])
        found = {name: tensors[f"lbfgs.{name}"] for name in ("point", "gradient", "direction", "numbers")}
        for name, value in found.items():
            own = getattr(self, f"_{name}")
            setattr(self, f"_{name}", value.to(own.device, copy=True).view_as(own))
        for name in _RINGS:
            own = getattr(self, f"_{name}")
            getattr(self, f"_{name}").copy_(tensors[f"lbfgs.{name}"].view_as(own.movedim(0, 1)).movedim(1, 0))
        self._turn = int(tensors["lbfgs.turn"][0])


_RINGS = ("moves", "changes", "inverse")


def _dot(one: Tensor, other: Tensor) -> Tensor:
    """Row by row: (r, n) each → (r,)."""
    return torch.bmm(one[:, None], other[:, :, None]).view(-1)


def upsample(images: Tensor, side: int) -> Tensor:
    """(…, 3, h, h) → (…, 3, side, side), bilinear; the images themselves where they have that size."""
    if images.shape[-1] == side:
        return images
    flat = F.interpolate(images.reshape(-1, *images.shape[-3:]), (side, side), mode="bilinear", align_corners=False)
    return flat.reshape(*images.shape[:-2], side, side)
