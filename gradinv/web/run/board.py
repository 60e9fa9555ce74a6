"""What a run has made so far: the layers that were solved, and the pictures in rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import streamlit as st

from gradinv.cli import say
from gradinv.jobs import JobState
from gradinv.web.parts import markup, presenting, solved
from gradinv.web.parts.elements import html
from gradinv.web.parts.inversion import Inversion, Layer, Pictures, Progress, Solving
from gradinv.web.parts.markup import Row, Tile
from gradinv.web.run.facts import Facts, size_of, work_of

T = TypeVar("T")

BESIDE = 5  # pictures beside which the charts still fit

PAINTED = "a guess that a network learned from public pictures; below it what explains the gradient"
TERMS_OF_LOSS = (
    "What the attack makes small: how far the pictures’ activations or gradient are from what is known, and what "
    "natural pictures have little of, such as noise (total variation). Each line is one of them times its weight."
)
MEETING = "Where all lines fall at once, the seeds met: each goes on from the mean of all, with some noise."
PSNR_ALT = {
    True: "PSNR of each seed and of the consensus by step, beside that of the best constant colour",
    False: "PSNR by step, beside that of the best constant colour",
}


def ladder(work: Inversion, solving: Solving | None) -> None:
    """What is solved before the pixels, where that is asked for. Its place is kept before it is there."""
    if work.config.needs_layers:
        with st.container(key="solved"):
            html(solved.ladder(solving) if solving is not None else "")


def laid_out(batch: int, board: Callable[[], T], side: Callable[[], None]) -> T:
    """Draw the pictures and the numbers: side by side while the batch is small, else the numbers above; → what the
    former gives. On a phone the pictures come first. From the top down, so that nothing moves what is there already."""
    if batch <= BESIDE:
        left, right = st.columns([5, 3], gap="large")
        with left:
            drawn = board()
        with right:
            side()
        return drawn
    side()
    return board()


def numbers(told: Sequence[tuple[str, str]]) -> None:
    """What is measured, each with its name."""
    with st.container(key="facts"):  # for which the style keeps the place
        html(markup.facts(told))


def met(progress: Progress | None) -> str | None:
    """What to know of the curves of seeds that meet."""
    return MEETING if progress is not None and progress.meetings else None


def hide(work: Inversion) -> bool:
    """The control that hides the originals or, in a presentation, reveals them; → whether they are hidden."""
    if work.originals is None:
        if presenting.on():
            st.markdown("Rebuilt from the gradient alone: nobody here has its pictures.")
        return False
    if presenting.on():
        revealed = st.session_state.get("revealed", False)
        st.button("Hide (R)" if revealed else "Reveal (R)", key="reveal", type="primary", on_click=_reveal)
        return not revealed
    return st.toggle("Hide the originals (let the class guess)", key="hide", bind="query-params")


def _reveal() -> None:
    st.session_state.revealed = not st.session_state.get("revealed", False)


def draw(state: JobState, pictures: Pictures | None, hidden: bool, layer: Layer | None = None) -> None:
    """Draw the pictures, None as long as there are none, and what a `layer` holds of each."""
    work, facts = work_of(state)
    rows = rows_of(work, facts, pictures, hidden, layer)
    drawn = len(rows)
    if size_of(work) == 1 and work.config.seeds > 1:
        # One picture: its seeds stand side by side instead of in a long column.
        drawn = len(rows) - work.config.seeds
        seeds = [replace(row.tiles[0], caption=row.name) for row in rows[drawn:]]
        shown = markup.board(rows[:drawn]) + markup.board([Row("Seeds", seeds)])
    else:
        shown = markup.board(rows)
    # Named after what it will hold, for which the style keeps the place.
    with st.container(key=f"board-{size_of(work)}x{min(drawn, 4)}rows"):
        html(shown)


def rows_of(
    work: Inversion, facts: Facts, pictures: Pictures | None, hidden: bool, layer: Layer | None = None
) -> list[Row]:
    """The originals, unless they are `hidden`; what was painted and rebuilt; what a `layer` holds; and each seed."""
    own = work.originals
    rows = []
    if own is not None:
        true = [facts.classes[label] for label in own.labels]
        originals = [
            Tile(None if hidden else uri, "Hidden original" if hidden else f"Original: {name}", "" if hidden else name)
            for uri, name in zip(facts.originals, true, strict=True)
        ]
        rows.append(Row("Originals", originals, "what the client kept"))
    below = [] if layer is None else [_held(layer)]
    seeds = work.config.seeds
    whole, note = markup.result(work.config.to_dict())
    if own is not None:
        note += f"; {markup.BASELINE}"
    if pictures is None:
        # What will stand below the pictures has its place.
        notes = [""] * size_of(work) if own is None else [markup.beside(None, value) for value in facts.baseline]
        first = [Tile(None, "Not there yet", "\u00a0", text) for text in notes]
        waiting = [Tile(None, "Not there yet")] * size_of(work)
        each = [Row(f"Seed {seed + 1}", waiting) for seed in range(seeds)] if seeds > 1 else []
        return [*rows, Row(whole, first, note), *below, *each]
    names = [facts.classes[label] for label in pictures.restored]
    right: Sequence[bool | None] = [None] * len(names)
    if own is not None:
        right = [a == b for a, b in zip(pictures.restored, own.labels, strict=True)]
    if hidden:  # a restored label would end the guessing
        names = [f"picture {place + 1}" for place in range(len(names))]
    notes = [""] * len(names)
    if own is not None:
        notes = [markup.beside(value, constant) for value, constant in zip(pictures.psnr, facts.baseline, strict=True)]
    consensus = [
        Tile(uri, f"Reconstruction of {name}", name, text, None if hidden else mark)
        for uri, name, text, mark in zip(pictures.consensus, names, notes, right, strict=True)
    ]
    if pictures.prior:
        painted = [
            Tile(uri, f"Painted by the learned prior: {name}") for uri, name in zip(pictures.prior, names, strict=True)
        ]
        rows.append(Row("Learned prior", painted, PAINTED))
    rows += [Row(whole, consensus, note), *below]
    for seed, uris in enumerate(pictures.seeds if seeds > 1 else ()):
        tiles = [Tile(uri, f"Seed {seed + 1}: {name}") for uri, name in zip(uris, names, strict=True)]
        rows.append(Row(f"Seed {seed + 1}", tiles))
    return rows


def _held(layer: Layer) -> Row:
    """What a solved layer holds of each picture."""
    tiles = [Tile(uri, f"What {layer.name} holds of picture {place}") for place, uri in enumerate(layer.tiles, 1)]
    note = f"{layer.numbers:,} numbers of each picture, {say.known(layer.errors)}; nine of {layer.shape[0]} channels"
    return Row(layer.name.replace(".", ".\u200b"), tiles, note)  # the name may break behind its dots
