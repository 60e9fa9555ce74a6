"""One convolution, solved: its input from its gradient and the cotangent of its output."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from gradinv.network import Unit

# A channel whose equations are left unexplained by so many times the median's share holds a wrong mask entry.
STANDS_OUT = 12.0
# Nothing below this share of a channel's own equations is more than rounding in float32.
ROUNDING = 1e-6
# Equations for each unknown that have to be left when channels are set aside.
_SPARE, _LEAST_SPARE = 1.1, 1.02
_TELLING = 1.5  # a channel of x tells the noise of its equations if it has so many for each unknown
_ENTRIES = 4_000_000  # at most of the matrices of the channels that are solved at a time
_REFINEMENTS, _REFINED = 3, 1e-8  # of a least-squares solution at most; the share of x that the last one may change
_ONE_BY_ONE = 8  # channels at most that are set aside one by one
# A ridge, relative to the columns' norms: a column of which nothing is known gets a large σ and no infinity.
_RIDGE = 1e-14


@dataclass(frozen=True, eq=False)
class Equations:
    """∇W[o, i, u, v] = Σ_{k, p} δ[k, o, p] x[k, i, s·p + (u, v) − padding]: linear in the input x of a convolution.

    `cotangent` δ (B, O, h, w) belongs to its output, `gradient` ∇W is (O, C, m, n), both float64. The matrix is the
    same for each input channel i: O·m·n equations for B·H·W unknowns.
    """

    unit: Unit
    cotangent: Tensor
    gradient: Tensor

    def count(self, height: int, width: int) -> int:
        """How many equations there are for each input channel, but no more than places that they touch: those of a
        1 × 1 convolution of stride 2 say nothing of three places in four."""
        channels, _, *taps = self.gradient.shape
        count, touched = channels * taps[0] * taps[1], self.cotangent.shape[0]
        for side, stride, tap in zip((height, width), self.unit.conv.stride, taps, strict=True):
            touched *= side if tap >= stride else -(-side // stride)
        return count if touched == self.cotangent.shape[0] * height * width else min(count, touched)

    def matrix(self, height: int, width: int) -> Tensor:
        """(O, m·n, B·H·W), by output channel, tap and place."""
        images, channels, rows, columns = self.cotangent.shape
        (m, n), stride, pad = self.gradient.shape[2:], self.unit.conv.stride, _padding(self.unit)
        padded = self.cotangent.new_zeros(channels, m, n, images, height + 2 * pad[0], width + 2 * pad[1])
        values = self.cotangent.transpose(0, 1)
        for u in range(m):
            for v in range(n):
                down = slice(u, u + stride[0] * (rows - 1) + 1, stride[0])
                right = slice(v, v + stride[1] * (columns - 1) + 1, stride[1])
                padded[:, u, v, :, down, right] = values
        inner = padded[..., pad[0] : pad[0] + height, pad[1] : pad[1] + width]
        return inner.reshape(channels, m * n, images * height * width)

    def right_side(self) -> Tensor:
        """∇W as (O, m·n, C)."""
        return self.gradient.permute(0, 2, 3, 1).flatten(1, 2)

    def pulled_back(self, height: int, width: int) -> Tensor:
        """The cotangent of the convolution's input, (B, C, H, W)."""
        return transposed(self.unit, self.unit.conv.weight.detach().to(self.cotangent), self.cotangent, height, width)


def _padding(unit: Unit) -> tuple[int, int]:
    return _pair(cast(Sequence[int], unit.conv.padding))


def _pair(values: Sequence[int]) -> tuple[int, int]:
    return values[0], values[1]


@dataclass(frozen=True, eq=False)
class Known:
    """Entries of the input that are known beforehand: `values` with their standard deviation `sigma`, `where` (bool);
    (B, C, H, W) each, float64."""

    values: Tensor
    where: Tensor
    sigma: Tensor

    @property
    def share(self) -> float:
        """Which share of all entries is known."""
        return float(self.where.double().mean())


@dataclass(frozen=True, eq=False)
class Solution:
    """An input x (B, C, H, W) with the standard deviation `sigma` of each number, float64.

    `residual` is ‖A x − ∇W‖ / ‖∇W‖ over the equations that were used; `suspects` (O,) marks the output channels of the
    first equations that were set aside or are not explained: there the cotangent is wrong.
    """

    x: Tensor
    sigma: Tensor
    residual: float
    suspects: Tensor

    @property
    def error(self) -> Tensor:
        """The relative error ‖x − x*‖ / ‖x*‖ to be expected of each image, (B,)."""
        return self.sigma.flatten(1).norm(dim=1) / self.x.flatten(1).norm(dim=1).clamp(min=1e-30)


def solve_input(
    equations: Sequence[Equations],
    shape: tuple[int, int, int, int],
    *,
    known: Known | None = None,
    expected: float = 0.0,
) -> Solution:
    """Least squares for the input x of one or two convolutions: shape (B, C, H, W), the second one a shortcut's.

    With entries `known` beforehand only the others are solved for, in each input channel its own; where a channel has
    more of them than equations, the likeliest values are taken, near the channel's mean.

    Output channels whose equations stand out are set aside, as long as enough remain. Where the residual stays above
    the `expected` one although none stands out, equations hardly outnumber unknowns and a wrong one is spread over all:
    then the worst channel is set aside and the next one, if that brings the residual down. σ is the residual per
    equation times √diag((AᵀA)⁻¹), enlarged to what the negative values say where these are larger: a true input is
    never negative.
    """
    images, channels, height, width = shape
    places = images * height * width
    unknowns = places if known is None else places * (1 - known.share)
    given = None if known is None else (columns(known.values), columns(known.where))
    system = _System(
        [part.matrix(height, width) for part in equations], [part.right_side() for part in equations], given
    )
    kept = [torch.ones(len(part), dtype=torch.bool) for part in system.matrices]
    found = system.solve(kept)
    for _ in range(12):
        fewer = found.without_outliers(system)
        if all(torch.equal(k, now) for k, now in zip(found.kept, fewer, strict=True)):
            break
        if system.equations(fewer) < _SPARE * unknowns:
            break
        found = system.solve(fewer)
    if 0 < expected < found.residual:
        found = system.without_worst(found, expected, _LEAST_SPARE * unknowns)
    x, sigma = (part.view(images, height, width, channels).permute(0, 3, 1, 2) for part in (found.x, found.sigma))
    if known is not None:
        sigma = torch.where(known.where, known.sigma, sigma)
    suspects = ~found.without_outliers(system)[0]
    return Solution(x, sigma * _calibration(x, sigma), found.residual, suspects)


@dataclass(frozen=True, eq=False)
class _Found:
    """A least-squares solution x (n, C) of the channels that were `kept` with its standard deviation `sigma`, the share
    of their equations that is left, and each channel's misfit."""

    kept: list[Tensor]
    x: Tensor
    sigma: Tensor
    residual: float
    misfit: list[Tensor]

    def without_outliers(self, system: _System) -> list[Tensor]:
        """The channels that are kept, but for those whose misfit stands out: the worst eighth at most, since what is
        explained by the others shows only after they are gone."""
        pairs = zip(self.misfit, self.kept, system.telling, strict=True)
        used = torch.cat([part[k & telling] for part, k, telling in pairs])
        if len(used) == 0:
            return self.kept
        usual, cut = STANDS_OUT * used.median(), float(used.quantile(0.875))
        limits = [torch.maximum(usual, ROUNDING * size) for size in system.sizes]
        outliers = [(part > limit) & (part >= cut) for part, limit in zip(self.misfit, limits, strict=True)]
        return [k & ~out for k, out in zip(self.kept, outliers, strict=True)]


class _System:
    """The equations of one or two convolutions by output channel: matrices (O, m·n, n) and right sides (O, m·n, C),
    and the entries of x that are given: values and where, (n, C) each."""

    def __init__(self, matrices: list[Tensor], right: list[Tensor], given: tuple[Tensor, Tensor] | None = None) -> None:
        self.matrices = matrices
        self._given = given
        self._right = right
        self.sizes = [part.flatten(1).norm(dim=1) for part in right]
        # Those of channels that are off everywhere hold for any x, and say nothing of what is usual.
        self.telling = [(m.abs().amax((1, 2)) > 0) | (size > 0) for m, size in zip(matrices, self.sizes, strict=True)]

    def equations(self, kept: Sequence[Tensor]) -> int:
        """How many the kept channels have for each input channel."""
        return sum(m.shape[1] * int(k.sum()) for m, k in zip(self.matrices, kept, strict=True))

    def solve(self, kept: list[Tensor]) -> _Found:
        """By the kept channels alone."""
        a, g = _rows(self.matrices, kept), _rows(self._right, kept)
        x, sigma = _least_squares(a, g) if self._given is None else _completed(a, g, *self._given)
        misfit = [
            _left(m.flatten(0, 1), x, r.flatten(0, 1)).view(len(m), -1).norm(dim=1)
            for m, r in zip(self.matrices, self._right, strict=True)
        ]
        unexplained, size = (
            torch.cat([part[k] for part, k in zip(norms, kept, strict=True)]).norm() for norms in (misfit, self.sizes)
        )
        return _Found(kept, x, sigma, float(unexplained / size.clamp(min=1e-300)), misfit)

    def without_worst(self, found: _Found, expected: float, least: float) -> _Found:
        """Channels of the first equations set aside one by one, the worst first, until the residual is the expected
        one; the solution as it was where that does not come about."""
        now = found
        for _ in range(_ONE_BY_ONE):
            kept = [part.clone() for part in now.kept]
            kept[0][torch.where(kept[0], now.misfit[0], -1).argmax()] = False
            if self.equations(kept) < least:
                break
            now = self.solve(kept)
            if now.residual <= expected:
                return now
        return found


def _rows(parts: Sequence[Tensor], kept: Sequence[Tensor]) -> Tensor:
    """The rows of the kept channels of all parts (O, m, n) below each other; these are large, so copied only if they
    have to be."""
    found = [(part if k.all() else part[k]).flatten(0, 1) for part, k in zip(parts, kept, strict=True)]
    return found[0] if len(found) == 1 else torch.cat(found)


def _left(a: Tensor, x: Tensor, g: Tensor) -> Tensor:
    """What x leaves of the right sides: g − a x."""
    return torch.addmm(g, a, x, alpha=-1)


def _least_squares(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """The x that minimises ‖a x − g‖, and its standard deviation: a (E, n), g (E, C) → (n, C) twice.

    By normal equations, refined with residuals from `a` itself, which gives back the digits that squaring costs.
    """
    norms = a.norm(dim=0).clamp(min=1e-300)
    scaled = a / norms
    factor = _factor(scaled.T @ scaled)
    x, left = torch.zeros(a.shape[1], g.shape[1], dtype=a.dtype), g
    for _ in range(_REFINEMENTS):
        change = torch.cholesky_solve(scaled.T @ left, factor)
        x = x + change
        left = _left(scaled, x, g)
        if float(change.norm()) <= _REFINED * float(x.norm()):
            break
    spread = torch.cholesky_inverse(factor).diagonal().clamp(min=0).sqrt()
    noise = left.norm(dim=0) / math.sqrt(max(1, len(a) - a.shape[1]))
    return x / norms[:, None], spread[:, None] * noise / norms[:, None]


def _completed(a: Tensor, g: Tensor, values: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
    """The x that minimises ‖a x − g‖ with entries given, and its standard deviation where they are not: a (E, n),
    g (E, C), values and where (n, C) → (n, C) twice.

    Each channel lacks other entries and so has a matrix of its own. Those with many equations tell the noise first; of
    the others it says how far to trust the equations, and how far that x varies around its mean.
    """
    norms = a.norm(dim=0).clamp(min=1e-300)
    system = _Scaled(a / norms)
    lacking = (~where).sum(0)
    mean = (values * where).sum(0) / where.sum(0).clamp(min=1)
    x = torch.where(where, values, mean) * norms[:, None]
    sigma = torch.zeros_like(x)
    told = lacking * _TELLING < len(a)
    power = torch.where(where, values.square(), 0).sum() / where.sum().clamp(min=1)
    noise = ROUNDING * g.square().mean(0).sqrt()
    for group, ridged in ((told, False), (~told, True)):
        chosen = group.nonzero()[:, 0]
        chosen = chosen[lacking[chosen].argsort()]
        if ridged and told.any():
            left = system.left(x[:, told], g[:, told]).square().sum() / (len(a) - lacking[told]).sum()
            noise = torch.maximum(noise, left.sqrt())
        while len(chosen):
            most = max(1, _ENTRIES // max(1, int(lacking[chosen].max())) ** 2)
            part, chosen = chosen[:most], chosen[most:]
            ridge = noise[part].square() / power / norms.square().mean() if ridged else torch.zeros(len(part)).to(a)
            x[:, part], sigma[:, part] = system.completed(x[:, part], g[:, part], ~where[:, part], ridge, noise[part])
    return x / norms[:, None], sigma / norms[:, None]


class _Scaled:
    """The matrix a (E, n) of equations a x = g, its columns of norm 1."""

    def __init__(self, a: Tensor) -> None:
        self._a, self._gram = a, a.T @ a

    def left(self, x: Tensor, g: Tensor) -> Tensor:
        """What x (n, C) leaves of the right sides g, (E, C)."""
        return _left(self._a, x, g)

    def completed(self, start: Tensor, g: Tensor, free: Tensor, ridge: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """A few channels with their `free` entries (n, C) solved from a start, and the standard deviation of these:
        (n, C) twice. The ridge (C,) draws to the start; where there is one, the noise (C,) is the least assumed."""
        # Channels lack different entries: their matrices are padded to the same size by the identity.
        size = int(free.sum(0).max())
        order = free.to(torch.int8).argsort(dim=0, descending=True, stable=True)[:size].T  # (C, size): the free first
        there = free.T.gather(1, order)
        matrix = self._gram[order[:, :, None], order[:, None, :]] * (there[:, :, None] & there[:, None, :])
        matrix.diagonal(dim1=1, dim2=2).add_(torch.where(there, ridge[:, None], 1.0))
        factor = _factor(matrix)
        x = start
        for _ in range(3):
            pull = self._a.T @ self.left(x, g) - ridge * (x - start)
            step = torch.cholesky_solve((pull.T.gather(1, order) * there)[:, :, None], factor)[:, :, 0] * there
            x = x + torch.zeros_like(x).T.scatter(1, order, step).T
        spread = torch.cholesky_inverse(factor).diagonal(dim1=1, dim2=2).clamp(min=0).sqrt() * there
        left = (self.left(x, g).square().sum(0) / (len(g) - free.sum(0)).clamp(min=1)).sqrt()
        own = torch.where(ridge > 0, torch.maximum(left, noise), left)
        return x, torch.zeros_like(x).T.scatter(1, order, spread * own[:, None]).T


def _factor(gram: Tensor) -> Tensor:
    """The Cholesky factor of symmetric matrices (…, n, n) with a diagonal of about 1, after as small a ridge as makes
    them positive definite; it is added in place."""
    diagonal, ridge = gram.diagonal(dim1=-2, dim2=-1), _RIDGE
    diagonal += ridge
    factor, failed = torch.linalg.cholesky_ex(gram)
    while failed.any():
        ridge *= 100
        diagonal += ridge * (failed > 0)[..., None]
        factor, failed = torch.linalg.cholesky_ex(gram)
    return factor


def weight_of(unit: Unit, dtype: torch.dtype) -> Tensor:
    """The convolution's weight with BN's slope in it, in the layout that is quick."""
    weight = unit.conv.weight.detach().double() * unit.slope.double()[:, None, None, None]
    return weight.to(dtype).contiguous(memory_format=torch.channels_last)


def affine(unit: Unit, x: Tensor) -> Tensor:
    """BN(conv(x)) in float64, whatever the network's own type: (B, C, H, W) → (B, O, h, w)."""
    return F.conv2d(x, weight_of(unit, torch.float64), unit.offset.double(), *geometry(unit), unit.conv.groups)


def transposed(unit: Unit, weight: Tensor, output: Tensor, height: int, width: int) -> Tensor:
    """The transposed map of a unit's convolution, with a weight of its own: (B, O, h, w) → (B, C, height, width)."""
    stride, padding, dilation = geometry(unit)
    sizes = zip((height, width), output.shape[2:], stride, padding, dilation, weight.shape[2:], strict=True)
    lacking = [side - ((out - 1) * s - 2 * p + d * (taps - 1) + 1) for side, out, s, p, d, taps in sizes]
    return F.conv_transpose2d(output, weight, None, stride, padding, lacking, unit.conv.groups, dilation)


def geometry(unit: Unit) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Stride, padding and dilation of a unit's convolution."""
    conv = unit.conv
    return _pair(conv.stride), _padding(unit), _pair(conv.dilation)


def columns(maps: Tensor) -> Tensor:
    """(B, C, H, W) → (B·H·W, C)."""
    return maps.permute(0, 2, 3, 1).flatten(0, 2)


def _calibration(x: Tensor, sigma: Tensor) -> float:
    """By how much σ has to be enlarged for the negative values to be as rare as a normal distribution has them."""
    below = (-x / sigma.clamp(min=1e-300))[x < 0]
    if len(below) < 100:
        return 1.0
    below = below[torch.linspace(0, len(below) - 1, min(len(below), 1_000_000)).long()]
    return max(1.0, float(below.sort().values[int(0.98 * (len(below) - 1))]) / 2.33)
