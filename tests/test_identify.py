"""`gradinv identify`: from an observation to the pictures it is of, and one sentence for each mistake."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import fails, one_sentence, picture

from gradinv import cli, gallery, sources
from gradinv.cli import identify
from gradinv.client import observe
from gradinv.images import to_pixels
from gradinv.models import load_model
from gradinv.paths import ASSETS
from gradinv.recovery.labels import RestoredLabels
from gradinv.sources import from_path

OWN = ("n00000001/05.JPEG", "n00000002/02.JPEG", "mine/12.JPEG")  # in the order of their labels
LABELS = (17, 3, 150)


pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.fixture(scope="module")
def model():
    return load_model("resnet18-tiny", device="cpu", image_size=32)


@pytest.fixture
def observed(model, elsewhere):
    """The gradient of OWN, three of thirteen pictures in `val`; saved as observation.safetensors."""
    for number in range(13):
        picture(Path("val") / (f"n{number % 4:08d}" if number < 12 else "mine") / f"{number:02d}.JPEG", number)
    pixels = torch.stack([to_pixels(from_path(f"val/{name}").open(), model.preprocessing) for name in OWN])
    observation = observe(model, pixels, torch.tensor(LABELS))
    observation.save("observation.safetensors")
    return observation


IDENTIFY = ["identify", "--observation", "observation.safetensors", "--imagenet", "val", "--device", "cpu"]


@pytest.mark.usefixtures("observed")
def test_json_names_the_pictures_of_the_batch(model, capsys):
    (Path("val") / "mine" / "broken.png").write_bytes(b"no picture")
    assert cli.main([*IDENTIFY, "--top", "3", "--json"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert captured.err.splitlines()[0].startswith("1 picture was left out of 14")
    assert found["format"] == 1 and found["gallery"] == {"path": "val", "images": 13}
    assert found["model"] == {"name": "resnet18-tiny", "sha256": model.sha256, "accuracy": 44.5}
    assert found["labels"]["method"] and 0 <= found["labels"]["confidence"] <= 1
    images = {image["label"]: image for image in found["images"]}
    assert set(images) == set(LABELS)
    for label, name in zip(LABELS, OWN, strict=True):
        matches = images[label]["matches"]
        assert matches[0]["path"] == str(Path("val") / name) and len(matches) == 3
        similarities = [match["similarity"] for match in matches]
        assert similarities[0] > 0.99 and similarities == sorted(similarities, reverse=True)
        assert 0 <= images[label]["residual"] < 1e-3


@pytest.mark.usefixtures("observed")
def test_table_for_people(capsys, monkeypatch, model):
    monkeypatch.setenv("GRADINV_IMAGENET", "val")
    assert cli.main([*IDENTIFY[:3], "--top", "2"]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert captured.err == "" and lines[0].split() == ["#", "class", "rank", "similarity", "picture"]
    first = {model.class_name(label): name for label, name in zip(LABELS, OWN, strict=True)}
    for line in lines[1:7:2]:
        number, *name, rank, _, picture = line.split()
        assert number.isdigit() and rank == "1" and first.pop(" ".join(name)) == picture
    assert not first and all(line.split()[0] == "2" for line in lines[2:7:2])
    assert lines[7].startswith("13 pictures in val,") and "they are the client's own" in lines[8] and len(lines) == 9


def test_without_a_folder_the_bundled_pictures_are_searched(model, capsys):
    chosen = [sources.find(sources.gallery(model), name) for name in ("lion", "goldfish")]
    labels = torch.tensor([model.class_index(picture.wnid or "") for picture in chosen])
    pixels = torch.stack([to_pixels(picture.open(), model.preprocessing) for picture in chosen])
    observe(model, pixels, labels).save("shared.safetensors")
    assert cli.main(["identify", "--observation", "shared.safetensors", "--top", "1", "--json"]) == 0
    captured = capsys.readouterr()
    assert "The bundled pictures are searched" in captured.err
    found = [image["matches"][0] for image in json.loads(captured.out)["images"]]
    assert sorted(Path(match["path"]).name for match in found) == ["goldfish.jpg", "lion.jpg"]
    assert min(match["similarity"] for match in found) > 0.99


def test_a_changed_gradient_is_said_to_be_less_sure(observed, capsys):
    weight = observed.gradients["fc.weight"]
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * weight.std()
    replace(observed, gradients={**observed.gradients, "fc.weight": weight + noise}).save("observation.safetensors")
    assert cli.main(IDENTIFY) == 0
    assert "they are not the client's own" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.usefixtures("observed")
def test_what_is_not_among_the_pictures_is_said_to_lack(capsys):
    Path("other").mkdir()
    for known in sources.gallery()[:4]:
        known.open().save(Path("other") / f"{known.key}.png")
    search = [*IDENTIFY[:4], "other", *IDENTIFY[5:]]
    assert cli.main(search) == 0
    assert "none of these pictures seems to be of the batch" in capsys.readouterr().out.splitlines()[-1]
    assert cli.main(IDENTIFY) == 0
    assert "0.9:" not in capsys.readouterr().out


def test_single_pictures_that_lack_are_named():
    similarity = torch.tensor([[0.9999, 0.5], [0.7, 0.6], [0.89, 0.1]])
    for rows, said in (
        ((0, 1), "Nothing is as similar as 0.9 to #1, which seems not to be among these pictures."),
        ((0, 1, 2), "Nothing is as similar as 0.9 to #1 and #2, which seem not to be among these pictures."),
        ((0,), ""),
    ):
        chosen = RestoredLabels(torch.tensor(LABELS[: len(rows)]), "ilrg", 1.0)
        found = gallery.Identified(
            chosen, 0.0, True, similarity[list(rows)], torch.zeros(len(rows), 2, dtype=torch.int64)
        )
        assert identify._lacking(found) == said


@pytest.mark.usefixtures("observed")
def test_a_second_call_takes_the_index(capsys, monkeypatch):
    assert cli.main([*IDENTIFY, "--json"]) == 0
    first = json.loads(capsys.readouterr().out)

    def decoded(*_: object) -> None:
        raise AssertionError("a picture was looked at again")

    monkeypatch.setattr(gallery, "_load", decoded)
    assert cli.main([*IDENTIFY, "--json"]) == 0
    second = json.loads(capsys.readouterr().out)
    for a, b in zip(first["images"], second["images"], strict=True):
        assert [match["path"] for match in a["matches"]] == [match["path"] for match in b["matches"]]


@pytest.mark.usefixtures("observed")
def test_ctrl_c_says_what_is_kept(capsys, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gallery, "pooled", interrupted)
    assert cli.main(IDENTIFY) == 130
    assert "0 of 13 pictures are in the index; call again" in one_sentence(capsys.readouterr().err)
    monkeypatch.setattr(gallery, "_files", interrupted)
    assert cli.main(IDENTIFY) == 130
    assert one_sentence(capsys.readouterr().err) == "Interrupted; nothing was kept."


def test_a_client_in_train_mode_is_noted(observed, model, tmp_path, capsys):
    paths = [tmp_path / "val" / name for name in OWN]
    pixels = torch.stack([to_pixels(from_path(path).open(), model.preprocessing) for path in paths])
    observe(model, pixels, torch.tensor(LABELS), mode="train").save("observation.safetensors")
    assert cli.main([*IDENTIFY, "--json"]) == 0
    captured = capsys.readouterr()
    assert "was in train mode" in captured.err and len(json.loads(captured.out)["images"]) == 3
    observed.save("observation.safetensors")
    assert cli.main([*IDENTIFY, "--json"]) == 0
    assert "train mode" not in capsys.readouterr().err


def test_own_weights_are_named(observed, tmp_path, capsys, model):
    weights = tmp_path / "mine.safetensors"
    shutil.copy(ASSETS / "models" / "resnet18-tiny.safetensors", weights)
    replace(observed, model_name="mine").save("observation.safetensors")
    assert "of 'mine', which is not the name of a model; name the weights file with" in fails(capsys, *IDENTIFY)
    assert cli.main([*IDENTIFY, "--model", str(weights), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["name"] == "mine"


def test_mistakes_are_one_sentence(observed, capsys):
    assert "at least 1, not 0" in fails(capsys, *IDENTIFY, "--top", "0")
    assert "There is no folder missing" in fails(capsys, *IDENTIFY[:4], "missing")
    Path("empty").mkdir()
    assert "empty holds no pictures" in fails(capsys, *IDENTIFY[:4], "empty")
    assert "Cannot read an observation from no.file" in fails(capsys, *IDENTIFY[:2], "no.file", *IDENTIFY[3:])
    assert "not of resnet50-tiny" in fails(capsys, *IDENTIFY, "--model", "resnet50-tiny")
    assert "no model or weights file 'nothing'" in fails(capsys, *IDENTIFY, "--model", "nothing")
    broken = {**observed.gradients, "fc.weight": observed.gradients["fc.weight"] * float("nan")}
    replace(observed, gradients=broken).save("observation.safetensors")
    assert "fc.weight" in fails(capsys, *IDENTIFY)
    replace(observed, batch_size=250).save("observation.safetensors")  # of 200 classes
    assert "250" in fails(capsys, *IDENTIFY)
    assert not Path("cache").exists()  # found before any picture was looked at
