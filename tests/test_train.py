"""The training recipes, on folders of small generated pictures."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import re
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from PIL import Image
from torch.nn import functional as F

from gradinv.images import to_pixels
from gradinv.metrics import ssim
from gradinv.models import load_model
from gradinv.paths import ASSETS
from gradinv.prior import Decoder, Painter
from gradinv.sources import ImageFolder

RECIPES = ASSETS / "models"
COLOURS = {"n01440764": (200, 40, 40), "n01443537": (40, 200, 40), "n02129165": (40, 40, 200)}
SIZE = 40


def run(recipe: str, *args: object) -> str:
    """What a recipe prints, run in this process to save the imports."""
    with contextlib.redirect_stdout(io.StringIO()) as printed, torch.random.fork_rng():
        main = runpy.run_path(str(RECIPES / f"{recipe}.py"))["main"]
        main(["--device", "cpu", *map(str, args)])
    return printed.getvalue()


def stopped(recipe: str, monkeypatch: pytest.MonkeyPatch, *args: object) -> None:
    """Run a recipe until Ctrl-C comes, while it writes its second checkpoint."""
    save, saved = torch.save, itertools.count(1)

    def interrupted(*given: Any) -> None:
        save(*given)
        if next(saved) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(SystemExit) as ended:
        patched.setattr(torch, "save", interrupted)
        run(recipe, *args)
    assert ended.value.code == 130


def refused(recipe: str, capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """What a recipe says when it refuses."""
    with pytest.raises(SystemExit) as ended:
        run(recipe, *args)
    return capsys.readouterr().err if isinstance(ended.value.code, int) else str(ended.value.code)


def same_weights(one: Path, other: Path) -> bool:
    first, second = safetensors.torch.load_file(one), safetensors.torch.load_file(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(autouse=True)
def recipes_import_each_other(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))


# --- a classifier


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three classes that differ in colour, noisy: 8 training and 4 validation pictures of each."""
    root, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for part, many in (("train", 8), ("val", 4)):
        for wnid, colour in COLOURS.items():
            (root / part / wnid).mkdir(parents=True)
            for index in range(many):
                noisy = np.clip(random.normal(colour, 40, (16, 16, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(noisy).save(root / part / wnid / f"{index}.png")
    return root


def options(data: Path, out: Path, *more: str) -> list[object]:
    folders = ["--train", data / "train", "--val", data / "val", "--out", out]
    network = ["--arch", "resnet18", "--sizes", "32", "40", "40", "--batch-size", "8", "--learning-rate", "0.05"]
    return [*folders, *network, "--workers", "1", *more]


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """The weights of a run without interruption, and what it printed."""
    out = tmp_path_factory.mktemp("whole") / "colours.safetensors"
    return out, run("train", *options(data, out))


def test_two_processes_decode_the_same(data):
    from train import read_all  # type: ignore[import-not-found, unused-ignore]

    one, two = (read_all(data / "val", sorted(COLOURS), SIZE, workers) for workers in (1, 2))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    assert one[0].shape == (12, 3, SIZE, SIZE) and one[1].bincount().tolist() == [4, 4, 4]


def test_training_learns_the_classes(trained):
    _, printed = trained
    epochs = re.findall(r"epoch (\d) of 3, (\d+) px: loss ([\d.]+), top-1 ([\d.]+) %", printed)
    assert [(epoch, side) for epoch, side, _, _ in epochs] == [("1", "32"), ("2", "40"), ("3", "40")]
    losses = [float(loss) for _, _, loss, _ in epochs]
    assert losses[-1] < 0.8 * losses[0]
    assert float(epochs[-1][3]) > 60  # a guess is right in a third


def test_weights_load_as_a_model_that_classifies(trained, data):
    out, printed = trained
    assert [path.name for path in out.parent.iterdir()] == [out.name]  # neither checkpoint nor half a file
    with safetensors.safe_open(out, framework="pt") as file:
        metadata = file.metadata()
    state = safetensors.torch.load_file(out)
    assert {value.dtype for value in state.values()} == {torch.float16}
    assert not any(name.endswith("num_batches_tracked") for name in state)
    assert metadata["arch"] == "resnet18" and json.loads(metadata["classes"]) == sorted(COLOURS)
    model = load_model(str(out), device="cpu")
    assert (model.preprocessing.size, [c.wnid for c in model.classes]) == (SIZE, sorted(COLOURS))
    right = []
    folder = ImageFolder(data / "val")
    for label, wnid in enumerate(sorted(COLOURS)):
        pixels = torch.stack([to_pixels(picture.open(), model.preprocessing) for picture in folder.pictures(wnid)])
        right += (model.predict(pixels) == label).tolist()
    assert model.accuracy == pytest.approx(100 * np.mean(right), abs=0.06)
    assert f"top-1 {metadata['accuracy']} %" in printed.splitlines()[-1]


def test_a_stopped_run_goes_on_to_the_same_weights(trained, data, tmp_path, capsys, monkeypatch):
    out = tmp_path / "colours.safetensors"
    arguments = options(data, out, "--checkpoint-every", "2")
    stopped("train", monkeypatch, *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["colours.checkpoint.pt"]
    assert "Stopped. The same command goes on from " in capsys.readouterr().err
    assert "was made with other seed" in refused("train", capsys, *arguments, "--seed", "1")
    printed = run("train", *arguments)
    assert "Going on after step 2 from" in printed and same_weights(out, trained[0])
    assert printed.splitlines()[-2] == trained[1].splitlines()[-2]  # loss and accuracy of the last epoch


def test_wrong_use_is_one_sentence(data, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    assert "--sizes must be at least 32" in refused("train", capsys, *options(data, out, "--sizes", "16", "32"))
    (tmp_path / "train").mkdir()
    assert "holds no class folders" in refused("train", capsys, *options(tmp_path, out))
    (data / "val" / "n00000001").mkdir()
    assert "the class n00000001, which the training pictures lack" in refused("train", capsys, *options(data, out))
    (data / "val" / "n00000001").rmdir()
    out.touch()
    assert "is there already; remove it or name another file" in refused("train", capsys, *options(data, out))


# --- what paints a picture from features, or from activations


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One class of pictures, each of one colour: 16 to train with, of which 4 are measured on."""
    root = tmp_path_factory.mktemp("pictures")
    for part, many in (("train", 16), ("val", 4)):
        random = np.random.default_rng(0)
        (root / part / "n01443537").mkdir(parents=True)
        for index in range(many):
            Image.new("RGB", (64, 64), tuple(map(int, random.integers(0, 256, 3)))).save(
                root / part / "n01443537" / f"{index}.png"
            )
    return ["--train", root / "train", "--val", root / "val", "--model", "resnet18-tiny", "--workers", "1"]


def test_a_painter_learns_and_goes_on_where_it_was_stopped(folders, tmp_path, monkeypatch):
    def arguments(out: Path, steps: int) -> list[object]:
        node = ["--node", "layer2", "--batch-size", 4, "--out", out]
        return [*folders, *node, "--steps", steps, "--checkpoint-every", 10]

    decibels = {}
    for steps in (2, 40):
        printed = run("train_painter", *arguments(out := tmp_path / f"painter{steps}.safetensors", steps))
        decibels[steps] = float(re.findall(r"4 validation pictures, error 0: ([\d.-]+) dB", printed)[0])
        state = safetensors.torch.load_file(out)
        Painter(128, 8).load_state_dict({name: value.float() for name, value in state.items()})
        assert {value.dtype for value in state.values()} == {torch.float16}
    assert decibels[40] > decibels[2] + 0.5

    again = tmp_path / "again.safetensors"
    stopped("train_painter", monkeypatch, *arguments(again, 40))
    assert not again.exists()
    assert "Going on after step 10" in run("train_painter", *arguments(again, 40)) and same_weights(again, out)


def test_a_decoder_learns_and_is_written_as_it_is_read(folders, tmp_path, capsys):
    decibels = {}
    for epochs in (1, 16):
        arguments = [*folders, "--out", out := tmp_path / f"decoder{epochs}.safetensors", "--epochs", epochs]
        printed = run("train_decoder", *arguments, "--batch-size", 16, "--learning-rate", "2e-3")
        decibels[epochs] = float(re.findall(r"4 validation pictures: ([\d.]+) dB", printed)[0])
        state = safetensors.torch.load_file(out)
        Decoder(512).load_state_dict({name: value.float() for name, value in state.items()})
        assert {value.dtype for name, value in state.items() if name != "scale"} == {torch.float16}
    assert decibels[16] > decibels[1] + 0.5
    assert "is there already; remove it" in refused("train_decoder", capsys, *arguments)
    missing = ["--train", tmp_path / "none", *folders[2:], "--out", tmp_path / "other.safetensors"]
    assert str(tmp_path / "none") in refused("train_decoder", capsys, *missing)


def test_the_decoders_similarity_is_that_of_the_metrics():
    import train_decoder  # type: ignore[import-not-found, unused-ignore]

    generator = torch.Generator().manual_seed(0)
    originals = F.interpolate(torch.rand(3, 3, 8, 8, generator=generator), (32, 32), mode="bilinear")
    images = (originals + 0.1 * torch.randn(originals.shape, generator=generator)).clamp(0, 1)
    found = train_decoder.similarity(images.double(), originals.double())
    assert torch.allclose(found, ssim(images, originals), atol=1e-9)
