"""The page Replay: recorded runs, played in the browser."""

from __future__ import annotations

import io
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from functools import cache, lru_cache
from html import escape
from typing import Any

import streamlit as st
from PIL import Image

from gradinv import figures, metrics
from gradinv.images import to_grid
from gradinv.types import GradinvError
from gradinv.web.parts import guess, markup, presenting, shared, solved, tour
from gradinv.web.parts.elements import guarded, lead
from gradinv.web.parts.showcase import PAIRS, Bundled, library, player
from gradinv.web.parts.solved import MISFIT


@lru_cache(maxsize=8)
def packed(*names: str) -> bytes:
    """What the player takes (player.js says how) to show these runs side by side."""
    runs, pictures = [], []
    for run in (library()[name] for name in names):
        facts, blobs = _facts(run)
        runs.append(facts)
        pictures += blobs
    header = json.dumps({"name": " ".join(names), "runs": runs}).encode()
    return b"".join([len(header).to_bytes(4, "little"), header, *pictures])


def _facts(run: Bundled) -> tuple[dict[str, Any], list[bytes]]:
    """One run's part of the header, and its pictures: frames, then originals."""
    recording, (true, restored) = run.recording, run.classes
    config = recording.run["config"]
    seeds = config["seeds"]
    rows: dict[tuple[int, int], dict[str, Any]] = {(row["step"], row["seed"]): row for row in recording.curves}
    own = [[rows[step, seed]["psnr"] for step in recording.steps] for seed in range(seeds)] if seeds > 1 else []
    frames = [recording.frame(step) for step in recording.steps]
    originals = [recording.store.read(f"images/original_{place:02d}.png") for place in range(len(true))]
    with Image.open(io.BytesIO(frames[0])) as frame:
        side = frame.width // len(true)
    facts = {
        "title": run.title,
        "story": f"{run.story} Pictures of {side} px.",
        "total": recording.run["iterations"]["total"],
        "batch": len(true),
        "seeds": seeds,
        "result": markup.result(config),
        "side": side,
        "order": run.order,
        "titles": [title for title, _ in run.pictures],
        "classes": true,
        "restored": restored,
        "steps": recording.steps,
        "meetings": recording.run.get("meetings", []),  # earlier versions did not record them
        "psnr": [*own, [rows[step, 0]["consensus_psnr"] for step in recording.steps]],
        **_misfit(run),
        "baseline": metrics.mean(recording.run["metrics"]["baseline"]["psnr"]),
        "frames": [[len(data), f"image/{'webp' if data[8:12] == b'WEBP' else 'png'}"] for data in frames],
        "originals": [len(data) for data in originals],
    }
    return facts, [*frames, *originals]


def _misfit(run: Bundled) -> dict[str, Any]:
    """By step what the attack itself has to go by, and what that is called; None where it has nothing."""
    found: dict[str, list[float | None]] = {}
    for column in MISFIT:
        seeds: dict[int, list[float | None]] = defaultdict(list)
        for row in run.recording.curves:
            seeds[row["step"]].append(row.get(column))
        means = [metrics.mean(seeds[step]) for step in run.recording.steps]
        # Earlier versions recorded nan where no gradient was matched.
        found[column] = [value if value is not None and math.isfinite(value) else None for value in means]
    column = next((column for column, own in found.items() if any(value is not None for value in own)), "distance")
    return {"distance": found[column], "measured": MISFIT[column][0]}


@guarded()
def page() -> None:
    """Everything on the page."""
    runs = library()
    presented = presenting.on() and not tour.on()  # a tour is presented with its words
    with st.container(key="scripts"):
        presenting.scripts()
    if presented and runs:
        _play(_asked("run") or next(iter(runs)), _asked("beside"))
        with st.container(horizontal=True, horizontal_alignment="right"):
            presenting.way_out()
        return
    lead(
        "Recorded runs",
        "What attacks rebuilt from shared gradients, step by step. Watch them, or guess what the pictures are "
        "before you see the originals.",
    )
    if not runs:
        raise GradinvError("No recorded run is installed; record some with: python assets/runs/record.py.")
    with st.container(horizontal=True, horizontal_alignment="distribute", key="replay-head"):
        mode = shared.choose("Recorded runs", ("watch", "guess"), "watch", "mode", label_visibility="collapsed")
        if mode == "watch" and not tour.on():
            presenting.way_in()
    if mode == "guess":
        _guess()
        return
    run, beside = _asked("run") or next(iter(runs)), _asked("beside")
    if not st.query_params.get("step", "0").isdecimal():
        st.warning("The step in the address is not a whole number; the run plays from its start.")
    _choice(run, None if beside == run else beside)
    _about(_play(run, beside))


def _play(run: str, beside: str | None) -> list[str]:
    """The player of a run, and of another one beside it; → both names."""
    shown = list(dict.fromkeys(filter(None, (run, beside))))
    with st.container(key="player"):
        player(data=packed(*shown), key="replay-player")
    return shown


def _about(names: Sequence[str]) -> None:
    """How runs were recorded, and whose pictures they show."""
    runs = library()
    with st.expander("How this was recorded, and whose pictures these are"):
        st.html("".join(_made(runs[name]) for name in names))
        pictures = dict(picture for name in names for picture in runs[name].pictures)
        st.html(f"<p>Pictures:</p>{markup.credits(pictures.items())}")


def _guess() -> None:
    """The game. Where no run is asked for, it is one with many pictures, most of which the first page does not show."""
    runs = {name: run for name, run in library().items() if len(run.pictures) > 1}
    asked = _asked("run")
    first = asked if asked in runs else max(runs, key=lambda name: len(runs[name].pictures))
    name = st.selectbox(
        "Which run", list(runs), list(runs).index(first), format_func=lambda name: runs[name].title, key="guess-run"
    )
    recording = runs[name].recording
    originals = recording.originals()
    if originals is None:
        raise GradinvError(f"The run {name} lacks its originals; record it again.")
    rebuilt = recording.snapshot(recording.steps[-1]).consensus[list(runs[name].order)]
    guess.play(name, rebuilt, originals, runs[name].classes[0])
    _about([name])


def _asked(parameter: str) -> str | None:
    """The run that the address names; says so where there is none of that name."""
    name = st.query_params.get(parameter)
    if name is not None and name not in library():
        st.warning(f"The address names a recorded run that is not there; it can name {', '.join(library())}.")
        return None
    return name


def _choice(run: str, beside: str | None) -> None:
    """Cards, pairs and a list. The address alone keeps what is chosen."""
    runs = library()
    st.session_state["replay-run"] = run
    st.session_state["replay-pair"] = next((title for title, pair in PAIRS.items() if pair == (run, beside)), None)
    st.session_state["replay-beside"] = beside

    def show(run: str, beside: str | None) -> None:
        st.query_params["run"] = run
        for name in ("beside", "step"):
            st.query_params.pop(name, None)
        if beside is not None:
            st.query_params["beside"] = beside

    with st.container(key="thumbnails-runs"):
        st.pills(
            "Recorded run",
            list(runs),
            format_func=lambda name: f"![]({_card(name)}) {runs[name].title}",
            key="replay-run",
            on_change=lambda: show(st.session_state["replay-run"] or run, None),
            width="stretch",
        )
    left, right = st.columns([3, 1], vertical_alignment="bottom")
    if pairs := [title for title, pair in PAIRS.items() if set(pair) <= set(runs)]:
        left.pills(
            "Side by side",
            pairs,
            key="replay-pair",
            wrap=True,
            on_change=lambda: show(*PAIRS.get(st.session_state["replay-pair"], (run, None))),
        )
    right.selectbox(
        "Beside it",
        [name for name in runs if name != run],
        format_func=lambda name: runs[name].title,
        key="replay-beside",
        on_change=lambda: show(run, st.session_state["replay-beside"]),
        index=None,
        placeholder="nothing",
    )


@cache
def _card(name: str) -> str:
    """A small picture of where a run ended: up to four of its reconstructions."""
    run = library()[name]
    images = run.recording.snapshot(run.recording.steps[-1]).consensus[list(run.order)]
    rows = 2 if len(images) >= 4 else 1
    return figures.tile(to_grid(images[: rows * rows].unflatten(0, (rows, rows))), quality=70)


def _made(run: Bundled) -> str:
    facts = run.recording.run
    below = solved.recorded(facts)
    return (
        f"<p><b>{escape(run.title)}</b>: <code>{escape(run.command)}</code>, {facts['model']['name']}, "
        f"{markup.count(facts['iterations']['done'], 'iteration')} in {markup.duration(facts['seconds'])} on "
        f"{escape(facts['environment']['device'])}.</p>{solved.ladder(below) if below is not None else ''}"
    )
