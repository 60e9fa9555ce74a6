"""How far a gradient is solved, layer by layer, here and now: what Layer by layer and Defences show."""

from __future__ import annotations

import copy
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import streamlit as st
import torch
from torch import Tensor

from gradinv import figures, metrics, pace
from gradinv.attack.inversion import invert
from gradinv.client import observe
from gradinv.config import AttackConfig
from gradinv.models import Model
from gradinv.network import Segment, parts_of
from gradinv.recovery.recover import recover
from gradinv.sources import pixels_of
from gradinv.types import Observation, Recovered, Snapshot, SolvedNode
from gradinv.web.parts import lessons, markup, shared, solved
from gradinv.web.parts.gradient import OwnGradient
from gradinv.web.parts.inversion import Layer, Solving

SEARCH = 100  # iterations of the search for pixels, where there is one
AT_ONCE = 8.0  # seconds: what takes longer waits for a button
_KEPT = 24  # batches that were solved


@dataclass(frozen=True)
class Seen:
    """A `layer` that was solved, beside the truth: its relative error, the median over the pictures; by picture what it
    holds, recovered and true; of one channel the recovered values, their mask and the true mask; and the share of mask
    entries that are wrong. All but the layer is for those who have the pictures."""

    layer: Layer
    true: float = math.nan
    found: tuple[str, ...] = ()
    own: tuple[str, ...] = ()
    channel: tuple[str, ...] = ()
    mask: tuple[str, ...] = ()
    own_mask: tuple[str, ...] = ()
    on: float = math.nan
    wrong: float = math.nan

    @property
    def name(self) -> str:
        """The layer's."""
        return self.layer.name


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
        nodes = tuple(reversed(parts_of(network.network).nodes[:-1]))
        boundary = self.layers[-1].name if self.layers else "logits"
        return solved.ladder(Solving(nodes, tuple(s.layer for s in self.layers), boundary, self.stopped, self.seconds))


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


def way_of(own: OwnGradient, network: Model, texts: tuple[str, ...], seed: int) -> Way | None:
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
    nodes = len(parts_of(network.network).nodes) - 1
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
    layers = tuple(Seen(Layer.of(node)) for node in found.nodes)
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
        layer=Layer.of(node),
        true=float(errors.median()),
        found=figures.activations(found, true),
        own=figures.activations(true),
        channel=figures.activations(one, own),
        mask=figures.activations((one > 0).float()),
        own_mask=figures.activations((own > 0).float()),
        on=float((own > 0).float().mean()),
        wrong=float(((found > 0) != (true > 0)).float().mean()),
    )
