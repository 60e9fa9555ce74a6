"""The decoders: their files, what they paint, and what is said where there is none."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gradinv import prior
from gradinv.attack.boundary import settled
from gradinv.attack.inversion import invert
from gradinv.client import observe
from gradinv.config import APART, FROM_ABOVE, FROM_PAINTING, PRESETS, AttackConfig
from gradinv.metrics import constant_colour, psnr, ssim
from gradinv.models import Model, load_model
from gradinv.network import Segment, node_shapes, parts_of
from gradinv.recording.recorder import Recorder
from gradinv.recording.replay import Recording
from gradinv.recording.stores import DirectoryStore
from gradinv.recovery.final_layer import recover_features
from gradinv.recovery.labels import restore_labels
from gradinv.sources import find, gallery, pixels_of
from gradinv.types import GradinvError, Preprocessing, Recovered, SolvedNode

NAMES = ("goldfish", "tabby", "lion", "coffee")


def batch(model: Model, count: int = 4) -> tuple[Tensor, list[int]]:
    """Bundled pictures, pixels (B, 3, S, S) in [0, 1], and their labels."""
    pictures = [find(gallery(model), picture) for picture in NAMES[:count]]
    return pixels_of(pictures, model.preprocessing), [model.class_index(picture.wnid) for picture in pictures]


@pytest.mark.parametrize("name", prior.DECODERS)
def test_the_preview_of_recovered_features_beats_a_constant_colour(name: str) -> None:
    model = load_model(name, device="cpu")
    originals, labels = batch(model)
    observation = observe(model, originals, torch.tensor(labels))
    restored = restore_labels(model, observation).labels
    found = prior.preview(model, recover_features(model, observation, restored).features)
    assert found.shape == originals.shape and found.min() >= 0 and found.max() <= 1
    order = [restored.tolist().index(label) for label in labels]
    assert psnr(found[order], originals).mean() > psnr(constant_colour(originals), originals).mean()
    assert ssim(found[order], originals).mean() > ssim(found[order[::-1]], originals).mean() + 0.05


PAINTED = [(name, node) for name, nodes in prior.PAINTERS.items() for node in nodes]


def held(model: Model, node: str, pixels: Tensor) -> Tensor:
    """The true activations of a node."""
    with torch.no_grad():
        return Segment(model.network, node)(model.preprocessing.normalise(pixels))[node].relu()


def as_if_solved(name: str, activation: Tensor, error: float = 0.01) -> SolvedNode:
    return SolvedNode(name, activation, None, "exact", torch.full((len(activation),), error), 0.0, 1, 1, 0.0, 0.0)


@pytest.mark.parametrize("size", [64, 72, 96])
@pytest.mark.parametrize(("name", "node"), PAINTED)
def test_a_picture_painted_from_activations_is_that_picture_and_no_other(name: str, node: str, size: int) -> None:
    model = load_model(name, device="cpu", image_size=size)
    originals, _ = batch(model)
    found = prior.paint(model, node, held(model, node, originals))
    assert found.shape == originals.shape and found.min() >= 0 and found.max() <= 1
    assert (psnr(found, originals) > psnr(constant_colour(originals), originals) + 3).all()
    assert (ssim(found, originals) > ssim(found.roll(1, 0), originals) + 0.2).all()


def test_the_lowest_node_that_is_known_well_enough_is_painted_from() -> None:
    model = load_model("resnet18-tiny", device="cpu")
    nodes = [node for node in parts_of(model.network).nodes[::-1] if node in prior.PAINTERS[model.name]]
    shapes = node_shapes(model.network, 64)
    features = torch.rand(2, 512)
    recovered = Recovered(torch.tensor([1, 2]), "given", 1.0, features=features)
    assert prior.painted_from(model, recovered) is None
    found = prior.painting(model, recovered)
    assert found is not None and found.node == prior.FEATURES
    assert torch.equal(found.pixels, prior.preview(model, features))
    assert prior.painting(model, dataclasses.replace(recovered, features=None)) is None
    solved = tuple(as_if_solved(node, torch.rand(2, *shapes[node])) for node in nodes)
    recovered = dataclasses.replace(recovered, nodes=solved)
    lowest = prior.painted_from(model, recovered)
    assert lowest is not None and lowest.name == nodes[-1]
    found = prior.painting(model, recovered)
    assert found is not None and found.node == nodes[-1]
    assert torch.equal(found.pixels, prior.paint(model, nodes[-1], solved[-1].activation))
    rough = dataclasses.replace(solved[-1], error=torch.tensor([0.9, 0.9]))
    above = prior.painted_from(model, dataclasses.replace(recovered, nodes=(*solved[:-1], rough)))
    assert (None if above is None else above.name) == (nodes[-2] if len(nodes) > 1 else None)
    # Of other weights nothing is known.
    assert prior.painted_from(dataclasses.replace(model, sha256="0" * 64), recovered) is None


def test_what_is_no_number_is_painted_as_nothing() -> None:
    name, node = PAINTED[0]
    model = load_model(name, device="cpu")
    activations = torch.rand(1, *node_shapes(model.network, 64)[node])
    activations[0, :, 0, 0] = float("nan")
    assert prior.paint(model, node, activations).isfinite().all()


def test_the_search_from_a_painted_picture_explains_what_was_solved() -> None:
    """And says how far both agree; the control is the same batch from noise."""
    name, node = PAINTED[0]
    model = load_model(name, device="cpu")
    originals, labels = batch(model, 2)
    observation = observe(model, originals, torch.tensor(labels))
    solved = (as_if_solved(node, held(model, node, originals)),)
    features = torch.rand(2, model.final_layer.in_features)
    recovered = Recovered(torch.tensor(labels), "given", 1.0, features=features, residual=0.0, nodes=solved)
    config = AttackConfig.preset("demo", name, seeds=1, iterations=20)
    learned = invert(model, observation, dataclasses.replace(config, start="decoder"), recovered=recovered)
    first, *_, last = learned
    assert learned.config.prior > 0 and learned.config.iterations == 20
    assert last.prior is not None and last.prior.node == node
    assert psnr(first.consensus, last.prior.pixels).mean() > 20  # the first picture is the painted one
    assert last.terms["activations"].raw[0] < last.prior.misfit["activations"]
    *_, plain = invert(model, observation, config, recovered=recovered)
    assert plain.prior is None and "prior" not in plain.terms
    assert psnr(last.consensus, originals).mean() > psnr(plain.consensus, originals).mean() + 0.5


def test_settings_follow_where_the_picture_is_painted_from_and_what_was_chosen_stays() -> None:
    model = load_model("resnet18-tiny", device="cpu")
    shapes = node_shapes(model.network, 64)
    painted, below = (as_if_solved(node, torch.rand(2, *shapes[node])) for node in ("layer2.1", "layer2.0.conv1"))
    recovered = Recovered(torch.tensor([1, 2]), "given", 1.0, features=torch.rand(2, 512), residual=0.0)
    config = AttackConfig.preset("demo", model.name, start="decoder")
    own = settled(model, dataclasses.replace(recovered, nodes=(painted,)), config)
    assert own == dataclasses.replace(config, boundary="layer2.1", **FROM_PAINTING["layer2"])
    above = settled(model, dataclasses.replace(recovered, nodes=(painted, below)), config)
    assert above == dataclasses.replace(config, boundary="layer2.0.conv1", **APART, **FROM_ABOVE)
    first, stem = (as_if_solved(node, torch.rand(2, *shapes[node])) for node in ("layer1.1", "maxpool"))
    near = settled(model, dataclasses.replace(recovered, nodes=(first, stem)), config)
    assert near == dataclasses.replace(config, boundary="maxpool", **FROM_PAINTING["layer1"])
    chosen = dataclasses.replace(config, iterations=77, pooling=(1.0,) * 8)
    found = settled(model, dataclasses.replace(recovered, nodes=(painted,)), chosen)
    assert (found.iterations, found.pooling, found.tv_schedule) == (77, (1.0,) * 8, config.tv_schedule)
    without = dataclasses.replace(config, start="random")
    assert settled(model, dataclasses.replace(recovered, nodes=(painted,)), without) == dataclasses.replace(
        without, boundary="layer2.1", **APART
    )


def test_a_run_keeps_what_was_painted_in_the_originals_order(tmp_path: Path) -> None:
    name, node = PAINTED[0]
    model = load_model(name, device="cpu")
    originals, labels = batch(model, 2)
    observation = observe(model, originals, torch.tensor(labels))
    turned = originals.flip(0)  # restored in another order
    nodes, features = (as_if_solved(node, held(model, node, turned)),), torch.rand(2, model.final_layer.in_features)
    recovered = Recovered(torch.tensor(labels[::-1]), "given", 1.0, features=features, residual=0.0, nodes=nodes)
    config = AttackConfig.preset("demo", name, seeds=1, iterations=2, start="decoder")
    known = {"originals": originals, "labels": labels}
    recorder = Recorder(DirectoryStore(tmp_path), config=config, model=model, observation=observation, **known)
    *_, last = recorder.follow(invert(model, observation, config, recovered=recovered))
    recording = Recording.open(tmp_path)
    kept, found = recording.images("prior"), recording.run["prior"]
    assert kept is not None and last.prior is not None
    assert (kept - last.prior.pixels.flip(0)).abs().max() < 1 / 255
    assert found["node"] == node
    assert found["metrics"]["psnr"] == pytest.approx(psnr(last.prior.pixels.flip(0), originals).tolist(), abs=0.01)
    assert found["agreement_psnr"] == pytest.approx(float(psnr(last.consensus, last.prior.pixels).mean()))
    assert set(found["misfit"]["painted"]) == set(found["misfit"]["found"]) == {"activations"}


def test_no_preset_has_a_learned_prior() -> None:
    for preset in PRESETS:
        for name in prior.DECODERS:
            config = AttackConfig.preset(preset, name)
            assert (config.start, config.prior) == ("random", 0.0)


def test_other_networks_weights_and_sizes_have_no_decoder(small_model: Model) -> None:
    with pytest.raises(GradinvError, match=r"There is no decoder for small at 8 px; only resnet50-tiny and resnet18"):
        prior.preview(small_model, torch.zeros(1, 16))
    model = load_model("resnet18-tiny", device="cpu")
    for other in ({"preprocessing": Preprocessing(32, 32)}, {"sha256": "0" * 64}):
        with pytest.raises(GradinvError, match="There is no decoder for resnet18-tiny"):
            prior.load_decoder(dataclasses.replace(model, **other))
