"""What a hostile visitor sends: damaged files, strange addresses, and many at once."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from conftest import PATIENCE, ROOT, encoded
from PIL import Image

import soak
from gradinv.images import FORMATS
from gradinv.sources import from_upload
from gradinv.types import BatchNormStatistics, GradinvError, Observation, Preprocessing

CASES = 500


def files() -> dict[str, bytes]:
    """A picture of the gallery, small, in every format that can be uploaded."""
    with Image.open(ROOT / "assets" / "samples" / "goldfish.jpg") as image:
        small = image.resize((48, 40))
    return {kind: encoded(small, kind) for kind in FORMATS}


def cut(data: bytes, chance: random.Random, _: dict[str, bytes]) -> bytes:
    return data[: chance.randrange(len(data))]


def flip(data: bytes, chance: random.Random, _: dict[str, bytes]) -> bytes:
    """One to sixteen bits, half of the time in the header."""
    changed = bytearray(data)
    reach = min(64, len(data)) if chance.random() < 0.5 else len(data)
    for _ in range(chance.randint(1, 16)):
        changed[chance.randrange(reach)] ^= 1 << chance.randrange(8)
    return bytes(changed)


def wrong_header(data: bytes, chance: random.Random, others: dict[str, bytes]) -> bytes:
    size = chance.randint(2, 40)
    return chance.choice(list(others.values()))[:size] + data[size:]


def overwrite(data: bytes, chance: random.Random, _: dict[str, bytes]) -> bytes:
    """A stretch of zeros, of ones or of noise: sizes and offsets that cannot be."""
    start, length = chance.randrange(len(data)), chance.randint(1, 64)
    filling = chance.choice([bytes(length), b"\xff" * length, chance.randbytes(length)])
    return data[:start] + filling + data[start + length :]


def splice(data: bytes, chance: random.Random, others: dict[str, bytes]) -> bytes:
    other = chance.choice(list(others.values()))
    return data[: chance.randrange(len(data))] + other[chance.randrange(len(other)) :]


MUTATIONS: tuple[Callable[[bytes, random.Random, dict[str, bytes]], bytes], ...] = (
    cut,
    flip,
    wrong_header,
    overwrite,
    splice,
)


def damaged(originals: dict[str, bytes]) -> Iterator[bytes]:
    """All of them in turn with every kind of damage, always the same."""
    chance, kinds = random.Random(0), list(originals)
    for case in range(CASES):
        change = MUTATIONS[case % len(MUTATIONS)]
        yield change(originals[kinds[case // len(MUTATIONS) % len(kinds)]], chance, originals)


def test_of_hundreds_of_damaged_uploads_each_is_a_picture_or_one_sentence() -> None:
    refused = set()
    for case, data in enumerate(damaged(files())):
        try:
            image, notes = from_upload(data, f"case-{case}.png").load()
        except GradinvError as error:
            said = str(error)
            refused.add(case)
            assert f"case-{case}.png" in said and said.endswith(".") and "\n" not in said and "Error" not in said
        else:
            assert image.mode == "RGB" and min(image.size) > 0 and not image.info
            assert all(note.endswith(".") for note in notes)
    # If all passed, or none, nothing would have been tested.
    assert CASES / 4 < len(refused) < CASES


def gradients() -> dict[str, bytes]:
    """Small gradients with everything that such a file may hold."""

    def statistics() -> BatchNormStatistics:
        return BatchNormStatistics({"bn1": torch.randn(4)}, {"bn1": torch.rand(4)})

    values = {"conv1.weight": torch.randn(2, 3), "fc.weight": torch.randn(4, 2), "fc.bias": torch.randn(4)}
    plain = Observation(values, 2, Preprocessing(8, 8), "small", "0" * 64)
    trained = replace(plain, mode="train", bn=statistics(), running=statistics())
    return {"plain": plain.pack(), "trained": trained.pack()}


def test_of_hundreds_of_damaged_gradients_each_is_one_or_one_sentence() -> None:
    refused = set()
    for case, data in enumerate(damaged(gradients())):
        try:
            found = Observation.unpack(data, f"case-{case}")
        except GradinvError as error:
            said = str(error)
            refused.add(case)
            assert f"case-{case}" in said and said.endswith(".") and "\n" not in said and len(said) < 300
        else:
            assert all(isinstance(value, torch.Tensor) for value in found.gradients.values())
    assert CASES / 4 < len(refused) < CASES


@pytest.mark.slow
def test_visitors_who_come_go_and_bring_hostile_addresses_all_at_once_leave_the_server_well(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(soak, "PATIENCE", PATIENCE)
    report = soak.soak(3, 0, PATIENCE, turns=3, iterations=1)
    assert report.troubles == []
    assert report.finished >= 6 and report.hostile == 1 and report.refused == 0
    assert report.waits and report.memory
