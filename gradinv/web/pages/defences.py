"""The page Defences: what a defence takes from the attacker, and what from the server."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import plotly.graph_objects as go
import streamlit as st
import torch
from plotly.subplots import make_subplots
from torch import Tensor

from gradinv import figures, metrics
from gradinv.defenses import DELTA, gaussian_epsilon, gaussian_sigma, parse
from gradinv.types import Gradients
from gradinv.web.parts import lessons, markup, shared, showcase, ways
from gradinv.web.parts.elements import chart, guarded, html, lead
from gradinv.web.parts.gradient import OwnGradient
from gradinv.web.parts.lessons import Pool
from gradinv.web.parts.markup import Row, Tile

FEW = 4  # pictures of which the layers are solved
EPSILON = 8.0  # of the guarantee that the page holds against the sliders
WORTHLESS = 10  # an ε from which e^ε bounds next to nothing

LAST_LAYER = "What the last layer alone still gives away"
ALL_LAYERS = "What all layers give: where the attack stops"
PRIOR = "What is painted of the features comes from a **learned prior**, a network trained on 100,000 public pictures."


@dataclass(frozen=True)
class Distortion:
    """How far a defended gradient g′ is from the client's g: `error` ‖g′ − g‖ / ‖g‖ and their cosine similarity, which
    is 0 where nothing is left of one of them."""

    error: float
    cosine: float


@guarded()
def page() -> None:
    """Everything on the page."""
    lead(
        "What does a defence hide, and what does it cost?",
        "A client can change its gradient before it shares it. Move the sliders and see what the attacker still "
        "gets. The server only wants a good average; see also what it loses.",
    )
    choice = lessons.controls()
    texts = lessons.defences()
    _notes(texts)
    if (brought := lessons.brought()) is not None:
        _of_visitor(brought, texts, choice.seed)
        return
    pool = lessons.samples(choice.network)
    pool, places = lessons.drawn(pool, choice)
    network = shared.model(choice.network)
    given = lessons.of_batch(network, pool, places)
    _attacker(given, texts, choice.seed, pool, places)
    few = places[:FEW]
    st.header(ALL_LAYERS, anchor=False)
    st.markdown(
        f"{'One picture' if len(few) == 1 else f'{len(few)} pictures'} of the batch, shared as a batch of their "
        "own. Below are the layers that can be solved, from the output down, and what a short search for the pixels "
        "shows. [Layer by layer](layers) shows how that works."
    )
    originals = _originals(pool, few, bool(st.session_state.get("truth", True)))
    _layers(lessons.of_batch(network, pool, few), texts, choice.seed, [originals])
    _server(given, texts, choice.seed)
    lessons.credits(pool)


def _notes(texts: Sequence[str]) -> None:
    if texts:
        notes = [f"{number}. {parse(text).note}" for number, text in enumerate(texts, 1)]
    else:
        notes = ["No defence is on: the gradient is shared as it is."]
    st.markdown("\n".join([*notes, "", privacy(texts)]))


def privacy(texts: Sequence[str]) -> str:
    """What differential privacy says of the defences, in one sentence or two."""
    strengths = dict(text.split(":") for text in texts)
    norm, sigma = (float(strengths[name]) if name in strengths else None for name in ("clip", "noise"))
    if norm is None:
        if sigma is None:
            return "**Privacy guarantee:** none: nothing random is added."
        return "**Privacy guarantee:** none, since without clipping nothing bounds what one batch adds to the gradient."
    least = markup.number(gaussian_sigma(2 * norm, EPSILON, DELTA), 3)
    needed = f"ε = {EPSILON:g} would take σ = {least} on every number."
    if sigma is None:
        return f"**Privacy guarantee:** none, since clipping leaves nothing to chance; {needed}"
    epsilon = gaussian_epsilon(2 * norm, sigma, DELTA)
    reached = f"{markup.number(epsilon, 3)}, {markup.number(DELTA)}"
    worth = f"next to none, since an ε above {WORTHLESS} promises hardly anything: " if epsilon > WORTHLESS else ""
    return (
        f"**Privacy guarantee:** {worth}(ε, δ) = ({reached}) for the whole batch and one round, none for a single "
        f"picture of it; {needed}"
    )


def _both(texts: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """By name what is compared: without a defence and, where there is one, with it."""
    return {"No defence": (), "Defended": texts} if texts else {"No defence": ()}


# --- the attacker


def _attacker(given: lessons.Given, texts: tuple[str, ...], seed: int, pool: Pool, places: tuple[int, ...]) -> None:
    """What is read and painted of the gradient, without a defence and behind it."""
    both = _both(texts)
    with st.container(horizontal=True, vertical_alignment="bottom", horizontal_alignment="distribute"):
        st.header(LAST_LAYER, anchor=False)
        shown = st.toggle("Show the truth", True, key="truth", bind="query-params")
    true, features = pool.labels(places).tolist(), pool.gallery.features[list(places)]
    rows, boards = [], [_originals(pool, places, shown)]
    with st.container(key="attacked"), st.container(key=f"attacked-{len(both)}"):
        for name, behind in both.items():
            found = lessons.attacked(given, behind, seed)
            first = pool.gallery.match(found.features, 1)[1].flatten().tolist()
            right = metrics.labels_right(found.labels.tolist(), true)
            counts = [f"{count} of {len(places)}" for count in (right, lessons.found(first, places))]
            rows.append([name, *counts, markup.number(found.residual)])
            # In the originals' order, which is known to us only.
            order, similarity = metrics.aligned(found.features, features)
            uris = lessons.painted(given, behind, seed)
            tiles = [
                Tile(uris[one], f"{name}: guess of a learned prior", f"features {value:.3f}", mark=first[one] == place)
                for one, value, place in zip(order, similarity, places, strict=True)
            ]
            boards.append(Row(name, tiles, "learned prior"))
        html(table(("", "Labels right", "Pictures found", "Residual of the features"), rows))
        html(markup.board(boards))
    st.caption(
        f"The pictures are searched among {len(pool.candidates)}. {pool.counted} Below the guesses: how similar the "
        "recovered features are to the picture’s own (cosine), not how good the guess looks, and whether that picture "
        f"is the best match. {PRIOR} The page Live does the whole attack."
    )
    for one, other in showcase.defended():
        notes = " ".join(parse(text).note for text in other.defences)
        showcase.link(f"A whole attack, recorded without a defence and with one: {notes}", one.name, other.name)


def _originals(pool: Pool, places: Sequence[int], shown: bool) -> Row:
    tiles = [
        Tile(
            lessons.thumbnail_of(pool, place) if shown else None,
            f"Original: {pool.candidates[place].title}" if shown else "Hidden original",
            pool.candidates[place].picture.name if shown else "",
        )
        for place in places
    ]
    return Row("Originals", tiles, "what the client kept")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A small table; the first cell of each row is its name."""
    return markup.table(head, [[escape(cell) for cell in row] for row in rows], "gi-gains")


# --- the layers


def _layers(given: lessons.Given, texts: tuple[str, ...], seed: int, rows: list[Row]) -> None:
    """Down to which layer the gradient can be solved, and what a short search below it gives, below other rows."""
    for name, behind in _both(texts).items():
        st.markdown(f"**{name}**")
        found = ways.way(given, behind, seed, search=True)
        if found is None:
            return
        html(found.ladder(given.network))
        if found.classes:
            pictures = zip(found.rebuilt, found.classes, strict=True)
            tiles = [Tile(uri, f"{name}: rebuilt, read as {known}", known) for uri, known in pictures]
        else:
            notes = [markup.beside(*both) for both in zip(found.psnr, found.baseline, strict=True)]
            tiles = [
                Tile(uri, f"{name}: rebuilt picture {place}", note=note)
                for place, (uri, note) in enumerate(zip(found.rebuilt, notes, strict=True), 1)
            ]
        rows.append(Row(name, tiles, "" if found.classes else markup.BASELINE))
    html(markup.board(rows))
    st.caption(f"One seed and {ways.SEARCH} iterations, so that it is there at once; the page Live takes more.")


# --- a gradient of one's own


def _of_visitor(brought: OwnGradient, texts: tuple[str, ...], seed: int) -> None:
    """The same of a gradient that the visitor brought, of which nobody here knows the pictures."""
    network = shared.model(brought.model, size=brought.side)
    given = lessons.of_visitor(brought, network)
    st.header(LAST_LAYER, anchor=False)
    plain = lessons.attacked(given, (), seed)
    rows, boards = [], []
    for name, behind in _both(texts).items():
        found = lessons.attacked(given, behind, seed)
        read = Counter(network.class_name(label) for label in found.labels.tolist())
        classes = ", ".join(f"{known} ×{count}" if count > 1 else known for known, count in sorted(read.items()))
        rows.append([name, classes, markup.number(found.residual)])
        order, similarity = metrics.aligned(found.features, plain.features)
        uris = lessons.painted(given, behind, seed)
        tiles = [
            Tile(uris[one], f"{name}: guess of a learned prior", f"{value:.3f}" if behind else "")
            for one, value in zip(order, similarity, strict=True)
        ]
        boards.append(Row(name, tiles, "learned prior"))
    html(table(("", "Classes read", "Residual of the features"), rows))
    html(markup.board(boards))
    st.caption(f"{PRIOR} Behind a defence, below each guess: how similar the features are to those without (cosine).")
    st.header(ALL_LAYERS, anchor=False)
    _layers(given, texts, seed, [])
    _server(given, texts, seed)


# --- the server


def _server(given: lessons.Given, texts: tuple[str, ...], seed: int) -> None:
    by_layer, whole = _distorted(given, texts, seed)
    st.header("What the server loses", anchor=False)
    html(markup.facts([("relative error of the gradient", f"{whole.error:.3g}"), ("cosine", f"{whole.cosine:.4f}")]))
    chart(
        distortions(by_layer),
        "distortion",
        "Bars by layer: above the relative error of its gradient, below the cosine similarity to the client’s",
    )
    st.caption(
        "Of the gradient that the server averages, against the one that the client computed. A cosine of 1 beside an "
        "error means that only the length changed. Over many clients noise averages out; what was cut away does not."
    )


@lessons.kept(st.cache_data, max_entries=256, show_spinner="The gradient is compared")
def _distorted(given: lessons.Given, texts: tuple[str, ...], seed: int) -> tuple[dict[str, Distortion], Distortion]:
    own = lessons.observed(given)
    return distortion(own.gradients, lessons.defended(own, texts, seed).gradients)


def distortion(own: Gradients, shared: Gradients) -> tuple[dict[str, Distortion], Distortion]:
    """How far the shared gradients are from the client's own: of each layer, weights and biases together, in the
    network's order, and of all together."""
    sums: dict[str, Tensor] = {}
    for name, value in own.items():
        a, b = value.double().flatten(), shared[name].double().flatten()
        layer = name.rpartition(".")[0]
        sums[layer] = sums.get(layer, 0) + torch.stack([(b - a) @ (b - a), a @ a, b @ b, a @ b])
    whole = torch.stack(list(sums.values())).sum(0)
    return {layer: _distortion(*parts.tolist()) for layer, parts in sums.items()}, _distortion(*whole.tolist())


def _distortion(square: float, own: float, shared: float, product: float) -> Distortion:
    error = math.sqrt(square / own) if own > 0 else math.inf if square > 0 else 0.0
    return Distortion(error, product / math.sqrt(own * shared) if own * shared > 0 else 0.0)


def distortions(by_layer: Mapping[str, Distortion]) -> go.Figure:
    """Bars by layer, from the input to the output: the relative error and the cosine."""
    names = list(by_layer)
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.08)
    columns = (("error", figures.COLOURS[1]), ("cosine", figures.COLOURS[0]))
    for part, (name, colour) in enumerate(columns, 1):
        values = [getattr(by_layer[layer], name) for layer in names]
        figure.add_bar(
            x=names,
            y=[value if math.isfinite(value) else None for value in values],
            name=name,
            marker={"color": colour, "line": {"width": 0}},
            hovertemplate="%{x}: %{y:.3g}<extra></extra>",
            showlegend=False,
            row=part,
            col=1,
        )
    figure.update_yaxes(title_text="relative error", rangemode="tozero", row=1, col=1)
    figure.update_yaxes(title_text="cosine", range=[0, 1.02], row=2, col=1)
    figure.update_xaxes(showticklabels=False, showgrid=False)
    figure.update_xaxes(title_text="layers, from the input to the output", row=2, col=1)
    return figure.update_layout(**lessons.LAYOUT, height=360, bargap=0.15)
