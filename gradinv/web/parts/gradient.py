"""A gradient of the visitor's own: accepted within limits, held in memory, and shown. Nobody here has its pictures."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from textwrap import shorten

import streamlit as st
import torch
from streamlit.typing import UploadedFile

from gradinv import figures
from gradinv.checks import check_observation
from gradinv.client import observe
from gradinv.jobs import Limits, manager
from gradinv.models import MODELS, Model
from gradinv.recovery.examination import Examined, examine
from gradinv.recovery.labels import UPDATE, restore_labels
from gradinv.sources import find, gallery, pixels_of
from gradinv.types import GradinvError, Observation
from gradinv.web.parts import markup, shared, uploads
from gradinv.web.parts.inversion import Shared

LARGEST = 256  # pictures in a batch, more than any limit of memory lets pass on a small machine
SMALLEST, LARGEST_SIDE = 8, 256  # pixels of a picture's side on the bundled networks
NAME = 60  # letters of a file's name that are shown

# As docs/your-own-gradient.md has it.
EXAMPLE = """\
from torch.nn.functional import cross_entropy
from gradinv.models import load_model
from gradinv.types import Observation

model = load_model("resnet18-tiny")  # or the path of your own weights
# your loop, up to optimiser.step(): pixels (K, 3, 64, 64) in [0, 1] and labels (K,)
loss = cross_entropy(model.network(model.preprocessing.normalise(pixels)), labels)
loss.backward()
gradients = {name: p.grad for name, p in model.network.named_parameters()}
Observation(gradients, len(pixels), model.preprocessing, model.name, model.sha256).save("mine.safetensors")
"""

STATISTICS = {
    (False, False): "It carries no BN statistics, so the attack has those stored in the weights (approx) or none.",
    (True, False): "It carries the BN statistics of its own batch, so “exact” can be chosen below.",
    (False, True): "It carries the running BN statistics after the client’s step, so “inferred” can be chosen below.",
    (
        True,
        True,
    ): "It carries the BN statistics of its own batch and the running ones after the client’s step, so “exact” "
    "and “inferred” can be chosen below.",
}


@dataclass(frozen=True)
class OwnGradient:
    """What a session knows of the gradient that it brought: `key` finds it, `size` is in bytes, `side` in pixels."""

    key: str
    name: str
    size: int
    model: str
    batch_size: int
    side: int
    mode: str
    leaks: tuple[bool, bool]  # the batch's own BN statistics, the running ones
    notes: tuple[str, ...] = ()  # what it was found to be, where the file says otherwise
    update: bool = False  # whether the file holds a weight update, of which the negative is the gradient

    def find(self, visitor: str) -> Observation:
        """The gradient itself. Raises GradinvError where it is not held any more."""
        return _store.find(self.key, visitor).observation

    def shared(self, visitor: str) -> Shared:
        """For a job."""
        return Shared(self.batch_size, self.side, partial(self.find, visitor))


@dataclass(eq=False)
class _Held:
    examined: Examined
    size: int
    seen: dict[str, float] = field(default_factory=dict)  # by visitor

    @property
    def last(self) -> float:
        return max(self.seen.values())


class GradientStore:
    """The gradients of all visitors together, within a limit of bytes; one that several bring is held once.

    One that nobody has looked at for a lease makes room for what comes; what is looked at stays.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._held: OrderedDict[str, _Held] = OrderedDict()
        self._clock = clock
        self._loading = threading.Lock()
        self._guard = threading.Lock()

    @property
    def size(self) -> int:
        """The bytes of all that is held."""
        return sum(held.size for held in self._held.values())

    def put(self, key: str, visitor: str, size: int, limits: Limits, load: Callable[[], Examined]) -> Examined:
        """Take what `load` gives, unless it is there already. Raises GradinvError where there is no room for it.

        Visitors take turns, since loading takes the memory of several copies.
        """
        with self._loading:
            with self._guard:
                if key in self._held:
                    return self._look(key, visitor)
                self._make_room(size, limits)
            loaded = load()
            with self._guard:
                self._held[key] = _Held(loaded, size)
                return self._look(key, visitor)

    def find(self, key: str, visitor: str) -> Examined:
        """What was put. Raises GradinvError where it has made room for others since."""
        with self._guard:
            if key not in self._held:
                raise GradinvError(
                    "The gradient is not kept here any more, since others needed the room; bring it again."
                )
            return self._look(key, visitor)

    def leave(self, key: str, visitor: str) -> None:
        """A visitor is done with it; nothing is held for nobody."""
        with self._guard:
            if (held := self._held.get(key)) is not None:
                held.seen.pop(visitor, None)
                if not held.seen:
                    del self._held[key]

    def _look(self, key: str, visitor: str) -> Examined:
        held = self._held[key]
        held.seen[visitor] = self._clock()
        self._held.move_to_end(key)
        return held.examined

    def _make_room(self, size: int, limits: Limits) -> None:
        now = self._clock()
        for key, held in list(self._held.items()):  # those looked at longest ago come first
            idle = now - held.last
            if idle > limits.retained_seconds or (self.size + size > limits.gradients and idle > limits.lease):
                del self._held[key]
        if self.size + size > limits.gradients:
            raise GradinvError("This server holds as many gradients of visitors as it can; try again in a few minutes.")


_store = GradientStore()


def accept(data: bytes, name: str, visitor: str, *, update: bool = False) -> OwnGradient:
    """A visitor's file, or an `update` of weights, → what it is, with the gradient held. Raises GradinvError, one
    sentence, for all else."""
    limits = manager().limits
    if len(data) > limits.gradient:
        raise GradinvError(f"{name} has more than the {megabytes(limits.gradient)} that a gradient may have here.")
    key = hashlib.sha256(data).hexdigest() + ("-negated" if update else "")
    examined = _store.put(key, visitor, len(data), limits, partial(_checked, data, name, update))
    observation = examined.observation
    leaks = observation.bn is not None, observation.running is not None
    side, mode = observation.preprocessing.size, observation.mode
    return OwnGradient(
        key, name, len(data), observation.model_name, observation.batch_size, side, mode, leaks, examined.notes, update
    )


def read(data: bytes, name: str, visitor: str, *, update: bool = False) -> OwnGradient:
    """As `accept`, once its labels could be read: what that shows of the gradient is in the notes. What turns out to be
    an update is taken as one."""
    brought = accept(data, name, visitor, update=update)
    try:
        found = preview(brought.model, brought.key, "auto", brought.find(visitor))
    except GradinvError as error:
        _store.leave(brought.key, visitor)
        if str(error) == UPDATE and not update:
            return read(data, name, visitor, update=True)
        raise
    return replace(brought, notes=(*brought.notes, *found.notes))


def _checked(data: bytes, name: str, update: bool) -> Examined:
    observation = Observation.unpack(data, name)
    if update:
        observation = observation.negated()
    info = MODELS.get(observation.model_name)
    if info is None:
        raise GradinvError(
            f"{name} is of a network that this page does not have; the command line takes any: gradinv invert "
            "--observation FILE --model WEIGHTS."
        )
    if not shared.at_hand(info.name):
        raise GradinvError(f"{name} is of {info.name}, which is not loaded here; choose and load it above first.")
    count, side = observation.batch_size, observation.preprocessing.size
    most = min(LARGEST, info.classes)
    if isinstance(count, int) and count > most:
        raise GradinvError(f"{name} is of more than the {most} pictures that a batch may have here on {info.name}.")
    if side != info.size and not (info.bundled and SMALLEST <= side <= LARGEST_SIDE):
        taken = f"{SMALLEST} to {LARGEST_SIDE}" if info.bundled else str(info.size)
        raise GradinvError(
            f"{name} is of {side}-px pictures, and {info.name} takes {taken} px here; the command line takes any "
            "size: gradinv invert --observation FILE."
        )
    network = shared.model(info.name, size=side)
    with shared.using:
        check_observation(network, observation)
        examined = examine(network, observation)
    observation = examined.observation
    # A file has them in any order.
    names = [name for name, _ in network.network.named_parameters() if name in observation.gradients]
    gradients = {name: observation.gradients[name] for name in names}
    return replace(examined, observation=replace(observation, gradients=gradients))


@st.cache_data(max_entries=64, show_spinner=False)
def preview(name: str, key: str, method: str, _observation: Observation) -> shared.Preview:
    """A gradient's layer norms and the labels that a method restores from it. Raises GradinvError where it cannot."""
    found = restore_labels(shared.model(name, size=_observation.preprocessing.size), _observation, method)
    norms = figures.layer_norms(_observation)
    return shared.Preview(norms, tuple(found.labels.tolist()), found.method, found.confidence, found.notes)


def sample(name: str, pictures: Sequence[str]) -> bytes:
    """The file of a gradient of the gallery's pictures of these names, for anyone to try."""
    network = shared.model(name)
    chosen = [find(gallery(network), picture) for picture in pictures]
    labels = torch.tensor([network.class_index(picture.wnid or "") for picture in chosen])
    pixels = pixels_of(chosen, network.preprocessing)
    with shared.using:
        return observe(network, pixels, labels).pack()


def megabytes(size: int) -> str:
    """Bytes as a reader takes them; those of a limit are a whole number of 2²⁰."""
    return f"{size / 2**20:.3g} MB"


# --- the page


def held() -> OwnGradient | None:
    """This session's gradient."""
    brought: OwnGradient | None = st.session_state.get("gradient")
    return brought


def card(visitor: str) -> None:
    """What was brought, or that nothing has been yet."""
    brought = held()
    if brought is None:
        st.info("No gradient yet. Bring one below, or take the sample.")
        return
    what = "a weight update, whose negative is the mean gradient" if brought.update else "the mean gradient"
    with st.container(horizontal=True, vertical_alignment="center", horizontal_alignment="distribute", key="gradient"):
        pictures = markup.count(brought.batch_size, "picture")
        st.markdown(
            f":material/share: **{markup.plain(brought.name)}**, {megabytes(brought.size)}: {what} of "
            f"{pictures} of {brought.side} × {brought.side} px on {brought.model}, taken in {brought.mode} mode. "
            f"{STATISTICS[brought.leaks]} Nobody here has the pictures, so nothing can be compared with them."
        )
        st.button(
            "Remove", type="tertiary", icon=":material/close:", key="gradient-remove", on_click=_remove, args=(visitor,)
        )
    for note in brought.notes:
        st.warning(markup.plain(note))


def _remove(visitor: str) -> None:
    brought = held()
    st.session_state.pop("gradient", None)
    # A run that has not begun yet still needs it.
    if brought is not None and manager().unfinished(shared.owner()) is None:
        _store.leave(brought.key, visitor)


def panel(network: Model, pictures: Sequence[str], visitor: str) -> None:
    """Bring a gradient, make one, or take a sample of these pictures of the gallery."""
    limits, accepted = manager().limits, st.get_option("server.maxUploadSize")
    most = max(1, min(limits.gradient // 2**20, accepted))
    uploads.keep_in_memory()
    turn = st.session_state.setdefault("gradient_turn", 0)
    file = st.file_uploader(
        f"A gradient (.safetensors, at most {most} MB, of at most {LARGEST} pictures)",
        "safetensors",
        key=f"gradient_{turn}",
        max_upload_size=most,
    )
    if notice := st.session_state.pop("gradient_notice", None):
        st.warning(markup.plain(notice))
    st.caption(
        "It stays in this server’s memory for as long as the page and its run need it, and is never written to its "
        "disk. The file names its network, and holds neither pictures nor labels."
    )
    with st.container(horizontal=True, key="gradient-sample"):
        st.download_button(
            "A sample to try",
            partial(sample, network.name, pictures),
            f"gradient-{network.name}.safetensors",
            "application/octet-stream",
            icon=":material/download:",
            on_click="ignore",
            help=f"The gradient of {len(pictures)} pictures of the gallery on {network.name}. Download it, then "
            "bring it here as if it were a client’s.",
        )
    with st.expander("The ten lines that make such a file"):
        st.code(EXAMPLE, "python")
    if file is not None:
        _take(file, visitor)


def _take(file: UploadedFile, visitor: str) -> None:
    name = shorten(
        "".join(letter for letter in file.name if letter.isalnum() or letter in " ._-"), NAME, placeholder="…"
    )
    try:
        with st.spinner("Reading the gradient"):
            st.session_state.gradient = read(file.getvalue(), name or "The file", visitor)
    except GradinvError as error:
        st.session_state.gradient_notice = shorten(str(error), 400, placeholder="…")
    finally:
        uploads.let_go(file)
    # A new uploader, which does not show the file any more.
    st.session_state.gradient_turn += 1
    st.rerun()
