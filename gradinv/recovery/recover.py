"""All that the gradient says without a search, solved once: labels, the final layer, and the layers below it."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from gradinv.config import AttackConfig
from gradinv.models import Model
from gradinv.recovery.final_layer import FinalLayer
from gradinv.recovery.labels import restore_labels
from gradinv.types import Observation, Recovered, SolvedNode


@torch.no_grad()
def recover(
    model: Model,
    observation: Observation,
    config: AttackConfig,
    *,
    stop: threading.Event | None = None,
    progress: Callable[[SolvedNode], None] | None = None,
) -> Recovered:
    """Read the labels, solve the final layer where the config needs it, then the layers below as far as they go.

    How far is `config.boundary`: "loss" solves nothing but the labels (and the features where a term needs them),
    "logits" the final layer, "auto" as many layers as the gradient determines, a node's name down to that node.
    `progress` is called with each node as it is solved; `stop` ends the way down there. Raises GradinvError where the
    labels cannot be read, or the final layer cannot be solved though the config needs it.
    """
    restored = restore_labels(model, observation, config.labels)
    found = Recovered(restored.labels, restored.method, restored.confidence)
    if not config.needs_features:
        return found
    fit = restored.fit or FinalLayer(model, observation).fit(restored.labels.cpu())
    device = model.device
    return Recovered(
        restored.labels,
        restored.method,
        restored.confidence,
        fit.features.float().to(device),
        fit.errors.float().to(device),
        fit.residual,
        fit.scale,
    )
