"""The client: it computes the gradient of its batch and shares it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gradinv.models import Model
from gradinv.objective import batch_statistics
from gradinv.types import BatchNormStatistics, GradinvError, Observation


def observe(model: Model, pixels: Tensor, labels: Tensor, *, share_bn: bool = False) -> Observation:
    """What the server receives: ∇_W of the mean cross-entropy of the batch, ΔW = (1/K) Σ_k ∇_W L(x*_k, y*_k).

    pixels: (B, 3, S, S) in [0, 1]; labels: (B,) int64. The network runs in eval mode and keeps its running
    statistics. With `share_bn` the batch's own BN statistics leak as well. Raises GradinvError for an empty batch,
    a wrong size, or labels that the model lacks.
    """
    size = model.preprocessing.size
    if pixels.ndim != 4 or len(pixels) == 0 or pixels.shape[1:] != (3, size, size):
        raise GradinvError(
            f"A batch of at least one image of 3×{size}×{size} is expected, not {tuple(pixels.shape)}; "
            "choose a picture."
        )
    if labels.shape != (len(pixels),) or labels.min() < 0 or labels.max() >= len(model.classes):
        raise GradinvError(f"Each image needs one label between 0 and {len(model.classes) - 1}.")
    network = model.network.eval()
    normalised = model.preprocessing.normalise(pixels.to(model.device, torch.float32))
    with batch_statistics(network) as (means, variances):
        loss = F.cross_entropy(network(normalised), labels.to(model.device))
    parameters = dict(network.named_parameters())
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    bn = None
    if share_bn:
        bn = BatchNormStatistics(
            {name: value.detach() for name, value in means.items()},
            {name: value.detach() for name, value in variances.items()},
        )
    return Observation(
        gradients=dict(zip(parameters, gradients, strict=True)),
        batch_size=len(pixels),
        preprocessing=model.preprocessing,
        model_name=model.name,
        model_sha256=model.sha256,
        bn=bn,
    )
