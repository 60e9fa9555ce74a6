"""Where pictures come from: gallery, ImageNet folder, sample set from a local server, files, uploads, random draws."""

from __future__ import annotations

import csv
import hashlib
import os
import resource
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Server, encoded
from PIL import Image
from torch import nn

from gradinv import sources
from gradinv.models import ImageClass, Model, imagenet_classes, tiny_classes
from gradinv.sources import ImageFolder, Picture, SampleSet
from gradinv.types import GradinvError, Preprocessing

GOLDFISH, TENCH, LION, UNKNOWN = "n01443537", "n01440764", "n02129165", "n99999999"


def model_of(classes: tuple[ImageClass, ...]) -> Model:
    """A model of which nothing but its classes is asked."""
    return Model("classes", nn.Identity(), "0" * 64, Preprocessing(64, 64), classes, None)


def picture_bytes(colour: str = "red") -> bytes:
    return encoded(Image.new("RGB", (12, 9), colour))


def sentence(call: Callable[[], object]) -> str:
    """The text of the GradinvError that the call raises: one sentence that quotes no Python error."""
    with pytest.raises(GradinvError) as caught:
        call()
    text = str(caught.value)
    assert text.endswith(".") and "\n" not in text and "Errno" not in text and "Traceback" not in text
    return text


# --- gallery


def test_gallery_offers_each_model_the_pictures_whose_class_it_knows():
    large, small = model_of(imagenet_classes()), model_of(tiny_classes())
    assert (len(sources.gallery()), len(sources.gallery(large)), len(sources.gallery(small))) == (48, 48, 23)
    for model in (large, small):
        for picture in sources.gallery(model):
            assert model.class_name(model.class_index(picture.wnid)) == picture.name
    assert sources.gallery(model_of((ImageClass(UNKNOWN, "nothing"),))) == []
    names = [sources.find(sources.gallery(model), "rocket").name for model in (large, small)]
    assert names == ["missile", "projectile"]


def test_gallery_pictures_open_and_carry_their_credit():
    for picture in sources.gallery():
        assert picture.open().size == (288, 288)
        assert picture.credit.author and picture.credit.licence and picture.credit.source
        assert picture.credit.licence_url is not None and "cropped" in picture.credit.changes


def test_licence_link():
    creative = "https://creativecommons.org"
    links = {
        "CC BY-SA 3.0": f"{creative}/licenses/by-sa/3.0/",
        "CC BY 2.5": f"{creative}/licenses/by/2.5/",
        "CC BY-NC-ND 4.0": f"{creative}/licenses/by-nc-nd/4.0/",
        "CC0": f"{creative}/publicdomain/zero/1.0/",
        "public domain": f"{creative}/publicdomain/mark/1.0/",
        "all rights reserved": None,
    }
    assert {licence: sources.licence_link(licence) for licence in links} == links


def test_find_says_what_there_is_instead():
    offered = sources.gallery(model_of(tiny_classes()))
    assert sources.find(offered, "coffee").name == "espresso"
    assert "take goldfish." in sentence(lambda: sources.find(offered, "goldfihs"))
    assert "does not know the class of the gallery's tiger; take" in sentence(lambda: sources.find(offered, "tiger"))


def test_search_needs_every_word_in_name_title_or_wnid():
    pictures = sources.gallery()
    assert {p.key for p in sources.search(pictures, "SHARK white")} == {"great-white-shark"}
    assert {p.key for p in sources.search(pictures, "espresso")} == {"coffee", "cappuccino"}
    assert {p.key for p in sources.search(pictures, "n01443537")} == {"goldfish"}
    assert sources.search(pictures, "  ") == pictures and sources.search(pictures, "shark pizza") == []


def test_known_keeps_the_classes_of_the_model():
    pictures = [sources.from_upload(picture_bytes(), "a.png", wnid) for wnid in (GOLDFISH, TENCH, None)]
    assert [p.wnid for p in sources.known(pictures, model_of(tiny_classes()))] == [GOLDFISH]


# --- random draws


def plain(key: str, wnid: str | None) -> Picture:
    return Picture(key, wnid, "", key, None, lambda: (Image.new("RGB", (1, 1)), []))


def test_draw_takes_distinct_classes_first_and_warns_of_repeats():
    pictures = [plain(f"{wnid}-{i}", wnid) for wnid, many in (("a", 50), ("b", 3), ("c", 1)) for i in range(many)]
    for seed in range(20):
        chosen, warning = sources.draw(pictures, 3, seed)
        assert {p.wnid for p in chosen} == {"a", "b", "c"} and warning is None
        chosen, warning = sources.draw(pictures, 5, seed)
        assert Counter(p.wnid for p in chosen) == {"a": 2, "b": 2, "c": 1}
        assert len({p.key for p in chosen}) == 5
        assert warning == "Only 3 classes could be drawn from for 5 pictures, so classes repeat."


def test_draw_can_take_everything_and_no_more():
    pictures = [plain(f"{i}", "ab"[i % 2]) for i in range(6)]
    chosen, _ = sources.draw(pictures, 6, 0)
    assert {p.key for p in chosen} == {p.key for p in pictures}
    assert "only 6 pictures" in sentence(lambda: sources.draw(pictures, 7, 0))
    assert "no pictures to draw from" in sentence(lambda: sources.draw([], 1, 0))
    assert "At least one" in sentence(lambda: sources.draw(pictures, 0, 0))


def test_draw_follows_its_seed_and_pictures_of_unknown_class_count_as_different():
    pictures = [plain(str(i), None) for i in range(100)]
    draws = [[p.key for p in sources.draw(pictures, 8, seed)[0]] for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    assert sources.draw(pictures, 8, 0)[1] is None


# --- files and uploads


@pytest.mark.parametrize(
    ("name", "wnid"),
    [
        (f"{GOLDFISH}_12.JPEG", GOLDFISH),
        (f"{GOLDFISH}/12.JPEG", GOLDFISH),
        (f"{GOLDFISH}/images/12.JPEG", GOLDFISH),
        (f"{TENCH}/{GOLDFISH}_12.JPEG", GOLDFISH),
        ("n0144/holiday.png", None),
    ],
)
def test_class_of_a_file_from_its_name(tmp_path, name, wnid):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture_bytes())
    picture = sources.from_path(path)
    assert (picture.wnid, picture.name) == (wnid, "goldfish" if wnid else "")
    assert picture.open().size == (12, 9)
    assert sources.from_path(path, LION).name == "lion"


def test_file_that_is_missing_or_vanishes(tmp_path):
    assert "There is no picture file" in sentence(lambda: sources.from_path(tmp_path / "none.png"))
    path = tmp_path / "soon.png"
    path.write_bytes(picture_bytes())
    picture = sources.from_path(path)
    path.unlink()
    assert "soon.png cannot be read" in sentence(picture.open)


def test_file_is_read_only_as_far_as_decoding_accepts(tmp_path):
    path = tmp_path / "huge.png"
    with path.open("wb") as file:
        file.truncate(1 << 35)  # 32 sparse gigabytes, which could not be read at once
    assert "huge.png is larger than 100 MB" in sentence(sources.from_path(path).open)


def test_upload_is_decoded_at_once():
    picture = sources.from_upload(picture_bytes("blue"), "sea.png", GOLDFISH)
    assert (picture.wnid, picture.name, picture.title) == (GOLDFISH, "goldfish", "sea")
    assert picture.open().getpixel((3, 3)) == (0, 0, 255)
    assert "notes.png is not a picture" in sentence(lambda: sources.from_upload(b"hello", "notes.png"))


def test_upload_keeps_its_notes_and_no_more_pixels_than_a_network_takes():
    data = encoded(Image.new("CMYK", (3000, 2048)), "JPEG")
    image, notes = sources.from_upload(data, "print.jpg").load()
    assert image.size == (1500, 1024) and len(notes) == 1 and "CMYK" in notes[0]


# --- a folder in ImageNet layout


@pytest.fixture
def imagenet(tmp_path):
    """Three classes, one of them unknown to ImageNet, one as in Tiny ImageNet, and things that are neither."""
    root = tmp_path / "imagenet"
    for name in (
        *(f"{GOLDFISH}/{file}" for file in ("b.JPEG", "a.jpg", "c.PNG", ".hidden.JPEG", "readme.txt")),
        *(f"{TENCH}/images/{TENCH}_0.JPEG", f"{TENCH}/{TENCH}_boxes.txt", f"{UNKNOWN}/only.jpeg"),
        *("devkit/help.png", f"{LION}.txt"),
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture_bytes())
    return root


@pytest.fixture
def listings(monkeypatch):
    """The names of the folders that were listed, one entry a listing."""
    seen: list[str] = []
    for function in ("scandir", "listdir"):
        real = getattr(os, function)

        def counting(path: Any = ".", *, real: Callable[[Any], Any] = real) -> Any:
            seen.append(Path(path).name)
            return real(path)

        monkeypatch.setattr(os, function, counting)
    return seen


def test_folder_lists_classes_and_pictures_by_name(imagenet):
    folder = ImageFolder(imagenet)
    assert [(c.wnid, c.name) for c in folder.classes] == [
        (GOLDFISH, "goldfish"),
        (UNKNOWN, UNKNOWN),
        (TENCH, "tench"),
    ]
    assert [p.key for p in folder.pictures(GOLDFISH)] == [f"{GOLDFISH}/{name}" for name in ("a.jpg", "b.JPEG", "c.PNG")]
    assert [p.key for p in folder.pictures(TENCH)] == [f"{TENCH}/images/{TENCH}_0.JPEG"]
    assert folder.pictures(UNKNOWN)[0].open().size == (12, 9)
    assert [c.name for c in folder.search("GOLD")] == ["goldfish"]
    assert len(folder.search("")) == 3 and folder.search("zebra") == []
    assert "no folder for the class n02129165" in sentence(lambda: folder.pictures(LION))


def test_folder_of_many_pictures_is_listed_lazily(tmp_path, listings):
    """Opening, naming and searching list the root once; a class is listed when it is asked for or drawn."""
    root = tmp_path / "large"
    wnids = [f"n{index:08d}" for index in range(200)]
    for wnid in wnids:
        (root / wnid).mkdir(parents=True)
        for index in range(3):
            (root / wnid / f"{index}.JPEG").touch()
    listings.clear()
    folder = ImageFolder(root)
    assert len(folder.classes) == 200 and len(folder.search("n0000")) == 200
    assert listings == ["large"]
    assert len(folder.pictures(wnids[7])) == 3
    assert listings == ["large", wnids[7]]
    listings.clear()
    chosen, warning = folder.draw(8, seed=3)
    assert sorted(listings) == sorted(picture.wnid or "" for picture in chosen)
    assert len(set(listings)) == 8 and warning is None


def test_folder_draws_from_the_classes_of_a_model(imagenet):
    (imagenet / LION).mkdir()  # an empty one is skipped
    folder = ImageFolder(imagenet)
    chosen, warning = folder.draw(3, 0, wnids={GOLDFISH})
    assert {p.wnid for p in chosen} == {GOLDFISH} and len({p.key for p in chosen}) == 3
    assert warning == "Only 1 class could be drawn from for 3 pictures, so classes repeat."
    chosen, warning = folder.draw(3, 0)
    assert {p.wnid for p in chosen} == {GOLDFISH, TENCH, UNKNOWN} and warning is None
    assert folder.draw(2, 5) == folder.draw(2, 5)
    assert "only 5 pictures" in sentence(lambda: folder.draw(6, 0))


def test_folders_that_are_none(imagenet, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADINV_IMAGENET", str(imagenet))
    assert len(ImageFolder().classes) == 3
    monkeypatch.delenv("GRADINV_IMAGENET")
    assert "set GRADINV_IMAGENET" in sentence(ImageFolder)
    assert "There is no folder" in sentence(lambda: ImageFolder(tmp_path / "none"))
    assert "holds no class folders" in sentence(lambda: ImageFolder(tmp_path))


# --- the sample set, from a local server


# Noise, so that the file is large enough to be cut; a name with characters that an address has to escape.
NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
TENCH_FILE, TENCH_DATA = f"{TENCH}_jack-o'-lantern.png", encoded(Image.fromarray(NOISE))


@pytest.fixture
def samples(tmp_path, server, monkeypatch):
    """A set of two pictures, of which the server has one, at an address with a folder."""
    monkeypatch.setenv("GRADINV_CACHE", str(tmp_path))
    monkeypatch.setenv("GRADINV_SAMPLES_URL", f"{server.url}/set")
    monkeypatch.setattr(sources, "ASSETS", tmp_path)
    with (tmp_path / "imagenet-samples.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("index", "wnid", "name", "file", "bytes", "sha256"))
        writer.writerow((0, TENCH, "tench", TENCH_FILE, len(TENCH_DATA), hashlib.sha256(TENCH_DATA).hexdigest()))
        writer.writerow((1, GOLDFISH, "goldfish", "missing.JPEG", 10, "0" * 64))
    server.files[f"/set/{TENCH}_jack-o%27-lantern.png"] = TENCH_DATA
    return SampleSet()


def kept(samples: SampleSet) -> list[str]:
    """What lies in the cache folder."""
    return sorted(path.name for path in samples.cache.iterdir()) if samples.cache.is_dir() else []


def test_sample_is_fetched_when_opened_and_only_once(samples, server):
    tench, goldfish = samples.pictures
    assert (tench.wnid, tench.name, goldfish.name) == (TENCH, "tench", "goldfish")
    assert server.asked == [] and kept(samples) == []
    for _ in range(2):
        assert np.array_equal(np.asarray(tench.open()), NOISE)
    assert len(server.asked) == 1 and kept(samples) == [TENCH_FILE]


def test_sample_that_the_server_lacks(samples):
    text = sentence(samples.pictures[1].open)
    assert "missing.JPEG could not be downloaded" in text and "404" in text
    assert kept(samples) == []


@pytest.mark.parametrize(
    "contents", [TENCH_DATA[:-1] + b"!", TENCH_DATA + b"!", TENCH_DATA[:-1]], ids=["same", "more", "less"]
)
def test_sample_with_other_contents_is_not_kept(samples, server, contents):
    server.files = dict.fromkeys(server.files, contents)
    assert "with other contents than published" in sentence(samples.pictures[0].open)
    assert kept(samples) == []


def test_no_more_than_the_expected_size_is_written(samples, server):
    server.files = {path: bytes(30_000_000) for path in server.files}
    written = limited(lambda: sentence(samples.pictures[0].open), len(TENCH_DATA) + (1 << 16))
    assert "with other contents than published" in written and kept(samples) == []


def test_connection_that_breaks_off_leaves_nothing(samples, server):
    server.files = {path: data[: len(data) // 2] for path, data in server.files.items()}
    server.claim = len(TENCH_DATA) - len(TENCH_DATA) // 2
    assert "could not be downloaded from 127.0.0.1" in sentence(samples.pictures[0].open)
    assert kept(samples) == []


def test_no_network(tmp_path, samples, server):
    with Server() as closed:
        samples.base_url = f"{closed.url}/"
    assert "no connection; try again later or take pictures of the gallery" in sentence(samples.pictures[0].open)
    assert kept(samples) == []


def test_damaged_file_in_the_cache_is_fetched_again(samples, server):
    path = samples.cache / TENCH_FILE
    samples.cache.mkdir()
    path.write_bytes(TENCH_DATA[:100])
    samples.pictures[0].open()
    assert path.read_bytes() == TENCH_DATA and len(server.asked) == 1


def limited(call: Callable[[], str], most: int) -> str:
    """Call while no file can grow beyond `most` bytes: the system then refuses to write, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        return call()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk(samples):
    text = limited(lambda: sentence(samples.pictures[0].open), len(TENCH_DATA) // 2)
    assert "could not be kept in" in text and "make room there or set GRADINV_CACHE" in text
    assert kept(samples) == []


def test_cache_that_is_not_a_folder(tmp_path, samples):
    samples.cache = tmp_path / "file"
    samples.cache.touch()
    assert "could not be kept in" in sentence(samples.pictures[0].open)


def test_settings_of_the_sample_set_and_its_bundled_index(tmp_path, monkeypatch):
    samples = SampleSet()
    assert [p.wnid for p in samples.pictures] == [c.wnid for c in imagenet_classes()]
    assert samples.base_url == sources.SAMPLES_URL and len({p.key for p in samples.pictures}) == 1000
    assert len(sources.known(samples.pictures, model_of(tiny_classes()))) == 200
    monkeypatch.setenv("GRADINV_CACHE", str(tmp_path))
    monkeypatch.setenv("GRADINV_SAMPLES_URL", "https://mirror.example/set")
    samples = SampleSet()
    assert (samples.cache, samples.base_url) == (tmp_path / "imagenet-samples", "https://mirror.example/set/")
    monkeypatch.setenv("GRADINV_SAMPLES_URL", "mirror")
    assert "must begin with https://" in sentence(SampleSet)
