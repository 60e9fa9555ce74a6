"""Several ranks against one process: on the small network by `check_…`, which torchrun starts, and as a command.

The checks are pytest's too, in each of the ranks: see `test_ranks_agree_with_one_process`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import ENVIRONMENT, PATIENCE, PLAIN, ROOT

from gradinv import cli
from gradinv.attack.inversion import invert
from gradinv.execution import distributed
from gradinv.execution.distributed import ALONE, Ranks, joined
from gradinv.models import Model
from gradinv.recording.replay import Recording
from gradinv.types import GradinvError, Observation, Snapshot

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node"]

CONFIG = dataclasses.replace(PLAIN, seeds=4, iterations=12, noise=0.2, stages=(0.5, 0.5), registration="lazy")


def test_each_seed_belongs_to_one_rank() -> None:
    for count, seeds in itertools.product((1, 2, 3, 5), (5, 6, 8, 13)):
        shares = [Ranks(rank, count).share(seeds) for rank in range(count)]
        assert [index for share in shares for index in share] == list(range(seeds))
        assert {len(share) for share in shares} <= {seeds // count, -(-seeds // count)}
        assert [Ranks(0, count).share(seeds, rank) for rank in range(count)] == shares


def test_more_ranks_than_seeds_are_refused() -> None:
    with pytest.raises(GradinvError, match=r"^3 ranks cannot share 1 seed; .* --nproc-per-node=1\.$"):
        Ranks(2, 3).share(1)


def test_each_rank_takes_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    ranks = Ranks(1, 4)
    ranks.check(torch.device("cpu"))
    ranks.check(torch.device("cuda:1"))
    ALONE.check(torch.device("cuda:0"))
    with pytest.raises(GradinvError, match="so cuda:0 is not for all; take --device cuda"):
        ranks.check(torch.device("cuda:0"))
    with pytest.raises(GradinvError, match="not on mps; take --device cpu"):
        ranks.check(torch.device("mps"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(GradinvError, match=r"2 ranks on a machine with 1 CUDA devices.*--nproc-per-node=1"):
        ranks.check(torch.device("cuda:1"))


def test_without_torchrun_there_is_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")  # others set that as well
    with joined() as ranks:
        assert ranks == ALONE
    assert ALONE.any(True, False) == [True, False]
    with pytest.raises(KeyError, match="its own"), ALONE.together():
        raise KeyError("its own")


@pytest.mark.slow
def test_ranks_agree_with_one_process(tmp_path: Path) -> None:
    """Three of them over gloo, with 4, 5 or 7 seeds; each in a folder of its own, as they would clear one another's."""
    pytest_ = f"{sys.executable} -m pytest -q -x -p no:cacheprovider -o python_functions=check_"
    checks = ["--no-python", "sh", "-c", f"exec {pytest_} --basetemp '{tmp_path}'/$RANK {__file__}"]
    done = subprocess.run([*TORCHRUN, "3", *checks], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    functions = [name for name in globals() if name.startswith("check_")]
    assert done.stdout.count(" passed") == 3 and f"{len(functions) + 4} passed" in done.stdout, done.stdout


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    with joined() as ranks:
        yield ranks


def check_what_cannot_be_run_is_said_once(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("gradinv.cli.invert.joined", lambda: contextlib.nullcontext(ranks))
    code = cli.main(["invert", "goldfish", *SMALL, "--seeds", "1", "--out", str(tmp_path / "run")])
    assert (code != 0) == (ranks.rank == 0)
    said = complaints(capsys.readouterr().err)
    assert [line.startswith("gradinv: 3 ranks cannot share 1 seed; ") for line in said] == [True] * (ranks.rank == 0)
    assert not (tmp_path / "run").exists()


def check_what_they_say_to_one_another(ranks: Ranks) -> None:
    assert ranks.count == 3
    assert ranks.any(ranks.rank == 2, False, ranks.rank == 0) == [True, False, True]
    mine = torch.tensor(ranks.share(7), dtype=torch.float64)[:, None] * torch.ones(3)
    assert torch.equal(ranks.sum(mine), torch.full((3,), 21.0, dtype=torch.float64))
    assert torch.equal(ranks.gather(mine, 7)[:, 1], torch.arange(7, dtype=torch.float64))
    told = ranks.tell({"tensor": torch.arange(3.0), "rank": ranks.rank})
    assert told is not None and told["rank"] == 0 and torch.equal(told["tensor"], torch.arange(3.0))
    with (
        pytest.raises(GradinvError, match="the second" if ranks.rank == 0 else "On rank 1: it was the second"),
        ranks.together(),
    ):
        if ranks.rank == 1:
            raise ValueError("it was the second")
    with pytest.raises(KeyError if ranks.rank == 0 else GradinvError, match="each"), ranks.together():
        raise KeyError("each")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"group": 0.1, "seeds": 7},
        {"group": 0.1, "registration": "affine", "registration_start": 0.3, "registration_interval": 0.25},
        {"group": 0.1, "registration": "affine", "registration_start": 0.0, "optimiser_step": "sign", "seeds": 5},
        {"group": 0.1, "registration": "affine", "registration_start": 0.6, "features": 0.5, "projection": True},
    ],
)
def check_every_snapshot(
    changes: dict[str, object], ranks: Ranks, small_model: Model, observation: Observation
) -> None:
    config = dataclasses.replace(CONFIG, **changes)  # type: ignore[arg-type]
    alone = invert(small_model, observation, config, every=1)
    shared = invert(small_model, observation, config, every=1, ranks=ranks)
    for one, all_of_them in zip(alone, shared, strict=True):
        same(one, all_of_them, exact=config.group == 0)
    expected, found = alone.state().tensors, shared.state().tensors
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4 if value.is_floating_point() else 0)


def same(expected: Snapshot, found: Snapshot, *, exact: bool = False) -> None:
    close = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-4, "atol": 1e-4}
    assert found.step == expected.step and found.labels == expected.labels
    torch.testing.assert_close(found.seeds, expected.seeds, **close)
    torch.testing.assert_close(found.consensus, expected.consensus, rtol=1e-4, atol=1e-4)
    assert found.distance == pytest.approx(expected.distance, abs=close["atol"])
    assert found.terms.keys() == expected.terms.keys()
    for name, term in expected.terms.items():
        assert found.terms[name].raw == pytest.approx(term.raw, rel=close["rtol"], abs=close["atol"])
        assert found.terms[name].weighted == pytest.approx(term.weighted, rel=close["rtol"], abs=close["atol"])


def check_either_goes_on_with_what_the_other_left(ranks: Ranks, small_model: Model, observation: Observation) -> None:
    *_, whole = invert(small_model, observation, CONFIG)
    for before, after in ((ranks, ALONE), (ALONE, ranks)):
        stream = invert(small_model, observation, CONFIG, every=1, ranks=before)
        next(snapshot for snapshot in stream if snapshot.step == 7)
        *_, last = invert(small_model, observation, CONFIG, resume=stream.state(), ranks=after)
        same(whole, last, exact=True)


def check_one_that_is_stopped_stops_all(ranks: Ranks, small_model: Model, observation: Observation) -> None:
    config = dataclasses.replace(CONFIG, stepping="eager")
    *_, whole = invert(small_model, observation, config)
    # By whoever looks at a snapshot.
    stop = threading.Event()
    steps = []
    for snapshot in invert(small_model, observation, config, every=3, stop=stop, ranks=ranks):
        steps.append(snapshot.step)
        if ranks.rank == 1 and snapshot.step == 3:
            stop.set()
    assert steps == [0, 3]
    # Within the sixth step of rank 2, which has two seeds and takes them in turn.
    stop, calls, forward = threading.Event(), itertools.count(), small_model.network.forward

    def counted(x: torch.Tensor) -> torch.Tensor:
        if ranks.rank == 2 and next(calls) == 10:
            stop.set()
        return forward(x)

    small_model.network.forward = counted  # type: ignore[method-assign]
    stream = invert(small_model, observation, config, stop=stop, ranks=ranks)
    *_, last = stream
    del small_model.network.forward
    assert last.step == 5 and not last.final
    *_, resumed = invert(small_model, observation, config, resume=stream.state())
    same(whole, resumed, exact=True)


def check_the_clock_of_one_shows_all(ranks: Ranks, small_model: Model, observation: Observation) -> None:
    interval = 0.0 if ranks.rank == 1 else math.inf
    steps = [s.step for s in invert(small_model, observation, CONFIG, interval=interval, ranks=ranks)]
    assert steps == list(range(13))


def check_one_that_diverges_ends_all(ranks: Ranks, small_model: Model, observation: Observation) -> None:
    stream = invert(small_model, observation, CONFIG, every=1, ranks=ranks)
    next(stream), next(stream)
    if ranks.rank == 1:
        with torch.no_grad():
            small_model.network.fc.weight.fill_(math.nan)  # type: ignore[union-attr, operator]
    with pytest.raises(GradinvError, match="stopped being finite at iteration 2"):
        next(stream)


SMALL = ["--model", "resnet18-tiny", "--image-size", "32", "--device", "cpu", "--labels", "column-minimum"]
RUN = [
    *("goldfish", *SMALL, "--layers", "layer4", "--seeds", "3", "--iterations", "16"),
    *("--every", "1", "--noise", "0.2", "--group", "0.1"),
    *("--registration", "affine", "--registration-start", "0.5", "--registration-interval", "0.1"),
]


def start(cwd: Path, *args: str) -> subprocess.Popen[str]:
    command = [*TORCHRUN, "2", "-m", "gradinv", "invert", *args]
    return subprocess.Popen(command, cwd=cwd, env=ENVIRONMENT, stdout=-1, stderr=-1, text=True, encoding="utf-8")


def after_records(started: subprocess.Popen[str], run: Path, count: int) -> list[int]:
    """Wait until so many steps are recorded. → the processes of the ranks, by rank."""
    until = time.monotonic() + PATIENCE
    while not (run / f"frames/{count:06d}.webp").is_file():
        assert started.poll() is None and time.monotonic() < until, "the run did not begin"
        time.sleep(0.02)
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if int((process / "stat").read_text().rsplit(")", 1)[1].split()[1]) == started.pid:
                named = dict(entry.split("=", 1) for entry in (process / "environ").read_text().split("\0") if entry)
                found[int(named["RANK"])] = int(process.name)
        except OSError:  # another process that has just ended, or is not ours
            continue
    return [found[rank] for rank in sorted(found)]


def complaints(errors: str) -> list[str]:
    """What gradinv itself said to the standard error, beside what torchrun says."""
    return [line for line in errors.splitlines() if line.startswith("gradinv: ")]


def test_want_of_memory_is_not_taken_for_a_lost_rank() -> None:
    with pytest.raises(torch.OutOfMemoryError), distributed._connected():
        raise torch.OutOfMemoryError("CUDA out of memory.")
    with pytest.raises(GradinvError, match=r"^A rank was lost"), distributed._connected():
        raise RuntimeError("Connection closed by peer")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").is_file(), reason="finds the ranks' processes in /proc")
def test_a_run_that_loses_a_rank_and_is_stopped_ends_as_if_it_had_been_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["invert", *RUN, "--out", "whole"]) == 0

    with start(tmp_path, *RUN, "--out", "run") as started:
        ranks = after_records(started, tmp_path / "run", 3)
        assert len(ranks) == 2
        os.kill(ranks[1], signal.SIGKILL)
        output, errors = started.communicate(timeout=PATIENCE)
    assert started.returncode != 0
    assert output.count("2 ranks share the 3 seeds.") == 1
    recording = Recording.open("run")
    done = recording.run["iterations"]["done"]
    (sentence,) = complaints(errors)
    assert sentence.startswith("gradinv: A rank was lost, ") and f" {done} of 16 iterations is kept in run." in sentence
    assert 3 <= done < 16 and recording.run["status"] == "failed"
    assert recording.steps[: done + 1] == list(range(done + 1))
    assert len(list(recording.snapshots())) == len(recording.steps)

    with start(tmp_path, "--resume", "run") as started:
        os.kill(after_records(started, tmp_path / "run", 9)[1], signal.SIGTERM)
        output, errors = started.communicate(timeout=PATIENCE)
    assert started.returncode != 0
    recording = Recording.open("run")
    done = recording.run["iterations"]["done"]
    assert 9 <= done < 16 and recording.run["status"] == "stopped"
    (sentence,) = complaints(errors)
    assert sentence.startswith(f"gradinv: Stopped after {done} of 16 iterations; ")

    capsys.readouterr()
    assert cli.main(["invert", "--resume", "run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "done"
    whole, run = Recording.open("whole"), Recording.open("run")
    assert run.steps == whole.steps == list(range(17))
    for prefix in ("seed0", "seed1", "seed2", "consensus"):
        expected, found = whole.images(prefix), run.images(prefix)
        assert expected is not None and found is not None
        assert (found - expected).abs().max() <= 1 / 255  # stored in 8 bits
    for expected, found in zip(whole.curves, run.curves, strict=True):
        assert found.keys() == expected.keys()
        for name in expected.keys() - {"seconds", *(name for name in expected if expected[name] is None)}:
            assert found[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-4), (name, expected["step"])
