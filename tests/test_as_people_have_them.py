"""Gradients, weights and pictures as people bring them: each kind with the right answer or the right sentence."""

from __future__ import annotations

import copy
import functools
import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from conftest import encoded, fails, smooth
from PIL import Image, PngImagePlugin
from torch import Tensor
from torch.nn import functional as F

from gradinv import cli, models
from gradinv.attack.inversion import invert
from gradinv.attack.objective import Objective
from gradinv.backbones import load_backbone, save_fitted
from gradinv.batchnorm import running_statistics
from gradinv.checks import check_observation
from gradinv.client import observe
from gradinv.config import AttackConfig
from gradinv.defenses import parse
from gradinv.gallery import Gallery
from gradinv.images import SUFFIXES, decode, to_pixels
from gradinv.models import Model, load_model
from gradinv.names import WRAPPERS, wrapper
from gradinv.network import Segment, parts_of
from gradinv.recovery.examination import examine
from gradinv.recovery.final_layer import rounding
from gradinv.recovery.labels import MISREAD, restore_labels
from gradinv.recovery.recover import recover
from gradinv.sources import ImageFolder, gallery
from gradinv.types import BatchNormStatistics, GradinvError, Observation, Preprocessing, Recovered

LABELS = (3, 17, 17, 60, 111, 150, 198, 42)


@pytest.fixture(scope="module")
def model():
    return load_model("resnet18-tiny", device="cpu", image_size=32)


@pytest.fixture(scope="module")
def pictures(model):
    """Eight of the gallery, (8, 3, 32, 32)."""
    return torch.stack([to_pixels(picture.open(), model.preprocessing) for picture in gallery(model)[:8]])


@pytest.fixture(scope="module")
def shared(model, pictures):
    """What a client shares of the first `count` of them; one class is twice among any three."""

    @functools.cache
    def of(count: int, **options: object) -> Observation:
        return observe(model, pictures[:count], torch.tensor(LABELS[:count]), **options)  # type: ignore[arg-type]

    return of


def mapped(observation: Observation, change: Callable[[Tensor], Tensor]) -> Observation:
    return replace(observation, gradients={name: change(value) for name, value in observation.gradients.items()})


def decayed(model: Model, observation: Observation, decay: float, vectors: bool = True) -> Observation:
    """With λ W in the gradient, of biases and batch normalisation too or not."""
    weights = {name: value.detach() for name, value in model.network.named_parameters()}
    return replace(
        observation,
        gradients={
            name: value + decay * weights[name] if vectors or value.ndim > 1 else value
            for name, value in observation.gradients.items()
        },
    )


def assert_right(restored: Sequence[int] | Tensor, count: int) -> None:
    assert Counter(torch.as_tensor(restored).tolist()) == Counter(LABELS[:count])


def assert_the_same(found: Observation, expected: Observation, within: float = 1e-6) -> None:
    for name, value in expected.gradients.items():
        assert float((found.gradients[name] - value).norm()) <= within * float(value.norm()), name


# What is done to a healthy gradient, or how it is kept.
HEALTHY: dict[str, Callable[[Observation], Observation]] = {
    "plain": lambda o: o,
    "float64": lambda o: mapped(o, lambda g: g.double()),
    "float16": lambda o: mapped(o, lambda g: g.half()),
    "bfloat16": lambda o: mapped(o, lambda g: g.bfloat16()),
    "GradScaler": lambda o: mapped(o, lambda g: 65536 * g),
    "summed loss": lambda o: mapped(o, lambda g: o.batch_size * g),
    "clipped": parse("clip:0.01"),
    "channels last": lambda o: mapped(o, lambda g: g.to(memory_format=torch.channels_last) if g.ndim == 4 else g),
}
DEFENCES = "noise:1e-4 noise:1e-2 prune:0.5 prune:0.9 prune:0.99 quantise:8 quantise:4 quantise:2 quantise:1"
CHANGED = {text: parse(text) for text in DEFENCES.split()}


# --- 1. number formats


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [6, 8])
def test_a_rounded_gradient_tells_its_labels(model, shared, count, dtype):
    rounded = mapped(shared(count), lambda gradient: gradient.to(dtype))
    for observation in (rounded, mapped(rounded, lambda gradient: gradient.float() / 1024)):
        restored = restore_labels(model, observation)
        assert_right(restored.labels, count)
        assert restored.confidence > 0.9 and restored.fit is not None and not restored.notes


def errors_of(model: Model, pictures: Tensor, found: Recovered) -> dict[str, Tensor]:
    """Of each solved node the true relative error over the stated one, of each image."""
    nodes = list(parts_of(model.network).nodes)
    with torch.no_grad():
        truth = Segment(model.network, nodes[-1], nodes)(model.preprocessing.normalise(pictures))
    order = [LABELS.index(label) for label in found.labels.tolist()]
    true = {node.name: truth[node.name].relu()[order].flatten(1) for node in found.nodes}
    return {
        node.name: (node.activation.flatten(1) - true[node.name]).norm(dim=1)
        / (true[node.name].norm(dim=1) * node.error)
        for node in found.nodes
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_layers_of_a_rounded_gradient_are_as_exact_as_they_say(model, pictures, shared, dtype):
    """Rounding is not taken for wrong entries of a mask, of which each one costs per cents."""
    rounded = mapped(shared(2), lambda gradient: gradient.to(dtype))
    found = recover(model, rounded, AttackConfig(boundary="layer3", labels="auto"))
    assert max(float(node.error.max()) for node in found.nodes) < 0.01
    assert all((share <= 3).all() for share in errors_of(model, pictures[:2], found).values())


@pytest.mark.parametrize(("text", "count"), [("noise:1e-3", 2), ("noise:1e-2", 2)])
def test_layers_behind_noise_are_as_exact_as_they_say(model, pictures, shared, text, count):
    """What is left unexplained may be much more: it is noise, of which far more equations than unknowns average most
    out. A node is called solved up to an error of a half, and below one of a tenth nothing is."""
    labels = torch.tensor(LABELS[:count])
    found = recover(model, parse(text)(shared(count)), AttackConfig(boundary="auto", labels="auto"), labels=labels)
    assert found.nodes and float(found.nodes[-1].error.median()) < 0.5
    assert all(float(node.error.median()) <= 0.1 for node in found.nodes[:-1])
    assert all(float(share.median()) <= 1.5 for share in errors_of(model, pictures[:count], found).values())


def test_the_rounding_of_a_format_is_that_of_its_numbers():
    values = torch.randn(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for scale in (1.0, 1e-6):  # in float16 the smaller ones are below its normal numbers
            kept = (scale * values).to(dtype)
            error = float((kept.double() - scale * values).norm() / (scale * values).norm())
            assert rounding(kept) == pytest.approx(error, rel=0.1)
            assert rounding(kept.double()) == pytest.approx(error, rel=0.1)
    assert rounding(torch.zeros(3)) == 0


# --- 2. not the gradient that the file says


@pytest.mark.parametrize("change", HEALTHY.values(), ids=HEALTHY)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_healthy_gradient_is_called_nothing_else(model, shared, change, mode):
    observation = change(shared(4, mode=mode))
    examined = examine(model, observation)
    assert examined.notes == () and examined.observation is observation
    restored = restore_labels(model, observation)
    assert_right(restored.labels, 4)
    assert restored.notes == () and restored.confidence > 0.9


@pytest.mark.parametrize(
    ("mode", "text"), [*(("eval", text) for text in CHANGED), *(("train", text) for text in list(CHANGED)[1::3])]
)
def test_a_defended_gradient_is_no_update_nor_anything_else_but_unexplained(model, shared, text, mode):
    for count in (2, 4):
        observation = CHANGED[text](shared(count, mode=mode))
        assert examine(model, observation).notes == ()
        assert set(restore_labels(model, observation, "ilrg").notes) <= {MISREAD}


def test_an_update_is_named_and_inverted_negated(model, shared):
    for count in (1, 4, 8):
        update = mapped(shared(count), lambda gradient: -0.05 * gradient)
        for method in ("auto", "column-minimum"):
            with pytest.raises(GradinvError, match=r"^This is an update, not a gradient.*--update"):
                restore_labels(model, update, method)
        restored = restore_labels(model, update.negated())
        assert_right(restored.labels, count)
        assert restored.fit is not None and restored.fit.scale == pytest.approx(0.05, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_update_with_weight_decay_or_rounded(model, shared, dtype):
    """As SGD makes it: −η (g + λ W)."""
    update = mapped(decayed(model, shared(4), 5e-3), lambda gradient: (-0.1 * gradient).to(dtype))
    with pytest.raises(GradinvError, match="This is an update"):
        recover(model, update, AttackConfig(labels="auto"))
    found = recover(model, update.negated(), AttackConfig(labels="auto"))
    assert_right(found.labels, 4)
    assert found.notes == ("The gradient holds weight decay, 0.0005 times the weights, which was taken off.",)


@pytest.mark.parametrize(
    ("mode", "decay", "vectors"),
    [("eval", 1e-4, True), ("eval", 5e-3, False), ("train", 1e-4, False), ("train", 5e-3, True)],
)
def test_weight_decay_is_named_and_taken_off(model, shared, decay, vectors, mode):
    healthy = shared(4, mode=mode)
    examined = examine(model, decayed(model, healthy, decay, vectors))
    assert examined.notes == (f"The gradient holds weight decay, {decay:g} times the weights, which was taken off.",)
    assert_the_same(examined.observation, healthy)
    restored = restore_labels(model, examined.observation)
    assert_right(restored.labels, 4)
    assert restored.confidence > 0.99


@pytest.mark.parametrize("smoothing", [0.1, 0.02])
def test_label_smoothing_is_solved_for_or_told(model, shared, smoothing):
    for count in (1, 4, 8):
        told = shared(count, label_smoothing=smoothing)
        for observation in (told, replace(told, label_smoothing=0.0)):
            restored = restore_labels(model, observation)
            assert_right(restored.labels, count)
            assert restored.confidence > 0.99 and restored.fit is not None
            assert restored.fit.smoothing == pytest.approx(smoothing, rel=1e-3)
        assert restored.notes == (f"The client's labels are smoothed, by ε = {smoothing:g}; that was solved for.",)
        assert torch.allclose(restored.fit.output_errors.sum(1), torch.zeros(count).double(), atol=1e-6)


def test_strong_smoothing_of_eight_pictures_is_solved_for(model):
    """Of these no reading has every label right."""
    chosen = gallery(model)[12:20]
    pixels = torch.stack([to_pixels(picture.open(), model.preprocessing) for picture in chosen])
    labels = torch.tensor([model.class_index(picture.wnid or "") for picture in chosen])
    observation = replace(observe(model, pixels, labels, label_smoothing=0.3), label_smoothing=0.0)
    restored = restore_labels(model, observation)
    assert sorted(restored.labels.tolist()) == sorted(labels.tolist()) and restored.fit is not None
    assert restored.fit.smoothing == pytest.approx(0.3, rel=1e-3)


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("smoothing", [0.1, 0.0])
def test_matching_at_the_loss_predicts_smoothed_labels(model, pictures, shared, smoothing, told):
    """At the client's own pictures the two gradients are the same."""
    observation = mapped(shared(2, label_smoothing=smoothing), lambda gradient: 3 * gradient)
    observation = observation if told else replace(observation, label_smoothing=0.0)
    config = AttackConfig(boundary="loss", labels="auto", gradient=1.0, match="l2", bn="none", tv=0, l2=0, group=0)
    found = recover(model, observation, config)
    assert found.label_smoothing == pytest.approx(smoothing, abs=1e-4)
    order = [LABELS.index(label) for label in found.labels.tolist()]
    images = model.preprocessing.normalise(pictures[order])

    def distance(recovered: Recovered) -> float:
        return float(Objective(model, observation, recovered, config)(images, images).total.detach())

    size = sum(float(gradient.norm()) for gradient in observation.gradients.values())
    assert distance(found) < 1e-3 * size
    assert distance(replace(found, label_smoothing=smoothing + 0.1)) > 0.05 * size


def test_the_layers_below_smoothed_labels_are_as_exact(model, shared):
    observation = replace(shared(2, label_smoothing=0.1), label_smoothing=0.0)
    found = recover(model, observation, AttackConfig(boundary="layer3", labels="auto"))
    assert found.nodes[-1].name == "layer3.1" and float(found.nodes[-1].error.max()) < 1e-3


def test_too_few_images_are_refused_with_how_many_there_are_at_least(model, shared):
    for change in (HEALTHY["plain"], HEALTHY["bfloat16"], HEALTHY["clipped"]):
        with pytest.raises(GradinvError, match=r"has rank 8, so it is of at least 8 images and not of 4"):
            examine(model, replace(change(shared(8)), batch_size=4))
    with pytest.raises(GradinvError, match="at least 8 images and not of 5"):
        examine(model, replace(decayed(model, shared(8), 5e-3), batch_size=5))
    (note,) = examine(model, replace(shared(4), batch_size=6)).notes
    assert "has rank 4: unless pictures repeat, it is of 4 images and not of 6" in note
    for text in set(CHANGED) - {"prune:0.5"}:  # which leaves the final layer's gradient as it is
        assert examine(model, replace(CHANGED[text](shared(8)), batch_size=4)).notes == ()


def local_steps(model: Model, pictures: Tensor, steps: int) -> Observation:
    """−η Σ g of several steps on one batch, as if it were the gradient of all images that were seen."""
    network = copy.deepcopy(model.network)
    optimiser = torch.optim.SGD(network.parameters(), lr=0.1)
    for _ in range(steps):
        optimiser.zero_grad()
        F.cross_entropy(
            network(model.preprocessing.normalise(pictures)), torch.tensor(LABELS[: len(pictures)])
        ).backward()
        optimiser.step()
    before = dict(model.network.named_parameters())
    update = {name: value.detach() - before[name].detach() for name, value in network.named_parameters()}
    return Observation(update, len(pictures) * steps, model.preprocessing, model.name, model.sha256)


@pytest.mark.usefixtures("elsewhere")
def test_what_is_not_explained_is_said_before_the_run(model, pictures, capsys):
    local_steps(model, pictures[:2], 3).negated().save("steps.safetensors")
    args = ["invert", "--observation", "steps.safetensors", "--preset", "matching", "--seeds", "1", "--iterations", "1"]
    args.append("--json")
    assert cli.main(args) == 0
    told = capsys.readouterr()
    (note,) = (note for note in json.loads(told.out)["recovered"]["notes"] if "not explained" in note)
    lines = told.err.splitlines()
    place = next(index for index, line in enumerate(lines) if line.startswith("Labels restored"))
    assert note in lines[:place] and len(note) <= 300


@pytest.mark.usefixtures("elsewhere")
def test_the_command_takes_an_update_and_a_batch_size(shared, capsys):
    replace(mapped(shared(3), lambda gradient: -0.05 * gradient), batch_size=2).save("update.safetensors")
    plain = ["recover", "--observation", "update.safetensors", "--boundary", "logits", "--json"]
    assert "at least 3 images and not of 2" in fails(capsys, *plain)
    assert "This is an update" in fails(capsys, *plain, "--batch-size", "3")
    assert cli.main([*plain, "--batch-size", "3", "--update"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert_right(facts["labels"]["restored"], 3)
    assert facts["notes"] == [] and facts["scale"] == pytest.approx(0.05, rel=1e-3)
    assert "--update is said of an observation" in fails(capsys, "recover", "lion", *plain[-1:], "--update")


# --- 3. the other forward mode


@pytest.mark.parametrize("change", ["plain", "float16", "bfloat16", "clipped", "GradScaler"])
def test_a_gradient_of_train_mode_is_known_as_one(model, shared, change):
    for count in (2, 4):
        observation = HEALTHY[change](shared(count, mode="train"))
        examined = examine(model, replace(observation, mode="eval", running=None))
        assert examined.observation.mode == "train"
        (note,) = examined.notes
        assert note.startswith("The gradient was taken in train mode, though the observation says eval")
        assert len(note) <= 300
        assert_right(restore_labels(model, examined.observation).labels, count)


def test_a_gradient_of_eval_mode_that_says_train(model, shared):
    observation = replace(shared(4), mode="train", running=running_statistics(model.network))
    examined = examine(model, observation)
    assert examined.observation.mode == "eval" and examined.observation.running is None
    assert examined.notes[0].startswith("The gradient was taken in eval mode, though the observation says train")


def test_train_mode_and_weight_decay_together(model, shared):
    observation = replace(decayed(model, shared(4, mode="train"), 5e-3), mode="eval", running=None)
    examined = examine(model, observation)
    assert examined.observation.mode == "train" and len(examined.notes) == 2


@pytest.mark.usefixtures("elsewhere")
def test_a_run_of_such_a_gradient_matches_in_train_mode(shared, capsys):
    replace(shared(2, mode="train"), mode="eval", running=None).save("o.safetensors")
    args = ["invert", "--observation", "o.safetensors", "--iterations", "1", "--seeds", "1", "--out", "run"]
    assert cli.main(args) == 0
    told = capsys.readouterr().out
    assert "The gradient was taken in train mode, though" in told and "In train mode batch normalisation mixes" in told
    run = json.loads(Path("run/run.json").read_text())
    assert run["boundary"] == "logits" and run["recovered"]["notes"][0] in told


# --- 4. names with a prefix, and weights as they lie in checkpoints

PREFIXES = ("module.", "module._orig_mod.", "learner.backbone.")


@pytest.fixture(scope="module")
def state():
    """Random weights of a 5-class ResNet-18, under torchvision's names."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return dict(torchvision.models.resnet18(num_classes=5).state_dict())


def prefixed(mapping: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in mapping.items()}


@pytest.mark.parametrize("key", ["", "model", "state_dict_ema"], ids=["bare", "model", "ema"])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_weights_with_a_prefix_and_under_a_key_of_a_checkpoint(state, tmp_path, prefix, key):
    named = prefixed(state, prefix)
    path = tmp_path / ("own.pth" if key else "own.safetensors")
    if key:
        torch.save({"epoch": 3, "optimizer": {"lr": 0.1}, key: named}, path)
    else:
        safetensors.torch.save_file(named, path)
    loaded = load_model(str(path), device="cpu", image_size=32).network.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items() if "num_batches" not in name)


def test_whatever_wraps_a_network_is_taken_off():
    for outer, inner in itertools.permutations(WRAPPERS, 2):
        prefix = f"{outer}.{inner}."
        assert wrapper([f"{prefix}fc.weight", f"{prefix}fc.bias"]) == prefix


@pytest.mark.parametrize("prefix", PREFIXES)
def test_an_observation_with_a_prefix(model, shared, tmp_path, prefix):
    plain = shared(2, share_bn=True, mode="train")
    assert plain.bn is not None and plain.running is not None
    statistics = [
        BatchNormStatistics(prefixed(own.mean, prefix), prefixed(own.var, prefix)) for own in (plain.bn, plain.running)
    ]
    named = replace(plain, gradients=prefixed(plain.gradients, prefix), bn=statistics[0], running=statistics[1])
    named.save(tmp_path / "o.safetensors")
    for observation in (named, Observation.load(tmp_path / "o.safetensors")):
        check_observation(model, observation)
        found = examine(model, observation).observation
        assert_the_same(found, plain, 0)
        assert found.bn is not None and set(found.bn.mean) == set(plain.bn.mean)
        assert_right(recover(model, observation, AttackConfig()).labels, 2)


def test_a_network_whose_own_names_have_a_prefix(small_model, observation):
    wrapped = torch.nn.ModuleDict({"body": small_model.network})
    wrapped.forward = small_model.network.forward  # type: ignore[method-assign]
    own = replace(small_model, network=wrapped, final="body.fc")
    check_observation(own, observation)
    assert sorted(recover(own, observation, AttackConfig(labels="auto")).labels.tolist()) == [1, 2, 4]


def test_a_checkpoint_without_weights_names_its_keys(tmp_path):
    torch.save({"epoch": 3, "optimizer": {"lr": 0.1}}, tmp_path / "own.pth")
    with pytest.raises(GradinvError, match="it has the keys epoch, optimizer"):
        load_model(str(tmp_path / "own.pth"), device="cpu")


def test_a_head_in_a_sequential_is_the_trained_head(state, tmp_path, model, shared):
    headed = {name.replace("fc.", "fc.1."): value for name, value in state.items()}
    torch.save(headed, tmp_path / "own.pth")
    loaded = load_model(str(tmp_path / "own.pth"), device="cpu", image_size=32)
    assert torch.equal(loaded.final_layer.weight, state["fc.weight"])
    plain = shared(2)
    gradients = {name.replace("fc.", "fc.1."): value for name, value in plain.gradients.items()}
    assert_the_same(examine(model, replace(plain, gradients=gradients)).observation, plain, 0)


def refusal(path: Path) -> str:
    with pytest.raises(GradinvError) as refused:
        load_model(str(path), device="cpu")
    assert len(str(refused.value)) <= 300 + len(str(path))
    return str(refused.value)


def test_what_cannot_be_loaded_has_a_true_reason(state, tmp_path):
    path = tmp_path / "own.pth"
    with torch.device("meta"):
        others = [torchvision.models.vgg11(num_classes=3), torchvision.models.densenet121(num_classes=3)]
    for network in others:
        torch.save({name: torch.zeros(1) for name in network.state_dict()}, path)
        assert "is not a ResNet as torchvision builds them" in (said := refusal(path)) and "gradinv head" not in said
    layers = {**state, "fc.0.weight": state["fc.weight"], "fc.2.weight": torch.zeros(5, 5)}
    torch.save({name: value for name, value in layers.items() if name not in ("fc.weight", "fc.bias")}, path)
    assert "a head of fc.0, fc.2" in (said := refusal(path)) and "gradinv head" not in said
    torch.save({name: value for name, value in state.items() if not name.startswith("fc.")}, path)
    assert "gradinv head fits a final layer" in refusal(path)
    torch.save(torchvision.models.resnet18(num_classes=2), path)
    assert "save network.state_dict()" in refusal(path)


# --- 6. the library's edge


def made(observation: Observation, gradients: object, batch_size: object = None) -> Observation:
    count = observation.batch_size if batch_size is None else batch_size
    return Observation(gradients, count, observation.preprocessing, observation.model_name, observation.model_sha256)  # type: ignore[arg-type]


def test_gradients_in_the_order_of_the_parameters(model, shared, tmp_path):
    plain = shared(2)
    values = [plain.gradients[name] for name, _ in model.network.named_parameters()]
    for given in (values, tuple(values), [value.numpy() for value in values]):
        observation = made(plain, given)
        observation.save(tmp_path / "o.safetensors")
        for own in (observation, Observation.load(tmp_path / "o.safetensors")):
            check_observation(model, own)
            assert_the_same(examine(model, own).observation, plain, 0)
    with pytest.raises(GradinvError, match="has the shape"):
        check_observation(model, made(plain, values[::-1]))


def test_a_list_that_is_not_as_long_as_the_parameters_is_no_client_that_froze_the_last(model, shared, tmp_path):
    plain = shared(2)
    values = [plain.gradients[name] for name, _ in model.network.named_parameters()]
    for wrong in (values[:-1], values[:1], [*values, values[-1]], [*values[:-2], None]):
        made(plain, wrong).save(tmp_path / "o.safetensors")
        for own in (made(plain, wrong), Observation.load(tmp_path / "o.safetensors")):
            with pytest.raises(GradinvError, match=rf"The list holds {len(wrong)} gradients? and .* has 62 parameters"):
                check_observation(model, own)
    frozen = made(plain, [*values[:-2], None, None])
    check_observation(model, frozen)
    assert_the_same(examine(model, frozen).observation, without(plain, "fc"), 0)


def test_a_sparse_gradient_is_taken_and_one_without_numbers_refused(shared):
    plain = shared(2)
    changed = {**plain.gradients, "fc.weight": plain.gradients["fc.weight"].to_sparse()}
    assert_the_same(made(plain, changed), plain, 0)
    with pytest.raises(GradinvError, match=r"gradient of fc\.weight is on the meta device"):
        made(plain, {"fc.weight": torch.ones(2, 2, device="meta")})


@pytest.mark.parametrize("count", [np.int64(2), np.array(2), torch.tensor(2), np.uint8(2)], ids=repr)
def test_batch_sizes_of_other_kinds(shared, count):
    plain = shared(2)
    observation = made(plain, {name: value.numpy() for name, value in plain.gradients.items()}, count)
    assert type(observation.batch_size) is int and observation.batch_size == 2
    assert_the_same(observation, plain, 0)


@pytest.mark.parametrize("count", [0, -1, 2.5, True, "two", torch.tensor([2, 2]), None], ids=repr)
def test_batch_sizes_that_are_none_are_refused_when_it_is_made(count):
    with pytest.raises(GradinvError, match="The batch size must be a whole number of at least 1") as refused:
        Observation({"fc.weight": torch.ones(2, 2)}, count, Preprocessing(8, 8), "own", "0")  # type: ignore[arg-type]
    assert len(str(refused.value)) <= 300


@pytest.mark.parametrize(
    "gradients",
    [
        {"fc.weight": "a"},
        {"fc.weight": np.array(["a"])},
        {3: torch.ones(2)},
        torch.ones(3),
        {"fc.weight": None},
        [None],
        [torch.ones(2), "b"],
        None,
        (torch.ones(2) for _ in range(2)),
    ],
    ids=lambda value: type(value).__name__,  # the same in each worker
)
def test_gradients_that_are_none_are_refused_when_it_is_made(gradients):
    with pytest.raises(GradinvError) as refused:
        Observation(gradients, 2, Preprocessing(8, 8), "own", "0")  # type: ignore[arg-type]
    assert len(str(refused.value)) <= 300 and "\n" not in str(refused.value)


def test_other_fields_of_a_wrong_kind_are_refused_when_it_is_made(model):
    good = {"preprocessing": model.preprocessing, "model_name": model.name, "model_sha256": model.sha256}
    for name in good:
        with pytest.raises(GradinvError, match=f"The observation's {name} is a "):
            Observation({"fc.weight": torch.ones(2, 2)}, 2, **{**good, name: model})  # type: ignore[arg-type]


def test_one_tensor_under_two_names_and_a_home_folder(shared, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    value = torch.randn(3, 3)
    made(shared(1), {"fc.weight": value, "head.weight": value}).save("~/tied.safetensors")
    loaded = Observation.load("~/tied.safetensors")
    assert torch.equal(loaded.gradients["fc.weight"], value) and torch.equal(loaded.gradients["head.weight"], value)


@pytest.mark.parametrize(("context", "preset"), [(torch.inference_mode, "demo"), (torch.no_grad, "matching")])
def test_observing_and_inverting_where_gradients_are_off(pictures, shared, context, preset):
    config = AttackConfig.preset(preset, "resnet18-tiny", iterations=1, seeds=1)
    with context():
        own = load_model("resnet18-tiny", device="cpu", image_size=32)
        labels = torch.tensor(LABELS[:2])
        trained = observe(own, pictures[:2].clone(), labels, mode="train")
        observation = observe(own, pictures[:2].clone(), labels)
        copied = mapped(observation, lambda gradient: gradient + 0)
        *_, last = invert(own, copied, config)
    assert_the_same(observation, shared(2), 0)
    assert_the_same(trained, shared(2, mode="train"), 0)
    *_, expected = invert(load_model("resnet18-tiny", device="cpu", image_size=32), shared(2), config)
    assert torch.equal(last.seeds, expected.seeds)


def test_a_network_that_requires_no_gradients(pictures, shared):
    own = load_model("resnet18-tiny", device="cpu", image_size=32)
    own.network.requires_grad_(False)
    observation = observe(own, pictures[:2], torch.tensor(LABELS[:2]))
    assert_the_same(observation, shared(2), 0)
    *_, last = invert(own, observation, AttackConfig.preset("matching", "resnet18-tiny", iterations=1, seeds=1))
    assert last.distance and not any(parameter.requires_grad for parameter in own.network.parameters())


# --- 5. another normalisation

HALVES = {"mean": "[0.5, 0.5, 0.5]", "std": "[0.5, 0.5, 0.5]"}


def own_weights(state: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> str:
    safetensors.torch.save_file(state, path, metadata={"image_size": "32", **metadata})
    return str(path)


@pytest.mark.usefixtures("elsewhere")
def test_own_weights_with_another_normalisation(state, capsys):
    silent = own_weights(state, Path("silent.safetensors"), {})
    stating = own_weights(state, Path("stating.safetensors"), HALVES)
    pixels, labels = torch.rand(2, 3, 32, 32), torch.tensor([3, 1])
    by_metadata = load_model(stating, device="cpu")
    by_argument = load_model(silent, device="cpu", mean=0.5, std=(0.5, 0.5, 0.5))
    none = load_model(silent, device="cpu", mean=0, std=1)
    torch.testing.assert_close(by_metadata.preprocessing.normalise(pixels), 2 * pixels - 1)
    torch.testing.assert_close(by_argument.preprocessing.normalise(pixels), 2 * pixels - 1)
    assert torch.equal(none.preprocessing.normalise(pixels), pixels)
    assert load_model(silent, device="cpu").preprocessing.mean == (0.485, 0.456, 0.406)
    observe(by_metadata, pixels, labels).save("stating.o")
    observe(by_argument, pixels, labels).save("silent.o")

    def recovering(case: str, *given: str) -> list[str]:
        args = ["recover", "--boundary", "logits", "--json", "--observation", f"{case}.o"]
        return [*args, "--model", f"{case}.safetensors", *given]

    for case in ("stating", "silent"):  # the observation says what the weights do not
        assert cli.main(recovering(case)) == 0
        assert sorted(json.loads(capsys.readouterr().out)["labels"]["restored"]) == [1, 3]
    assert cli.main(recovering("silent", "--mean", "0.5", "--std", "0.5,0.5,0.5")) == 0
    assert "was made with mean 0.5, 0.5, 0.5" in fails(capsys, *recovering("silent", "--mean", "0.4"))
    assert "of stating states mean (0.5, 0.5, 0.5)" in fails(capsys, *recovering("stating", "--mean", "0"))
    assert "is three numbers" in fails(capsys, *recovering("stating", "--mean", "0.5,0.5"))


def test_the_normalisation_of_a_fitted_network_is_kept(state, tmp_path):
    silent = own_weights(state, tmp_path / "silent.safetensors", {})
    backbone = load_backbone(silent, device="cpu", mean=0.5, std=0.5)
    save_fitted(tmp_path / "fitted.safetensors", backbone, torch.ones(2, 512), torch.ones(2), ["a", "b"], 50.0)
    assert load_model(str(tmp_path / "fitted.safetensors"), device="cpu").preprocessing.std == (0.5, 0.5, 0.5)


def test_how_pictures_were_made_smaller_does_not_matter(model, shared):
    observation = replace(shared(2), preprocessing=replace(model.preprocessing, resize=99))
    check_observation(model, observation)
    *_, last = invert(model, observation, ONCE)
    assert_right(last.labels, 2)


@pytest.mark.parametrize("text", ["half", "[0.5]", '{"r": 1}', "[0.5, 0.5, NaN]"])
def test_a_normalisation_in_the_metadata_that_is_none(state, tmp_path, text):
    path = own_weights(state, tmp_path / "own.safetensors", {"mean": text})
    with pytest.raises(GradinvError, match=r"of its metadata, .* mean and std three numbers each"):
        load_model(path, device="cpu")


def test_the_models_own_normalisation_through_float32(model, shared):
    own = model.preprocessing
    mean, std = (torch.tensor(values, dtype=torch.float32).tolist() for values in (own.mean, own.std))
    assert mean != list(own.mean)
    check_observation(model, replace(shared(1), preprocessing=Preprocessing(own.size, own.resize, mean, std)))
    with pytest.raises(GradinvError, match=r"was made with mean 0\.4851"):
        wrong = Preprocessing(own.size, own.resize, (0.4851, *own.mean[1:]), own.std)
        check_observation(model, replace(shared(1), preprocessing=wrong))


@pytest.mark.parametrize("values", [(0.5, 0.5), "a", None, (1, 2, float("nan")), (1, 2, "x")], ids=repr)
def test_a_normalisation_that_is_none_is_refused_when_it_is_made(values):
    with pytest.raises(GradinvError, match="The mean to normalise by is three numbers"):
        Preprocessing(8, 8, mean=values)  # type: ignore[arg-type]
    with pytest.raises(GradinvError, match="The std to normalise by is three numbers above 0"):
        Preprocessing(8, 8, std=0)  # type: ignore[arg-type]


# --- 7. clients that train some layers only


def without(observation: Observation, *modules: str) -> Observation:
    kept = {name: value for name, value in observation.gradients.items() if not name.startswith(modules)}
    return replace(observation, gradients=kept)


def zeroed(observation: Observation, *modules: str) -> Observation:
    gradients = observation.gradients.items()
    return replace(observation, gradients={name: value * (not name.startswith(modules)) for name, value in gradients})


FROZEN = ("conv1", "bn1", "layer1", "layer2")
ONCE = AttackConfig.preset("demo", "resnet18-tiny", iterations=1, seeds=1)


@pytest.mark.parametrize("lacking", [without, zeroed])
def test_frozen_layers_are_absent_and_the_others_are_solved(model, shared, tmp_path, lacking):
    lacking(shared(2), *FROZEN).save(tmp_path / "o.safetensors")
    stream = invert(model, Observation.load(tmp_path / "o.safetensors"), ONCE)
    whole = invert(model, shared(2), ONCE).recovered
    found = stream.recovered
    assert_right(found.labels, 2)
    (note,) = found.notes
    assert "30 of 62 parameters are absent" in note and ("30 zero throughout" in note) == (lacking is zeroed)
    assert "of layer2.1.conv2.weight is absent, so no layer below layer2.1 is solved" in found.stopped
    count = len(found.nodes)
    assert [node.name for node in found.nodes] == [node.name for node in whole.nodes][:count] and count == 8
    for own, expected in zip(found.nodes, whole.nodes, strict=False):
        assert torch.equal(own.activation, expected.activation)
    *_, last = stream
    assert last.boundary == "layer2.1"


def test_batch_normalisation_that_does_not_train_hides_no_layer(model, shared):
    """Nor do its biases alone, whose gradients only mend masks."""
    norms = [name for name, module in model.network.named_modules() if isinstance(module, torch.nn.BatchNorm2d)]
    config = AttackConfig(boundary="layer3", labels="auto")
    whole = recover(model, shared(2), config)
    for lacking in (without(shared(2), *norms), without(shared(2), *(f"{name}.bias" for name in norms))):
        found = recover(model, lacking, config)
        assert not found.stopped and len(found.nodes) == len(whole.nodes) == 4
        for own, expected in zip(found.nodes, whole.nodes, strict=True):
            torch.testing.assert_close(own.activation, expected.activation, rtol=1e-4, atol=1e-4)


def test_none_in_the_place_of_a_gradient_is_absent(model, shared):
    plain = shared(2)
    values = [
        None if name.startswith(FROZEN) else plain.gradients[name] for name, _ in model.network.named_parameters()
    ]
    for gradients in (values, dict(zip(dict(model.network.named_parameters()), values, strict=True))):
        observation = made(plain, gradients)
        check_observation(model, observation)
        assert_the_same(examine(model, observation).observation, without(plain, *FROZEN), 0)


def test_a_matched_layer_without_a_gradient_is_matched_nowhere(model, shared):
    config = AttackConfig.preset("matching", "resnet18-tiny", iterations=1, seeds=1)
    *_, some = invert(model, without(shared(2), "layer2"), config)
    *_, every = invert(model, shared(2), config)
    assert some.distance and some.distance != every.distance
    with pytest.raises(GradinvError, match=r"no gradient of the layers that are matched \(layer3\); set layers to all"):
        invert(model, without(shared(2), *FROZEN, "layer3"), config)
    *_, last = invert(model, without(shared(2), *FROZEN, "layer3"), replace(config, layers="all"))
    assert last.distance


@pytest.mark.usefixtures("elsewhere")
def test_without_the_final_layers_gradient_labels_are_given(model, shared, capsys):
    observation = without(shared(2), "fc")
    with pytest.raises(GradinvError, match=r"no gradient of fc\.weight, from which labels are read; without it they"):
        invert(model, observation, ONCE)
    with pytest.raises(GradinvError, match="Of 2 images as many labels between 0 and 199"):
        invert(model, observation, ONCE, labels=torch.tensor([3]))
    *_, last = invert(model, observation, ONCE, labels=torch.tensor(LABELS[:2]))
    assert last.labels == LABELS[:2] and last.label_method == "given" and last.boundary == "loss"
    observation.save("o.safetensors")
    args = ["invert", "--observation", "o.safetensors", "--iterations", "1", "--seeds", "1", "--out", "run"]
    classes = [model.class_name(label) for label in LABELS[:2]]
    assert "--class" in fails(capsys, *args)
    assert cli.main([*args, *(word for name in classes for word in ("--class", name))]) == 0
    assert f"Labels as they were given: {', '.join(classes)}" in capsys.readouterr().out


# --- 8. one list of picture formats


def photograph(seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((48, 40), Image.Resampling.BICUBIC)


@pytest.mark.usefixtures("elsewhere")
def test_every_format_counts_in_every_folder(model):
    kinds = {".jpe": "JPEG", ".jfif": "JPEG", ".tif": "TIFF", ".jpg": "JPEG"}
    folder = Path("pictures/n01443537")
    folder.mkdir(parents=True)
    for number, suffix in enumerate(SUFFIXES):
        photograph(number).save(folder / f"{number}{suffix.upper()}", kinds.get(suffix, suffix[1:].upper()))
    (folder / "notes.txt").write_text("no picture")
    assert len(ImageFolder(folder.parent).pictures("n01443537")) == len(SUFFIXES) == 10
    assert len(Gallery.of(model, folder.parent).paths) == len(SUFFIXES)
    args = ["invert", "--imagenet", "pictures", "--random", "10", "--model", "resnet18-tiny"]
    assert cli.main([*args, "--save-observation", "o.safetensors"]) == 0


def test_no_pictures_to_draw_says_why(tmp_path, model):
    known = {item.wnid for item in model.classes}
    (tmp_path / "n99999999").mkdir()
    with pytest.raises(GradinvError, match=r"has no folder of a class that the network knows .its first is n99999999"):
        ImageFolder(tmp_path).draw(2, 0, known)
    (tmp_path / "n01443537").mkdir()
    (tmp_path / "n01443537" / "fish.heic").write_bytes(b"none of these")
    with pytest.raises(GradinvError, match=r"hold no picture \(\.jpeg, \.jpg, .* to draw from"):
        ImageFolder(tmp_path).draw(2, 0, known)
    photograph().save(tmp_path / "n01443537" / "fish.webp")
    with pytest.raises(GradinvError, match="There are only 1 pictures to draw 2 from"):
        ImageFolder(tmp_path).draw(2, 0, known)


# --- 9. healthy pictures


def texts(add: Callable[[PngImagePlugin.PngInfo], None]) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    add(info)
    return info


LONG = "x" * 3_000_000


@pytest.mark.parametrize(
    "options",
    [
        {"pnginfo": texts(lambda info: info.add_text("notes", LONG))},
        {"pnginfo": texts(lambda info: info.add_text("notes", LONG, zip=True))},
        {"pnginfo": texts(lambda info: info.add_itxt("XML:com.adobe.xmp", LONG))},
        {"pnginfo": texts(lambda info: info.add_itxt("XML:com.adobe.xmp", LONG, zip=True))},
        {"icc_profile": LONG.encode()},
    ],
    ids=["tEXt", "zTXt", "XMP", "packed XMP", "ICC"],
)
def test_a_png_with_much_beside_its_pixels_is_a_picture(options):
    data = encoded(photograph(), **options)
    image, notes = decode(data, "long.png")
    assert np.array_equal(np.asarray(image), np.asarray(photograph())) and notes == []
    with pytest.raises(GradinvError, match=r"long\.png is damaged or incomplete"):
        decode(data[:-40], "long.png")


def test_a_wholly_transparent_picture_keeps_its_colours():
    clear = photograph().copy()
    clear.putalpha(0)
    image, notes = decode(encoded(clear), "clear.png")
    assert np.array_equal(np.asarray(image), np.asarray(photograph()))
    assert len(notes) == 1 and "wholly transparent" in notes[0]
    with pytest.raises(GradinvError, match=r"empty\.png is wholly transparent and has one colour"):
        decode(encoded(Image.new("RGBA", (20, 20), (0, 0, 0, 0))), "empty.png")


# --- 10. wording and promises


@pytest.mark.usefixtures("elsewhere")
def test_what_is_left_unexplained_is_called_so(capsys):
    args = ["invert", "lion", "--model", "resnet18-tiny", "--image-size", "32", "--preset", "matching", "--seeds", "1"]
    assert cli.main([*args, "--iterations", "1", "--defence", "noise:1e-2", "--out", "run"]) == 0
    left = json.loads(Path("run/run.json").read_text())["recovered"]["features_residual"]
    assert left > 0.1
    assert f"features leave {100 * left:.0f} % of the final layer's gradient unexplained" in capsys.readouterr().out


@pytest.mark.usefixtures("elsewhere")
def test_identify_names_only_options_that_it_has(state, capsys):
    weights = own_weights(state, Path("five.safetensors"), {})
    whole = observe(load_model(weights, device="cpu"), torch.rand(6, 3, 32, 32), torch.tensor([0, 1, 2, 3, 4, 4]))
    with pytest.raises(SystemExit):
        cli.main(["identify", "--help"])
    options = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    for observation in (whole, without(whole, "fc.bias"), without(whole, "fc")):
        observation.save("o.safetensors")
        said = fails(capsys, "identify", "--observation", "o.safetensors", "--model", weights, "--imagenet", ".")
        assert set(re.findall(r"--[a-z-]+", said)) - {"--class"} <= options
        assert "--class" not in said or "--class of gradinv invert" in said
        assert "features to 0" not in said and "boundary" not in said


def test_as_many_images_as_classes_are_not_trusted_much(small_model):
    for seed in range(6):
        pixels, labels = smooth(8, seed), torch.randint(0, 6, (8,), generator=torch.Generator().manual_seed(seed))
        for method in ("auto", "ilrg", "llg"):
            assert restore_labels(small_model, observe(small_model, pixels, labels), method).confidence <= 0.5


@pytest.mark.usefixtures("elsewhere")
def test_json_alone_is_on_the_output_while_weights_are_downloaded(monkeypatch, capsys):
    info = models.ModelInfo("resnet18", "", arch="resnet18", size=32, classes=1000, accuracy=69.8, origin="")
    served = Path("weights.pth").resolve()
    torch.save(torchvision.models.resnet18(num_classes=1000).state_dict(), served)
    named = served.rename(served.with_name(f"resnet18-{hashlib.sha256(served.read_bytes()).hexdigest()[:8]}.pth"))
    monkeypatch.setitem(models.MODELS, "resnet18", info)
    monkeypatch.setattr(torchvision.models.ResNet18_Weights.IMAGENET1K_V1.value, "url", named.as_uri())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: "hub")
    assert cli.main(["recover", "lion", "--model", "resnet18", "--boundary", "logits", "--json"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["model"]["name"] == "resnet18" and "Downloading" in told.err
