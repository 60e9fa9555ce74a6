"""The input of convolutions where the gradient's equations alone are too few, by convex optimisation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Event

import torch
from torch import Tensor

from gradinv.recovery.convex_problem import MOST_NOISE, Layer, Problem, normal, problem_of_input
from gradinv.recovery.convolution import Equations, columns

_REFRESH = 25  # iterations between two exact residuals
_PROBE = 0.2  # the twin's share of the iterations
_ABSURD = 3.0  # a start that explains the layers so badly comes of equations that contradict each other
_TURN = 10.0  # a larger share of the last direction is rounding
_LEAST = 50  # iterations before convergence is believed
_STUCK = 0.75  # the residual falls below this share as the iterations double, unless equations contradict each other
_SETTLED = 2e-3  # x has converged if the second half of the iterations moved it by a smaller share


@dataclass(frozen=True, eq=False)
class ConvexSolution:
    """The input `x` (B, C, H, W) ≥ 0 of a residual block, with the estimated relative `error` ‖x − x*‖ / ‖x*‖ of each
    image (B,), 1 where nothing can be said.

    `residual` is the share of the equations' right side that is left unexplained, the larger one of the gradient's
    and the layers' own. `equations` and `unknowns` are counted per channel of x; of the former only equalities.
    """

    x: Tensor
    error: Tensor
    residual: float
    equations: int
    unknowns: int


@torch.no_grad()
def solve_convex(
    equations: Sequence[Equations],
    layers: Sequence[Layer],
    shape: tuple[int, int, int, int],
    *,
    mean: Tensor | None = None,
    settled: Tensor | None = None,
    noise: float = 1e-6,
    iterations: int = 400,
    stop: Event | None = None,
) -> ConvexSolution:
    """Solve the input x (B, C, H, W) = `shape` of convolutions from everything that is linear or an inequality in it.

    equations: of the gradients of convolutions that x goes into; layers: what is known of their outputs, which has the
    same x, and x ≥ 0. `mean` (C,) is a guess of each channel's mean, the mean of the gradient's solution where there is
    none. `settled` (B, C, H, W) holds the channels that are known already, and no numbers (nan) in those that are to be
    solved. `noise` is the least relative error of what is given; where the equations contradict each other more than
    that, the gradient's are taken for less exact. The search takes at most so many `iterations`, and the estimate of
    the error a fifth of them. `stop` ends it within an iteration, with an error of 1 where there was no time to
    estimate it.

    Of all solutions the likeliest is taken, for activations that vary around a channel's mean and are alike at
    neighbouring positions. The error is measured on a twin: the same equations as x itself would meet them, with the
    noise that is assumed, solved from x plus a random deviation such as activations have. What is left of the deviation
    is the error, extrapolated to all iterations, and larger where x leaves more unexplained than the twin. On the
    bundled networks its ratio to the true error was 0.75 to 2 for errors of 0.02 to 0.2, 1.2 to 3 where
    cotangents, activations or masks were wrong, and up to 20 (so too cautious) for errors of 1e-5.

    Raises GradinvError where no gradient passes.
    """
    if settled is None:
        settled = torch.full(shape, torch.nan, dtype=torch.float64)
    wanted = settled.isnan().any(3).any(2).any(0)
    problem = problem_of_input(equations, layers, mean, settled, wanted, noise)
    x, error = _solve(problem, iterations, stop or Event())
    found = settled.to(x, copy=True)
    found[:, wanted] = problem.maps(x)
    share = found[:, wanted].flatten(1).norm(dim=1) / found.flatten(1).norm(dim=1).clamp(min=1e-30)
    return ConvexSolution(found, error * share, problem.residual(x), problem.equations, problem.unknowns)


def _solve(problem: Problem, iterations: int, stop: Event) -> tuple[Tensor, Tensor]:
    """The solution (n, C) and the relative error of each image (B,)."""
    search = _Search(problem, problem.targets, problem.start)
    while not search.misfit() < _ABSURD * problem.size and problem.noise < MOST_NOISE and not stop.is_set():
        problem.assume(min(MOST_NOISE, 10 * problem.noise))
        search = _Search(problem, problem.targets, problem.start)
    done = 0
    readings = {0: (problem.start, math.inf)}
    while done < iterations and not stop.is_set():
        search.step()
        done += 1
        if search.count % _REFRESH and done < iterations:
            continue
        search.refresh()
        x = search.x.clamp(min=0)
        misfit = search.misfit()
        readings[search.count] = x, misfit
        if search.count < _LEAST:
            continue
        before, misfit_before = readings[search.count // (2 * _REFRESH) * _REFRESH]
        if (
            misfit > _STUCK * misfit_before
            and misfit > 3 * problem.noise * problem.size
            and problem.noise < MOST_NOISE
            and done + _LEAST < iterations
        ):
            # The layers contradict the gradient: it is less exact than was assumed.
            problem.assume(min(MOST_NOISE, math.sqrt(problem.noise * misfit / problem.size)))
            search = _Search(problem, problem.targets, problem.start)
            readings = {0: (problem.start, math.inf)}
        elif float((x - before).norm()) < _SETTLED * float(x.norm()):
            break
    search.refresh()
    x = search.x.clamp(min=0)
    return x, _twin(problem, x, search.misfit(), search.count, stop)


class _Search:
    """Conjugate gradients (Polak–Ribière) on ½‖violated equations‖² + ½ρ‖x − start‖² in the metric of T⁻¹.

    x = start + T q. Along a direction the residuals are linear, so that each step costs one forward and one transposed
    pass and the best length is found exactly. The directions are float32; x and the residuals are brought up to date
    in float64 by `refresh`.
    """

    def __init__(self, problem: Problem, targets: list[Tensor], start: Tensor) -> None:
        self._problem, self._targets, self._start = problem, targets, start
        self._sum = torch.zeros_like(start)  # q
        self._dual = torch.zeros_like(start, dtype=torch.float32)  # the same, for the steps
        self._gradient: Tensor | None = None
        self._slope = 0.0
        self._direction = self._direction_dual = self._dual
        self.count = 0
        self.refresh()

    def refresh(self) -> None:
        """x and its residuals from q, exactly."""
        self.x = self._start + self._problem.covariance(self._sum)
        self._residuals = [r.float() for r in self._problem.forward(self.x, self._targets)]
        self._dual = self._sum.float()

    def misfit(self) -> float:
        """The root mean square of the layers' violated equations."""
        return self._problem.mean_square(self._residuals) ** 0.5

    def step(self) -> None:
        problem = self._problem
        wrong = problem.violations(self._residuals)
        gradient = columns(problem.quick.transposed(wrong[:-1])) + problem.positivity * wrong[-1]
        gradient += problem.ridge * self._dual
        moved = problem.covariance(gradient)
        slope = float((gradient * moved).sum())
        self.count += 1
        if slope <= 0:  # nothing but rounding is left; T is not exactly positive in float32
            self._gradient = None
            return
        turn = 0.0
        if self._gradient is not None:
            turn = (slope - float((self._gradient * moved).sum())) / self._slope
        if 0 < turn < _TURN:
            self._direction = turn * self._direction - moved
            self._direction_dual = turn * self._direction_dual - gradient
        else:
            self._direction, self._direction_dual = -moved, -gradient
        self._gradient, self._slope = gradient, slope
        change = [*problem.quick(problem.maps(self._direction)), problem.positivity * self._direction]
        length = self._length(change)
        self._sum += length * self._direction_dual
        self._dual += length * self._direction_dual
        for residual, part in zip(self._residuals, change, strict=True):
            residual.add_(part, alpha=length)

    def _length(self, change: list[Tensor]) -> float:
        """The step at which the objective is least along the direction: Newton's method, it being piecewise quadratic
        and convex there."""
        problem, length = self._problem, 0.0
        inner = problem.ridge * float((self._dual * self._direction).sum())
        curve = problem.ridge * float((self._direction_dual * self._direction).sum())
        for _ in range(4):
            at = [r + length * c for r, c in zip(self._residuals, change, strict=True)] if length else self._residuals
            wrong = problem.violations(at)
            first = sum(float((w * c).sum()) for w, c in zip(wrong, change, strict=True))
            counted = [c * (w == a) for w, a, c in zip(wrong, at, change, strict=True)]
            second = sum(float((part * c).sum()) for part, c in zip(counted, change, strict=True))
            if second + curve <= 0:
                break
            more = -(first + inner + length * curve) / (second + curve)
            length += more
            if abs(more) <= 1e-2 * abs(length):
                break
        return length


def _twin(problem: Problem, x: Tensor, misfit: float, iterations: int, stop: Event) -> Tensor:
    """The relative error of each image (B,) after so many iterations, measured where the answer is known.

    The twin's equations are met by x, up to the noise that is assumed. Its search starts at x plus a deviation, and
    ends after a part of the iterations; the rest is a power law through two readings. Where the real residual is larger
    than the twin's, so is the error.
    """
    generator = torch.Generator().manual_seed(0)
    images = problem.shape[0]

    def sizes(x: Tensor) -> Tensor:
        return x.reshape(images, -1).norm(dim=1)

    size = sizes(x).clamp(min=1e-30)
    targets = []
    for output, target, on in zip(problem.exact(problem.maps(x)), problem.targets, problem.on, strict=True):
        met = torch.where(on, output, torch.maximum(output, target))
        targets.append(met + problem.layer_noise * normal(met.shape, generator, met))
    search = _Search(problem, targets, x + problem.deviation(x, generator))
    end = max(2, round(_PROBE * iterations))
    readings = []
    while search.count < end:
        if stop.is_set():
            return torch.ones_like(size)
        search.step()
        if search.count in (end // 2, end):
            search.refresh()
            solved = search.x.clamp(min=0)
            readings.append(torch.cat([sizes(solved - x) / size, size.new_tensor([search.misfit()])]))
    middle, last = (reading.clamp(min=1e-30) for reading in readings)
    power = (torch.log(middle / last) / math.log(end / (end // 2))).clamp(0, 2)
    final = last * (end / max(end, iterations)) ** power
    # The noise of its targets is what the twin's residual ends at, however fast it falls before.
    excess = misfit / final[-1].clamp(min=problem.layer_noise)
    return (final[:-1] * excess.clamp(min=1)).clamp(max=1)
