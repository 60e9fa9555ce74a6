"""The command line: as a process where that matters, otherwise through `main`. Runs are of a few steps at 32 px."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from PIL import Image
from torch import Tensor

import gradinv
from gradinv import cli, client, metrics
from gradinv.attack import inversion
from gradinv.cli.invert import signals_set
from gradinv.cli.settings import config_from, settings_given
from gradinv.config import AttackConfig
from gradinv.defenses import clip, quantise
from gradinv.models import MODELS, load_model
from gradinv.recording import Recording
from gradinv.stepping import Stepper
from gradinv.types import GradinvError, Observation, Recovered, Snapshot

ROOT = Path(gradinv.__file__).resolve().parents[1]
PATIENCE = 900.0  # seconds after which something hangs; nothing depends on how fast it is
QUICK = ["--model", "resnet18-tiny", "--image-size", "32", "--device", "cpu", "--seeds", "1", "--iterations", "2"]
GOLDFISH, TENCH = "n01443537", "n01440764"  # the bundled models know the first only


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **changes}


def process(*args: str, cwd: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gradinv", *args],
        cwd=cwd,
        env=environment(**changes),
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        check=False,
        timeout=PATIENCE,
    )


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs go to runs/ in the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GRADINV_IMAGENET", raising=False)
    monkeypatch.delenv("GRADINV_DEBUG", raising=False)


def fails(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """Run a command that has to fail as bad use: → its one sentence."""
    assert cli.main(args) == 2
    captured = capsys.readouterr()
    return one_sentence(captured.err)


def one_sentence(text: str) -> str:
    assert text.startswith("gradinv: ") and text.endswith("\n") and "Traceback" not in text
    assert len(text.splitlines()) == 1
    return text.removeprefix("gradinv: ").rstrip("\n")


def picture(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    levels = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    # The suffix may be one that Pillow does not know, such as .JPEG in capitals on some systems.
    Image.fromarray(levels).resize((40, 40)).save(path, format="PNG")
    return path


# --- whole runs as a process


def test_invert_prints_the_table_and_keeps_the_run(tmp_path: Path) -> None:
    done = process("invert", "goldfish", "tabby", *QUICK, "--seeds", "2", "--out", "run", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    lines = done.stdout.splitlines()
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert lines[0] == "resnet18-tiny: 200 classes at 32 × 32 px, top-1 44.5 %, on cpu"
    assert lines[1] == "The client's batch: goldfish, tabby"
    assert "batch size 2" in lines[2] and "neither the pictures nor their labels" in lines[3]
    (labels,) = (line for line in lines if line.startswith("Labels restored from the gradient: "))
    assert labels.endswith(f"(2 of 2 right); read by auto: {run['labels']['method']}, confidence 100 %")
    assert run["labels"]["confidence"] > 0.99
    assert "Recovered features leave less than 0.01 % of the final layer's gradient unexplained." in lines
    assert lines[-1] == "The run is kept in run."
    top = next(index for index, line in enumerate(lines) if line.startswith("#"))
    header, goldfish, tabby, mean = (line.split() for line in lines[top : top + 4])
    assert " ".join(header) == (
        "# class restored PSNR seeds PSNR consensus PSNR constant SSIM seeds SSIM consensus SSIM constant FFT2D LPIPS"
    )
    assert goldfish[:2] == ["0", "goldfish"] and tabby[:2] == ["1", "tabby"] and mean[0] == "mean"
    of = run["metrics"]
    for name, digits, cells in (("psnr", 2, slice(-8, -5)), ("ssim", 3, slice(-5, -2))):
        columns = [
            np.mean([seed[name] for seed in of["seeds"]], axis=0),
            of["consensus"][name],
            of["baseline"][name],
        ]
        assert tabby[cells] == [f"{column[1]:.{digits}f}" for column in columns]
        assert mean[cells] == [f"{np.mean(column):.{digits}f}" for column in columns]
    assert tabby[-2] == f"{of['consensus']['fft2d'][1]:.3f}"
    assert run["status"] == "done" and run["config"]["seeds"] == 2
    assert (tmp_path / "run" / "images" / "consensus_01.png").is_file()


def test_json_is_all_that_stands_in_the_output(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["invert", "lion", *QUICK, "--json"]) == 0
    run = json.loads(capfd.readouterr().out)
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.endswith("-resnet18-tiny")
    assert run == json.loads((folder / "run.json").read_text())
    assert run["iterations"] == {"done": 2, "total": 2}
    # Labels are indices for machines.
    assert run["labels"]["true"] == run["labels"]["restored"] and isinstance(run["labels"]["true"][0], int)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
@pytest.mark.parametrize(("number", "code", "status"), [(2, 130, "stopped"), (15, 143, "stopped"), (9, -9, "running")])
def test_a_signal_keeps_the_run(
    number: int, code: int, status: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["invert", "goldfish", "tabby", *QUICK, "--iterations", "100000", "--every", "1", "--out", "run"]
    curves = tmp_path / "run" / "curves.csv"
    with subprocess.Popen(
        [sys.executable, "-m", "gradinv", *args], env=environment(), stdout=-1, stderr=-1, text=True, encoding="utf-8"
    ) as started:
        try:
            until = time.monotonic() + PATIENCE
            while not (curves.is_file() and curves.read_text().count("\n") > 3):
                assert started.poll() is None and time.monotonic() < until, "the run did not begin"
                time.sleep(0.05)
            started.send_signal(number)
            output, complaint = started.communicate(timeout=PATIENCE)
        finally:
            started.kill()
    assert started.returncode == code
    opened = Recording.open(tmp_path / "run")
    assert opened.run["status"] == status
    assert len(opened.steps) >= 3 and len(list(opened.snapshots())) == len(opened.steps)
    if status == "stopped":
        done = opened.run["iterations"]["done"]
        assert (
            one_sentence(complaint)
            == f"Stopped after {done} of 100000 iterations; go on with: gradinv invert --resume run"
        )
        assert "PSNR constant" in output and opened.run["metrics"] is not None
    assert cli.main(["replay", "run"]) == 0
    replayed = capsys.readouterr().out
    assert f": {status}\n" in replayed and "mean" in replayed
    assert ("measured on the last recorded frame, which is lossy" in replayed) == (status == "running")


def test_help_is_quick_because_it_leaves_torch_alone(tmp_path: Path) -> None:
    script = (
        "import sys; from gradinv.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as stop: print('code', stop.code, 'torch' in sys.modules)"
    )
    for args in (["--help"], ["--version"], ["replay", "--help"], ["models", "--help"]):
        done = subprocess.run(
            [sys.executable, "-c", script, *args], env=environment(), capture_output=True, text=True, check=True
        )
        assert done.stdout.endswith("code 0 False\n")


def test_help_names_every_setting_also_on_a_plain_terminal(tmp_path: Path) -> None:
    done = process("invert", "--help", cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and "examples:" in done.stdout
    for item in dataclasses.fields(AttackConfig):
        assert f"--{item.name.replace('_', '-')}" in done.stdout


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out == f"gradinv {gradinv.__version__}\n"


def test_a_reader_that_goes_away(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "gradinv", "models"], env=environment(), stdout=-1, stderr=-1, text=True
    ) as started:
        assert started.stdout is not None and started.stderr is not None
        started.stdout.close()
        assert started.stderr.read() == ""
    assert started.returncode == 1


# --- bad use, where it needs a process or its files


def test_more_pictures_than_classes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    network = torchvision.models.resnet18(num_classes=2)
    safetensors.torch.save_file(network.state_dict(), tmp_path / "two.safetensors")
    files = [str(picture(tmp_path / f"{name}.png", seed)) for seed, name in enumerate("abc")]
    options = ["--preset", "matching", "--model", "two.safetensors", "--image-size", "32", "--out", "run"]
    args = ["invert", *files, *options]
    assert cli.main(args) == 2 and not (tmp_path / "run").exists()
    said = capfd.readouterr()
    assert one_sentence(said.err) == (
        "Features can be recovered for fewer images than the 2 classes, not for 3; "
        "set features to 0 and boundary to loss."
    )
    # Their classes were not given, so the network's own were taken, which is said.
    assert "a: no class was given; two takes it for class " in said.out


def test_weights_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "weights.pth").write_bytes(b"not weights at all")
    done = process("invert", "lion", "--model", "weights.pth", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert "weights.pth cannot be read as weights" in one_sentence(done.stderr)


def test_an_output_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    done = process("invert", "lion", *QUICK, "--out", "file/run", cwd=tmp_path)
    assert done.returncode == 2
    said = f"Nothing can be written to file/run, since {tmp_path / 'file'} is a file; name another with --out."
    assert one_sentence(done.stderr) == said and done.stdout == ""


def test_an_output_folder_without_permission(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "is write-protected; name another with --out" in fails(capsys, "invert", "lion", *QUICK, "--out", "a/b")


def test_more_seeds_than_memory(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sentence = fails(capfd, "invert", "lion", *QUICK, "--seeds", "1000000000", "--out", "run")
    assert "take fewer seeds or a smaller batch" in sentence and not (tmp_path / "run").exists()


# --- bad use


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ([], "Which pictures?"),
        (["--imagenet", "."], "with --random N"),
        (["lion", "--samples", "2"], "either named or drawn"),
        (["--samples", "2", "--random", "2"], "from the gallery (--samples) or a folder (--imagenet), not both"),
        (["--samples", "2", "--batch-size", "3"], "The batch size is 3 and 2 pictures are to be drawn"),
        (["lion", "--batch-size", "2"], "number of pictures named, 1, not 2"),
        (["lion", "--batch-size", "0"], "number of pictures named, 1, not 0"),
        (["--batch-size", "0"], "At least one picture has to be drawn, not 0."),
        (["--samples", "24"], "There are only 23 pictures to draw 24 from"),
        (["--random", "2"], "No ImageNet folder was given"),
        (["lionn"], "take lion"),
        (["baseball"], "The model does not know the class of the gallery's baseball"),
        (["missing.png"], "There is no picture file missing.png"),
        (["text.png"], "text.png is not a picture"),
        (["empty.png"], "empty.png is an empty file"),
        (["lion", "--class", "lion"], "--class is for picture files"),
        (["mine.png", "--class", "lion", "--class", "tabby"], "given 2 times for 1 picture files"),
        (["mine.png", "--class", "unicorn"], "has no class 'unicorn'"),
        (["mine.png", "--class", "liom"], "did you mean lion?"),
        (["mine.png", "--class", "cat"], "could be Persian cat or Egyptian cat"),
        (["mine.png", "--class", ""], "has no class ''"),
        ([f"{TENCH}/mine.png"], "does not know the class tench of mine"),
        (["lion", "--every", "0"], "--every takes a number of steps of at least 1, not 0."),
        (["lion", "--seeds", "0"], "seeds must be a finite number of at least 1"),
        (["lion", "--tv", "nan"], "tv must be a finite number"),
        (["lion", "--tv", "-1"], "tv must be a finite number of at least 0"),
        (["lion", "--stages", "0.5,0.6"], "stages are positive shares"),
        (["lion", "--preset", "best"], "There is no preset 'best'"),
        (["lion", "--config", "missing.json"], "The configuration missing.json cannot be read"),
        (["lion", "--config", "text.png"], "The configuration text.png is not JSON"),
        (["lion", "--config", "list.json"], "must be a JSON object"),
        (["lion", "--config", "unknown.json"], "There is no setting 'steps'"),
        (["lion", "--image-size", "4"], "The image size must be between 8 and 1024 pixels"),
        (["lion", "--device", "nonsense"], "The device nonsense cannot be used here"),
        (["lion", "--out", "full"], "The folder full is not empty"),
    ],
)
def test_bad_use_is_one_sentence_and_leaves_nothing(
    args: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").touch()
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "unknown.json").write_text('{"steps": 3}')
    picture(tmp_path / "mine.png")
    picture(tmp_path / TENCH / "mine.png")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    before = sorted(tmp_path.rglob("*"))
    assert sentence in fails(capsys, "invert", *QUICK, *args)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_unknown_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert "There is no model or weights file 'vgg'" in fails(capsys, "invert", "lion", "--model", "vgg")


def test_weights_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = torchvision.models.resnet18(num_classes=200).state_dict()
    del state["layer3.0.conv1.weight"]
    safetensors.torch.save_file(state, tmp_path / "weights.safetensors")
    sentence = fails(capsys, "invert", "lion", "--model", "weights.safetensors")
    assert "lacks the layer layer3.0.conv1.weight" in sentence


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ((), "The following arguments are required: COMMAND; gradinv --help tells more."),
        (("paint",), "Argument COMMAND: invalid choice: 'paint' (choose from "),
        (
            ("invert", "lion", "--seeds", "many"),
            "Argument --seeds: a whole number is expected, not 'many'; gradinv ",
        ),
        (("invert", "lion", "--tv", "much"), "Argument --tv: a number is expected, not 'much'; gradinv invert --help "),
        (("invert", "lion", "--match", "l3"), "Argument --match: invalid choice: 'l3' (choose from "),
        (
            ("invert", "lion", "--stages", "a,b"),
            "Argument --stages: numbers separated by commas are expected, not ",
        ),
        (("invert", "lion", "--seed"), "Argument --seed: expected one argument; gradinv invert --help tells more."),
        (("invert", "lion", "--iter", "3"), "Unrecognized arguments: --iter 3; gradinv"),
        (("benchmark", "--micro-batches", "x"), "Argument --micro-batches: numbers separated by commas are expected"),
        (("replay",), "The following arguments are required: "),
    ],
    ids=" ".join,
)
def test_mistyped_arguments_are_one_sentence(
    args: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(args)
    assert ended.value.code == 2
    assert sentence in one_sentence(capsys.readouterr().err)


# --- settings


def changed(item: dataclasses.Field[Any]) -> tuple[list[str], Any]:
    """A flag that changes a field, and the value that it then has."""
    flag = "--" + item.name.replace("_", "-")
    if isinstance(item.default, tuple):
        return [flag, "0.25,0.75"], (0.25, 0.75)
    if item.name in ("boundary", "layers"):
        return [flag, "layer3.0.conv1"], "layer3.0.conv1"
    if isinstance(item.default, bool):
        return ([flag], True) if not item.default else ([flag.replace("--", "--no-", 1)], False)
    if choices := item.metadata["choices"]:
        value = next(choice for choice in reversed(choices) if choice != item.default)
        return [flag, value], value
    value = item.default + 3 if isinstance(item.default, int) else item.default + 1 / 3
    return [flag, repr(value)], value


@pytest.mark.parametrize("item", dataclasses.fields(AttackConfig), ids=lambda item: item.name)
def test_every_field_is_an_option(item: dataclasses.Field[Any]) -> None:
    flags, value = changed(item)
    args = cli._parser("invert").parse_args(["invert", "lion", *flags])
    settings = settings_given(args)
    assert settings == {item.name: value}
    assert config_from("paper", "resnet18-tiny", settings) == AttackConfig(**{item.name: value})


def test_what_is_not_given_is_the_presets() -> None:
    args = cli._parser("invert").parse_args(["invert", "lion", "--no-box", "--tv-luma", "2", "--stages", ""])
    config = config_from("demo", "resnet18-tiny", settings_given(args))
    assert config == AttackConfig.preset("demo", "resnet18-tiny", projection=False, tv=1.2, tv_chroma=0.5, stages=())


def test_a_configuration_file_stands_between_preset_and_flags(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text('{"seeds": 5, "iterations": 7}')
    args = cli._parser("invert").parse_args(["invert", "lion", "--config", "settings.json", "--seeds", "6"])
    config = config_from("demo", "resnet18-tiny", settings_given(args))
    assert config == AttackConfig.preset("demo", "resnet18-tiny", seeds=6, iterations=7)


def test_an_earlier_run_is_repeated_exactly(tmp_path: Path) -> None:
    first = [*QUICK, "--seed", "5", "--tv", "0.3", "--match", "l2"]
    assert cli.main(["invert", "lion", *first, "--out", "first"]) == 0
    second = ["--model", "resnet18-tiny", "--image-size", "32", "--device", "cpu", "--config", "first/run.json"]
    assert cli.main(["invert", "lion", *second, "--out", "second"]) == 0
    a, b = Recording.open("first"), Recording.open("second")
    assert a.run["config"] == b.run["config"] and a.run["config"]["tv"] == 0.3
    for prefix in ("seed0", "consensus"):
        one, other = a.images(prefix), b.images(prefix)
        assert one is not None and other is not None and torch.equal(one, other)


# --- where pictures and their classes come from


def true_labels(folder: str = "run") -> list[int]:
    labels: list[int] = json.loads(Path(folder, "run.json").read_text())["labels"]["true"]
    return labels


def test_pictures_by_path_and_their_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(picture(tmp_path / "a.png", 1)), str(picture(tmp_path / "b.png", 2)), "goldfish"]
    assert cli.main(["invert", *files, *QUICK, "--class", "LION", "--class", "n02123045", "--out", "run"]) == 0
    assert "The client's batch: lion, tabby, goldfish\n" in capsys.readouterr().out


def test_one_class_for_all_files_and_the_folders_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(picture(tmp_path / GOLDFISH / f"{name}.JPEG", seed)) for seed, name in enumerate("ab")]
    assert cli.main(["invert", *files, *QUICK, "--labels", "column-minimum", "--out", "known"]) == 0
    output = capsys.readouterr().out
    assert "The client's batch: goldfish, goldfish\n" in output
    assert "Classes repeat: column-minimum restores distinct labels, so at least 1 will be wrong." in output
    assert output.count("(wrong)") == 1
    assert cli.main(["invert", *files, *QUICK, "--class", "lion", "--out", "named"]) == 0
    assert "The client's batch: lion, lion\n" in capsys.readouterr().out


def test_of_a_large_batch_some_classes_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(picture(tmp_path / f"{name}.png", seed)) for seed, name in enumerate("abcdefghijklmno")]
    plain = ["--preset", "matching", "--features", "0", "--boundary", "loss"]
    assert cli.main(["invert", *files, *QUICK, *plain, "--class", "lion", "--out", "run"]) == 0
    assert f"The client's batch: {', '.join(['lion'] * 12)} and 3 more\n" in capsys.readouterr().out


def test_samples_are_drawn_by_the_seed() -> None:
    for folder, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        how = ["--samples", "3"] if folder == "a" else ["--batch-size", "3"]
        assert cli.main(["invert", *QUICK, "--iterations", "1", *how, "--seed", seed, "--out", folder]) == 0
    assert len(set(true_labels("a"))) == 3
    assert true_labels("a") == true_labels("b") != true_labels("c")


@pytest.mark.parametrize("by_variable", [False, True])
def test_pictures_of_an_imagenet_folder(
    by_variable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, wnid in enumerate((GOLDFISH, TENCH)):
        picture(tmp_path / "val" / wnid / f"{wnid}_1.JPEG", seed)
    where = [] if by_variable else ["--imagenet", "val"]
    if by_variable:
        monkeypatch.setenv("GRADINV_IMAGENET", "val")
    assert cli.main(["invert", *QUICK, *where, "--random", "1", "--out", "run"]) == 0
    # Only of classes that the model knows.
    assert "The client's batch: goldfish\n" in capsys.readouterr().out


def test_notes_on_a_picture_are_passed_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGBA", (40, 40), (200, 30, 30, 128)).save(tmp_path / "clear.png")
    assert cli.main(["invert", "clear.png", *QUICK, "--class", "lion", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["status"] == "done"
    assert "transparen" in captured.err


def test_exact_statistics_are_shared_and_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = []
    observe = client.observe

    def watched(*args: Any, share_bn: bool = False, **options: Any) -> Any:
        shared.append(share_bn)
        return observe(*args, share_bn=share_bn, **options)

    monkeypatch.setattr(client, "observe", watched)
    assert cli.main(["invert", "lion", "tabby", *QUICK, "--bn", "exact", "--out", "run"]) == 0
    assert "The client also shares the exact batch-normalisation statistics" in capsys.readouterr().out
    assert cli.main(["invert", "lion", *QUICK, "--bn", "approx", "--out", "other"]) == 0
    assert "those stored in the weights" in capsys.readouterr().out
    assert shared == [True, False]


def test_bn_statistics_of_every_kind_and_the_control_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    said = {
        "approx": "those stored in the weights (--bn approx).",
        "inferred": "inferred from the running ones before and after the client's step (--bn inferred).",
        "none": "are not matched (--bn none).",
    }
    for bn, sentence in said.items():
        args = ["lion", "tabby", *QUICK, "--preset", "matching", "--bn", bn, "--gradient", "0", "--out", bn]
        assert cli.main(["invert", *args]) == 0
        output = capsys.readouterr().out
        assert sentence in output and "A control: the gradient is not matched (--gradient 0)" in output
        run = json.loads(Path(bn, "run.json").read_text())
        mode = "train" if bn == "inferred" else "eval"
        assert run["client"] == {"batch_size": 2, "mode": mode, "defences": []}
        assert ("in train mode, in which batch normalisation takes the batch's own" in output) == (bn == "inferred")


def test_defences_are_applied_in_order_said_and_recorded(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--defence", "clip:1", "--defence", "quantise:4"]
    assert cli.main(["invert", "lion", *QUICK, *given, "--save-observation", "defended.safetensors"]) == 0
    plain = ["invert", "lion", *QUICK, "--save-observation", "plain.safetensors"]
    assert cli.main(plain) == 0 and not Path("runs").exists()
    first, second = Observation.load("defended.safetensors"), Observation.load("plain.safetensors")
    expected = quantise(clip(second, 1.0), 4)
    # Two passes on several threads may sum in another order; a number next to the middle of two levels then jumps.
    differing = sum(int((first.gradients[name] != value).sum()) for name, value in expected.gradients.items())
    assert differing < 1e-3 * sum(value.numel() for value in expected.gradients.values())
    capsys.readouterr()
    assert cli.main(["invert", "lion", *QUICK, "--defence", "dp:1,8,1e-5", "--mode", "train", "--out", "run"]) == 2
    assert "one value a channel" in one_sentence(capsys.readouterr().err)
    private = ["--defence", "dp:1,8,1e-5", "--mode", "train", "--out", "run"]
    assert cli.main(["invert", "lion", "tabby", *QUICK, *private]) == 0
    output = capsys.readouterr().out
    assert "Its defence dp:1,8,1e-5: " in output and "(8, 1e-05)-differential privacy" in output
    assert "No defence covers the batch-normalisation statistics that it shares." in output
    assert Recording.open("run").run["client"]["defences"] == ["dp:1,8,1e-5"]


# --- an observation without its pictures


@pytest.fixture
def saved(capsys: pytest.CaptureFixture[str]) -> str:
    """What the server receives of two pictures, in a file."""
    args = ["invert", "goldfish", "lion", *QUICK, "--save-observation", "observation.safetensors", "--json"]
    assert cli.main(args) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["client"] == {"batch_size": 2, "mode": "eval", "defences": []}
    assert facts["model"]["name"] == "resnet18-tiny" and facts["observation"] == "observation.safetensors"
    return "observation.safetensors"


def test_an_observation_is_inverted_without_anything_that_needs_its_pictures(
    saved: str, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = QUICK[4:]  # model and size are the observation's
    assert cli.main(["invert", "--observation", saved, *quick, "--out", "blind"]) == 0
    output = capsys.readouterr().out
    assert "The client's batch" not in output and "right)" not in output and "PSNR" not in output
    assert "Labels restored from the gradient: " in output and "The run is kept in blind." in output
    assert cli.main(["invert", "goldfish", "lion", *QUICK, "--out", "known"]) == 0
    blind, known = Recording.open("blind"), Recording.open("known")
    assert blind.run["labels"]["true"] is None and blind.run["metrics"] is None and blind.originals() is None
    assert blind.run["labels"]["restored"] == known.run["labels"]["restored"]
    # The attack is the same: it never saw more. Only the order is that of the originals where they are known.
    found, wanted = blind.images("seed0"), known.images("seed0")
    assert found is not None and wanted is not None and torch.equal(found[known.order()], wanted)
    capsys.readouterr()
    assert cli.main(["replay", "blind", "--gif", "blind.gif"]) == 0
    replayed = capsys.readouterr().out
    assert "PSNR" not in replayed and "goldfish" in replayed and Path("blind.gif").is_file()
    Path("settings.json").write_text('{"tv": 0.3}')
    args = ["invert", "--observation", saved, *quick, "--config", "settings.json", "--json", "--out", "json"]
    assert cli.main(args) == 0
    run = json.loads(capsys.readouterr().out)
    assert run["config"]["tv"] == 0.3 and run["metrics"] is None and run["status"] == "done"


def test_progress_without_originals_has_no_psnr(saved: str, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert cli.main(["invert", "--observation", saved, *QUICK[4:], "--preset", "matching", "--every", "1"]) == 0
    last = terminal.getvalue().split("\r")[-1]
    assert "2/2" in last and "distance 0." in last and "PSNR" not in last


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["lion"], "inverted without any pictures; leave the picture lion or --observation out"),
        (["--samples", "2"], "leave --samples or --observation out"),
        (["--class", "lion", "--class", "lion", "--class", "lion"], "3 times for an observation of 2 pictures"),
        (["--mode", "train"], "leave --mode or --observation out"),
        (["--model", "resnet50-tiny"], "is of the network resnet18-tiny (sha256 1e839035…), not of resnet50-tiny"),
        (["--image-size", "64"], "The observation is of 32-px images, the model is set to 64 px"),
        (["--bn", "exact"], "The client did not share its BN statistics, so bn=exact is not possible"),
        (["--bn", "inferred"], "did not share its running statistics after the step"),
        (["--observation", "missing.safetensors"], "Cannot read an observation from missing.safetensors"),
    ],
)
def test_an_observation_that_something_contradicts(
    saved: str, args: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["invert", "--observation", saved, *QUICK[4:], *args]) == 2
    captured = capsys.readouterr()
    # What cannot be used is not described.
    assert sentence in one_sentence(captured.err) and captured.out == ""
    assert not Path("runs").exists()


def test_an_observation_of_weights_that_have_no_name(saved: str, capsys: pytest.CaptureFixture[str]) -> None:
    dataclasses.replace(Observation.load(saved), model_name="mine").save("mine.safetensors")
    assert "of 'mine', which is not the name of a model; name the weights file with --model" in fails(
        capsys, "invert", "--observation", "mine.safetensors"
    )


def test_an_observation_from_a_plain_training_loop(capsys: pytest.CaptureFixture[str]) -> None:
    """What the README shows: nothing of gradinv touches the loop itself."""
    model = load_model("resnet18-tiny", device="cpu", image_size=32)
    network = copy.deepcopy(model.network)
    inputs, labels = torch.randn(2, 3, 32, 32), torch.tensor([0, 3])
    torch.nn.functional.cross_entropy(network(inputs), labels).backward()
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    Observation(gradients, len(inputs), model.preprocessing, model.name, model.sha256).save("mine.safetensors")
    assert cli.main(["invert", "--observation", "mine.safetensors", *QUICK[4:], "--out", "run"]) == 0
    assert sorted(Recording.open("run").run["labels"]["restored"]) == [0, 3]
    capsys.readouterr()


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["lion", "--mode", "eval", "--bn", "inferred"], "In eval mode the client keeps no new running statistics"),
        (["lion", "--defence", "blur:3"], "There is no defence 'blur'"),
        (["lion", "--defence", "prune:2"], "The share that is pruned must be"),
        (["lion", "--save-observation", "missing/o.safetensors"], "Cannot write the observation to missing"),
        (["--resume", "missing"], "missing is not a recorded run"),
    ],
)
def test_what_the_client_cannot_share(args: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    quick = [] if "--resume" in args else QUICK
    assert sentence in fails(capsys, "invert", *args, *quick)
    assert not Path("runs").exists()


# --- resume


LONG = [
    *("--model", "resnet18-tiny", "--image-size", "32", "--device", "cpu", "--seeds", "1", "--iterations", "24"),
    *("--preset", "matching"),  # slow enough to be killed on the way
    *("--every", "2", "--noise", "0.1", "--stages", "0.5,0.5", "--defence", "noise:1e-4"),
]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
def test_a_killed_run_is_resumed_to_the_same_bits(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """At a random moment of it: after some records, and a random time more."""
    assert cli.main(["invert", "goldfish", *LONG, "--out", "whole"]) == 0
    capfd.readouterr()
    curves = tmp_path / "cut" / "curves.csv"
    with subprocess.Popen(
        [sys.executable, "-m", "gradinv", "invert", "goldfish", *LONG, "--out", "cut"],
        env=environment(),
        stdout=-1,
        stderr=-1,
    ) as started:
        until, records = time.monotonic() + PATIENCE, random.randrange(1, 8)
        while not (curves.is_file() and curves.read_text().count("\n") > records):
            assert started.poll() is None and time.monotonic() < until, "the run did not begin"
            time.sleep(0.005)
        time.sleep(random.random() * 0.3)
        started.send_signal(signal.SIGKILL)
        started.communicate(timeout=PATIENCE)
    assert started.returncode == -9
    before = Recording.open(tmp_path / "cut")
    assert before.run["status"] == "running" and before.steps[-1] < 24
    assert before.images("consensus") is None
    done = process("invert", "--resume", "cut", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    assert "of 24 iterations.\n" in done.stdout and "Its defence noise:0.0001" not in done.stdout
    assert "Its defence noise:1e-4: " in done.stdout and "The run is kept in cut.\n" in done.stdout
    whole, cut = ({p.relative_to(d): p.read_bytes() for p in d.rglob("*") if p.is_file()} for d in folders(tmp_path))
    assert set(whole) == set(cut), "neither a frame more nor one less"
    for name in whole:
        if name.suffix in (".png", ".webp"):
            assert whole[name] == cut[name], name
    assert Recording.open(tmp_path / "whole").run["metrics"] == Recording.open(tmp_path / "cut").run["metrics"]
    assert fails(capfd, "invert", "--resume", "cut") == "The run in cut is done; show it with: gradinv replay cut."


def folders(path: Path) -> tuple[Path, Path]:
    return path / "whole", path / "cut"


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """A run of the user's own weights that was stopped by Ctrl-C before its first step."""
    network = torchvision.models.resnet18(num_classes=3)
    safetensors.torch.save_file(network.state_dict(), "mine.safetensors")
    picture(Path("a.png"))
    step = Stepper.each

    def signalled(*args: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return step(*args)

    monkeypatch.setattr(Stepper, "each", signalled)
    args = ["a.png", "--class", "class 1", *QUICK, "--model", "mine.safetensors", "--features", "0", "--out", "run"]
    assert cli.main(["invert", *args, "--preset", "matching", "--boundary", "loss"]) == 130
    monkeypatch.setattr(Stepper, "each", step)
    capsys.readouterr()
    return "run"


def test_a_stopped_run_of_own_weights_goes_on(
    stopped: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert cli.main(["invert", "--resume", f"../{stopped}", "--json"]) == 0
    captured = capsys.readouterr()
    assert "Resumed after 0 of 2 iterations." in captured.err
    run = json.loads(captured.out)
    assert run["status"] == "done" and run["model"]["name"] == "mine" and run["labels"]["true"] == [1]
    assert Recording.open(f"../{stopped}").steps == [0, 1, 2]


def test_changed_weights_are_not_resumed(stopped: str, capsys: pytest.CaptureFixture[str]) -> None:
    network = torchvision.models.resnet18(num_classes=3)
    safetensors.torch.save_file(network.state_dict(), "mine.safetensors")
    sentence = fails(capsys, "invert", "--resume", stopped)
    assert "mine.safetensors have changed since the run in run" in sentence and "start it again" in sentence
    Path("mine.safetensors").unlink()
    assert "There is no model or weights file" in fails(capsys, "invert", "--resume", stopped)
    assert Recording.open(stopped).run["status"] == "stopped"


@pytest.mark.parametrize(
    ("args", "what"),
    [
        (["lion"], "the picture lion"),
        (["--samples", "2"], "--samples"),
        (["--class", "lion"], "--class"),
        (["--defence", "none"], "--defence"),
        (["--model", "resnet18-tiny"], "--model"),
        (["--preset", "paper"], "--preset"),
        (["--out", "x"], "--out"),
        (["--observation", "x"], "--observation"),
        (["--no-projection"], "--projection"),
        (["--tv-form", "rgb"], "--tv-form"),
    ],
)
def test_a_resumed_run_keeps_its_own_settings(args: list[str], what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert fails(capsys, "invert", "--resume", "run", *args) == (
        f"A resumed run keeps its own pictures and settings; leave {what} out."
    )


def test_other_threads_than_before_are_said(stopped: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(stopped, "run.json")
    run = json.loads(path.read_text())
    run["environment"]["threads"] += 1
    path.write_text(json.dumps(run))
    assert cli.main(["invert", "--resume", stopped]) == 0
    assert re.search(r"It ran with threads \d+ and goes on with \d+: the last digits may", capsys.readouterr().out)


def test_a_run_of_a_gpu_is_not_resumed_without_one(stopped: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(stopped, "run.json")
    run = json.loads(path.read_text())
    run["environment"]["device"] = "cuda:1"
    path.write_text(json.dumps(run))
    if not torch.cuda.is_available():
        assert "is one of a CUDA device, whose random numbers a CPU does not repeat; resume it on" in fails(
            capsys, "invert", "--resume", stopped
        )


# --- runs that end badly


def breaking(error: BaseException) -> Any:
    """An inversion that raises after its second snapshot."""

    def stream(observation: Any, config: AttackConfig) -> Iterator[Snapshot]:
        pixels = torch.rand(config.seeds, observation.batch_size, 3, 32, 32)
        for step in (0, 1):
            yield Snapshot(step, config.iterations, pixels, pixels.mean(0), {}, (), 0.5 * step, (0,))
        raise error

    class Broken(inversion.Snapshots):
        def state(self) -> inversion.RunState:
            return inversion.RunState(0, 0.0, {})

    def invert(model: Any, observation: Any, config: AttackConfig, **_: Any) -> Broken:
        run: Any = SimpleNamespace(config=config)
        return Broken(run, stream(observation, config), Recovered(torch.tensor([0]), "given", 1.0))  # type: ignore[arg-type]

    return invert


@pytest.mark.parametrize(
    ("error", "code", "status", "sentence"),
    [
        (
            GradinvError("The objective stopped being finite."),
            1,
            "failed",
            "The objective stopped being finite. What had been recorded after 1 of 2 iterations is kept in run.",
        ),
        (
            RuntimeError("no\n kernel"),
            1,
            "failed",
            "Unexpected RuntimeError: no kernel (--debug shows where). "
            "What had been recorded after 1 of 2 iterations is kept in run.",
        ),
        (
            KeyboardInterrupt(),
            130,
            "stopped",
            "Quit at once; what had been recorded of 1 of 2 iterations is kept in run.",
        ),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_a_run_that_breaks_is_kept(
    error: BaseException,
    code: int,
    status: str,
    sentence: str,
    as_json: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(inversion, "invert", breaking(error))
    assert cli.main(["invert", "lion", *QUICK, "--out", "run", *(["--json"] if as_json else [])]) == code
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1] == f"gradinv: {sentence}"
    assert Recording.open("run").run["status"] == status and Recording.open("run").steps == [0, 1]
    if as_json:
        assert json.loads(captured.out)["status"] == status


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inversion, "invert", breaking(RuntimeError("no kernel")))
    with pytest.raises(RuntimeError, match="no kernel"):
        cli.main(["invert", "lion", *QUICK, "--out", "a", "--debug"])
    monkeypatch.setenv("GRADINV_DEBUG", "1")
    with pytest.raises(RuntimeError, match="no kernel"):
        cli.main(["invert", "lion", *QUICK, "--out", "b"])
    assert Recording.open("b").run["status"] == "failed"


def test_an_unexpected_error_before_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(client, "observe", broken)
    assert cli.main(["invert", "lion", *QUICK]) == 1
    assert one_sentence(capsys.readouterr().err) == (
        "Unexpected ZeroDivisionError: no reason given (--debug shows where)."
    )


def test_interrupted_before_the_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(client, "observe", interrupted)
    assert cli.main(["invert", "lion", *QUICK]) == 130
    assert one_sentence(capsys.readouterr().err) == "Interrupted; nothing was kept."
    assert not Path("runs").exists()


def test_a_gradient_that_is_not_finite(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    observe = client.observe

    def poisoned(*args: Any, **options: Any) -> Any:
        observation = observe(*args, **options)
        first = next(iter(observation.gradients))
        return dataclasses.replace(
            observation, gradients={**observation.gradients, first: observation.gradients[first] * float("nan")}
        )

    monkeypatch.setattr(client, "observe", poisoned)
    assert "not finite" in fails(capsys, "invert", "lion", *QUICK)
    assert not Path("runs").exists()


def test_the_first_signal_stops_and_the_second_quits() -> None:
    stop = threading.Event()
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with signals_set(stop) as received:
        signal.raise_signal(signal.SIGINT)
        assert stop.is_set() and received == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


# --- what is shown


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal_never_shows_psnr_without_its_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert cli.main(["invert", "lion", *QUICK, "--preset", "matching", "--every", "1"]) == 0
    last = terminal.getvalue().split("\r")[-1]
    assert "2/2" in last and "distance 0." in last
    assert " dB (constant " in last.split("PSNR")[1]


def test_every_decides_what_is_recorded() -> None:
    assert cli.main(["invert", "lion", *QUICK, "--iterations", "5", "--every", "2", "--out", "run"]) == 0
    assert Recording.open("run").steps == [0, 2, 4, 5]


def test_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models"]) == 0
    output = capsys.readouterr().out
    assert cli.main(["models", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["models"]
    assert [row["name"] for row in rows] == list(MODELS)
    for row, info in zip(rows, MODELS.values(), strict=True):
        line = next(line for line in output.splitlines() if line.startswith(f"{info.name} "))
        assert str(info.classes) in line and str(info.accuracy) in line
        assert row["bundled"] is info.bundled and row["accuracy"] == info.accuracy and row["size"] == info.size


def test_replay_shows_the_same_table_and_makes_a_gif(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["invert", "goldfish", "lion", *QUICK, "--preset", "matching", "--out", "run"]) == 0
    live = capsys.readouterr().out
    assert cli.main(["replay", "run", "--gif", "deep/consensus.gif"]) == 0
    replayed = capsys.readouterr().out
    table = live[live.index("#  class") : live.index("The run is kept")]
    assert table in replayed and "distance " in table and "gradient" in table
    with Image.open(tmp_path / "deep" / "consensus.gif") as animation:
        assert animation.format == "GIF" and animation.n_frames == 3  # type: ignore[attr-defined]
    assert cli.main(["replay", "run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "run" / "run.json").read_text())


def test_replay_of_a_run_without_originals_or_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["invert", "lion", *QUICK, "--out", "run"]) == 0
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    unknown = {**run, "labels": {**run["labels"], "true": None}, "metrics": None}
    (tmp_path / "run" / "run.json").write_text(json.dumps(unknown))
    capsys.readouterr()
    assert cli.main(["replay", "run"]) == 0
    output = capsys.readouterr().out
    assert "0  lion\n" in output and "PSNR" not in output
    shutil.rmtree(tmp_path / "run" / "frames")
    assert cli.main(["replay", "run"]) == 0
    assert "Nothing was recorded of this run yet." in capsys.readouterr().out
    assert "nothing to animate" in fails(capsys, "replay", "run", "--gif", "a.gif")


def test_replay_of_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fails(capsys, "replay", ".") == ". is not a recorded run: it holds no run.json."
    assert "missing is not a recorded run" in fails(capsys, "replay", "missing")
    assert not (tmp_path / "missing").exists()


def test_replay_names_what_went_wrong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(inversion, "invert", breaking(GradinvError("The objective stopped being finite.")))
    cli.main(["invert", "lion", *QUICK, "--out", "run"])
    capsys.readouterr()
    assert cli.main(["replay", "run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(": failed") and lines[1] == "The objective stopped being finite."


def test_an_undefined_number_is_a_dash(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["invert", "lion", *QUICK, "--out", "run"]) == 0
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    run["metrics"]["consensus"]["psnr"] = [None]
    (tmp_path / "run" / "run.json").write_text(json.dumps(run))
    capsys.readouterr()
    assert cli.main(["replay", "run"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("0  lion")).split()
    assert row[4] == "–" and row[3] != "–"


def test_a_run_recorded_before_there_was_an_fft2d(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["invert", "lion", *QUICK, "--out", "run"]) == 0
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    for measured in (run["metrics"]["consensus"], run["metrics"]["baseline"], *run["metrics"]["seeds"]):
        del measured["fft2d"], measured["lpips"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(run))
    assert "FFT2D" in capsys.readouterr().out
    assert cli.main(["replay", "run"]) == 0
    output = capsys.readouterr().out
    assert "SSIM constant\n" in output and "FFT2D" not in output and "LPIPS" not in output


def test_an_lpips_that_cannot_be_had_is_a_dash_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent(*_: Tensor) -> Tensor:
        raise GradinvError("LPIPS needs the package lpips.")

    monkeypatch.setattr(metrics, "lpips", absent)
    assert cli.main(["invert", "lion", *QUICK, "--out", "run"]) == 0
    output = capsys.readouterr().out
    row = next(line for line in output.splitlines() if line.startswith("0  lion")).split()
    assert row[-1] == "–" and row[-2] != "–" and "LPIPS was not measured: it needs " in output
    monkeypatch.setattr(metrics, "lpips", lambda images, originals: torch.full((len(images),), 0.25))
    assert cli.main(["invert", "lion", *QUICK, "--out", "other"]) == 0
    output = capsys.readouterr().out
    row = next(line for line in output.splitlines() if line.startswith("0  lion")).split()
    assert row[-1] == "0.250" and "LPIPS was not measured" not in output


def test_ctrl_c_while_torch_is_imported_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def interrupted(_: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_parser", interrupted)
    assert cli.main(["invert", "lion"]) == 130
    assert capsys.readouterr().err == "gradinv: Interrupted; nothing was kept.\n"
