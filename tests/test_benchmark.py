"""The benchmark: what is counted, compared and told. How fast anything is, no test can say."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gradinv import benchmark, cli
from gradinv.benchmark import Variant, line, measure, operations, pictures, spread, summarise, variants
from gradinv.cli.benchmark import remarks, rows_table
from gradinv.config import AttackConfig
from gradinv.execution import tape
from gradinv.models import Model, load_model
from gradinv.types import GradinvError

MATCHING = AttackConfig.preset("matching", layers="all")


@pytest.fixture(autouse=True)
def small_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix product that takes no time worth mentioning."""
    monkeypatch.setattr(benchmark, "PRODUCT", 64)


def planned(model: Model, **changes: Any) -> list[Variant]:
    lists: dict[str, tuple[Any, ...]] = {"batch_sizes": (2, 4), "seeds": (1,), "stepping": ("eager", "traced")}
    lists |= {"micro_batches": (0,), "parallel": (0,)}
    return variants({"net": model}, MATCHING, **{**lists, **changes})


def measured(model: Model, rounds: int = 3, **changes: Any) -> dict[str, Any]:
    return measure({"net": model}, MATCHING, planned(model, **changes), rounds, 2)


def test_operations_by_hand() -> None:
    layer = nn.Conv2d(3, 5, 3, padding=1, bias=False)
    images = torch.randn(2, 3, 8, 8, requires_grad=True)
    forward = 2 * 2 * 5 * 64 * 3 * 9
    assert operations(lambda: layer(images)) == forward
    # With respect to the images and to the weights: twice as much again.
    assert operations(lambda: layer(images).sum().backward()) == 3 * forward
    assert operations(lambda: torch.ones(4, 6) @ torch.ones(6, 10)) == 2 * 4 * 6 * 10
    assert operations(lambda: images * 2) == 0


def test_each_variant_is_counted_as_it_runs(small_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    result = measured(small_model, rounds=1, seeds=(1, 2), parallel=(1, 0))
    rows = {(r["batch_size"], r["seeds"], r["stepping"], r["parallel_seeds"]): r["flops"] for r in result["rows"]}
    # What a run would not do is not measured, and nothing twice.
    assert len(rows) == 10 and {key[2] for key in rows if key[3] == 2} == {"traced"}
    for (size, seeds, mode, _), flops in rows.items():
        assert flops == seeds * rows[size, 1, mode, 1] == size / 2 * rows[2, seeds, mode, 1]
        # The recording leaves out what autograd derives in vain.
        assert mode == "eager" or 0 < flops < rows[size, seeds, "eager", 1]
    header = rows_table(result).splitlines()[0]
    assert "× eager" in header and "× one seed at a time" in header


def test_a_row_is_made_of_its_rounds(small_model: Model) -> None:
    result = measured(small_model, batch_sizes=(1, 2, 4))
    assert [row["stepping"] for row in result["rows"]] == ["eager", "traced"] * 3
    for row in result["rows"]:
        taken = row["seconds"]["rounds"]
        assert len(taken) == 3 and row["seconds"] == {**spread(taken), "rounds": taken}
        assert row["fell_back"] is False and row["share"]["median"] > 0
    assert result["rows"][0]["ratios"] == {} and set(result["rows"][1]["ratios"]) == {"eager"}
    assert [fit["stepping"] for fit in result["fits"]] == ["eager", "traced"]
    assert json.loads(json.dumps(result)) == result


def test_ratios_are_paired_by_round() -> None:
    """Both slow down together from round to round: the ratio does not notice."""
    eager, traced = Variant("net", 4, 2, "eager", 0, 1), Variant("net", 4, 2, "traced", 0, 1)
    both, other = Variant("net", 4, 2, "traced", 0, 2), Variant("net", 8, 2, "eager", 0, 1)
    seconds = {eager: [3.0, 6.0, 9.0], traced: [2.0, 4.0, 6.0], both: [1.0, 2.0, 6.0], other: [1.0, 1.0, 1.0]}
    rows = summarise(seconds, [10.0, 5.0, 2.0], {one: {"flops": 4} for one in seconds})["rows"]
    assert rows[0]["ratios"] == {} == rows[3]["ratios"]
    assert rows[1]["ratios"] == {"eager": {"median": 1.5, "low": 1.5, "high": 1.5}}
    assert rows[2]["ratios"]["one seed at a time"] == {"median": 2.0, "low": 1.0, "high": 2.0}
    assert rows[1]["share"] == pytest.approx({"median": 0.2, "low": 0.2, "high": 1 / 3})


def test_lines_by_hand() -> None:
    exact = line([1, 2, 4], [0.5 + 0.25 * size for size in (1, 2, 4)])
    assert exact == pytest.approx({"a": 0.5, "b": 0.25, "largest_deviation": 0}, abs=1e-12)
    # Deviations count relative to the time: doubling all times changes none of them.
    bent, twice = line([1, 2, 4], [1.0, 2.0, 5.0]), line([1, 2, 4], [2.0, 4.0, 10.0])
    assert twice["largest_deviation"] == pytest.approx(bent["largest_deviation"]) and bent["largest_deviation"] > 0.05
    assert twice["b"] == pytest.approx(2 * bent["b"])


def test_variants_take_turns_there_and_back(small_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    original = benchmark.Attack.__call__

    def noted(self: Any, iterations: int) -> float:
        if iterations == 2:  # neither the warm-up nor the count
            order.append(self.mode)
        return original(self, iterations)

    monkeypatch.setattr(benchmark.Attack, "__call__", noted)
    reported: list[tuple[int, int]] = []
    lists = planned(small_model, batch_sizes=(2,))
    measure({"net": small_model}, MATCHING, lists, 2, 2, lambda *done: reported.append(done))
    assert order == ["eager", "traced", "traced", "eager"]
    assert reported == [(number, 6) for number in range(1, 7)]


def test_a_fall_back_is_told(small_model: Model, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(tape.Tape, "program", fail)
    with caplog.at_level(logging.ERROR):
        result = measured(small_model, rounds=1, batch_sizes=(2,))
    assert [row["fell_back"] for row in result["rows"]] == [False, True]
    assert "Autograd had to run traced for 2 images: the figures there are eager's." in remarks(result)


def test_micro_batches_that_are_no_part_are_left_out(small_model: Model) -> None:
    found = planned(small_model, batch_sizes=(2, 3), stepping=("eager",), micro_batches=(0, 1, 2))
    assert [(one.batch_size, one.micro_batch) for one in found] == [(2, 0), (2, 1), (3, 0), (3, 1), (3, 2)]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"batch_sizes": ()}, "Nothing is left to measure"),
        ({"batch_sizes": (0,)}, "Batches of 1 to .* pictures can be measured, not of 0"),
        ({"micro_batches": (2, 4), "batch_sizes": (2,)}, "Nothing is left to measure"),
        ({"micro_batches": (-1,)}, "micro_batch must be a finite number of at least 0, not -1"),
        ({"rounds": 0}, "At least one round"),
        ({"stepping": ("fast",)}, "stepping takes one of auto, eager, traced, graph, not 'fast'"),
        ({"seeds": (10**12,)}, "^1000000000000 seeds of 2 images need about .* are free; take fewer seeds"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(small_model: Model, changes: Any, sentence: str) -> None:
    with pytest.raises(GradinvError, match=sentence):
        measured(small_model, **changes)


def test_the_gallery_is_made_to_suffice(small_model: Model) -> None:
    model = load_model("resnet18-tiny", device="cpu", image_size=8)
    pixels, labels = pictures(model, 48)
    assert pixels.shape == (48, 3, 8, 8) and 0 <= pixels.min() < pixels.max() <= 1
    assert len(labels.unique()) == 48 and len({one.numpy().tobytes() for one in pixels}) == 48
    # A network that knows none of the gallery's classes takes all its pictures.
    assert pictures(small_model, 7)[1].tolist() == [0, 1, 2, 3, 4, 5, 0]


@pytest.fixture
def quick(small_model: Model, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr("gradinv.cli.benchmark.load_model", lambda *_, **__: small_model)
    return ["benchmark", "--batch-sizes", "2,3", "--rounds", "2", "--iterations", "1"]


def test_the_command_prints_a_table_or_one_object_and_keeps_the_results(
    quick: list[str], tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "settings.json").write_text('{"layers": "all"}')
    out = tmp_path / "speed"
    given = ["--stepping", "eager,traced", "--config", str(tmp_path / "settings.json"), "--out", str(out)]
    assert cli.main([*quick, *given, "--no-memory"]) == 0
    printed = capsys.readouterr().out
    assert "GFLOP/s" in printed and printed.count("traced") == 2 and "× eager" in printed
    kept = json.loads((out / "benchmark.json").read_text())
    assert kept["config"]["layers"] == "all" and kept["rounds"] == 2
    assert {"cpu", "threads", "torch", "device"} <= set(kept["machine"])
    assert cli.main([*quick, "--preset", "paper", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["config"]["match"] == "l2" and captured.err == ""


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--threads", "0"], "--threads takes a number of at least 1, not 0."),
        (["--stepping", "graph"], "stepping=graph needs a CUDA device"),
        (["--stepping", "packed"], "stepping=packed is gone; take traced"),
        (["--profile"], "--profile is gone: torch.profiler"),
        (["--random-weights"], "--random-weights is gone"),
        (["--breaching"], "--breaching is gone: gradinv evaluate compare"),
    ],
)
def test_mistakes_are_one_sentence(quick: list[str], given: list[str], sentence: str, capsys: Any) -> None:
    try:
        assert cli.main([*quick, *given]) == 2
    except SystemExit as exit:
        assert exit.code == 2
    errors = capsys.readouterr().err
    assert sentence in errors and errors.count("\n") == 1
