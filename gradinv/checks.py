"""What cannot be inverted is said before anything runs, in one sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gradinv.batchnorm import check_train_mode, running_statistics
from gradinv.models import Model
from gradinv.names import listed_of
from gradinv.recovery.examination import named_for
from gradinv.types import MODES, BatchNormStatistics, GradinvError, Observation

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_observation(model: Model, observation: Observation) -> None:
    """Raises GradinvError, in one sentence, for an observation that is not one of this model or is not finite."""
    _check_origin(model, observation)
    smoothing = observation.label_smoothing
    if not isinstance(smoothing, int | float) or isinstance(smoothing, bool) or not 0 <= smoothing < 1:
        raise GradinvError(f"The label smoothing must be at least 0 and less than 1, not {smoothing!r}.")
    if observation.mode not in MODES:
        raise GradinvError(
            f"The observation's forward mode must be {' or '.join(MODES)}, not {observation.mode!r}; say in which one "
            "the client took its gradient."
        )
    if observation.mode == "eval" and observation.running is not None:
        raise GradinvError(
            "The observation holds running statistics after a step, but its forward mode is eval, in which none are "
            "kept; set its mode to train, or leave them out."
        )
    if observation.mode == "train":
        check_train_mode(model, observation.batch_size)
    observation = named_for(model, observation)
    _check_gradients(model, observation.gradients)
    for statistics, whose in ((observation.bn, "batch"), (observation.running, "running")):
        if statistics is not None:
            _check_statistics(model, statistics, whose)


def _check_origin(model: Model, observation: Observation) -> None:
    if observation.model_sha256 != model.sha256:
        theirs, ours = f"{observation.model_sha256:.8}…", f"{model.sha256:.8}…"
        if observation.model_name == model.name:
            raise GradinvError(
                f"The observation was made with other weights of {model.name} (sha256 {theirs}) than those loaded "
                f"(sha256 {ours}); load the file that it was made with."
            )
        raise GradinvError(
            f"The observation is of the network {observation.model_name} (sha256 {theirs}), not of {model.name} "
            f"(sha256 {ours}); load that one."
        )
    theirs_at, ours_at = observation.preprocessing, model.preprocessing
    if theirs_at.size != ours_at.size:
        raise GradinvError(
            f"The observation is of {theirs_at.size}-px images, the model is set to {ours_at.size} px; set the same "
            "image size."
        )
    if not theirs_at.normalises_as(ours_at):
        raise GradinvError(
            f"The observation was made with mean {_short(theirs_at.mean)} and std {_short(theirs_at.std)}, and "
            f"{model.name} takes mean {_short(ours_at.mean)} and std {_short(ours_at.std)}; load it with those of the "
            "observation (--mean and --std)."
        )


def _short(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def _check_gradients(model: Model, gradients: Mapping[str, Tensor]) -> None:
    """Of layers that the client does not train there is none."""
    expected = dict(model.network.named_parameters())
    if (count := listed_of(gradients)) is not None:  # the place of each was not taken for a name
        raise GradinvError(
            f"The list holds {counted(count, 'gradient')} and {model.name} has {len(expected)} parameters; give one "
            "for each in their order, None for what does not train, or give them by name."
        )
    if unknown := [name for name in gradients if name not in expected]:
        raise GradinvError(
            f"The observation holds a gradient of {unknown[0]}{_others(unknown)}, which {model.name} does not have; "
            "name them as the model's own named_parameters() does."
        )
    for name, gradient in gradients.items():
        _check_tensor(gradient, expected[name].shape, f"gradient of {name}")
    if not gradients:
        raise GradinvError("The observation holds no gradient, so there is nothing to invert.")
    if not any(gradient.any() for gradient in gradients.values()):
        raise GradinvError("Every gradient of the observation is zero, so there is nothing to match.")


def _check_statistics(model: Model, statistics: BatchNormStatistics, whose: str) -> None:
    expected = running_statistics(model.network).mean
    for kind, given in (("mean", statistics.mean), ("variance", statistics.var)):
        if missing := [name for name in expected if name not in given]:
            raise GradinvError(
                f"The observation's {whose} statistics lack the {kind} of the BN layer {missing[0]}{_others(missing)}; "
                "give each layer's, or none."
            )
        if unknown := [name for name in given if name not in expected]:
            raise GradinvError(
                f"The observation's {whose} statistics name a BN layer {unknown[0]}{_others(unknown)} that "
                f"{model.name} does not have."
            )
        for name, value in expected.items():
            what = f"{whose} {kind} of the BN layer {name}"
            _check_tensor(given[name], value.shape, what)
            if kind == "variance" and (given[name] < 0).any():
                raise GradinvError(f"The {what} is negative, which no variance is; measure it again.")


def _check_tensor(value: Tensor, shape: torch.Size, what: str) -> None:
    if not isinstance(value, Tensor):
        raise GradinvError(f"The {what} is {value!r}; a tensor is expected.")
    if value.shape != shape:
        raise GradinvError(f"The {what} has the shape {tuple(value.shape)} instead of {tuple(shape)}.")
    if value.dtype not in _FLOATS:  # torch cannot even compare smaller ones
        raise GradinvError(f"The {what} holds {value.dtype}; floating-point numbers are expected.")
    if not torch.isfinite(value).all():
        raise GradinvError(f"The {what} holds values that are not finite, so there is nothing to match.")


def _others(names: Sequence[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
