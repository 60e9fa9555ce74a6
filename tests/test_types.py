"""The shapes that everything is built on: preprocessing, what the server receives, snapshots."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import safetensors.torch
import torch

from gradinv.types import BatchNormStatistics, GradinvError, Observation, Preprocessing

PREPROCESSING = Preprocessing(size=8, resize=9, mean=(0.5, 0.4, 0.3), std=(0.25, 0.2, 0.1))
FACTS = {
    "format": 1,
    "batch_size": 2,
    "preprocessing": dataclasses.asdict(PREPROCESSING),
    "model_name": "small",
    "model_sha256": "0" * 64,
    "mode": "eval",
}


def observation() -> Observation:
    gradients = {"fc.weight": torch.randn(4, 3), "conv1.weight": torch.randn(2, 3, 3, 3), "fc.bias": torch.randn(4)}
    return Observation(gradients, 2, PREPROCESSING, "small", "0" * 64)


def test_normalise_by_hand() -> None:
    pixels = torch.tensor([1.0, 0.4, 0.0]).view(3, 1, 1).expand(2, 3, 8, 8)
    normalised = PREPROCESSING.normalise(pixels)
    assert normalised.shape == pixels.shape
    torch.testing.assert_close(normalised[1, :, 2, 5], torch.tensor([2.0, 0.0, -3.0]))


def test_denormalise_is_the_inverse_within_the_bounds_and_clamps_beyond() -> None:
    pixels = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(PREPROCESSING.denormalise(PREPROCESSING.normalise(pixels)), pixels)
    assert torch.equal(PREPROCESSING.denormalise(torch.full((3, 8, 8), 99.0)), torch.ones(3, 8, 8))
    assert torch.equal(PREPROCESSING.denormalise(torch.full((3, 8, 8), -99.0)), torch.zeros(3, 8, 8))


def test_bounds_are_black_and_white() -> None:
    low, high = PREPROCESSING.bounds(torch.zeros(1))
    assert low.shape == high.shape == (3, 1, 1)
    torch.testing.assert_close(low, PREPROCESSING.normalise(torch.zeros(3, 1, 1)))
    torch.testing.assert_close(high, PREPROCESSING.normalise(torch.ones(3, 1, 1)))


@pytest.mark.parametrize("kind", ["", "bn", "running"])
def test_observation_survives_its_file(kind: str, tmp_path: Path) -> None:
    """Without statistics, with those of the batch, and with the running ones of a client in train mode."""
    statistics = BatchNormStatistics({"bn1": torch.randn(5)}, {"bn1": torch.rand(5)})
    changes = {kind: statistics, "mode": "train" if kind == "running" else "eval"} if kind else {}
    saved = dataclasses.replace(observation(), **changes)  # type: ignore[arg-type]
    saved.save(tmp_path / "gradient.safetensors")
    loaded = Observation.load(tmp_path / "gradient.safetensors")
    assert set(loaded.gradients) == set(saved.gradients)
    assert all(torch.equal(loaded.gradients[name], value) for name, value in saved.gradients.items())
    assert loaded.preprocessing == PREPROCESSING
    for name in ("batch_size", "model_name", "model_sha256", "mode"):
        assert getattr(loaded, name) == getattr(saved, name)
    for name in ("bn", "running"):
        found = getattr(loaded, name)
        assert (found is None) == (name != kind)
        if found is not None:
            assert torch.equal(found.mean["bn1"], statistics.mean["bn1"])
            assert torch.equal(found.var["bn1"], statistics.var["bn1"])


def test_the_file_is_read_by_what_it_says(tmp_path: Path) -> None:
    """The layout that earlier versions wrote, by hand; and one that a later version might write."""
    tensors = {"gradient/fc.bias": torch.randn(4), "bn.mean/bn1": torch.randn(5), "bn.var/bn1": torch.rand(5)}
    path = tmp_path / "gradient.safetensors"
    safetensors.torch.save_file(tensors, path, metadata={"observation": json.dumps(FACTS)})
    loaded = Observation.load(path)
    assert torch.equal(loaded.gradients["fc.bias"], tensors["gradient/fc.bias"])
    assert loaded.preprocessing == PREPROCESSING and loaded.running is None and loaded.bn is not None
    safetensors.torch.save_file(tensors, path, metadata={"observation": json.dumps({**FACTS, "format": 2})})
    with pytest.raises(GradinvError, match=r"is of format 2, and this version reads format 1; use the version"):
        Observation.load(path)


def test_observation_holds_neither_images_nor_labels() -> None:
    names = {field.name for field in dataclasses.fields(Observation)}
    known = {"gradients", "batch_size", "preprocessing", "model_name", "model_sha256", "bn", "mode", "running"}
    assert names == known | {"label_smoothing"}


def test_views_and_gradients_that_share_their_memory_are_saved_as_they_read(tmp_path: Path) -> None:
    """As distributed training keeps them: one buffer, of which each gradient is a part."""
    buffer = torch.arange(10.0)
    parts = {"fc.weight": buffer[:6].view(2, 3).t(), "fc.bias": buffer[6:]}
    dataclasses.replace(observation(), gradients=parts).save(tmp_path / "gradient.safetensors")
    loaded = Observation.load(tmp_path / "gradient.safetensors").gradients
    assert all(torch.equal(loaded[name], value) for name, value in parts.items())


def test_gradients_that_are_not_there_are_refused() -> None:
    frozen: dict[str, torch.Tensor] = {"fc.bias": None}  # type: ignore[dict-item]
    with pytest.raises(GradinvError, match="Every gradient is None; observe after backward"):
        dataclasses.replace(observation(), gradients=frozen)


def test_what_is_not_an_observation(tmp_path: Path) -> None:
    def said(path: Path) -> str:
        with pytest.raises(GradinvError) as raised:
            Observation.load(path)
        return str(raised.value)

    path = tmp_path / "observation"
    assert "Cannot read an observation" in said(path)
    for content in (b"no tensors here", b""):
        path.write_bytes(content)
        assert "Cannot read an observation" in said(path)
    for metadata in (None, {"observation": "{}"}):
        safetensors.torch.save_file({"weight": torch.zeros(2)}, path, metadata=metadata)
        assert "not an observation" in said(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"preprocessing": {"size": math.inf, "resize": 9, "mean": [0.5] * 3, "std": [0.5] * 3}}, "infinity"),
        ({"model_sha256": ["a"]}, "cannot be used: The observation's model_sha256 is a list; give a str"),
        ({"model_name": 7}, "model_name is a int"),
        ({"format": "x" * 1000}, "is of format x{20}, and"),
    ],
)
def test_what_its_metadata_cannot_be(change: dict[str, object], said: str) -> None:
    tensors = {"gradient/fc.bias": torch.ones(4)}

    def packed(facts: str, tensors: dict[str, torch.Tensor] = tensors) -> bytes:
        return safetensors.torch.save(tensors, metadata={"observation": facts})

    assert Observation.unpack(packed(json.dumps(FACTS)), "mine").batch_size == 2
    with pytest.raises(GradinvError, match=said):
        Observation.unpack(packed(json.dumps({**FACTS, **change})), "mine")
    with pytest.raises(GradinvError, match=r"^mine is a safetensors file, but not an observation as Observation\.save"):
        Observation.unpack(packed("[" * 100_000), "mine")
    for name in ("fc bias", "a" * 201, "![](x)"):
        with pytest.raises(GradinvError, match="a tensor is not named as a module's parameters are"):
            Observation.unpack(packed(json.dumps(FACTS), {f"gradient/{name}": torch.ones(4)}), "mine")


def test_observation_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(GradinvError, match="Cannot write the observation"):
        observation().save(tmp_path / "file" / "gradient.safetensors")


def test_errors_are_value_errors() -> None:
    """Code that knows nothing of gradinv can catch them as what they are."""
    assert issubclass(GradinvError, ValueError)
