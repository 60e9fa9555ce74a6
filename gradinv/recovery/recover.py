"""All that the gradient says without a search, solved once: labels, the final layer, and the layers below it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from gradinv.config import AttackConfig
from gradinv.models import Model
from gradinv.network import STEM, parts_of
from gradinv.recovery.examination import Examined, examine
from gradinv.recovery.final_layer import FinalLayer, Fit
from gradinv.recovery.labels import RestoredLabels, restore_labels
from gradinv.recovery.layers import solve_layers
from gradinv.types import GradinvError, Observation, Recovered, SolvedNode


@torch.inference_mode(False)
@torch.no_grad()
def recover(
    model: Model,
    observation: Observation,
    config: AttackConfig,
    *,
    labels: Tensor | None = None,
    stop: threading.Event | None = None,
    progress: Callable[[SolvedNode], None] | None = None,
    told: Callable[[Recovered], None] | None = None,
    examined: Examined | None = None,
) -> Recovered:
    """Read the labels, solve the final layer where the config needs it, then the layers below as far as they go.

    How far is `config.boundary`: "loss" solves nothing but the labels (and the features where a term needs them),
    "logits" the final layer, "auto" as many layers as the gradient determines, a node's name down to that node.
    `labels` (B,) are taken as they are where they are given, as they have to be of a client that does not train its
    final layer. `examine` says first what the gradient is, whatever its file says, unless it is `examined` already.
    `told` is called once with the labels and, where it is solved, the final layer, before the layers below, which may
    take minutes, or before it is said that there are none; `progress` is called with each node as it is solved; `stop`
    ends the way down there. Raises GradinvError where the labels cannot be read, or the final layer cannot be solved
    though the config needs it.
    """
    examined = examined or examine(model, observation)
    observation = examined.observation
    if labels is None:
        restored = restore_labels(model, observation, config.labels)
    else:
        restored = _given(model, observation, labels)
    found = _read(restored, observation, examined.notes)
    told = told or (lambda _: None)
    if not config.needs_features:
        told(found)
        return found
    try:
        layer = FinalLayer(model, observation)
    except GradinvError as error:
        told(found)
        if config.boundary != "auto":
            also = "features to 0 and " if config.features > 0 else ""
            raise GradinvError(f"{str(error).rstrip('.')}; set {also}boundary to loss.") from error
        return replace(found, stopped=str(error))
    fit = restored.fit or layer.fit(restored.labels.cpu())
    if config.needs_layers:
        fit = layer.refined(fit, restored.labels.cpu())
    device = model.device
    found = replace(
        found,
        features=fit.features.float().to(device),
        output_errors=fit.output_errors.float().to(device),
        residual=fit.residual,
        scale=fit.scale,
    )
    told(found)
    if not config.needs_layers:
        return found
    nodes, stopped = _layers(model, observation, config, fit, stop, progress)
    return replace(found, nodes=nodes, stopped=stopped)


def _read(restored: RestoredLabels, observation: Observation, notes: tuple[str, ...]) -> Recovered:
    """What the labels alone say. The client's rescaling and smoothing are known wherever they were tested by these."""
    fit = restored.fit
    return Recovered(
        restored.labels,
        restored.method,
        restored.confidence,
        scale=1.0 if fit is None else fit.scale,
        notes=(*notes, *restored.notes),
        label_smoothing=observation.label_smoothing if fit is None else fit.smoothing,
    )


def _given(model: Model, observation: Observation, labels: Tensor) -> RestoredLabels:
    """Labels that somebody knows. Raises GradinvError where they are not one for each image."""
    classes = model.final_layer.out_features
    if labels.shape != (observation.batch_size,) or labels.min() < 0 or labels.max() >= classes:
        raise GradinvError(
            f"Of {observation.batch_size} images as many labels between 0 and {classes - 1} are to be given, not "
            f"{labels.tolist()!r:.60}."
        )
    return RestoredLabels(labels.long(), "given", 1.0)


def _reach(model: Model, observation: Observation) -> tuple[str | None, str]:
    """The lowest node that is solved of gradients that are there, None where none is, and the first that lacks on the
    way down ("" where all are there). Those of batch normalisation may lack: they only mend masks."""
    blocks = parts_of(model.network).blocks
    lowest = None
    for index in range(len(blocks) - 1, -1, -1):
        block, below = blocks[index], blocks[index - 1] if index else None
        for place in range(len(block.units) - 1, -1, -1):
            needed = [f"{block.units[place].name}.weight"]
            if place == len(block.units) - 1 and index == len(blocks) - 1:
                needed += [f"{block.units[place - 1].name}.weight"]
            if place == 0 and block.shortcut is not None:
                needed.append(f"{block.shortcut.name}.weight")
            if lacks := [name for name in needed if name not in observation.gradients]:
                return lowest, lacks[0]
            lowest = block.units[place - 1].name if place else STEM if below is None else below.name
    return lowest, ""


def _layers(
    model: Model,
    observation: Observation,
    config: AttackConfig,
    fit: Fit,
    stop: threading.Event | None,
    progress: Callable[[SolvedNode], None] | None,
) -> tuple[tuple[SolvedNode, ...], str]:
    if config.boundary != "auto":
        until = parts_of(model.network).node(config.boundary)
        order = parts_of(model.network).nodes
        lowest, lacks = _reach(model, observation)
        if lacks and (lowest is None or order.index(until) < order.index(lowest)):
            raise GradinvError(
                f"The gradient does not determine {until}, since that of {lacks} is absent; set boundary to auto."
            )
        nodes, stopped = solve_layers(model, observation, fit, until=until, stop=stop, progress=progress)
        if stopped and not (stop is not None and stop.is_set()):
            raise GradinvError(f"The gradient does not determine {until}: {stopped} Set boundary to auto.")
        return nodes, stopped
    try:
        lowest, lacks = _reach(model, observation)
        if lowest is None:
            return (), f"The gradient of {lacks} is absent, so no layer below the final one is solved."
        nodes, stopped = solve_layers(
            model, observation, fit, until=lowest if lacks else None, stop=stop, progress=progress
        )
        return nodes, stopped or f"The gradient of {lacks} is absent, so no layer below {lowest} is solved."
    except GradinvError as error:
        return (), str(error)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        # Two images have the same output errors: their labels are not the true ones.
        return (), "The final layer's solution does not tell the images apart, so no layer below it is solved."
