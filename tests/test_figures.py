"""What the figures show, from rows and numbers small enough to check by hand."""

from __future__ import annotations

import base64
import io
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gradinv import figures
from gradinv.types import Observation, Preprocessing

ROWS: list[dict[str, Any]] = [
    {"step": 0, "seed": 0, "psnr": 9.0, "consensus_psnr": 10.0},
    {"step": 0, "seed": 1, "psnr": 11.0, "consensus_psnr": 10.0},
    {"step": 5, "seed": 0, "psnr": 12.0, "consensus_psnr": 14.0, "tv.raw": 9.0, "tv.weighted": 1.0, "bn.weighted": 0.0},
    {"step": 5, "seed": 1, "psnr": 13.0, "consensus_psnr": 14.0, "tv.raw": 9.0, "tv.weighted": 3.0, "bn.weighted": 0.0},
]


def luminance(colour: str) -> float:
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize(
    ("colour", "background"),
    list(itertools.product((*figures.COLOURS, figures.NEUTRAL), ("#ffffff", "#0f1517"))),
)
def test_colours_can_be_told_from_a_light_and_a_dark_page(colour: str, background: str) -> None:
    light, dark = sorted((luminance(colour), luminance(background)), reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= 3


def test_layer_norms_join_weight_and_bias_and_keep_the_order() -> None:
    gradients = {
        "conv1.weight": torch.tensor([3.0]),
        "fc.weight": torch.tensor([[3.0], [0.0]]),
        "fc.bias": torch.tensor([0.0, 4.0]),
    }
    observation = Observation(gradients, 1, Preprocessing(8, 8), "small", "0")
    norms = figures.layer_norms(observation)
    assert list(norms) == ["conv1", "fc"]
    assert norms == pytest.approx({"conv1": 3.0, "fc": 5.0})


def test_gradient_norms_are_bars_by_stage_in_the_networks_order() -> None:
    figure = figures.gradient_norms({"conv1": 1.0, "bn1": 0.5, "layer1.0.conv1": 2.0, "layer4.1.bn2": 3.0, "fc": 4.0})
    assert [trace.name for trace in figure.data] == ["stem", "stage 1", "stage 4", "classifier"]
    assert [list(trace.x) for trace in figure.data] == [[0, 1], [2], [3], [4]]
    assert list(figure.data[0].y) == [1.0, 0.5]
    assert figure.layout.yaxis.type == "log"
    assert figure.layout.paper_bgcolor == figure.layout.plot_bgcolor == "rgba(0,0,0,0)"


def test_loss_curves_average_the_seeds_and_leave_out_what_a_logarithm_cannot_show() -> None:
    figure = figures.loss_curves(ROWS)
    assert [(trace.name, list(trace.x), list(trace.y)) for trace in figure.data] == [("total variation", [5], [2.0])]
    assert figure.layout.yaxis.type == "log"


def test_a_term_has_the_same_colour_whichever_others_there_are() -> None:
    more = [{**row, "gradient.weighted": 1.0} for row in ROWS]
    colours = [{t.name: t.line.color for t in figures.loss_curves(rows).data} for rows in (ROWS, more)]
    assert colours[0]["total variation"] == colours[1]["total variation"] != colours[1]["gradient"]
    assert len(figures.TERMS) <= len(set(figures.COLOURS)), "each term has one of its own"


def test_psnr_curves_show_each_seed_the_consensus_and_the_baseline() -> None:
    figure = figures.psnr_curves(ROWS, 13.5)
    assert [trace.name for trace in figure.data] == ["seed 1", "seed 2", "consensus"]
    assert [list(trace.y) for trace in figure.data] == [[9.0, 12.0], [11.0, 13.0], [10.0, 14.0]]
    assert figure.layout.shapes[0].y0 == 13.5
    (told,) = figure.layout.annotations
    # At the left and above its line, where no curve strikes it through.
    assert (told.text, told.xanchor, told.yanchor) == ("constant colour", "left", "bottom")


def test_one_seed_is_its_own_consensus_and_drawn_once() -> None:
    rows = [row for row in ROWS if row["seed"] == 0]
    assert [trace.name for trace in figures.psnr_curves(rows, None).data] == ["rebuilt"]
    (live,) = figures.live_psnr(rows, 10, None)["series"]
    assert live["name"] == "rebuilt" and live["lineStyle"]["width"] == 3


@pytest.mark.parametrize("baseline", [None, math.inf, math.nan])
def test_without_a_baseline_there_is_no_line(baseline: float | None) -> None:
    assert not figures.psnr_curves(ROWS, baseline).layout.shapes
    names = [series["name"] for series in figures.live_psnr(ROWS, 10, baseline)["series"]]
    assert names == ["seed 1", "seed 2", "consensus"]


def test_distance_curves_show_each_seed_and_their_mean_and_none_before_the_first_step() -> None:
    gone = [None, None, 0.6, 0.2]
    rows = [{**row, "distance": distance} for row, distance in zip(ROWS, gone, strict=True)]
    expected = {"seed 1": [[5, 0.6]], "seed 2": [[5, 0.2]], "mean of the seeds": [[5, pytest.approx(0.4)]]}
    figure, live = figures.distance_curves(rows), figures.live_distance(rows, 40)
    assert {trace.name: [[trace.x[0], trace.y[0]]] for trace in figure.data} == expected
    assert {series["name"]: series["data"] for series in live["series"]} == expected
    assert live["xAxis"]["max"] == 40
    assert [trace.name for trace in figures.distance_curves(rows[::2]).data] == ["distance"]


def test_values_that_are_not_finite_are_left_out() -> None:
    rows: list[dict[str, Any]] = [{"step": 0, "seed": 0, "psnr": math.inf, "consensus_psnr": None}, *ROWS[2:]]
    assert [list(trace.x) for trace in figures.psnr_curves(rows, None).data] == [[5], [5], [5]]


def test_figures_of_a_run_without_rows_are_empty() -> None:
    assert not figures.loss_curves([]).data
    assert not figures.psnr_curves([], None).data
    assert figures.live_losses([], 10)["series"] == []


def test_live_charts_say_the_same_as_the_finished_ones_on_an_axis_that_does_not_move() -> None:
    options = figures.live_psnr(ROWS, 40, 13.5)
    assert {series["name"]: series["data"] for series in options["series"]} == {
        "seed 1": [[0, 9.0], [5, 12.0]],
        "seed 2": [[0, 11.0], [5, 13.0]],
        "consensus": [[0, 10.0], [5, 14.0]],
        "constant colour": [[0, 13.5], [40, 13.5]],
    }
    assert (options["xAxis"]["min"], options["xAxis"]["max"]) == (0, 40)
    assert options["animation"] is False
    losses = figures.live_losses(ROWS, 40)
    assert [series["data"] for series in losses["series"]] == [[[5, 2.0]]]
    assert losses["yAxis"]["type"] == "log"


def test_a_long_live_curve_is_thinned_but_keeps_its_ends() -> None:
    rows = [{"step": step, "seed": 0, "psnr": 1.0, "consensus_psnr": float(step)} for step in range(1000)]
    data = figures.live_psnr(rows, 1000, None)["series"][0]["data"]
    assert len(data) <= 162
    assert (data[0], data[-1]) == ([0, 0.0], [999, 999.0])


def test_a_tile_is_an_enlarged_webp_of_the_same_picture() -> None:
    pixels = torch.zeros(2, 3, 48, 48)
    pixels[1, 0] = 1
    uris = figures.tiles(pixels)
    images = []
    for uri in uris:
        head, data = uri.split(",")
        assert head == "data:image/webp;base64"
        images.append(np.array(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")))
    assert [image.shape for image in images] == [(144, 144, 3)] * 2
    assert images[0].max() < 15
    assert images[1][..., 0].min() > 240 and images[1][..., 1:].max() < 15


def test_a_large_tile_keeps_its_size() -> None:
    data = figures.tile(Image.new("RGB", (224, 224))).split(",")[1]
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (224, 224)
