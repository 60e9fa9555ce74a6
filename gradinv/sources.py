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
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import quote, urlsplit

import torch
from PIL import Image
from torch import Tensor

from gradinv.downloads import cache_folder, download
from gradinv.images import MAX_BYTES, SUFFIXES, decode, to_pixels
from gradinv.models import ImageClass, Model, imagenet_classes
from gradinv.paths import ASSETS
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
    for row in _sample_rows():
        wnids = [row["imagenet_wnid"], row["tiny_wnid"]]
        if model is not None:
            wnids = [wnid for wnid in wnids if model.class_index(wnid) is not None]
        if wnids:
            pictures.append(_sample(row, wnids[0]))
    return sorted(pictures, key=lambda picture: picture.title)


def find(pictures: Sequence[Picture], stem: str) -> Picture:
    """The gallery picture with that file stem. Raises GradinvError, with the nearest name, where there is none."""
    by_key = {picture.key: picture for picture in pictures}
    if stem in by_key:
        return by_key[stem]
    if any(Path(row["file"]).stem == stem for row in _sample_rows()):
        raise GradinvError(f"The model does not know the class of the gallery's {stem}; take {_choice(by_key)}.")
    raise GradinvError(f"The gallery has no picture {stem!r}; take {_choice(by_key, stem)}.")


def _choice(keys: Collection[str], like: str = "") -> str:
    near = difflib.get_close_matches(like, keys, n=3)
    return " or ".join(near) if near else "one of " + ", ".join(keys) if keys else "another model"


@cache
def _sample_rows() -> tuple[dict[str, str], ...]:
    return _read_table(SAMPLES / "samples.csv")


def _sample(row: dict[str, str], wnid: str) -> Picture:
    path = SAMPLES / row["file"]
    credit = Credit(
        row["author"],
        row["licence"],
        licence_link(row["licence"]),
        row["source"],
        changes="cropped to a square and scaled to 288 × 288 pixels",
    )
    return Picture(path.stem, wnid, class_name(wnid), path.stem.replace("-", " "), credit, partial(_load_file, path))


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
    return Picture(str(path), wnid, class_name(wnid), path.stem, None, partial(_load_file, path))


def from_upload(data: bytes, name: str, wnid: str | None = None) -> Picture:
    """A visitor's upload, decoded at once: the file itself, with all that it may tell of its owner, is not kept.

    Of very large pictures a smaller version is kept (shorter side 1024 px, more than a network takes). Raises
    GradinvError for what cannot be decoded.
    """
    image, notes = decode(data, name)
    if (least := min(image.size)) > _KEPT_SIDE:
        width, height = (round(side * _KEPT_SIDE / least) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return Picture(name, wnid, class_name(wnid), Path(name).stem, None, partial(_kept, image, tuple(notes)))


def _kept(image: Image.Image, notes: tuple[str, ...]) -> tuple[Image.Image, list[str]]:
    return image, list(notes)


def _load_file(path: Path) -> tuple[Image.Image, list[str]]:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)  # one more than `decode` accepts
    except OSError as error:
        raise GradinvError(f"{path} cannot be read ({error.strerror}); check that it is there.") from error
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
        wnids = [entry.name for entry in _scan(self.root) if _WNID.fullmatch(entry.name) and entry.is_dir()]
        return tuple(sorted((ImageClass(wnid, class_name(wnid)) for wnid in wnids), key=lambda c: (c.name, c.wnid)))

    def search(self, text: str) -> list[ImageClass]:
        """The classes whose name, everyday name or WordNet id contains every word of the text; all for an empty one."""
        return [item for item in self.classes if _matches(text, item.name, everyday(item.wnid), item.wnid)]

    def pictures(self, wnid: str) -> list[Picture]:
        """The pictures of one class, by file name. Raises GradinvError for a class without a folder."""
        if not any(item.wnid == wnid for item in self.classes):
            raise GradinvError(f"{self.root} has no folder for the class {wnid}; take one that it has.")
        folder = self.root / wnid
        entries = _scan(folder)
        if not any(_is_picture(entry) for entry in entries) and any(entry.name == "images" for entry in entries):
            entries = _scan(folder / "images")
        paths = sorted(Path(entry.path) for entry in entries if _is_picture(entry))
        return [
            Picture(
                str(path.relative_to(self.root)), wnid, class_name(wnid), path.stem, None, partial(_load_file, path)
            )
            for path in paths
        ]

    def draw(self, count: int, seed: int, wnids: Collection[str] | None = None) -> tuple[list[Picture], str | None]:
        """As the function `draw`, from the given classes (those of a model) or all; lists only the folders it draws."""
        allowed = [item.wnid for item in self.classes if wnids is None or item.wnid in wnids]
        if not allowed:
            raise GradinvError(
                f"{self.root} has no folder of a class that the network knows (its first is {self.classes[0].wnid}); "
                "take another folder or model."
            )
        return _draw(allowed, self.pictures, count, seed, f"The class folders of {self.root} hold no {_KINDS}")


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise GradinvError(
            f"The folder {folder} cannot be listed ({error.strerror}); check its permissions."
        ) from error


def _is_picture(entry: os.DirEntry[str]) -> bool:
    # By name alone, without a stat of each of perhaps 1300 files; hidden ones are what other systems left behind.
    return entry.name.lower().endswith(SUFFIXES) and not entry.name.startswith(".")


# --- the public ImageNet sample set


class SampleSet:
    """The public set of 1,000 ImageNet pictures, one a class, each fetched when it is first opened.

    A fetched picture is kept in the folder `cache`, by default `imagenet-samples` under GRADINV_CACHE or else under
    this platform's cache folder. It is kept only with the size and the sha256 that the index states, never in part.
    """

    def __init__(
        self, cache: str | Path | None = None, base_url: str | None = None, index: str | Path | None = None
    ) -> None:
        """`index` is a CSV with the columns wnid, file, bytes and sha256; by default the one in the assets.

        Raises GradinvError where the address, of `base_url` or GRADINV_SAMPLES_URL, is not one of the web.
        """
        self.cache = Path(cache).expanduser() if cache else cache_folder("imagenet-samples")
        self.base_url = (base_url or os.environ.get("GRADINV_SAMPLES_URL") or SAMPLES_URL).rstrip("/") + "/"
        if urlsplit(self.base_url).scheme not in ("http", "https"):
            raise GradinvError(
                f"The sample set's address must begin with https:// or http://, not be {self.base_url!r}."
            )
        self._index = Path(index or ASSETS / "imagenet-samples.csv")
        self._fetching = threading.Lock()

    @cached_property
    def pictures(self) -> tuple[Picture, ...]:
        """All of them, in ImageNet's order of classes. Nothing is fetched before one is opened."""
        return tuple(self._picture(row) for row in _read_table(self._index))

    def _picture(self, row: dict[str, str]) -> Picture:
        credit = Credit("unknown", "not stated; shown for study only", source=self.base_url + quote(row["file"]))
        name = class_name(row["wnid"])
        return Picture(row["file"], row["wnid"], name, name, credit, partial(self._load, row))

    def _load(self, row: dict[str, str]) -> tuple[Image.Image, list[str]]:
        return _load_file(self.fetch(row["file"], size=int(row["bytes"]), sha256=row["sha256"]))

    def fetch(self, file: str, *, size: int, sha256: str) -> Path:
        """The path of a file of the set in the cache, fetched if it is not there or damaged.

        Raises GradinvError where the network, the server, the file's contents or the cache folder are at fault.
        """
        import pooch  # slow to import, and needed by nobody who stays offline
        import requests

        # What it has to say otherwise would go between the lines of a progress bar.
        pooch.get_logger().setLevel("WARNING")
        host, instead = urlsplit(self.base_url).netloc, "try again later or take pictures of the gallery"
        url = self.base_url + quote(file)
        fetch = partial(_download, size=size)
        try:
            with self._fetching:
                return Path(pooch.retrieve(url, f"sha256:{sha256}", file, self.cache, downloader=fetch))
        except requests.HTTPError as error:
            raise GradinvError(f"{host} does not give out {file} ({error}); {instead}.") from error
        except requests.RequestException as error:
            raise GradinvError(f"{file} could not be fetched from {host}: no connection; {instead}.") from error
        except OSError as error:
            raise GradinvError(
                f"{file} could not be kept in {self.cache} ({error.strerror}); make room there or set GRADINV_CACHE."
            ) from error
        except ValueError as error:  # pooch's for a wrong sha256, and `_download`'s for a wrong size
            raise GradinvError(f"{file} arrived from {host} with other contents than expected; {instead}.") from error


def _download(url: str, output: str, _: Any, *, size: int) -> None:
    """Pooch's downloader, but one that takes the size that is expected and no other."""
    if (received := download(url, output, size)) != size:
        raise ValueError(f"{url} has only {received} bytes")


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
    return [
        picture
        for picture in pictures
        if _matches(text, picture.name, picture.title, everyday(picture.wnid or ""), picture.wnid or "")
    ]


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


def everyday(wnid: str) -> str:
    """What people call ImageNet's class of a WordNet id in everyday speech, in one or more words; often nothing."""
    return _everyday().get(wnid, "")


@cache
def _everyday() -> dict[str, str]:
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


_Class = TypeVar("_Class")


def _draw(
    classes: Sequence[_Class],
    pictures: Callable[[_Class], Sequence[Picture]],
    count: int,
    seed: int,
    none: str = "There are no pictures",
) -> tuple[list[Picture], str | None]:
    """Round after round one picture of each class, in random order; a class's pictures are asked for when it is due.
    `none` is what is said where there is not even one."""
    if count < 1:
        raise GradinvError(f"At least one picture has to be drawn, not {count}.")
    generator = random.Random(seed)
    left = {item: None for item in generator.sample(classes, len(classes))}
    shuffled: dict[_Class, list[Picture]] = {}
    chosen: list[Picture] = []
    different = 0
    while left and len(chosen) < count:
        for item in list(left):
            if item not in shuffled:
                of_class = pictures(item)
                shuffled[item] = generator.sample(of_class, len(of_class))
                different += bool(of_class)
            if not shuffled[item]:
                del left[item]
                continue
            chosen.append(shuffled[item].pop())
            if len(chosen) == count:
                break
    if not chosen:
        raise GradinvError(f"{none} to draw from; name another source.")
    if len(chosen) < count:
        raise GradinvError(f"There are only {len(chosen)} pictures to draw {count} from; draw fewer.")
    if different < count:
        classes_text = f"{different} class{'es' if different > 1 else ''}"
        return chosen, f"Only {classes_text} could be drawn from for {count} pictures, so classes repeat."
    return chosen, None


def _matches(text: str, *fields: str) -> bool:
    for word in text.casefold().split():
        forms = {word, word.removesuffix("s")} if len(word) > 3 else {word}
        if not any(form in field.casefold() for form in forms for field in fields):
            return False
    return True


def _read_table(path: Path) -> tuple[dict[str, str], ...]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return tuple(csv.DictReader(file))
    except OSError as error:
        raise GradinvError(
            f"The list {path} cannot be read ({error.strerror}); reinstall or set GRADINV_ASSETS."
        ) from error
