"""What the page says of solved layers: live, at the end, of a recorded run, and where none could be solved."""

from __future__ import annotations

from typing import Any

import pytest

from gradinv import figures
from gradinv.web.pages import replay
from gradinv.web.parts import showcase, solved
from gradinv.web.parts.inversion import Layer, Solving

NODES = ("layer4.1.conv1", "layer4.0", "layer1.1", "maxpool")
EXACT, NEAR = Layer("layer4.0", (512, 2, 2), (4e-7, 2e-7)), Layer("layer1.1", (64, 16, 16), (0.02, 0.023, 0.3))


def test_each_layer_has_a_mark_and_the_sentence_says_what_is_known() -> None:
    begun = solved.ladder(Solving(NODES))
    assert 'aria-label="0 of 4 layers solved"' in begun and begun.count("<i ") == 4 and "gi-exact" not in begun
    on = solved.ladder(Solving(NODES, (EXACT,)))
    assert on.count('class="gi-exact"') == 1 and "layer4.0, 2,048 numbers of each picture (512 × 2 × 2)" in on
    over = solved.ladder(Solving(NODES, (EXACT, NEAR), "layer1.1", "Fewer equations than unknowns.", 3.4))
    assert (over.count('class="gi-exact"'), over.count('class="gi-near"')) == (1, 1)
    assert "in 3 s: layer4.0" in over and "known exactly; layer1.1, 16,384" in over
    assert "known to within 2.3 %. Pixels are searched for below layer1.1 only." in over
    stages = [over.index(f">{stage}</small>") for stage in ("layer4", "layer1", "maxpool")]
    assert stages == sorted(stages)


@pytest.mark.parametrize("boundary", ["logits", "loss"])
def test_where_matching_runs_instead_it_says_so_and_why(boundary: str) -> None:
    said = solved.words(Solving(NODES, (), boundary, "In train mode no layer is linear."))
    assert "by the preset Matching. In train mode" in said and "Pixels are searched for below" not in said


def test_a_recorded_run_tells_its_layers_if_it_has_any() -> None:
    node: dict[str, Any] = {"name": "layer4.0", "shape": [512, 2, 2], "error": [None, 0.1, 0.2]}
    run = {"recovered": {"nodes": [node], "stopped": "", "seconds": 1.0}, "boundary": "layer4.0"}
    found = solved.recorded(run)
    assert found is not None and found.layers == (Layer("layer4.0", (512, 2, 2), (float("inf"), 0.1, 0.2)),)
    assert 'aria-label="1 layer solved"' in solved.ladder(found)
    assert solved.recorded({}) is None and solved.recorded({"recovered": {"nodes": []}}) is None


def test_every_bundled_run_has_numbers_only_and_says_what_they_measure() -> None:
    for run in showcase.library().values():
        found = replay._misfit(run)
        assert all(value is None or value == value for value in found["distance"])
        assert found["measured"] in [name for name, _ in solved.MISFIT.values()]


def test_the_misfit_of_solved_activations_is_drawn_where_no_gradient_is_matched() -> None:
    rows = [
        {
            "step": step,
            "seed": seed,
            "distance": None,
            "activations.raw": 1.0 / step,
            "activations.weighted": 1.0 / step,
        }
        for step in (1, 2)
        for seed in (0, 1)
    ]
    assert not figures.distance_curves(rows).data
    drawn = figures.distance_curves(rows, "activations.raw")
    assert [trace.name for trace in drawn.data] == ["seed 1", "seed 2", "mean of the seeds"]
    assert len(figures.live_distance(rows, 2, "activations.raw")["series"]) == 3
    assert [trace.name for trace in figures.loss_curves(rows).data] == ["solved activations"]


def test_a_layer_that_is_exact_for_most_pictures_only_says_for_how_many() -> None:
    most = Layer("layer4.0", (512, 2, 2), (1e-6, 0.007, 1e-6, float("inf"), 1e-6))
    said = solved.words(Solving(NODES, (most,), "layer4.0"))
    assert "(512 × 2 × 2) known exactly for 3 of 5 pictures, the others not at all. Pixels" in said
    one = solved.words(Solving(NODES, (Layer("layer4.0", (512, 2, 2), (1e-6, 0.007)),), "layer4.0"))
    assert "known exactly for 1 of 2 pictures, the other to within 0.7 %. Pixels" in one
