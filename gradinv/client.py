"""The client: it computes the gradient of its batch and shares it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from gradinv.batchnorm import batch_statistics, check_train_mode, running_statistics
from gradinv.models import Model
from gradinv.types import MODES, BatchNormStatistics, Gradients, GradinvError, Observation


@contextmanager
def _whole_products() -> Iterator[None]:
    """While open, matrix products are in float32 also where the environment lets them be in TF32, of which the final
    layer's gradient, from which labels and features are solved for, would be wrong in the fourth digit."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@torch.inference_mode(False)
@torch.enable_grad()
def observe(
    model: Model,
    pixels: Tensor,
    labels: Tensor,
    *,
    share_bn: bool = False,
    mode: str = "eval",
    label_smoothing: float = 0.0,
) -> Observation:
    """What the server receives: ∇_W of the mean cross-entropy of the batch, ΔW = (1/K) Σ_k ∇_W L(x*_k, y*_k).

    pixels: (B, 3, S, S) in [0, 1]; labels: (B,) int64. In eval mode BN normalises by the running statistics; in train
    mode by the batch's own, and the client then shares its running statistics after the step. The model's own are
    never touched. With `share_bn` the batch's own BN statistics leak as well, as they are in that mode. Labels are
    (1 − ε) y + ε/N with ε = `label_smoothing`. Raises GradinvError for an empty batch, a wrong size, labels that the
    model lacks, another mode, or a batch that is too small for train mode.
    """
    if mode not in MODES:
        raise GradinvError(f"The client's forward mode is one of {' or '.join(MODES)}, not {mode!r}.")
    if not 0 <= label_smoothing < 1:
        raise GradinvError(f"The label smoothing must be at least 0 and less than 1, not {label_smoothing!r}.")
    size = model.preprocessing.size
    if pixels.ndim != 4 or len(pixels) == 0 or pixels.shape[1:] != (3, size, size):
        raise GradinvError(
            f"At least one image of 3×{size}×{size} is expected, not {tuple(pixels.shape)}; choose a picture."
        )
    if labels.shape != (len(pixels),) or labels.min() < 0 or labels.max() >= len(model.classes):
        raise GradinvError(f"Each image needs one label between 0 and {len(model.classes) - 1}.")
    if mode == "train":
        check_train_mode(model, len(pixels))
    model, labels = model.differentiable(), labels.clone()  # what was made in inference mode takes part in no gradient
    # A client's training step updates its copy of the running statistics, as torch does it.
    network = copy.deepcopy(model.network).train() if mode == "train" else model.network.eval()
    normalised = model.preprocessing.normalise(pixels.to(model.device, torch.float32))
    parameters = dict(network.named_parameters())
    with _whole_products(), batch_statistics(network) as (means, variances):
        loss = F.cross_entropy(network(normalised), labels.to(model.device), label_smoothing=label_smoothing)
        gradients = torch.autograd.grad(loss, list(parameters.values()))
    mean, var = ({name: value.detach() for name, value in part.items()} for part in (means, variances))
    return Observation(
        gradients=dict(zip(parameters, gradients, strict=True)),
        batch_size=len(pixels),
        preprocessing=model.preprocessing,
        model_name=model.name,
        model_sha256=model.sha256,
        bn=BatchNormStatistics(mean, var) if share_bn else None,
        mode=mode,
        label_smoothing=label_smoothing,
        running=running_statistics(network) if mode == "train" else None,
    )


@torch.no_grad()
def final_gradient(model: Model, features: Tensor, labels: Tensor) -> Gradients:
    """The final layer's gradient from its input alone: ∇W = AᵀF/K and ∇b = Aᵀ1/K with A = p − y.

    features: the batch's pooled features F (K, D); labels: (K,). In eval mode this is what `observe` gives for the
    whole batch, up to rounding, because no image's features depend on the others (a gallery that was read back holds
    its features as half floats, with a relative error of 5e-4).
    """
    layer = model.final_layer
    features, labels = features.to(layer.weight), labels.to(layer.weight.device)
    with _whole_products():
        errors = F.linear(features, layer.weight, layer.bias).softmax(1) - F.one_hot(labels, layer.out_features)
        gradients = {f"{model.final}.weight": errors.T @ features / len(labels)}
    if layer.bias is not None:
        gradients[f"{model.final}.bias"] = errors.mean(0)
    return gradients
