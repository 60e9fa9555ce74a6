"""What is said before a run. The checks of observations are tested with the attack, in test_inversion."""

from __future__ import annotations

import copy
import dataclasses
import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from gradinv.attack import memory
from gradinv.attack.memory import check_memory, estimate_memory, free_memory, outputs_per_image, parallel_seeds
from gradinv.batchnorm import batch_statistics
from gradinv.config import AttackConfig
from gradinv.models import Model
from gradinv.types import GradinvError

CONFIG = AttackConfig(seeds=1)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets how many bytes the machine has free."""

    def set_free(count: int) -> None:
        monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=count, total=2**40))

    return set_free


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets how many threads torch says it has."""
    return lambda count: monkeypatch.setattr(torch, "get_num_threads", lambda: count)


def test_outputs_by_hand(small_model: Model) -> None:
    # 8 maps of 8 × 8 and 16 of 4 × 4.
    assert outputs_per_image(small_model) == 8 * 64 + 16 * 16
    assert outputs_per_image(small_model) == 8 * 64 + 16 * 16, "also the second time"


def test_counting_neither_runs_nor_changes_the_network(small_model: Model) -> None:
    state = {name: value.clone() for name, value in small_model.network.state_dict().items()}
    small_model.network.train()
    with batch_statistics(small_model.network) as (means, _):
        outputs_per_image(small_model)
        assert means == {}
    assert small_model.network.training and small_model.device.type == "cpu"
    assert all(torch.equal(value, state[name]) for name, value in small_model.network.state_dict().items())
    convolutions = [module for module in small_model.network.modules() if isinstance(module, nn.Conv2d)]
    assert not any(module._forward_hooks for module in convolutions)


def test_what_was_counted_keeps_no_model_alive(small_model: Model) -> None:
    model = Model("copy", small_model.network, "0" * 64, small_model.preprocessing, small_model.classes, None)
    outputs_per_image(model)
    known = weakref.ref(model)
    del model
    gc.collect()
    assert known() is None


def test_the_estimate_grows_with_what_is_held(small_model: Model) -> None:
    def estimate(batch_size: int = 4, **changes: Any) -> int:
        return estimate_memory(small_model, batch_size, AttackConfig(**{"seeds": 1, "parallel_seeds": 1, **changes}))

    image = 8 * 4 * 3 * 64
    one = 4 * memory._PER_OUTPUT * outputs_per_image(small_model)
    assert estimate(seeds=3) - estimate() == 2 * 4 * image
    assert estimate(5) - estimate() == image + one
    # The images themselves stay, what the network makes of them goes.
    assert estimate(4, micro_batch=1) == estimate() - 3 * one
    assert estimate(4, micro_batch=9) == estimate()
    # Unmatched weights are not held once more.
    rest = small_model.network.fc.weight.numel() + small_model.network.fc.bias.numel() + 2 * 16
    assert estimate() - estimate(layers="layer4") == 4 * memory._PER_MATCHED * rest
    assert estimate(gradient=0.0, layers="layer3") < estimate(layers="layer4")


def test_a_micro_batch_that_would_fit_is_named(small_model: Model, free: Any) -> None:
    free(estimate_memory(small_model, 8, AttackConfig(seeds=1, micro_batch=3)) + 1)
    check_memory(small_model, 8, AttackConfig(seeds=1, micro_batch=3))
    for config in (CONFIG, AttackConfig(seeds=1, micro_batch=5)):
        with pytest.raises(GradinvError, match=r"set micro_batch to 3, or take fewer seeds or a smaller batch\.$"):
            check_memory(small_model, 8, config)


@pytest.mark.parametrize("config", [CONFIG, AttackConfig(seeds=1, micro_batch=1)], ids=["whole", "single"])
def test_where_none_fits_none_is_named(small_model: Model, free: Any, config: AttackConfig) -> None:
    free(1000)
    with pytest.raises(GradinvError, match=r"GiB are free; take fewer seeds or a smaller batch\.$"):
        check_memory(small_model, 8, config)


def test_no_micro_batch_is_named_for_a_client_in_train_mode(small_model: Model, free: Any) -> None:
    config = AttackConfig(seeds=1, bn="inferred")
    free(estimate_memory(small_model, 8, config) - 1)
    with pytest.raises(GradinvError, match=r"GiB are free; take fewer seeds"):
        check_memory(small_model, 8, config)


# --- a GPU, of which nothing is needed here


def test_a_graph_is_estimated_with_the_autograd_that_it_is_compared_with(
    small_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager = estimate_memory(small_model, 4, AttackConfig(stepping="eager"))
    monkeypatch.setattr(memory, "resolve_mode", lambda *_: "graph")
    images = 8 * 8 * 4 * 4 * 3 * 64  # eight seeds, whose images are there once
    assert estimate_memory(small_model, 4, AttackConfig()) - images == 2 * (eager - images)


def test_what_torch_holds_of_earlier_runs_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 700)
    assert free_memory(torch.device("cuda")) == 3300


def test_seeds_take_turns_on_a_gpu(small_model: Model, threads: Any) -> None:
    threads(4)
    elsewhere = dataclasses.replace(small_model, network=copy.deepcopy(small_model.network).to("meta"))
    config = AttackConfig(stepping="traced")
    assert parallel_seeds(small_model, 4, config) == 4 and parallel_seeds(elsewhere, 4, config) == 1


# --- several seeds at a time


def test_as_many_seeds_at_a_time_as_there_are_threads(small_model: Model, threads: Any) -> None:
    def chosen(**changes: Any) -> int:
        return parallel_seeds(small_model, 4, AttackConfig(**changes))

    threads(3)
    assert [chosen(seeds=seeds) for seeds in (1, 2, 3, 8)] == [1, 2, 3, 3]
    assert [chosen(parallel_seeds=asked) for asked in (1, 2, 3, 9)] == [1, 2, 3, 3]
    # Where autograd runs, its hooks on the one network allow no second evaluation.
    assert chosen(stepping="eager") == chosen(iterations=2) == 1
    threads(1)
    assert chosen(parallel_seeds=4) == 1


def test_seeds_at_a_time_take_a_quarter_of_the_memory_at_the_most(
    small_model: Model, threads: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads(4)
    three = estimate_memory(small_model, 4, AttackConfig(parallel_seeds=3))
    for total, chosen in ((16 * three, 4), (4 * three, 3), (4 * three - 4, 2), (4, 1)):
        # Whatever is free, so that the same run gives the same pictures.
        monkeypatch.setattr(memory.psutil, "virtual_memory", lambda total=total: SimpleNamespace(total=total))
        assert parallel_seeds(small_model, 4, AttackConfig()) == chosen
        assert parallel_seeds(small_model, 4, AttackConfig(parallel_seeds=4)) == 4, "what is asked for"


def test_each_seed_at_a_time_takes_an_evaluations_memory(small_model: Model, threads: Any) -> None:
    threads(4)
    one, two, four = (estimate_memory(small_model, 4, AttackConfig(parallel_seeds=count)) for count in (1, 2, 4))
    assert four - one == 3 * (two - one) > 3 * 4 * memory._PER_OUTPUT * 4 * outputs_per_image(small_model)
    assert estimate_memory(small_model, 4, AttackConfig()) == four


def test_fewer_seeds_at_a_time_that_would_fit_are_named_first(small_model: Model, threads: Any, free: Any) -> None:
    threads(4)
    free(estimate_memory(small_model, 8, AttackConfig(parallel_seeds=2)))
    with pytest.raises(GradinvError, match=r"are free; set parallel_seeds to 2, or take fewer seeds"):
        check_memory(small_model, 8, AttackConfig())
    check_memory(small_model, 8, AttackConfig(parallel_seeds=2))
    free(estimate_memory(small_model, 8, AttackConfig(parallel_seeds=1, micro_batch=3)))
    with pytest.raises(GradinvError, match=r"are free; set micro_batch to 3 and parallel_seeds to 1, or take"):
        check_memory(small_model, 8, AttackConfig())
    check_memory(small_model, 8, AttackConfig(parallel_seeds=1, micro_batch=3))
