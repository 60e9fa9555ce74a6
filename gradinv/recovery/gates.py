"""Where the units of a node are on: told by its solved activations, and set right by equations that they spoil."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from gradinv.recovery.convolution import ROUNDING, STANDS_OUT, Equations, Solution, geometry

# So many of a channel's least certain mask entries are tried: as the only wrong one, as one of two, and all together.
_SINGLE_FLIPS, _PAIRED_FLIPS, _JOINT_FLIPS = 200, 24, 1024
# Of these together: singular values above noise, iterations of the splitting, entries that are turned round afterwards.
_CUTS, _SPLITTINGS, _FEW_FLIPS = (1e-3, 1e-4, 1e-5), 300, 30
_TOGETHER = 2**22  # numbers of the channels that are mended at a time


@dataclass(frozen=True, eq=False)
class Gate:
    """Where the units of a node are on, and what passes through: `full` is the cotangent of the ReLU's output and
    `mask` its 0/1 derivative, (B, C, H, W) each; `margin` says how far each entry is from being the other, in σ."""

    full: Tensor
    mask: Tensor
    margin: Tensor

    @property
    def cotangent(self) -> Tensor:
        """The cotangent of the pre-activation."""
        return self.full * self.mask

    def flipped(self, flips: Tensor) -> Gate:
        """With the entries of `flips`, bool of the same shape, turned round. They are no surer than before: what turned
        them may have been another entry's doing."""
        return replace(self, mask=self.mask ^ flips)


def gate(full: Tensor, solution: Solution, floor: Tensor) -> Gate:
    """Which units are on, from a node's solved activations: those above a few σ, which is at least the share `floor`
    (B,) of an image's root mean square: an error of the cotangents that x makes up for leaves no residual.

    Of the exact zeros a share grows wrong as the limit falls, of the small values as it rises; both are least at about
    √(2 ln(‖x‖ / σ)), ‖x‖ the root mean square.
    """
    x = solution.x
    size = x.flatten(1).square().mean(1).sqrt().view(-1, 1, 1, 1)
    sigma = torch.maximum(solution.sigma, floor.view(-1, 1, 1, 1) * size).clamp(min=1e-300)
    limit = 1.2 * (2 * (size / sigma).clamp(min=3).log()).sqrt()
    return Gate(full, x > limit * sigma, (x / sigma - limit).abs())


def mended_by_bias(gate: Gate, bias_gradient: Tensor) -> tuple[Gate, int]:
    """Set mask entries right by the gradient of the batch normalisation's bias: → the gate, how many were turned.

    ∇β_c = Σ_{k, p} full[k, c, p] · mask[k, c, p] whatever the input is: one wrong entry leaves its own `full`. Of a
    channel that does not fit, the one or two least certain entries that explain the difference are turned.
    """
    lacking = bias_gradient - gate.cotangent.sum((0, 2, 3))
    size = gate.cotangent.abs().sum((0, 2, 3))
    # Rounding is a share of a channel's own numbers, and those of one are up to a thousand times another's.
    rounding = 0.1 * ROUNDING * size.clamp(min=float(size.median()))
    nearness = STANDS_OUT * rounding.clamp(min=float(lacking.abs().median()))
    flips = torch.zeros_like(gate.mask)
    for channel in (lacking.abs() > nearness).nonzero()[:, 0].tolist():
        near = float(nearness[channel])
        order = gate.margin[:, channel].flatten().argsort()[:_SINGLE_FLIPS]
        change = torch.where(gate.mask[:, channel], -gate.full[:, channel], gate.full[:, channel]).flatten()[order]
        fits = ((change - lacking[channel]).abs() < near).nonzero()[:, 0]
        if len(fits):
            _turn(flips, channel, order[fits[:1]])  # the least certain of those that fit
            continue
        few = change[:_PAIRED_FLIPS]
        pairs = (few[:, None] + few[None] - lacking[channel]).abs().fill_diagonal_(torch.inf)
        if float(pairs.min()) < near:
            _turn(flips, channel, order[list(divmod(int(pairs.argmin()), len(few)))])
    return gate.flipped(flips), int(flips.sum())


def mended_by_residual(gate: Gate, equations: Equations, x: Tensor, suspects: Tensor) -> tuple[Gate, int]:
    """Set the mask entries of the suspect channels right, x being known from the others: → the gate, how many turned.

    A wrong entry of channel o leaves its own patch of x in the equations of o alone, slope · full · patch. Those that
    add up to all that is left there were wrong. x: (B, C, H, W).
    """
    stride, padding, _ = geometry(equations.unit)
    patches = F.unfold(x, equations.unit.conv.kernel_size, padding=padding, stride=stride)  # (B, C·m·n, places)
    patches = patches.transpose(0, 1).flatten(1)
    flips = torch.zeros_like(gate.mask)
    channels = suspects.nonzero()[:, 0].tolist()
    together = max(1, _TOGETHER // min(_JOINT_FLIPS, gate.margin[:, 0].numel()) ** 2)
    for start in range(0, len(channels), together):
        sums = []
        for channel in channels[start : start + together]:
            gradient = equations.gradient[channel].flatten()
            lacking = gradient - patches @ equations.cotangent[:, channel].flatten()
            if float(lacking.norm()) < 3 * ROUNDING * float(gradient.norm()):  # it was set aside for nothing
                continue
            order = gate.margin[:, channel].flatten().argsort()[:_JOINT_FLIPS]
            on, full = (part[:, channel].flatten()[order] for part in (gate.mask, gate.full))
            each = torch.where(on, -full, full) * equations.unit.slope[channel].to(full)
            sums.append(_Sum.of(channel, order, each, patches[:, order] * each, lacking))
        for one, guesses in zip(sums, _adding_up(sums), strict=True):
            effect = patches[:, one.order] * one.each  # not kept: all of them together are large
            found = [_polished(effect, one.lacking, guess) for guess in guesses]
            left = [float((one.lacking - effect @ turned.to(effect)).norm()) for turned in found]
            if min(left) < 0.7 * float(one.lacking.norm()):
                _turn(flips, one.channel, one.order[found[left.index(min(left))]])
    return gate.flipped(flips), int(flips.sum())


@dataclass(frozen=True, eq=False)
class _Sum:
    """Of a channel: which of n entries add up to what is `lacking` (E,). They are the first ones in `order` (n,), and
    each has the effect `each` (n,) times its patch. By a singular value decomposition of these effects (E, n): the
    singular values `size` (r,), the `rows` (r, n) and what is lacking in their terms, `goal` (r,)."""

    channel: int
    order: Tensor
    each: Tensor
    lacking: Tensor
    size: Tensor
    rows: Tensor
    goal: Tensor

    @classmethod
    def of(cls, channel: int, order: Tensor, each: Tensor, effect: Tensor, lacking: Tensor) -> _Sum:
        left, size, right = torch.linalg.svd(effect, full_matrices=False)
        return cls(channel, order, each, lacking, size, right, left.T @ lacking)


def _adding_up(sums: Sequence[_Sum]) -> Tensor:
    """Guesses at which entries add up to what is lacking, of each sum one for each of _CUTS: (sums, cuts, n) bool.

    The point of the box [0, 1]ⁿ that explains it is rounded: where columns outnumber equations, but not twice, there is
    no other such point as a rule. It is found by Douglas and Rachford's splitting, for a few choices of which
    combinations of the equations are above noise. The channels go through it together: one alone is too small a problem
    to be worth the calls.
    """
    if not sums:
        return torch.zeros(0, len(_CUTS), 0, dtype=torch.bool)
    size, rows, goal = (torch.stack([getattr(one, name) for one in sums]) for name in ("size", "rows", "goal"))
    found = []
    for cut in _CUTS:
        kept = size > cut * size[:, :1]
        known = rows * kept[..., None]
        wanted = torch.where(kept, goal / size, 0)[..., None]
        moving = torch.zeros_like(rows[:, :1].mT)
        for _ in range(_SPLITTINGS):
            inside = moving.clamp(0, 1)
            mirrored = 2 * inside - moving
            moving = moving + mirrored + known.mT @ (wanted - known @ mirrored) - inside
        found.append(moving[..., 0] > 0.5)
    return torch.stack(found, 1)


def _polished(effect: Tensor, lacking: Tensor, turned: Tensor) -> Tensor:
    """The columns of `_adding_up`, one or two turned round at a time as long as that leaves less, the best first."""
    turned, gram = turned.clone(), effect.T @ effect
    for _ in range(_FEW_FLIPS):
        sign = torch.where(turned, -1.0, 1.0).to(effect)
        one = 2 * sign * (effect.T @ (lacking - effect @ turned.to(effect))) - gram.diagonal()
        two = one[:, None] + one - 2 * sign[:, None] * sign * gram
        two.diagonal().copy_(one)
        best = int(two.argmax())
        if float(two.flatten()[best]) <= 0:
            break
        places = torch.tensor(divmod(best, len(one))).unique()
        turned[places] = ~turned[places]
    return turned


def _turn(flips: Tensor, channel: int, places: Tensor) -> None:
    """Mark places, counted over images and positions, of a channel."""
    chosen = torch.zeros(flips[:, channel].numel(), dtype=torch.bool)
    chosen[places] = True
    flips[:, channel] |= chosen.view_as(flips[:, channel])
