"""`gradinv head` on a random ResNet-18 at 32 px and pictures whose classes are colours."""

from __future__ import annotations

import hashlib
import json
import os
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import scipy.optimize
import torch
import torchvision
from conftest import one_sentence
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from gradinv import backbones, cli, models
from gradinv.cli import head
from gradinv.gallery import pooled
from gradinv.images import to_pixels
from gradinv.models import MODELS, ModelInfo, load_model
from gradinv.sources import ImageFolder

COLOURS = {"n01443537": (220, 120, 20), "n02129165": (20, 160, 60), "n07920052": (40, 20, 200)}
SMALL = ["head", "--device", "cpu", "--image-size", "32"]

pytestmark = pytest.mark.usefixtures("elsewhere")


def make_folder(root: Path, count: int, seed: int, wnids: tuple[str, ...] = tuple(COLOURS)) -> Path:
    """Pictures in ImageNet layout, of noise around a class's colour."""
    generator = np.random.default_rng(seed)
    for wnid in wnids:
        (root / wnid).mkdir(parents=True)
        for index in range(count):
            levels = np.array(COLOURS[wnid]) + generator.normal(0, 40, (32, 32, 3))
            image = Image.fromarray(levels.clip(0, 255).astype(np.uint8))
            image.save(root / wnid / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def encoder():
    """Random weights of a ResNet-18 without its final layer."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = torchvision.models.resnet18().state_dict()
    return {name: value for name, value in state.items() if not name.startswith("fc.")}


@pytest.fixture
def backbone(elsewhere, encoder):
    safetensors.torch.save_file(encoder, "backbone.safetensors", metadata={"arch": "resnet18"})
    return "backbone.safetensors"


@pytest.fixture
def folder(elsewhere):
    return str(make_folder(Path("train"), 10, seed=0))


@pytest.fixture
def fit(backbone, folder):
    """Fits a final layer to the backbone and the pictures, and writes it to a file. → the exit code"""

    def fit(out: str, *more: str) -> int:
        return cli.main([*SMALL, "--imagenet", folder, "--model", backbone, "--out", out, *more])

    return fit


def sentence(capsys: pytest.CaptureFixture[str], *args: str, code: int = 2) -> str:
    """Run `gradinv head` and expect it to fail with one sentence: → that."""
    assert cli.main([*SMALL, *args]) == code
    *aside, last = capsys.readouterr().err.splitlines(keepends=True)
    assert not any(line.startswith("gradinv: ") for line in aside)
    return one_sentence(last)


# --- the fit


def objective(parameters: np.ndarray, z: np.ndarray, labels: np.ndarray, decay: float) -> float:
    """Σ cross-entropy + decay / 2 · ‖W‖² of standardised features, in double precision."""
    classes = labels.max() + 1
    weight, bias = parameters[:-classes].reshape(classes, -1), parameters[-classes:]
    logits = z @ weight.T + bias
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(labels)), labels]
    return float(losses.sum() + decay / 2 * (weight**2).sum())


def noisy(count: int = 90) -> tuple[Tensor, Tensor]:
    """Features (N, 4) of very different scales, none near zero, and labels (N,) of three classes that overlap."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 3
    z = torch.randn(count, 4, generator=generator) + F.one_hot(labels, 4)
    return z * torch.tensor([1.0, 100.0, 0.01, 3.0]) + torch.tensor([5.0, 300.0, 1.0, -2.0]), labels


def test_fit_finds_the_minimum_that_scipy_finds(monkeypatch):
    monkeypatch.setattr(head, "CHUNK", 32)  # parts of unequal length
    features, labels = noisy()
    weight, bias, passes = head.fit(features, labels, 3, epochs=100, decay=5)
    z = features.double()
    z = ((z - z.mean(0)) / z.std(0, correction=0)).numpy()
    found = scipy.optimize.minimize(objective, np.zeros(15), (z, labels.numpy(), 5.0), tol=1e-10)
    best = z @ found.x[:12].reshape(3, 4).T + found.x[12:]
    logits = F.linear(features, weight, bias)
    probabilities = F.softmax(torch.from_numpy(best), 1)
    assert torch.allclose(F.softmax(logits, 1).double(), probabilities, atol=2e-3)
    assert 5 < passes <= 100


def test_fit_does_not_depend_on_scales_nor_on_chance():
    features, labels = noisy()
    first, second = (head.fit(features, labels, 3, epochs=30, decay=5) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    scaled = head.fit(features * 64, labels, 3, epochs=30, decay=5)
    assert torch.allclose(scaled[0] * 64, first[0], rtol=1e-3, atol=1e-4)


def test_a_feature_that_never_changes_gets_no_weight():
    features, labels = noisy()
    features[:, 3] = 7.0
    weight, bias, _ = head.fit(features, labels, 3, epochs=30, decay=5)
    assert not weight[:, 3].any() and weight[:, :3].all() and bias.isfinite().all()


def test_held_out_pictures_are_of_every_class_and_leave_one():
    labels = torch.tensor([0] * 10 + [1] * 20 + [2])
    pictures = head._Pictures(torch.arange(31.0)[:, None], labels, ["a", "b", "c"])
    fitted, held_out = head._split(pictures, 0.2, seed=0)
    assert held_out.labels.bincount(minlength=3).tolist() == [2, 4, 0]
    assert sorted(fitted.features.flatten().tolist() + held_out.features.flatten().tolist()) == list(range(31))
    assert torch.equal(head._split(pictures, 0.2, seed=0)[1].features, held_out.features)
    assert not torch.equal(head._split(pictures, 0.2, seed=1)[1].features, held_out.features)


# --- the command


def test_a_fitted_network_is_complete(fit, encoder, folder, capsys):
    """It knows its classes by name, keeps the backbone, recognises new pictures, and can be attacked."""
    assert fit("new/own.safetensors", "--held-out", "0.2", "--json") == 0
    said = capsys.readouterr()
    result = json.loads(said.out)
    assert result["pictures"] == {"fitted": 24, "held_out": 6} and result["classes"] == 3
    assert result["accuracy"]["held_out"] >= 80 and result["backbone"]["arch"] == "resnet18"
    assert "24 pictures of 3 classes to fit, 6 to measure" in said.err

    model = load_model("new/own.safetensors", device="cpu")
    assert [item.name for item in model.classes] == ["goldfish", "lion", "espresso"]
    assert model.preprocessing.size == 32 and model.accuracy == result["accuracy"]["held_out"]
    assert all(torch.equal(model.network.state_dict()[name], value) for name, value in encoder.items())
    new = ImageFolder(make_folder(Path("new pictures"), 5, seed=9))
    pixels = torch.stack(
        [to_pixels(picture.open(), model.preprocessing) for wnid in COLOURS for picture in new.pictures(wnid)]
    )
    assert (model.predict(pixels) == torch.arange(3).repeat_interleave(5)).float().mean() >= 0.8
    # What the attack makes use of: the final layer takes means of what left a ReLU.
    features = pooled(model, pixels)
    assert (features >= 0).all() and features.any()

    attack = ["invert", "--imagenet", folder, "--random", "2", "--model", "new/own.safetensors", "--device", "cpu"]
    assert cli.main([*attack, "--preset", "matching", "--seeds", "1", "--iterations", "1", "--out", "run"]) == 0
    assert f"3 classes at 32 × 32 px, top-1 {model.accuracy:g} %" in capsys.readouterr().out


def test_the_file_says_where_it_comes_from(fit, backbone):
    assert fit("own.safetensors") == 0
    with safetensors.safe_open("own.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["backbone"] == "backbone, backbone.safetensors" and metadata["arch"] == "resnet18"
    assert metadata["backbone_sha256"] == hashlib.sha256(Path(backbone).read_bytes()).hexdigest()
    assert json.loads(metadata["fit"])["pictures"] == {"fitted": 27, "held_out": 3}


def test_features_are_computed_once(fit, monkeypatch):
    """The second fit needs no pass through the network, and the third finds what the second found."""
    assert fit("first.safetensors") == 0

    def fail(*_: object) -> None:
        raise AssertionError("a picture was looked at again")

    monkeypatch.setattr("gradinv.gallery.pooled", fail)
    assert fit("second.safetensors") == fit("third.safetensors") == 0
    second, third = (safetensors.torch.load_file(f"{name}.safetensors") for name in ("second", "third"))
    assert all(torch.equal(value, third[name]) for name, value in second.items())


def test_a_second_folder_measures(fit, folder, capsys):
    """Its classes are matched by their ids, and those that the first lacks are left out."""
    part = make_folder(Path("part"), 8, seed=1, wnids=("n02129165", "n07920052"))
    assert fit("own.safetensors", "--imagenet", str(part), "--val", folder, "--json") == 0
    said = capsys.readouterr()
    result = json.loads(said.out)
    assert result["pictures"] == {"fitted": 16, "held_out": 20} and result["accuracy"]["held_out"] >= 80
    assert "Classes of the second folder that the first lacks are left out: 1." in said.err


def test_moco_is_found_by_its_name_once_it_is_fitted(tmp_path, encoder, folder, monkeypatch, capsys):
    info = ModelInfo(
        "resnet50-moco", "", arch="resnet18", size=32, classes=1000, accuracy=71.1, origin="", headless=True
    )
    monkeypatch.setitem(MODELS, "resnet50-moco", info)
    attack = ["invert", "--imagenet", folder, "--random", "2", "--model", "resnet50-moco", "--device", "cpu"]
    attack += ["--preset", "matching", "--seeds", "1", "--iterations", "1"]
    assert cli.main(attack) == 2
    assert "has no final layer yet; fit one once with `gradinv head --imagenet DIR`" in capsys.readouterr().err

    path = tmp_path / "cache" / "models" / backbones.MOCO_URL.rsplit("/", 1)[-1]
    path.parent.mkdir(parents=True)
    torch.save({"state_dict": {f"module.encoder_q.{name}": value for name, value in encoder.items()}}, path)
    monkeypatch.setattr(backbones, "_MOCO_MD5", hashlib.md5(path.read_bytes()).hexdigest()[:8])
    assert cli.main(["head", "--device", "cpu", "--imagenet", folder]) == 0
    assert "attack it with --model resnet50-moco" in capsys.readouterr().out
    model = load_model("resnet50-moco", device="cpu")
    # Not of the thousand classes that a record of a run takes those of resnet50-moco for.
    assert model.name == "resnet50-moco-3" and model.class_name(0) == "goldfish"
    assert cli.main([*attack, "--out", "run"]) == 0

    monkeypatch.setattr(models, "imagenet_classes", lambda: model.classes)
    assert load_model("resnet50-moco", device="cpu").name == "resnet50-moco"


# --- what can go wrong


def test_nothing_to_fit_to(tmp_path, backbone, capsys):
    options = ["--model", backbone, "--out", "own.safetensors", "--imagenet"]
    assert "set GRADINV_IMAGENET" in sentence(capsys, *options[:-1])
    assert "There is no folder" in sentence(capsys, *options, "nowhere")
    (tmp_path / "empty").mkdir()
    assert "holds no class folders" in sentence(capsys, *options, "empty")
    (tmp_path / "empty" / "n01443537").mkdir()
    assert "holds no pictures" in sentence(capsys, *options, "empty")
    make_folder(tmp_path / "one", 4, seed=0, wnids=("n02129165",))
    assert "All pictures are of one class, n02129165; a final layer needs at least two" in sentence(
        capsys, *options, "one"
    )
    Image.new("RGB", (32, 32)).save(tmp_path / "empty" / "loose.png")
    assert "The class folders of empty hold no pictures" in sentence(capsys, *options, "empty")
    assert not Path("own.safetensors").exists()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--held-out", "0.01"], "A share of 0.01 of so few pictures is none"),
        (["--held-out", "1.5"], "between 0 and 1, not 1.5"),
        (["--val", "train/../train"], "names the folder that is fitted to"),
        (["--val", "other"], "no class in common"),
        (["--epochs", "0"], "--epochs takes a number of at least 1, not 0"),
        (["--decay", "-1"], "--decay takes a number of at least 0, not -1"),
        (["--decay", "nan"], "--decay takes a number of at least 0, not nan"),
    ],
)
def test_settings_that_cannot_be(args, said, backbone, folder, capsys):
    Path("other/n00000001").mkdir(parents=True)
    Image.new("RGB", (32, 32)).save("other/n00000001/a.png")
    options = ["--model", backbone, "--imagenet", folder, "--out", "own.safetensors"]
    assert said in sentence(capsys, *options, *args)
    assert not Path("own.safetensors").exists()


def test_output_that_cannot_be_written_is_said_first(backbone, folder, monkeypatch, capsys):
    """Before the hours that the features of a million pictures take."""

    def fail(*_: object, **__: object) -> Any:
        raise AssertionError("the work began")

    monkeypatch.setattr("gradinv.gallery.Gallery.of", fail)
    options = ["--model", backbone, "--imagenet", folder]
    assert "with --out FILE" in sentence(capsys, *options)
    assert "ends in .safetensors, not own.pth" in sentence(capsys, *options, "--out", "own.pth")
    Path("there.safetensors").touch()
    assert "is there already" in sentence(capsys, *options, "--out", "there.safetensors")
    Path("folder.safetensors").mkdir()
    assert "is a folder" in sentence(capsys, *options, "--out", "folder.safetensors")
    assert "cannot be written (there.safetensors is a file)" in sentence(
        capsys, *options, "--out", "there.safetensors/own.safetensors"
    )
    Path("closed").mkdir(mode=0o500)
    if os.geteuid():  # nothing is closed to the superuser
        assert "(Permission denied)" in sentence(capsys, *options, "--out", "closed/own.safetensors")


def test_full_disk_leaves_nothing(backbone, folder, capsys):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        text = sentence(capsys, "--model", backbone, "--imagenet", folder, "--out", "out/own.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "out/own.safetensors cannot be written" in text and os.listdir("out") == []


@pytest.mark.parametrize("where", ["gradinv.cli.head.fit", "gradinv.gallery.pooled"])
def test_interrupted(where, backbone, folder, monkeypatch, capsys):
    def interrupt(*_: object, **__: object) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(where, interrupt)
    options = ["--model", backbone, "--imagenet", folder, "--out", "out/own.safetensors"]
    said = sentence(capsys, *options, code=130)
    assert "No network was written." in said and ("call again to go on" in said) == where.endswith("pooled")
    assert os.listdir("out") == []


def test_weights_that_overflow(tmp_path, encoder, folder, capsys):
    weights = {**encoder, **{f"layer4.1.bn{index}.weight": torch.full((512,), 3e38) for index in (1, 2)}}
    torch.save(weights, tmp_path / "huge.pth")
    text = sentence(capsys, "--model", "huge.pth", "--imagenet", folder, "--out", "own.safetensors")
    assert "huge gives features that are not finite" in text
