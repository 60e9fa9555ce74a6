"""All that the gradient says without a search, solved once: labels, the final layer, and the layers below it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

import torch

from gradinv.config import AttackConfig
from gradinv.models import Model
from gradinv.network import parts
from gradinv.recovery.examination import examine
from gradinv.recovery.final_layer import FinalLayer, Fit
from gradinv.recovery.labels import restore_labels
from gradinv.recovery.layers import solve_layers
from gradinv.types import GradinvError, Observation, Recovered, SolvedNode


@torch.inference_mode(False)
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
    The gradient is taken for what it is found to be (`examine`). `progress` is called with each node as it is solved;
    `stop` ends the way down there. Raises GradinvError where the labels cannot be read, or the final layer cannot be
    solved though the config needs it.
    """
    examined = examine(model, observation)
    observation = examined.observation
    restored = restore_labels(model, observation, config.labels)
    # The client's rescaling is known wherever the labels were tested by it.
    scale = 1.0 if restored.fit is None else restored.fit.scale
    notes = (*examined.notes, *restored.notes)
    found = Recovered(restored.labels, restored.method, restored.confidence, scale=scale, notes=notes)
    if not config.needs_features:
        return found
    try:
        layer = FinalLayer(model, observation)
    except GradinvError as error:
        if config.boundary != "auto":
            raise
        return replace(found, stopped=str(error))
    fit = restored.fit or layer.fit(restored.labels.cpu())
    nodes: tuple[SolvedNode, ...] = ()
    stopped = ""
    if config.needs_layers:
        fit = layer.refined(fit, restored.labels.cpu())
        nodes, stopped = _layers(model, observation, config, fit, stop, progress)
    device = model.device
    return replace(
        found,
        features=fit.features.float().to(device),
        errors=fit.errors.float().to(device),
        residual=fit.residual,
        scale=fit.scale,
        nodes=nodes,
        stopped=stopped,
    )


def _layers(
    model: Model,
    observation: Observation,
    config: AttackConfig,
    fit: Fit,
    stop: threading.Event | None,
    progress: Callable[[SolvedNode], None] | None,
) -> tuple[tuple[SolvedNode, ...], str]:
    if config.boundary != "auto":
        until = parts(model.network).node(config.boundary)
        nodes, stopped = solve_layers(model, observation, fit, until=until, stop=stop, progress=progress)
        if stopped and not (stop is not None and stop.is_set()):
            raise GradinvError(f"The gradient does not determine {until}: {stopped} Set boundary to auto.")
        return nodes, stopped
    try:
        parts(model.network)
        return solve_layers(model, observation, fit, stop=stop, progress=progress)
    except GradinvError as error:
        return (), str(error)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        # Two images have the same output errors: their labels are not the true ones.
        return (), "The final layer's solution does not tell the images apart, so no layer below it is solved."
