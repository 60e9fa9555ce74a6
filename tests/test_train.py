"""The training recipe as a process, on a folder of small generated pictures."""

from __future__ import annotations

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from PIL import Image

from gradinv.images import to_pixels
from gradinv.models import load_model
from gradinv.paths import ASSETS
from gradinv.sources import ImageFolder

SCRIPT = ASSETS / "models" / "train.py"
COLOURS = {"n01440764": (200, 40, 40), "n01443537": (40, 200, 40), "n02129165": (40, 40, 200)}
SIZE = 40
PATIENCE = 900.0  # seconds after which something hangs; nothing depends on how fast it is


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes that differ in colour, noisy: 8 training and 4 validation pictures of each."""
    root = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for part, many in (("train", 8), ("val", 4)):
        for wnid, colour in COLOURS.items():
            (root / part / wnid).mkdir(parents=True)
            for index in range(many):
                noisy = np.clip(random.normal(colour, 40, (16, 16, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(noisy).save(root / part / wnid / f"{index}.png")
    return root


def options(data: Path, out: Path, *more: str) -> list[str]:
    folders = ["--train", str(data / "train"), "--val", str(data / "val"), "--out", str(out)]
    network = ["--arch", "resnet18", "--sizes", "32", "40", "40", "--batch-size", "8", "--learning-rate", "0.05"]
    return [*folders, *network, "--workers", "1", "--device", "cpu", *more]


COMMAND = [sys.executable, str(SCRIPT)]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[2]), "OMP_NUM_THREADS": "1"}


def run(arguments: list[str]) -> str:
    """What the script prints when it is run as a process, which must succeed."""
    done = subprocess.run([*COMMAND, *arguments], env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What it says when it refuses, run in this process to save the imports."""
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT))["main"](arguments)
    return capsys.readouterr().err if isinstance(ended.value.code, int) else str(ended.value.code)


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The weights of a run without interruption, which decodes in two processes, and what it printed."""
    out = tmp_path_factory.mktemp("whole") / "colours.safetensors"
    return out, run(options(data, out, "--workers", "2"))


def test_training_learns_the_classes(trained: tuple[Path, str]) -> None:
    _, printed = trained
    epochs = re.findall(r"epoch (\d) of 3, (\d+) px: loss ([\d.]+), top-1 ([\d.]+) %", printed)
    assert [(epoch, side) for epoch, side, _, _ in epochs] == [("1", "32"), ("2", "40"), ("3", "40")]
    losses = [float(loss) for _, _, loss, _ in epochs]
    assert losses[-1] < 0.8 * losses[0]
    assert float(epochs[-1][3]) > 60  # a guess is right in a third


def test_weights_load_as_a_model_that_classifies(trained: tuple[Path, str], data: Path) -> None:
    out, printed = trained
    assert [path.name for path in out.parent.iterdir()] == [out.name]  # neither checkpoint nor half a file
    with safetensors.safe_open(out, framework="pt") as file:
        metadata = file.metadata()
        kinds = {file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118 (not a dict)
        assert not any(name.endswith("num_batches_tracked") for name in file.keys())  # noqa: SIM118
    assert kinds == {torch.float16}
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


def test_killed_run_goes_on_to_the_same_weights(
    trained: tuple[Path, str], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "colours.safetensors"
    checkpoint = tmp_path / "colours.checkpoint.pt"
    arguments = options(data, out, "--checkpoint-every", "2")
    quiet = subprocess.DEVNULL
    with subprocess.Popen([*COMMAND, *arguments], env=ENVIRONMENT, stdout=quiet, stderr=quiet) as process:
        while not checkpoint.exists() and process.poll() is None:
            time.sleep(0.005)
        process.kill()
    assert process.returncode == -signal.SIGKILL and not out.exists()
    step = torch.load(checkpoint, weights_only=True)["step"]
    assert 0 < step < 9

    assert "was made with other seed" in refused([*arguments, "--seed", "1"], capsys)
    printed = run(arguments)
    assert f"Going on after step {step} from" in printed
    whole, parts = (safetensors.torch.load_file(path) for path in (trained[0], out))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert printed.splitlines()[-2] == trained[1].splitlines()[-2]  # loss and accuracy of the last epoch


def test_wrong_use_is_one_sentence(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.safetensors"
    assert "--sizes must be at least 32" in refused(options(data, out, "--sizes", "16", "32"), capsys)
    (tmp_path / "train").mkdir()
    assert "holds no class folders" in refused(options(tmp_path, out), capsys)
    (data / "val" / "n00000001").mkdir()
    assert "has the class n00000001, which the training pictures lack" in refused(options(data, out), capsys)
    (data / "val" / "n00000001").rmdir()
    out.touch()
    assert "is there already; remove it or name another file" in refused(options(data, out), capsys)
