"""What cannot be inverted is said before anything runs, in one sentence."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from weakref import WeakKeyDictionary

import psutil
import torch
from torch import Tensor, nn

from gradinv.attack.boundary import matching_instead
from gradinv.attack.objective import matched_parameters
from gradinv.attack.optimiser import HISTORY
from gradinv.batchnorm import check_train_mode, running_statistics
from gradinv.config import AttackConfig
from gradinv.models import Model
from gradinv.names import listed_of
from gradinv.recovery.examination import named_for
from gradinv.stepping import resolve_mode, side_by_side
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
            f"The list holds {_counted(count, 'gradient')} and {model.name} has {len(expected)} parameters; give one "
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


# The most that an evaluation holds at a time, in float32 values for each one that a convolution makes of the images,
# for each weight, and for each weight whose gradient is matched. Measured (docs/performance.md) and rounded up.
_PER_OUTPUT = 7
_PER_WEIGHT = 1.5
_PER_MATCHED = 2
# The part of the machine's memory that seeds side by side take at the most, unless a config asks for more.
_PARALLEL_SHARE = 0.25

# How many times the images a seed holds: with the gradient, a snapshot, and what the optimiser keeps.
_PER_SEED = {"adam": 8, "l-bfgs": 10 + 2 * HISTORY}

_outputs: WeakKeyDictionary[Model, int] = WeakKeyDictionary()


def estimate_memory(model: Model, batch_size: int, config: AttackConfig) -> int:
    """About how many bytes a run adds to the loaded model, from above.

    Per seed its images, what the optimiser keeps, the gradient and a snapshot; for each of the `parallel_seeds` the
    gradients with their double backward, and what one evaluation holds of the images that are in the network at a
    time. A CUDA graph keeps its evaluation's memory, and autograd, with which it is compared,
    takes as much beside it. With `boundary=auto` what is more of both that may run. Raises GradinvError where the
    network has no stage of the name that the config matches up to, and for a stepping that cannot be had here.
    """
    may_run = [config, *([matching_instead(model, config)] if config.boundary == "auto" else [])]
    return max(_estimated(model, batch_size, own, parallel_seeds(model, batch_size, own)) for own in may_run)


def parallel_seeds(model: Model, batch_size: int, config: AttackConfig) -> int:
    """How many seeds a run works on at a time: what the config says, but no more than there are seeds and threads. It
    is one if evaluations cannot run side by side, and on a GPU, where they would take turns. Left to itself (0), it is
    also no more than a quarter of the machine's whole memory has room for: if it followed the free memory, rounding
    would depend on what else runs.

    Raises GradinvError as `estimate_memory` does.
    """
    mode = resolve_mode(config.stepping, model.device, config.iterations * config.seeds)
    if not side_by_side(mode) or model.device.type != "cpu":
        return 1
    most = min(config.seeds, torch.get_num_threads())
    if config.parallel_seeds > 0:
        return min(config.parallel_seeds, most)
    room = _PARALLEL_SHARE * psutil.virtual_memory().total
    counts = range(most, 1, -1)
    return next((count for count in counts if _estimated(model, batch_size, config, count) <= room), 1)


def _estimated(model: Model, batch_size: int, config: AttackConfig, parallel: int) -> int:
    size = model.preprocessing.size
    image_bytes = 4 * batch_size * 3 * size * size
    weights = {name: parameter.numel() for name, parameter in model.network.named_parameters()}
    matched = matched_parameters(model, config.layers) if config.gradient > 0 else []
    together = min(config.micro_batch or batch_size, batch_size)
    held = _PER_WEIGHT * sum(weights.values()) + _PER_MATCHED * sum(weights[name] for name in matched)
    mode = resolve_mode(config.stepping, model.device, config.iterations * config.seeds)
    evaluations = 2 if mode == "graph" else parallel
    held = evaluations * (held + _PER_OUTPUT * outputs_per_image(model) * together)
    return config.seeds * _PER_SEED[config.optimiser] * image_bytes + round(4 * held)


def outputs_per_image(model: Model) -> int:
    """How many numbers all convolutions of a network make of one image, from a dry pass of its shapes alone."""
    if model not in _outputs:
        found: list[int] = []
        network = copy.deepcopy(model.network).to("meta").eval()
        for module in network.modules():
            # Those of another thread that is using the network came along.
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(lambda _, __, output: found.append(output.numel()))
        size, dtype = model.preprocessing.size, next(network.parameters()).dtype
        with torch.no_grad():
            network(torch.empty(1, 3, size, size, device="meta", dtype=dtype))
        _outputs[model] = sum(found)
    return _outputs[model]


def free_memory(device: torch.device) -> int:
    """How many bytes a run can take there."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    # What torch keeps of earlier runs it gives to the next one.
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + kept


def check_memory(model: Model, batch_size: int, config: AttackConfig) -> None:
    """Raises GradinvError where `estimate_memory` exceeds what is free on the model's device; where fewer seeds at a
    time or taking the images in parts would do, it names the most of them."""
    needed, free = estimate_memory(model, batch_size, config), free_memory(model.device)
    if needed > free:
        smaller = _with_less_memory(model, batch_size, config)
        fitting = (advice for advice, less in smaller if estimate_memory(model, batch_size, less) <= free)
        hint = "".join(f"{advice}, or " for advice in itertools.islice(fitting, 1))
        what = f"{_counted(config.seeds, 'seed')} of {_counted(batch_size, 'image')}"
        raise GradinvError(
            f"{what} need about {needed / 2**30:.1f} GiB and "
            f"{free / 2**30:.1f} GiB are free; {hint}take fewer seeds or a smaller batch."
        )


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _with_less_memory(model: Model, batch_size: int, config: AttackConfig) -> Iterator[tuple[str, AttackConfig]]:
    """The same run at the cost of time, the fastest first, with what has to be set for it."""
    parallel = parallel_seeds(model, batch_size, config)
    for count in range(parallel - 1, 0, -1):
        yield f"set parallel_seeds to {count}", replace(config, parallel_seeds=count)
    # A client in train mode, of which inferred statistics are, allows no parts.
    together = min(config.micro_batch or batch_size, batch_size) if config.bn != "inferred" else 1
    for size in range(together - 1, 0, -1):
        also = " and parallel_seeds to 1" if parallel > 1 else ""
        yield f"set micro_batch to {size}{also}", replace(config, micro_batch=size, parallel_seeds=1)
