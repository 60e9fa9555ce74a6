"""Guessing what a recorded run has rebuilt: four answers a picture, from blurred to clear, and a score."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import streamlit as st
from PIL import ImageFilter
from torch import Tensor

from gradinv import figures
from gradinv.images import to_image
from gradinv.sources import gallery
from gradinv.web.parts import markup
from gradinv.web.parts.elements import guarded, html
from gradinv.web.parts.markup import Row, Tile

BLURS = (0.16, 0.1, 0.06, 0.03, 0.0)  # as shares of the picture's side, the first one worth most points
ANSWERS, QUESTIONS = 4, 6


@dataclass(frozen=True)
class Game:
    """A game with one run: the places of the pictures that are asked for, which it is at, how clear that is, and the
    points and answers so far."""

    run: str
    places: tuple[int, ...]
    at: int = 0
    level: int = 0
    points: tuple[int, ...] = ()
    answers: tuple[str, ...] = ()

    def clearer(self) -> Game:
        """One level clearer, for a point less."""
        return replace(self, level=min(self.level + 1, len(BLURS) - 1))

    def answered(self, answer: str, right: str) -> Game:
        """On to the next picture; a wrong answer has no points."""
        won = len(BLURS) - self.level if answer == right else 0
        return replace(self, at=self.at + 1, level=0, points=(*self.points, won), answers=(*self.answers, answer))


def choices(run: str, place: int, right: str, names: Sequence[str]) -> list[str]:
    """Four answers, the right one among them, the same ones each time; the others are of the gallery or the run."""
    generator = random.Random(f"{run} {place}")
    others = sorted({name for name in names if name != right})
    found = [right, *generator.sample(others, min(ANSWERS - 1, len(others)))]
    generator.shuffle(found)
    return found


def blurred(pixels: Tensor, level: int) -> str:
    """Pixels (3, S, S) in [0, 1] as a data URI, as clear as the level says."""
    image = to_image(pixels).resize((256, 256))
    return figures.tile(image.filter(ImageFilter.GaussianBlur(BLURS[level] * image.width)), quality=75)


def new(run: str, count: int) -> Game:
    """A game with some of a run's pictures, drawn at random."""
    return Game(run, tuple(random.sample(range(count), min(QUESTIONS, count))))


@st.fragment
@guarded()
def play(run: str, rebuilt: Tensor, originals: Tensor, classes: Sequence[str]) -> None:
    """The game with one run: its rebuilt pictures and their originals (B, 3, S, S) in the same order, and their
    classes."""
    game: Game | None = st.session_state.get("game")
    if game is None or game.run != run:
        st.session_state.game = game = new(run, len(classes))
    if game.at < len(game.places):
        _question(game, rebuilt, classes)
    else:
        _score(game, rebuilt, originals, classes)


def _question(game: Game, rebuilt: Tensor, classes: Sequence[str]) -> None:
    place = game.places[game.at]
    right = classes[place]
    worth = len(BLURS) - game.level
    said = markup.count(sum(game.points), "point")
    html(markup.progress(game.at / len(game.places), f"Picture {game.at + 1} of {len(game.places)}", f"{said} so far"))
    if game.answers:
        before, answer, won = classes[game.places[game.at - 1]], game.answers[-1], game.points[-1]
        told = f"{answer}, {markup.count(won, 'point')}" if won else f"it was {before}, not {answer}"
        st.markdown(f"The last one: :material/{'check' if won else 'close'}: {markup.plain(told)}.")
    picture, asked = st.columns([2, 3], gap="large", vertical_alignment="center")
    blur = "from the gradient" if game.level == len(BLURS) - 1 else "from the gradient, and blurred for this game"
    with picture, st.container(key="guess-picture"):
        tile = Tile(blurred(rebuilt[place], game.level), f"A rebuilt picture, at level {game.level + 1} of clearness")
        html(markup.board([Row("Rebuilt", [tile], blur)]))
    with asked:
        st.markdown(f"**What was the client’s picture?** A right answer is worth {markup.count(worth, 'point')} now.")
        for answer in choices(game.run, place, right, [*classes, *(picture.name for picture in gallery())]):
            given = game.answered(answer, right)
            st.button(answer, key=f"guess-{answer}", width="stretch", on_click=_set, args=(given,))
        st.button(
            "Clearer, for a point less",
            key="guess-clearer",
            icon=":material/blur_off:",
            type="tertiary",
            disabled=game.level == len(BLURS) - 1,
            on_click=_set,
            args=(game.clearer(),),
        )


def _score(game: Game, rebuilt: Tensor, originals: Tensor, classes: Sequence[str]) -> None:
    won, most = sum(game.points), len(BLURS) * len(game.places)
    st.subheader(f"{won} of {most} points", anchor=False)
    places = list(game.places)
    names = [classes[place] for place in places]
    own = zip(figures.tiles(rebuilt[places]), names, game.answers, game.points, strict=True)
    tiles = [
        Tile(uri, f"Rebuilt: {name}", answer, markup.count(points, "point"), answer == name)
        for uri, name, answer, points in own
    ]
    pairs = zip(figures.tiles(originals[places]), names, strict=True)
    kept = [Tile(uri, f"Original: {name}", name) for uri, name in pairs]
    rows = [Row("Rebuilt", tiles, "and your answer"), Row("Originals", kept, "what the client kept")]
    html(markup.board(rows, judged="answered"))
    following = new(game.run, len(classes))
    st.button("Play again", key="guess-again", icon=":material/replay:", on_click=_set, args=(following,))


def _set(game: Game) -> None:
    st.session_state.game = game
