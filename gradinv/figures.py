"""Figures and picture tiles from plain data. No Streamlit.

Backgrounds are transparent and the colours keep a contrast of at least 3 on white and on near-black, so that a figure
stands on a light and on a dark page alike. Finished figures are Plotly's; the live ones are ECharts options, because
those are updated in place where Plotly's are drawn anew.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
import torch
from PIL import Image
from torch import Tensor

from gradinv.images import to_image
from gradinv.types import Observation

COLOURS = ("#0f8f86", "#d9662b", "#7c6bd6", "#3c80cf", "#c2568c", "#8c8020", "#a8645a", "#6b8a3a")
NEUTRAL = "#7b858c"

TERMS = {
    "gradient": "gradient",
    "features": "features",
    "activations": "solved activations",
    "bn": "BN statistics",
    "tv": "total variation",
    "prior": "learned prior",
    "l2": "ℓ2 norm",
    "group": "group consistency",
}
_STAGES = {"layer1": "stage 1", "layer2": "stage 2", "layer3": "stage 3", "layer4": "stage 4", "fc": "classifier"}
MEET = "the seeds meet"
WHOLE = ("consensus", "rebuilt")  # the curve of several seeds together, and of one alone
_SMALL = 128  # px a side below which a tile is enlarged
_POINTS = 160  # a curve at most, when it is drawn live
_CHANNELS = 3  # a side of what is shown of a layer
LAYOUT = {
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)",
    "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
}
"""Of all figures."""
# From 0, where a unit is off, to the largest value: red, green and blue in [0, 1].
_RAMP = torch.tensor([[0.06, 0.12, 0.13], [0.06, 0.56, 0.53], [0.93, 1.0, 0.98]])


def tiles(images: Tensor) -> tuple[str, ...]:
    """Pixels (B, 3, S, S) in [0, 1] → one WebP data URI an image.

    Small images are enlarged first: lossy WebP halves the colours' resolution, which shows at 64 px.
    """
    return tuple(tile(to_image(pixels)) for pixels in images)


def tile(image: Image.Image, quality: int = 82) -> str:
    """An RGB image → a WebP data URI, small ones enlarged by a whole factor to at least 128 px a side."""
    if (factor := math.ceil(_SMALL / max(image.size))) > 1:
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC)
    packed = io.BytesIO()
    image.save(packed, "WEBP", quality=quality)
    return "data:image/webp;base64," + base64.b64encode(packed.getvalue()).decode("ascii")


def activations(values: Tensor, reference: Tensor | None = None) -> tuple[str, ...]:
    """What a layer holds of each image, (B, C, H, W) and at least 0 → one WebP data URI an image.

    Each shows up to nine channels, those that differ most over images and places, the same of every image: a dark place
    is 0, where the unit is off. `reference`, of the same shape, decides the channels and what is bright; default: the
    values themselves.
    """
    reference = values if reference is None else reference
    spread = reference.transpose(0, 1).flatten(1).std(1)
    chosen = spread.argsort(descending=True)[: _CHANNELS**2]
    side = math.ceil(len(chosen) ** 0.5)
    brightest = reference[:, chosen].amax((0, 2, 3)).clamp(min=1e-12).view(-1, 1, 1)
    shares = (values[:, chosen] / brightest).clamp(0, 1).cpu()
    count, _, height, width = shares.shape
    scale = max(1, round(_SMALL / (side * max(height, width))))
    gap = max(2, _SMALL // 40)
    down, right = height * scale + gap, width * scale + gap
    tiles = []
    for image in range(count):
        sheet = Image.new("RGBA", (side * right - gap, side * down - gap))
        for place, share in enumerate(shares[image]):
            cell = to_image(_coloured(share)).resize((width * scale, height * scale), Image.Resampling.NEAREST)
            sheet.paste(cell, (place % side * right, place // side * down))
        tiles.append(tile(sheet, 75))
    return tuple(tiles)


def _coloured(shares: Tensor) -> Tensor:
    """Shares (H, W) in [0, 1] → pixels (3, H, W)."""
    way = shares * (len(_RAMP) - 1)
    low = way.floor().clamp(max=len(_RAMP) - 2).long()
    return torch.lerp(_RAMP[low], _RAMP[low + 1], (way - low)[..., None]).permute(2, 0, 1)


def layer_norms(observation: Observation) -> dict[str, float]:
    """The ℓ2 norm of each layer's gradient, weights and biases together, in the network's order."""
    squares: dict[str, float] = {}
    for name, gradient in observation.gradients.items():
        layer = name.rpartition(".")[0]
        squares[layer] = squares.get(layer, 0.0) + float(torch.linalg.vector_norm(gradient.float())) ** 2
    return {name: math.sqrt(value) for name, value in squares.items()}


def gradient_norms(norms: Mapping[str, float]) -> go.Figure:
    """Bars: the ℓ2 norm of each layer's gradient on a logarithmic axis, coloured by the network's stage."""
    names = list(norms)
    stages = [_STAGES.get(name.split(".")[0], "stem") for name in names]
    figure = go.Figure()
    for index, stage in enumerate(dict.fromkeys(stages)):
        places = [place for place, own in enumerate(stages) if own == stage]
        figure.add_bar(
            x=places,
            y=[norms[names[place]] for place in places],
            customdata=[names[place] for place in places],
            name=stage,
            marker_color=COLOURS[index % len(COLOURS)],
            marker_line_width=0,
            hovertemplate="%{customdata}<br>‖∇W‖ = %{y:.3g}<extra></extra>",
        )
    figure.update_xaxes(title_text="layers, from the input to the output", showticklabels=False, showgrid=False)
    figure.update_yaxes(title_text="gradient norm", type="log", dtick=1)
    return _dress(figure, height=300, bargap=0.15)


@dataclass(frozen=True)
class Curve:
    """A line of a chart by step; all seeds together have a thicker one than each."""

    name: str
    steps: list[int]
    values: list[float]
    colour: str
    width: float


Rows = Sequence[Mapping[str, Any]]


def loss_curves(rows: Rows) -> go.Figure:
    """Lines: each weighted term of the objective over the steps, the mean of the seeds, on a logarithmic axis."""
    curves = _terms(rows)
    values = [value for curve in curves for value in curve.values]
    narrow = bool(values) and max(values) < 30 * min(values)
    figure = _drawn(curves, "%{y:.3g}")
    figure.update_yaxes(title_text="weighted term", type="log", dtick="D2" if narrow else 1, tickformat="~g")
    return figure


def psnr_curves(rows: Rows, baseline: float | None, meetings: Sequence[int] = ()) -> go.Figure:
    """Lines: PSNR of each seed and of the consensus over the steps, of a single seed one; dashed, the best constant
    colour's; dotted, the steps after which the seeds meet."""
    curves = _psnr(rows)
    figure = _drawn(curves, "%{y:.2f} dB")
    if baseline is not None and math.isfinite(baseline):
        above = any(curve.values[-1] > baseline + 2 for curve in curves if curve.name in WHOLE)
        figure.add_hline(
            y=baseline,
            line={"color": COLOURS[1], "dash": "dash", "width": 2},
            annotation_text="constant colour",
            # Curves begin below the line; where they end near it, there is room on the left.
            annotation_position="bottom right" if above else "top left",
        )
    for step in meetings:
        figure.add_vline(
            x=step,
            line={"color": NEUTRAL, "dash": "dot", "width": 1.2},
            annotation={"text": MEET, "textangle": -90, "yanchor": "middle", "y": 0.45, "xanchor": "right"},
        )
    figure.update_yaxes(title_text="PSNR in dB")
    return figure


def distance_curves(rows: Rows, column: str = "distance") -> go.Figure:
    """Lines: how far each seed's gradient and their mean still are from the shared one over the steps; or, with the
    column of that, their activations from the solved ones."""
    figure = _drawn(_distances(rows, column), "%{y:.3f}", showlegend=True)
    title = "1 − cosine similarity" if column == "distance" else "misfit"
    figure.update_yaxes(title_text=title, rangemode="tozero")
    return figure


def live_losses(rows: Rows, steps: int) -> dict[str, Any]:
    """`loss_curves` as ECharts options for a run of so many steps, whose axis does not move while it grows."""
    return _live([_line(curve) for curve in _terms(rows)], steps, {"type": "log"})


def live_psnr(rows: Rows, steps: int, baseline: float | None, meetings: Sequence[int] = ()) -> dict[str, Any]:
    """`psnr_curves` as ECharts options for a run of so many steps."""
    series = [_line(curve) for curve in _psnr(rows)]
    if baseline is not None and math.isfinite(baseline):
        line = _line(Curve("constant colour", [0, steps], [baseline, baseline], COLOURS[1], 2))
        series.append({**line, "lineStyle": {**line["lineStyle"], "type": "dashed"}})
    if series and meetings:
        series[0]["markLine"] = {
            "symbol": "none",
            "silent": True,
            "lineStyle": {"color": NEUTRAL, "type": "dotted"},
            "label": {"formatter": MEET, "position": "insideMiddleTop"},
            "data": [{"xAxis": step} for step in meetings],
        }
    return _live(series, steps, {"type": "value", "scale": True})


def live_distance(rows: Rows, steps: int, column: str = "distance") -> dict[str, Any]:
    """`distance_curves` as ECharts options for a run of so many steps."""
    return _live([_line(curve) for curve in _distances(rows, column)], steps, {"type": "value"})


def _terms(rows: Rows) -> list[Curve]:
    """Each term's weighted values, averaged over the seeds; a logarithmic axis shows what is above 0. A term has its
    colour in every run."""
    found = []
    for key in dict.fromkeys(key for row in rows for key in row if key.endswith(".weighted")):
        term = key.removesuffix(".weighted")
        colour = COLOURS[list(TERMS).index(term) % len(COLOURS)] if term in TERMS else NEUTRAL
        kept = {step: value for step, value in zip(*_mean_over_seeds(rows, key), strict=True) if value > 0}
        if kept:
            found.append(Curve(TERMS.get(term, term), list(kept), list(kept.values()), colour, 2))
    return found


def _psnr(rows: Rows) -> list[Curve]:
    return _seeds(rows, "psnr", "consensus_psnr", *WHOLE)


def _distances(rows: Rows, column: str) -> list[Curve]:
    return _seeds(rows, column, column, "mean of the seeds", "distance" if column == "distance" else "misfit")


def _seeds(rows: Rows, key: str, key_of_all: str, several: str, alone: str) -> list[Curve]:
    """A column's curve of each seed, where there are several, and that of all together, called so or alone."""
    seeds = sorted({row["seed"] for row in rows})
    found = [
        Curve(f"seed {seed + 1}", *_mean_over_seeds([row for row in rows if row["seed"] == seed], key), NEUTRAL, 1.2)
        for seed in (seeds if len(seeds) > 1 else ())
    ]
    found.append(Curve(several if found else alone, *_mean_over_seeds(rows, key_of_all), COLOURS[0], 3))
    return [curve for curve in found if curve.steps]


def _mean_over_seeds(rows: Rows, key: str) -> tuple[list[int], list[float]]:
    values: dict[int, list[float]] = {}
    for row in rows:
        value = row.get(key)
        if value is not None and math.isfinite(value):
            values.setdefault(row["step"], []).append(value)
    return list(values), [sum(column) / len(column) for column in values.values()]


def _drawn(curves: Sequence[Curve], hover: str, **layout: Any) -> go.Figure:
    figure = go.Figure()
    for curve in curves:
        figure.add_scatter(
            x=curve.steps,
            y=curve.values,
            name=curve.name,
            mode="lines",
            line={"color": curve.colour, "width": curve.width},
            hovertemplate=f"step %{{x}}: {hover}",
        )
    figure.update_xaxes(title_text="step")
    return _dress(figure, height=320, hovermode="x unified", **layout)


def _line(curve: Curve) -> dict[str, Any]:
    """A curve for ECharts, thinned, with its last point."""
    points = list(zip(curve.steps, curve.values, strict=True))
    points = [*points[: -1 : math.ceil(len(points) / _POINTS)], points[-1]]
    return {
        "name": curve.name,
        "type": "line",
        "showSymbol": False,
        "data": [[x, float(f"{y:.5g}")] for x, y in points],
        "lineStyle": {"color": curve.colour, "width": round(curve.width)},
        "itemStyle": {"color": curve.colour},
    }


def _live(series: list[dict[str, Any]], steps: int, axis: dict[str, Any]) -> dict[str, Any]:
    return {
        "animation": False,
        "grid": {"left": 4, "right": 12, "top": 12, "bottom": 46, "containLabel": True},
        "legend": {"bottom": 0, "left": 0, "itemWidth": 16, "icon": "roundRect", "itemHeight": 3},
        "tooltip": {"trigger": "axis", "confine": True, "valueFormatter": "%.3g"},
        "xAxis": {"type": "value", "min": 0, "max": steps, "splitLine": {"show": False}},
        "yAxis": axis,
        "series": series,
    }


def _dress(figure: go.Figure, **layout: Any) -> go.Figure:
    legend = {"orientation": "h", "yanchor": "top", "y": -0.24, "x": 0, "title": None}
    return figure.update_layout(**LAYOUT, legend=legend, **layout)
