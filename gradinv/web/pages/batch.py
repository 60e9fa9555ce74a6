"""The page Who was in the batch?: the features recovered from the gradient, looked up among many pictures."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from html import escape

import streamlit as st

from gradinv import metrics
from gradinv.gallery import Gallery, Progress
from gradinv.jobs import sentence
from gradinv.models import Model, load_model
from gradinv.recovery.final_layer import EXPLAINED
from gradinv.sources import from_path
from gradinv.types import GradinvError
from gradinv.web.parts import lessons, markup, shared
from gradinv.web.parts.elements import guarded, html, lead
from gradinv.web.parts.lessons import Candidate, Pool

TOP = 3  # pictures that are shown for each of the batch
AMONG = ("samples", "ImageNet folder")  # as the address says it too
TICK = 1.0  # seconds between two looks at how far the folder is


@guarded()
def page() -> None:
    """Everything on the page."""
    lead(
        "Who was in the batch?",
        "An attacker who has a pile of pictures does not have to rebuild anything. It solves the last layer’s "
        "gradient for what the network sees in each picture of the batch, and looks up which pictures look like "
        "that to the network.",
    )
    choice = lessons.controls()
    texts = lessons.defences()
    brought = lessons.brought()
    pool = _pool(choice.network if brought is None else brought.model)
    if pool is None:
        return
    if brought is None:
        _search(choice, texts, pool)
    else:
        # Nobody here knows the pictures of this one.
        given = lessons.of_visitor(brought, shared.model(brought.model))
        _found(given, texts, choice.seed, pool, None)
    lessons.credits(pool)


def _search(choice: lessons.Choice, texts: tuple[str, ...], pool: Pool) -> None:
    network = shared.model(choice.network)
    pool, places = lessons.drawn(pool, choice)
    if not places:
        raise GradinvError(f"No picture of the folder is of a class that {network.name} knows; name another folder.")
    with st.container(horizontal=True, vertical_alignment="center", horizontal_alignment="distribute"):
        st.markdown(f"**The client’s batch**: {markup.count(len(places), 'picture')}, which the attack never sees")
        shown = st.toggle("Reveal", False, key="reveal", bind="query-params")
    with st.container(key="strip"):
        html(lessons.strip(pool, places, shown))
    _found(lessons.of_batch(network, pool, places), texts, choice.seed, pool, places if shown else None)


def _found(given: lessons.Given, texts: tuple[str, ...], seed: int, pool: Pool, places: Sequence[int] | None) -> None:
    """What the attack comes to, held against the batch's `places` in the pool where they may be seen."""
    found = lessons.attacked(given, texts, seed)
    similarity, ranked = (part.tolist() for part in pool.gallery.match(found.features, TOP))
    spent = f"{found.seconds:.1f} s" if found.seconds >= 0.1 else "less than 0.1 s"
    st.header("What the server finds", anchor=False)
    told = [
        ("searched", markup.count(len(pool.candidates), "picture")),
        ("time to read the gradient", spent),
        ("residual of the features", markup.number(found.residual)),
    ]
    if places is not None:
        right = metrics.labels_right(found.labels.tolist(), pool.labels(places).tolist())
        first = lessons.found([row[0] for row in ranked], places)
        told += [("labels right", f"{right} of {len(places)}"), ("pictures found", f"{first} of {len(places)}")]
    with st.container(key="search-facts"):
        html(markup.facts(told))
    st.markdown(trust(found.residual))
    prior = st.toggle(
        "Paint what a learned prior makes of the features",
        False,
        key="prior",
        bind="query-params",
        help="A network that learned from 100,000 public pictures paints a first guess. The search does without it.",
    )
    painted = lessons.painted(given, texts, seed) if prior else None
    names = [given.network.class_name(label) for label in found.labels.tolist()]
    with st.container(key="lineup"):
        html(lineup(pool, names, ranked, similarity, places, painted))
    st.caption(
        f"For each picture of the batch: the class that was read, and the {TOP} pictures whose features are most "
        f"similar (cosine), the most similar one large. Nothing is optimised in pixels. {pool.counted}"
    )


def trust(residual: float) -> str:
    """What the residual of the features means, in words."""
    if residual < EXPLAINED:
        return (
            "The features explain the last layer’s gradient to the last digit: they are **the client’s own**, and a "
            "picture that was in the batch has a similarity of 1."
        )
    share = f"{100 * residual:.2g} %" if residual < 1 else "all"
    return (
        f"The features leave **{share} of the last layer’s gradient unexplained**: they are not exactly the client’s "
        "own, so the most similar picture may be another one. A defence changed the gradient, or a class was misread."
    )


def lineup(
    pool: Pool,
    names: Sequence[str],
    ranked: Sequence[Sequence[int]],
    similarity: Sequence[Sequence[float]],
    places: Sequence[int] | None,
    painted: Sequence[str] | None,
) -> str:
    """A card for each recovered picture: its class of `names`, the `ranked` pictures of the pool with their similarity,
    and what was `painted` of it. Marked right or wrong against the batch's `places`, once they may be seen."""
    cards = ""
    for number, (name, row, similarities) in enumerate(zip(names, ranked, similarity, strict=True), 1):
        tiles = ""
        for place, value in zip(row, similarities, strict=True):
            title = escape(pool.candidates[place].title)
            mark = ""
            if places is not None:
                mark = markup.mark(place in places, "was in the batch:", "was not in the batch:")
            tiles += (
                f'<figure class="gi-tile"><img src="{lessons.thumbnail_of(pool, place)}" alt="Match: {title}" '
                f'title="{title}"><figcaption>{mark}{value:.3f}</figcaption></figure>'
            )
        if painted is not None:
            tiles += (
                f'<figure class="gi-tile"><img src="{painted[number - 1]}" alt="Guess of a learned prior: '
                f'{escape(name)}"><figcaption>learned prior</figcaption></figure>'
            )
        cards += (
            f'<article class="gi-suspect"><div class="gi-name" role="heading" aria-level="3">'
            f"<small>Picture {number}</small>{escape(name)}</div>"
            f'<div class="gi-matches">{tiles}</div></article>'
        )
    return f'<div class="gi-lineup">{cards}</div>'


# --- the pictures to search


def _pool(name: str) -> Pool | None:
    """The pictures to search; None as long as the folder is being looked at."""
    if not _has_folder():
        return lessons.samples(name)
    among = shared.choose("Search among", AMONG, AMONG[0], "among")
    if among == AMONG[0]:
        return lessons.samples(name)
    index = Index.of(name)
    if index.problem:
        st.error(index.problem)
        st.button("Try again", icon=":material/refresh:", on_click=Index.forget, args=(name,))
    elif index.pool is None:
        _wait(name)
    return index.pool


def _has_folder() -> bool:
    try:
        shared.folder()
    except GradinvError:
        return False
    return True


@st.fragment(run_every=TICK)
@guarded()
def _wait(name: str) -> None:
    index = Index.of(name)
    if index.pool is not None or index.problem:
        st.rerun()
    share = index.done / index.total if index.total else 0.0
    told = f"{index.done:,} of {index.total:,}; this is done once" if index.total else "loading the network"
    html(markup.progress(share, "Looking at the folder’s pictures", told))


class Index:
    """The pictures of the server's folder as one network sees them, looked at once a process by a thread of its own.

    `pool` is None until it is done; `problem` says why it never will be.
    """

    def __init__(self, name: str) -> None:
        self.done, self.total = 0, 0
        self.pool: Pool | None = None
        self.problem = ""
        self.thread = threading.Thread(target=self._look, args=(name,), name="gradinv-folder", daemon=True)
        self.thread.start()

    @staticmethod
    def of(name: str) -> Index:
        """That of a network, which the first call begins."""
        with _guard:
            if name not in _indices:
                _indices[name] = Index(name)
            return _indices[name]

    @staticmethod
    def forget(name: str) -> None:
        """Let the next call begin anew."""
        with _guard:
            _indices.pop(name, None)

    def _look(self, name: str) -> None:
        try:
            # A network of its own: this may take long, and hooks on a network hear every thread that runs it.
            self.pool = folder_pool(load_model(name), self._report)
        except Exception as error:
            self.problem = sentence(error, "Looking at the folder")

    def _report(self, done: int, total: int) -> None:
        self.done, self.total = done, total


_indices: dict[str, Index] = {}
_guard = threading.Lock()


def folder_pool(network: Model, report: Progress | None = None) -> Pool:
    """All pictures of the server's ImageNet folder. Raises GradinvError where it is not there or holds none."""
    gallery = Gallery.of(network, shared.folder().root, progress=report)
    labels = {item.wnid: label for label, item in enumerate(network.classes)}
    pictures = [from_path(path) for path in gallery.paths]
    candidates = tuple(Candidate(picture, labels.get(picture.wnid or "")) for picture in pictures)
    return Pool(f"folder {gallery.folder}", candidates, gallery)
