"""The command line: as a process where that matters, else through `main`. Runs are of a few steps at 32 px.

What a setting, a picture, a model or a defence cannot be is tested where it is refused; here, that it is one sentence.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import itertools
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
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from conftest import ENVIRONMENT, PATIENCE, fails, one_sentence, picture
from PIL import Image

import gradinv
from gradinv import cli
from gradinv.attack import inversion
from gradinv.cli import invert as command
from gradinv.cli import task
from gradinv.cli.arguments import parser
from gradinv.cli.progress import signals_set
from gradinv.cli.settings import config_from, settings_given
from gradinv.config import AttackConfig
from gradinv.defenses import clip, quantise
from gradinv.execution.stepping import Stepper
from gradinv.models import MODELS, load_model
from gradinv.recording.replay import Recording
from gradinv.types import GradinvError, Observation, Recovered, Snapshot

pytestmark = pytest.mark.usefixtures("elsewhere")

SMALL = ["--model", "resnet18-tiny", "--image-size", "32", "--device", "cpu"]
QUICK = [*SMALL, "--preset", "matching", "--seeds", "1", "--iterations", "2"]
GOLDFISH, TENCH = "n01443537", "n01440764"  # the bundled models know the first only


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of two pictures, recorded once for all tests, and what was said of it."""
    folder = tmp_path_factory.mktemp("whole")
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as said:
        args = ["invert", "goldfish", "tabby", *QUICK, "--seeds", "2", "--out", "run"]
        assert cli.main(args) == 0
    return folder / "run", said.getvalue()


@pytest.fixture
def recorded(whole):
    """A copy of that run in ./run."""
    return Path(shutil.copytree(whole[0], "run"))


def changed_run(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change what run.json says."""
    run = json.loads((folder / "run.json").read_text())
    change(run)
    (folder / "run.json").write_text(json.dumps(run))


# --- whole runs


def test_invert_prints_the_table_and_keeps_the_run(whole):
    folder, said = whole
    lines, run = said.splitlines(), json.loads((folder / "run.json").read_text())
    assert lines[0] == "resnet18-tiny: 200 classes at 32 × 32 px, top-1 44.5 %, on cpu"
    assert lines[1] == "The client's batch: goldfish, tabby" and lines[-1].startswith("The run is kept in run. ")
    (labels,) = (line for line in lines if line.startswith("Labels restored from the gradient: "))
    assert "(2 of 2 right)" in labels and run["labels"]["method"] in labels and run["labels"]["confidence"] > 0.99
    top = next(index for index, line in enumerate(lines) if line.startswith("#"))
    _, goldfish, tabby, mean = (line.split() for line in lines[top : top + 4])
    assert goldfish[:2] == ["0", "goldfish"] and tabby[:2] == ["1", "tabby"] and mean[0] == "mean"
    of = run["metrics"]
    for name, digits, cells in (("psnr", 2, slice(3, 6)), ("ssim", 3, slice(6, 9))):
        columns = [
            np.mean([seed[name] for seed in of["seeds"]], axis=0),
            of["consensus"][name],
            of["baseline"][name],
        ]
        assert tabby[cells] == [f"{column[1]:.{digits}f}" for column in columns]
        assert mean[cells.start - 2 : cells.stop - 2] == [f"{np.mean(column):.{digits}f}" for column in columns]
    assert tabby[9] == f"{of['consensus']['fft2d'][1]:.3f}"
    assert "distance " in said and "gradient" in said, "the terms"
    assert run["status"] == "done" and run["config"]["seeds"] == 2
    assert (folder / "images" / "consensus_01.png").is_file()


def test_json_is_all_that_stands_in_the_output(tmp_path, capfd):
    assert cli.main(["invert", "lion", *QUICK, "--preset", "demo", "--json"]) == 0
    run = json.loads(capfd.readouterr().out)
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.endswith("-resnet18-tiny")
    assert run == json.loads((folder / "run.json").read_text())
    assert run["iterations"] == {"done": 2, "total": 2}
    # Labels are indices for machines.
    assert run["labels"]["true"] == run["labels"]["restored"] and isinstance(run["labels"]["true"][0], int)


def test_help_and_the_version_are_quick_because_they_leave_torch_alone():
    """On a terminal without Greek letters, too."""
    script = (
        "import sys; from gradinv.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as stop: print('code', stop.code, 'torch' in sys.modules)"
    )
    environment = {**ENVIRONMENT, "PYTHONIOENCODING": "ascii"}
    said = []
    for args in (["--help"], ["models", "--help"], ["invert", "--help"], ["--version"]):
        done = subprocess.run(
            [sys.executable, "-c", script, *args], env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout.endswith("code 0 False\n")
        said.append(done.stdout)
    assert said[-1].startswith(f"gradinv {gradinv.__version__}\n") and "examples:" in said[-2]
    for item in dataclasses.fields(AttackConfig):
        assert f"--{item.name.replace('_', '-')}" in said[-2]


def test_a_reader_that_goes_away(monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with monkeypatch.context() as patched, os.fdopen(writer, "w") as output:  # which is flushed when it is closed
        patched.setattr(sys, "stdout", output)
        assert cli.main(["models"]) == 1
    assert capsys.readouterr().err == ""


# --- bad use


def test_an_output_folder_without_permission(monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "is write-protected; name another with --out" in fails(capsys, "invert", "lion", *QUICK, "--out", "a/b")


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
        (["--random", "2"], "No ImageNet folder was given"),
        (["lionn"], "take lion"),
        (["text.png"], "text.png is not a picture"),
        (["lion", "--class", "lion"], "--class is for picture files"),
        (["mine.png", "--class", "lion", "--class", "tabby"], "given 2 times for 1 picture files"),
        (["mine.png", "--class", "liom"], "did you mean lion?"),
        (["mine.png", "--class", "cat"], "could be Persian cat or Egyptian cat"),
        (["mine.png", "--class", ""], "has no class ''"),
        ([f"{TENCH}/mine.png"], "does not know the class tench of mine"),
        (["lion", "--mode", "eval", "--bn", "inferred"], "In eval mode the client keeps no new running statistics"),
        (["lion", "--defence", "blur:3"], "There is no defence 'blur'"),
        (["lion", "--every", "0"], "--every takes a number of steps of at least 1, not 0."),
        (["lion", "--tv", "-1"], "tv must be a finite number of at least 0"),
        (["lion", "--config", "missing.json"], "The configuration missing.json cannot be read"),
        (["lion", "--config", "text.png"], "The configuration text.png is not JSON"),
        (["lion", "--config", "list.json"], "must be a JSON object"),
        (["lion", "--model", "vgg"], "There is no model or weights file 'vgg'"),
        (["lion", "--seeds", "1000000000"], "take fewer seeds or a smaller batch"),
        (["lion", "--save-observation", "text.png"], "text.png is there already"),
        (["lion", "--out", "full"], "The folder full is not empty"),
        (["lion", "--out", "text.png/run"], "Nothing can be written to text.png/run"),
    ],
)
def test_bad_use_is_one_sentence_and_leaves_nothing(args, sentence, tmp_path, capsys):
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "list.json").write_text("[1]")
    picture(tmp_path / "mine.png")
    picture(tmp_path / TENCH / "mine.png")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    before = sorted(tmp_path.rglob("*"))
    assert sentence in fails(capsys, "invert", *QUICK, *args)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("typed", "sentence"),
    [
        ("", "The following arguments are required: COMMAND; gradinv --help tells more."),
        ("paint", "Argument COMMAND: invalid choice: 'paint' (choose from "),
        ("invert lion --seeds many", "Argument --seeds: a whole number is expected, not 'many'; gradinv "),
        ("invert lion --tv much", "Argument --tv: a number is expected, not 'much'; gradinv invert --help "),
        ("invert lion --match l3", "Argument --match: invalid choice: 'l3' (choose from "),
        ("invert lion --stages a,b", "Argument --stages: numbers separated by commas are expected, not "),
        ("invert lion --seed", "Argument --seed: expected one argument; gradinv invert --help tells more."),
        ("invert lion --iter 3", "Unrecognized arguments: --iter 3; gradinv"),
        ("benchmark --micro-batches x", "Argument --micro-batches: numbers separated by commas are expected"),
        ("replay", "The following arguments are required: "),
        ("identify --imagenet val", "The following arguments are required: --observation"),
    ],
)
def test_mistyped_arguments_are_one_sentence(typed, sentence, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(typed.split())
    assert ended.value.code == 2
    assert sentence in one_sentence(capsys.readouterr().err)


# --- settings


def test_a_configuration_file_stands_between_preset_and_flags():
    Path("settings.json").write_text('{"seeds": 5, "iterations": 7}')
    for given, expected in (
        (["--no-box", "--tv-luma", "2", "--stages", ""], dict(projection=False, tv=1.2, tv_chroma=0.5, stages=())),
        (["--config", "settings.json", "--seeds", "6"], dict(seeds=6, iterations=7)),
    ):
        settings = settings_given(parser().parse_args(["invert", "lion", *given]))
        config = config_from("demo", "resnet18-tiny", settings)
        assert config == AttackConfig.preset("demo", "resnet18-tiny", **expected)


def test_an_earlier_run_is_repeated_exactly(recorded):
    args = ["invert", "goldfish", "tabby", *SMALL, "--config", "run/run.json", "--out", "again"]
    assert cli.main(args) == 0
    first, second = Recording.open(recorded), Recording.open("again")
    assert first.run["config"] == second.run["config"]
    for prefix in ("seed0", "consensus"):
        one, other = first.images(prefix), second.images(prefix)
        assert one is not None and other is not None and torch.equal(one, other)


# --- where pictures and their classes come from


def test_pictures_by_path_and_their_classes(tmp_path, capsys):
    files = [str(picture(tmp_path / "a.png", 1)), str(picture(tmp_path / "b.png", 2)), "goldfish"]
    assert cli.main(["invert", *files, *QUICK, "--class", "LION", "--class", "n02123045", "--out", "run"]) == 0
    assert "The client's batch: lion, tabby, goldfish\n" in capsys.readouterr().out


def test_one_class_for_all_files_and_the_folders_class(tmp_path, capsys):
    files = [str(picture(tmp_path / GOLDFISH / f"{name}.JPEG", seed)) for seed, name in enumerate("ab")]
    assert cli.main(["invert", *files, *QUICK, "--labels", "column-minimum", "--out", "known"]) == 0
    output = capsys.readouterr().out
    assert "The client's batch: goldfish, goldfish\n" in output
    assert "column-minimum restores distinct labels, so at least 1 will be wrong." in output
    assert output.count("(wrong)") == 1
    assert cli.main(["invert", *files, *QUICK, "--class", "lion", "--save-observation", "o.safetensors"]) == 0
    assert "The client's batch: lion, lion\n" in capsys.readouterr().out


def test_files_without_a_class_are_what_the_network_takes_them_for(tmp_path, capsys):
    """Of a large batch some classes are named."""
    files = [str(picture(tmp_path / f"{name}.png", seed)) for seed, name in enumerate("abcdefghijklmno")]
    assert cli.main(["invert", *files, *QUICK, "--save-observation", "o.safetensors"]) == 0
    said = capsys.readouterr().out
    assert "a: no class was given; resnet18-tiny takes it for " in said
    assert re.search(r"The client's batch: (.+, ){11}.+ and 3 more\n", said)


def test_samples_are_drawn_by_the_seed(capsys):
    drawn = []
    for number, (how, seed) in enumerate((("--samples", "3"), ("--batch-size", "3"), ("--batch-size", "4"))):
        args = ["invert", *QUICK, how, "3", "--seed", seed, "--save-observation", f"{number}.safetensors"]
        assert cli.main(args) == 0
        drawn += re.findall("The client's batch: (.*)\n", capsys.readouterr().out)
    assert drawn[0] == drawn[1] != drawn[2] and len(set(drawn[0].split(", "))) == 3


@pytest.mark.parametrize("by_variable", [False, True])
def test_pictures_of_an_imagenet_folder(by_variable, tmp_path, monkeypatch, capsys):
    for seed, wnid in enumerate((GOLDFISH, TENCH)):
        picture(tmp_path / "val" / wnid / f"{wnid}_1.JPEG", seed)
    where = [] if by_variable else ["--imagenet", "val"]
    if by_variable:
        monkeypatch.setenv("GRADINV_IMAGENET", "val")
    assert cli.main(["invert", *QUICK, *where, "--random", "1", "--save-observation", "o.safetensors"]) == 0
    # Only of classes that the model knows.
    assert "The client's batch: goldfish\n" in capsys.readouterr().out


def test_notes_on_a_picture_are_passed_on(tmp_path, capsys):
    Image.new("RGBA", (40, 40), (200, 30, 30, 128)).save(tmp_path / "clear.png")
    assert cli.main(["invert", "clear.png", *QUICK, "--class", "lion", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["status"] == "done"
    assert "transparen" in captured.err


@pytest.mark.parametrize(
    ("bn", "said"),
    [
        ("exact", "The client also shares the exact batch-normalisation statistics"),
        ("approx", "those stored in the weights"),
        ("inferred", "in train mode, in which batch normalisation takes the batch's own"),
        ("none", "are not matched"),
    ],
)
def test_what_the_client_shares_of_bn_statistics_is_said(bn, said, capsys):
    args = ["lion", "tabby", *QUICK, "--bn", bn, "--gradient", "0"]
    assert cli.main(["invert", *args, "--save-observation", "o.safetensors"]) == 0
    output = capsys.readouterr().out
    assert said in output and f"(--bn {bn})" in output
    assert "A control: the gradient is not matched (--gradient 0)" in output
    shared = Observation.load("o.safetensors")
    assert (shared.bn is not None, shared.mode) == (bn == "exact", "train" if bn == "inferred" else "eval")


def test_defences_are_applied_in_order_said_and_recorded(capsys):
    given = ["--defence", "clip:1", "--defence", "quantise:4"]
    assert cli.main(["invert", "lion", *QUICK, *given, "--save-observation", "defended.safetensors"]) == 0
    assert cli.main(["invert", "lion", *QUICK, "--save-observation", "plain.safetensors"]) == 0
    assert not Path("runs").exists()
    first, second = Observation.load("defended.safetensors"), Observation.load("plain.safetensors")
    expected = quantise(clip(second, 1.0), 4)
    # Two passes on several threads may sum in another order; a number next to the middle of two levels then jumps.
    differing = sum(int((first.gradients[name] != value).sum()) for name, value in expected.gradients.items())
    assert differing < 1e-3 * sum(value.numel() for value in expected.gradients.values())
    private = ["--defence", "dp:1,8,1e-5", "--mode", "train", "--out", "run"]
    assert "one value a channel" in fails(capsys, "invert", "lion", *QUICK, *private)
    assert cli.main(["invert", "lion", "tabby", *QUICK, *private]) == 0
    output = capsys.readouterr().out
    assert "Its defence dp:1,8,1e-5: " in output and "(8, 1e-05)-differential privacy" in output
    assert "No defence covers the batch-normalisation statistics that it shares." in output
    assert Recording.open("run").run["client"]["defences"] == ["dp:1,8,1e-5"]


# --- an observation without its pictures


@pytest.fixture(scope="module")
def observed(tmp_path_factory):
    """What the server receives of two pictures, in a file."""
    path = tmp_path_factory.mktemp("observed") / "observation.safetensors"
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert cli.main(["invert", "goldfish", "tabby", *QUICK, "--save-observation", str(path), "--json"]) == 0
    facts = json.loads(said.getvalue())
    assert facts["client"] == {"batch_size": 2, "mode": "eval", "defences": []}
    assert facts["model"]["name"] == "resnet18-tiny" and facts["observation"] == str(path)
    return path


@pytest.fixture
def saved(observed):
    return str(shutil.copy(observed, "observation.safetensors"))


def test_an_observation_is_inverted_without_anything_that_needs_its_pictures(saved, recorded, capsys):
    Path("settings.json").write_text('{"seeds": 2}')
    # Its model and size are its own.
    args = [*QUICK[4:8], "--iterations", "2", "--config", "settings.json"]
    assert cli.main(["invert", "--observation", saved, *args, "--out", "blind"]) == 0
    output = capsys.readouterr().out
    assert "The client's batch" not in output and "right)" not in output and "PSNR" not in output
    assert "Labels restored from the gradient: " in output and "The run is kept in blind." in output
    blind, known = Recording.open("blind"), Recording.open(recorded)
    assert blind.run["labels"]["true"] is None and blind.run["metrics"] is None and blind.originals() is None
    assert blind.run["labels"]["restored"] == known.run["labels"]["restored"]
    # The attack is the same: it never saw more. Only the order is that of the originals where they are known.
    found, wanted = blind.images("seed0"), known.images("seed0")
    assert found is not None and wanted is not None and torch.equal(found[known.order()], wanted)
    assert cli.main(["replay", "blind", "--gif", "blind.gif"]) == 0
    replayed = capsys.readouterr().out
    assert "PSNR" not in replayed and "goldfish" in replayed and Path("blind.gif").is_file()


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
        (["--observation", "missing.safetensors"], "Cannot read an observation from missing.safetensors"),
    ],
)
def test_an_observation_that_something_contradicts(saved, args, sentence, capsys):
    assert cli.main(["invert", "--observation", saved, *QUICK[4:], *args]) == 2
    captured = capsys.readouterr()
    # What cannot be used is not described.
    assert sentence in one_sentence(captured.err) and captured.out == ""
    assert not Path("runs").exists()


def test_an_observation_of_weights_that_have_no_name(saved, capsys):
    dataclasses.replace(Observation.load(saved), model_name="mine").save("mine.safetensors")
    assert "of 'mine', which is not the name of a model; name the weights file with --model" in fails(
        capsys, "invert", "--observation", "mine.safetensors"
    )


def test_an_observation_from_a_plain_training_loop(capsys):
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


# --- resume


LONG = [
    *("goldfish", *QUICK, "--iterations", "24"),
    *("--every", "2", "--noise", "0.1", "--stages", "0.5,0.5", "--defence", "noise:1e-4"),
]


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_a_killed_run_is_shown_and_resumed_to_the_same_bits(tmp_path, capfd):
    """At a random moment of it: after some records, and a random time more."""
    assert cli.main(["invert", *LONG, "--out", "whole"]) == 0
    command = [sys.executable, "-m", "gradinv", "invert", *LONG, "--out", "cut"]
    curves, records, until = Path("cut", "curves.csv"), random.randrange(1, 8), time.monotonic() + PATIENCE
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=-1, stderr=-1) as started:
        while not (curves.is_file() and curves.read_text().count("\n") > records):
            assert started.poll() is None and time.monotonic() < until, "the run did not begin"
            time.sleep(0.005)
        time.sleep(random.random() * 0.3)
        started.kill()
    assert started.returncode == -9
    before = Recording.open("cut")
    assert before.run["status"] == "running" and before.steps[-1] < 24
    assert before.images("consensus") is None
    capfd.readouterr()
    assert cli.main(["replay", "cut"]) == 0
    replayed = capfd.readouterr().out
    assert ": running\n" in replayed and "measured on the last recorded frame, which is lossy" in replayed
    assert cli.main(["invert", "--resume", "cut"]) == 0
    resumed = capfd.readouterr()
    assert resumed.err == "" and "of 24 iterations.\n" in resumed.out and "The run is kept in cut. " in resumed.out
    assert "Its defence noise:1e-4: " in resumed.out, "as it was given"
    folders = (tmp_path / "whole", tmp_path / "cut")
    # A hidden file is what a write that was killed had begun; no reader takes it for a part of the run.
    whole, cut = ({path.relative_to(f): path for path in f.rglob("[!.]*") if path.is_file()} for f in folders)
    assert set(whole) == set(cut), "neither a frame more nor one less"
    for name in whole:
        if name.suffix in (".png", ".webp"):
            assert whole[name].read_bytes() == cut[name].read_bytes(), name
    assert Recording.open("whole").run["metrics"] == Recording.open("cut").run["metrics"]
    assert fails(capfd, "invert", "--resume", "cut") == "The run in cut is done; show it with: gradinv replay cut."


def signalled(monkeypatch: pytest.MonkeyPatch, number: int, evaluations: int, *args: str) -> int:
    """Run `gradinv invert`, which gets a signal after so many evaluations. → its exit code"""
    step, done = Stepper.each, itertools.count()

    def each(*given: Any) -> Any:
        if next(done) == evaluations:
            signal.raise_signal(number)
        return step(*given)

    with monkeypatch.context() as patched:
        patched.setattr(Stepper, "each", each)
        return cli.main(["invert", *args])


def test_a_signal_keeps_the_run(monkeypatch, capsys):
    args = ["goldfish", "tabby", *QUICK, "--iterations", "100000", "--every", "1", "--out", "cut"]
    assert signalled(monkeypatch, signal.SIGTERM, 3, *args) == 143
    said = capsys.readouterr()
    opened = Recording.open("cut")
    assert opened.run["status"] == "stopped" and opened.run["metrics"] is not None
    assert opened.steps == [0, 1, 2, 3]
    assert "after 3 of 100000" in (sentence := one_sentence(said.err)) and "gradinv invert --resume cut" in sentence
    assert "PSNR constant" in said.out


@pytest.fixture
def stopped(monkeypatch, capsys):
    """A run of the user's own weights that was stopped by Ctrl-C before its first step."""
    network = torchvision.models.resnet18(num_classes=3)
    safetensors.torch.save_file(network.state_dict(), "mine.safetensors")
    picture(Path("a.png"))
    args = ["a.png", "--class", "class 1", *QUICK, "--model", "mine.safetensors", "--features", "0", "--out", "run"]
    assert signalled(monkeypatch, signal.SIGINT, 0, *args, "--boundary", "loss") == 130
    capsys.readouterr()
    return "run"


def test_a_stopped_run_of_own_weights_goes_on(stopped, capsys, monkeypatch, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert cli.main(["invert", "--resume", f"../{stopped}", "--json"]) == 0
    captured = capsys.readouterr()
    assert "Resumed after 0 of 2 iterations." in captured.err
    run = json.loads(captured.out)
    assert run["status"] == "done" and run["model"]["name"] == "mine" and run["labels"]["true"] == [1]
    assert Recording.open(f"../{stopped}").steps == [0, 1, 2]


def test_changed_weights_are_not_resumed(stopped, capsys):
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
def test_a_resumed_run_keeps_its_own_settings(args, what, capsys):
    assert fails(capsys, "invert", "--resume", "run", *args) == (
        f"A resumed run keeps its own pictures and settings; leave {what} out."
    )


def test_other_threads_than_before_are_said(stopped, capsys):
    changed_run(Path(stopped), lambda run: run["environment"].update(threads=run["environment"]["threads"] + 1))
    assert cli.main(["invert", "--resume", stopped]) == 0
    assert re.search(r"It ran with threads \d+ and goes on with \d+: the last digits may", capsys.readouterr().out)


def test_a_run_of_a_gpu_is_not_resumed_without_one(stopped, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    changed_run(Path(stopped), lambda run: run["environment"].update(device="cuda:1"))
    assert "is one of a CUDA device, whose random numbers a CPU does not repeat" in fails(
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
    ("error", "code", "status", "sentence", "as_json"),
    [
        (GradinvError("It stopped being finite."), 1, "failed", "It stopped being finite. What had been", False),
        (RuntimeError("no\n kernel"), 1, "failed", "Unexpected RuntimeError: no kernel (--debug shows where).", False),
        (RuntimeError("no\n kernel"), 1, "failed", "Unexpected RuntimeError: no kernel (--debug shows where).", True),
        (KeyboardInterrupt(), 130, "stopped", "Quit at once; what had been recorded", False),
    ],
)
def test_a_run_that_breaks_is_kept_and_shown(error, code, status, sentence, as_json, monkeypatch, capsys):
    monkeypatch.setattr(command, "invert", breaking(error))
    assert cli.main(["invert", "lion", *QUICK, "--out", "run", *(["--json"] if as_json else [])]) == code
    captured = capsys.readouterr()
    said = captured.err.splitlines()[-1]
    assert said.startswith(f"gradinv: {sentence}") and said.endswith(" 1 of 2 iterations is kept in run.")
    recording = Recording.open("run")
    assert recording.run["status"] == status and recording.steps == [0, 1]
    if as_json:
        assert json.loads(captured.out)["status"] == status
        return
    assert cli.main(["replay", "run"]) == 0
    assert f": {status}\n{recording.run.get('error', '')}\n" in capsys.readouterr().out


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setattr(command, "invert", breaking(RuntimeError("no kernel")))
    with pytest.raises(RuntimeError, match="no kernel"):
        cli.main(["invert", "lion", *QUICK, "--out", "a", "--debug"])
    monkeypatch.setenv("GRADINV_DEBUG", "1")
    with pytest.raises(RuntimeError, match="no kernel"):
        cli.main(["invert", "lion", *QUICK, "--out", "b"])
    assert Recording.open("b").run["status"] == "failed"


@pytest.mark.parametrize(
    ("error", "code", "sentence", "module", "name"),
    [
        (ZeroDivisionError(), 1, "Unexpected ZeroDivisionError: no reason given (", task, "observe"),
        (KeyboardInterrupt(), 130, "Interrupted; nothing was kept.", task, "observe"),
        (KeyboardInterrupt(), 130, "Interrupted; nothing was kept.", cli, "import_module"),  # torch
    ],
    ids=["error", "Ctrl-C", "Ctrl-C while importing"],
)
def test_what_breaks_before_the_run(error, code, sentence, module, name, monkeypatch, capsys):
    def broken(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(module, name, broken)
    assert cli.main(["invert", "lion", *QUICK]) == code
    assert one_sentence(capsys.readouterr().err).startswith(sentence)
    assert not Path("runs").exists()


def test_the_first_signal_stops_and_the_second_quits():
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


@pytest.mark.parametrize("known", [True, False])
def test_progress_on_a_terminal_shows_psnr_with_its_baseline_or_not_at_all(known, saved, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    args = ["lion", *QUICK] if known else ["--observation", saved, *QUICK[4:]]
    assert cli.main(["invert", *args, "--iterations", "5", "--every", "2", "--out", "run"]) == 0
    assert Recording.open("run").steps == [0, 2, 4, 5]
    last = terminal.getvalue().split("\r")[-1]
    assert "5/5" in last and "distance 0." in last
    assert (" dB (constant " in last) == ("PSNR" in last) == known


def test_models(capsys):
    assert cli.main(["models"]) == 0
    output = capsys.readouterr().out
    assert cli.main(["models", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["models"]
    assert [row["name"] for row in rows] == list(MODELS)
    for row, info in zip(rows, MODELS.values(), strict=True):
        line = next(line for line in output.splitlines() if line.startswith(f"{info.name} "))
        assert str(info.classes) in line and str(info.accuracy) in line
        assert row["bundled"] is info.bundled and row["accuracy"] == info.accuracy and row["size"] == info.size


def test_replay_shows_the_same_table_and_makes_a_gif(recorded, whole, capsys):
    live = whole[1]
    assert cli.main(["replay", "run", "--gif", "deep/consensus.GIF"]) == 0
    assert live[live.index("#  class") : live.index("The run is kept")] in capsys.readouterr().out
    with Image.open("deep/consensus.GIF") as animation:
        assert animation.format == "GIF" and animation.n_frames == 3  # type: ignore[attr-defined]
    assert "name a file that ends in .gif, not run.png" in fails(capsys, "replay", "run", "--gif", "run.png")
    assert not Path("run.png").exists()
    assert cli.main(["replay", "run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((recorded / "run.json").read_text())


def test_replay_of_a_run_without_originals_or_records(recorded, capsys):
    changed_run(recorded, lambda run: run.update(labels={**run["labels"], "true": None}, metrics=None))
    assert cli.main(["replay", "run"]) == 0
    output = capsys.readouterr().out
    assert "goldfish\n" in output and "PSNR" not in output
    shutil.rmtree(recorded / "frames")
    assert cli.main(["replay", "run"]) == 0
    assert "Nothing was recorded of this run yet." in capsys.readouterr().out
    assert "nothing to animate" in fails(capsys, "replay", "run", "--gif", "a.gif")


def test_replay_of_something_else(tmp_path, capsys):
    assert fails(capsys, "replay", ".") == ". is not a recorded run: it holds no run.json."
    assert "missing is not a recorded run" in fails(capsys, "replay", "missing")
    assert not (tmp_path / "missing").exists()


def first_row(output: str) -> list[str]:
    """The cells of the first picture in a table."""
    return next(line for line in output.splitlines() if line.startswith("0  goldfish")).split()


def test_a_run_recorded_before_there_was_an_fft2d_and_with_an_undefined_number(recorded, whole, capsys):
    def older(run: dict[str, Any]) -> None:
        for measured in (run["metrics"]["consensus"], run["metrics"]["baseline"], *run["metrics"]["seeds"]):
            del measured["fft2d"], measured["lpips"]
        run["metrics"]["consensus"].update(psnr=[None, None])

    changed_run(recorded, older)
    assert "FFT2D" in whole[1]
    assert cli.main(["replay", "run"]) == 0
    output = capsys.readouterr().out
    assert "SSIM constant\n" in output and "FFT2D" not in output and "LPIPS" not in output
    row = first_row(output)
    assert row[4] == "–" and row[3] != "–"


def test_an_lpips_that_cannot_be_had_has_no_column_but_its_reason(recorded, capsys):
    for lpips in (None, 0.25):
        changed_run(recorded, lambda run, lpips=lpips: run["metrics"]["consensus"].update(lpips=[lpips, lpips]))
        assert cli.main(["replay", "run"]) == 0
        output = capsys.readouterr().out
        row = first_row(output)
        assert (row[-1] == "0.250") == ("FFT2D  LPIPS\n" in output) == (lpips is not None)
        assert row[9] != "–", "FFT2D"
        assert ("LPIPS was not measured: it needs " in output) == (lpips is None)
