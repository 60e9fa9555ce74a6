"""What a run has made so far: the layers that were solved, and the pictures in rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import streamlit as st

from gradinv.cli import say
from gradinv.web.parts import markup, presenting, solved
from gradinv.web.parts.elements import html
from gradinv.web.parts.inversion import Layer, Pictures
from gradinv.web.parts.markup import Row, Tile
from gradinv.web.run.facts import Run

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


def ladder(run: Run) -> None:
    """What is solved before the pixels, where that is asked for. Its place is kept before it is there."""
    if run.work.config.needs_layers:
        with st.container(key="solved"):
            html(solved.ladder(run.solving) if run.solving is not None else "")


def laid_out(run: Run, board: Callable[[], T], side: Callable[[], None]) -> T:
    """Draw the pictures and the numbers: side by side while the batch is small, else the numbers above; → what the
    former gives. On a phone the pictures come first. From the top down, so that nothing moves what is there already."""
    if run.count <= BESIDE:
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


def met(run: Run) -> str | None:
    """What to know of the curves of seeds that meet."""
    return MEETING if run.progress is not None and run.progress.meetings else None


def hide(run: Run) -> bool:
    """The control that hides the originals or, in a presentation, reveals them; → whether they are hidden."""
    if run.work.originals is None:
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


def draw(run: Run, pictures: Pictures | None, hidden: bool, layer: Layer | None = None) -> None:
    """Draw the pictures, None as long as there are none, and what a `layer` holds of each."""
    rows, seeds = rows_of(run, pictures, hidden, layer), run.work.config.seeds
    drawn = len(rows)
    if run.count == 1 and seeds > 1:
        # One picture: its seeds stand side by side instead of in a long column.
        drawn -= seeds
        beside = [replace(row.tiles[0], caption=row.name) for row in rows[drawn:]]
        shown = markup.board(rows[:drawn]) + markup.board([Row("Seeds", beside)])
    else:
        shown = markup.board(rows)
    # Named after what it will hold, for which the style keeps the place.
    with st.container(key=f"board-{run.count}x{min(drawn, 4)}rows"):
        html(shown)


def rows_of(run: Run, pictures: Pictures | None, hidden: bool, layer: Layer | None = None) -> list[Row]:
    """The originals, unless they are `hidden`; what was painted and rebuilt; what a `layer` holds; and each seed."""
    own, facts, config, count = run.work.originals, run.facts, run.work.config, run.count
    seeds = range(1, config.seeds + 1) if config.seeds > 1 else ()
    whole, note = markup.result(config.to_dict())
    rows, notes = [], [""] * count
    if own is not None:
        true = [facts.classes[label] for label in own.labels]
        originals = [
            Tile(None, "Hidden original") if hidden else Tile(uri, f"Original: {name}", name)
            for uri, name in zip(facts.originals, true, strict=True)
        ]
        rows.append(Row("Originals", originals, "what the client kept"))
        note += f"; {markup.BASELINE}"
        psnr = pictures.psnr if pictures is not None else (None,) * count
        notes = [markup.beside(*pair) for pair in zip(psnr, facts.baseline, strict=True)]
    below = [] if layer is None else [_held(layer)]
    if pictures is None:
        # What will stand below the pictures has its place.
        first = [Tile(None, "Not there yet", "\u00a0", text) for text in notes]
        waiting = [Tile(None, "Not there yet")] * count
        return [*rows, Row(whole, first, note), *below, *(Row(f"Seed {seed}", waiting) for seed in seeds)]
    names = [facts.classes[label] for label in pictures.restored]
    right: Sequence[bool | None] = [None] * count
    if hidden:  # a restored label would end the guessing
        names = [f"picture {place}" for place in range(1, count + 1)]
    elif own is not None:
        right = [a == b for a, b in zip(pictures.restored, own.labels, strict=True)]
    consensus = [
        Tile(uri, f"Reconstruction of {name}", name, text, mark)
        for uri, name, text, mark in zip(pictures.consensus, names, notes, right, strict=True)
    ]
    if pictures.prior:
        painted = zip(pictures.prior, names, strict=True)
        rows.append(
            Row("Learned prior", [Tile(uri, f"Painted by the learned prior: {name}") for uri, name in painted], PAINTED)
        )
    rows += [Row(whole, consensus, note), *below]
    for seed, uris in zip(seeds, pictures.seeds, strict=False):
        tiles = [Tile(uri, f"Seed {seed}: {name}") for uri, name in zip(uris, names, strict=True)]
        rows.append(Row(f"Seed {seed}", tiles))
    return rows


def _held(layer: Layer) -> Row:
    """What a solved layer holds of each picture."""
    tiles = [Tile(uri, f"What {layer.name} holds of picture {place}") for place, uri in enumerate(layer.tiles, 1)]
    note = f"{layer.numbers:,} numbers of each picture, {say.known(layer.errors)}; nine of {layer.shape[0]} channels"
    return Row(layer.name.replace(".", ".\u200b"), tiles, note)  # the name may break behind its dots
