"""Labels read from the final layer's gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from gradinv.models import Model
from gradinv.types import GradinvError, Observation


def restore_labels(model: Model, observation: Observation, method: str = "column-minimum") -> Tensor:
    """The batch's labels (B,), int64, most certain first: ŷ = argsort(min_m ∇_{W_{m,n}^{FC}} L)[:K] (Eqn 8).

    Assumes features after a ReLU, and that no label repeats. Raises GradinvError where K exceeds the classes or the
    gradient is not finite.
    """
    if method != "column-minimum":
        raise GradinvError(f"There is no label restoration {method!r}; take column-minimum.")
    name = f"{model.final}.weight"
    if name not in observation.gradients:
        raise GradinvError(f"The observation has no gradient of {name}; labels are read from it.")
    return column_minimum(observation.gradients[name], observation.batch_size)


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
