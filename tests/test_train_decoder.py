"""The decoders' recipe as a process, on a folder of small generated pictures."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch.nn import functional as F

from gradinv.metrics import ssim
from gradinv.paths import ASSETS
from gradinv.prior import Decoder

PATIENCE = 900.0  # seconds after which something hangs; nothing depends on how fast it is
SCRIPT = ASSETS / "models" / "train_decoder.py"
OPTIONS = ["--model", "resnet18-tiny", "--device", "cpu", "--workers", "1"]
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


def test_a_decoder_learns_and_is_written_as_it_is_read(
    folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    decibels = {}
    for epochs in ("1", "16"):
        out = tmp_path / f"decoder{epochs}.safetensors"
        done = run(*folders, "--out", str(out), "--epochs", epochs, "--batch-size", "16", "--learning-rate", "2e-3")
        assert done.returncode == 0, done.stderr
        decibels[epochs] = float(re.findall(r"4 validation pictures: ([\d.]+) dB", done.stdout)[0])
        state = safetensors.torch.load_file(out)
        Decoder(512).load_state_dict({name: value.float() for name, value in state.items()})
        assert {value.dtype for name, value in state.items() if name != "scale"} == {torch.float16}
    assert decibels["16"] > decibels["1"] + 0.5
    with pytest.raises(SystemExit) as refused:  # in this process, to save the imports
        runpy.run_path(str(SCRIPT))["main"]([*OPTIONS, *folders, "--out", str(out)])
    assert refused.value.code == 2 and "is there already; remove it" in capsys.readouterr().err


def test_its_similarity_is_that_of_the_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import train_decoder  # type: ignore[import-not-found, unused-ignore]

    generator = torch.Generator().manual_seed(0)
    originals = F.interpolate(torch.rand(3, 3, 8, 8, generator=generator), (32, 32), mode="bilinear")
    images = (originals + 0.1 * torch.randn(originals.shape, generator=generator)).clamp(0, 1)
    found = train_decoder.similarity(images.double(), originals.double())
    assert torch.allclose(found, ssim(images, originals), atol=1e-9)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    done = run("--train", str(tmp_path / "none"), "--val", str(tmp_path), "--out", str(tmp_path / "d.safetensors"))
    assert done.returncode == 1 and "Traceback" not in done.stderr and str(tmp_path / "none") in done.stderr
