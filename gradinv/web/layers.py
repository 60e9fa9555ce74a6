"""The page Layer by layer: equations against unknowns, what each layer gives away, one mask, and why noise stops it."""

from __future__ import annotations

import copy
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import plotly.graph_objects as go
import streamlit as st
import torch
from torch import Tensor

from gradinv import figures, metrics, pace
from gradinv.attack.inversion import invert
from gradinv.cli.say import AS_GOOD_AS_EXACT, percent
from gradinv.client import observe
from gradinv.config import AttackConfig
from gradinv.jobs import Layer, Solving
from gradinv.models import Model
from gradinv.network import STEM, Segment, node_shapes, parts
from gradinv.recovery.convolution import Equations
from gradinv.recovery.recover import recover
from gradinv.sources import pixels_of
from gradinv.types import Observation, Recovered, Snapshot, SolvedNode
from gradinv.web import head, lessons, markup, shared, solved
from gradinv.web.gradient import Gradient
from gradinv.web.guard import guarded
from gradinv.web.lessons import OFF
from gradinv.web.markup import Row, Tile

MOST = 16  # pictures in a batch
SIDES = ("64", "96", "128")  # px
NOISE = (OFF, "1e-7", "1e-6", "1e-5", "1e-4", "1e-3", "1e-2")
SEARCH = 100  # iterations of the search for pixels, where there is one
AT_ONCE = 8.0  # seconds: what takes longer waits for a button
_KEPT = 24  # batches that were solved


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


@dataclass(frozen=True)
class Seen:
    """A layer that was solved: its relative error as it is estimated and as it is, the median over the pictures; by
    picture what it holds, recovered and true; of one channel the recovered values, their mask and the true mask; and
    the share of mask entries that are wrong. All but the estimate is for those who have the pictures."""

    name: str
    shape: tuple[int, ...]
    estimated: float
    true: float = math.nan
    found: tuple[str, ...] = ()
    own: tuple[str, ...] = ()
    channel: tuple[str, ...] = ()
    mask: tuple[str, ...] = ()
    own_mask: tuple[str, ...] = ()
    on: float = math.nan
    wrong: float = math.nan

    @property
    def layer(self) -> Layer:
        """As the ladder takes it."""
        return Layer(self.name, self.shape, self.estimated)


@dataclass(frozen=True)
class Way:
    """How far a gradient was solved, the highest layer first, and in a sentence why no further; with a search below
    that also the pictures that came of it, and their PSNR in dB and that of the best constant colours;
    where nobody has the pictures, instead their `classes` as they were read."""

    layers: tuple[Seen, ...]
    stopped: str
    seconds: float
    rebuilt: tuple[str, ...] = ()
    psnr: tuple[float, ...] = ()
    baseline: tuple[float, ...] = ()
    classes: tuple[str, ...] = ()

    def ladder(self, network: Model) -> str:
        """HTML: a mark for each layer, and in words how far it went."""
        nodes = tuple(reversed(parts(network.network).nodes[:-1]))
        boundary = self.layers[-1].name if self.layers else "logits"
        return solved.ladder(Solving(nodes, tuple(s.layer for s in self.layers), boundary, self.stopped, self.seconds))


def page() -> None:
    """Everything on the page."""
    with guarded():
        head.lead(
            "Layer by layer",
            "Most of what a network computes of a picture can be worked out from the gradient, without any guessing. "
            "Each layer is a set of equations. As long as there are as many equations as unknown numbers, the "
            "attacker knows the layer exactly and goes on to the one below.",
        )
        _lesson()


def _lesson() -> None:
    choice = lessons.controls(MOST, sides=SIDES)
    network = shared.model(choice.network, size=choice.side)
    pool = lessons.samples(choice.network)
    pool, places = lessons.drawn(pool, choice)
    places = places[:MOST]
    counts = counted(network, len(places))
    st.header("1. Equations against unknowns", anchor=False)
    left, right = st.columns([5, 3], gap="large")
    with left:
        st.plotly_chart(
            against(counts),
            key="against",
            config={"displayModeBar": False},
            alt="By layer, from the output down: the equations and unknowns for each channel, on a logarithmic axis",
        )
    with right:
        st.markdown(_explained(counts, len(places)))
    with st.expander("The same as a table"):
        st.markdown(table(counts), unsafe_allow_html=True)
    st.header("2. Solved, here and now", anchor=False)
    clean = way(network, pool, places, (), choice.seed)
    if clean is None:
        return
    _solved(network, pool, places, clean)
    st.header("4. Why noise stops it", anchor=False)
    _noise(network, pool, places, clean, choice.seed)
    lessons.credits(pool)


# --- the count


def counted(model: Model, batch_size: int) -> list[Count]:
    """Each layer's equations and unknowns, the highest layer first."""
    shapes, found = node_shapes(model.network, model.preprocessing.size), []
    blocks = parts(model.network).blocks
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
    figure.update_xaxes(title_text="layers, from the output down to the picture", showticklabels=False, showgrid=False)
    figure.update_yaxes(title_text="for each channel", type="log", dtick=1)
    return figure.update_layout(**lessons.LAYOUT, height=330)


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
        f"{words}\n\nHere there are enough {reached}. For **{count.name}** there are {count.equations:,} equations and "
        f"{count.unknowns:,} unknowns, {ratio:.1f} times as many. Two more things are known of a layer: it is never "
        "negative, and it leads to the layers above. They make up for a few missing equations. Where more are missing, "
        "the attack stops."
    )


def table(counts: Sequence[Count]) -> str:
    """The count as HTML."""
    body = "".join(
        f"<tr><td>{count.name}</td><td>{' × '.join(map(str, count.shape))}</td><td>{count.equations:,}</td>"
        f"<td>{count.unknowns:,}</td><td>{'enough' if count.enough else 'too few'}</td></tr>"
        for count in counts
    )
    head_row = "".join(f"<th>{name}</th>" for name in ("Layer", "Shape", "Equations", "Unknowns", ""))
    return (
        '<div class="gi-scroll" tabindex="0" role="region" aria-label="Equations and unknowns by layer">'
        f'<table class="gi-table gi-counts"><thead><tr>{head_row}</tr></thead><tbody>{body}</tbody></table></div>'
    )


# --- the solution


_ways: OrderedDict[tuple[object, ...], Way] = OrderedDict()
_guard = threading.Lock()
_solving = threading.Lock()


def way(
    network: Model,
    pool: lessons.Pool,
    places: tuple[int, ...],
    texts: tuple[str, ...],
    seed: int,
    search: bool = False,
) -> Way | None:
    """Solve the batch's gradient behind some defences, or take it from what was solved, and where that is asked for
    `search` for pixels below. None as long as the visitor has not asked for what takes long."""

    def solve(progress: Callable[[SolvedNode], None]) -> Way:
        candidates = [pool.candidates[place] for place in places]
        return attack(network, candidates, pool.labels(places), texts, seed, search=search, progress=progress)

    key = (network.name, network.preprocessing.size, pool.name, places, texts, seed, search)
    return _kept(key, lessons.own(pool.name), network, len(places), texts, solve)


def way_of(own: Gradient, network: Model, texts: tuple[str, ...], seed: int) -> Way | None:
    """The same of a gradient that the visitor brought, and always with a search."""
    observation = own.find(shared.visitor())
    key = (network.name, network.preprocessing.size, own.key, (), texts, seed, True)
    return _kept(key, True, network, own.batch_size, texts, partial(blind, network, observation, texts, seed))


def _kept(
    key: tuple[object, ...],
    private: bool,
    network: Model,
    batch_size: int,
    texts: tuple[str, ...],
    solve: Callable[[Callable[[SolvedNode], None]], Way],
) -> Way | None:
    """What `solve` gives, or gave before; what is `private` is kept in the visit only."""
    kept = st.session_state.setdefault("own_ways", OrderedDict()) if private else _ways
    with _guard:
        if key in kept:
            kept.move_to_end(key)
            found: Way = kept[key]
            return found
    with shared.using:
        expected = pace.solving(network, batch_size)
    asked = st.session_state.get("solve")
    if expected > AT_ONCE and asked != key[:4]:
        st.info(f"Solving this takes {markup.about(expected)}.")
        if not st.button("Solve the layers", type="primary", icon=":material/play_arrow:", key=f"solve-{len(texts)}"):
            return None
        st.session_state.solve = key[:4]
    told = st.empty()
    nodes = len(parts(network.network).nodes) - 1
    told.markdown(markup.progress(0, "Solving the layers", "waiting for its turn"), unsafe_allow_html=True)
    done = 0

    def progress(node: SolvedNode) -> None:
        nonlocal done
        done += 1
        shown = markup.progress(done / nodes, "Solving the layers", f"{done} of {nodes}: {node.name}")
        told.markdown(shown, unsafe_allow_html=True)

    with _solving:  # one visitor after the other: each takes all of the machine
        found = solve(progress)
    if found.layers:
        pace.solved(network, batch_size, found.seconds)
    told.empty()
    with _guard:
        kept[key] = found
        while len(kept) > _KEPT:
            kept.popitem(last=False)
    return found


def attack(
    network: Model,
    candidates: Sequence[lessons.Candidate],
    labels: Tensor,
    texts: Sequence[str],
    seed: int,
    *,
    search: bool = False,
    progress: Callable[[SolvedNode], None] | None = None,
) -> Way:
    """Share the gradient of some pictures behind some defences, and solve it as far as it goes."""
    pixels = pixels_of(candidates, network.preprocessing)
    with shared.using:
        observation = observe(network, pixels, labels)
    observation, config, found = _solve(network, observation, texts, seed, progress)
    layers: tuple[Seen, ...] = ()
    if names := [node.name for node in found.nodes]:
        with torch.no_grad(), shared.using:
            true = Segment(network.network, names[0], names)(network.preprocessing.normalise(pixels.to(network.device)))
        order, _ = metrics.aligned(found.nodes[0].activation, true[names[0]].relu())
        layers = tuple(_seen(node, node.activation[order], true[node.name].relu()) for node in found.nodes)
    seconds = sum(node.seconds for node in found.nodes)
    if not search:
        return Way(layers, found.stopped, seconds)
    last = _search(network, observation, config, found)
    rebuilt = last.consensus[metrics.pair(last.consensus, last.labels, pixels, labels.tolist())]
    quality, baseline = (
        tuple(metrics.psnr(images, pixels).tolist()) for images in (rebuilt, metrics.constant_colour(pixels))
    )
    return Way(layers, found.stopped, seconds, figures.tiles(rebuilt), quality, baseline)


def blind(
    network: Model,
    observation: Observation,
    texts: Sequence[str],
    seed: int,
    progress: Callable[[SolvedNode], None] | None = None,
) -> Way:
    """Solve a gradient of which nobody has the pictures, behind some defences, and search for pixels below."""
    observation, config, found = _solve(network, observation, texts, seed, progress)
    layers = tuple(
        Seen(node.name, tuple(node.activation.shape[1:]), float(node.error.median())) for node in found.nodes
    )
    last = _search(network, observation, config, found)
    classes = tuple(network.class_name(label) for label in last.labels)
    seconds = sum(node.seconds for node in found.nodes)
    return Way(layers, found.stopped, seconds, figures.tiles(last.consensus), classes=classes)


def _solve(
    network: Model,
    observation: Observation,
    texts: Sequence[str],
    seed: int,
    progress: Callable[[SolvedNode], None] | None,
) -> tuple[Observation, AttackConfig, Recovered]:
    """The gradient behind some defences, the attack on it, and what is solved."""
    observation = lessons.defended(observation, texts, seed)
    # Behind a defence, testing corrections of the labels takes long and finds nothing.
    read = "ilrg" if texts else "auto"
    config = AttackConfig.preset("demo", network.name, labels=read, seeds=1, iterations=SEARCH)
    return observation, config, recover(network, observation, config, progress=progress)


def _search(network: Model, observation: Observation, config: AttackConfig, found: Recovered) -> Snapshot:
    """Where a search for pixels below what was solved ends."""
    # A network of its own: hooks on one hear every thread that runs it, and this takes long.
    own = replace(network, network=copy.deepcopy(network.network))
    *_, last = invert(own, observation, config, recovered=found)
    return last


def _seen(node: SolvedNode, found: Tensor, true: Tensor) -> Seen:
    """A solved layer (B, C, H, W) beside the pictures' own, in the same order."""
    errors = (found - true).flatten(1).norm(dim=1) / true.flatten(1).norm(dim=1).clamp(min=1e-12)
    # The channel to look at closely: one that is on at about half of its places.
    share = (true > 0).float().mean((0, 2, 3))
    channel = int((share - 0.5).abs().argmin())
    one, own = found[:1, channel : channel + 1], true[:1, channel : channel + 1]
    return Seen(
        name=node.name,
        shape=tuple(found.shape[1:]),
        estimated=float(node.error.median()),
        true=float(errors.median()),
        found=figures.activations(found, true),
        own=figures.activations(true),
        channel=figures.activations(one, own),
        mask=figures.activations((one > 0).float()),
        own_mask=figures.activations((own > 0).float()),
        on=float((own > 0).float().mean()),
        wrong=float(((found > 0) != (true > 0)).float().mean()),
    )


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
    numbers = f"{math.prod(seen.shape):,} numbers of each picture"
    rows = [
        Row("Originals", originals, "only the client has them"),
        Row("True", _tiles(seen.own, f"What {name} holds of", titles), f"{numbers}; nine of {seen.shape[0]} channels"),
        Row("Recovered", _tiles(seen.found, f"What was recovered of {name} for", titles), "from the gradient alone"),
    ]
    with st.container(key="layer-board"):
        st.markdown(markup.board(rows), unsafe_allow_html=True)
        st.markdown(
            markup.facts(
                [
                    ("error, as the attacker estimates it", percent(seen.estimated)),
                    ("true error", percent(seen.true)),
                    ("places where the mask is wrong", percent(seen.wrong)),
                ]
            ),
            unsafe_allow_html=True,
        )
    st.header("3. One mask", anchor=False)
    left, right = st.columns([5, 3], gap="large")
    with left, st.container(key="mask-board"):
        tiles = [
            Tile(seen.channel[0], f"One channel of {name} of {titles[0]}", "one channel, recovered"),
            Tile(seen.mask[0], "Its mask: bright where the channel is on", "its mask"),
            Tile(seen.own_mask[0], "The true mask", "the true mask"),
        ]
        st.markdown(markup.board([Row(titles[0], tiles, name)]), unsafe_allow_html=True)
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


def _noise(network: Model, pool: lessons.Pool, places: tuple[int, ...], clean: Way, seed: int) -> None:
    words, chart = st.columns([3, 5], gap="large")
    with words:
        noise = st.select_slider("Gaussian noise on each number of the gradient, σ", NOISE, OFF, key="noise",
                                 bind="query-params")  # fmt: skip
        st.markdown(
            "Noise on the gradient is an error in every equation. Solving a layer enlarges it, and the more so the "
            "fewer equations there are to spare. The error goes along to the next layer, and where the smallest "
            "numbers drown in it, masks go wrong. So noise does not hide a picture evenly: it **takes the lowest "
            "layers first**, and those are the ones that look like the picture."
        )
        noisy = None if noise == OFF else way(network, pool, places, (f"noise:{noise}",), seed)
        if noisy is not None:
            st.markdown(stopped_by(clean, noisy))
    with chart:
        nodes = [count.name for count in counted(network, len(places))]
        st.plotly_chart(
            errors(nodes, clean, noisy, noise),
            key="errors",
            config={"displayModeBar": False},
            alt="The true error of each layer that was solved, from the output down, without noise and with it",
        )


def stopped_by(clean: Way, noisy: Way) -> str:
    """In words what the noise has changed."""
    before = clean.layers[-1].name if clean.layers else None
    if not noisy.layers:
        return f"Behind this noise **no layer** can be solved. {noisy.stopped}"
    lowest = noisy.layers[-1]
    exact = [seen.name for seen in noisy.layers if seen.estimated <= AS_GOOD_AS_EXACT]
    words = f"Behind this noise the way ends at **{lowest.name}**, known to within {percent(lowest.estimated)}"
    if before is not None:
        words += f", without it at {before}"
    words += f". Exact down to {exact[-1]}." if exact else ". No layer is exact any more."
    return f"{words} {noisy.stopped}"


def errors(nodes: Sequence[str], clean: Way, noisy: Way | None, noise: str) -> go.Figure:
    """The true errors by layer."""
    figure = go.Figure()
    for name, way, colour in (
        ("without noise", clean, figures.COLOURS[0]),
        (f"σ = {noise}", noisy, figures.COLOURS[1]),
    ):
        if way is not None:
            figure.add_scatter(
                x=[seen.name for seen in way.layers],
                y=[max(seen.true, 1e-9) for seen in way.layers],
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
        title_text="layers, from the output down to the picture", showticklabels=False, showgrid=False,
        categoryorder="array", categoryarray=list(nodes), range=[-0.5, len(nodes) - 0.5],
    )  # fmt: skip
    figure.update_yaxes(title_text="relative error", type="log", range=[-7.5, 0.3], dtick=1, exponentformat="power")
    return figure.update_layout(**lessons.LAYOUT, height=330, showlegend=True)
