"""The animated GIF of a recorded run: what it shows, in which colours, and how large it is."""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from gradinv import animation
from gradinv.animation import gif
from gradinv.config import AttackConfig
from gradinv.models import ImageClass, Model
from gradinv.recording.recorder import Recorder
from gradinv.recording.replay import Recording
from gradinv.recording.stores import MemoryStore
from gradinv.types import GradinvError, Observation, Preprocessing, Snapshot

SIDE = 16


def pictures(count: int, phase: float) -> Tensor:
    """Pixels (count, 3, 16, 16): smooth, and each in colours of its own."""
    ramp = torch.linspace(0, 1, SIDE)
    channels = [
        0.5 + 0.4 * torch.sin(3 * ramp[:, None] + 2 * ramp + phase + index + shift)
        for index in range(count)
        for shift in (0.0, 1.0, 2.0)
    ]
    return torch.stack(channels).unflatten(0, (count, 3))


def made(count: int, steps: int = 4, known: bool = True) -> Recording:
    """A run with a single seed, from noise to the originals, whose pictures come back in the opposite order."""
    originals = pictures(count, 0.0)
    noise = torch.rand(originals.shape, generator=torch.Generator().manual_seed(0))
    labels = tuple(range(count))

    def snapshots() -> Iterator[Snapshot]:
        for step in range(steps + 1):
            share = step / steps
            consensus = (share * originals + (1 - share) * noise).flip(0)
            yield Snapshot(
                step=step,
                steps=steps,
                seeds=consensus[None],
                consensus=consensus,
                terms={},
                distance=(),
                labels=labels[::-1],
                seconds=0.1 * step,
                stepping="one",
                parallel_seeds=1,
            )

    classes = tuple(ImageClass(f"n{index}", f"class {index}") for index in range(20))
    model = Model("toy", nn.Linear(2, 20), "ab" * 32, Preprocessing(SIDE, SIDE), classes, 12.5)
    observation = Observation({}, count, model.preprocessing, model.name, model.sha256)
    recorder = Recorder(
        store := MemoryStore(),
        config=AttackConfig(seeds=1, iterations=steps),
        model=model,
        observation=observation,
        originals=originals if known else None,
        labels=list(labels) if known else None,
    )
    list(recorder.follow(snapshots()))
    return Recording.open(store)


def frames(data: bytes) -> list[np.ndarray]:
    """Each frame as a viewer shows it, (H, W, 3)."""
    with Image.open(io.BytesIO(data)) as opened:
        shown = []
        for place in range(opened.n_frames):  # type: ignore[attr-defined]
            opened.seek(place)
            shown.append(np.asarray(opened.convert("RGB")).astype(int))
    return shown


@pytest.mark.parametrize(("count", "known"), [(1, True), (2, True), (4, True), (8, True), (9, True), (3, False)])
def test_it_is_as_wide_as_a_slide_and_what_stays_keeps_its_colours(count: int, known: bool) -> None:
    recording = made(count, known=known)
    shown = frames(gif(recording))
    assert len(shown) == 5 and all(1280 <= frame.shape[1] < 1800 for frame in shown)
    canvas = animation.Canvas(animation.mosaic(pictures(count, 0.0)).size, known, count, "")
    order = recording.order()
    parts = [(canvas.moving, 4, recording.snapshot(4).consensus[order])]
    if known:
        parts += [(canvas.still, place, recording.originals()) for place in range(5)]
    for part, place, expected in parts:
        assert expected is not None
        grid = animation.mosaic(expected)
        large = np.asarray(grid.resize((grid.width * canvas.factor, grid.height * canvas.factor), 0)).astype(int)
        found = shown[place][part.top :, part.left :][: large.shape[0], : large.shape[1]]
        # Seven levels of 255 are hard to see; a palette that is not fitted is off by some twenty.
        assert np.sqrt(np.square(found - large).mean()) < 7
    # Around the pictures it is white, and the step is another one in each.
    assert all((frame[-1] == 255).all() for frame in shown)
    said = [frame[: animation.LINE, -400:] for frame in shown]
    assert all((one != other).any() for one, other in pairwise(said))


def test_it_takes_some_seconds_and_loops() -> None:
    with Image.open(io.BytesIO(gif(made(2)))) as opened:
        assert opened.format == "GIF" and opened.info["loop"] == 0
        milliseconds = 0
        for place in range(opened.n_frames):  # type: ignore[attr-defined]
            opened.seek(place)
            milliseconds += opened.info["duration"]
    assert 3000 <= milliseconds <= 8000


def test_of_a_long_run_steps_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(animation, "FRAMES", 3)
    assert len(frames(gif(made(2, steps=6)))) == 3


def test_of_many_pictures_fewer_frames_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(animation, "PIXELS", 1.0)
    assert len(frames(gif(made(2, steps=40)))) == animation.FEWEST


def test_of_nothing() -> None:
    whole = made(1).store
    without = MemoryStore({name: whole.read(name) for name in whole.names() if not name.startswith("frames/")})
    with pytest.raises(GradinvError, match="nothing to animate"):
        gif(Recording.open(without))
