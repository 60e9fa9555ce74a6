"""How fast an iteration is, in the ways in which it can be executed.

All variants run in this process in turn, round after round, and with them a matrix product: whatever else the machine
does meanwhile meets them all. Ratios are formed within a round; their median and spread over the rounds are given.
"""

from __future__ import annotations

import itertools
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from gradinv import __version__, sources
from gradinv.attack.boundary import settled
from gradinv.attack.inversion import iterate
from gradinv.attack.memory import check_memory, parallel_seeds
from gradinv.attack.objective import Objective
from gradinv.attack.state import Run
from gradinv.client import observe
from gradinv.config import AttackConfig
from gradinv.execution.stepping import resolve_mode
from gradinv.models import Model
from gradinv.recovery.recover import recover
from gradinv.types import GradinvError

WARM_UP = 3
"""Iterations before anything is timed: a step is recorded and compared in the first."""

_ENDLESS = 10**9

PRODUCT = 2048
"""Side of the two matrices whose product is timed."""


@dataclass(frozen=True)
class Variant:
    """One line of the result: a network, by its name, and how an iteration is executed."""

    model: str
    batch_size: int
    seeds: int
    stepping: str
    micro_batch: int = 0
    parallel_seeds: int = 0

    def applied(self, config: AttackConfig) -> AttackConfig:
        """The attack as this variant runs it: at full size, far from where annealing or registration begins."""
        own = {name: value for name, value in asdict(self).items() if name not in ("model", "batch_size")}
        return replace(config, **own, stages=(), pooling=(), tv_schedule=(), iterations=10**6)


def variants(
    models: Mapping[str, Model],
    config: AttackConfig,
    batch_sizes: Sequence[int],
    seeds: Sequence[int],
    stepping: Sequence[str],
    micro_batches: Sequence[int],
    parallel: Sequence[int],
) -> list[Variant]:
    """Every combination, each once, with the mode and the seeds at a time that a run takes. Micro-batches that are no
    part of the batch are left out.

    Raises GradinvError for what cannot be measured here.
    """
    found = []
    for asked in itertools.starmap(
        Variant, itertools.product(models, batch_sizes, seeds, stepping, micro_batches, parallel)
    ):
        if 0 < asked.batch_size <= asked.micro_batch:
            continue
        model, wanted = models[asked.model], asked.applied(config)
        check_memory(model, asked.batch_size, wanted)
        mode = resolve_mode(asked.stepping, model.device)
        taken = parallel_seeds(model, asked.batch_size, wanted)
        found.append(replace(asked, stepping=mode, parallel_seeds=taken))
    if not found:
        raise GradinvError(
            "Nothing is left to measure: no list may be empty, and a micro-batch has to be smaller than a batch."
        )
    return list(dict.fromkeys(found))


def measure(
    models: Mapping[str, Model],
    config: AttackConfig,
    planned: Sequence[Variant],
    rounds: int,
    iterations: int,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """In each of `rounds` rounds every variant does `iterations` iterations: → what `--json` prints, see `summarise`.

    `report` is told how many of how many parts are done. Raises GradinvError for what cannot be measured.
    """
    if rounds < 1 or iterations < 1:
        raise GradinvError("At least one round of one iteration has to be timed.")
    device = next(iter(models.values())).device
    total, done = len(planned) * (rounds + 1), itertools.count(1)
    tasks = {(v.model, v.batch_size): Task(models[v.model], v.batch_size, config) for v in planned}
    attacks, facts = {}, {}
    for variant in planned:
        task, wanted = tasks[variant.model, variant.batch_size], variant.applied(config)
        attacks[variant] = Attack(task, wanted)
        # In place of a CUDA graph and of several threads, where no operation can be seen, the same done plainly.
        plain = replace(wanted, stepping="traced", parallel_seeds=1)
        seen = attacks[variant] if wanted.stepping == "eager" else Attack(task, plain)
        facts[variant] = {
            "flops": operations(lambda seen=seen: seen(1)),  # type: ignore[misc]
            "fell_back": attacks[variant].mode != variant.stepping,
        }
        report(next(done), total)
    seconds: dict[Variant, list[float]] = {variant: [] for variant in planned}
    rates = []
    for number in range(rounds):
        rates.append(product_rate(device))
        # There and back again, so that what slowly changes, as the temperature does, falls on all alike.
        for variant in planned if number % 2 == 0 else planned[::-1]:
            seconds[variant].append(attacks[variant](iterations))
            report(next(done), total)
    return {
        "command": "benchmark",
        "config": config.to_dict(),
        "rounds": rounds,
        "iterations": iterations,
        "machine": describe_machine(device),
        **summarise(seconds, rates, facts),
    }


class Task:
    """The gradient of some pictures, solved once for all variants of a network and a batch size."""

    def __init__(self, model: Model, batch_size: int, config: AttackConfig) -> None:
        pixels, labels = pictures(model, batch_size)
        self.model = model
        self.observation = observe(model, pixels, labels, share_bn=True)
        self.recovered = recover(model, self.observation, config)


class Attack:
    """An attack, warmed up, that goes on by some iterations at a time."""

    def __init__(self, task: Task, config: AttackConfig) -> None:
        # Not annealed, so that all iterations are alike; there are always more of them.
        own = settled(task.model, task.recovered, config)
        own = replace(own, iterations=_ENDLESS, pooling=(), tv_schedule=())
        objective = Objective(task.model, task.observation, task.recovered, own)
        run = Run(task.model, task.observation.batch_size, own, separable=objective.separable)
        self._loop = iterate(
            run, objective, own.parallel_seeds, threading.Event(), due=lambda _: True, emit=lambda _, done: done
        )
        next(self._loop)  # the start
        self._device = task.model.device
        self.mode = config.stepping
        self(WARM_UP)

    def __call__(self, iterations: int) -> float:
        """Seconds an iteration of all its seeds. `mode` is then how they are executed: `eager` if it fell back."""
        started = _now(self._device)
        for done in itertools.islice(self._loop, iterations):
            if done is not None:
                self.mode = done.stepper.mode
        return (_now(self._device) - started) / iterations


def pictures(model: Model, batch_size: int) -> tuple[Tensor, Tensor]:
    """Pixels (B, 3, S, S) of the bundled gallery and labels (B,), all different if the model has so many classes.

    After the last picture the same ones follow mirrored and upside down: what an iteration costs does not depend on
    what is in the pictures. Raises GradinvError for more than that makes.
    """
    gallery = sources.gallery(model) or sources.gallery()  # a user's network may know none of the classes
    if not 1 <= batch_size <= 4 * len(gallery):
        raise GradinvError(f"Batches of 1 to {4 * len(gallery)} pictures can be measured, not of {batch_size}.")
    upright = sources.pixels_of(gallery[:batch_size], model.preprocessing)
    pixels = torch.cat([upright, *(upright.flip(sides) for sides in ((3,), (2,), (2, 3)))])[:batch_size]
    return pixels, torch.arange(batch_size) % len(model.classes)


def product_rate(device: torch.device) -> float:
    """Floating-point operations a second in the product of two square float32 matrices."""
    factor = torch.rand(PRODUCT, PRODUCT, device=device)
    started = _now(device)
    factor @ factor
    return 2 * PRODUCT**3 / (_now(device) - started)


def _now(device: torch.device) -> float:
    """The time at which all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class _Counter(TorchDispatchMode):
    """Counts as torch's FlopCounterMode does, whose hooks on modules a second derivative does not survive."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        return result


def operations(run: Callable[[], Any]) -> int:
    """Floating-point operations in convolutions and matrix products; a multiplication with its addition counts two."""
    with _Counter() as counter:
        run()
    return counter.flops


def spread(values: Sequence[float]) -> dict[str, float]:
    """The median of some values, the lowest and the highest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def summarise(
    seconds: Mapping[Variant, Sequence[float]], rates: Sequence[float], facts: Mapping[Variant, Mapping[str, Any]]
) -> dict[str, Any]:
    """The result as JSON has it: `flops_per_second` of the matrix product, `rows` and `fits`.

    `seconds` are each round's seconds an iteration of all seeds, `rates` each round's rate of the matrix product. A
    row has its spreads: `seconds`, the `share` of the product's rate that its own `flops` reach, and under `ratios` how
    many times as fast it is as autograd (`eager`) and as `one seed at a time`.
    """
    rows = []
    for variant, taken in seconds.items():
        alone = replace(variant, parallel_seeds=1)
        eager = replace(alone, stepping="eager", micro_batch=0)
        compared = {"one seed at a time": alone, "eager": eager}
        ratios = {
            name: spread([theirs / own for theirs, own in zip(seconds[other], taken, strict=True)])
            for name, other in compared.items()
            if other != variant and other in seconds
        }
        shares = [facts[variant]["flops"] / own / rate for own, rate in zip(taken, rates, strict=True)]
        timed = {"seconds": {**spread(taken), "rounds": list(taken)}, "share": spread(shares), "ratios": ratios}
        rows.append({**asdict(variant), **facts[variant], **timed})
    return {"flops_per_second": spread(rates), "rows": rows, "fits": _fits(seconds)}


def _fits(seconds: Mapping[Variant, Sequence[float]]) -> list[dict[str, Any]]:
    """For each series of three or more batch sizes, seconds = a + b·K."""
    series: dict[Variant, dict[int, float]] = {}
    for variant, taken in seconds.items():
        series.setdefault(replace(variant, batch_size=0), {})[variant.batch_size] = statistics.median(taken)
    return [
        {**asdict(variant), **line(list(found), list(found.values()))}
        for variant, found in series.items()
        if len(found) >= 3
    ]


def line(sizes: Sequence[int], seconds: Sequence[float]) -> dict[str, float]:
    """seconds = a + b·K by least squares of the relative deviations, and the largest of these."""
    times = np.array(seconds)
    b, a = np.polyfit(sizes, times, 1, w=1 / times)
    deviations = np.abs((a + b * np.array(sizes)) / times - 1)
    return {"a": float(a), "b": float(b), "largest_deviation": float(deviations.max())}


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What the figures depend on; nothing in it says whose machine it is."""
    return {
        "cpu": platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "gradinv": __version__,
    }
