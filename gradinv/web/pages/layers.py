"""The page Layer by layer: equations against unknowns, what each layer gives away, one mask, and why noise stops it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
import streamlit as st
import torch

from gradinv import figures
from gradinv.cli.say import AS_GOOD_AS_EXACT, exact, known, percent
from gradinv.models import Model
from gradinv.network import STEM, node_shapes, parts_of, stage_of
from gradinv.recovery.convolution import Equations
from gradinv.web.parts import lessons, markup, shared
from gradinv.web.parts.elements import chart, guarded, html, lead
from gradinv.web.parts.lessons import OFF
from gradinv.web.parts.markup import Row, Tile
from gradinv.web.parts.ways import Way, way

MOST = 16  # pictures in a batch
DOWN = "layers, from the output down to the picture"  # an axis of charts
SIDES = ("64", "96", "128")  # px
NOISE = (OFF, "1e-7", "1e-6", "1e-5", "1e-4", "1e-3", "1e-2")


@dataclass(frozen=True)
class Count:
    """A layer's equations and unknowns for each of its channels, by the network's shapes alone."""

    name: str
    shape: tuple[int, int, int]
    equations: int
    unknowns: int

    @property
    def enough(self) -> bool:
        """Whether there are as many equations as unknowns."""
        return self.equations >= self.unknowns


@guarded()
def page() -> None:
    """Everything on the page."""
    lead(
        "Layer by layer",
        "Most of what a network computes of a picture can be worked out from the gradient, without any guessing. "
        "Each layer is a set of equations. As long as there are as many equations as unknown numbers, the "
        "attacker knows the layer exactly and goes on to the one below.",
    )
    choice = lessons.controls(MOST, sides=SIDES)
    network = shared.model(choice.network, size=choice.side)
    pool = lessons.samples(choice.network)
    pool, places = lessons.drawn(pool, choice)
    places = places[:MOST]
    counts = counted(network, len(places))
    st.header("1. Equations against unknowns", anchor=False)
    left, right = st.columns([5, 3], gap="large")
    with left:
        told = "By layer, from the output down: the equations and unknowns for each channel, on a logarithmic axis"
        chart(against(counts), "against", told)
    with right:
        st.markdown(_explained(counts, len(places)))
    with st.expander("The same as a table"):
        html(table(counts))
    st.header("2. Solved, here and now", anchor=False)
    given = lessons.of_batch(network, pool, places)
    if (clean := way(given, (), choice.seed)) is None:
        return
    _solved(network, pool, places, clean)
    st.header("4. Why noise stops it", anchor=False)
    _noise(given, [count.name for count in counts], clean, choice.seed)
    lessons.credits(pool)


# --- the count


def counted(model: Model, batch_size: int) -> list[Count]:
    """Each layer's equations and unknowns, the highest layer first."""
    shapes, found = node_shapes(model.network, model.preprocessing.size), []
    blocks = parts_of(model.network).blocks
    for index in range(len(blocks) - 1, -1, -1):
        block = blocks[index]
        below = blocks[index - 1].name if index else STEM
        inputs = [below, *(unit.name for unit in block.units[:-1])]
        outputs = [*(unit.name for unit in block.units[:-1]), block.name]
        for place in range(len(block.units) - 1, -1, -1):
            units = [block.units[place]]
            if place == 0 and block.shortcut is not None:
                units.append(block.shortcut)
            _, height, width = shapes[inputs[place]]
            # The shapes alone count, so nothing has to be there.
            here = [shapes[outputs[place]], shapes[block.name]][: len(units)]
            equations = sum(
                Equations(
                    unit,
                    torch.empty(batch_size, *shape, device="meta"),
                    torch.empty(unit.conv.weight.shape, device="meta"),
                ).count(height, width)
                for unit, shape in zip(units, here, strict=True)
            )
            found.append(Count(inputs[place], shapes[inputs[place]], equations, batch_size * height * width))
    return found


def against(counts: Sequence[Count]) -> go.Figure:
    """Both numbers by layer: where the unknowns rise above the equations, the way ends."""
    names = [count.name for count in counts]
    figure = go.Figure()
    for name, values, colour in (
        ("unknowns", [count.unknowns for count in counts], figures.COLOURS[1]),
        ("equations", [count.equations for count in counts], figures.COLOURS[0]),
    ):
        figure.add_scatter(
            x=names,
            y=values,
            name=name,
            mode="lines+markers",
            line={"color": colour, "width": 2.5, "shape": "hvh"},
            marker={"size": 6},
            hovertemplate=f"%{{x}}: %{{y:,}} {name}<extra></extra>",
        )
    figure.update_xaxes(title_text=DOWN, showgrid=False, **_stages(names))
    figure.update_yaxes(title_text="for each channel", type="log", dtick=1)
    return figure.update_layout(**lessons.LAYOUT, height=330)


def _stages(names: Sequence[str]) -> dict[str, Any]:
    """Of an axis of layers the marks: each stage's name where it begins."""
    begins: dict[str, str] = {}
    for name in names:
        begins.setdefault(stage_of(name), name)
    return {"tickvals": list(begins.values()), "ticktext": list(begins), "tickangle": 0}


def _explained(counts: Sequence[Count], batch_size: int) -> str:
    """Which layer is reached by the count alone, and why not the next one."""
    short = next((place for place, count in enumerate(counts) if not count.enough), None)
    first = counts[0]
    words = (
        f"A layer’s gradient has one number for each of its weights, and each of them is one equation. The unknowns "
        f"are what the layer sees of the {markup.count(batch_size, 'picture')}, so **twice the pictures are twice "
        "the unknowns**, and larger pictures have more places."
    )
    if short is None:
        return f"{words}\n\nHere there are enough down to **{counts[-1].name}**, the lowest layer."
    count = counts[short]
    ratio = count.unknowns / count.equations
    reached = f"down to **{counts[short - 1].name}**" if short else f"not even for **{first.name}**"
    return (
        f"{words}\n\nHere there are enough {reached}. The next one, **{count.name}**, has {count.equations:,} "
        f"equations and {ratio:.1f} times as many unknowns, {count.unknowns:,}. Two more things are known of a layer: "
        "it is never negative, and it leads to the layers above. They make up for a few missing equations. Where more "
        "are missing, the attack stops."
    )


def table(counts: Sequence[Count]) -> str:
    """The count as HTML."""
    rows = [
        (
            count.name,
            " × ".join(map(str, count.shape)),
            f"{count.equations:,}",
            f"{count.unknowns:,}",
            "enough" if count.enough else "too few",
        )
        for count in counts
    ]
    head = ("Layer", "Shape", "Equations", "Unknowns", "")
    return markup.table(head, rows, "gi-counts", label="Equations and unknowns by layer")


def _solved(network: Model, pool: lessons.Pool, places: Sequence[int], way: Way) -> None:
    if not way.layers:
        st.warning(f"No layer below the last one can be solved. {way.stopped}")
        return
    lowest = way.layers[-1]
    st.html(way.ladder(network))
    if way.stopped:
        st.markdown(f"**Why it stops there:** {way.stopped}")
    layers = {seen.name: seen for seen in way.layers}
    # Another batch may reach another layer.
    if st.session_state.get("layer") not in layers:
        st.session_state.pop("layer", None)
    name = st.select_slider("Layer, from the output down", list(layers), lowest.name, key="layer")
    seen = layers[name]
    titles = [pool.candidates[place].picture.name for place in places]
    originals = [
        Tile(lessons.thumbnail_of(pool, place), f"Original: {title}", title)
        for place, title in zip(places, titles, strict=True)
    ]
    numbers = f"{seen.layer.numbers:,} numbers of each picture; nine of {seen.layer.shape[0]} channels"
    rows = [
        Row("Originals", originals, "only the client has them"),
        Row("True", _tiles(seen.own, f"What {name} holds of", titles), numbers),
        Row("Recovered", _tiles(seen.found, f"What was recovered of {name} for", titles), "from the gradient alone"),
    ]
    with st.container(key="layer-board"):
        html(markup.board(rows))
        html(
            markup.facts(
                [
                    ("known, as the attacker estimates it", known(seen.layer.errors)),
                    ("true error", percent(seen.true)),
                    ("places where the mask is wrong", percent(seen.wrong)),
                ]
            )
        )
    st.header("3. One mask", anchor=False)
    left, right = st.columns([5, 3], gap="large")
    with left, st.container(key="mask-board"):
        tiles = [
            Tile(seen.channel[0], f"One channel of {name} of {titles[0]}", "one channel, recovered"),
            Tile(seen.mask[0], "Its mask: bright where the channel is on", "its mask"),
            Tile(seen.own_mask[0], "The true mask", "the true mask"),
        ]
        html(markup.board([Row(titles[0], tiles, name)]))
    with right:
        st.markdown(
            "Behind each layer stands a **ReLU**, which turns what is negative into 0. Where it gives 0 it is off: "
            "there nothing of the layer reaches the output, and nothing of the gradient comes back. Which places are "
            f"on is the **mask**; in this channel {percent(seen.on)} are.\n\n"
            "Whoever knows a layer knows its mask. And with the mask the gradient can be followed one layer further "
            "down, where the next equations wait. One wrong place spoils an equation, but it shows, and can be mended."
        )


def _tiles(uris: Sequence[str], what: str, titles: Sequence[str]) -> list[Tile]:
    return [Tile(uri, f"{what} {title}") for uri, title in zip(uris, titles, strict=True)]


# --- noise


def _noise(given: lessons.Given, nodes: Sequence[str], clean: Way, seed: int) -> None:
    words, drawn = st.columns([3, 5], gap="large")
    with words:
        noise = st.select_slider(
            "Gaussian noise on each number of the gradient, σ", NOISE, OFF, key="noise", bind="query-params"
        )
        st.markdown(
            "Noise on the gradient is an error in every equation. Solving a layer enlarges it, and the more so the "
            "fewer equations there are to spare. The error goes along to the next layer, and where the smallest "
            "numbers drown in it, masks go wrong. So noise does not hide a picture evenly: it **takes the lowest "
            "layers first**, and those are the ones that look like the picture."
        )
        noisy = None if noise == OFF else way(given, (f"noise:{noise}",), seed)
        if noisy is not None:
            st.markdown(stopped_by(clean, noisy))
    with drawn:
        told = "The true error of each layer that was solved, from the output down, without noise and with it"
        chart(errors(nodes, clean, noisy, noise), "errors", told)


def stopped_by(clean: Way, noisy: Way) -> str:
    """In words what the noise has changed."""
    before = clean.layers[-1].name if clean.layers else None
    if not noisy.layers:
        return f"Behind this noise **no layer** can be solved. {noisy.stopped}"
    lowest = noisy.layers[-1]
    fine = [seen.name for seen in noisy.layers if exact(seen.layer.errors)]
    words = f"Behind this noise the way ends at **{lowest.name}**, known {known(lowest.layer.errors)}"
    if before is not None:
        words += f", without it at {before}"
    words += f". Exact down to {fine[-1]}." if fine else ". No layer is exact any more."
    return f"{words} {noisy.stopped}"


def errors(nodes: Sequence[str], clean: Way, noisy: Way | None, noise: str) -> go.Figure:
    """The true errors by layer."""
    figure = go.Figure()
    for name, solved_to, colour in (
        ("without noise", clean, figures.COLOURS[0]),
        (f"σ = {noise}", noisy, figures.COLOURS[1]),
    ):
        if solved_to is not None:
            figure.add_scatter(
                x=[seen.name for seen in solved_to.layers],
                y=[max(seen.true, 1e-9) for seen in solved_to.layers],
                name=name,
                mode="lines+markers",
                line={"color": colour, "width": 2.5},
                hovertemplate="%{x}: %{y:.2g}<extra></extra>",
            )
    figure.add_hline(y=AS_GOOD_AS_EXACT, line={"color": figures.NEUTRAL, "dash": "dash", "width": 1.5})
    figure.add_annotation(
        x=1,
        xref="paper",
        xanchor="right",
        y=math.log10(AS_GOOD_AS_EXACT),
        yshift=9,
        text="as good as exact",
        showarrow=False,
    )
    figure.update_xaxes(
        title_text=DOWN, showgrid=False, **_stages(nodes),
        categoryorder="array", categoryarray=list(nodes), range=[-0.5, len(nodes) - 0.5],
    )  # fmt: skip
    figure.update_yaxes(title_text="relative error", type="log", range=[-7.5, 0.3], dtick=1, exponentformat="power")
    return figure.update_layout(**lessons.LAYOUT, height=330, showlegend=True)
