"""The painters' recipe as a process, on a folder of small generated pictures."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from gradinv.paths import ASSETS
from gradinv.prior import Painter

PATIENCE = 900.0  # seconds after which something hangs; nothing depends on how fast it is
SCRIPT = ASSETS / "models" / "train_painter.py"
OPTIONS = [*("--model", "resnet18-tiny", "--node", "layer2", "--device", "cpu", "--workers", "1"), "--batch-size", "4"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[2]), "OMP_NUM_THREADS": "1"}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *OPTIONS, *arguments]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """One class of pictures, each of one colour: 16 to train with, of which 4 are measured on."""
    root = tmp_path_factory.mktemp("pictures")
    for part, many in (("train", 16), ("val", 4)):
        random = np.random.default_rng(0)
        (root / part / "n01443537").mkdir(parents=True)
        for index in range(many):
            colour = tuple(int(value) for value in random.integers(0, 256, 3))
            Image.new("RGB", (64, 64), colour).save(root / part / "n01443537" / f"{index}.png")
    return ["--train", str(root / "train"), "--val", str(root / "val")]


def test_a_painter_learns_and_goes_on_where_it_was_stopped(folders: list[str], tmp_path: Path) -> None:
    decibels = {}
    for steps in ("2", "40"):
        out = tmp_path / f"painter{steps}.safetensors"
        done = run(*folders, "--out", str(out), "--steps", steps, "--checkpoint-every", "10")
        assert done.returncode == 0, done.stderr
        decibels[steps] = float(re.findall(r"4 validation pictures, error 0: ([\d.-]+) dB", done.stdout)[0])
        state = safetensors.torch.load_file(out)
        Painter(128, 8).load_state_dict({name: value.float() for name, value in state.items()})
        assert {value.dtype for value in state.values()} == {torch.float16}
    assert decibels["40"] > decibels["2"] + 0.5

    # Killed as it writes its third checkpoint, the same command ends with the same weights.
    again, checkpoint = tmp_path / "again.safetensors", tmp_path / "again.checkpoint.pt"
    command = [sys.executable, str(SCRIPT), *OPTIONS, *folders, "--out", str(again), "--steps", "40"]
    with subprocess.Popen(
        [*command, "--checkpoint-every", "10"], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 30:"):
                break
        process.kill()
    assert checkpoint.exists() and not again.exists()
    done = run(*folders, "--out", str(again), "--steps", "40", "--checkpoint-every", "10")
    assert done.returncode == 0 and "Going on after step" in done.stdout, done.stderr
    one, other = safetensors.torch.load_file(out), safetensors.torch.load_file(again)
    assert all(torch.equal(one[name], other[name]) for name in one)
