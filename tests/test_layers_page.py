"""The page Layer by layer: the count beside what is solved, what it shows, and what noise leaves."""

from __future__ import annotations

import pytest
import torch
from headless import PATIENCE
from streamlit.testing.v1 import AppTest

from gradinv.client import observe
from gradinv.config import AttackConfig
from gradinv.recovery.recover import recover
from gradinv.sources import find, gallery, pixels_of
from gradinv.web.pages import layers
from gradinv.web.pages.layers import Count
from gradinv.web.parts import shared, ways

NETWORK = "resnet18-tiny"


def two() -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels and labels."""
    network = shared.model(NETWORK)
    pictures = [find(gallery(network), name) for name in ("lion", "goldfish")]
    labels = torch.tensor([network.class_index(picture.wnid or "") for picture in pictures])
    return pixels_of(pictures, network.preprocessing), labels


@pytest.mark.parametrize("name", ["resnet18-tiny", "resnet50-tiny"])
def test_the_count_by_shapes_is_that_of_the_equations_that_are_solved(name: str) -> None:
    network = shared.model(name)
    observation = observe(network, *two())
    nodes = recover(network, observation, AttackConfig.preset("demo", name)).nodes
    assert len(nodes) > 8
    counts = {count.name: count for count in layers.counted(network, 2)}
    exact = [node for node in nodes if node.method == "exact"]
    for node in exact:
        count = counts[node.name]
        assert count.unknowns == node.unknowns, node.name
        # Where they are hardly enough, what else is known of the layer may count as well.
        ample = count.equations >= 1.5 * count.unknowns
        assert count.equations == node.equations if ample else count.equations <= node.equations, node.name
        assert count.shape == tuple(node.activation.shape[1:])
    assert [count.name for count in layers.counted(network, 2)][: len(nodes)] == [node.name for node in nodes]


def test_twice_the_pictures_are_twice_the_unknowns_and_larger_ones_have_more_places() -> None:
    network = shared.model(NETWORK)
    one, two, large = layers.counted(network, 1), layers.counted(network, 2), layers.counted(network.at(128), 1)
    assert [2 * count.unknowns for count in one] == [count.unknowns for count in two]
    assert [4 * count.unknowns for count in one] == [count.unknowns for count in large]
    # What overlaps a picture's edge counts less, so that larger ones have no fewer equations.
    assert all(a.equations <= b.equations for a, b in zip(one, two, strict=True))


def test_it_says_which_layer_is_reached_and_why_not_the_next() -> None:
    counts = [Count("high", (8, 1, 1), 72, 4), Count("middle", (4, 2, 2), 36, 16), Count("low", (4, 4, 4), 36, 64)]
    said = layers._explained(counts, 4)
    assert (
        "enough down to **middle**. The next one, **low**, has 36 equations and 1.8 times as many unknowns, 64." in said
    )
    assert "down to **middle**, the lowest layer" in layers._explained(counts[:2], 4)
    shown = layers.table(counts)
    assert shown.count("<td>enough</td>") == 2 and shown.count("<td>too few</td>") == 1


def test_noise_takes_the_lowest_layers_first_and_the_errors_are_the_true_ones() -> None:
    network = shared.model(NETWORK)
    observation, truth = observe(network, *two()), two()
    clean, noisy = (ways.attack(network, observation, texts, 0, truth) for texts in ((), ("noise:1e-3",)))
    assert len(clean.layers) > len(noisy.layers) > 1
    for before, after in zip(clean.layers, noisy.layers, strict=False):
        assert before.name == after.name and before.true < after.true
        assert len(before.found) == len(before.own) == 2
    assert clean.layers[0].true < 1e-5 and clean.layers[0].wrong == 0 and clean.layers[0].found == clean.layers[0].own
    assert noisy.layers[-1].true > 5 * noisy.layers[0].true
    said = layers.stopped_by(clean, noisy)
    assert f"ends at **{noisy.layers[-1].name}**" in said and f"without it at {clean.layers[-1].name}" in said


def test_the_page_solves_a_small_batch_at_once_and_asks_before_a_large_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def script() -> None:
        from gradinv.web.pages import layers

        layers.page()

    app = AppTest.from_function(script, default_timeout=PATIENCE)
    app.query_params["batch_size"] = "1"
    monkeypatch.setattr("gradinv.pace.solving", lambda model, count: 1.0 if count < 3 else 100.0)
    app.run()
    assert not app.exception and not app.error
    said = "\n".join(item.value for item in app.markdown)
    assert "Recovered" in said and "Its mask" in said
    app.slider(key="batch_size").set_value(4).run()
    assert not app.exception and not app.error
    assert any("Solving this takes about 2 min" in item.value for item in app.info)
    assert "solve-0" in [button.key for button in app.button]
