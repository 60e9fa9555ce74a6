"""The first step below the pooled features: where each unit of the last block is on.

The block's output is pooled, so at each of its P = H·W positions an image's cotangent is the same vector v_k, cut by
that position's mask: d_{k,p} = a ⊙ v_k ⊙ m_{k,p} behind the last convolution, a the slope of its batch normalisation. A
tap of the gradient is G = Σ_{k,p} d_{k,p} x_{k,p}ᵀ, so its columns span all d, mixed. What unmixes them is that a
channel whose pooled feature is exactly 0 is off at every position: only image k's own d vanish on all of k's zeros.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gradinv.network import Block
from gradinv.recovery.convolution import Gate

# In units of the typical row: two rows this close are the same, a coordinate this far from 0 and 1 is neither.
_SAME = 5e-3
_WHOLE = 0.1
# Of the rows that weigh most so many are looked at; on a map of so few positions so many clusters are tried as atoms.
_ROWS, _SMALL_MAP, _CLUSTERS = 400, 4, 14
_EXPLAINED = 0.8  # the share of the rows, at least, that the atoms have to explain


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
        return self.features < torch.maximum(1e-5 * largest, 4 * self.sigma)


def last_gate(block: Block, gradients: Mapping[str, Tensor], pooled: Pooled, height: int, width: int) -> Gate:
    """The mask of the last block's output, (B, C, H, W), with the cotangent of its pooling.

    gradients: float64, by parameter name. Raises Unsolved where the images cannot be told apart.
    """
    images, channels = pooled.cotangent.shape
    positions = height * width
    full = pooled.cotangent[:, :, None, None].expand(images, channels, height, width)
    if positions == 1:
        margin = (pooled.features / pooled.sigma.clamp(min=1e-300))[:, :, None, None].abs()
        return Gate(full, ~pooled.off[:, :, None, None], margin)
    last = block.units[-1]
    gradient = gradients[f"{last.name}.weight"]
    taps = gradient.shape[2:]
    if last.conv.stride != (1, 1):
        raise Unsolved(f"The last convolution, {last.name}, has a stride")
    if taps == (3, 3) and (height, width) == (2, 2):
        return _by_corners(gradient, last.slope.to(gradient), pooled, full)
    centre = gradient[:, :, taps[0] // 2, taps[1] // 2]
    slots = _slots(centre, last.slope.to(gradient), pooled, positions, gradients[f"{last.bn_name}.bias"])
    placed = _placed(block, gradients, pooled, slots, height, width)
    return Gate(full, placed, torch.full_like(full, torch.inf).contiguous())


def _by_corners(gradient: Tensor, slope: Tensor, pooled: Pooled, full: Tensor) -> Gate:
    """On a 2 × 2 map each corner tap of a 3 × 3 convolution belongs to one position, so that there is one vector an
    image to find, and its place is known."""
    mask, margin = torch.zeros_like(full, dtype=torch.bool), torch.zeros_like(full).contiguous()
    for row, column in itertools.product((0, 1), (0, 1)):
        span = _span(gradient[:, :, 0 if row else 2, 0 if column else 2], len(full))
        for image, off in enumerate(pooled.off):
            basis, off = _vanishing(span, off, 1)
            direction = span @ basis[:, 0]
            expected = slope * pooled.cotangent[image]
            on, sure = _two_valued(direction, expected, off)
            mask[image, :, row, column] = on
            margin[image, :, row, column] = sure
    return Gate(full, mask, margin)


def _span(tap: Tensor, rank: int) -> Tensor:
    """The leading left singular vectors of a tap (O, C): (O, rank)."""
    if rank > min(tap.shape):
        raise Unsolved(
            f"The last convolution tells {min(tap.shape)} vectors apart, and the images have {rank} positions"
        )
    return torch.linalg.svd(tap, full_matrices=False)[0][:, :rank]


def _vanishing(span: Tensor, off: Tensor, dimension: int) -> tuple[Tensor, Tensor]:
    """The coordinates q (rank, dimension) with span[off] q = 0, and which channels are off: those that stand out, of
    features that are not quite 0 after all, are taken out one by one."""
    if dimension == span.shape[1]:
        return torch.eye(dimension, dtype=span.dtype), off
    rows = off.clone()
    norms = span.norm(dim=1).clamp(min=1e-12)
    for _ in range(40):
        if int(rows.sum()) < span.shape[1] - dimension:
            raise Unsolved("Too few features are exactly 0 to tell the images apart")
        q = torch.linalg.eigh(span[rows].T @ span[rows])[1][:, :dimension]
        left = (span @ q).norm(dim=1) / norms
        if float(left[rows].max()) <= max(30 * float(left[rows].median()), 1e-7):
            break
        rows[torch.where(rows, left, 0).argmax()] = False
    return torch.linalg.svd(span[rows], full_matrices=True)[2][-dimension:].T, rows


def _two_valued(direction: Tensor, expected: Tensor, off: Tensor) -> tuple[Tensor, Tensor]:
    """Which entries of `direction` (C,) are s · expected and which 0, for the s that fits best: → mask, and how much
    clearer that is than the other choice, in units of the misfit."""
    candidates = (direction / expected)[~off]
    candidates = candidates[candidates.isfinite()]
    if len(candidates) == 0:
        return torch.zeros_like(off), torch.full_like(expected, torch.inf)
    scaled = candidates[:, None] * expected
    cost = torch.minimum((direction - scaled).square(), direction.square()).sum(1)
    predicted = scaled[cost.argmin()]
    apart, near = (direction - predicted).abs(), direction.abs()
    noise = (cost.min() / len(direction)).sqrt().clamp(min=1e-300)
    return (apart < near) & ~off, torch.where(off, torch.inf, (apart - near).abs() / noise)


def _slots(tap: Tensor, slope: Tensor, pooled: Pooled, positions: int, bias_gradient: Tensor) -> Tensor:
    """The masks of all positions of each image, in any order: (B, C, P) bool.

    An image's rows R_c = (span Q)_c / (a_c v_c) are sums of some of P unknown vectors, the atoms: of those positions at
    which channel c is on. How many these are follows from Σ_k v_{k,c} n_{k,c} = ∇β_c, in which n = R u is linear.
    """
    images = len(pooled.cotangent)
    span = _span(tap, images * positions)
    rows, offs = [], []
    for off in pooled.off:
        basis, off = _vanishing(span, off, positions)
        rows.append(torch.where(off[:, None], 0, span @ basis))
        offs.append(off)
    joint = torch.cat(rows, 1) / slope[:, None]
    weights = torch.linalg.lstsq(joint, bias_gradient[:, None], driver="gelsd").solution.view(images, positions)
    found = torch.zeros(*pooled.cotangent.shape, positions, dtype=torch.bool)
    for image, off in enumerate(offs):
        expected = slope * pooled.cotangent[image]
        alive = (~off).nonzero()[:, 0]
        r = rows[image][alive] / expected[alive, None]
        found[image, alive] = _combinations(r, expected[alive].abs(), r @ weights[image])
    return found


def _combinations(r: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Rows r (n, P), each a sum of some of P unknown atoms → which, (n, P) bool. `weight` (n,) says how well a row is
    known, `counts` (n,) of how many atoms it is the sum. Raises Unsolved where no atoms explain the rows."""
    size = r.norm(dim=1).median()
    order = weight.argsort(descending=True)
    points, share = _clusters(r[order[:_ROWS]], size)
    one = order[(counts[order] - 1).abs() < _WHOLE]
    best, most = None, 0.0
    for atoms in _atoms(points, _clusters(r[one], size)[0]):
        coordinates = torch.linalg.solve(atoms.T, points.T).T
        whole = ((coordinates - coordinates.round().clamp(0, 1)).abs() < _WHOLE).all(1)
        if float(share[whole].sum()) > most:
            best, most = atoms, float(share[whole].sum())
        if most > 0.999 * float(share.sum()):
            break
    if best is None or most < _EXPLAINED * float(share.sum()):
        raise Unsolved("No set of positions explains the last convolution's gradient")
    return torch.linalg.solve(best.T, r.T).T > 0.5


def _clusters(r: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (n, P) that are the same up to noise, by their first one, and how many they are; the largest first."""
    free = torch.ones(len(r), dtype=torch.bool)
    points, count = [], []
    for index in range(len(r)):
        if free[index]:
            same = free & ((r - r[index]).norm(dim=1) < _SAME * size)
            free &= ~same
            points.append(index)
            count.append(int(same.sum()))
    order = torch.tensor(count, dtype=torch.long).argsort(descending=True, stable=True)
    return r[torch.tensor(points, dtype=torch.long)[order]], torch.tensor(count, dtype=r.dtype)[order]


def _atoms(points: Tensor, singles: Tensor) -> Iterator[Tensor]:
    """What may be the atoms, (P, P), the likeliest first: the rows whose count is one; where some are missing these and
    what other rows have beyond them; on a small map every choice of the most frequent rows."""
    wanted = points.shape[1]
    if len(singles) >= wanted:
        yield singles[:wanted]
    elif len(singles) == wanted - 1:
        for subset in itertools.chain.from_iterable(itertools.combinations(range(wanted - 1), n) for n in range(3)):
            for point in points:
                atoms = torch.cat([singles, (point - singles[list(subset)].sum(0))[None]])
                if _independent(atoms):
                    yield atoms
    if wanted <= _SMALL_MAP:
        for chosen in itertools.combinations(range(min(len(points), _CLUSTERS)), wanted):
            if _independent(atoms := points[list(chosen)]):
                yield atoms


def _independent(rows: Tensor) -> bool:
    rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-300)
    return float(torch.linalg.svdvals(rows)[-1]) > 1e-3


def _placed(
    block: Block, gradients: Mapping[str, Tensor], pooled: Pooled, slots: Tensor, height: int, width: int
) -> Tensor:
    """The masks (B, C, P) in their places, (B, C, H, W).

    A tap (u, v) of a 3 × 3 convolution, solved with the slots' cotangents, gives each slot's input at its neighbour:
    the slot whose own input that is lies there, and where it is 0 the map ends. So each slot's steps to the left and to
    the upper edge are counted.
    """
    images, channels, positions = slots.shape
    unit = block.units[-1]
    cotangent = (pooled.cotangent * unit.slope.to(pooled.cotangent))[:, :, None] * slots  # (B, C, P)
    if unit.conv.kernel_size == (1, 1):
        # The 3 × 3 convolution is one further down, behind that one's input and its mask.
        rows = cotangent.transpose(0, 1).flatten(1)
        inputs = torch.linalg.lstsq(rows, gradients[f"{unit.name}.weight"].flatten(1)).solution
        on = inputs > 2 * inputs.amin().abs()
        unit = block.units[-2]
        down = rows.T @ block.units[-1].conv.weight.detach().cpu().double().flatten(1)
        cotangent = (down * on * unit.slope.cpu().double()).view(images, positions, -1).transpose(1, 2)
    if unit.conv.kernel_size != (3, 3) or unit.conv.stride != (1, 1):
        raise Unsolved(f"{unit.name} is no 3 × 3 convolution of stride 1, which would tell the positions' places")
    inverse = torch.linalg.pinv(cotangent.transpose(0, 1).flatten(1))
    taps = gradients[f"{unit.name}.weight"]
    here, left, above = ((inverse @ taps[:, :, u, v]).view(images, positions, -1) for u, v in ((1, 1), (1, 0), (0, 1)))
    mask = torch.zeros(images, channels, height, width, dtype=torch.bool)
    for image in range(images):
        columns, rows_ = (_steps(here[image], towards[image]) for towards in (left, above))
        if sorted(zip(rows_, columns, strict=True)) != list(itertools.product(range(height), range(width))):
            raise Unsolved("The positions of the last block's map cannot be put in order")
        mask[image, :, rows_, columns] = slots[image]
    return mask


def _steps(here: Tensor, neighbour: Tensor) -> list[int]:
    """How often each slot's neighbour has a neighbour, until there is none: (P, C) each → P counts."""
    size = here.norm(dim=1).median()
    nearest = torch.cdist(neighbour, here).argmin(1).tolist()
    ends = (neighbour.norm(dim=1) < 0.1 * size).tolist()
    steps = []
    for slot in range(len(here)):
        count = 0
        while not ends[slot] and count < len(here):
            slot, count = nearest[slot], count + 1
        steps.append(count)
    return steps
