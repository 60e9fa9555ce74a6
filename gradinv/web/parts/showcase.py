"""The recorded runs that come with the program, and the one that moves on the first page."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import streamlit as st
from PIL import Image
from torch import Tensor

from gradinv import figures
from gradinv.images import to_grid
from gradinv.paths import ASSETS
from gradinv.recording.replay import Recording
from gradinv.sources import Credit
from gradinv.types import GradinvError
from gradinv.web.parts import markup

FIRST = "four"
PAIRS = {
    "One picture or eight": ("one", "eight"),
    "Layers solved, or gradients matched": ("four", "matching"),
    "Undefended or behind noise": ("four", "noise"),
    "Without or with a learned prior": ("twenty-one", "painted"),
    "With the gradient or without": ("matching", "gradient-off"),
    "BN statistics: exact or none": ("bn-exact", "bn-none"),
    "Eight seeds: averaged or aligned": ("lazy", "registered"),
}

_MOVING = 32  # frames of the first page's animation
_MOVING_SECONDS = 4.0
_MOVING_SIDE = 128  # pixels of a tile


def part(name: str, kind: str) -> str:
    """A file of a component: its html, css or js."""
    return Path(__file__).with_name(f"{name}.{kind}").read_text(encoding="utf-8")


def _component(name: str) -> Any:
    return st.components.v2.component(
        f"gradinv-{name}", html=part(name, "html"), css=part(name, "css"), js=part(name, "js")
    )


player, _strip = _component("player"), _component("strip")


@dataclass(frozen=True, eq=False)
class Bundled:
    """A recorded run that comes with the program: what is told about it, and whose pictures it shows."""

    name: str
    title: str
    story: str
    command: str
    pictures: tuple[tuple[str, Credit], ...]
    recording: Recording
    order: tuple[int, ...]  # for each original its place in the frames

    @property
    def defences(self) -> list[str]:
        """What the client did to its gradient, in the notation of `defenses.parse`."""
        return list(self.recording.run["client"]["defences"])

    @property
    def classes(self) -> tuple[list[str], list[str]]:
        """The true classes and the restored ones, both in the originals' order."""
        labels = self.recording.run["labels"]
        name = self.recording.class_name
        return [name(label) for label in labels["true"]], [name(labels["restored"][place]) for place in self.order]


@cache
def library() -> dict[str, Bundled]:
    """By name all bundled runs, in the order of the page. Raises GradinvError where one is damaged."""
    found: list[tuple[int, Bundled]] = []
    for path in (ASSETS / "runs").glob("*.zip"):
        recording = Recording.open(path)
        try:
            about = json.loads(recording.store.read("about.json"))
            pictures = tuple((item.pop("title"), Credit(**item)) for item in about["pictures"])
            told = about["title"], about["story"], about["command"]
            found.append((about["place"], Bundled(path.stem, *told, pictures, recording, tuple(recording.order()))))
        except (KeyError, TypeError, ValueError) as error:
            raise GradinvError(f"What is told about the run {path.stem} is damaged; record it again.") from error
    return {run.name: run for _, run in sorted(found, key=lambda item: item[0])}


def defended() -> list[tuple[Bundled, Bundled]]:
    """The pairs of an undefended run and one behind a defence, which Replay shows side by side."""
    runs = library()
    pairs = [(runs[one], runs[other]) for one, other in PAIRS.values() if {one, other} <= set(runs)]
    return [(one, other) for one, other in pairs if not one.defences and other.defences]


def _elsewhere() -> None:
    """In the place of a page that is not to be imported here."""


def link(label: str, run: str, beside: str | None = None) -> None:
    """A link to a run on the page Replay, beside another or alone."""
    st.page_link(
        st.Page(_elsewhere, title="Replay", url_path="replay"),  # a page is known by its address
        label=label,
        icon=":material/movie:",
        query_params={"run": run} if beside is None else {"run": run, "beside": beside},
    )


def moving() -> bool:
    """Draw the first page's strips: a recorded run that moves, what it was made from, and what that shows; → whether
    there is such a run.

    Its last picture is there at once; what lets it move comes later, and for those who want nothing to move it waits.
    """
    if FIRST not in library():
        return False
    run = library()[FIRST]
    frames, steps, originals = _frames()
    true, restored = run.classes
    side = run.recording.run["model"]["image_size"]
    names, right = markup.plain(", ".join(true)), sum(a == b for a, b in zip(true, restored, strict=True))
    pictures = zip(true, run.pictures, strict=True)
    credits = "; ".join(f"{markup.plain(name)}: {markup.credit_words(credit)}" for name, (_, credit) in pictures)
    with st.container(key="moving"):
        with st.container(key="moving-strip"):
            strip = f"![The rebuilt pictures: {names}]({frames[-1]})"
            st.markdown(f"{strip}\n\nWhat the server rebuilds from the gradient, {side} px")
            with st.container(key="moving-controls"):
                _strip(
                    data={
                        "frames": list(frames),
                        "steps": list(steps),
                        "total": run.recording.run["iterations"]["total"],
                        "seconds": _MOVING_SECONDS,
                    },
                    key="moving-player",
                )
        st.markdown(f"![The originals: {names}]({originals})\n\nWhat the client kept to itself")
        st.markdown(
            f"One shared gradient of {len(true)} pictures gave away {right} of their {len(true)} classes, and the look "
            f"of each picture.\n\n{credits}."
        )
    return True


def prepare() -> None:
    """Make what the first page shows first, so that no visitor waits for it."""
    if FIRST in library():
        _frames()


@cache
def _frames() -> tuple[tuple[str, ...], tuple[int, ...], str]:
    """The first page's run as data URIs: its frames, from noise on, with their steps, and the originals."""
    run = library()[FIRST]
    steps, order = run.recording.steps, list(run.order)
    count = min(_MOVING, len(steps))
    chosen = [steps[round(index * (len(steps) - 1) / max(1, count - 1))] for index in range(count)]
    size = (_MOVING_SIDE * len(order), _MOVING_SIDE)

    def strip(images: Tensor) -> str:
        return figures.tile(to_grid(images[None]).resize(size, Image.Resampling.BICUBIC), quality=75)

    originals = run.recording.originals()
    if originals is None:
        raise GradinvError(f"The run {run.name} lacks its originals; record it again.")
    frames = tuple(strip(run.recording.snapshot(step).consensus[order]) for step in chosen)
    return frames, tuple(chosen), strip(originals)
