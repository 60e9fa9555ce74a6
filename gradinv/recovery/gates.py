"""Where the units of a node are on: told by its solved activations, and set right by equations that they spoil."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from gradinv.recovery.convolution import ROUNDING, STANDS_OUT, Equations, Solution, geometry

# So many of a channel's least certain mask entries are tried: by the bias as the only wrong one and as one of two, by
# the residual as those that were wrong together, of which at most so many times one or two are turned.
_SINGLE_FLIPS, _PAIRED_FLIPS = 200, 24
_TRIED, _FLIPS = 1024, 30


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
    for channel in suspects.nonzero()[:, 0].tolist():
        gradient = equations.gradient[channel].flatten()
        lacking = gradient - patches @ equations.cotangent[:, channel].flatten()
        if float(lacking.norm()) < 3 * ROUNDING * float(gradient.norm()):  # it was set aside for nothing
            continue
        order = gate.margin[:, channel].flatten().argsort()[:_TRIED]
        on, full = (part[:, channel].flatten()[order] for part in (gate.mask, gate.full))
        effect = patches[:, order] * torch.where(on, -full, full) * equations.unit.slope[channel].to(full)
        turned = _adding_up(effect, lacking)
        if float((lacking - effect @ turned.to(effect)).norm()) < 0.7 * float(lacking.norm()):
            _turn(flips, channel, order[turned])
    return gate.flipped(flips), int(flips.sum())


def _adding_up(effect: Tensor, lacking: Tensor) -> Tensor:
    """Which columns of `effect` (E, n) add up to what is lacking (E,): → (n,) bool. One or two are turned round at a
    time as long as that leaves less, the best first."""
    turned, gram = torch.zeros(effect.shape[1], dtype=torch.bool), effect.T @ effect
    for _ in range(_FLIPS):
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
