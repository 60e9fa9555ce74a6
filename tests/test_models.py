from __future__ import annotations

import hashlib
import io
import json

import pytest
import safetensors.torch
import torch
import torchvision

from gradinv import prior, weights
from gradinv.backbones import load_backbone
from gradinv.images import to_pixels
from gradinv.models import MODELS, ModelInfo, choose_device, imagenet_classes, load_model, tiny_classes
from gradinv.sources import gallery
from gradinv.types import GradinvError


@pytest.mark.parametrize("name", ["resnet18-tiny", "resnet50-tiny"])
def test_bundled_models_load_offline_and_know_their_classes(name):
    model = load_model(name, device="cpu")
    assert model.sha256 == MODELS[name].sha256
    assert model.preprocessing.size == 64 and len(model.classes) == 200
    assert model.classes[0].name == "goldfish" and model.class_index("n01443537") == 0
    assert model.class_index("n00000000") is None and model.class_index("") is None
    assert not model.network.training
    assert all(value.dtype == torch.float32 for value in model.network.parameters())


def test_bundled_model_recognises_gallery_pictures():
    """Far above chance (one in 200): wrong preprocessing or a wrong class order would not pass."""
    model = load_model("resnet18-tiny", device="cpu")
    pictures = gallery(model)
    labels = model.predict(torch.stack([to_pixels(picture.open(), model.preprocessing) for picture in pictures]))
    right = [model.class_index(p.wnid or "") == label for p, label in zip(pictures, labels.tolist(), strict=True)]
    assert sum(right) >= len(pictures) / 3


def test_class_lists():
    assert len(imagenet_classes()) == 1000 and imagenet_classes()[207].name == "golden retriever"
    assert len(tiny_classes()) == 200
    assert [item.wnid for item in tiny_classes()] == sorted(item.wnid for item in tiny_classes())


def test_auto_without_a_gpu_takes_the_bundled_resnet50(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert load_model("auto").name == "resnet50-tiny"


def test_a_gpu_that_cannot_compute_is_not_taken(monkeypatch):
    """As one for which this build of torch has no kernels: it is there, and all it is asked fails."""
    ones = torch.ones

    def failing(*args, device=None, **rest):
        if device is not None and torch.device(device).type == "cuda":
            raise RuntimeError("CUDA error: no kernel image is available for execution on the device")
        return ones(*args, device=device, **rest)

    monkeypatch.setattr(torch, "ones", failing)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(GradinvError, match=r"^The device cuda cannot be used here; take cpu or auto\.$"):
        choose_device("cuda")


def test_own_safetensors_say_what_they_are(tmp_path, resnet18):
    wnids = ["n01443537", "n02129165", "n09999999"]
    metadata = {"arch": "resnet18", "classes": json.dumps(wnids), "image_size": "48", "accuracy": "12.5"}
    safetensors.torch.save_file(resnet18, tmp_path / "own.safetensors", metadata=metadata)
    model = load_model(str(tmp_path / "own.safetensors"), device="cpu")
    assert [item.name for item in model.classes] == ["goldfish", "lion", "n09999999"]
    assert model.preprocessing.size == 48 and model.accuracy == 12.5


@pytest.mark.parametrize(
    "metadata",
    [
        {"image_size": "large"},
        {"image_size": "4"},
        {"accuracy": "good"},
        {"accuracy": "nan"},
        {"classes": "goldfish"},
        {"classes": '{"n01443537": 0}'},
        {"classes": "[1, 2, 3]"},
    ],
)
def test_metadata_that_cannot_be_understood(tmp_path, metadata):
    safetensors.torch.save_file({"fc.weight": torch.ones(3, 2)}, tmp_path / "own.safetensors", metadata=metadata)
    with pytest.raises(GradinvError, match="of its metadata, image_size has to be 8 to 1024"):
        load_model(str(tmp_path / "own.safetensors"), device="cpu")


def test_half_precision_weights_are_loaded_as_float32(tmp_path, resnet18):
    half = {name: value.half() if value.is_floating_point() else value for name, value in resnet18.items()}
    safetensors.torch.save_file(half, tmp_path / "half.safetensors")
    model = load_model(str(tmp_path / "half.safetensors"), device="cpu")
    assert model.network.state_dict()["conv1.weight"].dtype == torch.float32


MISFITS = {
    "lacks the layer layer2.0.conv1.weight": {"layer2.0.conv1.weight": None},
    "layer layer3.1.conv2.weight has the shape": {"layer3.1.conv2.weight": torch.zeros(3, 3)},
    "has a layer neck.weight that the network lacks": {"neck.weight": torch.zeros(1)},
    "layer conv1.weight holds values that are not finite": {"conv1.weight": torch.full((64, 3, 7, 7), torch.nan)},
}


@pytest.mark.parametrize("said", MISFITS)
@pytest.mark.parametrize("load", [load_model, load_backbone])
def test_weights_that_do_not_fit_say_which_layer(tmp_path, resnet18, load, said):
    state = {name: value for name, value in {**resnet18, **MISFITS[said]}.items() if value is not None}
    torch.save(state, tmp_path / "own.pth")
    with pytest.raises(GradinvError, match=said):
        load(str(tmp_path / "own.pth"), device="cpu")


def test_weights_without_a_final_layer_are_refused(tmp_path, resnet18):
    state = {name: value for name, value in resnet18.items() if not name.startswith("fc.")}
    torch.save(state, tmp_path / "own.pth")
    with pytest.raises(GradinvError, match="no final linear layer"):
        load_model(str(tmp_path / "own.pth"), device="cpu")


@pytest.mark.parametrize("name", ["notes.pth", "notes.safetensors"])
def test_files_that_are_not_weights_are_refused(tmp_path, name):
    (tmp_path / name).write_text("shopping list")
    with pytest.raises(GradinvError, match="cannot be read as weights"):
        load_model(str(tmp_path / name), device="cpu")


def test_a_pickle_that_is_more_than_weights_is_not_executed(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    torch.save({"fc.weight": Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(GradinvError, match="weights-only"):
        load_model(str(tmp_path / "bomb.pth"), device="cpu")
    assert not (tmp_path / "executed").exists()


def test_unknown_names_and_devices_are_refused():
    with pytest.raises(GradinvError, match="named models are resnet50-tiny"):
        load_model("resnet51", device="cpu")
    with pytest.raises(GradinvError, match="cannot be used here"):
        choose_device("warp")
    with pytest.raises(GradinvError, match="between 8 and 1024"):
        load_model("resnet18-tiny", device="cpu", image_size=4)


@pytest.mark.parametrize(
    ("file", "load"),
    [
        ("resnet18-tiny", lambda _: load_model("resnet18-tiny", device="cpu")),
        ("resnet18-tiny-decoder", prior.load_decoder),
        ("resnet18-tiny-painter-layer1.1", lambda model: prior.paint(model, "layer1.1", torch.zeros(1, 64, 16, 16))),
    ],
)
def test_missing_and_damaged_bundled_weights_are_refused(tmp_path, monkeypatch, file, load):
    model = load_model("resnet18-tiny", device="cpu")
    (tmp_path / "models").mkdir()
    monkeypatch.setattr(weights, "ASSETS", tmp_path)
    with pytest.raises(GradinvError, match=f"{file}.safetensors are missing; reinstall"):
        load(model)
    (tmp_path / "models" / f"{file}.safetensors").write_bytes(b"damaged")
    with pytest.raises(GradinvError, match="wrong sha256"):
        load(model)


class TestDownload:
    """torchvision's own download and hash check, against a local server with a half-precision ResNet-18."""

    INFO = ModelInfo("resnet18", "", arch="resnet18", size=32, classes=1000, accuracy=69.8, origin="")

    @pytest.fixture
    def server(self, server, tmp_path, monkeypatch):
        """Its file carries the start of its sha256 in its name, as torchvision's do."""
        packed = io.BytesIO()
        torch.save(torchvision.models.resnet18(num_classes=1000).half().state_dict(), packed)
        path = f"/resnet18-{hashlib.sha256(packed.getvalue()).hexdigest()[:8]}.pth"
        server.files[path] = packed.getvalue()
        monkeypatch.setattr(torchvision.models.ResNet18_Weights.IMAGENET1K_V1.value, "url", f"{server.url}{path}")
        monkeypatch.setitem(MODELS, "resnet18", self.INFO)
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
        return server

    def test_first_use_downloads_and_the_second_needs_no_server(self, server):
        first = load_model("resnet18", device="cpu")
        assert len(first.classes) == 1000 and first.preprocessing.size == 32
        server.files.clear()
        assert load_model("resnet18", device="cpu").sha256 == first.sha256

    def test_a_wrong_hash_is_refused_and_nothing_is_kept(self, server, tmp_path):
        server.files = {path: body + b"tampered" for path, body in server.files.items()}
        with pytest.raises(GradinvError, match="could not be downloaded"):
            load_model("resnet18", device="cpu")
        assert not list((tmp_path / "hub" / "checkpoints").iterdir())

    def test_a_missing_file_names_the_way_out(self, server):
        server.files.clear()
        with pytest.raises(GradinvError, match=r"put the file at .* or take resnet50-tiny"):
            load_model("resnet18", device="cpu")
