"""How much memory a run takes, and how many seeds it works on at a time."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import replace
from weakref import WeakKeyDictionary

import psutil
import torch
from torch import nn

from gradinv.attack.boundary import matching_instead
from gradinv.attack.objective import matched_parameters
from gradinv.attack.optimiser import HISTORY
from gradinv.checks import counted
from gradinv.config import AttackConfig
from gradinv.execution.stepping import resolve_mode, side_by_side
from gradinv.models import Model
from gradinv.types import GradinvError

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
        what = f"{counted(config.seeds, 'seed')} of {counted(batch_size, 'image')}"
        raise GradinvError(
            f"{what} need about {needed / 2**30:.1f} GiB and "
            f"{free / 2**30:.1f} GiB are free; {hint}take fewer seeds or a smaller batch."
        )


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
