"""The decoders: their files, what they paint, and what is said where there is none."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from gradinv import prior
from gradinv.images import to_pixels
from gradinv.metrics import constant_colour, psnr, ssim
from gradinv.models import Model, load_model
from gradinv.recovery.final_layer import recover_features
from gradinv.recovery.labels import restore_labels
from gradinv.sources import find, gallery
from gradinv.types import GradinvError, Preprocessing
from gradinv.victim import observe

NAMES = ("goldfish", "tabby", "lion", "coffee")


@pytest.mark.parametrize("name", prior.DECODERS)
def test_the_preview_of_recovered_features_beats_a_constant_colour(name: str) -> None:
    model = load_model(name, device="cpu")
    pictures = [find(gallery(model), picture) for picture in NAMES]
    originals = torch.stack([to_pixels(picture.open(), model.preprocessing) for picture in pictures])
    observation = observe(model, originals, torch.tensor([model.class_index(picture.wnid) for picture in pictures]))
    restored = restore_labels(model, observation).labels
    found = prior.preview(model, recover_features(model, observation, restored).features)
    assert found.shape == originals.shape and found.min() >= 0 and found.max() <= 1
    order = [restored.tolist().index(model.class_index(picture.wnid)) for picture in pictures]
    assert psnr(found[order], originals).mean() > psnr(constant_colour(originals), originals).mean()
    assert ssim(found[order], originals).mean() > ssim(found[order[::-1]], originals).mean() + 0.05


def test_a_model_without_a_decoder(small_model: Model) -> None:
    with pytest.raises(GradinvError, match=r"There is no decoder for small at 8 px; only resnet50-tiny and resnet18"):
        prior.preview(small_model, torch.zeros(1, 16))


def test_another_size_or_other_weights_have_none() -> None:
    model = load_model("resnet18-tiny", device="cpu")
    assert prior.has_decoder(model)
    assert not prior.has_decoder(dataclasses.replace(model, preprocessing=Preprocessing(32, 32)))
    assert not prior.has_decoder(dataclasses.replace(model, sha256="0" * 64))


def test_a_missing_and_a_damaged_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model("resnet18-tiny", device="cpu")
    monkeypatch.setattr(prior, "ASSETS", tmp_path)
    with pytest.raises(GradinvError, match="is missing; reinstall"):
        prior.load_decoder(model)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "resnet18-tiny-decoder.safetensors").write_bytes(b"torn")
    with pytest.raises(GradinvError, match="is damaged"):
        prior.load_decoder(model)
