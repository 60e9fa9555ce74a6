"""Figures and picture tiles from plain data. No Streamlit.

Backgrounds are transparent and the colours keep a contrast of at least 3 on white and on near-black, so that a figure
stands on a light and on a dark page alike. Finished figures are Plotly's; the live ones are ECharts options, because
those are updated in place where Plotly's are drawn anew.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
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


def loss_curves(rows: Sequence[Mapping[str, Any]]) -> go.Figure:
    """Lines: each weighted term of the objective over the steps, the mean of the seeds, on a logarithmic axis."""
    figure = go.Figure()
    for name, (steps, values) in _terms(rows).items():
        figure.add_scatter(
            x=steps,
            y=values,
            name=name,
            mode="lines",
            line={"color": _colour(name), "width": 2},
            hovertemplate="step %{x}: %{y:.3g}",
        )
    figure.update_xaxes(title_text="step")
    values = [value for _, column in _terms(rows).values() for value in column]
    narrow = bool(values) and max(values) < 30 * min(values)
    figure.update_yaxes(title_text="weighted term", type="log", dtick="D2" if narrow else 1, tickformat="~g")
    return _dress(figure, height=320, hovermode="x unified")


def psnr_curves(rows: Sequence[Mapping[str, Any]], baseline: float | None, meetings: Sequence[int] = ()) -> go.Figure:
    """Lines: PSNR of each seed and of the consensus over the steps, of a single seed one; dashed, the best constant
    colour's; dotted, the steps after which the seeds meet."""
    figure, found = go.Figure(), _psnr(rows)
    for name, (steps, values) in found.items():
        whole = name in WHOLE
        figure.add_scatter(
            x=steps,
            y=values,
            name=name,
            mode="lines",
            line={"color": COLOURS[0] if whole else NEUTRAL, "width": 3 if whole else 1.2},
            hovertemplate="step %{x}: %{y:.2f} dB",
        )
    if baseline is not None and math.isfinite(baseline):
        ends = [values[-1] for name, (_, values) in found.items() if name in WHOLE and values]
        above = any(value > baseline + 2 for value in ends)
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
    figure.update_xaxes(title_text="step")
    figure.update_yaxes(title_text="PSNR in dB")
    return _dress(figure, height=320, hovermode="x unified")


def distance_curves(rows: Sequence[Mapping[str, Any]], column: str = "distance") -> go.Figure:
    """Lines: how far each seed's gradient and their mean still are from the shared one over the steps; or, with the
    column of that, their activations from the solved ones."""
    figure = go.Figure()
    for name, (steps, values) in _distances(rows, column).items():
        seed = name.startswith("seed")
        figure.add_scatter(
            x=steps,
            y=values,
            name=name,
            mode="lines",
            line={"color": NEUTRAL if seed else COLOURS[0], "width": 1.2 if seed else 3},
            hovertemplate="step %{x}: %{y:.3f}",
        )
    figure.update_xaxes(title_text="step")
    title = "1 − cosine similarity" if column == "distance" else "misfit"
    figure.update_yaxes(title_text=title, rangemode="tozero")
    return _dress(figure, height=320, hovermode="x unified", showlegend=True)


def live_losses(rows: Sequence[Mapping[str, Any]], steps: int) -> dict[str, Any]:
    """`loss_curves` as ECharts options for a run of so many steps, whose axis does not move while it grows."""
    series = [_line(name, _thin(points), _colour(name), 2) for name, points in _terms(rows).items()]
    return _live(series, steps, {"type": "log"})


def live_psnr(
    rows: Sequence[Mapping[str, Any]], steps: int, baseline: float | None, meetings: Sequence[int] = ()
) -> dict[str, Any]:
    """`psnr_curves` as ECharts options for a run of so many steps."""
    series = [
        _line(name, _thin(points), *((COLOURS[0], 3) if name in WHOLE else (NEUTRAL, 1)))
        for name, points in _psnr(rows).items()
    ]
    if baseline is not None and math.isfinite(baseline):
        ends = ([0, steps], [baseline, baseline])
        line = _line("constant colour", ends, COLOURS[1], 2)
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


def live_distance(rows: Sequence[Mapping[str, Any]], steps: int, column: str = "distance") -> dict[str, Any]:
    """`distance_curves` as ECharts options for a run of so many steps."""
    series = [
        _line(name, _thin(points), *((NEUTRAL, 1) if name.startswith("seed") else (COLOURS[0], 3)))
        for name, points in _distances(rows, column).items()
    ]
    return _live(series, steps, {"type": "value"})


def _colour(term: str) -> str:
    """A term has its colour in every run."""
    names = list(TERMS.values())
    return COLOURS[names.index(term) % len(COLOURS)] if term in names else NEUTRAL


def _terms(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[list[int], list[float]]]:
    """By readable name each term's steps and weighted values, averaged over the seeds; a log shows what is above 0."""
    names = list(dict.fromkeys(key for row in rows for key in row if key.endswith(".weighted")))
    found = {}
    for key in names:
        name = key.removesuffix(".weighted")
        steps, values = _mean_over_seeds(rows, key)
        kept = [(step, value) for step, value in zip(steps, values, strict=True) if value > 0]
        if kept:
            found[TERMS.get(name, name)] = ([step for step, _ in kept], [value for _, value in kept])
    return found


def _psnr(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[list[int], list[float]]]:
    seeds = _by_seed(rows, "psnr")
    found = {**seeds, WHOLE[0 if seeds else 1]: _mean_over_seeds(rows, "consensus_psnr")}
    return {name: points for name, points in found.items() if points[0]}


def _distances(rows: Sequence[Mapping[str, Any]], column: str) -> dict[str, tuple[list[int], list[float]]]:
    seeds = _by_seed(rows, column)
    alone = "distance" if column == "distance" else "misfit"
    found = {**seeds, "mean of the seeds" if seeds else alone: _mean_over_seeds(rows, column)}
    return {name: points for name, points in found.items() if points[0]}


def _by_seed(rows: Sequence[Mapping[str, Any]], key: str) -> dict[str, tuple[list[int], list[float]]]:
    """A column's curve of each seed; none where there is one only."""
    seeds = sorted({row["seed"] for row in rows})
    if len(seeds) < 2:
        return {}
    return {f"seed {seed + 1}": _mean_over_seeds([row for row in rows if row["seed"] == seed], key) for seed in seeds}


def _mean_over_seeds(rows: Iterable[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    values: dict[int, list[float]] = {}
    for row in rows:
        value = row.get(key)
        if value is not None and math.isfinite(value):
            values.setdefault(row["step"], []).append(value)
    return list(values), [sum(column) / len(column) for column in values.values()]


def _thin(points: tuple[list[int], list[float]]) -> tuple[list[int], list[float]]:
    steps, values = points
    gap = math.ceil(len(steps) / _POINTS) if steps else 1
    places = sorted({*range(0, len(steps), gap), *([len(steps) - 1] if steps else [])})
    return [steps[place] for place in places], [values[place] for place in places]


def _line(name: str, points: tuple[Sequence[float], Sequence[float]], colour: str, width: float) -> dict[str, Any]:
    return {
        "name": name,
        "type": "line",
        "showSymbol": False,
        "data": [[x, float(f"{y:.5g}")] for x, y in zip(*points, strict=True)],
        "lineStyle": {"color": colour, "width": width},
        "itemStyle": {"color": colour},
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
    return figure.update_layout(
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 8, "r": 8, "t": 8, "b": 8},
        legend={"orientation": "h", "yanchor": "top", "y": -0.24, "x": 0, "title": None},
        **layout,
    )
