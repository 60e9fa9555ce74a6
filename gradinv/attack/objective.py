"""The objective: one evaluation of the network a step, pure terms over it, a weighted sum that reports every term.

x̂* = argmin L_grad(x̂; W, ΔW) + R_fidelity(x̂) + R_group(x̂) (Eqn 1, Eqn 2), with what is solved as further terms. The
network runs up to the boundary; the cotangent there, pulled back, gives the gradient that is matched.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress

import torch
from torch import Tensor

from gradinv.attack import micro_batch
from gradinv.attack.boundary import FEATURES, boundary_of
from gradinv.attack.terms import (
    BN_FORMS,
    MATCHING,
    TV_FORMS,
    Evaluation,
    KnownActivations,
    activation_distance,
    cosine_distance,
    feature_distance,
    group_distance,
    image_norm,
    prior_distance,
    squared_norm,
)
from gradinv.batchnorm import batch_statistics, forward_mode, inferred_statistics, running_statistics
from gradinv.config import AttackConfig
from gradinv.execution.stepping import LossTerms
from gradinv.models import Model
from gradinv.network import parts_of
from gradinv.types import BatchNormStatistics, GradinvError, Observation, Recovered

Term = Callable[[Evaluation], Tensor]


class Objective:
    """What a seed's images are judged by. Built once a run, from what the attacker has and what is solved.

    Calling it with a seed's normalised images (B, 3, S, S) and the consensus that they are drawn to, in the same shape,
    gives `LossTerms`. `weights` are the terms', by name.
    """

    def __init__(
        self,
        model: Model,
        observation: Observation,
        recovered: Recovered,
        config: AttackConfig,
        painted: Tensor | None = None,
    ) -> None:
        """config: with a boundary that is not auto (see `settled`); painted: the normalised images (B, 3, S, S) of a
        learned prior, where there is one. Raises GradinvError where the observation lacks
        what the config asks for, or what it needs is not solved."""
        self._model = model
        self._config = config
        self._mode = observation.mode
        self._sharpness: float | None = None
        count = len(recovered.labels)
        if self._mode == "train" and 0 < config.micro_batch < count:
            raise GradinvError(
                "In train mode BN normalises by the whole batch, so it cannot be taken in parts; set micro_batch to 0."
            )
        self._boundary = boundary_of(model, recovered, config)
        # The control without the gradient asks for none, nor for the network to have the stages that are matched.
        names = matched_parameters(model, config.layers) if config.gradient > 0 else []
        matched = [name for name in names if name in self._boundary.parameters and name in observation.gradients]
        if config.gradient > 0 and not matched:
            raise GradinvError(
                f"The client shares no gradient of the layers that are matched ({config.layers}); set layers to all, "
                "or gradient to 0."
            )
        dtype = next(model.network.parameters()).dtype
        self._target = {name: observation.gradients[name].to(model.device, dtype) for name in matched}
        # They stay the same, and ResNet-50 has 23 million numbers: once a run, not at each step.
        self._squares = {name: squared_norm(value) for name, value in self._target.items()}
        self._parameters = {name: model.network.get_parameter(name) for name in self._target}
        self.weights: dict[str, float] = {}
        self._terms: dict[str, Term] = {}
        self.separable = True  # whether the objective is a sum over images: its terms give a number for each of them
        self._collect(model, observation, recovered, painted)
        if not self._terms:
            raise GradinvError("Every term of the objective has weight 0, so there is nothing to optimise.")

    def _collect(self, model: Model, observation: Observation, recovered: Recovered, painted: Tensor | None) -> None:
        """Take the terms whose weight is not zero. No term may hold `self`: as a reference cycle the tensors would
        outlive the run."""
        config = self._config
        like = next(model.network.parameters()).detach()
        if self._boundary.solved:
            known = {node.name: KnownActivations.of(node, like) for node in self._boundary.solved}
            self._add("activations", config.activations, lambda e: activation_distance(e.values, known), each=True)
        if (features := recovered.features) is not None and config.boundary in ("loss", "logits"):
            features = features.to(model.device)
            self._add("features", config.features, lambda e: feature_distance(e.values[FEATURES], features))
        matching, target, squares = MATCHING[config.match], self._target, self._squares
        self._add("gradient", config.gradient, lambda e: matching(e.gradients, target, squares))
        # R_fidelity = α_tv R_TV + α_ℓ2 R_ℓ2 + α_BN R_BN (Eqn 9)
        if (targets := bn_targets(model, observation, config)) is not None:
            distance = BN_FORMS[config.bn_form]
            self._add("bn", config.bn_weight, lambda e: distance(e.means, e.variances, targets))
        variation = TV_FORMS[config.tv_form]
        each = config.tv_form == "smooth"
        self._add("tv", config.tv, lambda e: variation(e.images, model.preprocessing, config), each=each)
        self._add("l2", config.l2, lambda e: image_norm(e.images))
        if painted is not None:
            self._add(
                "prior", config.prior, lambda e: prior_distance(e.images, painted, model.preprocessing), each=True
            )
        self._add("group", config.group if config.seeds > 1 else 0, lambda e: group_distance(e.images, e.group))

    def _add(self, name: str, weight: float, term: Term, *, each: bool = False) -> None:
        """each: whether the term gives a number for each image (B,), which depends on that image alone."""
        if weight > 0:
            self.weights[name] = weight
            self._terms[name] = term
            self.separable &= each

    def annealed(self, sharpness: float | None, variation: float) -> Objective:
        """The same objective with the stem's maximum softened (None: the maximum itself), and with the weight of total
        variation multiplied by `variation`."""
        other = copy.copy(self)
        other._sharpness = sharpness
        if "tv" in self.weights:
            other.weights = {**self.weights, "tv": self._config.tv * variation}
        return other

    def misfit(self, images: Tensor) -> dict[str, float]:
        """What normalised images (B, 3, S, S) leave unexplained, by the terms that compare them with what was solved or
        observed, before their weights."""
        found = self(images, images).raw
        return {name: float(found[name]) for name in ("activations", "features", "gradient") if name in found}

    def evaluate(self, images: Tensor, group: Tensor) -> Evaluation:
        """One forward pass, and where gradients are matched one backward pass, over normalised images (B, 3, S, S).

        The forward mode is the client's; the network's buffers never change.
        """
        return self.evaluate_part(images, group, slice(None), create_graph=True)

    def evaluate_part(self, images: Tensor, group: Tensor, part: slice, *, create_graph: bool) -> Evaluation:
        """The same for the images of one `part` of the batch, with their share of the gradient."""
        network = self._model.network
        watched = batch_statistics(network) if "bn" in self._terms else nullcontext((dict[str, Tensor](),) * 2)
        with forward_mode(network, self._mode), watched as (means, variances):
            values = self._boundary.run(images, self._sharpness)
        gradients: dict[str, Tensor] = {}
        if "gradient" in self._terms:
            cotangents = self._boundary.cotangents(values, part)
            outputs, weights = [values[name] for name in cotangents], list(self._parameters.values())
            found = torch.autograd.grad(outputs, weights, list(cotangents.values()), create_graph=create_graph)
            gradients = dict(zip(self._parameters, found, strict=True))
        return Evaluation(images, group, values, gradients, means, variances)

    def __call__(self, images: Tensor, group: Tensor) -> LossTerms:
        """Judge normalised images (B, 3, S, S) against the observation and the group's consensus, of the same shape."""
        size = self._config.micro_batch
        if 0 < size < len(images):
            return micro_batch.judged_in_parts(self, images, group, size)
        return self.judge(self.evaluate(images, group))

    def judge(self, evaluation: Evaluation) -> LossTerms:
        """The terms of an evaluation and their weighted sum."""
        found = {name: term(evaluation) for name, term in self._terms.items()}
        raw = {name: value.mean() for name, value in found.items()}
        total = torch.stack([self.weights[name] * value for name, value in raw.items()]).sum()
        shares = [self.weights[name] / len(evaluation.images) * value for name, value in found.items()]
        parts = torch.stack(shares).sum(0) if self.separable else None
        told = {name: value.detach() for name, value in raw.items()}
        return LossTerms(total, told, self._distance(evaluation, raw), parts)

    def _distance(self, evaluation: Evaluation, raw: Mapping[str, Tensor]) -> Tensor:
        if not evaluation.gradients:
            return torch.tensor(math.nan)
        if self._config.match == "cosine":
            return raw["gradient"].detach()
        with torch.no_grad():
            return cosine_distance(evaluation.gradients, self._target, self._squares)


def matched_parameters(model: Model, layers: str) -> list[str]:
    """Names of the parameters whose gradients are compared: `all`, or those that a node of a ResNet depends on, or of
    another network those up to and including the module of that name.

    Raises GradinvError where the network has neither.
    """
    names = [name for name, _ in model.network.named_parameters()]
    if layers == "all":
        return names
    with suppress(GradinvError):
        resnet = parts_of(model.network)
        wanted = resnet.below(resnet.node(layers))
        return [name for name in names if name in wanted]
    last = [index for index, name in enumerate(names) if name.startswith(f"{layers}.")]
    if not last:
        raise GradinvError(f"{model.name} has no stage or node {layers}; set layers to all.")
    return names[: last[-1] + 1]


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
