"""The terms of the objective: pure functions of what one evaluation gives, each a scalar or one number an image."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn import functional as F

from gradinv.config import AttackConfig
from gradinv.types import BatchNormStatistics, Preprocessing, SolvedNode

TRUSTED = 0.2
"""The relative error of solved activations from which they count half."""

_WEAK = 0.1  # the share of the mean over all channels that each one's own power is enlarged by
_SMOOTH = 0.02  # the difference of two pixels from which total variation is nearly their distance


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Everything that one forward and backward pass over the current images gives; all of it differentiable.

    `images` are normalised (B, 3, S, S); `values` what the network makes of each image, by name (B, …): pre-activations
    of nodes, or of the whole network its pooled features and its logits; `gradients` those of the matched parameters;
    `means` and `variances` of each BN layer's input, (C,) each. `group` is the consensus of all seeds that they are
    drawn to, not differentiated, in the images' shape.
    """

    images: Tensor
    group: Tensor
    values: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]
    means: Mapping[str, Tensor]
    variances: Mapping[str, Tensor]


class _Cosine(torch.autograd.Function):
    """1 − cos(g, t) over all tensors together, with the backward pass written out.

    Autograd's own backward of the same sums would pass five times over the gradients, of which ResNet-50 has 23
    million entries; this one passes twice.
    """

    @staticmethod
    def forward(ctx: Any, targets: list[Tensor], target: Tensor, *gradients: Tensor) -> Tensor:
        dot = torch.stack([torch.dot(g.reshape(-1), t.reshape(-1)) for g, t in zip(gradients, targets, strict=True)])
        square = torch.stack([squared_norm(g) for g in gradients]).sum()
        norms = (square * target).sqrt().clamp(min=torch.finfo(square.dtype).tiny)
        cosine = dot.sum() / norms
        ctx.targets = targets
        ctx.save_for_backward(cosine, norms, square, *gradients)
        return 1 - cosine

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        cosine, norms, square, *gradients = ctx.saved_tensors
        towards, along = -upstream / norms, upstream * cosine / square.clamp(min=torch.finfo(square.dtype).tiny)
        return None, None, *(torch.addcmul(g * along, t, towards) for g, t in zip(gradients, ctx.targets, strict=True))


def squared_norm(values: Tensor) -> Tensor:
    """‖values‖², a scalar."""
    return torch.dot(values.reshape(-1), values.reshape(-1))


def cosine_distance(
    gradients: Mapping[str, Tensor], target: Mapping[str, Tensor], squares: Mapping[str, Tensor] | None = None
) -> Tensor:
    """1 − ⟨∇, ΔW⟩ / (‖∇‖ ‖ΔW‖) over all parameters together; a scalar in [0, 2] (Geiping et al. 2020).

    `squares` are the squared norms of the target's tensors, where they are known.
    """
    norms = [squared_norm(target[name]) if squares is None else squares[name] for name in gradients]
    targets = [target[name] for name in gradients]
    distance: Tensor = _Cosine.apply(targets, torch.stack(norms).sum(), *gradients.values())
    return distance


def layer_cosine_distance(
    gradients: Mapping[str, Tensor], target: Mapping[str, Tensor], squares: Mapping[str, Tensor] | None = None
) -> Tensor:
    """The mean over parameters of each one's own cosine distance; a scalar in [0, 2]."""
    return torch.stack([cosine_distance({name: value}, target, squares) for name, value in gradients.items()]).mean()


def l2_distance(
    gradients: Mapping[str, Tensor], target: Mapping[str, Tensor], _: Mapping[str, Tensor] | None = None
) -> Tensor:
    """Σ_l ‖∇_{W(l)} − ΔW(l)‖₂, not squared (Eqn 3); a scalar."""
    return torch.stack([vector_norm(value - target[name]) for name, value in gradients.items()]).sum()


def feature_distance(features: Tensor, recovered: Tensor) -> Tensor:
    """The mean over the batch of 1 − cos(F_k, recovered F_k); (B, D) each → a scalar."""
    return (1 - F.cosine_similarity(features, recovered, dim=1)).mean()


@dataclass(frozen=True, eq=False)
class KnownActivations:
    """A solved node as the activation term takes it: activations a (B, C, H, W), which units are on, and by how much
    each image and channel counts, (B, C, 1, 1)."""

    values: Tensor
    on: Tensor
    weight: Tensor

    @classmethod
    def of(cls, node: SolvedNode, like: Tensor, trusted: float = TRUSTED) -> KnownActivations:
        """With the type and the device of `like`.

        A channel counts 1 / (s + 0.1 s̄), s its mean square over the batch and s̄ that over all channels: edges and
        colours are in many weak channels, and a few strong ones, which see brightness, would rule the rest. An image
        whose estimated error is e counts 1 / (1 + (e / trusted)²) of one that is exact.
        """
        values = node.activation.to(like)
        trust = 1 / (1 + (node.error.to(like) / trusted) ** 2)
        known = trust.isfinite() & values.isfinite().all(3).all(2).all(1)
        values = torch.where(known[:, None, None, None], values, 0)
        power = values.square().mean((0, 2, 3))
        channels = 1 / (power + _WEAK * power.mean()).clamp(min=torch.finfo(like.dtype).tiny)
        size = (values.square().sum((2, 3)) * channels).sum(1)
        images = torch.where(known & (size > 0), trust / size, 0)  # else there is nothing to compare with
        return cls(values, node.on.to(values.device), (images[:, None] * channels)[:, :, None, None])


def activation_distance(nodes: Mapping[str, Tensor], known: Mapping[str, KnownActivations]) -> Tensor:
    """The mean over the solved nodes of w ‖r‖² / ‖a‖², norms with the channels' weights, of each image: (B,).

    nodes: pre-activations φ (B, C, H, W) by name. r = φ − a where the unit is on, and max(φ, 0) − a where it is off:
    behind the ReLU that has no derivative, so what is compared is in front of it.
    """
    parts = []
    for name, solved in known.items():
        off = torch.where(solved.on, nodes[name], nodes[name].clamp(min=0)) - solved.values
        parts.append((off.square() * solved.weight).sum((1, 2, 3)))
    return torch.stack(parts).mean(0)


def bn_distance(means: Mapping[str, Tensor], variances: Mapping[str, Tensor], target: BatchNormStatistics) -> Tensor:
    """R_BN (Eqn 10): Σ_l ‖μ_l(x̂) − BN_l(mean)‖₂ + Σ_l ‖σ²_l(x̂) − BN_l(var)‖₂; a scalar."""
    parts = [vector_norm(mean - target.mean[name]) for name, mean in means.items()]
    parts += [vector_norm(var - target.var[name]) for name, var in variances.items()]
    return torch.stack(parts).sum()


def relative_bn_distance(
    means: Mapping[str, Tensor], variances: Mapping[str, Tensor], target: BatchNormStatistics
) -> Tensor:
    """The mean over layers of ‖μ − μ_t‖/‖σ_t‖ + ‖σ² − σ²_t‖/‖σ_t²‖; a scalar.

    Scale-free, because at small sizes the raw sum is ruled by the deep layers, whose maps give few samples a channel.
    Means are told in standard deviations: those of the first layer are nearly zero over natural images, and relative
    to themselves those of any one batch are 3 to 10 times off, which would rule all other layers and pull the batch's
    colours to grey. A layer whose target has no variance (of one image on a 1×1 map) has no scale and is left out.
    """

    def in_units(difference: Tensor, unit: Tensor) -> Tensor:
        return vector_norm(difference) * torch.where(unit > 0, 1 / unit, 0)

    parts = [in_units(mean - target.mean[name], target.var[name].sum().sqrt()) for name, mean in means.items()]
    parts += [in_units(var - target.var[name], vector_norm(target.var[name])) for name, var in variances.items()]
    return torch.stack(parts).sum() / len(means)


def paper_variation(images: Tensor, _: Preprocessing | None = None, __: AttackConfig | None = None) -> Tensor:
    """R_TV (Eqn 9): the sum of the ℓ2 norms of the four difference maps (right, down, both diagonals) of (B, 3, H, W);
    a scalar."""
    maps = (
        images[..., :, 1:] - images[..., :, :-1],
        images[..., 1:, :] - images[..., :-1, :],
        images[..., 1:, 1:] - images[..., :-1, :-1],
        images[..., 1:, :-1] - images[..., :-1, 1:],
    )
    return torch.stack([vector_norm(difference) for difference in maps]).sum()


def absolute_variation(images: Tensor, _: Preprocessing | None = None, __: AttackConfig | None = None) -> Tensor:
    """Mean absolute difference to the right plus that downwards, of (B, 3, H, W); a scalar."""
    right = (images[..., :, 1:] - images[..., :, :-1]).abs().mean()
    down = (images[..., 1:, :] - images[..., :-1, :]).abs().mean()
    return right + down


def _deviations(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """What makes pixel differences of normalised ones: (3, 1, 1)."""
    return torch.tensor(preprocessing.std, dtype=images.dtype, device=images.device).view(3, 1, 1)


def luma_chroma_variation(images: Tensor, preprocessing: Preprocessing, config: AttackConfig) -> Tensor:
    """`absolute_variation` of luma and of two chroma channels, these `tv_chroma` times; a scalar.

    Luma (r+g+b)/3, chroma (r−g)/2 and (r+g)/4 − b/2 of the pixels in [0, 1], divided by their mean standard
    deviation over natural images. Colour speckle costs more than edges: eyes and natural images agree on that.
    """
    std = _deviations(images, preprocessing)
    # The means cancel in differences.
    red, green, blue = (images * std / std.mean()).unbind(1)
    luma, first, second = (red + green + blue) / 3, (red - green) / 2, (red + green) / 4 - blue / 2
    return absolute_variation(luma) + config.tv_chroma * (absolute_variation(first) + absolute_variation(second))


def smooth_variation(images: Tensor, preprocessing: Preprocessing, config: AttackConfig) -> Tensor:
    """Σ √(d² + ε²) − ε over the differences d to the right and downwards, divided by the values of an image: (B,).

    Of normalised images (B, 3, H, W), as pixels in [0, 1], ε = 0.02: below ε a difference costs its square, so that
    there is a second derivative to go by. In orthonormal luma and chroma, the latter `tv_chroma` times.
    """
    red, green, blue = (images * _deviations(images, preprocessing)).unbind(1)  # the means cancel in differences
    luma = (red + green + blue) * 3**-0.5
    first, second = (red - green) * 0.5**0.5, (red + green - 2 * blue) * 6**-0.5
    weighted = torch.stack([luma, config.tv_chroma * first, config.tv_chroma * second], 1)
    right, down = weighted[..., :, 1:] - weighted[..., :, :-1], weighted[..., 1:, :] - weighted[..., :-1, :]
    total = torch.stack([((d.square() + _SMOOTH**2).sqrt() - _SMOOTH).sum((1, 2, 3)) for d in (right, down)]).sum(0)
    return total / images[0].numel()


def prior_distance(images: Tensor, painted: Tensor, preprocessing: Preprocessing) -> Tensor:
    """The mean squared difference of the pixels in [0, 1], of normalised images (B, 3, H, W) each: (B,)."""
    return ((images - painted) * _deviations(images, preprocessing)).square().mean((1, 2, 3))


def image_norm(images: Tensor) -> Tensor:
    """R_ℓ2 (Eqn 9): ‖x̂‖₂ of normalised images (B, 3, H, W); a scalar."""
    return vector_norm(images)


def group_distance(images: Tensor, group: Tensor) -> Tensor:
    """R_group (Eqn 11): ‖x̂ − E(x̂_{g∈G})‖₂, normalised images against the group's, (B, 3, H, W) each; a scalar."""
    return vector_norm(images - group)


MATCHING: dict[str, Callable[[Mapping[str, Tensor], Mapping[str, Tensor], Mapping[str, Tensor]], Tensor]] = {
    "l2": l2_distance,
    "cosine": cosine_distance,
    "layer-cosine": layer_cosine_distance,
}
BN_FORMS: dict[str, Callable[..., Tensor]] = {"raw": bn_distance, "relative": relative_bn_distance}
TV_FORMS: dict[str, Callable[..., Tensor]] = {
    "paper": paper_variation,
    "rgb": absolute_variation,
    "luma-chroma": luma_chroma_variation,
    "smooth": smooth_variation,
}
