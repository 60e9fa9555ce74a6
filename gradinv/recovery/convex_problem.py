"""What is known of a convolution's input where its gradient alone does not determine it: a convex problem."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from gradinv.network import Block, Unit
from gradinv.recovery.convolution import Equations, affine, geometry, transposed, weight_of
from gradinv.types import GradinvError

MOST_NOISE = 0.3  # the largest share by which equations are assumed to be wrong
_CORRELATION = 1.0  # pixels of the map over which an activation's correlation falls to 1/e


@dataclass(frozen=True, eq=False)
class Layer:
    """What is known of a map of the input x: unit(x), the unit's batch normalisation without its offset, or x itself
    where there is no unit, is the `target` where that is `on` (bool) and at most the target elsewhere; (B, O, h, w)."""

    unit: Unit | None
    target: Tensor
    on: Tensor


def layers_of_input(block: Block, activations: Mapping[str, Tensor]) -> list[Layer]:
    """What a residual block's activations say of its input: activations (B, O, h, w) by node name, of the block's first
    node, others where they are known, and the block's own.

        BN(conv1(x)) = h where h > 0, ≤ 0 where h = 0; BN(shortcut(x)) = out − rest(h) where out > 0, ≤ where out = 0

    with BN in eval mode.
    """
    first, shortcut = block.units[0], block.shortcut
    inner = h = activations[first.name].double()
    out = activations[block.name].double()
    for unit in block.units[1:-1]:
        inner = activations[unit.name].double() if unit.name in activations else F.relu(affine(unit, inner))
    rest = affine(block.units[-1], inner)
    if shortcut is not None:
        rest = rest + shortcut.offset.double()[:, None, None]
    return [Layer(first, h - first.offset.double()[:, None, None], h > 0), Layer(shortcut, out - rest, out > 0)]


def mean_of_input(block: Block, activations: Mapping[str, Tensor]) -> Tensor:
    """A guess of each channel's mean (C,) of a block's input: through a 1 × 1 shortcut BN's running mean tells it, an
    identity block's output is about as large as its input."""
    out = activations[block.name].double()
    if block.shortcut is None:
        return out.mean((0, 2, 3))
    weight = block.shortcut.conv.weight.detach().double().mean((2, 3))
    mean = block.shortcut.bn.running_mean
    if mean is None:
        return out.mean().expand(weight.shape[1])
    return torch.linalg.lstsq(weight, mean.double()[:, None]).solution[:, 0].clamp(min=0)


def problem_of_input(
    equations: Sequence[Equations],
    layers: Sequence[Layer],
    mean: Tensor | None,
    settled: Tensor,
    wanted: Tensor,
    noise: float,
) -> Problem:
    """The problem of `solve_convex`, for the wanted channels (C,) bool."""
    images, _, height, width = settled.shape
    shape = images, int(wanted.sum()), height, width
    rows, right = _gradient_equations(equations, height, width)
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

    def maps(dtype: torch.dtype) -> _Layers:
        return _Layers(units, shape, wanted, dtype)

    return Problem(rows, right[:, wanted], maps, targets, on, mean[wanted], shape, noise)


def _gradient_equations(equations: Sequence[Equations], height: int, width: int) -> tuple[Tensor, Tensor]:
    """A (p, n) and G (p, C) of the input that the convolutions share."""
    rows, right = [], []
    for part in equations:
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


def _level(rows: Tensor, right: Tensor) -> Tensor:
    """The mean (C,) that explains most of the gradient's equations (p, C) if each channel were constant."""
    sums = rows.sum(1)
    return ((sums @ right) / sums.square().sum().clamp(min=1e-300)).clamp(min=0)


class Problem:
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
        self.positivity = math.sqrt(self.exact.power())  # x ≥ 0 weighs as much as the other equations

        self._whitened: Tensor | None = None  # L⁻¹AR, LLᵀ = ARAᵀ + τ
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
            self.assume(min(MOST_NOISE, shown))
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
        free = normal(x.shape, generator, x) @ mix.T
        factor = torch.linalg.cholesky(self._prior)
        free = (factor @ free.view(self.shape[0], len(factor), -1)).view(x.shape)
        wrong = math.sqrt(self.tau) * float(x.std()) * normal(self._known.shape, generator, x)
        return free - self.explained(self._matrix @ free + wrong)

    def violations(self, residuals: list[Tensor]) -> list[Tensor]:
        """Of the layers' residuals and of x what is not allowed: all where the node is on, else what is too high, and
        what of x is negative."""
        floors = self._floors if residuals[0].dtype == torch.float32 else [floor.double() for floor in self._floors]
        layers = [torch.maximum(r, floor) for r, floor in zip(residuals[:-1], floors, strict=True)]
        return [*layers, residuals[-1].clamp(max=0)]

    def forward(self, x: Tensor, targets: list[Tensor]) -> list[Tensor]:
        """The residuals at x (n, C), in float64."""
        return [*(p - t for p, t in zip(self.exact(self.maps(x)), targets, strict=True)), self.positivity * x]

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


def normal(shape: Sequence[int], generator: torch.Generator, like: Tensor) -> Tensor:
    """Normal numbers of the type and on the device of `like`."""
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(like)


def _alike(height: int, width: int, device: torch.device) -> Tensor:
    """R: how alike an activation is at two positions of a map, (H·W, H·W)."""
    y, x = torch.meshgrid(
        torch.arange(height, dtype=torch.float64), torch.arange(width, dtype=torch.float64), indexing="ij"
    )
    places = torch.stack([y.flatten(), x.flatten()], 1)
    return torch.exp(-torch.cdist(places, places) / _CORRELATION).to(device)
