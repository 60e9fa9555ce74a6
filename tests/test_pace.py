"""How long a run takes: what it says of itself, the prior, and what was measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import count

import pytest

from gradinv import pace
from gradinv.config import AttackConfig
from gradinv.models import Model
from gradinv.pace import Pace


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    pace.forget()
    monkeypatch.setattr(pace, "probe", lambda model: 0.04)
    yield
    pace.forget()


def test_the_first_step_says_nothing_of_the_others() -> None:
    clock = Pace()
    clock.add(0.0, 0)
    clock.add(5.0, 1)  # which also prepared all others
    assert clock.speed is None
    for place in range(1, 5):
        clock.add(5.0 + place, 1 + 10 * place)
    assert clock.speed == pytest.approx(0.1)


def test_nothing_is_told_before_it_is_worth_it() -> None:
    clock = Pace()
    for step in range(1, 40):
        clock.add(0.02 * step, step)
    assert clock.speed is None  # less than two seconds of steps
    slow = Pace()
    slow.add(60.0, 1)
    slow.add(70.0, 2)
    assert slow.speed is None  # a single stretch
    slow.add(80.0, 3)
    assert slow.speed == pytest.approx(10.0)


def test_a_stretch_that_had_to_wait_moves_the_pace_little() -> None:
    clock, seconds = Pace(), 0.0
    for place in range(12):
        seconds += 30.0 if place == 6 else 1.0
        clock.add(seconds, 10 * (place + 1))
        if place > 2:
            assert clock.speed is not None and 0.05 < clock.speed < 0.2


@pytest.mark.parametrize("change", [0.1, 10.0])
def test_another_load_shows_within_seconds(change: float) -> None:
    clock, seconds, steps = Pace(), 0.0, 0.0
    clock.add(0.0, 1)
    for place in range(60):
        speed = 0.05 if place < 30 else 0.05 * change
        took = max(0.75, speed)  # a page is told of a step at most that often
        seconds, steps = seconds + took, steps + took / speed
        clock.add(seconds, 1 + round(steps))
        if seconds > 5.0 and not 30 <= place < 37:  # five seconds, of the run and of the other load
            assert clock.speed is not None and speed / 2 < clock.speed < 2 * speed


def test_what_was_solved_corrects_how_long_solving_takes(small_model: Model) -> None:
    before = pace.solving(small_model, 4)
    for _ in range(3):
        pace.solved(small_model, 4, before / 5)
    assert pace.solving(small_model, 4) == pytest.approx(before / 5)
    assert pace.solving(small_model, 8) < before


def test_a_resumed_run_is_timed_from_where_it_goes_on() -> None:
    clock = Pace()
    clock.add(100.0, 50, first=50)
    clock.add(104.0, 51, first=50)  # its first step
    for place in range(1, 4):
        clock.add(104.0 + place, 51 + 10 * place, first=50)
    assert clock.speed == pytest.approx(0.1)


def test_the_prior_grows_with_the_work(small_model: Model) -> None:
    def seconds(count: int = 2, preset: str = "matching", **changes: int) -> float:
        return pace.estimate(
            small_model, AttackConfig.preset(preset, **{"seeds": 1, "iterations": 100, **changes}), count
        )

    assert seconds(4) == pytest.approx(2 * seconds(2)) == pytest.approx(seconds(iterations=200))
    assert seconds(seeds=3) == pytest.approx(3 * seconds())
    assert seconds(preset="paper") > seconds() > 0
    # The layers are solved once, whatever the iterations.
    assert seconds(preset="demo", iterations=200) < 2 * seconds(preset="demo")


def test_a_painted_start_takes_fewer_iterations_unless_they_were_chosen(small_model: Model) -> None:
    usual = AttackConfig.preset("demo")
    painted, chosen = replace(usual, start="decoder"), replace(usual, start="decoder", iterations=77)
    assert pace.estimate(small_model, painted, 4) < 0.8 * pace.estimate(small_model, usual, 4)
    assert pace.estimate(small_model, chosen, 4) == pace.estimate(small_model, replace(usual, iterations=77), 4)


def test_one_run_on_a_busy_machine_does_not_decide_but_several_do(small_model: Model) -> None:
    config = AttackConfig.preset("demo", seeds=1, iterations=100)
    before = pace.estimate(small_model, config, 2)
    pace.measured(small_model, config, 2, 9 * before)
    assert before < pace.estimate(small_model, config, 2) < 4 * before
    for _ in range(3):
        pace.measured(small_model, config, 2, 9 * before)
    assert pace.estimate(small_model, config, 2) == pytest.approx(9 * before)
    other = AttackConfig.preset("matching", seeds=1, iterations=100)
    assert pace.estimate(small_model, other, 2) < 9 * before  # another kind of work


def test_the_probe_measures_the_network(small_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(pace, "_probes", {})
    took = pace.probe(small_model)
    assert 0 < took < 1 and pace.probe(small_model) == took
    # How busy the machine is may have changed after a while.
    clock = pace.time.monotonic() + 3600.0
    monkeypatch.setattr(pace.time, "monotonic", lambda: clock)
    ticks = count()
    monkeypatch.setattr(pace.time, "perf_counter", lambda: float(next(ticks)))
    assert pace.probe(small_model) == pytest.approx(0.5)  # a second for two images, by that clock
    assert all(parameter.grad is None for parameter in small_model.network.parameters())
