"""The adapter to other people's attacks. Parity with the real package is tested where it is installed."""

from __future__ import annotations

import importlib.util
import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradinv import breaching
from gradinv.client import observe
from gradinv.models import Model
from gradinv.types import GradinvError, Observation

installed = pytest.mark.skipif(
    importlib.util.find_spec("breaching") is None, reason="needs the package breaching (pip install 'gradinv[compare]')"
)


class Objective(nn.Module):
    """What the adapter watches: asked once an iteration."""

    def forward(self) -> None:
        pass


class Attacker:
    """Looks like breaching's: takes payloads and shared data, answers normalised images."""

    def __init__(self, network: nn.Module, loss: nn.Module, config: Any, setup: dict[str, Any]) -> None:
        self.objective = Objective()
        self.iterations = config.iterations
        self.network = network

    def reconstruct(self, payloads: list[Any], shared: list[Any], secrets: dict[str, Any]) -> tuple[Any, Any]:
        (payload,), (data,) = payloads, shared
        SEEN.update(payload=payload, data=data, network=self.network)
        print("a report that nobody asked for")
        for _ in range(self.iterations):
            self.objective()
        shape = (data["metadata"]["num_data_points"], *payload["metadata"].shape)
        return {"data": torch.randn(shape)}, {}


SEEN: dict[str, Any] = {}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package in the place of breaching that notes what it is given."""

    def config(name: str, changes: list[str]) -> SimpleNamespace:
        SEEN.update(name=name, changes=changes)
        return SimpleNamespace(iterations=int(changes[0].removeprefix("optim.max_iterations=")))

    SEEN.clear()
    package = SimpleNamespace(get_attack_config=config, attacks=SimpleNamespace(prepare_attack=Attacker))
    monkeypatch.setitem(sys.modules, "breaching", package)


def test_where_the_package_is_missing_one_sentence_says_how(
    small_model: Model, observation: Observation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "breaching", None)
    said = r"^The comparison needs the package breaching \(.*\); install it with: pip i"
    with pytest.raises(GradinvError, match=said):
        breaching.breaching_attack("invertinggradients", small_model, observation, torch.tensor([4, 1, 2]), 1)


@pytest.mark.usefixtures("fake")
def test_the_peer_is_given_what_ours_has_and_no_more(
    small_model: Model, small_batch: tuple[Tensor, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    pixels, labels = small_batch
    observation = observe(small_model, pixels, labels)
    state = torch.get_rng_state()
    result = breaching.breaching_attack("seethroughgradients", small_model, observation, labels, 5, seed=3)
    assert torch.equal(torch.get_rng_state(), state) and capsys.readouterr().out == ""
    assert SEEN["name"] == "seethroughgradients" and "optim.max_iterations=5" in SEEN["changes"]
    assert "restarts.num_trials=1" in SEEN["changes"]
    payload, data = SEEN["payload"], SEEN["data"]
    names = [name for name, _ in small_model.network.named_parameters()]
    for name, weight, gradient in zip(names, payload["parameters"], data["gradients"], strict=True):
        assert torch.equal(weight, small_model.network.get_parameter(name))
        assert torch.equal(gradient, observation.gradients[name])
    assert all(a is b for a, b in zip(payload["buffers"], small_model.network.buffers(), strict=True))
    assert SEEN["network"] is small_model.network and data["buffers"] is None
    assert torch.equal(data["metadata"]["labels"], labels) and data["metadata"]["num_data_points"] == 3
    assert payload["metadata"].mean == small_model.preprocessing.mean
    # Its answer is normalised; the same seed gives the same.
    expected = small_model.preprocessing.denormalise(
        torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    )
    assert torch.equal(result.pixels, expected)
    assert result.seconds_per_iteration is not None and 0 <= result.seconds_per_iteration <= result.seconds


@pytest.mark.usefixtures("fake")
def test_it_stops_within_one_iteration_and_a_single_one_has_no_time_of_its_own(
    small_model: Model, observation: Observation, small_batch: tuple[Tensor, Tensor]
) -> None:
    stop, labels = threading.Event(), small_batch[1]
    result = breaching.breaching_attack("invertinggradients", small_model, observation, labels, 1, stop=stop)
    assert result.seconds_per_iteration is None and result.seconds > 0
    stop.set()
    with pytest.raises(breaching.Stopped):
        breaching.breaching_attack("invertinggradients", small_model, observation, labels, 10**9, stop=stop)


@installed
@pytest.mark.parametrize("name", breaching.BREACHING)
def test_the_real_attacks_run_and_come_closer(
    name: str, small_model: Model, small_batch: tuple[Tensor, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    pixels, labels = small_batch
    observation = observe(small_model, pixels, labels)
    before = {key: value.clone() for key, value in small_model.network.state_dict().items()}

    def distance(images: Tensor) -> float:
        found = observe(small_model, images, labels).gradients
        ours, theirs = (torch.cat([g[key].flatten() for key in found]) for g in (found, observation.gradients))
        return 1 - float(torch.cosine_similarity(ours, theirs, dim=0))

    first = breaching.breaching_attack(name, small_model, observation, labels, 1, seed=1)
    last = breaching.breaching_attack(name, small_model, observation, labels, 150, seed=1)
    again = breaching.breaching_attack(name, small_model, observation, labels, 150, seed=1)
    assert last.pixels.shape == (3, 3, 8, 8) and last.pixels.min() >= 0 and last.pixels.max() <= 1
    assert torch.equal(last.pixels, again.pixels)
    assert last.seconds_per_iteration is not None and last.seconds_per_iteration > 0
    assert capsys.readouterr().out == ""
    # The client's network is not changed, and gradients are matched (by the second one's weights, BN comes first).
    assert all(torch.equal(value, before[key]) for key, value in small_model.network.state_dict().items())
    if name == "invertinggradients":
        assert distance(last.pixels) < 0.5 * distance(first.pixels)
    else:
        assert not torch.equal(last.pixels, first.pixels)
