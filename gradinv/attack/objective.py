"""The objective: one evaluation of the network a step, pure terms over it, a weighted sum that reports every term.

x̂* = argmin L_grad(x̂; W, ΔW) + R_fidelity(x̂) + R_group(x̂) (Eqns 1–2), with the recovered features as one more term.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn import functional as F

from gradinv.batchnorm import batch_statistics, forward_mode, inferred_statistics, running_statistics
from gradinv.config import AttackConfig
from gradinv.models import Model
from gradinv.recovery.final_layer import RecoveredFeatures, recover_features
from gradinv.types import BatchNormStatistics, GradinvError, Observation, Preprocessing


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Everything that one forward and backward pass over the current images gives; all of it differentiable.

    `images` are normalised (B, 3, S, S); `features` the pooled features (B, D); `gradients` those of the matched
    parameters; `means` and `variances` of each BN layer's input, (C,) each. `group` is the other seeds' consensus, not
    differentiated, in the images' shape.
    """

    images: Tensor
    group: Tensor
    features: Tensor
    gradients: Mapping[str, Tensor]
    means: Mapping[str, Tensor]
    variances: Mapping[str, Tensor]


Term = Callable[[Evaluation], Tensor]


@dataclass(frozen=True, eq=False)
class Judgement:
    """Scalars, still on the device: the weighted sum `total` (differentiable), each term's `raw` value, and the
    cosine `distance` of the gradients (NaN where no gradient is matched)."""

    total: Tensor
    raw: Mapping[str, Tensor]
    distance: Tensor


class Objective:
    """What a seed's images are judged by. Built once a run, from what the attacker has.

    Calling it with a seed's normalised images gives a `Judgement`. `recovered` holds the features that were solved for
    the run, where its config uses them.
    """

    def __init__(self, model: Model, observation: Observation, labels: Tensor, config: AttackConfig) -> None:
        """labels: the restored ones (B,). Raises GradinvError where the observation lacks what the config asks for."""
        self._model = model
        self._config = config
        self._mode = observation.mode
        self._labels = labels.to(model.device)
        if self._mode == "train" and 0 < config.micro_batch < len(labels):
            raise GradinvError(
                "In train mode BN normalises by the whole batch, so it cannot be taken in parts; set micro_batch to 0."
            )
        # The control without the gradient asks for none, nor for the network to have the stages that are matched.
        matched = matched_parameters(model, config.layers) if config.gradient > 0 else []
        self._target = {name: observation.gradients[name].to(model.device, torch.float32) for name in matched}
        # They stay the same, and ResNet-50 has 23 million numbers: once a run, not at each step.
        self._squares = {name: _square(value) for name, value in self._target.items()}
        self._parameters = {name: model.network.get_parameter(name) for name in self._target}
        self._errors: Tensor | None = None
        self.recovered: RecoveredFeatures | None = None
        self.weights: dict[str, float] = {}
        self._terms: dict[str, Term] = {}
        self._collect(model, observation, config)
        if not self._terms:
            raise GradinvError("Every term of the objective has weight 0, so there is nothing to optimise.")

    def _collect(self, model: Model, observation: Observation, config: AttackConfig) -> None:
        """Take the terms whose weight is not zero. All need the forward pass; only matching needs the backward."""
        errors = config.gradient > 0 and config.errors == "recovered"
        if config.features > 0 or errors or config.start == "decoder":
            self.recovered = recovered = recover_features(model, observation, self._labels)
            if errors:
                self._errors = recovered.errors
            self._add("features", config.features, lambda e: feature_distance(e.features, recovered.features))
        # Of these a term holds no more than it needs: with the objective itself, both would outlive the run.
        matching, target, squares = MATCHING[config.match], self._target, self._squares
        self._add("gradient", config.gradient, lambda e: matching(e.gradients, target, squares))
        if config.bn_weight > 0 and (targets := bn_targets(model, observation, config)) is not None:
            distance = BN_FORMS[config.bn_form]
            self._add("bn", config.bn_weight, lambda e: distance(e.means, e.variances, targets))
        variation = TV_FORMS[config.tv_form]
        self._add("tv", config.tv, lambda e: variation(e.images, model.preprocessing, config))
        self._add("l2", config.l2, lambda e: vector_norm(e.images))
        self._add("group", config.group if config.seeds > 1 else 0, lambda e: group_distance(e.images, e.group))

    def _add(self, name: str, weight: float, term: Term) -> None:
        if weight > 0:
            self.weights[name] = weight
            self._terms[name] = term

    def evaluate(self, images: Tensor, group: Tensor) -> Evaluation:
        """One forward pass, and where gradients are matched one backward pass, over normalised images (B, 3, S, S).

        The forward mode is the client's; the network's buffers never change.
        """
        return self._evaluate(images, group, slice(None), create_graph=True)

    def _evaluate(self, images: Tensor, group: Tensor, part: slice, *, create_graph: bool) -> Evaluation:
        """The same for the images of one `part` of the batch, with their share of the gradient."""
        inputs: list[Tensor] = []
        network = self._model.network
        handle = self._model.final_layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        try:
            with forward_mode(network, self._mode), batch_statistics(network) as (means, variances):
                logits = network(images)
        finally:
            handle.remove()
        gradients: dict[str, Tensor] = {}
        if "gradient" in self._terms:
            loss = self._loss(logits, part)
            found = torch.autograd.grad(loss, list(self._parameters.values()), create_graph=create_graph)
            gradients = dict(zip(self._parameters, found, strict=True))
        return Evaluation(images, group, inputs[0], gradients, means, variances)

    def _loss(self, logits: Tensor, part: slice) -> Tensor:
        if self._errors is None:
            return F.cross_entropy(logits, self._labels[part], reduction="sum") / len(self._labels)
        # The gradient of this with respect to the logits is exactly the recovered p − y of the client's batch.
        return (logits * self._errors[part]).sum() / len(self._labels)

    def __call__(self, images: Tensor, group: Tensor) -> Judgement:
        """Judge normalised images (B, 3, S, S) against the observation and the group's consensus, of the same shape."""
        if 0 < self._config.micro_batch < len(images):
            return self._in_parts(images, group)
        return self._judge(self.evaluate(images, group))

    def _judge(self, evaluation: Evaluation) -> Judgement:
        raw = {name: term(evaluation) for name, term in self._terms.items()}
        total = torch.stack([self.weights[name] * value for name, value in raw.items()]).sum()
        return Judgement(total, {name: value.detach() for name, value in raw.items()}, self._distance(evaluation, raw))

    def _in_parts(self, images: Tensor, group: Tensor) -> Judgement:
        """The same judgement with `micro_batch` images in the network at a time; its total can be derived once.

        The terms are a function L of the images x and of what the whole batch gives: its features f, gradient g and BN
        moments μ, σ². A first pass over the parts adds these up, and L gives its derivative v with respect to each.
        With v held fixed the chain rule takes one part at a time: ∇ₓ L = ∂L/∂x + ∇ₓ ⟨v, (f, g, μ, σ²)(x)⟩, in which
        ∇ₓ ⟨v_g, g(x)⟩ is the derivative of ∇ₓ loss along v_g in weight space. Exact, since in eval mode the images of
        a batch meet in sums only.
        """
        step = self._config.micro_batch
        parts = [slice(first, first + step) for first in range(0, len(images), step)]
        whole = self._gathered(images.detach(), group, parts)
        judgement = self._judge(whole)
        pull = _derivatives(judgement.total, whole)
        gradient = torch.zeros_like(whole.images) if pull.images is None else pull.images
        if pull.features is not None or pull.gradients or pull.means:
            gradient = gradient + torch.cat([self._pulled(whole, pull, part) for part in parts])
        return replace(judgement, total=_Derived.apply(judgement.total.detach(), gradient, images))

    def _gathered(self, images: Tensor, group: Tensor, parts: Sequence[slice]) -> Evaluation:
        """What `evaluate` finds, added up over the parts; every quantity is a leaf that can be derived by."""
        features, shares, moments = [], [], []
        gradients: dict[str, Tensor] = {}
        for part in parts:
            own = self._evaluate(images[part], group, part, create_graph=False)
            features.append(own.features.detach())
            gradients = {name: gradients[name] + g if gradients else g for name, g in own.gradients.items()}
            shares.append(len(own.images) / len(images))
            moments.append({name: (mean.detach(), own.variances[name].detach()) for name, mean in own.means.items()})
        means, variances = {}, {}
        for name in moments[0]:
            mean, variance = (torch.stack(values) for values in zip(*(found[name] for found in moments), strict=True))
            share = mean.new_tensor(shares)[:, None]
            means[name] = (share * mean).sum(0)
            variances[name] = (share * (variance + (mean - means[name]) ** 2)).sum(0)
        return Evaluation(
            images.detach().requires_grad_(),
            group,
            torch.cat(features).requires_grad_(),
            *(
                {name: value.requires_grad_() for name, value in found.items()}
                for found in (gradients, means, variances)
            ),
        )

    def _pulled(self, whole: Evaluation, pull: _Pull, part: slice) -> Tensor:
        """∇ₓ ⟨v, (f, g, μ, σ²)(x)⟩ for the images of a part, v the derivatives `pull`."""
        # A copy, or a recording would take this forward pass for the first one's and keep all that it computed.
        inputs = whole.images.detach()[part].clone().requires_grad_()
        own = self._evaluate(inputs, whole.group, part, create_graph=True)
        share = len(inputs) / len(whole.images)
        pairs = [(own.gradients[name], v) for name, v in pull.gradients.items()]
        if pull.features is not None:
            pairs.append((own.features, pull.features[part]))
        for name, v in pull.variances.items():  # of σ² = Σ share (σ²_part + (μ_part − μ)²)
            off = own.means[name].detach() - whole.means[name].detach()
            pairs.append((own.variances[name], share * v))
            pairs.append((own.means[name], share * (pull.means[name] + 2 * v * off)))
        # With the errors recovered the gradient of the final bias is the same for all images.
        outputs, cotangents = zip(*(pair for pair in pairs if pair[0].requires_grad), strict=True)
        return torch.autograd.grad(outputs, inputs, cotangents)[0]

    def _distance(self, evaluation: Evaluation, raw: Mapping[str, Tensor]) -> Tensor:
        if not evaluation.gradients:
            return torch.tensor(math.nan)
        if self._config.match == "cosine":
            return raw["gradient"].detach()
        with torch.no_grad():
            return cosine_distance(evaluation.gradients, self._target, self._squares)


def matched_parameters(model: Model, layers: str) -> list[str]:
    """Names of the parameters whose gradients are compared: `all`, or those up to and including that residual stage.

    Raises GradinvError where the network has no stage of that name.
    """
    names = [name for name, _ in model.network.named_parameters()]
    if layers == "all":
        return names
    last = [index for index, name in enumerate(names) if name.startswith(f"{layers}.")]
    if not last:
        raise GradinvError(f"{model.name} has no stage {layers}; set layers to all.")
    return names[: last[-1] + 1]


@dataclass(frozen=True, eq=False)
class _Pull:
    """The derivatives of a total with respect to what an `Evaluation` holds; None or empty where it has none."""

    images: Tensor | None
    features: Tensor | None
    gradients: Mapping[str, Tensor]
    means: Mapping[str, Tensor]
    variances: Mapping[str, Tensor]


def _derivatives(total: Tensor, whole: Evaluation) -> _Pull:
    named = (whole.gradients, whole.means, whole.variances)
    leaves = [whole.images, whole.features, *(value for found in named for value in found.values())]
    images, features, *rest = torch.autograd.grad(total, leaves, allow_unused=True)
    found = iter(rest)
    by_name = [{name: next(found) for name in names} for names in named]
    return _Pull(images, features, *({n: v for n, v in one.items() if v is not None} for one in by_name))


class _Derived(torch.autograd.Function):
    """A value whose derivative with respect to the images is known."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradient: Tensor, images: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, None, Tensor]:
        return None, None, upstream * ctx.saved_tensors[0]


class _Cosine(torch.autograd.Function):
    """1 − cos(g, t) over all tensors together, with the backward pass written out.

    Autograd's own backward of the same sums would pass five times over the gradients, of which ResNet-50 has 23
    million entries; this one passes twice.
    """

    @staticmethod
    def forward(ctx: Any, targets: list[Tensor], target: Tensor, *gradients: Tensor) -> Tensor:
        dot = torch.stack([torch.dot(g.reshape(-1), t.reshape(-1)) for g, t in zip(gradients, targets, strict=True)])
        square = torch.stack([_square(g) for g in gradients]).sum()
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


def _square(values: Tensor) -> Tensor:
    return torch.dot(values.reshape(-1), values.reshape(-1))


def cosine_distance(
    gradients: Mapping[str, Tensor], target: Mapping[str, Tensor], squares: Mapping[str, Tensor] | None = None
) -> Tensor:
    """1 − ⟨∇, ΔW⟩ / (‖∇‖ ‖ΔW‖) over all parameters together; a scalar in [0, 2] (Geiping et al. 2020).

    `squares` are the squared norms of the target's tensors, where they are known.
    """
    norms = [_square(target[name]) if squares is None else squares[name] for name in gradients]
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


def bn_distance(means: Mapping[str, Tensor], variances: Mapping[str, Tensor], target: BatchNormStatistics) -> Tensor:
    """Σ_l ‖μ_l(x̂) − BN_l(mean)‖₂ + Σ_l ‖σ²_l(x̂) − BN_l(var)‖₂ (Eqn 10); a scalar."""
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
    """The sum of the ℓ2 norms of the four difference maps (right, down, both diagonals) of (B, 3, H, W); a scalar."""
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


def luma_chroma_variation(images: Tensor, preprocessing: Preprocessing, config: AttackConfig) -> Tensor:
    """`absolute_variation` of luma and of two chroma channels, each with its share; a scalar.

    Luma (r+g+b)/3, chroma (r−g)/2 and (r+g)/4 − b/2 of the pixels in [0, 1], divided by their mean standard
    deviation over natural images. Colour speckle costs more than edges: eyes and natural images agree on that.
    """
    std = torch.tensor(preprocessing.std, dtype=images.dtype, device=images.device).view(3, 1, 1)
    # The means cancel in differences.
    red, green, blue = (images * std / std.mean()).unbind(1)
    luma, first, second = (red + green + blue) / 3, (red - green) / 2, (red + green) / 4 - blue / 2
    return config.tv_luma * absolute_variation(luma) + config.tv_chroma * (
        absolute_variation(first) + absolute_variation(second)
    )


def group_distance(images: Tensor, group: Tensor) -> Tensor:
    """‖x̂ − E(x̂_{g∈G})‖₂ (Eqn 11), normalised images against the group's, (B, 3, H, W) each; a scalar."""
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
}


def bn_targets(model: Model, observation: Observation, config: AttackConfig) -> BatchNormStatistics | None:
    """What the BN statistics of the images are matched to, None for nothing.

    Raises GradinvError where the client did not share it.
    """
    if config.bn == "none":
        return None
    if config.bn == "approx":
        return running_statistics(model.network)
    if config.bn == "inferred":
        return inferred_statistics(model, observation)
    if observation.bn is None:
        raise GradinvError(
            "The client did not share its BN statistics, so bn=exact is not possible; take approx or none."
        )
    device = model.device
    return BatchNormStatistics(
        {name: value.to(device) for name, value in observation.bn.mean.items()},
        {name: value.to(device) for name, value in observation.bn.var.items()},
    )
