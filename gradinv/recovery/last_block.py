"""The first step below the pooled features: where each unit of the last block is on.

The block's output is pooled, so at each of its P = H·W positions an image's cotangent is the same vector v_k, cut by
that position's mask: d_{k,p} = a ⊙ v_k ⊙ m_{k,p} behind the last convolution, a the slope of its batch normalisation.
The gradient of a convolution is ∇W[u, v] = Σ_{k,p} d_{k,p} x_{k,p+(u,v)}ᵀ: its columns span all d, mixed. Two things
unmix them. A channel whose pooled feature is exactly 0 is off at every position, so only image k's own d vanish on all
of k's zeros. And the taps of a 3 × 3 convolution differ by a step to the neighbour, which orders the positions: see
`Steps`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gradinv.network import Block
from gradinv.recovery.gates import Gate

_ZERO = (
    5e-8  # a share of the largest feature: float32 leaves up to 1e-8 of a true 0, values above 0 were seen from 6e-8
)
_SPARE_WIDTH, _SHARPENED = 8, 4  # of the random projection whose range is taken
_MISFIT = 0.5  # positions of which more than this is neither on nor off are not told apart
_GONE = 1e-6  # a direction of which a smaller share is left on an image's zeros is that image's own
_DEAD = 1e-4  # a channel with a smaller share of the median channel's size is off
_NEAR = 0.05  # of two images' cotangents at one position, a smaller share that is left unexplained tells whose it is
_ROUNDS = 30  # of the search for sparse vectors
# What image k's zeros weigh beside the equations of one position.
_WEIGHT = 100.0


class Unsolved(Exception):
    """The step cannot be done; the message says in a sentence why."""


@dataclass(frozen=True, eq=False)
class Pooled:
    """What is known of the pooled map: `features` F (B, C) as the final layer's equations give them, not clamped, with
    their standard deviation `sigma`, and the `cotangent` of each position's value, v_k = s Wᵀ A_k / (K·P), (B, C)."""

    features: Tensor
    sigma: Tensor
    cotangent: Tensor

    @property
    def off(self) -> Tensor:
        """The channels that are off at every position, (B, C) bool."""
        largest = self.features.amax(1, keepdim=True)
        return self.features < torch.maximum(_ZERO * largest, 4 * self.sigma)


def last_gate(block: Block, gradients: Mapping[str, Tensor], pooled: Pooled, height: int, width: int) -> Gate:
    """The mask of the last block's output, (B, C, H, W), with the cotangent of its pooling.

    gradients: float64, of the block's convolutions, by parameter name. Raises Unsolved where the images or their
    positions cannot be told apart.
    """
    images, channels = pooled.cotangent.shape
    full = pooled.cotangent[:, :, None, None].expand(images, channels, height, width)
    if height * width == 1:
        margin = (pooled.features / pooled.sigma.clamp(min=1e-300))[:, :, None, None].abs()
        return Gate(full, ~pooled.off[:, :, None, None], margin)
    last = block.units[-1]
    expected = last.slope.to(pooled.cotangent) * pooled.cotangent
    gradient = gradients[f"{last.name}.weight"]
    pointwise = gradient.shape[2:] == (1, 1)
    unit = block.units[-2] if pointwise else last
    if unit.conv.kernel_size != (3, 3) or unit.conv.stride != (1, 1) or last.conv.stride != (1, 1):
        raise Unsolved(f"{unit.name} is no 3 × 3 convolution of stride 1, which would tell the positions' places")
    if not pointwise and (height, width) == (2, 2):
        mask, margin = _by_corners(gradient, expected, pooled)
    elif pointwise:
        mask, margin = _through_pointwise(block, gradients, expected, pooled, height, width)
    else:
        mask, margin = _by_steps(gradient, expected, pooled, height, width)
    return Gate(full, mask, margin)


def _by_corners(gradient: Tensor, expected: Tensor, pooled: Pooled) -> tuple[Tensor, Tensor]:
    """On a 2 × 2 map each corner tap of a 3 × 3 convolution belongs to one position, so that there is one vector an
    image to find, and its place is known."""
    images, channels = expected.shape
    mask, margin = _nothing(images, channels, 2, 2)
    for row, column in itertools.product((0, 1), (0, 1)):
        span = _span(gradient[:, :, 0 if row else 2, 0 if column else 2], images)
        for image, off in enumerate(pooled.off):
            direction, off = _vanishing(span, off)
            mask[image, :, row, column], margin[image, :, row, column] = _two_valued(direction, expected[image], off)
    return mask, margin


def _nothing(images: int, channels: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    shape = images, channels, height, width
    return torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.float64)


def _span(matrix: Tensor, rank: int) -> Tensor:
    """The leading left singular vectors of a matrix (O, C): (O, rank)."""
    if rank > min(matrix.shape):
        raise Unsolved(f"The last block tells {min(matrix.shape)} positions apart, and the images have {rank}")
    # The range of a random projection, sharpened until the others are gone: a full decomposition takes ten times that.
    generator = torch.Generator().manual_seed(0)
    width = min(rank + _SPARE_WIDTH, *matrix.shape)
    basis = matrix @ torch.randn(matrix.shape[1], width, generator=generator, dtype=matrix.dtype)
    for _ in range(_SHARPENED):
        basis = matrix @ torch.linalg.qr(matrix.T @ torch.linalg.qr(basis)[0])[0]
    basis = torch.linalg.qr(basis)[0]
    return (basis @ torch.linalg.svd(basis.T @ matrix, full_matrices=False)[0])[:, :rank]


def _vanishing(span: Tensor, off: Tensor) -> tuple[Tensor, Tensor]:
    """The vector (O,) of the span (O, rank) that is 0 where `off`, and which channels are off: those that stand out, of
    features that are not quite 0 after all, are taken out one by one."""
    if span.shape[1] == 1:
        return span[:, 0], off
    rows = off.clone()
    norms = span.norm(dim=1).clamp(min=1e-12)
    for _ in range(40):
        if int(rows.sum()) < span.shape[1] - 1:
            raise Unsolved("Too few features are exactly 0 to tell the images apart")
        left = (span @ torch.linalg.eigh(span[rows].T @ span[rows])[1][:, 0]).abs() / norms
        if float(left[rows].max()) <= max(30 * float(left[rows].median()), 1e-7):
            break
        rows[torch.where(rows, left, 0).argmax()] = False
    return span @ torch.linalg.svd(span[rows], full_matrices=True)[2][-1], rows


def _two_valued(direction: Tensor, expected: Tensor, off: Tensor) -> tuple[Tensor, Tensor]:
    """Which entries of `direction` (C,) are s · expected and which 0, for the s that fits best: → mask, and how much
    clearer that is than the other choice, in units of the misfit."""
    candidates = (direction / expected)[~off]
    candidates = candidates[candidates.isfinite()]
    if len(candidates) == 0:
        return torch.zeros_like(off), torch.full_like(expected, torch.inf)
    scaled = candidates[:, None] * expected
    cost = torch.minimum((direction - scaled).square(), direction.square()).sum(1)
    on, sure = _nearer(direction, scaled[cost.argmin()])
    return on & ~off, torch.where(off, torch.inf, sure)


def _nearer(direction: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    """Which entries of `direction` (C,) are nearer to the expected ones than to 0: → mask, and how much clearer that is
    than the other choice, in units of the misfit."""
    apart, near = (direction - expected).abs(), direction.abs()
    noise = torch.minimum(apart, near).square().mean().sqrt().clamp(min=1e-300)
    return apart < near, (apart - near).abs() / noise


class Steps:
    """The steps from a position to its neighbours, as operators on the cotangents e_{k,p} of a 3 × 3 convolution.

    Of ∇W[u, v] = Σ_{k,p} e_{k,p} x_{k,p+(u,v)}ᵀ the taps with v = -1 pair each input with the cotangent to the right of
    the one that the taps with v = 0 pair it with, and where there is none, with nothing. So the operator that takes
    ∇W[·, 0] to ∇W[·, -1] takes every e_{k,p} to e_{k,p+(0,1)}, and those of the last column to 0: it is the step to the
    right, and no search is needed to know which position lies where. Likewise the other three. It needs all e and all x
    to be linearly independent.
    """

    def __init__(self, gradient: Tensor, rank: int) -> None:
        """gradient: (O, C, 3, 3); rank: how many positions all images have. Raises Unsolved where they are too many."""
        self._span = _span(gradient.flatten(1), rank)
        columns = [gradient[:, :, :, v].flatten(1) for v in range(3)]
        rows = [gradient[:, :, u].flatten(1) for u in range(3)]
        self._right, self._left = self._step(columns[1], columns[0]), self._step(columns[1], columns[2])
        self._down, self._up = self._step(rows[1], rows[0]), self._step(rows[1], rows[2])

    def _step(self, taps: Tensor, neighbours: Tensor) -> Tensor:
        """In the coordinates of the span, (rank, rank)."""
        u, s, vh = torch.linalg.svd(self._span.T @ taps, full_matrices=False)
        return (self._span.T @ neighbours @ vh.T / s.clamp(min=1e-12 * float(s[0]) + 1e-300)) @ u.T

    def corner(self, images: int) -> Tensor:
        """What the cotangents of the upper left corner span, which no step to the left or upwards leaves: (O, B)."""
        kernel = torch.linalg.svd(torch.cat([self._left, self._up]))[2][-images:]
        return self._span @ torch.linalg.qr(kernel.T)[0]

    def from_neighbours(self, left: Tensor | None, above: Tensor | None) -> Tensor:
        """A position's cotangent (O,) from that to its left and the one above it, of which one may be missing."""
        found = [
            self._span @ (step @ (self._span.T @ neighbour))
            for step, neighbour in ((self._right, left), (self._down, above))
            if neighbour is not None
        ]
        return sum(found[1:], found[0]) / len(found)


def _by_steps(gradient: Tensor, expected: Tensor, pooled: Pooled, height: int, width: int) -> tuple[Tensor, Tensor]:
    """The corner's cotangent of each image by its zeros, then step by step, each cotangent made exact by its mask."""
    images, channels = expected.shape
    mask, margin = _nothing(images, channels, height, width)
    steps = Steps(gradient, images * height * width)
    corner = steps.corner(images)
    for image, off in enumerate(pooled.off):
        direction, off = _vanishing(corner, off)
        mask[image, :, 0, 0], margin[image, :, 0, 0] = _two_valued(direction, expected[image], off)
        exact = {(0, 0): expected[image] * mask[image, :, 0, 0]}
        for row, column in itertools.islice(itertools.product(range(height), range(width)), 1, None):
            direction = steps.from_neighbours(exact.get((row, column - 1)), exact.get((row - 1, column)))
            on, sure = _on(direction, expected[image])
            mask[image, :, row, column], margin[image, :, row, column] = on, sure
            exact[row, column] = expected[image] * on
    return mask, margin


def _on(direction: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    """As `_nearer`. Raises Unsolved where most entries are neither the expected ones nor 0."""
    on, sure = _nearer(direction, expected)
    if not float((direction - expected * on).norm()) < _MISFIT * float(direction.norm()):
        raise Unsolved("The gradient does not tell which position each value of the last block's map is at")
    return on, sure


def _through_pointwise(
    block: Block, gradients: Mapping[str, Tensor], expected: Tensor, pooled: Pooled, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """Of a bottleneck, whose last convolution is 1 × 1 and tells nothing of places, the 3 × 3 one before it does.

    With d the last one's cotangent that before it is e = b ⊙ Wᵀd where its unit is on, b the slope of its batch
    normalisation, else 0: so e tells d, which vanishes on the image's zeros.
    """
    images, channels = expected.shape
    lower, last = block.units[-2:]
    mask, margin = _nothing(images, channels, height, width)
    places = images * height * width
    gradient = gradients[f"{last.name}.weight"].flatten(1)
    span = _span(gradient, places)
    steps = Steps(gradients[f"{lower.name}.weight"], places)
    pulled = lower.slope.to(gradient)[:, None] * last.conv.weight.detach().to(gradient).flatten(1).T
    seen = [span[off].T @ span[off] for off in pooled.off]

    def upper(e: Tensor, image: int) -> tuple[float, Tensor]:
        """What is left unexplained of a cotangent e (M,), and the one above it, (C,), if it is that image's."""
        on = e.abs() > 1e-2 * e.square().mean().sqrt()
        rows = pulled[on] @ span
        normal = rows.T @ rows
        normal += _WEIGHT * float(normal.diagonal().mean()) * seen[image]
        normal.diagonal().add_(1e-14 * normal.diagonal().mean())
        factor, failed = torch.linalg.cholesky_ex(normal)
        if failed:
            return torch.inf, span[:, 0]
        found = torch.cholesky_solve(rows.T @ e[on, None], factor)[:, 0]
        return float((rows @ found - e[on]).norm() / e.norm()), span @ found

    corner = steps.corner(images)
    for image, candidates in enumerate(_corners(corner, gradient, span, seen, height * width)):
        tried = [(*upper(corner @ q, image), corner @ q) for q in candidates]
        left, direction, e = min(tried, key=lambda attempt: attempt[0])
        if not left < _NEAR:
            raise Unsolved("The gradient does not tell which image each value of the last block's map belongs to")
        on, sure = _two_valued(direction, expected[image], pooled.off[image])
        exact = dict[tuple[int, int], Tensor]()
        for row, column in itertools.product(range(height), range(width)):
            if exact:
                e = steps.from_neighbours(exact.get((row, column - 1)), exact.get((row - 1, column)))
                on, sure = _on(upper(e, image)[1], expected[image])
            mask[image, :, row, column], margin[image, :, row, column] = on, sure
            whole = pulled @ (expected[image] * on)
            # The corner's is known up to a factor.
            factor = 1.0 if exact else float((whole * e).sum() / e.square().sum().clamp(min=1e-300))
            exact[row, column] = whole * _nearer(factor * e, whole)[0]
    return mask, margin


def _corners(corner: Tensor, gradient: Tensor, span: Tensor, seen: list[Tensor], positions: int) -> list[Tensor]:
    """For each image, in which directions (n, B) of the corner's span its own cotangent may lie.

    Where the image's zeros leave just its own positions, the gradient tells which of the lower units are off at all of
    them, and so in its corner. Of what that leaves open the directions with the most zeros are taken.
    """
    images, own = len(seen), []
    for squares in seen:
        values, vectors = torch.linalg.eigh(squares)
        own.append(span @ vectors[:, values.clamp(min=0).sqrt() < _GONE])
    if images == 1 or any(part.shape[1] != positions for part in own):
        return [_sparsest(corner, torch.eye(images, dtype=span.dtype))] * images
    inputs = torch.linalg.lstsq(torch.cat(own, 1), gradient).solution.view(images, positions, -1).norm(dim=1)
    dead = inputs < _DEAD * inputs.median(1, keepdim=True).values
    found = []
    for off in dead:
        values, vectors = torch.linalg.svd(corner[off], full_matrices=True)[1:]
        rank = int((values > 1e-5).sum())
        found.append(_sparsest(corner, vectors[min(rank, images - 1) :]))
    return found


def _sparsest(span: Tensor, within: Tensor) -> Tensor:
    """Of the vectors of a span (M, B) those with the most zeros: → their coordinates (n, B), n ≤ dim, independent of
    each other. within: (dim, B), the coordinates among which to look.

    By minimising Σ|·| on the sphere, as a sequence of weighted least squares; it starts at each of the rows.
    """
    count = len(within)
    if count == 1:
        return within
    rows = span @ within.T
    rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-300)
    q = rows
    for turn in range(_ROUNDS):
        weight = 1 / ((q @ rows.T).abs() + max(1e-9, 0.1 * 0.5**turn))
        q = torch.linalg.eigh(torch.einsum("sm,mi,mj->sij", weight, rows, rows))[1][:, :, 0]
    zeros = ((q @ rows.T).abs() < _DEAD).sum(1)
    kept = q[:0]
    for start in zeros.argsort(descending=True, stable=True).tolist():
        more = torch.cat([kept, q[start : start + 1]])
        if float(torch.linalg.svdvals(more)[-1]) > 1e-3:
            kept = more
        if len(kept) == count:
            break
    return kept @ within
