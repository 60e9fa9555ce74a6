"""A recorded run as an animated GIF for a slide: the step, the originals where they are known, and the consensus.

A frame of a GIF has 256 colours at most. So each has a palette of its own, fitted to what changes in it, and the
originals, which do not change, are drawn by the first frame alone: the others are transparent there.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from gradinv.images import to_grid
from gradinv.recording.replay import Recording
from gradinv.types import GradinvError

FRAMES, FEWEST = 60, 16
PIXELS = 16e6  # of all frames together, about, from which there are fewer: a GIF has some 4 MB then
SECONDS = 5.0
HELD = 2.0  # seconds that the last frame stays
WIDTH = 1280  # pixels of the whole, at least
COLUMNS = 8
GAP, LINE = 16, 56  # pixels between parts, and of a line of words
_TRANSPARENT = 255
_GREYS = 16  # of the words, black first; the paper is the last one
_FITTED = _TRANSPARENT - _GREYS  # colours of a palette that are fitted to the pictures
_FIRST_MOVING = 48  # of them in the first frame, whose consensus is noise: the originals have the others

Indices = NDArray[np.uint8]


@dataclass(frozen=True)
class Part:
    """A group of pictures in the animation: its name, and where it stands, in pixels."""

    name: str
    left: int
    top: int


def gif(recording: Recording) -> bytes:
    """The consensus over the steps, below or beside the originals, as a GIF of a few seconds that loops.

    Pictures are in the order of `images/`, at most 8 in a row, enlarged by a whole factor without smoothing until the
    whole is at least 1280 pixels wide. Of a long run some steps are left out; the last one is held. Raises GradinvError
    where nothing was recorded.
    """
    if not recording.steps:
        raise GradinvError(f"{recording.store} holds no frame yet, so there is nothing to animate.")
    order, originals = recording.order(), recording.originals()
    still = None if originals is None else mosaic(originals)
    last = mosaic(recording.snapshot(recording.steps[-1]).consensus[order])
    several = recording.run["config"]["seeds"] > 1
    canvas = Canvas(last.size, still is not None, len(order), "Mean of the seeds" if several else "Rebuilt")
    enough = max(FEWEST, int(PIXELS / (last.width * last.height * canvas.factor**2)))
    count = min(FRAMES, enough, len(recording.steps))
    spread = (len(recording.steps) - 1) / max(1, count - 1)
    steps = [recording.steps[round(index * spread)] for index in range(count)]
    drawn = [mosaic(recording.snapshot(step).consensus[order]) for step in steps]
    total = recording.run["iterations"]["total"]
    frames = canvas.frames(still, drawn, [f"Step {step:,} of {total:,}" for step in steps])
    pause = max(40, round(1000 * SECONDS / count))
    packed = io.BytesIO()
    frames[0].save(
        packed,
        format="GIF",
        save_all=True,
        append_images=frames[1:],
        duration=[pause] * (count - 1) + [round(1000 * HELD)],
        loop=0,
        disposal=1,  # each stays below the next one
        optimize=False,
    )
    return packed.getvalue()


def mosaic(images: Tensor) -> Image.Image:
    """Pixels (B, 3, S, S) → rows of at most 8 tiles; missing tiles are white."""
    columns = min(COLUMNS, len(images))
    rows = math.ceil(len(images) / columns)
    tiles = torch.ones(rows * columns, *images.shape[1:])
    tiles[: len(images)] = images
    return to_grid(tiles.unflatten(0, (rows, columns)))


class Canvas:
    """Where everything stands. Of one or two pictures the originals are on the left, of more above."""

    def __init__(self, grid: tuple[int, int], still: bool, batch_size: int, name: str) -> None:
        width, height = grid
        beside = still and width <= 2 * height
        across = 2 if beside else 1
        self.factor = math.ceil((WIDTH - (across + 1) * GAP) / (across * width))
        width, height = width * self.factor, height * self.factor
        first, second = (GAP, LINE), (GAP, LINE)
        if still:
            second = (2 * GAP + width, LINE) if beside else (GAP, 2 * LINE + height)
        self.still, self.moving = Part("Original" if batch_size == 1 else "Originals", *first), Part(name, *second)
        self.size = across * (width + GAP) + GAP, second[1] + height + GAP
        self._font = ImageFont.load_default(32)

    def frames(self, still: Image.Image | None, drawn: list[Image.Image], said: list[str]) -> list[Image.Image]:
        """The frames, each with its palette. All but the first are transparent where nothing changes."""
        frames = []
        for place, (grid, words) in enumerate(zip(drawn, said, strict=True)):
            indices = np.full(self.size[::-1], _TRANSPARENT if place else _TRANSPARENT - 1, np.uint8)
            palette: list[int] = []
            if place == 0:
                self._words(indices, self.moving.name, self.moving.left, self.moving.top - LINE)
            if still is not None and place == 0:
                self._words(indices, self.still.name, self.still.left, self.still.top - LINE)
                palette = self._paste(indices, still, self.still, palette, _FITTED - _FIRST_MOVING, True)
            colours = _FITTED if place or still is None else _FIRST_MOVING
            palette = self._paste(indices, grid, self.moving, palette, colours, place == len(drawn) - 1)
            palette += [0] * (3 * _FITTED - len(palette))
            palette += [round(255 * grey / (_GREYS - 1)) for grey in range(_GREYS) for _ in range(3)]
            # On its own ground, which covers the step before.
            self._words(indices, words, self.size[0] - GAP - 480, 0, 480)
            frame = Image.fromarray(indices, "P")
            frame.putpalette([*palette, 255, 255, 255])
            frame.info["transparency"] = _TRANSPARENT
            frames.append(frame)
        return frames

    def _paste(
        self, indices: Indices, grid: Image.Image, part: Part, palette: list[int], colours: int, stays: bool
    ) -> list[int]:
        """Draw a grid in so many colours of its own; → the palette with them."""
        # Dithering would cost several times the bytes, and invent a pattern that is not in the pictures. Instead, what
        # stays in sight has each colour moved to the mean of what it stands for, which takes five times as long.
        reduced = grid.quantize(colours, Image.Quantize.MEDIANCUT, kmeans=int(stays), dither=Image.Dither.NONE)
        large = np.asarray(reduced).repeat(self.factor, 0).repeat(self.factor, 1) + len(palette) // 3
        indices[part.top : part.top + large.shape[0], part.left : part.left + large.shape[1]] = large
        return [*palette, *(reduced.getpalette() or [])[: 3 * colours]]

    def _words(self, indices: Indices, text: str, left: int, top: int, width: int | None = None) -> None:
        """Black on white; to the right of so many pixels where a `width` is given."""
        length = math.ceil(self._font.getlength(text))
        field = Image.new("L", (width or length, LINE), 255)
        begin = 0 if width is None else width - length
        ImageDraw.Draw(field).text((begin, LINE / 2), text, fill=0, font=self._font, anchor="lm")
        levels = np.asarray(field).astype(np.uint16) * (_GREYS - 1) // 255
        indices[top : top + LINE, left : left + field.width] = (levels + _FITTED).astype(np.uint8)
