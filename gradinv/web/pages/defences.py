"""The page Defences: what a defence takes from the attacker, and what from the server."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import plotly.graph_objects as go
import streamlit as st
from plotly.subplots import make_subplots
from torch import Tensor

from gradinv import figures, metrics
from gradinv.defenses import DELTA, gaussian_epsilon, gaussian_sigma, parse
from gradinv.types import Gradients
from gradinv.web.parts import head, lessons, markup, shared, showcase, ways
from gradinv.web.parts.gradient import OwnGradient
from gradinv.web.parts.guard import guarded
from gradinv.web.parts.lessons import Attack, Pool
from gradinv.web.parts.markup import Row, Tile

FEW = 4  # pictures of which the layers are solved
EPSILON = 8.0  # of the guarantee that the page holds against the sliders
WORTHLESS = 10  # an ε from which e^ε bounds next to nothing


@dataclass(frozen=True)
class Distortion:
    """How far a defended gradient g′ is from the client's g: `error` ‖g′ − g‖ / ‖g‖ and their cosine similarity, which
    is 0 where nothing is left of one of them."""

    error: float
    cosine: float


def page() -> None:
    """Everything on the page."""
    with guarded():
        head.lead(
            "What does a defence hide, and what does it cost?",
            "A client can change its gradient before it shares it. Move the sliders and see what the attacker still "
            "gets. The server only wants a good average; see also what it loses.",
        )
        choice = lessons.controls()
        texts = lessons.defences()
        _notes(texts)
        if (own := lessons.brought()) is not None:
            _own(own, texts, choice.seed)
            return
        pool = lessons.samples(choice.network)
        pool, places = lessons.drawn(pool, choice)
        _attacker(choice, texts, pool, places)
        _layers(choice, texts, pool, places[:FEW])
        _server(choice, texts, pool, places)
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


def _attacker(choice: lessons.Choice, texts: tuple[str, ...], pool: Pool, places: tuple[int, ...]) -> None:
    with st.container(horizontal=True, vertical_alignment="bottom", horizontal_alignment="distribute"):
        st.header("What the last layer alone still gives away", anchor=False)
        shown = st.toggle("Show the truth", True, key="truth", bind="query-params")
    with st.container(key="attacked"), st.container(key=f"attacked-{len(_both(texts))}"):
        _compared(choice, texts, pool, places, shown)
    st.caption(
        f"The pictures are searched among {len(pool.candidates)}. {pool.counted} Below the guesses: how similar the "
        "recovered features are to the picture’s own (cosine), not how good the guess looks, and whether that picture "
        "is the best match. What is painted of the features comes from a **learned prior**, a network trained on "
        "100,000 public pictures. The page Live does the whole attack."
    )
    for one, other in showcase.defended():
        notes = " ".join(parse(text).note for text in other.defences)
        showcase.link(f"A whole attack, recorded without a defence and with one: {notes}", one.name, other.name)


def _compared(choice: lessons.Choice, texts: tuple[str, ...], pool: Pool, places: tuple[int, ...], shown: bool) -> None:
    """What is read and painted of the gradient, without a defence and behind it."""
    both = {
        text: lessons.attacked(choice.network, pool.name, places, own, choice.seed, pool)
        for text, own in _both(texts).items()
    }
    true, features = pool.labels(places), pool.gallery.features[list(places)]
    rows, tiles = [], [_originals(pool, places, shown)]
    for (text, found), own in zip(both.items(), _both(texts).values(), strict=True):
        first = pool.gallery.match(found.features, 1)[1].flatten().tolist()
        rows.append(
            [
                text,
                f"{metrics.labels_right(found.labels.tolist(), true.tolist())} of {len(places)}",
                f"{lessons.found(first, places)} of {len(places)}",
                markup.number(found.residual),
            ]
        )
        uris = lessons.painted(choice.network, pool.name, places, own, choice.seed, found.features)
        tiles.append(_guesses(text, uris, found, features, first, places))
    st.markdown(table(("", "Labels right", "Pictures found", "Residual of the features"), rows), unsafe_allow_html=True)
    st.markdown(markup.board(tiles), unsafe_allow_html=True)


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


def _guesses(
    name: str, uris: Sequence[str], found: Attack, features: Tensor, first: Sequence[int], places: Sequence[int]
) -> Row:
    """What the learned prior paints of the recovered features, in the originals' order, which is known to us only."""
    order, similarity = metrics.aligned(found.features, features)
    tiles = [
        Tile(uris[one], f"{name}: guess of a learned prior", f"features {value:.3f}", mark=first[one] == place)
        for one, value, place in zip(order, similarity, places, strict=True)
    ]
    return Row(name, tiles, "learned prior")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A small table; the first cell of each row is its name."""
    top = "".join(f"<th>{markup.explained(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<div class="gi-scroll"><table class="gi-table gi-gains"><thead><tr>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


# --- the layers


def _layers(choice: lessons.Choice, texts: tuple[str, ...], pool: Pool, places: tuple[int, ...]) -> None:
    """Down to which layer the gradient can be solved, and what a short search below it gives."""
    st.header("What all layers give: where the attack stops", anchor=False)
    st.markdown(
        f"{'One picture' if len(places) == 1 else f'{len(places)} pictures'} of the batch, shared as a batch of their "
        "own. Below are the layers that can be solved, from the output down, and what a short search for the pixels "
        "shows. [Layer by layer](layers) shows how that works."
    )
    network = shared.model(choice.network)
    rows = [_originals(pool, places, bool(st.session_state.get("truth", True)))]
    for name, own in _both(texts).items():
        st.markdown(f"**{name}**")
        found = ways.way(network, pool, places, own, choice.seed, search=True)
        if found is None:
            return
        st.markdown(found.ladder(network), unsafe_allow_html=True)
        tiles = [
            Tile(uri, f"{name}: rebuilt picture {place}", note=markup.beside(value, baseline))
            for place, (uri, value, baseline) in enumerate(
                zip(found.rebuilt, found.psnr, found.baseline, strict=True), 1
            )
        ]
        rows.append(Row(name, tiles, markup.BASELINE))
    st.markdown(markup.board(rows), unsafe_allow_html=True)
    st.caption(f"One seed and {ways.SEARCH} iterations, so that it is there at once; the page Live takes more.")


# --- a gradient of one's own


def _own(own: OwnGradient, texts: tuple[str, ...], seed: int) -> None:
    """The same of a gradient that the visitor brought, of which nobody here knows the pictures."""
    network, observation = shared.model(own.model, size=own.side), own.find(shared.visitor())
    st.header("What the last layer alone still gives away", anchor=False)
    both = {
        name: (behind, lessons.attacked_own(own.key, own.model, behind, seed, observation))
        for name, behind in _both(texts).items()
    }
    first = both["No defence"][1]
    rows, tiles = [], []
    for name, (behind, found) in both.items():
        read = Counter(network.class_name(label) for label in found.labels.tolist())
        classes = ", ".join(f"{known} ×{count}" if count > 1 else known for known, count in sorted(read.items()))
        rows.append([name, classes, markup.number(found.residual)])
        order, similarity = metrics.aligned(found.features, first.features)
        uris = lessons.painted_own(own.key, own.model, behind, seed, found.features)
        guesses = [
            Tile(uris[one], f"{name}: guess of a learned prior", "" if found is first else f"{value:.3f}")
            for one, value in zip(order, similarity, strict=True)
        ]
        tiles.append(Row(name, guesses, "learned prior"))
    st.markdown(table(("", "Classes read", "Residual of the features"), rows), unsafe_allow_html=True)
    st.markdown(markup.board(tiles), unsafe_allow_html=True)
    st.caption(
        "What is painted of the features comes from a **learned prior**, a network trained on 100,000 public pictures. "
        "Behind a defence, below each guess: how similar the features are to those without (cosine)."
    )
    st.header("What all layers give: where the attack stops", anchor=False)
    rebuilt = []
    for name, (behind, _) in both.items():
        st.markdown(f"**{name}**")
        way = ways.way_of(own, network, behind, seed)
        if way is None:
            return
        st.markdown(way.ladder(network), unsafe_allow_html=True)
        pictures = zip(way.rebuilt, way.classes, strict=True)
        rebuilt.append(Row(name, [Tile(uri, f"{name}: rebuilt, read as {known}", known) for uri, known in pictures]))
    st.markdown(markup.board(rebuilt), unsafe_allow_html=True)
    st.caption(f"One seed and {ways.SEARCH} iterations, so that it is there at once; the page Live takes more.")
    changed = lessons.defended(observation, texts, seed).gradients
    _lost(*distortion(observation.gradients, changed))


# --- the server


def _server(choice: lessons.Choice, texts: tuple[str, ...], pool: Pool, places: tuple[int, ...]) -> None:
    _lost(*_distorted(choice.network, pool.name, places, texts, choice.seed, pool))


def _lost(by_layer: Mapping[str, Distortion], whole: Distortion) -> None:
    st.header("What the server loses", anchor=False)
    st.markdown(
        markup.facts([("relative error of the gradient", f"{whole.error:.3g}"), ("cosine", f"{whole.cosine:.4f}")]),
        unsafe_allow_html=True,
    )
    st.plotly_chart(
        distortions(by_layer),
        key="distortion",
        config={"displayModeBar": False},
        alt="Bars by layer: above the relative error of its gradient, below the cosine similarity to the client’s",
    )
    st.caption(
        "Of the gradient that the server averages, against the one that the client computed. A cosine of 1 beside an "
        "error means that only the length changed. Over many clients noise averages out; what was cut away does not."
    )


@shared.kept(st.cache_data, lessons.of_own, max_entries=256, show_spinner="The gradient is compared")
def _distorted(
    name: str, among: str, places: tuple[int, ...], texts: tuple[str, ...], seed: int, _pool: Pool
) -> tuple[dict[str, Distortion], Distortion]:
    own = lessons.observed(name, among, places, _pool)
    return distortion(own.gradients, lessons.defended(own, texts, seed).gradients)


def distortion(own: Gradients, shared: Gradients) -> tuple[dict[str, Distortion], Distortion]:
    """How far the shared gradients are from the client's own: of each layer, weights and biases together, in the
    network's order, and of all together."""
    sums: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0, 0.0])
    for name, value in own.items():
        a, b = value.double().flatten(), shared[name].double().flatten()
        parts = (float((b - a).square().sum()), float(a @ a), float(b @ b), float(a @ b))
        layer = sums[name.rpartition(".")[0]]
        for place, part in enumerate(parts):
            layer[place] += part
    whole = [sum(layer[place] for layer in sums.values()) for place in range(4)]
    return {layer: _distortion(*parts) for layer, parts in sums.items()}, _distortion(*whole)


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
