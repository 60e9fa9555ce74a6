"""Gradients, weights and pictures as people bring them: each kind with the right answer or the right sentence."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gradinv import cli
from gradinv.batchnorm import running_statistics
from gradinv.config import AttackConfig
from gradinv.defenses import parse
from gradinv.images import to_pixels
from gradinv.models import Model, load_model
from gradinv.recovery.examination import examine
from gradinv.recovery.final_layer import rounding
from gradinv.recovery.labels import restore_labels
from gradinv.recovery.recover import recover
from gradinv.sources import gallery
from gradinv.types import GradinvError, Observation
from gradinv.victim import observe

LABELS = (3, 17, 17, 60, 111, 150, 198, 42)


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model("resnet18-tiny", device="cpu", image_size=32)


@pytest.fixture(scope="module")
def pictures(model: Model) -> Tensor:
    """Eight of the gallery, (8, 3, 32, 32)."""
    return torch.stack([to_pixels(picture.open(), model.preprocessing) for picture in gallery(model)[:8]])


@pytest.fixture(scope="module")
def shared(model: Model, pictures: Tensor) -> Callable[..., Observation]:
    """What a client shares of the first `count` of them; one class is twice among any three."""

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
def test_a_rounded_gradient_tells_its_labels(
    model: Model, shared: Callable[..., Observation], count: int, dtype: torch.dtype
) -> None:
    rounded = mapped(shared(count), lambda gradient: gradient.to(dtype))
    for observation in (rounded, mapped(rounded, lambda gradient: gradient.float() / 1024)):
        restored = restore_labels(model, observation)
        assert_right(restored.labels, count)
        assert restored.confidence > 0.9 and restored.fit is not None and not restored.notes


def test_the_rounding_of_a_format_is_that_of_its_numbers() -> None:
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
def test_a_healthy_gradient_is_called_nothing_else(
    model: Model, shared: Callable[..., Observation], change: Callable[[Observation], Observation], mode: str
) -> None:
    observation = change(shared(4, mode=mode))
    examined = examine(model, observation)
    assert examined.notes == () and examined.observation is observation
    restored = restore_labels(model, observation)
    assert_right(restored.labels, 4)
    assert restored.notes == () and restored.confidence > 0.9


@pytest.mark.parametrize("text", CHANGED)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_defended_gradient_is_no_update_nor_anything_else_but_unexplained(
    model: Model, shared: Callable[..., Observation], text: str, mode: str
) -> None:
    for count in (2, 4):
        observation = CHANGED[text](shared(count, mode=mode))
        assert examine(model, observation).notes == ()
        for note in restore_labels(model, observation, "ilrg").notes:
            assert note.startswith("The final layer's gradient is not explained")


def test_an_update_is_named_and_inverted_negated(model: Model, shared: Callable[..., Observation]) -> None:
    for count in (1, 4, 8):
        update = mapped(shared(count), lambda gradient: -0.05 * gradient)
        for method in ("auto", "column-minimum"):
            with pytest.raises(GradinvError, match=r"^This is an update, not a gradient.*--update"):
                restore_labels(model, update, method)
        restored = restore_labels(model, update.negated())
        assert_right(restored.labels, count)
        assert restored.fit is not None and restored.fit.scale == pytest.approx(0.05, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_update_with_weight_decay_or_rounded(
    model: Model, shared: Callable[..., Observation], dtype: torch.dtype
) -> None:
    """As SGD makes it: −η (g + λ W)."""
    update = mapped(decayed(model, shared(4), 5e-3), lambda gradient: (-0.1 * gradient).to(dtype))
    with pytest.raises(GradinvError, match="This is an update"):
        recover(model, update, AttackConfig(labels="auto"))
    found = recover(model, update.negated(), AttackConfig(labels="auto"))
    assert_right(found.labels, 4)
    assert found.notes == ("The gradient holds weight decay, 0.0005 times the weights, which was taken off.",)


@pytest.mark.parametrize("vectors", [True, False], ids=["all", "not of vectors"])
@pytest.mark.parametrize("decay", [1e-4, 5e-3])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_weight_decay_is_named_and_taken_off(
    model: Model, shared: Callable[..., Observation], decay: float, vectors: bool, mode: str
) -> None:
    healthy = shared(4, mode=mode)
    examined = examine(model, decayed(model, healthy, decay, vectors))
    assert examined.notes == (f"The gradient holds weight decay, {decay:g} times the weights, which was taken off.",)
    assert_the_same(examined.observation, healthy)
    restored = restore_labels(model, examined.observation)
    assert_right(restored.labels, 4)
    assert restored.confidence > 0.99


@pytest.mark.parametrize("smoothing", [0.1, 0.02])
def test_label_smoothing_is_solved_for_or_told(
    model: Model, shared: Callable[..., Observation], smoothing: float
) -> None:
    for count in (1, 4, 8):
        told = shared(count, label_smoothing=smoothing)
        for observation in (told, replace(told, label_smoothing=0.0)):
            restored = restore_labels(model, observation)
            assert_right(restored.labels, count)
            assert restored.confidence > 0.99 and restored.fit is not None
            assert restored.fit.smoothing == pytest.approx(smoothing, rel=1e-3)
        assert restored.notes == (f"The client's labels are smoothed, by ε = {smoothing:g}; that was solved for.",)
        assert torch.allclose(restored.fit.errors.sum(1), torch.zeros(count).double(), atol=1e-6)


def test_the_layers_below_smoothed_labels_are_as_exact(model: Model, shared: Callable[..., Observation]) -> None:
    observation = replace(shared(2, label_smoothing=0.1), label_smoothing=0.0)
    found = recover(model, observation, AttackConfig(boundary="layer3", labels="auto"))
    assert found.nodes[-1].name == "layer3.1" and float(found.nodes[-1].error.max()) < 1e-3


def test_too_few_images_are_refused_with_how_many_there_are_at_least(
    model: Model, shared: Callable[..., Observation]
) -> None:
    for change in (HEALTHY["plain"], HEALTHY["bfloat16"], HEALTHY["clipped"]):
        with pytest.raises(GradinvError, match=r"has rank 8, so it is of at least 8 images and not of 4"):
            examine(model, replace(change(shared(8)), batch_size=4))
    with pytest.raises(GradinvError, match="at least 8 images and not of 5"):
        examine(model, replace(decayed(model, shared(8), 5e-3), batch_size=5))
    (note,) = examine(model, replace(shared(4), batch_size=6)).notes
    assert note == "The final layer's gradient has rank 4: unless pictures repeat, it is of 4 images and not of 6."
    for text in set(CHANGED) - {"prune:0.5"}:  # which leaves the final layer's gradient as it is
        assert examine(model, replace(CHANGED[text](shared(8)), batch_size=4)).notes == ()


def local_steps(model: Model, pictures: Tensor, steps: int) -> Observation:
    """−η Σ g of several steps on one batch, as if it were the gradient of all images that were seen."""
    network = copy.deepcopy(model.network)
    optimiser = torch.optim.SGD(network.parameters(), lr=0.1)
    for _ in range(steps):
        optimiser.zero_grad()
        F.cross_entropy(network(model.preprocessing.normalise(pictures)), torch.tensor(LABELS[:2])).backward()
        optimiser.step()
    before = dict(model.network.named_parameters())
    update = {name: value.detach() - before[name].detach() for name, value in network.named_parameters()}
    return Observation(update, 2 * steps, model.preprocessing, model.name, model.sha256)


def test_what_is_not_explained_is_said_before_the_run(
    model: Model, pictures: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    local_steps(model, pictures[:2], 3).negated().save("steps.safetensors")
    args = ["invert", "--observation", "steps.safetensors", "--iterations", "1", "--seeds", "1", "--json"]
    assert cli.main(args) == 0
    told = capsys.readouterr()
    (note,) = (note for note in json.loads(told.out)["recovered"]["notes"] if "not explained" in note)
    lines = told.err.splitlines()
    place = next(index for index, line in enumerate(lines) if line.startswith("Labels restored"))
    assert note in lines[:place] and len(note) <= 300


def test_the_command_takes_an_update_and_a_batch_size(
    model: Model,
    shared: Callable[..., Observation],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    replace(mapped(shared(3), lambda gradient: -0.05 * gradient), batch_size=2).save("update.safetensors")
    plain = ["recover", "--observation", "update.safetensors", "--boundary", "logits", "--json"]
    assert cli.main(plain) == 2
    assert "at least 3 images and not of 2" in capsys.readouterr().err
    assert cli.main([*plain, "--batch-size", "3"]) == 2
    assert "This is an update" in capsys.readouterr().err
    assert cli.main([*plain, "--batch-size", "3", "--update"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert_right(facts["labels"]["restored"], 3)
    assert facts["notes"] == [] and facts["scale"] == pytest.approx(0.05, rel=1e-3)
    assert cli.main(["recover", "lion", "--model", "resnet18-tiny", "--update"]) == 2
    assert "--update is said of an observation" in capsys.readouterr().err


# --- 3. the other forward mode


@pytest.mark.parametrize("change", ["plain", "float16", "bfloat16", "clipped", "GradScaler"])
def test_a_gradient_of_train_mode_is_known_as_one(
    model: Model, shared: Callable[..., Observation], change: str
) -> None:
    for count in (2, 4):
        observation = HEALTHY[change](shared(count, mode="train"))
        examined = examine(model, replace(observation, mode="eval", running=None))
        assert examined.observation.mode == "train"
        (note,) = examined.notes
        assert note.startswith("The gradient was taken in train mode, though the observation says eval")
        assert len(note) <= 300
        assert_right(restore_labels(model, examined.observation).labels, count)


def test_a_gradient_of_eval_mode_that_says_train(model: Model, shared: Callable[..., Observation]) -> None:
    observation = replace(shared(4), mode="train", running=running_statistics(model.network))
    examined = examine(model, observation)
    assert examined.observation.mode == "eval" and examined.observation.running is None
    assert examined.notes[0].startswith("The gradient was taken in eval mode, though the observation says train")


def test_train_mode_and_weight_decay_together(model: Model, shared: Callable[..., Observation]) -> None:
    observation = replace(decayed(model, shared(4, mode="train"), 5e-3), mode="eval", running=None)
    examined = examine(model, observation)
    assert examined.observation.mode == "train" and len(examined.notes) == 2


def test_a_run_of_such_a_gradient_matches_in_train_mode(
    model: Model, shared: Callable[..., Observation], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    replace(shared(2, mode="train"), mode="eval", running=None).save(tmp_path / "o.safetensors")
    args = ["--iterations", "1", "--seeds", "1", "--out", str(tmp_path / "run")]
    assert cli.main(["invert", "--observation", str(tmp_path / "o.safetensors"), *args]) == 0
    told = capsys.readouterr().out
    assert "The gradient was taken in train mode, though" in told and "In train mode batch normalisation mixes" in told
    assert json.loads((tmp_path / "run" / "run.json").read_text())["client"]["mode"] == "train"
