"""Where pictures come from: the bundled gallery, a folder in ImageNet layout, the public sample set, files, uploads.

Every source gives `Picture`s, which know their class and their credit and decode themselves when they are opened.
"""

from __future__ import annotations

import csv
import difflib
import json
import os
import random
import re
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Protocol
from urllib.parse import quote

import torch
from PIL import Image
from torch import Tensor

from gradinv.downloads import address, cache_folder, fetch
from gradinv.images import MAX_BYTES, SUFFIXES, decode, to_pixels
from gradinv.models import ImageClass, Model, imagenet_classes
from gradinv.paths import ASSETS, reason
from gradinv.types import GradinvError, Preprocessing

SAMPLES_URL = "https://raw.githubusercontent.com/EliSchwartz/imagenet-sample-images/master/"
"""Where the public ImageNet sample set is published; GRADINV_SAMPLES_URL names another place."""

_KINDS = f"picture ({', '.join(SUFFIXES)})"
_WNID = re.compile(r"n\d{8}")
# Networks take at most 1024 px, so nothing is gained by keeping a visitor's picture larger than that.
_KEPT_SIDE = 1024


@dataclass(frozen=True)
class Credit:
    """Who made a picture, what may be done with it (and where that is written), where it is from, what was changed."""

    author: str
    licence: str
    licence_url: str | None = None
    source: str | None = None
    changes: str = ""


@dataclass(frozen=True)
class Picture:
    """A picture of some source. `key` tells it from the others there; `name` is its class's, empty where unknown.

    `load` reads and decodes it: → (8-bit RGB image, notes as of `images.decode`). It raises GradinvError.
    """

    key: str
    wnid: str | None
    name: str
    title: str
    credit: Credit | None
    load: Callable[[], tuple[Image.Image, list[str]]] = field(repr=False, compare=False)

    def open(self) -> Image.Image:
        """The picture as an 8-bit RGB image. Raises GradinvError where it cannot be had or decoded."""
        return self.load()[0]


# --- the bundled gallery

SAMPLES = ASSETS / "samples"
"""The folder of the bundled photographs."""


def gallery(model: Model | None = None) -> list[Picture]:
    """The bundled photographs whose class the model knows, sorted by title; all 48 where no model is given.

    Where a model lacks ImageNet's own class of a picture but has the nearest one that samples.csv names, that is it.
    """
    pictures = []
    for row in _read_table(SAMPLES / "samples.csv"):
        wnids = [row["imagenet_wnid"], row["tiny_wnid"]]
        known = [wnid for wnid in wnids if model is None or model.class_index(wnid) is not None]
        if known:
            licence = row["licence"]
            changes = "cropped to a square and scaled to 288 × 288 pixels"
            credit = Credit(row["author"], licence, licence_link(licence), row["source"], changes)
            path = SAMPLES / row["file"]
            pictures.append(_of_file(path, path.stem, known[0], path.stem.replace("-", " "), credit))
    return sorted(pictures, key=lambda picture: picture.title)


def find(pictures: Sequence[Picture], stem: str) -> Picture:
    """The gallery picture with that file stem. Raises GradinvError, with the nearest name, where there is none."""
    by_key = {picture.key: picture for picture in pictures}
    if stem in by_key:
        return by_key[stem]
    if any(Path(row["file"]).stem == stem for row in _read_table(SAMPLES / "samples.csv")):
        raise GradinvError(f"The model does not know the class of the gallery's {stem}; take {_choice(by_key)}.")
    raise GradinvError(f"The gallery has no picture {stem!r}; take {_choice(by_key, stem)}.")


def _choice(keys: Collection[str], like: str = "") -> str:
    near = difflib.get_close_matches(like, keys, n=3)
    return " or ".join(near) if near else "one of " + ", ".join(keys) if keys else "another model"


def licence_link(licence: str) -> str | None:
    """Where a licence is written: for `CC BY-SA 3.0` and its kin, `CC0` and `public domain`; else None."""
    site = "https://creativecommons.org"
    if match := re.fullmatch(r"CC (BY(?:-[A-Z]{2})*) (\d\.\d)", licence):
        return f"{site}/licenses/{match[1].lower()}/{match[2]}/"
    return {"CC0": f"{site}/publicdomain/zero/1.0/", "public domain": f"{site}/publicdomain/mark/1.0/"}.get(licence)


# --- files and uploads


def from_path(path: str | Path, wnid: str | None = None) -> Picture:
    """A picture file of the user's. Raises GradinvError where it is not there.

    Without a `wnid` it is taken from the file's name or folder where that is as ImageNet does it
    (`n01443537_12.JPEG`, `n01443537/12.JPEG`), else it is None and the model has to choose the class.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise GradinvError(f"There is no picture file {path}; check the name.")
    if wnid is None:
        names = (path.name.split("_")[0], path.parent.name, path.parent.parent.name)
        wnid = next((name for name in names if _WNID.fullmatch(name)), None)
    return _of_file(path, str(path), wnid, path.stem)


def from_upload(data: bytes, name: str, wnid: str | None = None) -> Picture:
    """A visitor's upload, decoded at once: the file itself, with all that it may tell of its owner, is not kept.

    Of very large pictures a smaller version is kept (shorter side 1024 px, more than a network takes). Raises
    GradinvError for what cannot be decoded.
    """
    image, notes = decode(data, name)
    if (least := min(image.size)) > _KEPT_SIDE:
        width, height = (round(side * _KEPT_SIDE / least) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return Picture(name, wnid, class_name(wnid), Path(name).stem, None, lambda: (image, notes))


def _of_file(path: Path, key: str, wnid: str | None, title: str, credit: Credit | None = None) -> Picture:
    return Picture(key, wnid, class_name(wnid), title, credit, partial(_load_file, path))


def _load_file(path: Path) -> tuple[Image.Image, list[str]]:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)  # one more than `decode` accepts
    except OSError as error:
        raise GradinvError(f"{path} cannot be read ({reason(error)}); check that it is there.") from error
    return decode(data, path.name)


# --- a folder in ImageNet layout


class ImageFolder:
    """Pictures in ImageNet layout: `<wnid>/*.JPEG`, or `<wnid>/images/*.JPEG` as in Tiny ImageNet.

    A folder of 50,000 pictures costs nothing until it is looked at: opening it lists the class folders, and only the
    classes that are asked for are listed themselves.
    """

    def __init__(self, root: str | Path | None = None) -> None:
        """`root` defaults to GRADINV_IMAGENET. Raises GradinvError where there is no such folder or no class in it."""
        chosen = root or os.environ.get("GRADINV_IMAGENET")
        if not chosen:
            raise GradinvError("No ImageNet folder was given; set GRADINV_IMAGENET to one and start again.")
        self.root = Path(chosen).expanduser()
        if not self.root.is_dir():
            raise GradinvError(f"There is no folder {self.root}; name the one that holds the class folders.")
        if not self.classes:
            raise GradinvError(
                f"{self.root} holds no class folders such as n01443537; name the folder that does, often train or val."
            )

    @cached_property
    def classes(self) -> tuple[ImageClass, ...]:
        """The classes that have a folder, by name; a WordNet id that ImageNet's 1000 classes lack stands for itself."""
        wnids = [entry.name for entry in _listed(self.root) if _WNID.fullmatch(entry.name) and entry.is_dir()]
        return tuple(sorted((ImageClass(wnid, class_name(wnid)) for wnid in wnids), key=lambda c: (c.name, c.wnid)))

    def search(self, text: str) -> list[ImageClass]:
        """The classes whose name, everyday name or WordNet id contains every word of the text; all for an empty one."""
        return [item for item in self.classes if _matches(text, item.wnid, item.name)]

    def pictures(self, wnid: str) -> list[Picture]:
        """The pictures of one class, by file name. Raises GradinvError for a class without a folder."""
        if not any(item.wnid == wnid for item in self.classes):
            raise GradinvError(f"{self.root} has no folder for the class {wnid}; take one that it has.")
        folder = self.root / wnid
        entries = _listed(folder)
        if not any(_is_picture(entry) for entry in entries) and any(entry.name == "images" for entry in entries):
            entries = _listed(folder / "images")
        paths = sorted(Path(entry.path) for entry in entries if _is_picture(entry))
        return [_of_file(path, str(path.relative_to(self.root)), wnid, path.stem) for path in paths]

    def draw(self, count: int, seed: int, wnids: Collection[str] | None = None) -> tuple[list[Picture], str | None]:
        """As the function `draw`, from the given classes (those of a model) or all; lists only the folders it draws."""
        allowed = [item.wnid for item in self.classes if wnids is None or item.wnid in wnids]
        if not allowed:
            raise GradinvError(
                f"{self.root} has no folder of a class that the network knows (its first is {self.classes[0].wnid}); "
                "take another folder or model."
            )
        return _draw(allowed, self.pictures, count, seed, f"The class folders of {self.root} hold no {_KINDS}")


def _listed(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise unlisted(folder, error) from error


def unlisted(folder: object, error: OSError) -> GradinvError:
    """What is said of a folder that cannot be looked into."""
    return GradinvError(f"The folder {folder} cannot be listed ({reason(error)}); check its permissions.")


def _is_picture(entry: os.DirEntry[str]) -> bool:
    # By name alone, without a stat of each of perhaps 1300 files; hidden ones are what other systems left behind.
    return entry.name.lower().endswith(SUFFIXES) and not entry.name.startswith(".")


# --- the public ImageNet sample set


class SampleSet:
    """The public set of 1,000 ImageNet pictures, one a class, each fetched when it is first opened.

    A fetched picture is kept in the folder `imagenet-samples` under GRADINV_CACHE or else under this platform's cache
    folder: only as the index in the assets states it, never in part. Raises GradinvError where GRADINV_SAMPLES_URL is
    no address of the web.
    """

    def __init__(self) -> None:
        self.cache = cache_folder("imagenet-samples")
        self.base_url = address("GRADINV_SAMPLES_URL", SAMPLES_URL).rstrip("/") + "/"
        self._fetching = threading.Lock()

    @cached_property
    def pictures(self) -> tuple[Picture, ...]:
        """All of them, in ImageNet's order of classes. Nothing is fetched before one is opened."""
        return tuple(self._picture(row) for row in _read_table(ASSETS / "imagenet-samples.csv"))

    def _picture(self, row: dict[str, str]) -> Picture:
        credit = Credit("unknown", "not stated; shown for study only", source=self.base_url + quote(row["file"]))
        name = class_name(row["wnid"])
        return Picture(row["file"], row["wnid"], name, name, credit, partial(self._load, row))

    def _load(self, row: dict[str, str]) -> tuple[Image.Image, list[str]]:
        name, url = row["file"], self.base_url + quote(row["file"])
        instead = "try again later or take pictures of the gallery"
        with self._fetching:
            digest = ("sha256", row["sha256"])
            path = fetch(url, self.cache / name, digest, int(row["bytes"]), what=name, instead=instead)
        return _load_file(path)


# --- over all sources


def known(pictures: Iterable[Picture], model: Model) -> list[Picture]:
    """Those whose class the model knows."""
    return [picture for picture in pictures if picture.wnid and model.class_index(picture.wnid) is not None]


class _Opened(Protocol):
    def open(self) -> Image.Image: ...


def pixels_of(pictures: Iterable[_Opened], preprocessing: Preprocessing) -> Tensor:
    """The pictures' pixels (B, 3, S, S) in [0, 1], of the side that the preprocessing makes.

    Raises GradinvError for one that cannot be decoded.
    """
    return torch.stack([to_pixels(picture.open(), preprocessing) for picture in pictures])


def search(pictures: Iterable[Picture], text: str) -> list[Picture]:
    """Those whose class name, title, everyday name or WordNet id contains every word of the text; all for an empty one.

    A word may be a plural.
    """
    return [picture for picture in pictures if _matches(text, picture.wnid or "", picture.name, picture.title)]


def draw(pictures: Sequence[Picture], count: int, seed: int) -> tuple[list[Picture], str | None]:
    """`count` different pictures at random, of different classes while there are any: → (pictures, warning or None).

    The warning is a sentence for the user where classes repeat. The same seed draws the same pictures from the same
    source. Raises GradinvError where there are fewer pictures than that.
    """
    classes: dict[str, list[Picture]] = {}
    for picture in pictures:
        classes.setdefault(picture.wnid or picture.key, []).append(picture)
    return _draw(list(classes), classes.__getitem__, count, seed)


def class_name(wnid: str | None) -> str:
    """ImageNet's name of a WordNet id; the id itself where ImageNet's 1000 classes lack it, empty for None."""
    return _names().get(wnid, wnid) if wnid else ""


@cache
def _everyday() -> dict[str, str]:
    """By WordNet id what people call that class of ImageNet's in everyday speech, in one or more words."""
    classes = imagenet_classes()
    words: dict[str, list[str]] = {}
    # By word the first and last of the classes that it names.
    named = json.loads((ASSETS / "everyday-names.json").read_text(encoding="utf-8"))
    for word, ranges in named.items():
        for first, last in ranges:
            for item in classes[first : last + 1]:
                words.setdefault(item.wnid, []).append(word)
    return {wnid: " ".join(found) for wnid, found in words.items()}


@cache
def _names() -> dict[str, str]:
    return {item.wnid: item.name for item in imagenet_classes()}


def _draw(
    classes: Sequence[str],
    pictures: Callable[[str], Sequence[Picture]],
    count: int,
    seed: int,
    none: str = "There are no pictures",
) -> tuple[list[Picture], str | None]:
    """Round after round one picture of each class, in random order; a class's pictures are asked for when it is due.
    `none` is what is said where there is not even one."""
    if count < 1:
        raise GradinvError(f"At least one picture has to be drawn, not {count}.")
    generator = random.Random(seed)
    due = deque(generator.sample(classes, len(classes)))
    shuffled: dict[str, list[Picture]] = {}
    chosen: list[Picture] = []
    while due and len(chosen) < count:
        item = due.popleft()
        if item not in shuffled:
            of_class = pictures(item)
            shuffled[item] = generator.sample(of_class, len(of_class))
        if shuffled[item]:
            chosen.append(shuffled[item].pop())
            due.append(item)
    if not chosen:
        raise GradinvError(f"{none} to draw from; name another source.")
    if len(chosen) < count:
        raise GradinvError(f"There are only {len(chosen)} pictures to draw {count} from; draw fewer.")
    different = len({picture.wnid or picture.key for picture in chosen})
    if different == count:
        return chosen, None
    drawn = f"{different} class{'es' if different > 1 else ''} could be drawn from for {count} pictures"
    return chosen, f"Only {drawn}, so classes repeat."


def _matches(text: str, wnid: str, *names: str) -> bool:
    fields = [field.casefold() for field in (wnid, _everyday().get(wnid, ""), *names)]
    for word in text.casefold().split():
        forms = {word, word.removesuffix("s")} if len(word) > 3 else {word}
        if not any(form in field for form in forms for field in fields):
            return False
    return True


@cache
def _read_table(path: Path) -> tuple[dict[str, str], ...]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return tuple(csv.DictReader(file))
    except OSError as error:
        raise GradinvError(
            f"The list {path} cannot be read ({reason(error)}); reinstall or set GRADINV_ASSETS."
        ) from error
