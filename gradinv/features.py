"""Each image's pooled features, solved in closed form from the final layer's gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from gradinv.models import Model
from gradinv.types import GradinvError, Observation


@dataclass(frozen=True, eq=False)
class RecoveredFeatures:
    """What the final layer's gradient says of each image: `features` F (B, D) and `errors` A = p − y (B, N).

    `residual` is ‖AᵀF/K − ∇W‖ / ‖∇W‖: near 0 the features explain the gradient. Of images that share a label only a
    mixture is found.
    """

    features: Tensor
    errors: Tensor
    residual: float


@torch.no_grad()
def recover_features(model: Model, observation: Observation, labels: Tensor, rounds: int = 20) -> RecoveredFeatures:
    """Solve ∇W = (1/K) Aᵀ F for the pooled features F, with A[k, c] = p_k[c] − 1[c = y_k] and p = softmax(F Wᵀ + b).

    Starts from F_k = ∇W[y_k] / ∇b[y_k], then alternates A from F with the least squares F from A, clamped at 0
    (features follow a ReLU), and keeps the F with the smallest residual. labels: (B,). Needs K < N. Not in the paper.
    """
    layer = model.final_layer
    device = model.device
    if f"{model.final}.bias" not in observation.gradients or layer.bias is None:
        raise GradinvError(
            "Features can only be recovered where the final layer has a bias; set features=0, errors=predicted."
        )
    # Double precision: the least squares squares the condition number of A, and the matrices are small.
    weight, bias = layer.weight.double(), layer.bias.double()
    weight_gradient = observation.gradients[f"{model.final}.weight"].to(device).double()
    bias_gradient = observation.gradients[f"{model.final}.bias"].to(device).double()
    labels = labels.to(device)
    count = len(labels)
    if count >= len(weight_gradient):
        raise GradinvError(f"Features can be recovered for fewer than {len(weight_gradient)} images, not for {count}.")

    def output_errors(features: Tensor) -> Tensor:
        probabilities = F.linear(features, weight, bias).softmax(1)
        return probabilities - F.one_hot(labels, len(weight)).to(probabilities)

    def residual(features: Tensor) -> float:
        explained = output_errors(features).T @ features / count
        return float((explained - weight_gradient).norm() / weight_gradient.norm())

    scale = bias_gradient[labels]
    scale = torch.where(scale.abs() < 1e-12, torch.full_like(scale, -1e-12), scale)
    features = (weight_gradient[labels] / scale[:, None]).clamp(min=0)
    best, smallest = features, residual(features)
    for _ in range(rounds):
        # gelsd (by SVD) because repeated labels make A rank-deficient; CUDA only has gels, so the small system is
        # solved on the CPU.
        errors = output_errors(features).T.cpu()
        solution = torch.linalg.lstsq(errors, count * weight_gradient.cpu(), driver="gelsd").solution
        features = solution.to(device).clamp(min=0)
        left = residual(features)
        if left < smallest:
            best, smallest = features, left
    return RecoveredFeatures(best.float(), output_errors(best).float(), smallest)
