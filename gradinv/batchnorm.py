"""Batch normalisation: what its layers see of a batch, in which mode they run, and what is stored or leaks of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gradinv.models import Model
from gradinv.types import BatchNormStatistics, GradinvError, Observation


def _layers(network: nn.Module) -> dict[str, nn.BatchNorm2d]:
    return {name: module for name, module in network.named_modules() if isinstance(module, nn.BatchNorm2d)}


@contextmanager
def _watched(network: nn.Module, watch: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While open, each forward pass tells the name and the input of each BN layer."""

    def hook(name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        watch(name, inputs[0])

    handles = [layer.register_forward_pre_hook(partial(hook, name)) for name, layer in _layers(network).items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def batch_statistics(network: nn.Module) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """While open, each forward pass fills two dicts: by BN layer its input's mean and biased variance, (C,) each."""
    means: dict[str, Tensor] = {}
    variances: dict[str, Tensor] = {}

    def watch(name: str, values: Tensor) -> None:
        means[name], variances[name] = _Moments.apply(values)

    with _watched(network, watch):
        yield means, variances


def running_statistics(network: nn.Module) -> BatchNormStatistics:
    """What the weights store of the training data: the `approx` case."""
    layers = _layers(network)
    means = {n: m.running_mean.detach() for n, m in layers.items() if m.running_mean is not None}
    variances = {n: m.running_var.detach() for n, m in layers.items() if m.running_var is not None}
    return BatchNormStatistics(means, variances)


@contextmanager
def forward_mode(network: nn.Module, mode: str) -> Iterator[None]:
    """While open, the network runs as the client's did, "eval" or "train", and its buffers stay as they are.

    In train mode the BN layers normalise by the batch's own statistics and do not track them. Afterwards each module
    is as it was before.
    """
    before = [(module, module.training) for module in network.modules()]
    layers = list(_layers(network).values()) if mode == "train" else []
    tracked = [(layer, layer.track_running_stats) for layer in layers]
    network.eval()
    try:
        for layer in layers:
            layer.training, layer.track_running_stats = True, False
        yield
    finally:
        for module, training in before:
            module.training = training
        for layer, tracks in tracked:
            layer.track_running_stats = tracks


def samples_per_layer(model: Model, batch_size: int) -> dict[str, int]:
    """By BN layer how many values a channel's statistics are of, n = K·H·W, from a dry pass of one black image."""
    size, samples = model.preprocessing.size, dict[str, int]()

    def watch(name: str, values: Tensor) -> None:
        samples[name] = batch_size * values.shape[2] * values.shape[3]

    network = model.network
    with torch.no_grad(), forward_mode(network, "eval"), _watched(network, watch):
        network(torch.zeros(1, 3, size, size, device=model.device, dtype=next(network.parameters()).dtype))
    return samples


def check_train_mode(model: Model, batch_size: int) -> None:
    """Raises GradinvError where a BN layer has one value a channel, which has no variance to normalise by."""
    single = next((name for name, count in samples_per_layer(model, batch_size).items() if count == 1), None)
    if single is not None:
        raise GradinvError(
            f"In train mode one image of {model.preprocessing.size} px leaves the BN layer {single} one value a "
            "channel, which has no variance; take more or larger images, or eval mode."
        )


def inferred_statistics(model: Model, observation: Observation) -> BatchNormStatistics:
    """The client's own batch statistics from two successive running ones, those stored in the weights and `running`.

    A step in train mode makes new = (1 − m)·old + m·batch with the layer's momentum m, so batch =
    (new − (1 − m)·old)/m; torch averages unbiased variances, hence × (n − 1)/n with n = K·H·W of that layer. Raises
    GradinvError where the client shared no running statistics or a layer's momentum does not tell.
    """
    if observation.running is None:
        raise GradinvError(
            "The client did not share its running statistics after the step, so bn=inferred is not possible; take its "
            "gradient in train mode, or take approx or none."
        )
    stored = running_statistics(model.network)
    means, variances = {}, {}
    for name, count in samples_per_layer(model, observation.batch_size).items():
        momentum = model.network.get_submodule(name).momentum
        if not isinstance(momentum, float) or momentum <= 0:  # None: torch averages over all steps so far
            raise GradinvError(
                f"The BN layer {name} has the momentum {momentum}, from which its batch statistics cannot be inferred; "
                "take approx or none."
            )

        def batch(new: Tensor, old: Tensor, share: float = momentum) -> Tensor:
            # In double precision: the division enlarges rounding.
            return (new.to(old.device).double() - (1 - share) * old.double()) / share

        means[name] = batch(observation.running.mean[name], stored.mean[name]).float()
        unbiased = batch(observation.running.var[name], stored.var[name])
        variances[name] = (unbiased * (count - 1) / count).clamp(min=0).float()
    return BatchNormStatistics(means, variances)


class _Moments(torch.autograd.Function):
    """(B, C, H, W) → each channel's mean and biased variance, (C,) each.

    On a CPU torch.var_mean over these dimensions takes six times as long.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> tuple[Tensor, Tensor]:
        mean = values.mean((0, 2, 3))
        variance = (values - mean[:, None, None]).square().mean((0, 2, 3))
        ctx.save_for_backward(values, mean)
        return mean, variance

    @staticmethod
    def backward(ctx: Any, of_mean: Tensor, of_variance: Tensor) -> Tensor:
        values, mean = ctx.saved_tensors
        count = values.numel() // len(mean)
        slope, offset = 2 / count * of_variance, of_mean / count
        return (values - mean[:, None, None]) * slope[:, None, None] + offset[:, None, None]
