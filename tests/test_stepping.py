from __future__ import annotations

import copy
import dataclasses
import gc
import itertools
import logging
import math
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import objective_for, solved
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import tree_map_only

from gradinv.attack.objective import Objective
from gradinv.client import observe
from gradinv.config import AttackConfig
from gradinv.execution import stepping, tape
from gradinv.execution.stepping import LossTerms, PixelGradient, Stepper, evaluate, resolve_mode
from gradinv.types import GradinvError

# Every term, so that none is left out by its weight.
ALL_TERMS = {"features": 0.5, "bn": "exact", "bn_weight": 0.02, "tv": 0.2, "l2": 0.1, "group": 0.1, "gradient": 1.0}


def objective_of(model: Any, batch: tuple[Tensor, Tensor], mode: str = "eval", **changes: Any) -> Objective:
    observation = observe(model, *batch, share_bn=True, mode=mode)
    return objective_for(model, observation, batch[1], AttackConfig(**{**ALL_TERMS, **changes}))


def pictures(seed: int, batch: int = 3, size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images, group = torch.randn(2, batch, 3, size, size, generator=generator)
    return images, group


def assert_same(found: PixelGradient, expected: PixelGradient) -> None:
    assert torch.equal(found.gradient, expected.gradient) and torch.equal(found.parts, expected.parts)
    assert list(found.raw) == list(expected.raw)
    assert all(torch.equal(found.raw[name], raw) for name, raw in expected.raw.items())
    assert torch.equal(found.distance.nan_to_num(-1), expected.distance.nan_to_num(-1))


@pytest.mark.parametrize(
    ("mode", "changes"),
    [
        ("eval", {"match": "l2"}),
        ("train", {"match": "cosine"}),
        ("eval", {"match": "layer-cosine"}),
        ("eval", {"match": "cosine", "layers": "layer4", "boundary": "logits", "bn_form": "relative"}),
        ("train", {"bn": "approx", "tv_form": "rgb"}),
        ("eval", {"bn": "none", "tv_form": "luma-chroma"}),
        ("eval", {"gradient": 0.0}),
        ("train", {"gradient": 1.0, "features": 0.0, "bn": "none", "tv": 0.0, "l2": 0.0, "group": 0.0}),
        ("train", {"bn": "inferred"}),
        ("eval", {"micro_batch": 2}),
        ("eval", {"micro_batch": 2, "match": "l2", "bn": "none", "features": 0.0}),
    ],
    ids=str,
)
def test_traced_is_autograd_to_the_last_bit(small_model, small_batch, caplog, mode, changes):
    objective = objective_of(small_model, small_batch, mode, **changes)
    stepper = Stepper(objective, "traced")
    for seed in range(5):
        images, group = pictures(seed)
        kept = images.clone(), group.clone()
        assert_same(stepper(images, group), evaluate(objective, images, group))
        assert torch.equal(images, kept[0]) and torch.equal(group, kept[1])
    assert stepper.mode == "traced" and stepper._program is not None and not caplog.records


def test_the_recording_runs_less_than_autograd_does_and_holds_no_more(small_model, small_batch):
    objective = objective_of(small_model, small_batch)
    stepper = Stepper(objective, "traced")
    for seed in range(2):
        stepper(*pictures(seed))
    with Watch() as eager:
        evaluate(objective, *pictures(2))
    with Watch() as traced:
        stepper(*pictures(2))
    assert sum(traced.operations.values()) < 0.8 * sum(eager.operations.values())
    assert traced.peak <= eager.peak


class Watch(TorchDispatchMode):
    """Counts the operations and the bytes that are alive at a time of what they made."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: dict[str, int] = {}
        self.alive = self.peak = 0
        self._storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = (tensor for tensor in tape.leaves((args, kwargs), Tensor) if tensor.layout is torch.strided)
        given = {tensor.untyped_storage()._cdata for tensor in plain}
        result = func(*args, **(kwargs or {}))
        self.operations[str(func)] = self.operations.get(str(func), 0) + 1
        for tensor in tape.leaves(result, Tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in given | self._storages:
                self._storages.add(storage._cdata)
                self.alive += storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.alive)
        return result

    def _gone(self, address: int, size: int) -> None:
        self._storages.discard(address)
        self.alive -= size


@pytest.mark.parametrize("mode", ["eager", "traced"])
def test_micro_batches_hold_less_at_a_time(small_model, mode):
    """Also where the recording could save a forward pass by keeping what all of them computed."""
    batch = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 6
    peaks = {}
    for size in (0, 4, 1):
        objective = objective_of(small_model, batch, features=0.0, micro_batch=size)
        stepper = Stepper(objective, mode)
        for seed in range(2):
            stepper(*pictures(seed, 16))
        with Watch() as watch:
            stepper(*pictures(2, 16))
        peaks[size] = watch.peak
    assert peaks[4] < 0.5 * peaks[0] and peaks[1] < peaks[4]


def test_weights_and_targets_are_not_copied(small_model, small_batch, monkeypatch):
    monkeypatch.setattr(tape, "_LARGEST_CONSTANT", 0)
    objective = objective_of(small_model, small_batch)
    stepper = Stepper(objective, "traced")
    stepper(*pictures(0))
    held = [thing for thing in stepper._program.__globals__.values() if isinstance(thing, Tensor)]
    addresses = {tensor.data_ptr() for tensor in held}
    weights = [parameter for parameter in small_model.network.parameters() if parameter.ndim == 4]
    known = [*small_model.network.parameters(), *small_model.network.buffers(), *objective._target.values()]
    assert {weight.data_ptr() for weight in weights} <= addresses
    assert {objective._target[name].data_ptr() for name in ("conv1.weight", "layer4.weight")} <= addresses
    others = [tensor for tensor in held if tensor.data_ptr() not in {t.data_ptr() for t in known}]
    # What is left are the labels and the recovered features and errors.
    assert max(tensor.numel() for tensor in others) <= 3 * 16


def test_nothing_outlives_the_stepper(small_model, small_batch):
    stepper = Stepper(objective_of(small_model, small_batch), "traced")
    for seed in range(3):
        stepper(*pictures(seed))
    program = weakref.ref(stepper._program)
    gc.disable()  # No cycle either, which would keep the targets until a collection.
    try:
        del stepper
        assert program() is None
    finally:
        gc.enable()
    assert _get_current_dispatch_mode() is None


def test_steppers_in_several_threads(small_model, small_batch):
    """Each with a network of its own; what one thread does is not in another's recording."""

    def work(seed: int) -> list[tuple[PixelGradient, PixelGradient]]:
        objective = objective_of(copy.deepcopy(small_model), small_batch)
        stepper = Stepper(objective, "traced")
        results = []
        for step in range(4):
            images, group = pictures(10 * seed + step)
            results.append((stepper(images, group), evaluate(objective, images, group)))
            assert stepper.mode == "traced" and _get_current_dispatch_mode() is None
        return results

    with ThreadPoolExecutor(4) as pool:
        for results in pool.map(work, range(4)):
            for found, expected in results:
                assert_same(found, expected)


def test_one_stepper_may_move_between_threads(small_model, small_batch):
    objective = objective_of(small_model, small_batch)
    stepper = Stepper(objective, "traced")
    for seed in range(4):
        found: list[PixelGradient] = []
        thread = threading.Thread(target=lambda seed=seed, found=found: found.append(stepper(*pictures(seed))))
        thread.start()
        thread.join()
        assert_same(found[0], evaluate(objective, *pictures(seed)))
    assert stepper.mode == "traced"


# --- several seeds at a time


@pytest.fixture
def threads():
    """Sets how many threads torch takes here, until the test is over."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def seeds_and_group(count: int = 3) -> tuple[Tensor, Tensor]:
    return torch.stack([pictures(seed)[0] for seed in range(count)]), pictures(0)[1]


@pytest.mark.parametrize("mode", ["eager", "traced"])
def test_side_by_side_is_one_after_the_other(small_model, small_batch, threads, mode):
    """With a thread each to the last bit; no worker is started where autograd runs."""
    threads(1)
    objective = objective_of(small_model, small_batch)
    stepper, alone = Stepper(objective, mode, parallel=2), Stepper(objective, mode)
    seeds, group = seeds_and_group()
    for scale in (1.0, 0.5):
        found = stepper.each(scale * seeds, group, threading.Event())
        assert len(found) == 3
        for images, result in zip(scale * seeds, found, strict=True):
            assert_same(result, alone(images, group))
    assert stepper.mode == mode and (stepper._workers is None) == (mode == "eager")


def test_side_by_side_is_at_the_same_time_with_a_share_of_the_threads(small_model, small_batch, threads):
    threads(4)
    stepper = Stepper(objective_of(small_model, small_batch), "traced", parallel=2)
    seeds, group = seeds_and_group(2)
    stepper.each(seeds, group, threading.Event())
    program, together, shares = stepper._program, threading.Barrier(2, timeout=60), []

    def watched(images: Tensor, group: Tensor) -> Any:
        together.wait()  # until both are here
        shares.append(torch.get_num_threads())
        return program(images, group)

    stepper._program = watched
    assert len(stepper.each(seeds, group, threading.Event())) == 2
    assert shares == [2, 2] and torch.get_num_threads() == 4
    with ThreadPoolExecutor(1) as fresh:
        assert fresh.submit(torch.get_num_threads).result() == 4


def test_a_stop_ends_seeds_side_by_side_within_one_evaluation(small_model, small_batch):
    stepper = Stepper(objective_of(small_model, small_batch), "traced", parallel=2)
    seeds, group = seeds_and_group(6)
    stop = threading.Event()
    assert len(stepper.each(seeds, group, stop)) == 6
    program, begun, ended = stepper._program, [], []

    def stopping(images: Tensor, group: Tensor) -> Any:
        begun.append(images)
        stop.set()
        try:
            return program(images, group)
        finally:
            ended.append(images)

    stepper._program = stopping
    assert len(stepper.each(seeds, group, stop)) < 6
    assert len(begun) == len(ended) < 6, "nothing goes on after it has returned"
    assert stepper.each(seeds, group, stop) == []


def test_what_fails_in_a_worker_is_raised_to_the_caller(small_model, small_batch):
    stepper = Stepper(objective_of(small_model, small_batch), "traced", parallel=2)
    seeds, group = seeds_and_group()
    stepper.each(seeds, group, threading.Event())

    def failing(images: Tensor, group: Tensor) -> Any:
        raise MemoryError("no room")

    stepper._program = failing
    with pytest.raises(MemoryError, match="no room"):
        stepper.each(seeds, group, threading.Event())


def test_workers_end_with_the_stepper(small_model, small_batch):
    before = set(threading.enumerate())
    stepper = Stepper(objective_of(small_model, small_batch), "traced", parallel=3)
    stepper.each(*seeds_and_group(), threading.Event())
    workers = set(threading.enumerate()) - before
    assert len(workers) == 3
    del stepper
    for worker in workers:
        worker.join(timeout=60)
        assert not worker.is_alive()


def judging(total: Callable[[Tensor], Tensor]) -> Any:
    """An objective that is nothing but this total of the images."""

    def objective(images: Tensor, group: Tensor) -> LossTerms:
        value = total(images)
        return LossTerms(value, {"only": value.detach()}, torch.tensor(float("nan")))

    return objective


def zeros_and_changes_in_place(images: Tensor) -> Tensor:
    zeros = torch.zeros_like(images)
    part = zeros + images
    filled = torch.zeros_like(images)
    filled.select(1, 0).add_(images[:, 1])  # a view is changed, and with it what it looks at
    part.mul_(2).add_(filled)
    rows = torch.zeros(3).view(3, 1, 1)
    spread = zeros + images[:1]  # not images[:1] itself: there are three of it
    return ((part + zeros) * (rows + 1)).square().sum() + spread.square().sum()


def views_of_what_is_gone(images: Tensor) -> Tensor:
    large = images.repeat(1, 1, 8, 8) * 3
    row = large[:, :, 0]
    return (large * 2).sum() + (row * row).sum() + (large.view(-1) ** 3).sum()


@pytest.mark.parametrize("total", [zeros_and_changes_in_place, views_of_what_is_gone])
def test_sums_with_zeros_changes_in_place_and_views_are_recorded_as_they_are(total):
    objective = judging(total)
    stepper = Stepper(objective, "traced")
    for seed in range(4):
        assert_same(stepper(*pictures(seed)), evaluate(objective, *pictures(seed)))
    assert stepper.mode == "traced"


counter = itertools.count(1)
outside = torch.zeros(3)


def frozen(images: Tensor) -> Tensor:
    return images.square().sum() * next(counter)


def branching(images: Tensor) -> Tensor:
    return images.square().sum() * (2 if images.mean() > 0 else 3)


def choosing(images: Tensor) -> Tensor:
    return images[images > 0].square().sum()


def drawing(images: Tensor) -> Tensor:
    return (images * torch.rand(8)).square().sum()


def changing(images: Tensor) -> Tensor:
    outside.add_(1)
    return images.square().sum()


@pytest.mark.parametrize(
    ("total", "reason"),
    [
        (branching, "depend on the images' values"),
        (choosing, "depend on the images' values"),
        (drawing, "draws random numbers"),
        (changing, "changes a tensor that outlives the evaluation"),
        (frozen, "deviates from autograd's by a share of"),
    ],
)
def test_what_a_recording_would_not_repeat_runs_eagerly(caplog, total, reason):
    stepper = Stepper(judging(total), "traced")
    for seed in range(3):
        images, group = pictures(seed)
        result = stepper(images, group)
        if total is branching:
            assert torch.allclose(result.gradient, 2 * images * (2 if images.mean() > 0 else 3))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and record.name == "gradinv.execution.stepping"
    message = record.getMessage()
    assert message.startswith("Every step runs eagerly, which is slower: the ") and reason in message
    assert message.count("\n") == 0 and message.endswith(".")
    assert stepper.mode == "eager"


def test_rounding_over_a_corner_of_one_comparison_is_no_deviation(small_model, small_batch, monkeypatch, caplog):
    """Where a ReLU's argument is as good as zero, the gradient jumps; that must not decide how a run is executed."""
    deviations = iter([2e-3, math.nan, 1e-7])
    monkeypatch.setattr(stepping, "_deviation", lambda *_: next(deviations))
    stepper = Stepper(objective_of(small_model, small_batch), "traced")
    stepper(*pictures(0))
    assert stepper.mode == "traced" and stepper._program is not None and not caplog.records


def test_tracked_statistics_are_not_recorded(small_model, small_batch, caplog):
    """Batch norm changes its running statistics without saying so in its schema."""
    layer = torch.nn.BatchNorm2d(3).train()
    layer.num_batches_tracked = None
    stepper = Stepper(judging(lambda images: layer(images).pow(3).sum()), "traced")
    stepper(*pictures(0))
    assert stepper.mode == "eager" and "outlives the evaluation" in caplog.text


@pytest.mark.parametrize("where", ["recorded", "run"])
def test_a_failed_recording_is_one_logged_sentence(small_model, small_batch, monkeypatch, caplog, where):
    def fail(*_: Any) -> Any:
        raise RuntimeError("no such kernel.\nSome trace")

    if where == "recorded":
        monkeypatch.setattr(tape, "_simplified", fail)
    else:
        monkeypatch.setattr(tape, "_generated", lambda *_: fail)
    objective = objective_of(small_model, small_batch)
    stepper = Stepper(objective, "traced")
    for seed in range(4):
        assert_same(stepper(*pictures(seed)), evaluate(objective, *pictures(seed)))
    start = "the evaluation cannot be" if where == "recorded" else "the recorded evaluation cannot be"
    assert caplog.messages == [f"Every step runs eagerly, which is slower: {start} {where} (no such kernel)."]


def test_an_error_of_the_objective_reaches_the_caller():
    def objective(images: Tensor, group: Tensor) -> LossTerms:
        raise GradinvError("This cannot be judged.")

    with pytest.raises(GradinvError, match=r"^This cannot be judged\.$"):
        Stepper(objective, "traced")(*pictures(0))
    assert _get_current_dispatch_mode() is None


def test_what_auto_takes():
    cpu, gpu, other = (torch.device(name) for name in ("cpu", "cuda", "mps"))
    assert [resolve_mode("auto", device) for device in (cpu, gpu, other)] == ["traced", "graph", "eager"]
    assert resolve_mode("auto", cpu, 5) == resolve_mode("auto", gpu, 5) == "eager"
    assert resolve_mode("auto", cpu, 500) == "traced"
    assert [resolve_mode(mode, cpu, 5) for mode in ("eager", "traced")] == ["eager", "traced"]


def test_auto_runs_a_short_run_eagerly_and_a_long_one_recorded(small_model, small_batch):
    objective = objective_of(small_model, small_batch)
    for steps, mode in ((3, "eager"), (300, "traced"), (None, "traced")):
        stepper = Stepper(objective, steps=steps)
        for seed in range(3):
            assert_same(stepper(*pictures(seed)), evaluate(objective, *pictures(seed)))
        assert stepper.mode == mode
        assert (stepper._program is None) == (mode == "eager")


def test_unknown_modes_and_missing_devices_are_one_sentence(small_model, small_batch):
    objective = objective_of(small_model, small_batch)
    with pytest.raises(GradinvError, match=r"^stepping takes one of auto, eager, traced, graph, not 'fast'\.$"):
        Stepper(objective, "fast")
    with pytest.raises(GradinvError, match=r"^stepping=graph needs a CUDA device; take auto, traced or eager\.$"):
        Stepper(objective, "graph")(*pictures(0))


class Capture(TorchDispatchMode):
    """Stands for a CUDA graph where there is no GPU: remembers what ran while it was open, and replays it in the same
    places. It keeps its own results, and knows of all else only where it lay."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, Any, list[Tensor]]] = []
        self.own: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = tree_map_only(Tensor, lambda t: t if id(t) in self.own else weakref.ref(t), (args, kwargs or {}))
        made = list(tape.leaves([result], Tensor))
        self.own.update(map(id, made))
        self.steps.append((func, given, made))
        return result

    def replay(self) -> None:
        for func, given, made in self.steps:
            args, kwargs = tree_map_only(weakref.ref, lambda there: there(), given)
            for place, value in zip(made, tape.leaves([func(*args, **kwargs)], Tensor), strict=True):
                if place.data_ptr() != value.data_ptr():
                    place.copy_(value)


@pytest.mark.parametrize("match", ["l2", "cosine"])
def test_a_graph_is_replayed_from_memory_that_stays(small_model, small_batch, caplog, monkeypatch, match):
    """All of it but CUDA's own part: static buffers, constants that live on, results that the next replay leaves."""
    main, side = (SimpleNamespace(wait_stream=lambda other: None) for _ in range(2))
    streams = [main]

    @contextmanager
    def on(stream: Any) -> Iterator[None]:
        streams.append(stream)
        yield
        streams.pop()

    def captured(graph: Any, stream: Any, capture_error_mode: str) -> Any:
        assert stream is streams[-1] is side, "the stream whose workspaces are there, and which is left in any case"
        return graph

    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(stepping, "_side_stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: streams[-1])
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Capture)
    monkeypatch.setattr(torch.cuda, "graph", captured)
    monkeypatch.setattr(stepping, "resolve_mode", lambda mode, *_: mode)
    objective = objective_of(small_model, small_batch, match=match)
    stepper = Stepper(objective, "graph")
    results = [(stepper(*pictures(seed)), evaluate(objective, *pictures(seed))) for seed in range(4)]
    assert stepper.mode == "graph" and not caplog.records
    for found, expected in results:
        assert_same(found, expected)


@pytest.mark.parametrize(
    "changes",
    [{"match": "cosine", "boundary": "logits"}, {"match": "l2", "micro_batch": 2}, {"bn": "approx"}],
    ids=str,
)
def test_an_evaluation_stays_on_its_device_and_waits_for_no_number(small_model, small_batch, monkeypatch, changes):
    """On a GPU either would stop the capture. Tensors of the meta device have no values and mix with no others."""
    observation = observe(small_model, *small_batch, share_bn=True)
    config = AttackConfig(**{**ALL_TERMS, "bn_form": "relative", "tv_form": "luma-chroma", **changes})
    found = solved(small_model, observation, small_batch[1], config)
    moved = {name: getattr(found, name).to("meta") for name in ("labels", "features", "output_errors")}
    model = dataclasses.replace(small_model, network=copy.deepcopy(small_model.network).to("meta"))
    objective = Objective(model, observation, dataclasses.replace(found, **moved), config)
    assert set(objective.weights) == {"features", "gradient", "bn", "tv", "l2", "group"}
    images, group = (tensor.to("meta") for tensor in pictures(0))
    recording = tape.Tape()
    stepped = evaluate(objective, images, group, recording)
    program = recording.program([stepped.gradient, stepped.parts, *stepped.raw.values(), stepped.distance])
    for result in [*program(images, group), stepped.gradient, *stepped.raw.values(), stepped.distance]:
        assert result.is_meta
    with pytest.raises(RuntimeError):  # so a mixture would have been noticed
        images + pictures(0)[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")
@pytest.mark.parametrize("match", ["l2", "cosine"])
def test_graph_agrees_with_autograd(small_model, small_batch, match):
    model = copy.copy(small_model)
    model.network.to("cuda")
    objective = objective_of(model, small_batch, match=match)
    stepper = Stepper(objective, "graph")
    results = []
    for seed in range(5):
        images, group = (tensor.to("cuda") for tensor in pictures(seed))
        results.append((stepper(images, group), evaluate(objective, images, group)))
    assert stepper.mode == "graph"
    for found, expected in results:  # compared at the end: no replay may write over an earlier result
        torch.testing.assert_close(found.gradient, expected.gradient, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(dict(found.raw), dict(expected.raw), rtol=1e-3, atol=1e-5)
