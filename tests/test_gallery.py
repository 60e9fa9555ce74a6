"""A folder's features: what counts as a picture, what is kept and when it is used again, and the search among them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import picture
from torch import Tensor
from torch.nn import functional as F

from gradinv import gallery as module
from gradinv.client import observe
from gradinv.gallery import Gallery, identify, pooled
from gradinv.images import to_pixels
from gradinv.models import Model
from gradinv.sources import ImageFolder, from_path
from gradinv.types import GradinvError


@pytest.fixture
def folder(tmp_path):
    """Twelve pictures of three classes, in ImageNet layout."""
    root = tmp_path / "val"
    for number in range(12):
        picture(root / f"n{number % 3:08d}" / f"{number:02d}.JPEG", number, 20)
    return root


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def index(small_model, folder, cache):
    """Makes the gallery of a folder, of `folder` unless another one is given."""
    return lambda path=folder, model=small_model, **options: Gallery.of(model, path, **{"cache": cache, **options})


@pytest.fixture
def looked_at(monkeypatch):
    """The names of the pictures that are decoded, in any order."""
    seen: list[str] = []

    def load(path: Path, model: Model) -> Tensor | GradinvError:
        seen.append(path.name)
        return original(path, model)

    original = module._load
    monkeypatch.setattr(module, "_load", load)
    return seen


def features_of(model: Model, paths: Sequence[Path]) -> Tensor:
    return pooled(model, torch.stack([to_pixels(from_path(path).open(), model.preprocessing) for path in paths]))


def sentence(call: Callable[[], Any]) -> str:
    with pytest.raises(GradinvError) as raised:
        call()
    text = str(raised.value)
    assert text.endswith(".") and len(text.splitlines()) == 1
    return text


# --- what is in it


def test_features_are_what_enters_the_final_layer(small_model):
    pixels = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    features = pooled(small_model, pixels)
    assert features.shape == (3, 16) and not features.requires_grad
    with torch.no_grad():
        logits = small_model.network(small_model.preprocessing.normalise(pixels))
        torch.testing.assert_close(small_model.final_layer(features), logits)
    assert not small_model.final_layer._forward_pre_hooks


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_gallery_has_every_picture_by_name(small_model, folder, batch_size, index):
    gallery = index(batch_size=batch_size)
    assert gallery.paths == tuple(sorted(folder.rglob("*.JPEG"))) and gallery.notes == ()
    assert gallery.features.shape == (12, 16) and gallery.features.dtype == torch.float32
    torch.testing.assert_close(gallery.features, features_of(small_model, gallery.paths))


def test_any_folder_with_the_folders_in_it(tmp_path, index):
    root = tmp_path / "mine"
    names = ["a.png", "B.JPG", "deep/er/c.webp", "deep/d.tiff", "n00000001/images/e.JPEG"]
    for seed, name in enumerate(names):
        picture(root / name, seed)
    for name in (".hidden.png", ".cache/f.png", "notes.txt", "deep/g.svg"):
        picture(root / name, 9)
    (root / "folder.png").mkdir()
    gallery = index(str(root))
    assert [path.relative_to(root).as_posix() for path in gallery.paths] == sorted(names)
    # The same as the folder's pictures elsewhere in the project.
    assert ImageFolder(root).pictures("n00000001")[0].key in {str(p.relative_to(root)) for p in gallery.paths}


def test_links_are_followed_but_not_in_circles(folder, tmp_path, index):
    root = tmp_path / "links"
    root.mkdir()
    (root / "n00000000").symlink_to(folder / "n00000000")
    (root / "back").symlink_to(root)
    (root / "gone.png").symlink_to(root / "nothing.png")
    assert len(index(root).paths) == 4


def test_broken_pictures_are_left_out_with_a_note(small_model, folder, index):
    (folder / "n00000000" / "broken.JPEG").write_bytes(b"no picture")
    gallery = index()
    assert len(gallery.paths) == 12 and len(gallery.features) == 12
    (note,) = gallery.notes
    assert note.startswith("1 picture was left out of 13 because it cannot be read; broken.JPEG is not a picture;")
    torch.testing.assert_close(gallery.features, features_of(small_model, gallery.paths))
    (folder / "n00000001" / "empty.JPEG").touch()
    again = index()
    assert again.paths == gallery.paths
    assert again.notes[0].startswith("2 pictures were left out of 14 because they cannot be read; the first: broken.")
    # Who mends one finds it.
    picture(folder / "n00000001" / "empty.JPEG", 99)
    assert len(index().paths) == 13


def test_folders_without_pictures(tmp_path, cache, index):
    root = tmp_path / "empty"
    assert sentence(lambda: index(root)) == f"There is no folder {root}; name one that holds pictures."
    root.mkdir()
    (root / "notes.txt").touch()
    assert "holds no pictures (.jpeg, .jpg," in sentence(lambda: index(root))
    (root / "a.png").write_bytes(b"no picture")
    text = sentence(lambda: index(root))
    assert text.startswith(f"No file in {root} can be read as a picture; the first: a.png is not a picture;")
    assert not cache.exists()


def test_a_folder_that_cannot_be_listed(folder, monkeypatch, index):
    def refuse(path: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(module.os, "scandir", refuse)
    assert sentence(lambda: index()) == (
        f"The folder {folder} cannot be listed (Permission denied); check its permissions."
    )


# --- what is kept


def test_a_second_call_decodes_nothing_and_finds_the_same(cache, looked_at, index):
    first = index()
    assert len(looked_at) == 12
    reports: list[tuple[int, int]] = []
    second = index(progress=lambda *report: reports.append(report))
    assert len(looked_at) == 12 and second.paths == first.paths and reports == [(12, 12)]
    # float16 has 11 significant bits.
    assert ((second.features - first.features).abs() <= first.features.amax(1, keepdim=True) * 2**-11).all()
    assert [path.suffix for path in cache.iterdir()] == [".safetensors"]


def test_kept_features_may_be_of_any_scale(small_model, index):
    with torch.no_grad():
        small_model.network.bn2.weight *= 1e7  # beyond what float16 can hold
        small_model.network.bn2.bias *= 1e7
    first, second = (index() for _ in range(2))
    assert first.features.max() > 1e6
    torch.testing.assert_close(second.features, first.features, rtol=1e-3, atol=1e4)
    assert (F.cosine_similarity(first.features, second.features) > 0.999999).all()


def test_only_what_was_added_or_changed_is_looked_at(small_model, folder, looked_at, index):
    index()
    looked_at.clear()
    added = picture(folder / "n00000001" / "added.JPEG", 50)
    changed = picture(folder / "n00000002" / "02.JPEG", 51)
    touched = folder / "n00000000" / "03.JPEG"
    os.utime(touched, ns=(1, 1))
    (folder / "n00000000" / "00.JPEG").unlink()
    gallery = index()
    assert sorted(looked_at) == ["02.JPEG", "03.JPEG", "added.JPEG"]
    assert gallery.paths == tuple(sorted(folder.rglob("*.JPEG"))) and {added, changed} < set(gallery.paths)
    torch.testing.assert_close(gallery.features, features_of(small_model, gallery.paths), rtol=1e-3, atol=1e-3)


def test_another_model_or_size_has_its_own_index(small_model, folder, cache, looked_at, index):
    index()
    larger = replace(small_model.preprocessing, size=10, resize=10)
    others = (replace(small_model, sha256="1" * 64), replace(small_model, preprocessing=larger))
    for number, other in enumerate(others, 2):
        index(model=other)
        assert len(looked_at) == 12 * number and len(list(cache.iterdir())) == number
    index()
    assert len(looked_at) == 36
    # Another folder with the same names, sizes and times, as a copy is.
    copy = folder.parent / "copy"
    shutil.copytree(folder, copy)
    picture(copy / "n00000000" / "00.JPEG", 70)
    assert not torch.equal(index(copy).features, index().features)


@pytest.mark.parametrize("damage", ["cut", "garbage", "foreign", "shapes", "nan", "names", "folder"])
def test_a_damaged_index_is_made_anew(cache, looked_at, damage, index):
    first = index()
    (file,) = cache.iterdir()
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "garbage":
        file.write_bytes(b"\xff" * 1000)
    elif damage == "foreign":
        safetensors.torch.save_file({"fc.weight": torch.zeros(2)}, file)
    else:
        kept = safetensors.torch.load_file(file)
        if damage == "shapes":
            kept["scales"] = kept["scales"][1:]
        elif damage == "nan":
            kept["features"][3, 2] = float("nan")
        elif damage == "names":
            kept["names"] = kept["names"][:-40]
        safetensors.torch.save_file(kept, file)
    if damage == "folder":
        file.unlink()
        file.mkdir()
        second = index()
        assert "cannot be kept in" in second.notes[0]
    else:
        second = index()
        assert second.notes == (f"The index of the pictures, {file}, was damaged and is made anew.",)
        assert index().notes == ()
    assert torch.equal(second.features, first.features) and len(looked_at) == 24


def test_an_unwritable_cache_is_a_note(tmp_path, index):
    (tmp_path / "file").touch()
    cache = tmp_path / "file" / "galleries"
    (note,) = index(cache=cache).notes
    assert note.startswith(f"The index of the pictures cannot be kept in {cache} (Not a directory), so the next call")
    with pytest.raises(KeyboardInterrupt, match=r"^Interrupted\. The index of the pictures cannot be kept in "):
        index(batch_size=2, cache=cache, progress=interrupt_after(6))


def test_a_full_disk_leaves_no_part_behind(cache, monkeypatch, index):
    attempts: list[Path] = []

    def full(tensors: Any, path: Path) -> None:
        attempts.append(path)
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    monkeypatch.setattr(module, "KEPT_EVERY", 3)
    gallery = index(batch_size=3)
    assert "(No space left on device)" in gallery.notes[0] and len(gallery.notes) == 1
    assert len(attempts) == 1 and list(cache.iterdir()) == []


def test_default_cache_is_the_users(small_model, folder, monkeypatch):
    monkeypatch.setenv("GRADINV_CACHE", str(folder.parent / "mine"))
    Gallery.of(small_model, folder)
    assert len(list((folder.parent / "mine" / "galleries").iterdir())) == 1


def interrupt_after(count: int) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done >= count:
            raise KeyboardInterrupt

    return progress


def test_ctrl_c_keeps_what_is_done(small_model, looked_at, index):
    with pytest.raises(KeyboardInterrupt) as stopped:
        index(batch_size=2, progress=interrupt_after(6))
    assert str(stopped.value) == ("Interrupted. 6 of 12 pictures are in the index; call again to go on from there.")
    looked_at.clear()
    reports: list[int] = []
    gallery = index(batch_size=2, progress=lambda done, _: reports.append(done))
    assert len(looked_at) == 6 and reports == [6, 8, 10, 12] and gallery.notes == ()
    torch.testing.assert_close(gallery.features, features_of(small_model, gallery.paths), rtol=1e-3, atol=1e-3)


def test_a_killed_process_loses_the_last_part_only(monkeypatch, looked_at, index):
    kept: list[int] = []
    save = safetensors.torch.save_file

    def counted(tensors: dict[str, Tensor], path: Path) -> None:
        save(tensors, path)
        kept.append(len(tensors["features"]))

    monkeypatch.setattr(safetensors.torch, "save_file", counted)
    monkeypatch.setattr(module, "KEPT_EVERY", 4)
    index(batch_size=3)
    assert kept == [6, 12]  # after whole batches, and not once more at the end


# --- the search


def test_match_is_by_cosine_similarity_and_says_what_it_needs():
    features = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0], [0.0, 0.0]])
    gallery = Gallery(Path("."), tuple(Path(name) for name in "abcd"), features)
    similarity, places = gallery.match(torch.tensor([[10.0, 0.1], [0.2, 0.1]]), 2)
    assert places.tolist() == [[0, 2], [2, 0]]
    expected = F.cosine_similarity(torch.tensor([[10.0, 0.1], [0.2, 0.1]])[:, None], features[places], dim=2)
    torch.testing.assert_close(similarity, expected)
    assert gallery.match(torch.ones(1, 2), 9)[1].tolist()[0][-1] == 3  # all there are, black pictures last
    assert "At least one match" in sentence(lambda: gallery.match(torch.ones(1, 2), 0))
    assert "Features of 2 numbers" in sentence(lambda: gallery.match(torch.ones(1, 3), 1))


def test_the_place_of_a_picture(folder, index):
    gallery = index()
    for place, path in enumerate(gallery.paths):
        assert gallery.index(path) == gallery.index(path.relative_to(folder)) == gallery.index(str(path)) == place
    assert "do not include lion.JPEG" in sentence(lambda: gallery.index("lion.JPEG"))


def test_identify_finds_the_batch_among_all(small_model, index):
    gallery = index()
    own, labels = [7, 2, 10], torch.tensor([4, 1, 2])
    pixels = torch.stack([to_pixels(from_path(gallery.paths[i]).open(), small_model.preprocessing) for i in own])
    found = identify(small_model, observe(small_model, pixels, labels), gallery, top=2)
    by_label = dict(zip(labels.tolist(), own, strict=True))
    assert found.similarity.shape == found.places.shape == (3, 2)
    assert found.places[:, 0].tolist() == [by_label[label] for label in found.labels.labels.tolist()]
    assert (found.similarity[:, 0] > 0.99).all() and (found.similarity[:, 1] < found.similarity[:, 0]).all()
    assert 0 <= found.residual < 0.05
