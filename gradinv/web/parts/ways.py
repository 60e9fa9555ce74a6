"""How far a gradient is solved, layer by layer, here and now: what Layer by layer and Defences show."""

from __future__ import annotations

import copy
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import streamlit as st
import torch
from torch import Tensor

from gradinv import figures, metrics, pace
from gradinv.attack.inversion import invert
from gradinv.config import AttackConfig
from gradinv.models import Model
from gradinv.network import Segment, parts_of
from gradinv.recovery.recover import recover
from gradinv.types import Observation, Recovered, SolvedNode
from gradinv.web.parts import lessons, markup, shared, solved
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


def way(given: lessons.Given, texts: tuple[str, ...], seed: int, search: bool = False) -> Way | None:
    """Solve the gradient behind some defences, or take it from what was solved, and where that is asked for `search`
    for pixels below. None as long as the visitor has not asked for what takes long."""
    # What comes of a visitor's own is kept in the visit only.
    kept = st.session_state.setdefault("own_ways", OrderedDict()) if given.private else _ways
    key = (*given.key, texts, seed, search)
    with _guard:
        if key in kept:
            kept.move_to_end(key)
            known: Way = kept[key]
            return known
    batch_size = given.final().batch_size
    with shared.using:
        expected = pace.solving(given.network, batch_size)
    if expected > AT_ONCE and st.session_state.get("solve") != given.key:
        st.info(f"Solving this takes {markup.about(expected)}.")
        if not st.button("Solve the layers", type="primary", icon=":material/play_arrow:", key=f"solve-{len(texts)}"):
            return None
        st.session_state.solve = given.key
    told = st.empty()
    nodes = len(parts_of(given.network.network).nodes) - 1
    told.markdown(markup.progress(0, "Solving the layers", "waiting for its turn"), unsafe_allow_html=True)
    done = 0

    def progress(node: SolvedNode) -> None:
        nonlocal done
        done += 1
        shown = markup.progress(done / nodes, "Solving the layers", f"{done} of {nodes}: {node.name}")
        told.markdown(shown, unsafe_allow_html=True)

    with _solving:  # one visitor after the other: each takes all of the machine
        truth = given.truth and given.truth()
        found = attack(given.network, lessons.observed(given), texts, seed, truth, search=search, progress=progress)
    if found.layers:
        pace.solved(given.network, batch_size, found.seconds)
    told.empty()
    with _guard:
        kept[key] = found
        while len(kept) > _KEPT:
            kept.popitem(last=False)
    return found


def attack(
    network: Model,
    observation: Observation,
    texts: Sequence[str],
    seed: int,
    truth: tuple[Tensor, Tensor] | None = None,
    *,
    search: bool = False,
    progress: Callable[[SolvedNode], None] | None = None,
) -> Way:
    """Solve a gradient behind some defences as far as it goes, and hold it against the `truth`, pixels (B, 3, S, S) in
    [0, 1] and labels (B,), where somebody has it."""
    observation = lessons.defended(observation, texts, seed)
    # Behind a defence, testing corrections of the labels takes long and finds nothing.
    read = "ilrg" if texts else "auto"
    config = AttackConfig.preset("demo", network.name, labels=read, seeds=1, iterations=SEARCH)
    found = recover(network, observation, config, progress=progress)
    layers = _beside(network, found, truth[0]) if truth else tuple(Seen(Layer.of(node)) for node in found.nodes)
    way = Way(layers, found.stopped, sum(node.seconds for node in found.nodes))
    if not search:
        return way
    # A network of its own: hooks on one hear every thread that runs it, and this takes long.
    own = replace(network, network=copy.deepcopy(network.network))
    *_, last = invert(own, observation, config, recovered=found)
    if truth is None:
        classes = tuple(network.class_name(label) for label in last.labels)
        return replace(way, rebuilt=figures.tiles(last.consensus), classes=classes)
    pixels, labels = truth
    rebuilt = last.consensus[metrics.pair(last.consensus, last.labels, pixels, labels.tolist())]
    quality, baseline = (
        tuple(metrics.psnr(images, pixels).tolist()) for images in (rebuilt, metrics.constant_colour(pixels))
    )
    return replace(way, rebuilt=figures.tiles(rebuilt), psnr=quality, baseline=baseline)


def _beside(network: Model, found: Recovered, pixels: Tensor) -> tuple[Seen, ...]:
    """The solved layers beside those of the pictures."""
    if not found.nodes:
        return ()
    names = [node.name for node in found.nodes]
    with torch.no_grad(), shared.using:
        true = Segment(network.network, names[0], names)(network.preprocessing.normalise(pixels.to(network.device)))
    order, _ = metrics.aligned(found.nodes[0].activation, true[names[0]].relu())
    return tuple(_seen(node, node.activation[order], true[node.name].relu()) for node in found.nodes)


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
