"""A folder of pictures as candidates: the pooled features of each, and which of them a gradient was computed from.

The features of 50,000 pictures take minutes to hours, so they are kept on disk; a call that was interrupted is
continued by the next one, and a picture that was added or changed is the only one that is looked at again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional as F

from gradinv.downloads import cache_folder
from gradinv.images import SUFFIXES, to_pixels
from gradinv.models import Model
from gradinv.paths import reason, replace_whole
from gradinv.recovery.examination import examine
from gradinv.recovery.final_layer import Fit, recover_features
from gradinv.recovery.labels import RestoredLabels, restore_labels
from gradinv.sources import from_path, unlisted
from gradinv.types import GradinvError, Observation

LIKE_ITSELF = 0.9
"""Where the features are the client's own and its network was in eval mode, a member's similarity is almost 1 and this
much is asked of one. Of the bundled photographs, on both bundled networks, no two come nearer to each other than 0.74;
a mirrored copy of a picture has 0.85 to 0.99, so that more than this is no proof."""

KEPT_EVERY = 5_000  # pictures between two writes of the index, which take seconds: what a killed process loses

_FORMAT = 1
_WORKERS = 4  # threads that read and scale pictures; `images.decode` lets one decode at a time
_AHEAD = 2  # batches decoded before they are needed
_BLOCK = 4_096  # rows of features that are copied or converted at a time

Progress = Callable[[int, int], None]
"""Called with the number of pictures done so far and of all of them."""


@dataclass(frozen=True)
class _File:
    """A file of the folder as it was listed: its name within it, its size in bytes, and its time of change in ns."""

    name: str
    size: int
    time: int


@dataclass(frozen=True, eq=False)
class Gallery:
    """The readable pictures of a folder, by name, and their pooled features (N, D), float32 on the CPU.

    `notes` are sentences for the user on what was left out or could not be kept.
    """

    folder: Path
    paths: tuple[Path, ...]
    features: Tensor
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        model: Model,
        folder: str | Path,
        *,
        batch_size: int = 64,
        cache: str | Path | None = None,
        progress: Progress | None = None,
    ) -> Gallery:
        """All pictures in a folder and the folders in it (so also one in ImageNet layout), as the model sees them.

        The features are kept in `cache`, by default the cache folder `galleries`: of each model, preprocessing and
        folder, for each picture's name, size and time of change. Pictures that cannot be decoded are left out, with a
        note. Raises GradinvError where the folder cannot be listed or holds no readable picture. Ctrl-C keeps what is
        done and raises KeyboardInterrupt with a sentence that says so.
        """
        folder = Path(folder).expanduser()
        files = _files(folder)
        if not files:
            raise GradinvError(f"{folder} holds no pictures ({', '.join(SUFFIXES)}); name a folder that does.")
        index = _Index(_index_path(model, folder, cache), files, model.final_layer.in_features)
        try:
            broken = _complete(index, model, folder, batch_size, progress or (lambda done, total: None))
        except KeyboardInterrupt as stopped:
            done = f"{int(index.done.sum()):,} of {len(files):,} pictures are in the index"
            kept = f"{done}; call again to go on from there." if index.writable else index.notes[-1]
            raise KeyboardInterrupt(f"Interrupted. {kept}") from stopped
        rows = index.done.nonzero().flatten().tolist()
        if not rows:
            raise GradinvError(f"No file in {folder} can be read as a picture; the first: {broken[0]}")
        notes = index.notes
        if broken:
            one = len(broken) == 1
            left = "1 picture was" if one else f"{len(broken):,} pictures were"
            why = f"it cannot be read; {broken[0]}" if one else f"they cannot be read; the first: {broken[0]}"
            notes.append(f"{left} left out of {len(files):,} because {why}")
        features = index.features if len(rows) == len(files) else index.features[rows]
        return cls(folder, tuple(folder / files[row].name for row in rows), features, tuple(notes))

    def index(self, path: str | Path) -> int:
        """The place of a picture, by its path or by its path within the folder. Raises GradinvError where it lacks."""
        for candidate in (Path(path), self.folder / path):
            if candidate in self._places:
                return self._places[candidate]
        raise GradinvError(f"The pictures of {self.folder} do not include {path}; take the folder that holds it.")

    @torch.no_grad()
    def match(self, features: Tensor, top: int) -> tuple[Tensor, Tensor]:
        """The pictures nearest to each of `features` (B, D): → cosine similarities and places, both (B, top).

        The most similar comes first; both are on the CPU. Where there are fewer pictures than `top`, all are given.
        """
        if top < 1:
            raise GradinvError(f"At least one match has to be asked for, not {top}.")
        if features.ndim != 2 or features.shape[1] != self.features.shape[1]:
            raise GradinvError(
                f"Features of {self.features.shape[1]} numbers an image are expected, not {tuple(features.shape)}."
            )
        wanted = features.detach().cpu().float()
        similarity = F.normalize(wanted) @ self.features.T / self._lengths
        best = similarity.topk(min(top, len(self.paths)))
        return best.values, best.indices

    @cached_property
    def _lengths(self) -> Tensor:
        return self.features.norm(dim=1).clamp(min=1e-12)

    @cached_property
    def _places(self) -> dict[Path, int]:
        return {path: place for place, path in enumerate(self.paths)}


@dataclass(frozen=True, eq=False)
class Identified:
    """Of each image of a batch the pictures nearest to it: `similarity` and `places` in the gallery, both (B, top).

    `residual` is the share of the final layer's gradient that the recovered features leave unexplained; where it is
    `explained`, no more than rounding is left, and they are the client's own.
    """

    labels: RestoredLabels
    residual: float
    explained: bool
    similarity: Tensor
    places: Tensor


@dataclass(frozen=True, eq=False)
class Query:
    """What a gradient says of the pictures that it is of: their labels, and the features of each. `notes` as those of
    `Recovered`."""

    labels: RestoredLabels
    recovered: Fit
    notes: tuple[str, ...] = ()

    def among(self, gallery: Gallery, top: int = 5) -> Identified:
        """Rank all pictures of the gallery, of whatever class, by cosine similarity."""
        known = self.recovered
        return Identified(self.labels, known.residual, known.explained, *gallery.match(known.features, top))


def query(model: Model, observation: Observation) -> Query:
    """Restore the labels and solve the final layer's gradient for each image's features.

    Raises GradinvError where labels or features cannot be had.
    """
    examined = examine(model, observation)
    labels = restore_labels(model, examined.observation)
    features = recover_features(model, examined.observation, labels.labels, known=labels.fit)
    return Query(labels, features, (*examined.notes, *labels.notes))


def identify(model: Model, observation: Observation, gallery: Gallery, top: int = 5) -> Identified:
    """Which pictures of the gallery the gradient is of, by their pooled features: nothing is reconstructed."""
    return query(model, observation).among(gallery, top)


@torch.no_grad()
def pooled(model: Model, pixels: Tensor) -> Tensor:
    """What enters the final layer: pixels (B, 3, S, S) in [0, 1] → pooled features (B, D), float32 on the CPU."""
    inputs: list[Tensor] = []
    handle = model.final_layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    try:
        model.network.eval()(model.preprocessing.normalise(pixels.to(model.device)))
    finally:
        handle.remove()
    return inputs[0].float().cpu()


def iip(model: Model, images: Tensor, own: Sequence[int], gallery: Gallery) -> Tensor:
    """Whether each reconstruction identifies its original among all pictures of the gallery: (B,) bool (Fig. 8).

    images: pixels (B, 3, S, S) of the model's size; own: the originals' places in the gallery (`Gallery.index`). By the
    cosine similarity of pooled features; an image that is not finite identifies nothing. The mean is the image
    identification precision. Raises GradinvError where places are missing or not in the gallery.
    """
    if len(own) != len(images) or not all(0 <= place < len(gallery.paths) for place in own):
        raise GradinvError(
            f"{len(images)} images need as many places of originals among the gallery's {len(gallery.paths)} pictures."
        )
    similarity, places = gallery.match(pooled(model, images), 1)
    return similarity[:, 0].isfinite() & (places[:, 0] == torch.tensor(own))


# --- the folder


def _files(folder: Path) -> list[_File]:
    """The pictures in a folder and the folders in it, by name. Hidden ones are left out, links are followed."""
    if not folder.is_dir():
        raise GradinvError(f"There is no folder {folder}; name one that holds pictures.")
    files: list[_File] = []
    seen: set[tuple[int, int]] = set()

    def refuse(error: OSError) -> None:
        raise error

    try:
        for current, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
            status = os.stat(current)
            known = (status.st_dev, status.st_ino) in seen  # a link that leads back
            seen.add((status.st_dev, status.st_ino))
            folders[:] = [] if known else [name for name in folders if not name.startswith(".")]
            for name in () if known else names:
                path = Path(current, name)
                if name.lower().endswith(SUFFIXES) and not name.startswith(".") and path.is_file():
                    status = path.stat()
                    files.append(_File(path.relative_to(folder).as_posix(), status.st_size, status.st_mtime_ns))
    except OSError as error:
        raise unlisted(error.filename, error) from error
    return sorted(files, key=lambda file: file.name)


def _load(path: Path, model: Model) -> Tensor | GradinvError:
    """A picture as pixels (3, S, S), or why it cannot be had: the other pictures are not to be lost by it."""
    try:
        return to_pixels(from_path(path).open(), model.preprocessing)
    except GradinvError as error:
        return error


def _decoded(paths: Sequence[Path], model: Model, batch_size: int) -> Generator[list[Tensor | GradinvError]]:
    """The pictures in batches, decoded by threads while the network is busy with those before."""
    pool = ThreadPoolExecutor(_WORKERS)
    waiting: deque[list[Future[Tensor | GradinvError]]] = deque()
    try:
        for first in range(0, len(paths), batch_size):
            waiting.append([pool.submit(_load, path, model) for path in paths[first : first + batch_size]])
            if len(waiting) > _AHEAD:
                yield [future.result() for future in waiting.popleft()]
        while waiting:
            yield [future.result() for future in waiting.popleft()]
    finally:
        pool.shutdown(cancel_futures=True)


def _complete(index: _Index, model: Model, folder: Path, batch_size: int, progress: Progress) -> list[str]:
    """Look at the pictures that are not done yet, and keep their features: → why each of the others cannot be had."""
    files, missing = index.files, (~index.done).nonzero().flatten().tolist()
    broken: list[str] = []
    tried = kept = 0
    progress(len(files) - len(missing), len(files))
    try:
        with contextlib.closing(_decoded([folder / files[row].name for row in missing], model, batch_size)) as batches:
            for batch in batches:
                rows = missing[tried : tried + len(batch)]
                good = {row: item for row, item in zip(rows, batch, strict=True) if isinstance(item, Tensor)}
                if good:
                    index.features[list(good)] = pooled(model, torch.stack(list(good.values())))
                    index.done[list(good)] = True
                broken += [str(item) for item in batch if isinstance(item, GradinvError)]
                tried += len(batch)
                progress(len(files) - len(missing) + tried, len(files))
                if tried - kept >= KEPT_EVERY:
                    index.write()
                    kept = tried
    finally:
        if tried > max(kept, len(broken)):
            index.write()
    return broken


# --- what is kept


def _index_path(model: Model, folder: Path, cache: str | Path | None) -> Path:
    facts = [_FORMAT, model.sha256, model.final, asdict(model.preprocessing), str(folder.resolve())]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    parent = cache_folder("galleries") if cache is None else Path(cache).expanduser()
    return parent / f"{digest[:32]}.safetensors"


class _Index:
    """The features (N, D) of a folder's files, which of them are `done` (N,), and the file that keeps these.

    There each picture's have its name, size and time of change beside them, and are float16 after division by the
    largest of them, which is kept as float32: half the size, whatever the network's features are scaled to.
    """

    def __init__(self, path: Path, files: Sequence[_File], width: int) -> None:
        """Read what was kept; a damaged file is as good as none."""
        self.path, self.files = path, files
        self.notes: list[str] = []
        self.writable = True
        self.features = torch.zeros(len(files), width)
        self.done = torch.zeros(len(files), dtype=torch.bool)
        try:
            if path.is_file():
                self._read()
        except (OSError, safetensors.SafetensorError, KeyError, ValueError, RuntimeError):
            self.done.zero_()
            self.notes.append(f"The index of the pictures, {path}, was damaged and is made anew.")

    def _read(self) -> None:
        kept = safetensors.torch.load_file(self.path)
        numbers, scales, stamps = kept["features"], kept["scales"], kept["stamps"]
        names = [os.fsdecode(name) for name in kept["names"].numpy().tobytes().split(b"\0")]
        shapes = ((len(names), self.features.shape[1]), (len(names),), (len(names), 2))
        if (numbers.shape, scales.shape, stamps.shape) != shapes:
            raise ValueError("the parts do not belong together")
        known = {_File(name, *stamp): row for row, (name, stamp) in enumerate(zip(names, stamps.tolist(), strict=True))}
        found = [(place, known[file]) for place, file in enumerate(self.files) if file in known]
        for first in range(0, len(found), _BLOCK):
            places, rows = (list(part) for part in zip(*found[first : first + _BLOCK], strict=True))
            self.features[places] = numbers[rows].float() * scales[rows, None]
            if not torch.isfinite(self.features[places]).all():
                raise ValueError("features are not finite")
            self.done[places] = True

    def write(self) -> None:
        """Replace the file as a whole. Where that fails there is one note, and no second attempt."""
        if not self.writable:
            return
        rows = self.done.nonzero().flatten()
        scales = self.features[rows].abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny)
        blocks = zip(rows.split(_BLOCK), scales.split(_BLOCK), strict=True)
        chosen = [self.files[row] for row in rows.tolist()]
        names = b"\0".join(os.fsencode(file.name) for file in chosen)
        tensors = {
            "features": torch.cat([(self.features[some] / of[:, None]).half() for some, of in blocks]),
            "scales": scales,
            "stamps": torch.tensor([(file.size, file.time) for file in chosen], dtype=torch.int64),
            "names": torch.frombuffer(bytearray(names), dtype=torch.uint8),
        }
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            replace_whole(self.path, partial(safetensors.torch.save_file, tensors))
        except (OSError, safetensors.SafetensorError) as error:
            self.writable = False
            self.notes.append(
                f"The index of the pictures cannot be kept in {self.path.parent} ({reason(error)}), so the next call "
                "makes it anew; make room there or set GRADINV_CACHE."
            )
