"""The same judgement with a part of the batch in the network at a time: less memory, more time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from gradinv.attack.terms import Evaluation
from gradinv.execution.stepping import LossTerms


class Judge(Protocol):
    """What evaluates parts of a batch, and judges an evaluation of the whole: an objective."""

    def evaluate_part(self, images: Tensor, group: Tensor, part: slice, *, create_graph: bool) -> Evaluation: ...

    def judge(self, evaluation: Evaluation) -> LossTerms: ...


def judged_in_parts(judge: Judge, images: Tensor, group: Tensor, size: int) -> LossTerms:
    """The judgement of normalised images (B, 3, S, S) with `size` of them in the network at a time; its total can be
    derived once.

    The terms are a function L of the images x and of what the whole batch gives: each image's values f, the gradient g
    and BN moments μ, σ². A first pass over the parts adds these up, and L gives its derivative v with respect to each.
    With v held fixed the chain rule takes one part at a time: ∇ₓ L = ∂L/∂x + ∇ₓ ⟨v, (f, g, μ, σ²)(x)⟩, in which
    ∇ₓ ⟨v_g, g(x)⟩ is the derivative of ∇ₓ loss along v_g in weight space. Exact, since in eval mode the images of
    a batch meet in sums only.
    """
    parts = [slice(first, first + size) for first in range(0, len(images), size)]
    whole = _gathered(judge, images.detach(), group, parts)
    judgement = judge.judge(whole)
    pull = _derivatives(judgement.total, whole)
    gradient = torch.zeros_like(whole.images) if pull.images is None else pull.images
    if pull.values or pull.gradients or pull.means:
        gradient = gradient + torch.cat([_pulled(judge, whole, pull, part) for part in parts])
    return replace(judgement, total=_Derived.apply(judgement.total.detach(), gradient, images))


def _gathered(judge: Judge, images: Tensor, group: Tensor, parts: Sequence[slice]) -> Evaluation:
    """What an evaluation of the whole finds, added up over the parts; every quantity is a leaf to derive by."""
    shares, moments = [], []
    values: dict[str, list[Tensor]] = {}
    gradients: dict[str, Tensor] = {}
    for part in parts:
        own = judge.evaluate_part(images[part], group, part, create_graph=False)
        for name, value in own.values.items():
            values.setdefault(name, []).append(value.detach())
        gradients = {name: gradients[name] + g if gradients else g for name, g in own.gradients.items()}
        shares.append(len(own.images) / len(images))
        moments.append({name: (mean.detach(), own.variances[name].detach()) for name, mean in own.means.items()})
    means, variances = {}, {}
    for name in moments[0]:
        mean, variance = (torch.stack(found) for found in zip(*(found[name] for found in moments), strict=True))
        share = mean.new_tensor(shares)[:, None]
        means[name] = (share * mean).sum(0)
        variances[name] = (share * (variance + (mean - means[name]) ** 2)).sum(0)
    joined = {name: torch.cat(found) for name, found in values.items()}
    return Evaluation(
        images.detach().requires_grad_(),
        group,
        *(
            {name: value.requires_grad_() for name, value in found.items()}
            for found in (joined, gradients, means, variances)
        ),
    )


def _pulled(judge: Judge, whole: Evaluation, pull: _Pull, part: slice) -> Tensor:
    """∇ₓ ⟨v, (f, g, μ, σ²)(x)⟩ for the images of a part, v the derivatives `pull`."""
    # A copy, or a recording would take this forward pass for the first one's and keep all that it computed.
    inputs = whole.images.detach()[part].clone().requires_grad_()
    own = judge.evaluate_part(inputs, whole.group, part, create_graph=True)
    share = len(inputs) / len(whole.images)
    pairs = [(own.gradients[name], v) for name, v in pull.gradients.items()]
    pairs += [(own.values[name], v[part]) for name, v in pull.values.items()]
    for name, v in pull.variances.items():  # of σ² = Σ share (σ²_part + (μ_part − μ)²)
        off = own.means[name].detach() - whole.means[name].detach()
        pairs.append((own.variances[name], share * v))
        pairs.append((own.means[name], share * (pull.means[name] + 2 * v * off)))
    # With the cotangent known the gradient of the last bias is the same for all images.
    outputs, cotangents = zip(*(pair for pair in pairs if pair[0].requires_grad), strict=True)
    return torch.autograd.grad(outputs, inputs, cotangents)[0]


@dataclass(frozen=True, eq=False)
class _Pull:
    """The derivatives of a total with respect to what an `Evaluation` holds; None or empty where it has none."""

    images: Tensor | None
    values: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]
    means: Mapping[str, Tensor]
    variances: Mapping[str, Tensor]


def _derivatives(total: Tensor, whole: Evaluation) -> _Pull:
    named = (whole.values, whole.gradients, whole.means, whole.variances)
    leaves = [whole.images, *(value for found in named for value in found.values())]
    images, *rest = torch.autograd.grad(total, leaves, allow_unused=True)
    found = iter(rest)
    by_name = [{name: next(found) for name in names} for names in named]
    return _Pull(images, *({n: v for n, v in one.items() if v is not None} for one in by_name))


class _Derived(torch.autograd.Function):
    """A value whose derivative with respect to the images is known."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradient: Tensor, images: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, None, Tensor]:
        return None, None, upstream * ctx.saved_tensors[0]
