"""Several ranks against one process: on the small network by `check_…` in each of the ranks, and as a command."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import ENVIRONMENT, PATIENCE, PLAIN

from gradinv import cli
from gradinv.attack.inversion import invert
from gradinv.execution import distributed
from gradinv.execution.distributed import ALONE, Ranks, joined
from gradinv.models import Model
from gradinv.recording.replay import Recording
from gradinv.types import GradinvError, Observation, Snapshot

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


# --- as several processes

FORKING = multiprocessing.get_context("forkserver")
FORKING.set_forkserver_preload(["test_distributed"])  # what takes seconds to import, once for all ranks


def begin(count: int, function: Callable[..., int], *args: object) -> list[ForkServerProcess]:
    """Call a function as so many ranks, as torchrun would start them. → their processes, by rank"""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    started = [FORKING.Process(target=as_rank, args=(rank, count, port, function, args)) for rank in range(count)]
    for process in started:
        process.start()
    return started


def as_rank(rank: int, count: int, port: int, function: Callable[..., int], args: tuple[object, ...]) -> None:
    os.environ |= {"TORCHELASTIC_RUN_ID": "tests", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    sys.exit(function(rank, *args))


def ended(started: list[ForkServerProcess]) -> list[int | None]:
    """Wait for all ranks: → their exit codes."""
    for process in started:
        process.join(PATIENCE)
        process.kill()
    return [process.exitcode for process in started]


def test_ranks_agree_with_one_process(small_model: Model, observation: Observation, tmp_path: Path) -> None:
    """Three of them over gloo, with 4, 5 or 7 seeds."""
    started = begin(3, check_all, pickle.dumps((small_model, observation)), tmp_path)
    assert ended(started) == [0, 0, 0], "\n".join(path.read_text() for path in tmp_path.iterdir())


def check_all(rank: int, packed: bytes, folder: Path) -> int:
    """What each of the ranks does: all of the following. What is wrong is written to a file."""
    with joined() as ranks, (folder / str(rank)).open("w") as said, contextlib.redirect_stderr(said):
        try:
            for check in (
                check_what_cannot_be_run_is_said_once,
                check_what_they_say_to_one_another,
                *(partial(check_every_snapshot, changes) for changes in CHANGES),
                check_either_goes_on_with_what_the_other_left,
                check_one_that_is_stopped_stops_all,
                check_the_clock_of_one_shows_all,
                check_one_that_diverges_ends_all,
            ):
                check(ranks, *pickle.loads(packed))
        except BaseException:
            traceback.print_exc()
            return 1
    return 0


def check_what_cannot_be_run_is_said_once(ranks: Ranks, *_: object) -> None:
    with (
        mock.patch("gradinv.cli.invert.joined", lambda: contextlib.nullcontext(ranks)),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()) as said,
    ):
        code = cli.main(["invert", "goldfish", *SMALL, "--seeds", "1", "--out", "unmade"])
    assert (code != 0) == (ranks.rank == 0)
    found = [line.startswith("gradinv: 3 ranks cannot share 1 seed; ") for line in complaints(said.getvalue())]
    assert found == [True] * (ranks.rank == 0) and not Path("unmade").exists()


def check_what_they_say_to_one_another(ranks: Ranks, *_: object) -> None:
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


CHANGES: tuple[dict[str, Any], ...] = (
    {},
    {"group": 0.1, "seeds": 7},
    {"group": 0.1, "registration": "affine", "registration_start": 0.3, "registration_interval": 0.25},
    {"group": 0.1, "registration": "affine", "registration_start": 0.0, "optimiser_step": "sign", "seeds": 5},
    {"group": 0.1, "registration": "affine", "registration_start": 0.6, "features": 0.5, "projection": True},
)


def check_every_snapshot(changes: dict[str, Any], ranks: Ranks, small_model: Model, observation: Observation) -> None:
    config = dataclasses.replace(CONFIG, **changes)
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


def after_records(run: Path, count: int, alive: Callable[[], bool]) -> None:
    """Wait until so many steps are recorded."""
    until = time.monotonic() + PATIENCE
    while not (run / f"frames/{count:06d}.webp").is_file():
        assert alive() and time.monotonic() < until, "the run did not begin"
        time.sleep(0.02)


def rank_of_torchrun(parent: int, rank: int) -> int:
    """The process that torchrun started as a rank."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # another process that has just ended, or is not ours
            status, environment = (process / "stat").read_text(), (process / "environ").read_text().split("\0")
            if int(status.rsplit(")", 1)[1].split()[1]) == parent and f"RANK={rank}" in environment:
                return int(process.name)
    raise AssertionError("torchrun has no such rank")


def command(rank: int, folder: Path, *args: str) -> int:
    """The command as a rank that says what it says to files."""
    os.chdir(folder)
    with Path(f"said{rank}").open("w") as said, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        return cli.main(args)


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

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "gradinv", "invert"]
    with subprocess.Popen(
        [*torchrun, *RUN, "--out", "run"], env=ENVIRONMENT, stdout=-1, stderr=-1, text=True
    ) as started:
        after_records(tmp_path / "run", 3, lambda: started.poll() is None)
        os.kill(rank_of_torchrun(started.pid, 1), signal.SIGKILL)
        output, errors = started.communicate(timeout=PATIENCE)
    assert started.returncode != 0
    assert output.count("2 ranks share the 3 seeds.") == 1
    recording = Recording.open("run")
    done = recording.run["iterations"]["done"]
    (sentence,) = complaints(errors)
    assert sentence.startswith("gradinv: A rank was lost, ") and f" {done} of 16 iterations is kept in run." in sentence
    assert 3 <= done < 16 and recording.run["status"] == "failed"
    assert recording.steps[: done + 1] == list(range(done + 1))
    assert all(len(recording.snapshot(step).seeds) == 3 for step in recording.steps)

    ranks = begin(2, command, tmp_path, "invert", "--resume", "run")
    after_records(tmp_path / "run", 9, ranks[0].is_alive)
    ranks[1].terminate()
    assert ended(ranks) == [143, 0]
    recording = Recording.open("run")
    done = recording.run["iterations"]["done"]
    assert 9 <= done < 16 and recording.run["status"] == "stopped"
    (sentence,) = complaints(Path("said0").read_text())
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
