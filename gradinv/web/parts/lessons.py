"""What the lessons Labels, Who was in the batch? and Defences share: the pictures, the batch, the quick attack.

The sample pictures come in four views, so that a class can be drawn more than once.
"""

from __future__ import annotations

import random
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from html import escape
from typing import Any

import streamlit as st
import torch
from PIL import Image, ImageOps
from torch import Tensor

from gradinv import figures, prior
from gradinv.client import final_gradient, observe
from gradinv.defenses import parse_all
from gradinv.gallery import Gallery, pooled
from gradinv.images import to_pixels
from gradinv.models import Model
from gradinv.recovery.final_layer import EXPLAINED, FinalLayer, Fit
from gradinv.recovery.labels import bias_corrected, column_minimum, ilrg, llg
from gradinv.sources import SAMPLES, Picture, gallery, pixels_of
from gradinv.types import GradinvError, Observation
from gradinv.web.parts import gradient, markup, shared, uploads
from gradinv.web.parts.gradient import OwnGradient
from gradinv.web.parts.shared import F

NETWORKS = ("resnet18-tiny", "resnet50-tiny")
MOST = 20  # pictures in a batch: to solve the features of more takes too long for a lesson
MOST_BROUGHT = 48  # pictures of a gradient that a visitor brings, who may wait
SAMPLE = ("goldfish", "tabby", "lion", "coffee")  # of whose gradient a file is there to try
REPEATS = 4  # pictures of one class that are drawn together at most
DRAWS = 99
VIEWS = ("", "mirrored", "cropped", "cropped and mirrored")
_CROP = (0.15, 0.1, 0.85, 0.8)  # left, top, right, bottom, as shares of the picture's sides
_STARTS, _CHEAP = 3, 16  # where labels repeat a right reading may fail at the first start; more are for small batches

STRENGTHS: dict[str, tuple[str, tuple[str, ...]]] = {
    "clip": ("Clip to a norm of", ("10", "3", "1", "0.3", "0.1")),
    "noise": ("Gaussian noise, σ", ("1e-6", "1e-5", "1e-4", "1e-3", "1e-2", "0.1", "1", "3")),
    "prune": ("Prune the smallest share", ("0.5", "0.9", "0.99", "0.999")),
    "quantise": ("Bits per number", ("8", "6", "4", "3", "2", "1")),
}
"""Each defence's slider and its strengths, weakest first, in the order in which they are applied."""
OFF = "off"
SHARED = "samples"  # what the pool of the bundled photographs is called
OWN = "own_pictures"  # in the session, and how the name of a pool begins that holds some

LAYOUT = {**figures.LAYOUT, "legend": {"orientation": "h", "yanchor": "bottom", "y": 1.01, "x": 0, "title": None}}
"""Of the lessons' figures."""


# --- the pictures


def own(pool: str) -> bool:
    """Whether a pool of that name holds a visitor's own pictures."""
    return pool.startswith(OWN)


@dataclass(frozen=True)
class Candidate:
    """A picture that can be in a batch, in one of `VIEWS`. `label`: None where the network lacks its class."""

    picture: Picture
    label: int | None
    view: int = 0

    @property
    def title(self) -> str:
        """What it is called, with its view."""
        return ", ".join(filter(None, (self.picture.title, VIEWS[self.view])))

    def open(self) -> Image.Image:
        """The view as an RGB image. Raises GradinvError where the picture cannot be decoded."""
        return seen(self.picture.open(), self.view)


def seen(image: Image.Image, view: int) -> Image.Image:
    """A view of a picture: view 2 and 3 are cropped, 1 and 3 mirrored."""
    if view & 2:
        width, height = image.size
        left, top, right, bottom = _CROP
        image = image.crop((round(left * width), round(top * height), round(right * width), round(bottom * height)))
    return ImageOps.mirror(image) if view & 1 else image


@dataclass(frozen=True, eq=False)
class Pool:
    """All pictures among which the attacker searches, and from which the batch is drawn: `candidates` (N) with their
    features in `gallery`, in the same order. `name` tells it from other pools of the same network."""

    name: str
    candidates: tuple[Candidate, ...]
    gallery: Gallery

    @cached_property
    def by_label(self) -> dict[int, list[int]]:
        """The places of each class's pictures; as they are first, other views later."""
        groups: dict[int, list[int]] = {}
        for place in sorted(range(len(self.candidates)), key=lambda place: self.candidates[place].view):
            if (label := self.candidates[place].label) is not None:
                groups.setdefault(label, []).append(place)
        return groups

    def draw(self, size: int, repeats: int, seed: int) -> tuple[int, ...]:
        """The places of a batch: `repeats` pictures a class, and more where the classes do not suffice for `size`.

        The same numbers give the same batch, and a larger batch holds a smaller one. Fewer than `size` where there are
        no more pictures.
        """
        generator = random.Random(seed)
        labels = generator.sample(sorted(self.by_label), len(self.by_label))
        longest = max((len(places) for places in self.by_label.values()), default=0)
        rounds = range(0, longest, repeats)
        places = [place for first in rounds for label in labels for place in self.by_label[label][first:][:repeats]]
        return tuple(places[:size])

    @property
    def counted(self) -> str:
        """One sentence where more is searched than there are pictures; else nothing."""
        if not any(item.view for item in self.candidates):
            return ""
        return (
            f"Each sample picture whose class the network knows counts {len(VIEWS)} times: as it is, "
            f"{', '.join(VIEWS[1:])}. The others count once, so {len(self.candidates)} are searched."
        )

    def labels(self, places: Sequence[int]) -> Tensor:
        """The labels (K,) of pictures that were drawn."""
        return torch.tensor([label for place in places if (label := self.candidates[place].label) is not None])


@st.cache_resource(max_entries=4, show_spinner="Looking at the sample pictures")
def samples(name: str) -> Pool:
    """The bundled photographs as a network sees them, in all their views where it knows their class."""
    network = shared.model(name)
    known = {picture.key: picture for picture in gallery(network)}
    views = [
        [Candidate(picture, network.class_index(picture.wnid or ""), view) for picture in known.values()]
        for view in range(len(VIEWS))
    ]
    views[0] += [Candidate(picture, None) for picture in gallery() if picture.key not in known]
    features = torch.cat([_features(network, candidates) for candidates in views])  # a view at a time: less memory
    candidates = [candidate for view in views for candidate in view]
    paths = tuple(SAMPLES / item.picture.key / str(item.view) for item in candidates)
    return Pool(SHARED, tuple(candidates), Gallery(SAMPLES, paths, features))


def _features(network: Model, candidates: Sequence[Candidate]) -> Tensor:
    pixels = pixels_of(candidates, network.preprocessing)
    with shared.using:
        return pooled(network, pixels)


@shared.kept(st.cache_data, lambda pool, *_: own(pool), max_entries=2048, show_spinner=False)
def thumbnail(pool: str, key: str, view: int, _picture: Picture) -> str:
    """A square thumbnail of a view as a data URI. Raises GradinvError for a picture that cannot be decoded."""
    return figures.tile(ImageOps.fit(seen(_picture.open(), view), (96, 96)), quality=70)


def thumbnail_of(pool: Pool, place: int) -> str:
    """The thumbnail of a picture of the pool."""
    item = pool.candidates[place]
    return thumbnail(pool.name, item.picture.key, item.view, item.picture)


# --- the batch and its gradient


@dataclass(frozen=True)
class Choice:
    """What the controls say: the network, and which batch; its pictures' side in pixels where that can be chosen."""

    network: str
    size: int
    repeats: int
    seed: int
    side: int | None = None


def controls(most: int = MOST, sides: Sequence[str] = ()) -> Choice:
    """The network, the batch's size up to `most`, how often classes repeat, or in its place the pictures' `sides`, and
    the draw. All of them are in the address."""
    repeats, side = 1, None
    with st.container(key="lesson-controls"):
        left, middle, right, last = st.columns([3, 3, 3, 4], gap="medium")
        with left:
            network = shared.choose("Network", NETWORKS, NETWORKS[0], "network")
        size = middle.slider("Batch size", 1, most, 4 if sides else 8, key="batch_size", bind="query-params")
        if sides:
            with right:
                side = shared.choose("Side of the pictures, in pixels", sides, sides[0], "side")
        else:
            repeats = right.slider(
                "Pictures of one class",
                1,
                REPEATS,
                1,
                key="repeats",
                bind="query-params",
                help="How many pictures of a class are drawn together. A class's further pictures are mirrored or "
                "cropped.",
            )
        with last.container(horizontal=True, vertical_alignment="bottom"):
            # A slider: number_input fails at an address that says infinity.
            seed = st.slider("Draw", 0, DRAWS, 0, key="draw", bind="query-params", width=150)
            st.button("Shuffle", icon=":material/shuffle:", key="shuffle", on_click=_shuffle)
    return Choice(network, size, repeats, int(seed), None if side is None else int(side))


def drawn(pool: Pool, choice: Choice) -> tuple[Pool, tuple[int, ...]]:
    """The places of the batch: those of the draw, or the visitor's own pictures, which are then among those that are
    searched. Offers to bring some."""
    sent: list[uploads.Upload] = st.session_state.setdefault(OWN, [])
    with st.expander("Your own pictures as the batch", icon=":material/upload:"):
        st.caption(f"{uploads.PRIVACY} Their classes are those that the network takes them for.")
        more = uploads.pictures("own")
        if more is not None:
            added, notices = more
            st.session_state[OWN] = [*sent, *added][:MOST]
            if len(sent) + len(added) > MOST:
                notices.append(f"A batch takes at most {MOST} pictures here; the others were left out.")
            st.session_state.own_notices = notices
            st.rerun()
        uploads.tell(st.session_state.pop("own_notices", []))
        if sent:
            st.button("Remove all", key="own-remove", type="tertiary", icon=":material/delete:", on_click=_drop_own)
    if not sent:
        return pool, pool.draw(choice.size, choice.repeats, choice.seed)
    st.caption(f"The batch is {markup.count(len(sent), 'picture')} of your own; the sliders of the draw do nothing.")
    key = (choice.network, pool.name, *(upload.id for upload in sent))
    if st.session_state.get("own_pool", (None,))[0] != key:
        st.session_state.own_pool = (key, _with_own(choice.network, pool, sent))
    joined: Pool = st.session_state.own_pool[1]
    return joined, tuple(range(len(pool.candidates), len(joined.candidates)))


def brought() -> OwnGradient | None:
    """The gradient that the visitor brought, here or on the page Live, which then takes the batch's place. Offers to
    bring one. Raises GradinvError where it is of more pictures than a lesson takes."""
    held = gradient.held()
    with st.expander("A gradient of your own", icon=":material/share:", expanded=held is not None):
        if held is not None:
            gradient.card(shared.visitor())
        else:
            gradient.panel(shared.model(NETWORKS[0]), SAMPLE, shared.visitor())
    if held is not None and held.batch_size > MOST_BROUGHT:
        raise GradinvError(
            f"Your gradient is of {held.batch_size} pictures, and a lesson takes at most {MOST_BROUGHT}; the page Live "
            "takes more. Remove it above to go on with a batch."
        )
    return held


def _with_own(name: str, pool: Pool, sent: Sequence[uploads.Upload]) -> Pool:
    """A pool and some uploads behind it."""
    network = shared.model(name)
    size = network.preprocessing.size
    candidates = []
    for upload in sent:
        pixels = to_pixels(upload.picture.open(), network.preprocessing)
        label = shared.prediction(name, size, upload.id, pixels)
        picture = replace(upload.picture, key=upload.id, name=network.class_name(label))
        candidates.append(Candidate(picture, label))
    features = torch.cat([pool.gallery.features, _features(network, candidates)])
    paths = (*pool.gallery.paths, *(pool.gallery.folder / upload.id for upload in sent))
    joined = Gallery(pool.gallery.folder, paths, features)
    name = " ".join([OWN, pool.name, *(upload.id for upload in sent)])
    return Pool(name, (*pool.candidates, *candidates), joined)


def _drop_own() -> None:
    st.session_state[OWN] = []
    st.session_state.pop("own_pool", None)


def _shuffle() -> None:
    """Another draw than this one."""
    st.session_state.draw = (st.session_state.draw + 1 + secrets.randbelow(DRAWS)) % (DRAWS + 1)


def defences() -> tuple[str, ...]:
    """The defences that the sliders say, as `defenses.parse_all` reads them. All sliders are in the address."""
    with st.container(key="lesson-defences"):
        chosen = {}
        for column, (name, (label, strengths)) in zip(st.columns(len(STRENGTHS)), STRENGTHS.items(), strict=True):
            chosen[name] = column.select_slider(label, (OFF, *strengths), OFF, key=name, bind="query-params")
    return _texts(chosen)


def other_defences(present: Sequence[str]) -> tuple[str, ...]:
    """As `defences`, one slider below the other, at first the `present` ones; the address does not have them."""
    at_first = dict(text.split(":", 1) for text in present)
    chosen = {}
    for name, (label, strengths) in STRENGTHS.items():
        value = at_first.get(name, OFF)
        chosen[name] = st.select_slider(label, (OFF, *strengths), value, key=f"again-{name}")
    return _texts(chosen)


def _texts(chosen: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(f"{name}:{strength}" for name, strength in chosen.items() if strength != OFF)


def defended_by_address() -> bool:
    """Whether the address, or what was chosen before, has a defence on."""
    return any(st.session_state.get(name, st.query_params.get(name, OFF)) != OFF for name in STRENGTHS)


def observed_final(network: Model, pool: Pool, places: Sequence[int]) -> Observation:
    """What the final layer gives of a batch, from features that are known: no pass through the network."""
    return Observation(
        gradients=final_gradient(network, pool.gallery.features[list(places)], pool.labels(places)),
        batch_size=len(places),
        preprocessing=network.preprocessing,
        model_name=network.name,
        model_sha256=network.sha256,
    )


@dataclass(frozen=True, eq=False)
class Given:
    """The gradient that a lesson is about, of a batch of the pool or brought by the visitor.

    `key` tells it from others, and what comes of a `private` one is kept in the visit only. `final` gives the final
    layer's gradient, `share` that of all layers; `truth` pixels (B, 3, S, S) in [0, 1] and labels (B,), None where
    nobody here has them.
    """

    network: Model
    key: tuple[object, ...]
    private: bool
    final: Callable[[], Observation]
    share: Callable[[], Observation]
    truth: Callable[[], tuple[Tensor, Tensor]] | None = None


def of_batch(network: Model, pool: Pool, places: tuple[int, ...]) -> Given:
    """That of a batch of the pool."""

    def truth() -> tuple[Tensor, Tensor]:
        candidates = [pool.candidates[place] for place in places]
        return pixels_of(candidates, network.preprocessing), pool.labels(places)

    def share() -> Observation:
        pixels, labels = truth()
        with shared.using:
            return observe(network, pixels, labels)

    key = (network.name, network.preprocessing.size, pool.name, places)
    return Given(network, key, own(pool.name), partial(observed_final, network, pool, places), share, truth)


def of_visitor(brought: OwnGradient, network: Model) -> Given:
    """One that the visitor brought. Raises GradinvError where it is not held any more."""
    observation = brought.find(shared.visitor())
    key = (network.name, network.preprocessing.size, brought.key)
    return Given(network, key, True, lambda: observation, lambda: observation)


def kept(cache: Any, **options: Any) -> Callable[[F], F]:
    """As `shared.kept`, of a function whose first argument is what is given."""
    hashed = {Given: lambda given: given.key}
    return shared.kept(cache, lambda given, *_: given.private, hash_funcs=hashed, **options)


def observed(given: Given) -> Observation:
    """The gradient of all layers."""
    return given.share() if given.truth is None else _observed(given)


@kept(st.cache_resource, max_entries=2, show_spinner="The client computes its gradient")
def _observed(given: Given) -> Observation:
    """That of a batch, as large as the network: the last two are kept. One that was brought is held elsewhere."""
    return given.share()


def defended(observation: Observation, texts: Sequence[str], seed: int) -> Observation:
    """The observation behind all defences, in their order."""
    for defence in parse_all(texts, seed):
        observation = defence(observation)
    return observation


# --- the attack


@dataclass(frozen=True, eq=False)
class Attack:
    """What the final layer's gradient gives away at once: the `labels` (K,) that `method` read, each image's
    `features` (K, D), and what they leave unexplained of that gradient. `seconds` is what it took."""

    method: str
    labels: Tensor
    features: Tensor
    residual: float
    seconds: float


def attack(network: Model, observation: Observation) -> Attack:
    """Of the plain readings of the labels the one whose features explain the gradient best, in about a second.

    ilrg trusts the gradient's scale, which clipping changes; where nothing explains the gradient, it reads once more,
    at each scale that was found. `labels.restore_labels` tests corrections of single labels as well, which behind other
    defences takes long and finds nothing. Raises GradinvError where the layer has no bias or its gradient is not
    finite.
    """
    began = time.perf_counter()
    layer = FinalLayer(network, observation)
    starts = _STARTS if observation.batch_size <= _CHEAP else 1
    tested: dict[tuple[int, ...], tuple[str, Tensor, Fit]] = {}

    def test(method: str, labels: Tensor) -> bool:
        """Whether the labels, in any order, explain the gradient."""
        key = tuple(sorted(labels.tolist()))
        if key not in tested:
            tested[key] = (method, labels, layer.fit(labels, starts=starts))
        return tested[key][2].residual < EXPLAINED

    if not any(test(method, labels) for method, labels in readings(network, observation).items()):
        scales = [fit.scale for _, _, fit in tested.values()]
        any(test("ilrg, rescaled", readings(network, observation, scale)["ilrg"]) for scale in scales)
    method, labels, best = min(tested.values(), key=lambda one: one[2].residual)
    return Attack(method, labels, best.features.float(), best.residual, time.perf_counter() - began)


def readings(network: Model, observation: Observation, scale: float = 1.0) -> dict[str, Tensor]:
    """The labels (K,) by each plain method that applies, of a gradient that is `scale` times the client's average."""
    gradient, bias_gradient = (
        observation.gradients[f"{network.final}.{part}"].cpu() / scale for part in ("weight", "bias")
    )
    weight, bias = (value.detach().cpu() for value in (network.final_layer.weight, network.final_layer.bias))
    count = observation.batch_size
    return {
        "column-minimum": column_minimum(gradient, count),
        "ilrg": ilrg(gradient, bias_gradient, weight, bias, count),
        "bias-corrected": bias_corrected(bias_gradient, count),
        "llg": llg(gradient, count),
    }


@kept(st.cache_resource, max_entries=64, show_spinner="The server reads the gradient")
def attacked(given: Given, texts: tuple[str, ...], seed: int) -> Attack:
    """The attack behind some defences, which act on the gradients of all layers together."""
    return attack(given.network, defended(observed(given), texts, seed) if texts else given.final())


@kept(st.cache_data, max_entries=64, show_spinner=False)
def painted(given: Given, texts: tuple[str, ...], seed: int) -> tuple[str, ...]:
    """What a learned prior makes of the features that the attack recovers behind the defences, as data URIs."""
    return figures.tiles(prior.preview(given.network, attacked(given, texts, seed).features))


def found(first: Sequence[int], places: Sequence[int]) -> int:
    """How many pictures of the batch are somebody's best match; a picture counts once."""
    return len(set(first) & set(places))


def strip(pool: Pool, places: Sequence[int], shown: bool) -> str:
    """The batch as a line of small pictures, or as many question marks as long as it is not to be seen."""
    body = ""
    for place in places:
        title = escape(pool.candidates[place].title)
        if shown:
            body += f'<img src="{thumbnail_of(pool, place)}" alt="In the batch: {title}" title="{title}">'
        else:
            body += '<span class="gi-hidden" role="img" aria-label="Hidden picture of the batch">?</span>'
    return f'<div class="gi-strip">{body}</div>'


def credits(pool: Pool) -> None:
    """Authors and licences of the sample pictures."""
    pictures = [item.picture for item in pool.candidates if item.view == 0]
    known = [(picture.title, picture.credit) for picture in pictures if picture.credit is not None]
    if known:
        with st.expander(f"Authors and licences of the {len(known)} sample pictures"):
            st.html(markup.credits(known))
            st.caption("Every picture was cropped to a square and scaled; for some views it was mirrored or cropped.")
