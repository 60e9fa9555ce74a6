"""What all visitors share: loaded models, thumbnails, previews. Nothing here belongs to one session."""

from __future__ import annotations

import contextlib
import secrets
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import wraps
from typing import Any, Literal, TypeVar, cast

import streamlit as st
import torch
from PIL import ImageOps
from torch import Tensor

from gradinv import figures
from gradinv.client import observe
from gradinv.defenses import parse_all
from gradinv.models import MODELS, Model, load_model
from gradinv.recovery.labels import METHODS, restore_labels
from gradinv.sources import ImageFolder, Picture, SampleSet
from gradinv.types import GradinvError, Observation
from gradinv.web.host import server

F = TypeVar("F", bound=Callable[..., Any])
User = Literal["page", "worker"]
Key = tuple[str, int, tuple[tuple[str, int], ...]]
"""A network, the side of the pictures, and each picture with its label."""
_KEPT = 2  # models for each user
_OBSERVED = 2  # gradients of public pictures, each as large as a network

_models: OrderedDict[tuple[User, str], Model] = OrderedDict()
_loading: defaultdict[tuple[User, str], threading.Lock] = defaultdict(threading.Lock)
_observed: OrderedDict[Key, Observation] = OrderedDict()
_guard = threading.Lock()
using = threading.Lock()
"""Held while a page runs a network: hooks on it hear every thread that does."""


def kept(cache: Any, private: Callable[..., bool], **options: Any) -> Callable[[F], F]:
    """A decorator: keep what a function gives, by a `cache` of Streamlit's with these options; what comes of a
    visitor's own pictures, as `private` says of the arguments, in the visit only."""

    def decorate(function: F) -> F:
        everybody, visit = cache(**options)(function), cache(**options, scope="session")(function)

        @wraps(function)
        def find(*args: Any) -> Any:
            return (visit if private(*args) else everybody)(*args)

        return cast(F, find)

    return decorate


def visitor() -> str:
    """Who this session is to what is held for visitors; nobody can guess it."""
    name: str = st.session_state.setdefault("visitor", secrets.token_urlsafe(16))
    return name


def owner() -> str:
    """Who starts runs here: the browser, by the cookie that the server gave it, so that its tabs are one; where there
    is none, the session."""
    return st.context.cookies.get(server.COOKIE) or visitor()


def model(name: str, user: User = "page", size: int | None = None) -> Model:
    """A named model, loaded once a process and user; for pictures of `size` pixels, or its own size. Raises
    GradinvError where it cannot be had.

    The worker has a model of its own: hooks on a network hear every thread that runs it.
    """
    key: tuple[User, str] = (user, name)
    with _guard:
        loading = _loading[key]
    with loading:
        if key not in _models:
            loaded = load_model(name)
            with _guard:
                _models[key] = loaded
                for oldest in [known for known in _models if known[0] == user][:-_KEPT]:
                    del _models[oldest]
        found = _models[key]
    return found if size is None else found.at(size)


def warm(name: str) -> None:
    """Load the worker's model while the visitor still chooses, so that the first picture comes sooner."""

    def load() -> None:
        with contextlib.suppress(GradinvError):  # the job that needs it says so
            model(name, "worker")

    if ("worker", name) not in _models:
        threading.Thread(target=load, name="gradinv-warm", daemon=True).start()


def at_hand(name: str) -> bool:
    """Whether the model can be had without a download that nobody has agreed to yet."""
    return MODELS[name].bundled or MODELS[name].headless or ("page", name) in _models


@dataclass(frozen=True)
class Preview:
    """What the server receives and reads at once: each layer's gradient norm, the labels restored from it, by which
    method, how far they can be trusted (in [0, 1]), and what the gradient was found to be, in sentences."""

    norms: dict[str, float]
    restored: tuple[int, ...]
    method: str
    confidence: float
    notes: tuple[str, ...] = ()


@st.cache_data(max_entries=64, show_spinner=False)
def preview(
    name: str,
    size: int,
    batch: tuple[tuple[str, int], ...],
    defences: tuple[str, ...],
    method: str,
    _pixels: Tensor,
    _public: bool,
) -> Preview:
    """Share the gradient of pixels (B, 3, size, size) in [0, 1], behind some defences, and look at it. `batch`: what
    tells it from others, and its labels; `method`: how they are restored. Of `public` pictures the gradient is kept for
    a run that may come next. Raises GradinvError where the labels cannot be restored."""
    network = model(name, size=size)
    with using:
        observation = observe(network, _pixels, torch.tensor([label for _, label in batch]))
    if _public:
        with _guard:
            _observed[name, size, batch] = observation
            while len(_observed) > _OBSERVED:
                _observed.popitem(last=False)
    for defence in parse_all(defences):
        observation = defence(observation)
    # Behind a defence, testing corrections of the labels takes long and finds nothing: the surest plain method it is.
    methods = METHODS[1:] if defences and method == "auto" else (method,)
    found = max((restore_labels(network, observation, one) for one in methods), key=lambda one: one.confidence)
    return Preview(figures.layer_norms(observation), tuple(found.labels.tolist()), found.method, found.confidence)


def observed(key: Key) -> Observation | None:
    """The gradient of a batch of public pictures as it was looked at, as long as it is kept."""
    return _observed.get(key)


@st.cache_data(max_entries=256, show_spinner=False)
def prediction(name: str, size: int, upload: str, _pixels: Tensor) -> int:
    """The label that a model gives a picture of pixels (3, size, size) in [0, 1]."""
    with using:
        return int(model(name, size=size).predict(_pixels[None])[0])


@kept(st.cache_data, lambda source, *_: source == "upload", max_entries=4096, show_spinner=False)
def thumbnail(source: str, key: str, _picture: Picture) -> str:
    """A square thumbnail as a data URI. Raises GradinvError for a picture that cannot be decoded."""
    return figures.tile(ImageOps.fit(_picture.open(), (128, 128)), quality=70)


@st.cache_resource(show_spinner=False)
def folder() -> ImageFolder:
    """The ImageNet folder that GRADINV_IMAGENET names. Raises GradinvError where it is none."""
    return ImageFolder()


@st.cache_resource(show_spinner=False)
def sample_set() -> SampleSet:
    """The public sample set, fetched picture by picture."""
    return SampleSet()


def choose(label: str, options: Iterable[str], default: str, key: str, **more: Any) -> str:
    """One of some words, which the address keeps; `more` is what Streamlit's control takes besides."""
    return str(
        st.segmented_control(label, list(options), default=default, required=True, key=key, bind="query-params", **more)
    )
