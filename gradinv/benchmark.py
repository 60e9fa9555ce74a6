"""How fast an iteration is, how near to what the machine can do, and what memory it takes.

All variants run in this process in turn, round after round, and with them a matrix product: whatever else the machine
does meanwhile meets them all. Ratios are formed within a round, and their median and spread over the rounds are given.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import itertools
import multiprocessing
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import safetensors.torch
import torch
import torchvision
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from gradinv import __version__, sources
from gradinv.attack.boundary import settled
from gradinv.attack.objective import Objective
from gradinv.attack.state import Run
from gradinv.checks import check_memory, estimate_memory, parallel_seeds
from gradinv.config import AttackConfig
from gradinv.images import to_pixels
from gradinv.models import MODELS, Model
from gradinv.peers import BREACHING, breaching_attack, require_breaching
from gradinv.recovery.recover import recover
from gradinv.stepping import MODES, Stepper, evaluate, resolve_mode
from gradinv.types import GradinvError
from gradinv.victim import observe

WARM_UP = 3
"""Iterations before anything is timed: a step is recorded and compared in the first."""

MATMUL = {"cpu": (2048, 1), "cuda": (8192, 10)}
"""By kind of device the side of the two matrices, and how often they are multiplied to be timed."""

FORMAT = 1

Load = Callable[[], Model]
"""Loads a network. It has to be picklable, because memory is measured in a process of its own."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Plan:
    """What is measured: every combination of networks, batch sizes, seeds, steppings, micro-batches and numbers of
    seeds at a time.

    `config` says what an iteration consists of, and `peers` which of `breaching`'s attacks run beside it. In each of
    `rounds` rounds every variant does `iterations` iterations.
    """

    loads: tuple[Load, ...]
    config: AttackConfig
    batch_sizes: tuple[int, ...] = (1, 4, 8)
    seeds: tuple[int, ...] = (1,)
    stepping: tuple[str, ...] = ("eager", "auto")
    micro_batches: tuple[int, ...] = (0,)
    parallel_seeds: tuple[int, ...] = (0,)
    peers: tuple[str, ...] = ()
    rounds: int = 5
    iterations: int = 4
    memory: bool = True
    profile: bool = False

    def __post_init__(self) -> None:
        """Raises GradinvError for what cannot be measured."""
        for name in ("batch_sizes", "seeds", "stepping", "micro_batches", "parallel_seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise GradinvError(f"{name.replace('_', ' ')} takes one or more different values, not {list(values)}.")
        for name, least in (("batch_sizes", 1), ("seeds", 1), ("micro_batches", 0), ("parallel_seeds", 0)):
            if min(getattr(self, name)) < least:
                raise GradinvError(f"{name.replace('_', ' ')} takes numbers of at least {least}.")
        if self.rounds < 1 or self.iterations < 1:
            raise GradinvError("At least one round of one iteration has to be timed.")
        if unknown := sorted(set(self.stepping) - set(MODES)):
            raise GradinvError(f"stepping takes {', '.join(MODES)}, not {unknown[0]!r}.")


# What a row of the result says of its variant, beside the network.
_SETTINGS = ("batch_size", "seeds", "stepping", "micro_batch", "parallel_seeds")


@dataclass(frozen=True)
class Variant:
    """One line of the result. `stepping` is how our iteration is executed, or the name of a peer's attack."""

    model: int  # its place among the plan's networks
    batch_size: int
    seeds: int
    stepping: str
    micro_batch: int = 0
    parallel_seeds: int = 1

    @property
    def peer(self) -> bool:
        """Whether it is somebody else's attack."""
        return self.stepping in BREACHING

    def applied(self, config: AttackConfig) -> AttackConfig:
        """The attack as this variant runs it: at full size, far from where annealing or registration begins."""
        return dataclasses.replace(
            config,
            seeds=self.seeds,
            stepping="eager" if self.peer else self.stepping,
            micro_batch=self.micro_batch,
            parallel_seeds=self.parallel_seeds,
            stages=(),
            pooling=(),
            tv_schedule=(),
            iterations=10**6,
        )


def measure(plan: Plan, report: Progress | None = None) -> dict[str, Any]:
    """Do all that is planned: → what `--json` prints, see `summarise`.

    `report` is told how many of how many parts are done. Raises GradinvError for what cannot be measured here.
    """
    if plan.peers:
        require_breaching()
    models = [load() for load in plan.loads]
    variants = _variants(plan, models)
    for variant in variants:
        if not variant.peer:
            check_memory(models[variant.model], variant.batch_size, variant.applied(plan.config))
    parts = itertools.count(1)
    total = len(variants) * (1 + plan.memory + plan.rounds)

    def done() -> None:
        if report is not None:
            report(next(parts), total)

    load_before = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    peaks: dict[Variant, int | None] = {}
    for variant in variants if plan.memory else ():
        peaks[variant] = _in_own_process(plan.loads[variant.model], plan.config, variant)
        done()
    sizes = itertools.product(range(len(models)), plan.batch_sizes)
    tasks = {(place, size): _Task(models[place], size, plan.config) for place, size in sizes}
    timed: dict[Variant, _Ours | _Peer] = {}
    facts: dict[Variant, dict[str, Any]] = {}
    for variant in variants:
        task = tasks[variant.model, variant.batch_size]
        timed[variant] = task.ready(variant)
        facts[variant] = task.facts(variant, timed[variant])
        facts[variant]["peak_memory_mb"] = None if (peak := peaks.get(variant)) is None else peak / 1e6
        done()
    matmul = _Matmul(models[0].device)
    seconds: dict[Variant, list[float]] = {variant: [] for variant in variants}
    rates: list[float] = []
    for number in range(plan.rounds):
        # There and back again, so that what slowly changes, as the temperature does, falls on all alike.
        order = [None, *variants]
        for item in order if number % 2 == 0 else order[::-1]:
            if item is None:
                rates.append(matmul())
                continue
            seconds[item].append(timed[item](plan.iterations))
            done()
    for variant in variants if plan.profile else ():
        if not variant.peer:
            again = partial(tasks[variant.model, variant.batch_size].countable(variant) or timed[variant], 1)
            facts[variant]["profile"] = profile(again, models[variant.model].device, statistics.median(rates))
    machine = {**describe_machine(models[0].device), "load": load_before}
    return summarise(plan, [model.name for model in models], seconds, rates, facts, matmul.facts, machine)


def _variants(plan: Plan, models: Sequence[Model]) -> list[Variant]:
    """Ours, then the peers; a micro-batch that is no part of the batch is left out, and so many seeds at a time are as
    many as a run takes."""
    found = []
    for place, batch_size in itertools.product(range(len(models)), plan.batch_sizes):
        for seeds, stepping, micro in itertools.product(plan.seeds, plan.stepping, plan.micro_batches):
            if micro < batch_size:
                mode = resolve_mode(stepping, models[place].device)
                for parallel in plan.parallel_seeds:
                    variant = Variant(place, batch_size, seeds, mode, micro, parallel)
                    taken = parallel_seeds(models[place], batch_size, variant.applied(plan.config))
                    found.append(dataclasses.replace(variant, parallel_seeds=taken))
        found += [Variant(place, batch_size, 1, peer) for peer in plan.peers]
    if not found:
        raise GradinvError("No micro-batch is smaller than a batch, so there is nothing to measure; add 0.")
    return list(dict.fromkeys(found))


# --- what runs


class _Task:
    """A network and the gradient of some pictures: what all variants of a batch size share."""

    def __init__(self, model: Model, batch_size: int, config: AttackConfig) -> None:
        pixels, self.labels = pictures(model, batch_size)
        self.model = model
        self.config = config
        self.observation = observe(model, pixels, self.labels, share_bn=True)
        # Once for all variants, since large batches take seconds to solve.
        self._recovered = recover(model, self.observation, config)
        self._objectives: dict[tuple[bool, int], Objective] = {}

    def settled(self, config: AttackConfig) -> AttackConfig:
        """What runs of a config on this task."""
        return settled(self.model, self._recovered, config)

    def objective(self, config: AttackConfig) -> Objective:
        """Made once for all variants that are judged alike."""
        key = config.seeds > 1, config.micro_batch
        if key not in self._objectives:
            own = self.settled(config)
            self._objectives[key] = Objective(self.model, self.observation, self._recovered, own)
        return self._objectives[key]

    def ready(self, variant: Variant) -> _Ours | _Peer:
        """The variant, warmed up."""
        if variant.peer:
            return _Peer(self, variant.stepping)
        ours = _Ours(self, variant.applied(self.config))
        ours(WARM_UP)
        return ours

    def facts(self, variant: Variant, ours: _Ours | _Peer) -> dict[str, Any]:
        """What is known of ours without timing it: floating-point operations an iteration, of its own and as the whole
        batch takes eagerly; whether it had to fall back to autograd; the memory that was estimated."""
        if isinstance(ours, _Peer):
            return {}
        own = self.countable(variant) or ours
        eager = dataclasses.replace(variant, stepping="eager", micro_batch=0).applied(self.config)
        images = self.model.preprocessing.normalise(torch.full_like(self._images(), 0.5))
        return {
            "flops": operations(lambda: own(1)),
            "flops_eager": variant.seeds * operations(lambda: evaluate(self.objective(eager), images, images)),
            "fell_back": ours.mode != variant.stepping,
            "estimated_memory_mb": estimate_memory(self.model, variant.batch_size, variant.applied(self.config)) / 1e6,
        }

    def countable(self, variant: Variant) -> _Ours | _Peer | None:
        """What the operations of a variant are counted in, where they cannot be seen in itself: in place of a CUDA
        graph the recording that it was captured from, in place of several threads one."""
        seen = dataclasses.replace(variant, parallel_seeds=1)
        if variant.stepping == "graph":
            seen = dataclasses.replace(seen, stepping="traced")
        return None if seen == variant else self.ready(seen)

    def _images(self) -> Tensor:
        size = self.model.preprocessing.size
        return torch.empty(self.observation.batch_size, 3, size, size, device=self.model.device)


def pictures(model: Model, batch_size: int) -> tuple[Tensor, Tensor]:
    """Pixels (B, 3, S, S) of the bundled gallery and labels (B,), all different where the model has so many classes.

    After the last picture the same ones follow mirrored and upside down, labelled as the next free class: what an
    iteration costs does not depend on what is in the pictures. Raises GradinvError for more than that makes.
    """
    gallery = sources.gallery(model) or sources.gallery()  # a user's network may know none of the classes
    if not 1 <= batch_size <= 4 * len(gallery):
        raise GradinvError(f"Batches of 1 to {4 * len(gallery)} pictures can be measured, not of {batch_size}.")
    chosen = gallery[:batch_size]
    upright = torch.stack([to_pixels(picture.open(), model.preprocessing) for picture in chosen])
    pixels = torch.cat([upright, *(upright.flip(sides) for sides in ((3,), (2,), (2, 3)))])[:batch_size]
    labels: list[int] = []
    for picture in itertools.islice(itertools.cycle(chosen), batch_size):
        label = model.class_index(picture.wnid or "") or 0
        free = ((label + step) % len(model.classes) for step in range(len(model.classes)))
        labels.append(next((other for other in free if other not in labels), label))
    return pixels, torch.tensor(labels)


class _Ours:
    """Our attack, continued by some iterations at a time: → seconds an iteration of all its seeds."""

    def __init__(self, task: _Task, config: AttackConfig) -> None:
        objective, own = task.objective(config), task.settled(config)
        self._run = Run(task.model, task.observation.batch_size, own, separable=objective.separable)
        self._stepper = Stepper(objective, config.stepping, parallel=config.parallel_seeds)
        self._device = task.model.device
        self._steps = itertools.count()

    @property
    def mode(self) -> str:
        """How it is executed; `eager` where it fell back to that."""
        return self._stepper.mode

    def __call__(self, iterations: int) -> float:
        stop = threading.Event()
        started = _now(self._device)
        for step in itertools.islice(self._steps, iterations):
            self._run.step(step, self._stepper, stop)
        return (_now(self._device) - started) / iterations


class _Peer:
    """A peer's attack, begun anew each time: → seconds an iteration, the median of its second half."""

    def __init__(self, task: _Task, name: str) -> None:
        self._task, self._name = task, name

    def __call__(self, iterations: int) -> float:
        task = self._task
        found = breaching_attack(self._name, task.model, task.observation, task.labels, 2 * iterations + 1)
        assert found.seconds_per_iteration is not None  # three iterations at the least
        return found.seconds_per_iteration


class _Matmul:
    """The product of two square float32 matrices: → floating-point operations a second.

    On a GPU in the precision that its convolutions are allowed, TF32 unless somebody forbade it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._size, self._repeats = MATMUL.get(device.type, MATMUL["cpu"])
        tf32 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        self.precision = "tf32" if tf32 and torch.backends.cudnn.allow_tf32 else "float32"
        self._factor = torch.rand(self._size, self._size, device=device)
        self()

    def __call__(self) -> float:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if self.precision == "tf32" else "highest")
        try:
            started = _now(self._device)
            for _ in range(self._repeats):
                self._factor @ self._factor
            return self._repeats * 2 * self._size**3 / (_now(self._device) - started)
        finally:
            torch.set_float32_matmul_precision(before)

    @property
    def facts(self) -> dict[str, Any]:
        return {"size": self._size, "precision": self.precision}


def _now(device: torch.device) -> float:
    """The time at which all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class _Counter(TorchDispatchMode):
    """Counts as torch's FlopCounterMode does, whose hooks on modules a second derivative does not survive, and times
    each operation."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self.tallies: dict[str, Tally] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        started = _now(self._device)
        result = func(*args, **(kwargs or {}))
        seconds = _now(self._device) - started
        packet, flops = func._overloadpacket, 0
        if packet in flop_registry:
            flops = flop_registry[packet](*args, **(kwargs or {}), out_val=result)
        name = str(packet)
        if packet is torch.ops.aten.convolution_backward:
            wanted = [of for of, wanted in zip(("input", "weight"), args[-1], strict=False) if wanted]
            name += f" ({' and '.join(wanted)})"
        self.tallies.setdefault(name, Tally()).add(seconds, flops)
        return result


@dataclass
class Tally:
    """What one kind of operation took in all: how many calls, seconds and floating-point operations."""

    calls: int = 0
    seconds: float = 0.0
    flops: int = 0

    def add(self, seconds: float, flops: int) -> None:
        """One more call."""
        self.calls += 1
        self.seconds += seconds
        self.flops += flops


def operations(run: Callable[[], Any]) -> int:
    """Floating-point operations in convolutions and matrix products; a multiplication with its addition counts two."""
    with _Counter(torch.device("cpu")) as counter:
        run()
    return sum(tally.flops for tally in counter.tallies.values())


def profile(run: Callable[[], Any], device: torch.device, rate: float) -> list[dict[str, Any]]:
    """What an iteration spends its time on, by kind of operation and longest first: `operation`, `calls`, `seconds`,
    `flops`, and the `share` that these reach of a matrix product's `rate`, None where nothing is counted.

    An operation's time is from its start to its end; what Python does between them is not in it.
    """
    with _Counter(device) as counter:
        run()
    found = sorted(counter.tallies.items(), key=lambda item: -item[1].seconds)
    return [
        {"operation": name, **dataclasses.asdict(tally), "share": tally.flops / tally.seconds / rate or None}
        for name, tally in found
    ]


# --- memory


def _in_own_process(load: Load, config: AttackConfig, variant: Variant) -> int | None:
    # spawn: a forked child of a process whose torch has started threads may hang.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(peak_memory, load, config, variant, torch.get_num_threads()).result()
        except BrokenProcessPool as error:
            raise GradinvError(
                f"The process that measured the memory of {variant.batch_size} images has ended, perhaps for want of "
                "memory; take smaller batches."
            ) from error


def peak_memory(load: Load, config: AttackConfig, variant: Variant, threads: int) -> int | None:
    """How many bytes a variant adds to the loaded network and its observation at the most, in a process of its own.

    On a GPU what torch reserves there, which a CUDA graph's own memory is part of, else the resident memory; None where
    the system does not tell its peak.
    """
    torch.set_num_threads(threads)
    task = _Task(load(), variant.batch_size, config)
    device = task.model.device
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(device) if gpu else psutil.Process().memory_info().rss
    run = _Peer(task, variant.stepping) if variant.peer else _Ours(task, variant.applied(config))
    if gpu:
        torch.cuda.reset_peak_memory_stats(device)
    elif not _reset_resident_peak():
        return None
    run(WARM_UP + 1)
    return (torch.cuda.max_memory_reserved(device) if gpu else _resident_peak()) - before


def _reset_resident_peak() -> bool:
    """Linux forgets the peak when it is told to; a child's `ru_maxrss` would begin at its parent's."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _resident_peak() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


# --- the result


def spread(values: Sequence[float]) -> dict[str, float]:
    """The median of some values, the lowest and the highest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def summarise(
    plan: Plan,
    names: Sequence[str],
    seconds: Mapping[Variant, Sequence[float]],
    rates: Sequence[float],
    facts: Mapping[Variant, Mapping[str, Any]],
    matmul: Mapping[str, Any],
    machine: Mapping[str, Any],
) -> dict[str, Any]:
    """What was measured as JSON has it: `machine`, `matmul`, `rows` and `fits`.

    `seconds` are, by variant, each round's seconds an iteration of all its seeds, `rates` each round's rate of the
    matrix product. A row has its spreads (median, low, high): `seconds`; `flops_per_second` of its own operations and
    `share` of the product's rate; and under `ratios`, by the name of what it is compared with, how many times as fast
    it is for one seed. A peer's rate is not counted.
    """
    rows = []
    for variant, taken in seconds.items():
        row = {
            "model": names[variant.model],
            **{name: getattr(variant, name) for name in _SETTINGS},
            "seconds": {**spread(taken), "rounds": list(taken)},
            **facts[variant],
        }
        if flops := row.get("flops"):
            row["flops_per_second"] = spread([flops / one for one in taken])
            row["share"] = spread([flops / one / rate for one, rate in zip(taken, rates, strict=True)])
        row["ratios"] = {
            name: spread(
                [
                    (theirs / other.seeds) / (one / variant.seeds)
                    for theirs, one in zip(seconds[other], taken, strict=True)
                ]
            )
            for name, other in _compared(variant, seconds)
        }
        rows.append(row)
    return {
        "format": FORMAT,
        "command": "benchmark",
        "config": plan.config.to_dict(),
        "rounds": plan.rounds,
        "iterations": plan.iterations,
        "machine": dict(machine),
        "matmul": {**matmul, "flops_per_second": {**spread(rates), "rounds": list(rates)}},
        "rows": rows,
        "fits": _fits(rows),
    }


def _compared(variant: Variant, measured: Iterable[Variant]) -> Iterator[tuple[str, Variant]]:
    """By name what a variant is set against: peers on the same pictures, autograd, and itself one seed at a time."""
    alone = dataclasses.replace(variant, parallel_seeds=1)
    eager = dataclasses.replace(alone, stepping="eager", micro_batch=0)
    for other in measured if not variant.peer else ():
        if other.peer and (other.model, other.batch_size) == (variant.model, variant.batch_size):
            yield other.stepping, other
        elif other != variant and other in (eager, alone):
            yield "eager" if other == eager else "one seed at a time", other


def _fits(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each series of three or more batch sizes, seconds = a + b·K."""
    series: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    names = ("model", *_SETTINGS[1:])
    for row in rows:
        series.setdefault(tuple(row[name] for name in names), []).append(row)
    fits = []
    for key, members in series.items():
        if len(members) >= 3:
            found = line([row["batch_size"] for row in members], [row["seconds"]["median"] for row in members])
            fits.append({**dict(zip(names, key, strict=True)), **found})
    return fits


def line(sizes: Sequence[int], seconds: Sequence[float]) -> dict[str, float]:
    """seconds = a + b·K by least squares of the relative deviations, and the largest of these."""
    times = np.array(seconds)
    columns = np.stack([np.ones(len(sizes)), np.array(sizes, float)], 1) / times[:, None]
    (a, b), *_ = np.linalg.lstsq(columns, np.ones(len(sizes)), rcond=None)
    return {"a": float(a), "b": float(b), "largest_deviation": float(np.abs(columns @ [a, b] - 1).max())}


def as_csv(result: Mapping[str, Any]) -> str:
    """The rows as a table for other programs, with medians, lows and highs in columns of their own."""
    flat = [dict(_flat(row)) for row in result["rows"]]
    names = list(dict.fromkeys(name for row in flat for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def _flat(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}_")
        elif name not in ("rounds", "profile"):
            yield f"{prefix}{name}", value


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What the figures depend on; nothing in it says whose machine it is."""
    return {
        "cpu": _cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": psutil.cpu_count(logical=False),
        "logical_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "gradinv": __version__,
        "system": f"{platform.system()} {platform.machine()}",
    }


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for entry in Path("/proc/cpuinfo").read_text().splitlines():
            if entry.startswith("model name"):
                return entry.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


# --- networks without weights


def random_weights(name: str, folder: Path) -> Path:
    """Write a weights file for `load_model`: a named network's architecture with random weights, always the same ones.

    Its running statistics are those of noise, so that nothing grows or fades from layer to layer. Raises GradinvError
    for an unknown name.
    """
    info = MODELS.get(name)
    if info is None:
        raise GradinvError(f"Random weights are made for a named network only: {', '.join(MODELS)}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = torchvision.models.get_model_builder(info.arch)(weights=None, num_classes=info.classes).train()
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1.0
        with torch.no_grad():
            network(torch.randn(4, 3, info.size, info.size))
    path = folder / f"{name}-random.safetensors"
    metadata = {"arch": info.arch, "image_size": str(info.size)}
    safetensors.torch.save_file(network.state_dict(), path, metadata=metadata)
    return path
