"""The evaluations: which pictures, what is measured, what is kept, and what is said where something is wrong."""

from __future__ import annotations

import copy
import csv
import dataclasses
import io
import json
import math
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import fails, objective_for, one_sentence, picture
from torch.nn import functional as F

import gradinv
from gradinv import breaching, cli
from gradinv.breaching import Reconstruction
from gradinv.client import final_gradient, observe
from gradinv.config import AttackConfig
from gradinv.evaluation import plan as plans
from gradinv.evaluation import running, table, tasks
from gradinv.evaluation.bench import Bench
from gradinv.evaluation.ledger import Ledger
from gradinv.evaluation.plan import Plan, Row, Values
from gradinv.execution.stepping import resolve_mode
from gradinv.gallery import Gallery
from gradinv.models import Model
from gradinv.types import GradinvError

QUICK = AttackConfig(seeds=2, iterations=2, learning_rate=0.05)
EACH = 8  # pictures of each class


def fill(folder: Path, wnids: list[str], each: int = EACH, side: int = 12) -> Path:
    """A folder in ImageNet layout, of smooth pictures that all differ."""
    for number, wnid in enumerate(wnids):
        for index in range(each):
            picture(folder / wnid / f"{index:02}.png", 100 * number + index, side)
    return folder


@pytest.fixture
def folder(elsewhere):
    return fill(elsewhere / "val", [f"n{label:08d}" for label in range(6)])


def plan(folder: Path, command: str = "ablation", **changes: Any) -> Plan:
    rows = changes.pop("rows", None) or plans.ablation_rows(QUICK, 2)
    return Plan(command, "small", str(folder), rows, **{"batches": 2, "device": "cpu", **changes})


def run(ledger: Ledger, **options: Any) -> dict[str, Any]:
    for _ in running.measure(ledger, **options):
        pass
    return ledger.write()


def untimed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The table without what differs from run to run."""
    kept = []
    for row in rows:
        columns = {
            key: {name: value for name, value in row[key].items() if not name.startswith("seconds")}
            for key in ("mean", "stderr")
        }
        kept.append({**row, **columns})
    return kept


@pytest.fixture
def small(folder, small_model):
    """Makes a bench of a plan with these rows, on the small network."""
    return lambda command="ablation", *rows, **changes: Bench(plan(folder, command, rows=rows, **changes), small_model)


@pytest.fixture
def opened(folder, small_model, tmp_path):
    """Opens the folder of an evaluation of the small network."""

    def opened(name: str = "out", command: str = "ablation", **changes: Any) -> Ledger:
        return Ledger(tmp_path / name, plan(folder, command, **changes), small_model)

    return opened


# --- which pictures


def test_a_batch_is_the_same_every_time_and_for_every_row(small):
    rows = plans.ablation_rows(QUICK, 3)
    bench, again = (small("ablation", *rows) for _ in range(2))
    keys = [[[p.key for p in b.draw(row, n).pictures] for row in rows] for n in range(3) for b in (bench, again)]
    assert all(row == keys[2 * n][0] for n in range(3) for row in (*keys[2 * n], *keys[2 * n + 1]))
    assert keys[0] != keys[2] != keys[4]
    seeded = small("ablation", *rows, seed=1)
    assert [p.key for p in seeded.draw(rows[0], 0).pictures] != keys[0][0]


def test_distinct_batches_have_distinct_labels_and_smaller_ones_begin_larger_ones(small, small_model):
    rows = plans.label_rows((1, 3, 6))
    bench = small("labels", *rows)
    largest = bench.draw(rows[2], 0)
    assert sorted(largest.labels.tolist()) == list(range(6))
    for row in rows[:2]:
        batch = bench.draw(row, 0)
        assert batch.pictures == largest.pictures[: row.batch_size]
    for one, label in zip(largest.pictures, largest.labels.tolist(), strict=True):
        assert one.wnid == small_model.classes[label].wnid


def test_repeated_labels_come_from_few_classes_and_no_picture_twice(small):
    row = Row("K=8", 8, repeats=True)
    bench = small("labels", row)
    for number in range(5):
        batch = bench.draw(row, number)
        assert len({picture.key for picture in batch.pictures}) == 8
        assert 2 <= len(set(batch.labels.tolist())) <= 3  # 8 · 10/32, rounded up


def test_halves_part_each_class(small):
    parts = {half: small(half=half).files(2) for half in ("report", "tune", "all")}
    assert [p.title for p in parts["report"]] == ["00", "01", "02", "03"]
    assert [p.title for p in parts["tune"]] == ["04", "05", "06", "07"]
    assert parts["all"] == parts["report"] + parts["tune"]
    row = plans.ablation_rows(QUICK, 6)[0]
    drawn = [small("ablation", row).draw(row, n) for n in range(20)]
    assert {picture.title for batch in drawn for picture in batch.pictures} == {"00", "01", "02", "03"}


# --- what is measured


def test_the_final_gradient_is_the_one_of_autograd(small, small_model):
    row = Row("K=8", 8, repeats=True)
    bench = small("labels", row)
    batch = bench.draw(row, 0)
    true = observe(small_model, batch.pixels, batch.labels).gradients
    features = gradinv.gallery.pooled(small_model, batch.pixels)
    exact = final_gradient(small_model, features, batch.labels)
    for name, value in exact.items():
        torch.testing.assert_close(value, true[name], rtol=1e-5, atol=1e-7)
    for _ in range(2):  # a gallery that was just made, and one that is read back
        shortcut = tasks.observe_final(Bench(bench.plan, small_model), batch)
        assert shortcut.batch_size == 8 and set(shortcut.gradients) == {"fc.weight", "fc.bias"}
        for name, value in shortcut.gradients.items():
            torch.testing.assert_close(value, true[name], rtol=5e-3, atol=2e-4)


def test_the_originals_match_their_own_gradient(small_model, small_batch):
    pixels, labels = small_batch
    observation = observe(small_model, pixels, labels)
    same = tasks.gradient_match(small_model, pixels, labels, observation)
    assert same == {"l2_distance": 0, "sign_match": 100, "distance": pytest.approx(0, abs=1e-9)}
    other = tasks.gradient_match(small_model, 1 - pixels, labels, observation)
    own = observe(small_model, 1 - pixels, labels).gradients
    ours, theirs = (torch.cat([g[name].flatten() for name in own]).double() for g in (own, observation.gradients))
    assert other["l2_distance"] == pytest.approx(float((ours - theirs).norm()), rel=1e-6)
    assert other["distance"] == pytest.approx(1 - float(F.cosine_similarity(ours, theirs, dim=0)), rel=1e-6)
    assert other["sign_match"] == pytest.approx(100 * float((ours.sign() == theirs.sign()).double().mean()))


def test_labels_of_distinct_classes_are_restored_and_repeats_are_beyond_column_minimum(small):
    rows = plans.label_rows((2, 8))
    bench = small("labels", rows[0], rows[3])
    for number in range(3):
        assert tasks.labels_task(bench, rows[0], number)["labels column-minimum"] == 100
    repeated = tasks.labels_task(bench, rows[3], 0)
    assert set(repeated) == set(plans.METHODS)
    # Eight images of six classes: that many distinct labels there are not.
    assert repeated["labels column-minimum"] is None


def test_pictures_are_found_from_the_gradient_and_not_behind_a_strong_defence(small):
    rows = plans.identification_rows((2,), ("none", "noise:100", "clip:1"))
    assert [row.name for row in rows] == ["K=2 distinct", "K=2 repeated", "K=2 noise:100", "K=2 clip:1"]
    bench = small("identify", *rows, half="all")
    found = [[tasks.identification_task(bench, row, n)["found"] for n in range(6)] for row in rows]
    assert found[0] == [100] * 6
    assert sum(value or 0 for value in found[2]) < 200
    undefended = tasks.identification_task(bench, dataclasses.replace(rows[3], defence="clip:1e9"), 0)
    assert undefended["found"] == 100 and undefended["labels"] == 100


def test_every_batch_has_its_own_noise_of_a_defence(small, small_model):
    (row,) = plans.defence_rows(QUICK, 2, ("clip:1+noise:1e-1",))
    bench = small("defences", row)
    batch = bench.draw(row, 0)
    true = observe(small_model, batch.pixels, batch.labels)
    first, same, other = (bench.defend(true, row, n).gradients["fc.weight"] for n in (0, 0, 1))
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_an_inversion_is_measured_in_full(small):
    row = plans.ablation_rows(QUICK, 2)[3]
    bench = small("ablation", row)
    values, again = (tasks.inversion_task(bench, row, 0) for _ in range(2))
    timeless = {name: value for name, value in values.items() if not name.startswith("seconds")}
    assert timeless == {name: again[name] for name in timeless}
    assert set(values) == {
        *(f"{group}{name}" for group in ("", "consensus_") for name in ("psnr", "ssim", "fft2d")),
        *("constant_psnr", "constant_ssim", "l2_distance", "sign_match", "distance", "labels"),
        *("seconds", "seconds_solving", "seconds_per_iteration"),
    }
    assert values["labels"] == 100 and all(value is not None and math.isfinite(value) for value in values.values())
    # The best constant colour has a PSNR that depends on the pictures alone.
    pixels = bench.draw(row, 0).pixels
    error = (pixels - pixels.mean((2, 3), keepdim=True)).double().square().mean((1, 2, 3))
    assert values["constant_psnr"] == pytest.approx(float((-10 * error.log10()).mean()))


def test_a_client_in_train_mode_is_measured_in_train_mode(small, small_model):
    row = Row("inferred", 3, config=dataclasses.replace(QUICK, bn="inferred"))
    bench = small("ablation", row)
    batch = bench.draw(row, 0)
    assert row.config is not None
    observation = tasks._observe(bench, row, 0, row.config, batch)
    assert observation.mode == "train" and observation.running is not None
    own = tasks.gradient_match(small_model, batch.pixels, batch.labels, observation)
    assert own["distance"] == pytest.approx(0, abs=1e-9)
    assert tasks.inversion_task(bench, row, 0)["psnr"] is not None


def test_both_ways_to_compare_gradients_start_with_the_same_pull(small, small_model):
    config = dataclasses.replace(QUICK, match="cosine", gradient=0.7)
    l2, cosine = plans.matching_rows(config, 2)
    assert (l2.weigh_like, cosine.weigh_like) == ("cosine", "") and l2.config is not None
    bench = small("matching", l2, cosine)
    batch = bench.draw(l2, 0)
    observation = observe(small_model, batch.pixels, batch.labels)
    weighed = tasks._weighed(bench, observation, l2.config, "cosine")
    assert weighed == dataclasses.replace(l2.config, gradient=weighed.gradient)
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(l2.config.seed))
    norms = []
    for one in (weighed, config):
        images = noise.clone().requires_grad_()
        bare = dataclasses.replace(one, features=0.0, bn="none", tv=0.0, l2=0.0, group=0.0)
        labels = tasks.restore_labels(small_model, observation, config.labels).labels
        judgement = objective_for(small_model, observation, labels, bare)(images, images.detach())
        norms.append(float(torch.autograd.grad(judgement.total, images)[0].norm()))
    assert norms[0] == pytest.approx(norms[1], rel=1e-4) and norms[0] > 0
    assert tasks.inversion_task(bench, l2, 0)["sign_match"] is not None


def test_the_batch_size_and_the_defences_also_count_who_is_recognised(small):
    rows = plans.size_rows(QUICK, (1, 3))
    values = tasks.inversion_task(small("batch-size", *rows), rows[1], 0)
    assert values["iip"] in [pytest.approx(100 * k / 3) for k in range(4)]
    (row,) = plans.defence_rows(QUICK, 2, ("none",))
    assert tasks.inversion_task(small("defences", row, half="all"), row, 0)["found"] == 100


# --- the rows


def test_the_ablation_adds_one_thing_a_row():
    config = AttackConfig.preset("matching", "resnet18-tiny", seeds=4, bn="exact", group=0.0, registration="lazy")
    rows = {row.name: row for row in plans.ablation_rows(config, 4)}
    settings = {name: row.config.to_dict() for name, row in rows.items() if row.config}

    def differs(a: str, b: str) -> set[str]:
        return {key for key in settings[a] if settings[a][key] != settings[b][key]}

    assert differs("gradient only", "+ fidelity") == {"tv", "bn", "features", "boundary", "layers"}
    assert differs("+ fidelity", "+ lazy group") == {"group"}
    assert differs("+ lazy group", "+ registered group") == {"registration"}
    assert differs("+ fidelity", "gradient off") == {"gradient"}
    assert differs("gradient off", "gradient and features off") == {"features", "boundary"}
    assert settings["+ fidelity"] == config.to_dict() | {"group": 0, "registration": "lazy"}
    assert settings["+ lazy group"]["group"] == plans.GROUP_WEIGHT
    assert settings["+ registered group"]["registration"] == "affine"
    assert [row.judged for row in rows.values()] == ["seeds", "seeds", "consensus", "consensus", "seeds", "seeds"]
    own = {row.name: row.config for row in plans.ablation_rows(AttackConfig(group=0.5, registration_start=0.5), 4)}
    assert own["+ lazy group"] == AttackConfig(group=0.5, registration="lazy", registration_start=0.5)
    assert own["+ registered group"] == AttackConfig(group=0.5, registration="affine", registration_start=0.5)
    assert own["+ fidelity"] == AttackConfig(group=0.0, registration="lazy", registration_start=0.5)
    with pytest.raises(GradinvError, match=r"^The ablation's group rows need at least two seeds; set seeds to 2"):
        plans.ablation_rows(AttackConfig(seeds=1), 4)
    demo = AttackConfig.preset("demo")
    for rows_of in (plans.ablation_rows, plans.matching_rows):
        with pytest.raises(GradinvError, match=r"is about gradient matching; take the preset matching or paper\.$"):
            rows_of(demo, 4)


def test_the_comparison_has_equal_iterations_and_a_single_seed():
    config = AttackConfig.preset("demo", "resnet18-tiny", seeds=4, iterations=300)
    rows = plans.comparison_rows(config, 8, several=True)
    assert [row.name for row in rows] == [
        *("breaching invertinggradients", "breaching seethroughgradients"),
        *("ours", "ours, gradient matching alone", "ours, 4 seeds", plans.TIMING),
    ]
    assert {row.config.iterations for row in rows if row.config} == {300}
    assert [row.config.seeds for row in rows if row.config] == [1, 1, 1, 1, 4, 4]
    assert {row.config.start for row in rows if row.config} == {"random"}
    assert [row.config.boundary for row in rows[2:5] if row.config] == ["auto", "logits", "auto"]
    assert all(row.over == ("breaching invertinggradients", "breaching seethroughgradients") for row in rows[2:5])
    assert len(plans.comparison_rows(config, 8, several=False)) == 5
    learned = plans.comparison_rows(dataclasses.replace(config, start="decoder"), 8, several=True)
    assert [row.name for row in learned[2:6]] == [
        *("ours", "ours, gradient matching alone", "ours, decoder's start", "ours, 4 seeds, decoder's start")
    ]
    assert [row.config.start for row in learned[2:6] if row.config] == ["random", "random", "decoder", "decoder"]
    with pytest.raises(
        GradinvError, match=r"^The comparison is made with a client in eval mode; take approx, exact or"
    ):
        plans.comparison_rows(dataclasses.replace(config, bn="inferred"), 8, several=True)


def test_ingredients_are_left_out_one_at_a_time():
    config = AttackConfig.preset("demo", seeds=2, iterations=50)
    rows = plans.ingredient_rows(config, 4)
    assert rows[0].config == config and rows[0].over == ()
    for row in rows[1:]:
        assert row.over == ("demo",) and row.config != config
        assert (row.judged == "seeds") == (row.config is not None and row.config.seeds == 1)
    with pytest.raises(GradinvError, match=r"solves? layers|solved layers|preset demo"):
        plans.ingredient_rows(AttackConfig.preset("matching"), 4)


# --- the table


def test_means_standard_errors_and_paired_gains(folder):
    rows = (Row("a", 2), Row("b", 2, over=("a",), judged="consensus"), Row("c", 2, over=("a", "b")))
    measured = {
        ("a", 0): {"psnr": 10.0, "consensus_psnr": 0.0, "distance": None},
        ("a", 1): {"psnr": 12.0, "consensus_psnr": 0.0, "distance": 0.5},
        ("a", 2): {"psnr": 17.0, "consensus_psnr": 0.0, "distance": 0.5},
        ("b", 0): {"psnr": 0.0, "consensus_psnr": 11.0},
        ("b", 1): {"psnr": 0.0, "consensus_psnr": 13.5},
        ("c", 1): {"psnr": 14.0, "consensus_psnr": 0.0},
    }
    a, b, c = table.summarise(plan(folder, rows=rows, batches=3), measured)
    assert (a["n"], b["n"], c["n"]) == (3, 2, 1)
    assert a["mean"]["psnr"] == 13 and a["stderr"]["psnr"] == pytest.approx(np.std([10, 12, 17], ddof=1) / 3**0.5)
    # A missing number is not passed over.
    assert a["mean"]["distance"] is None and a["stderr"]["distance"] is None
    assert "gain" not in a
    # Paired: 11 − 10 and 13.5 − 12, by b's consensus and a's seeds.
    assert b["gain"] == {"psnr": {"over": "a", "n": 2, "mean": 1.25, "stderr": pytest.approx(0.25)}}
    # The better of the two on the batch that all have is b with 13.5.
    assert c["gain"] == {"psnr": {"over": "b", "n": 1, "mean": 0.5, "stderr": None}}
    assert c["stderr"]["psnr"] is None
    assert table.summarise(plan(folder, rows=rows, batches=1), measured)[0]["mean"]["psnr"] == 10


def test_the_files_say_what_the_table_says(opened, tmp_path):
    ledger = opened()
    result = run(ledger)
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == result
    assert result["command"] == "ablation" and result["config"]["batches"] == 2
    lines = list(csv.DictReader(io.StringIO((tmp_path / "out" / "results.csv").read_text())))
    assert [line["row"] for line in lines] == [row["name"] for row in result["rows"]]
    for line, row in zip(lines, result["rows"], strict=True):
        assert int(line["n"]) == row["n"] == 2
        assert float(line["psnr"]) == row["mean"]["psnr"] and float(line["ssim_stderr"]) == row["stderr"]["ssim"]
    assert float(lines[1]["psnr_gain"]) == result["rows"][1]["gain"]["psnr"]["mean"] and lines[0]["psnr_gain"] == ""
    pytest.importorskip("plotly")
    assert ledger.draw() is None
    drawn = json.loads((tmp_path / "out" / "figure.json").read_text())
    bars = [bar for bar in drawn["data"] if bar["name"] == "PSNR seeds"]
    assert bars[0]["y"] == [row["mean"]["psnr"] for row in result["rows"]]
    assert bars[0]["error_y"]["array"] == [row["stderr"]["psnr"] for row in result["rows"]]
    assert (tmp_path / "out" / "figure.html").stat().st_size > 1000


def test_a_figure_over_the_batch_size_has_one_line_a_method(opened):
    pytest.importorskip("plotly")
    ledger = opened(command="labels", rows=plans.label_rows((1, 2, 4)))
    run(ledger)
    drawn = table.figure(ledger.plan, table.summarise(ledger.plan, ledger.values))
    lines = {line.name: line for line in drawn.data}
    assert list(lines["column-minimum % distinct"].x) == [1, 2, 4]
    assert list(lines["column-minimum % distinct"].y) == [100, 100, 100]
    assert "auto % repeated" in lines


def test_without_plotly_there_is_no_figure(opened, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.subplots", None)
    note = opened().draw()
    assert note is not None and "plotly is not installed" in note


# --- keeping and going on


def test_a_stopped_evaluation_goes_on_to_the_same_table(opened, tmp_path):
    whole = run(opened("whole"))
    stop = threading.Event()
    ledger = opened("parts")
    for count, _ in enumerate(running.measure(ledger, stop=stop), 1):
        if count == 5:
            stop.set()
    results = tmp_path / "parts" / "results.jsonl"
    lines = results.read_text().splitlines(keepends=True)
    assert len(lines) == 5
    results.write_text("".join(lines[:4]) + lines[4][: len(lines[4]) // 2])  # killed while it wrote
    again = opened("parts")
    assert results.read_text() == "".join(lines[:4]) and len(again.missing) == 8
    assert untimed(run(again)["rows"]) == untimed(whole["rows"])
    entries = [json.loads(line) for line in results.read_text().splitlines()]
    assert len({(entry["row"], entry["batch"]) for entry in entries}) == len(entries) == 12
    # Nothing is left to do.
    done = opened("parts")
    assert list(running.measure(done)) == []


def test_more_batches_continue_an_evaluation(opened):
    first = run(opened(batches=1))
    more = opened(batches=3)
    assert {batch for _, batch in more.missing} == {1, 2}
    run(more)
    back = opened(batches=1)
    assert back.missing == [] and back.write()["rows"] == first["rows"]


def test_rows_can_be_measured_one_after_the_other(opened):
    rows = plans.ablation_rows(QUICK, 2)
    whole = run(opened("whole"))
    first = plans.chosen_rows(rows, ["gradient*"])
    assert [row.name for row in first] == ["gradient only", "gradient off", "gradient and features off"]
    assert len(run(opened(rows=first))["rows"]) == 3
    second = plans.chosen_rows(rows, ["+ lazy group"])
    run(opened(rows=second))
    again = opened()
    assert {row.name for row, _ in again.missing} == {"+ fidelity", "+ registered group"}
    assert untimed(run(again)["rows"]) == untimed(whole["rows"])
    changed = plans.ablation_rows(dataclasses.replace(QUICK, tv=0.5), 2)
    with pytest.raises(GradinvError, match=r"holds another evaluation \(tv 0.0001, not 0.5\)"):
        opened(rows=changed[1:2])
    with pytest.raises(GradinvError, match=r"^There is no row 'x'; take some of gradient only, \+ fidelity"):
        plans.chosen_rows(rows, ["x"])


def test_an_inversion_that_was_stopped_midway_is_not_kept(opened):
    rows = plans.ablation_rows(dataclasses.replace(QUICK, iterations=1_000_000), 2)
    stop = threading.Event()
    ledger = opened(rows=rows)
    threading.Timer(0.5, stop.set).start()
    assert list(running.measure(ledger, stop=stop)) == []
    assert ledger.values == {} and ledger.errors == {}


def test_a_batch_that_fails_is_said_and_tried_again(opened, small, folder):
    rows = plans.ablation_rows(QUICK, 2)[:2]
    bench = small("ablation", *rows)
    picture = folder / bench.draw(rows[0], 1).pictures[0].key
    assert picture.name not in {p.key for p in bench.draw(rows[0], 0).pictures}
    good = picture.read_bytes()
    picture.write_bytes(b"no picture")
    ledger = opened(rows=rows)
    table = run(ledger)["rows"]
    assert [row["n"] for row in table] == [1, 1]
    assert set(ledger.errors) == {("gradient only", 1), ("+ fidelity", 1)}
    assert all(f"{picture.name} is not a picture" in sentence for sentence in ledger.errors.values())
    picture.write_bytes(good)
    again = opened(rows=rows)
    assert len(again.missing) == 2 and set(again.errors) == set(ledger.errors)
    assert [row["n"] for row in run(again)["rows"]] == [2, 2] and again.errors == {}
    assert opened(rows=rows).errors == {}


def test_where_every_batch_fails_the_reason_is_raised(opened):
    config = dataclasses.replace(QUICK, start="decoder")  # the small network has no decoder
    ledger = opened(rows=(Row("a", 2, config=config),))
    with pytest.raises(GradinvError, match=r"^There is no decoder for small at 8 px"):
        list(running.measure(ledger))


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"seed": 1}, r"seed 0, not 1"),
        ({"half": "tune"}, r"half report, not tune"),
        ({"command": "matching"}, r"command ablation, not matching"),
        ({"rows": plans.ablation_rows(dataclasses.replace(QUICK, tv=0.5), 2)}, r"tv 0.0001, not 0.5"),
        ({"rows": plans.ablation_rows(QUICK, 3)}, r"batch_size 2, not 3"),
    ],
)
def test_another_evaluation_is_refused(opened, changes, what, tmp_path):
    opened().begin()
    sentence = rf"^{tmp_path}/out holds another evaluation \({what}\); repeat its command or name another folder with"
    with pytest.raises(GradinvError, match=sentence):
        opened(**{"command": "ablation", **changes})


def test_an_evaluation_from_before_a_setting_existed_goes_on(opened, tmp_path):
    opened().begin()
    known = json.loads((tmp_path / "out" / "plan.json").read_text())
    for row in known["rows"]:
        assert row["config"].pop("stepping") == "auto"
    (tmp_path / "out" / "plan.json").write_text(json.dumps(known))
    assert len(opened().missing) == 12
    known["rows"][0]["config"]["unheard"] = 1
    (tmp_path / "out" / "plan.json").write_text(json.dumps(known))
    with pytest.raises(GradinvError, match=r"^The plan in .* is damaged"):
        opened()


def test_other_weights_are_another_evaluation(opened, folder, small_model, tmp_path):
    opened().begin()
    other = dataclasses.replace(small_model, sha256="1" * 64)
    with pytest.raises(GradinvError, match=r"holds another evaluation \(another version of the model small\)"):
        Ledger(tmp_path / "out", plan(folder), other)


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("plan.json", "{", r"^The plan in .* is damaged \(.*\); remove that folder or name another with --out\.$"),
        ("plan.json", "[]", r"^The plan in .* is damaged"),
        ("results.jsonl", "{}\n", r"^Line 1 of .*results\.jsonl is damaged; remove that line and go on\.$"),
        ("results.jsonl", '{"row": "+ fidelity", "batch": 0, "values": 3}\n', r"^Line 1 of "),
        ("results.jsonl", "\x00\x00\n", r"^Line 1 of "),
    ],
    ids=["torn plan", "list", "empty line", "number", "zeros"],
)
def test_damaged_files_are_one_sentence(opened, name, text, sentence, tmp_path):
    opened().begin()
    (tmp_path / "out" / name).write_text(text)
    with pytest.raises(GradinvError, match=sentence):
        opened()


def test_a_folder_of_something_else_is_left_alone(folder, small_model, tmp_path):
    with pytest.raises(GradinvError, match=r"val is not empty and holds no evaluation; name another folder with --out"):
        Ledger(folder, plan(folder), small_model)
    (tmp_path / "file").touch()
    with pytest.raises(GradinvError, match=r"file is a file; name a folder with --out\.$"):
        Ledger(tmp_path / "file", plan(folder), small_model)


# --- bad plans


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"batches": 0}, r"^At least one batch has to be measured, not 0\.$"),
        ({"rows": (Row("a", 0),)}, r"^A batch holds at least one image, not 0\.$"),
        ({"rows": (Row("a", 1), Row("a", 1))}, r"^Each size and each defence is measured once; name none"),
        ({"rows": (Row("a", 1, defence="wall:3"),)}, r"^There is no defence 'wall'; take one of none, clip"),
        ({"rows": ()}, r"^An evaluation needs at least one row; name a size or a defence\.$"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_measured_is_said(changes, sentence, folder):
    row = Row("a", 2, config=QUICK)
    usual = {"command": "ablation", "model": "small", "imagenet": str(folder), "rows": (row,), "batches": 1}
    with pytest.raises(GradinvError, match=sentence):
        Plan(**{**usual, **changes})


def test_a_folder_that_does_not_suffice_is_one_sentence(small, folder, small_model):
    with pytest.raises(GradinvError, match=r"^There is no folder .*nowhere; name the one that holds the class folders"):
        Bench(plan(folder / "nowhere"), small_model)
    rows = (Row("a", 7, config=QUICK),)
    with pytest.raises(GradinvError, match=r"has pictures of 6 classes that small knows, and a batch needs 7; take sm"):
        small("ablation", *rows)
    repeated = Row("b", 19, repeats=True)  # of six classes with four pictures each in the half that is reported
    bench = small("labels", repeated)
    assert len(bench.draw(repeated, 0).labels) == 19
    many = dataclasses.replace(repeated, batch_size=18)
    few = Bench(
        plan(fill(folder / "few", [f"n{n:08d}" for n in range(6)], each=2), "labels", rows=(many,)), small_model
    )
    with pytest.raises(GradinvError, match=r"too few pictures for a batch of 18; take a smaller batch or both halves"):
        few.draw(many, 0)


def test_at_least_one_worker(opened, small_model):
    ledger = opened()
    with pytest.raises(GradinvError, match=r"^At least one worker has to do the work, not 0\.$"):
        list(running.measure(ledger, workers=0))
    ledger.model = dataclasses.replace(small_model, network=copy.deepcopy(small_model.network).to("meta"))
    with pytest.raises(GradinvError, match=r"^Several workers share a CPU; a meta device is for one\.$"):
        list(running.measure(ledger, workers=2))


# --- the comparison


def test_peers_get_our_labels_and_are_timed_in_turn(opened, small, small_model, monkeypatch):
    calls: list[tuple[str, list[int], int]] = []

    def attack(
        name: str, model: Model, observation: Any, labels: torch.Tensor, iterations: int, **_: Any
    ) -> Reconstruction:
        calls.append((name, labels.tolist(), iterations))
        return Reconstruction(torch.full((len(labels), 3, 8, 8), 0.5), 2.0, {"invertinggradients": 0.25}.get(name, 0.5))

    monkeypatch.setattr(tasks, "breaching_attack", attack)
    monkeypatch.setattr(breaching, "require_breaching", lambda: None)
    rows = plans.comparison_rows(QUICK, 2, several=True)
    assert [row.name for row in rows][2:] == ["ours", "ours, 2 seeds", plans.TIMING]
    result = run(opened(command="compare", rows=rows))
    table = {row["name"]: row for row in result["rows"]}
    assert set(table) == {row.name for row in rows[:-1]}
    bench = small("compare", *rows)
    for number in range(2):
        batch = bench.draw(rows[0], number)
        ours = tasks.restore_labels(
            small_model, observe(small_model, batch.pixels, batch.labels), QUICK.labels
        ).labels.tolist()
        assert ("invertinggradients", ours, 2) in calls and ("seethroughgradients", ours, 2) in calls
    assert {iterations for _, _, iterations in calls} == {2, tasks.TIMED_ITERATIONS}
    assert table["breaching invertinggradients"]["mean"]["seconds_per_iteration"] == 0.25
    assert 0 < table["ours"]["mean"]["seconds_per_iteration"] < table["ours, 2 seeds"]["mean"]["seconds_per_iteration"]
    pixels = bench.draw(rows[0], 0).pixels
    grey = -10 * (pixels - 0.5).double().square().mean((1, 2, 3)).log10()
    first = opened(command="compare", rows=rows).values["breaching invertinggradients", 0]
    assert first["psnr"] == first["consensus_psnr"] == pytest.approx(float(grey.mean()))
    assert table["ours"]["gain"]["psnr"]["over"].startswith("breaching ")


def test_a_short_run_for_timing_is_executed_as_the_whole_one():
    cpu = torch.device("cpu")
    whole = AttackConfig(seeds=4, iterations=300, registration_interval=0.01)
    short = tasks._shortened(whole, cpu)
    assert short.iterations == tasks.TIMED_ITERATIONS and short.stepping == resolve_mode("auto", cpu)
    assert round(short.registration_interval * short.iterations) == 3
    assert tasks._shortened(dataclasses.replace(whole, seeds=1, iterations=2), cpu).stepping == "eager"
    assert tasks._shortened(dataclasses.replace(whole, stepping="eager"), cpu).stepping == "eager"


# --- the command


@pytest.fixture
def command(small_model, folder, monkeypatch):
    """Runs the command `evaluate NAME` on the small network and the folder, with two batches and steps."""
    monkeypatch.setattr("gradinv.cli.evaluate.load_model", lambda *_, **__: small_model)

    def command(name: str, *args: str) -> int:
        size = () if name in ("labels", "identify") else ("--batch-size", "2")
        quick = ("--preset", "paper", "--seeds", "2", "--iterations", "2", "--batches", "2", *size)
        return cli.main(["evaluate", name, "--imagenet", "val", *quick, *args])

    return command


def test_the_command_prints_the_table_and_keeps_it(command, capsys):
    assert command("ablation") == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert captured.err == "" and lines[0].startswith("ablation: small, 2 batches of the earlier half of each class's")
    result = json.loads(Path("evaluations/ablation-small/results.json").read_text())
    fidelity = result["rows"][1]
    gain = fidelity["gain"]["ssim"]
    sign = "+" if gain["mean"] >= 0 else "−"
    shown = [line for line in lines if line.startswith("+ fidelity")]
    assert f"{fidelity['mean']['psnr']:.2f} ± {fidelity['stderr']['psnr']:.2f}" in shown[0]
    assert any(f"{sign}{abs(gain['mean']):.3f} ± {gain['stderr']:.3f}" in line for line in shown)
    assert lines[-1] == "The results are kept in evaluations/ablation-small."
    # The same command has nothing left to do and prints the same, as JSON if it is asked to.
    assert command("ablation", "--json") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == result
    assert captured.err.startswith("12 of 12 parts are in evaluations/ablation-small already.")


def test_ctrl_c_keeps_what_is_done_and_the_command_goes_on(command, monkeypatch, capsys):
    measured = tasks.TASKS["labels"]
    done: list[Row] = []

    def task(bench: Bench, row: Row, batch: int) -> Values:
        done.append(row)
        if len(done) == 3:
            signal.raise_signal(signal.SIGINT)
        return measured(bench, row, batch)

    monkeypatch.setitem(tasks.TASKS, "labels", task)
    args = ("labels", "--sizes", "1,2", "--out", "mine")
    assert command(*args) == 130
    captured = capsys.readouterr()
    assert "Stopped after 3 of 8 parts; they are kept in mine" in one_sentence(captured.err)
    assert "K=2 repeated" in captured.out and Path("mine/results.csv").is_file()
    assert command(*args) == 0
    assert len(done) == 8 and "3 of 8 parts are in mine already." in capsys.readouterr().out


def test_ctrl_c_while_the_gallery_is_made_loses_nothing(command, monkeypatch, capsys):
    def of(*_: Any, progress: Callable[[int, int], None], **__: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        progress(1, 2)

    args = ("labels", "--sizes", "1", "--out", "mine")
    with monkeypatch.context() as patched:
        patched.setattr(Gallery, "of", of)
        assert command(*args) == 130
    assert "Stopped after 0 of 4 parts; they are kept in mine" in capsys.readouterr().err
    assert command(*args) == 0


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (GradinvError("The sky is clouded."), "The sky is clouded."),
        (torch.OutOfMemoryError("CUDA out of memory."), "The GPU ran out of memory; choose fewer pictures or a sm"),
    ],
    ids=["refused", "memory"],
)
def test_failed_batches_are_listed(command, monkeypatch, capsys, error, sentence):
    measured = tasks.TASKS["labels"]

    def task(bench: Bench, row: Row, batch: int) -> Values:
        if batch == 1:
            raise error
        return measured(bench, row, batch)

    monkeypatch.setitem(tasks.TASKS, "labels", task)
    assert command("labels", "--sizes", "1", "--out", "mine") == 1
    captured = capsys.readouterr()
    assert f"K=1 repeated, batch 1: {sentence}" in captured.out
    assert "2 of 4 parts failed" in one_sentence(captured.err)


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (("ablation", "--imagenet", "nowhere"), "There is no folder nowhere; name the one that holds the class fold"),
        (("ablation", "--sizes", "2"), "--sizes does not go with ablation, whose batches have one"),
        (("labels", "--batch-size", "2"), "--batch-size does not go with labels, which has sev"),
        (("matching", "--defences", "none"), "--defences does not go with matching; it has none."),
        (("labels", "--sizes", ","), "An evaluation needs at least one row; name a size or a"),
        (("identify", "--sizes", "7"), "val has pictures of 6 classes that small knows, and a b"),
        (("ablation", "--workers", "0"), "At least one worker has to do the work, not 0."),
        (("ablation", "--batches", "0"), "At least one batch has to be measured, not 0."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_use_is_one_sentence(args, sentence, command, capsys):
    assert command(*args) == 2
    assert one_sentence(capsys.readouterr().err).startswith(sentence)
    assert not Path("evaluations").exists()


def test_an_evaluation_needs_a_folder(capsys):
    assert fails(capsys, "evaluate", "ablation").startswith("Which pictures? Name a folder")


def test_a_network_with_another_normalisation_is_measured_with_it(elsewhere, capsys):
    fill(elsewhere / "tiny", ["n01443537", "n01629819"], side=32)
    args = ["evaluate", "labels", "--imagenet", "tiny", "--model", "resnet18-tiny", "--device", "cpu", "--image-size"]
    args += ["32", "--sizes", "1", "--batches", "1", "--rows", "K=1 distinct", "--out", "out", "--json"]
    assert cli.main([*args, "--mean", "0.5", "--std", "0.5,0.5,0.5"]) == 0
    plan = json.loads(Path("out/plan.json").read_text())
    assert plan["mean"] == 0.5 and plan["std"] == [0.5, 0.5, 0.5]
    assert "out holds another evaluation (" in fails(capsys, *args)
    # As it was kept before there was a choice.
    kept = {name: value for name, value in plan.items() if name not in ("mean", "std")}
    Path("out/plan.json").write_text(json.dumps(kept))
    assert cli.main(args) == 0


@pytest.mark.slow
def test_several_processes_measure_the_same(elsewhere, capfd):
    fill(elsewhere / "tiny", ["n01443537", "n01629819", "n01641577"], side=32)
    args = ["evaluate", "matching", "--imagenet", "tiny", "--seeds", "1", "--model", "resnet18-tiny", "--image-size"]
    args += ["32", "--device", "cpu", "--iterations", "1", "--batches", "2", "--batch-size", "2"]
    assert cli.main([*args, "--workers", "1", "--out", "one"]) == 0
    capfd.readouterr()
    assert cli.main([*args, "--workers", "2", "--out", "two", "--json"]) == 0
    said = capfd.readouterr()
    assert said.err == "The results are kept in two.\n"
    one = json.loads(Path("one/results.json").read_text())
    two = json.loads(Path("two/results.json").read_text())
    assert json.loads(said.out) == two and [row["name"] for row in one["rows"]] == ["l2", "cosine"]
    for a, b in zip(untimed(one["rows"]), untimed(two["rows"]), strict=True):
        assert a["mean"] == pytest.approx(b["mean"], rel=1e-4) and a["n"] == b["n"] == 2
