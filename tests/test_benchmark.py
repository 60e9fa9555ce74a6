"""The benchmark: what is counted, compared and told. How fast anything is, no test can say."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import logging
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gradinv import benchmark, cli, tape
from gradinv.benchmark import Plan, Variant, as_csv, line, measure, operations, pictures, random_weights, spread
from gradinv.cli.benchmark import profile_table, remarks, rows_table
from gradinv.config import AttackConfig
from gradinv.models import Model, load_model
from gradinv.peers import PeerResult
from gradinv.types import GradinvError

DEMO = AttackConfig.preset("matching", layers="all")


@pytest.fixture(autouse=True)
def small_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix product that takes no time worth mentioning."""
    monkeypatch.setattr(benchmark, "MATMUL", {"cpu": (64, 2)})


def plan(model: Model, **changes: Any) -> Plan:
    given: dict[str, Any] = {"batch_sizes": (2, 3), "rounds": 3, "iterations": 2, "memory": False}
    given["stepping"] = ("eager", "traced")
    return Plan((lambda: model,), DEMO, **{**given, **changes})


# --- counting


def test_operations_by_hand() -> None:
    layer = nn.Conv2d(3, 5, 3, padding=1, bias=False)
    images = torch.randn(2, 3, 8, 8, requires_grad=True)
    forward = 2 * 2 * 5 * 64 * 3 * 9
    assert operations(lambda: layer(images)) == forward
    # With respect to the images and to the weights: twice as much again.
    assert operations(lambda: layer(images).sum().backward()) == 3 * forward
    assert operations(lambda: torch.ones(4, 6) @ torch.ones(6, 10)) == 2 * 4 * 6 * 10
    assert operations(lambda: images * 2) == 0


def test_each_variant_is_counted_as_it_runs(small_model: Model) -> None:
    result = measure(plan(small_model, batch_sizes=(2, 4), seeds=(1, 2)))
    rows = {(row["batch_size"], row["seeds"], row["stepping"]): row for row in result["rows"]}
    assert len(rows) == 8
    for (size, seeds, mode), row in rows.items():
        assert row["flops_eager"] == seeds * rows[size, 1, "eager"]["flops_eager"]
        if mode == "eager":
            assert row["flops"] == row["flops_eager"]
        else:
            # The recording leaves out what autograd derives in vain.
            assert 0 < row["flops"] < row["flops_eager"]
    assert rows[4, 1, "eager"]["flops"] == 2 * rows[2, 1, "eager"]["flops"]


def test_seeds_at_a_time_are_counted_and_set_against_one_at_a_time(
    small_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    result = measure(plan(small_model, batch_sizes=(2,), seeds=(1, 3), parallel_seeds=(1, 0), profile=True))
    rows = {(row["seeds"], row["stepping"], row["parallel_seeds"]): row for row in result["rows"]}
    # What a run would not do is not measured, and nothing twice.
    assert list(rows) == [(1, "eager", 1), (1, "traced", 1), (3, "eager", 1), (3, "traced", 1), (3, "traced", 2)]
    alone, two = rows[3, "traced", 1], rows[3, "traced", 2]
    assert two["flops"] == alone["flops"] == 3 * rows[1, "traced", 1]["flops"] > 0
    assert two["estimated_memory_mb"] > alone["estimated_memory_mb"]
    assert set(alone["ratios"]) == {"eager"} and set(two["ratios"]) == {"eager", "one seed at a time"}
    pairs = zip(alone["seconds"]["rounds"], two["seconds"]["rounds"], strict=True)
    assert two["ratios"]["one seed at a time"] == pytest.approx(spread([one / other for one, other in pairs]))
    assert sum(entry["flops"] for entry in two["profile"]) == two["flops"]
    header = rows_table(result).splitlines()[0]
    assert header.split("  ")[:3] == ["K", "seeds", "at a time"] and "× one seed at a time" in header


def test_a_profile_adds_up(small_model: Model) -> None:
    made = measure(plan(small_model, batch_sizes=(3,), rounds=1, profile=True))
    for row in made["rows"]:
        found = row["profile"]
        assert sum(entry["flops"] for entry in found) == row["flops"]
        assert [entry["seconds"] for entry in found] == sorted((entry["seconds"] for entry in found), reverse=True)
        names = {entry["operation"]: entry for entry in found}
        assert names["aten.convolution"]["share"] > 0 and names["aten.add"]["share"] is None
        assert names["aten.convolution_backward (input and weight)"]["calls"] > 0
    assert "profile" not in benchmark.as_csv(made)
    text = profile_table(made["rows"][0]["profile"])
    assert text.splitlines()[0].split()[0] == "operation" and "all others" in text


def test_what_does_not_fit_is_refused_before_anything_is_measured(small_model: Model) -> None:
    with pytest.raises(GradinvError, match=r"^1000000000000 seeds of 1 image need about .* are free; take fewer seeds"):
        measure(plan(small_model, batch_sizes=(1,), seeds=(10**12,)))


# --- what is made of the times


def test_a_row_is_made_of_its_rounds(small_model: Model) -> None:
    result = measure(plan(small_model))
    rates = result["matmul"]["flops_per_second"]["rounds"]
    assert len(rates) == 3 and [row["stepping"] for row in result["rows"]] == ["eager", "traced"] * 2
    for row in result["rows"]:
        taken = row["seconds"]["rounds"]
        assert len(taken) == 3 and row["seconds"] == {**spread(taken), "rounds": taken}
        shares = [row["flops"] / one / rate for one, rate in zip(taken, rates, strict=True)]
        assert row["share"] == pytest.approx(spread(shares))
        assert row["fell_back"] is False and row["estimated_memory_mb"] > 0 and row["peak_memory_mb"] is None
    assert result["rows"][0]["ratios"] == {} and set(result["rows"][1]["ratios"]) == {"eager"}
    assert json.loads(json.dumps(result)) == result


def test_ratios_are_paired_by_round_and_count_one_seed() -> None:
    """Both slow down together from round to round: the ratio does not notice."""
    eager, traced = Variant(0, 4, 2, "eager"), Variant(0, 4, 2, "traced")
    peer = Variant(0, 4, 1, "invertinggradients")
    other = Variant(0, 8, 2, "eager")
    seconds = {eager: [3.0, 6.0, 9.0], traced: [2.0, 4.0, 6.0], peer: [4.0, 8.0, 18.0], other: [1.0, 1.0, 1.0]}
    made = benchmark.summarise(
        Plan((), DEMO),
        ["net"],
        seconds,
        [10.0, 5.0, 2.0],
        {v: {"flops": 4} for v in (eager, traced)} | {peer: {}, other: {}},
        {},
        {},
    )
    rows = {(row["stepping"], row["batch_size"]): row for row in made["rows"]}
    assert rows["traced", 4]["ratios"] == {
        "eager": {"median": 1.5, "low": 1.5, "high": 1.5},
        "invertinggradients": {"median": 4.0, "low": 4.0, "high": 6.0},
    }
    assert set(rows["eager", 4]["ratios"]) == {"invertinggradients"}
    assert rows["invertinggradients", 4]["ratios"] == {} and rows["eager", 8]["ratios"] == {}
    assert rows["traced", 4]["share"] == pytest.approx({"median": 0.2, "low": 0.2, "high": 1 / 3})
    assert "share" not in rows["invertinggradients", 4]


def test_lines_by_hand() -> None:
    exact = line([1, 2, 4], [0.5 + 0.25 * size for size in (1, 2, 4)])
    assert exact == pytest.approx({"a": 0.5, "b": 0.25, "largest_deviation": 0}, abs=1e-12)
    # Deviations count relative to the time: doubling all times changes none of them.
    bent, twice = line([1, 2, 4], [1.0, 2.0, 5.0]), line([1, 2, 4], [2.0, 4.0, 10.0])
    assert twice["largest_deviation"] == pytest.approx(bent["largest_deviation"]) and bent["largest_deviation"] > 0.05
    assert twice["b"] == pytest.approx(2 * bent["b"])


def test_lines_need_three_sizes(small_model: Model) -> None:
    assert measure(plan(small_model, rounds=1))["fits"] == []
    fits = measure(plan(small_model, batch_sizes=(1, 2, 4), rounds=1))["fits"]
    assert [fit["stepping"] for fit in fits] == ["eager", "traced"]


def test_variants_take_turns_there_and_back(small_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[tuple[int, str]] = []
    original = benchmark._Ours.__call__

    def noted(self: Any, iterations: int) -> float:
        if iterations == 2:  # neither the warm-up nor the count
            order.append((len(self._run.full_size()[0]), self.mode))
        return original(self, iterations)

    monkeypatch.setattr(benchmark._Ours, "__call__", noted)
    reported: list[tuple[int, int]] = []
    measure(plan(small_model, rounds=2), lambda done, total: reported.append((done, total)))
    there = [(2, "eager"), (2, "traced"), (3, "eager"), (3, "traced")]
    assert order == there + there[::-1]
    assert reported == [(number, 12) for number in range(1, 13)]


def test_a_fall_back_is_told(small_model: Model, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(tape, "_simplified", fail)
    with caplog.at_level(logging.ERROR):
        result = measure(plan(small_model, batch_sizes=(2,)))
    assert [row["fell_back"] for row in result["rows"]] == [False, True]
    assert "Autograd had to run traced for 2 images: the figures there are eager's." in remarks(result)


def test_micro_batches_that_are_no_part_are_left_out(small_model: Model) -> None:
    result = measure(plan(small_model, stepping=("eager",), micro_batches=(0, 1, 2), rounds=1))
    assert [(row["batch_size"], row["micro_batch"]) for row in result["rows"]] == [
        (2, 0),
        (2, 1),
        (3, 0),
        (3, 1),
        (3, 2),
    ]
    assert set(result["rows"][1]["ratios"]) == {"eager"} and "micro" in rows_table(result)
    with pytest.raises(GradinvError, match="nothing to measure; add 0"):
        measure(plan(small_model, batch_sizes=(2,), micro_batches=(2, 4)))


def test_peers_run_on_the_same_gradient(small_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, ...]] = []

    def attack(name: str, model: Model, observation: Any, labels: Any, iterations: int) -> PeerResult:
        seen.append((name, model, observation.batch_size, len(labels), iterations))
        return PeerResult(torch.zeros(0), 1.0, 0.25)

    monkeypatch.setattr(benchmark, "breaching_attack", attack)
    monkeypatch.setattr(benchmark, "require_breaching", lambda: None)
    result = measure(plan(small_model, batch_sizes=(2,), peers=("invertinggradients",), rounds=2, seeds=(2,)))
    assert seen == 2 * [("invertinggradients", small_model, 2, 2, 5)]
    assert result["rows"][2]["seconds"]["median"] == 0.25
    own = result["rows"][0]
    assert own["ratios"]["invertinggradients"]["high"] == pytest.approx(0.25 / (own["seconds"]["low"] / 2))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"batch_sizes": ()}, r"^batch sizes takes one or more different values, not \[\]\.$"),
        ({"seeds": (1, 1)}, r"^seeds takes one or more different values, not \[1, 1\]\.$"),
        ({"batch_sizes": (0,)}, r"^batch sizes takes numbers of at least 1\.$"),
        ({"micro_batches": (-1,)}, r"^micro batches takes numbers of at least 0\.$"),
        ({"rounds": 0}, r"^At least one round of one iteration has to be timed\.$"),
        ({"stepping": ("fast",)}, r"^stepping takes auto, eager, traced, graph, not 'fast'\.$"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(small_model: Model, changes: Any, sentence: str) -> None:
    with pytest.raises(GradinvError, match=sentence):
        plan(small_model, **changes)


# --- pictures and networks


def test_the_gallery_is_made_to_suffice() -> None:
    model = load_model("resnet18-tiny", device="cpu", image_size=8)
    pixels, labels = pictures(model, 48)
    assert pixels.shape == (48, 3, 8, 8) and 0 <= pixels.min() < pixels.max() <= 1
    assert len(labels.unique()) == 48 and len({one.numpy().tobytes() for one in pixels}) == 48
    few, first = pictures(model, 3)
    assert torch.equal(few, pixels[:3]) and torch.equal(first, labels[:3])
    with pytest.raises(GradinvError, match=r"^Batches of 1 to .* pictures can be measured, not of 1000"):
        pictures(model, 1000)


def test_more_pictures_than_classes_repeat_labels(small_model: Model) -> None:
    """A network that knows none of the gallery's classes takes all its pictures."""
    _, labels = pictures(small_model, 7)
    assert labels.tolist() == [0, 1, 2, 3, 4, 5, 0]


def test_random_weights_are_a_whole_network(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    path = random_weights("resnet18-tiny", tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    model = load_model(str(path), device="cpu")
    bundled = load_model("resnet18-tiny", device="cpu")
    assert model.name == "resnet18-tiny-random" and model.preprocessing == bundled.preprocessing
    assert model.classes == bundled.classes and model.sha256 != bundled.sha256
    with torch.no_grad():
        logits = model.network(torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert 0.01 < logits.std() < 10, "neither faded nor grown"
    with pytest.raises(GradinvError, match=r"^Random weights are made for a named network only: resnet50-tiny"):
        random_weights("nothing", tmp_path)


# --- memory


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of the resident memory is reset on Linux only")
def test_what_was_held_before_is_not_counted(small_model: Model) -> None:
    kept = torch.zeros(100_000_000).add_(1)
    del kept
    peak = benchmark.peak_memory(lambda: small_model, DEMO, Variant(0, 2, 1, "eager"), torch.get_num_threads())
    assert peak is not None and 0 <= peak < 300e6


def test_memory_is_measured_in_a_process_of_its_own() -> None:
    load = partial(load_model, "resnet18-tiny", device="cpu", image_size=16)
    variants = Plan((load,), DEMO, batch_sizes=(1,), stepping=("eager",), rounds=1, iterations=1)
    (row,) = measure(variants)["rows"]
    assert row["peak_memory_mb"] is None if sys.platform != "linux" else row["peak_memory_mb"] > 1


def test_where_no_peak_is_told_there_is_none(small_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "_reset_resident_peak", lambda: False)
    assert benchmark.peak_memory(lambda: small_model, DEMO, Variant(0, 2, 1, "eager"), 1) is None


# --- the command


@pytest.fixture
def quick(small_model: Model, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr("gradinv.models.load_model", lambda *_, **__: small_model)
    return ["benchmark", "--batch-sizes", "2,3", "--rounds", "2", "--iterations", "1", "--no-memory"]


def test_the_command_prints_a_table_and_keeps_the_results(quick: list[str], tmp_path: Path, capsys: Any) -> None:
    layers = tmp_path / "settings.json"
    layers.write_text('{"layers": "all"}')
    out = tmp_path / "speed"
    stepping = ["--stepping", "eager,traced", "--profile"]
    assert cli.main([*quick, *stepping, "--config", str(layers), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "A float32 matrix product of 64 reaches" in printed and printed.count("traced") == 4
    header = next(text for text in printed.splitlines() if text.startswith("K "))
    assert header.split("  ")[0] == "K" and "× eager" in header and "share in %" in header
    kept = json.loads((out / "benchmark.json").read_text())
    assert kept["config"]["layers"] == "all" and kept["rounds"] == 2
    rows = list(csv.DictReader(io.StringIO((out / "benchmark.csv").read_text())))
    assert [row["stepping"] for row in rows] == ["eager", "traced"] * 2
    assert float(rows[1]["ratios_eager_median"]) == kept["rows"][1]["ratios"]["eager"]["median"]
    assert rows[0]["ratios_eager_median"] == "" and "seconds_rounds" not in rows[0]
    assert as_csv(kept) == (out / "benchmark.csv").read_text()
    assert {"cpu", "threads", "torch", "device"} <= set(kept["machine"])


def test_json_is_one_object(quick: list[str], capsys: Any) -> None:
    assert cli.main([*quick, "--preset", "paper", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["config"]["match"] == "l2" and captured.err == ""


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--threads", "0"], "--threads takes a number of at least 1, not 0."),
        (["--stepping", "fast"], "stepping takes auto, eager, traced, graph, not 'fast'."),
        (["--stepping", "graph"], "stepping=graph needs a CUDA device"),
        (["--random-weights", "--model", "mine.pth"], "Random weights are made for a named network only"),
    ],
)
def test_mistakes_are_one_sentence(quick: list[str], given: list[str], sentence: str, capsys: Any) -> None:
    assert cli.main([*quick, *given]) == 2
    errors = capsys.readouterr().err
    assert sentence in errors and errors.count("\n") == 1


def test_variants_run_at_full_size_before_registration() -> None:
    config = Variant(0, 4, 3, "traced", 2).applied(dataclasses.replace(DEMO, stages=(0.5, 0.5)))
    assert (config.stages, config.seeds, config.stepping, config.micro_batch) == ((), 3, "traced", 2)
    assert Variant(0, 4, 1, "seethroughgradients").peer
