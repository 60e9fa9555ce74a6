"""The input of convolutions where the gradient's equations alone are too few: a convex problem."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from threading import Event

import torch
from torch import Tensor
from torch.nn import functional as F

from gradinv.network import Block, Unit
from gradinv.recovery.convolution import Equations, Known, affine, columns, geometry, transposed, weight_of
from gradinv.types import GradinvError

_CORRELATION = 1.0  # pixels of the map over which an activation's correlation falls to 1/e
_REFRESH = 25  # iterations between two exact residuals
_PROBE = 0.2  # the twin's share of the iterations
_ABSURD = 3.0  # a start that explains the layers so badly comes of equations that contradict each other
_MOST = 0.3  # the largest noise that is assumed
_TURN = 10.0  # a larger share of the last direction is rounding
_LEAST = 50  # iterations before convergence is believed
_STUCK = 0.75  # the residual falls below this share as the iterations double, unless equations contradict each other


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
    iterations: int
    seconds: float
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
    places: Known | None = None,
    noise: float = 1e-6,
    tolerance: float = 2e-3,
    iterations: int = 400,
    seconds: float = math.inf,
    stop: Event | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> ConvexSolution:
    """Solve the input x (B, C, H, W) = `shape` of convolutions from everything that is linear or an inequality in it.

    equations: of the gradients of convolutions that x goes into; layers: what is known of their outputs, which has the
    same x, and x ≥ 0. `mean` (C,) is a guess of each channel's mean, the mean of the gradient's solution where there is
    none. `settled` (B, C, H, W) holds the channels that are known already, and no numbers (nan) in those that are to be
    solved; `places` are positions of which all channels are known beforehand. `noise` is the least relative error of
    what is given; where the equations contradict each other more than that, the gradient's are taken for less exact.
    The search ends as soon as the second half of the iterations moved x by less than the share `tolerance`, at the
    latest after that many `iterations` or `seconds`; the estimate of the error adds a fifth. `stop` ends it within an
    iteration, with an error of 1 where there was no time to estimate it. `progress` gets the iterations and the share
    of the layers' equations left unexplained.

    Of all solutions the likeliest is taken, for activations that vary around a channel's mean and are alike at
    neighbouring positions. The error is measured on a twin: the same equations as x itself would meet them, with the
    noise that is assumed, solved from x plus a random deviation such as activations have. What is left of the deviation
    is the error, extrapolated to all iterations, and larger where x leaves more unexplained than the twin. On the
    bundled networks its ratio to the true error was 0.75 to 2 for errors of 0.02 to 0.2, 1.2 to 3 where
    cotangents, activations or masks were wrong, and up to 20 (so too cautious) for errors of 1e-5.

    Raises GradinvError where no gradient passes, or something given has another shape.
    """
    started = time.monotonic()
    if settled is None:
        settled = torch.full(shape, torch.nan, dtype=torch.float64)
    wanted = settled.isnan().any(3).any(2).any(0)
    problem = _of_input(equations, layers, mean, settled, wanted, places, noise)
    x, error, done = _solve(problem, tolerance, iterations, started + seconds, stop, progress)
    found = settled.to(x, copy=True)
    found[:, wanted] = problem.maps(x)
    share = found[:, wanted].flatten(1).norm(dim=1) / found.flatten(1).norm(dim=1).clamp(min=1e-30)
    return ConvexSolution(
        x=found,
        error=error * share,
        residual=problem.residual(x),
        iterations=done,
        seconds=time.monotonic() - started,
        equations=problem.equations,
        unknowns=problem.unknowns,
    )


def layers_of_input(block: Block, activations: Mapping[str, Tensor]) -> list[Layer]:
    """What a residual block's activations say of its input: activations (B, O, h, w) by node name, of the block's first
    node, others where they are known, and the block's own.

        BN(conv1(x)) = h where h > 0, ≤ 0 where h = 0; BN(shortcut(x)) = out − rest(h) where out > 0, ≤ where out = 0

    with BN in eval mode. Raises GradinvError where the first node or the block's own is missing.
    """
    first, shortcut = block.units[0], block.shortcut
    h = _given(activations, first.name)
    out = _given(activations, block.name)
    inner = h
    for unit in block.units[1:-1]:
        inner = activations[unit.name].double() if unit.name in activations else F.relu(affine(unit, inner))
    rest = affine(block.units[-1], inner)
    if shortcut is not None:
        rest = rest + shortcut.offset.double()[:, None, None]
    return [Layer(first, h - first.offset.double()[:, None, None], h > 0), Layer(shortcut, out - rest, out > 0)]


def mean_of_input(block: Block, activations: Mapping[str, Tensor]) -> Tensor:
    """A guess of each channel's mean (C,) of a block's input: through a 1 × 1 shortcut BN's running mean tells it, an
    identity block's output is about as large as its input."""
    out = _given(activations, block.name)
    if block.shortcut is None:
        return out.mean((0, 2, 3))
    weight = block.shortcut.conv.weight.detach().double().mean((2, 3))
    mean = block.shortcut.bn.running_mean
    if mean is None:
        return out.mean().expand(weight.shape[1])
    return torch.linalg.lstsq(weight, mean.double()[:, None]).solution[:, 0].clamp(min=0)


def _solve(
    problem: _Problem,
    tolerance: float,
    iterations: int,
    until: float,
    stop: Event | None,
    progress: Callable[[int, float], None] | None,
) -> tuple[Tensor, Tensor, int]:
    """The solution (n, C), the relative error of each image (B,), the iterations."""
    halt = _Halt(stop, until)
    search = _Search(problem, problem.targets, problem.start)
    while not search.misfit() < _ABSURD * problem.size and problem.noise < _MOST and not halt():
        problem.assume(10 * problem.noise)
        search = _Search(problem, problem.targets, problem.start)
    done = 0
    readings = {0: (problem.start, math.inf)}
    while done < iterations and not halt():
        search.step()
        done += 1
        if search.count % _REFRESH and done < iterations:
            continue
        search.refresh()
        x = search.x.clamp(min=0)
        misfit = search.misfit()
        readings[search.count] = x, misfit
        if progress is not None:
            progress(done, misfit / problem.size)
        if search.count < _LEAST:
            continue
        before, misfit_before = readings[search.count // (2 * _REFRESH) * _REFRESH]
        if (
            misfit > _STUCK * misfit_before
            and misfit > 3 * problem.noise * problem.size
            and problem.noise < _MOST
            and done + _LEAST < iterations
        ):
            # The layers contradict the gradient: it is less exact than was assumed.
            problem.assume(min(_MOST, math.sqrt(problem.noise * misfit / problem.size)))
            search = _Search(problem, problem.targets, problem.start)
            readings = {0: (problem.start, math.inf)}
        elif float((x - before).norm()) < tolerance * float(x.norm()):
            break
    search.refresh()
    x = search.x.clamp(min=0)
    halt.until = math.inf  # the estimate is what makes the result of use
    return x, _twin(problem, x, search.misfit(), search.count, halt), done


class _Halt:
    """Whether to end: on an event, or after a moment of the monotonic clock."""

    def __init__(self, stop: Event | None, until: float) -> None:
        self._stop = stop
        self.until = until

    def __call__(self) -> bool:
        return (self._stop is not None and self._stop.is_set()) or time.monotonic() > self.until


@dataclass(frozen=True, eq=False)
class Layer:
    """What is known of a map of the input x: unit(x), the unit's batch normalisation without its offset, or x itself
    where there is no unit, is the `target` where that is `on` (bool) and at most the target elsewhere; (B, O, h, w)."""

    unit: Unit | None
    target: Tensor
    on: Tensor


class _Layers:
    """The layers as linear maps of the wanted channels (C,) bool of x, BN's slope in the weights."""

    def __init__(
        self,
        units: Sequence[Unit | None],
        shape: tuple[int, int, int, int],
        wanted: Tensor,
        dtype: torch.dtype,
    ) -> None:
        self._units = units
        self._shape = shape
        self._weights = [None if part is None else weight_of(part, dtype)[:, wanted] for part in units]

    def __call__(self, x: Tensor) -> list[Tensor]:
        """x (B, C, H, W) → the outputs (B, O, h, w), without BN's offsets."""
        return [
            x if part is None or weight is None else F.conv2d(x, weight, None, *geometry(part))
            for part, weight in zip(self._units, self._weights, strict=True)
        ]

    def transposed(self, outputs: list[Tensor]) -> Tensor:
        """The transposed map: tensors (B, O, h, w) → (B, C, H, W)."""
        total = torch.zeros((), dtype=outputs[0].dtype)
        for part, weight, output in zip(self._units, self._weights, outputs, strict=True):
            if part is not None and weight is not None:
                output = transposed(part, weight, output, *self._shape[2:])
            total = total + output
        return total

    def power(self) -> float:
        """The mean of the squared norms of all equations' rows."""
        powers = [
            torch.ones(1, dtype=torch.float64) if w is None else w.double().square().sum((1, 2, 3)).cpu()
            for w in self._weights
        ]
        return float(torch.cat(powers).mean())


class _Problem:
    """The equations, and the Gaussian that the gradient's make of x.

    x is kept as a matrix (n, C), n = B·H·W. Before anything is known its columns are m + √v N(0, R) with a mean m of
    their own and R = exp(−distance) between the positions of an image. The gradient's equations A x = G (p, C), whose
    A (p, n) is the same for all channels, up to noise of variance τ v, turn that into a Gaussian with the mean
    `start` = m + RAᵀ(ARAᵀ + τ)⁻¹(G − A m) and the covariance v T, T = R − RAᵀ(ARAᵀ + τ)⁻¹AR. A search that
    moves by T only keeps these equations for nothing, and this is what makes it fast: their singular values span many
    decades, those of the layers' own equations few.
    """

    def __init__(
        self,
        rows: Tensor,
        right: Tensor,
        layers: Callable[[torch.dtype], _Layers],
        targets: list[Tensor],
        on: list[Tensor],
        mean: Tensor,
        shape: tuple[int, int, int, int],
        noise: float,
    ) -> None:
        """rows: A (p, n); right: G (p, C); layers: the linear maps whose outputs are the `targets` where `on`, at most
        these elsewhere; mean: m (C,)."""
        self.shape = shape
        count, channels, height, width = shape
        self._matrix, self._known = rows, right
        self._positions = count * height * width
        self.targets, self.on = targets, on
        # A residual below its floor is none.
        self._floors = [torch.where(part, -math.inf, 0.0).float() for part in on]
        self.equations = len(rows) + round(self._count() / channels)
        self.unknowns = self._positions
        # The root mean square of what the layers' equations give.
        squares = sum(float(target[part].square().sum()) for target, part in zip(targets, on, strict=True))
        self.size = math.sqrt(squares / max(1, self._count())) or 1.0

        self.exact, self.quick = layers(torch.float64), layers(torch.float32)
        self.sign = math.sqrt(self.exact.power())  # x ≥ 0 weighs as much as the other equations

        self._whitened: Tensor | None = None  # (ARAᵀ + τ)^(−½) A R
        self._quick_whitened: Tensor | None = None
        self._dense: Tensor | None = None  # T, where that is the cheaper form
        self._prior = _alike(height, width, rows.device)
        self._quick_prior = self._prior.float()
        self._shared = self._spread(rows.T).T  # A R
        self._gram = self._shared @ rows.T
        self._mean = mean.expand(self._positions, channels)
        self.layer_noise = noise * self.size
        self.assume(noise)
        if (shown := self._shown_noise(self.start)) > noise:
            self.assume(min(_MOST, shown))
        self.ridge = self.layer_noise**2 / float(self.start.var().clamp(min=1e-30))

    def assume(self, noise: float) -> None:
        """Take the gradient's equations for wrong by this share."""
        self.noise = noise
        self.tau = 2 * noise**2 * float(self._gram.diagonal().mean()) + 1e-14
        one = torch.eye(len(self._gram)).to(self._gram)
        self._factor, failed = torch.linalg.cholesky_ex(self._gram + self.tau * one)
        while failed:  # rounding made it indefinite
            self.tau *= 10
            self._factor, failed = torch.linalg.cholesky_ex(self._gram + self.tau * one)
        self._whitened = self._quick_whitened = self._dense = None
        self.start = self._mean + self.explained(self._known - self._matrix @ self._mean)

    def _shown_noise(self, x: Tensor) -> float:
        """The share by which the gradient's equations contradict each other, 0 where they cannot."""
        spare = len(self._matrix) - self._positions
        if spare <= 0:
            return 0.0
        wrong = float((self._matrix @ x - self._known).square().sum()) / (spare * x.shape[1])
        return math.sqrt(wrong / (2 * float(self._gram.diagonal().mean() * x.var().clamp(min=1e-30))))

    def maps(self, x: Tensor) -> Tensor:
        """(n, C) → (B, C, H, W), channels last."""
        count, channels, height, width = self.shape
        return x.view(count, height, width, channels).permute(0, 3, 1, 2)

    def columns(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (n, C)."""
        return x.permute(0, 2, 3, 1).reshape(self._positions, self.shape[1])

    def _spread(self, x: Tensor) -> Tensor:
        """R x: (n, …) → (n, …)."""
        prior = self._prior if x.dtype == torch.float64 else self._quick_prior
        return (prior @ x.reshape(self.shape[0], len(prior), -1)).view(x.shape)

    def explained(self, right: Tensor) -> Tensor:
        """RAᵀ(ARAᵀ + τ)⁻¹ of a right side (p, C) → (n, C)."""
        return self._shared.T @ torch.cholesky_solve(right, self._factor)

    def covariance(self, x: Tensor) -> Tensor:
        """T x: (n, C) → (n, C), in float32 quick and rough."""
        if self._whitened is None or self._quick_whitened is None:
            self._whitened = torch.linalg.solve_triangular(self._factor, self._shared, upper=False)
            self._quick_whitened = self._whitened.float()
            if self._positions <= 2 * len(self._matrix):
                dense, size = -self._whitened.T @ self._whitened, len(self._prior)
                for at in range(0, self._positions, size):
                    dense[at : at + size, at : at + size] += self._prior
                self._dense = dense.float()
        if x.dtype == torch.float64:
            return self._spread(x) - self._whitened.T @ (self._whitened @ x)
        if self._dense is not None:
            return self._dense @ x
        return self._spread(x) - self._quick_whitened.T @ (self._quick_whitened @ x)

    def deviation(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """A random deviation from x that the gradient's equations leave open: (n, C) → (n, C).

        It varies as x does: with the covariance of its channels, and as R says between positions.
        """
        centred = x - x.mean(0)
        values, vectors = torch.linalg.eigh(centred.T @ centred / len(x))
        mix = vectors * values.clamp(min=0).sqrt()
        free = _normal(x.shape, generator, x) @ mix.T
        factor = torch.linalg.cholesky(self._prior)
        free = (factor @ free.view(self.shape[0], len(factor), -1)).view(x.shape)
        wrong = math.sqrt(self.tau) * float(x.std()) * _normal(self._known.shape, generator, x)
        return free - self.explained(self._matrix @ free + wrong)

    def violations(self, residuals: list[Tensor]) -> list[Tensor]:
        """Of the layers' residuals and of x what is not allowed: all where the node is on, else what is too high, and
        what of x is negative."""
        floors = self._floors if residuals[0].dtype == torch.float32 else [floor.double() for floor in self._floors]
        layers = [torch.maximum(r, floor) for r, floor in zip(residuals[:-1], floors, strict=True)]
        return [*layers, residuals[-1].clamp(max=0)]

    def forward(self, x: Tensor, targets: list[Tensor]) -> list[Tensor]:
        """The residuals at x (n, C), in float64."""
        return [*(p - t for p, t in zip(self.exact(self.maps(x)), targets, strict=True)), self.sign * x]

    def mean_square(self, residuals: list[Tensor]) -> float:
        """The mean square of the layers' violated equations."""
        return sum(float(w.square().sum()) for w in self.violations(residuals)[:-1]) / max(1, self._count())

    def residual(self, x: Tensor) -> float:
        """The share of the right sides that x leaves unexplained."""
        gradient = float((self._matrix @ x - self._known).norm() / self._known.norm().clamp(min=1e-30))
        layers = math.sqrt(self.mean_square(self.forward(x, self.targets))) / self.size
        return max(layers, gradient)

    def _count(self) -> int:
        return sum(int(on.sum()) for on in self.on)


def _of_input(
    equations: Sequence[Equations],
    layers: Sequence[Layer],
    mean: Tensor | None,
    settled: Tensor,
    wanted: Tensor,
    places: Known | None,
    noise: float,
) -> _Problem:
    """The problem of `solve_convex`, for the wanted channels (C,) bool."""
    images, _, height, width = settled.shape
    shape = images, int(wanted.sum()), height, width
    rows, right = _gradient_equations(equations, images, height, width)
    if places is not None:
        more = _as_equations(places, noise)
        rows, right = torch.cat([rows, more[0]]), torch.cat([right, more[1]])
    if mean is None:
        mean = _level(rows, right)
    units = [layer.unit for layer in layers]
    targets, on = [layer.target for layer in layers], [layer.on for layer in layers]
    if not wanted.all():
        others = _Layers(units, shape, ~wanted, torch.float64)(settled[:, ~wanted])
        for index, unit in enumerate(units):
            if unit is None:
                targets[index], on[index] = targets[index][:, wanted], on[index][:, wanted]
            else:
                targets[index] = targets[index] - others[index]
    return _Problem(
        rows,
        right[:, wanted],
        lambda dtype: _Layers(units, shape, wanted, dtype),
        targets,
        on,
        mean[wanted],
        shape,
        noise,
    )


def _level(rows: Tensor, right: Tensor) -> Tensor:
    """The mean (C,) that explains most of the gradient's equations (p, C) if each channel were constant."""
    sums = rows.sum(1)
    return ((sums @ right) / sums.square().sum().clamp(min=1e-300)).clamp(min=0)


class _Search:
    """Conjugate gradients (Polak–Ribière) on ½‖violated equations‖² + ½ρ‖x − start‖² in the metric of T⁻¹.

    x = start + T q. Along a direction the residuals are linear, so that each step costs one forward and one transposed
    pass and the best length is found exactly. The directions are float32; x and the residuals are brought up to date
    in float64 by `refresh`.
    """

    def __init__(self, problem: _Problem, targets: list[Tensor], start: Tensor) -> None:
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
        gradient = problem.columns(problem.quick.transposed(wrong[:-1])) + problem.sign * wrong[-1]
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
        change = [*problem.quick(problem.maps(self._direction)), problem.sign * self._direction]
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


def _twin(problem: _Problem, x: Tensor, misfit: float, iterations: int, halt: _Halt) -> Tensor:
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
        targets.append(met + problem.layer_noise * _normal(met.shape, generator, met))
    search = _Search(problem, targets, x + problem.deviation(x, generator))
    end = max(2, round(_PROBE * iterations))
    readings = []
    while search.count < end:
        if halt():
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


def _normal(shape: Sequence[int], generator: torch.Generator, like: Tensor) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(like)


def _given(known: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in known:
        raise GradinvError(f"The activation of {name} is needed to solve the block's input, and it is not known.")
    return known[name].double()


def _gradient_equations(equations: Sequence[Equations], images: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """A (p, n) and G (p, C) of the input that the convolutions share."""
    rows, right = [], []
    for part in equations:
        name, cotangent = part.unit.name, part.cotangent
        if len(cotangent) != images or cotangent.shape[1] != part.unit.conv.out_channels:
            raise GradinvError(f"The cotangent of {name} has the shape {tuple(cotangent.shape)}, not the batch's.")
        matrix = part.matrix(height, width).flatten(0, 1)
        told = matrix.square().sum(1) > 0  # a dead channel says nothing
        if told.any():
            # Rounding is a share of each convolution's own numbers.
            scale = matrix[told].square().sum(1).mean().sqrt()
            rows.append(matrix[told] / scale)
            right.append(part.right_side().flatten(0, 1)[told] / scale)
    if not rows:
        raise GradinvError(f"No gradient passes through {equations[0].unit.name}, so its input cannot be solved.")
    return torch.cat(rows), torch.cat(right)


def _as_equations(places: Known, noise: float) -> tuple[Tensor, Tensor]:
    """Rows (p, n) of which each picks a known position, and the values there (p, C); they weigh as much as equations
    with that relative noise do, or the less the less exact they are."""
    values, where, sigma = (columns(part) for part in (places.values, places.where, places.sigma))
    told = where.all(1)
    size = values[told].std()
    weight = (noise * size / sigma[told].square().mean(1).sqrt()).clamp(max=1)
    rows = torch.diag(torch.ones(len(told)).to(values))[told] * weight[:, None]
    return rows, values[told] * weight[:, None]


def _alike(height: int, width: int, device: torch.device) -> Tensor:
    """R: how alike an activation is at two positions of a map, (H·W, H·W)."""
    y, x = torch.meshgrid(
        torch.arange(height, dtype=torch.float64), torch.arange(width, dtype=torch.float64), indexing="ij"
    )
    places = torch.stack([y.flatten(), x.flatten()], 1)
    return torch.exp(-torch.cdist(places, places) / _CORRELATION).to(device)
