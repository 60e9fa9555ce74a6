"""Networks without a final layer: taken from files, downloaded as MoCo's, and written with a layer that was fitted."""

from __future__ import annotations

import hashlib
import io

import pytest
import safetensors.torch
import torch
import torchvision

from gradinv import backbones
from gradinv.backbones import load_backbone, save_fitted
from gradinv.models import MODELS, ModelInfo, load_model
from gradinv.types import GradinvError


class TestBackbone:
    """What a final layer is fitted to, from files with one and without."""

    def test_named_models_and_files_are_taken_as_they_are(self, tmp_path, resnet18):
        bundled = load_backbone("resnet18-tiny", device="cpu", image_size=32)
        assert bundled.arch == "resnet18" and bundled.model.sha256 == MODELS["resnet18-tiny"].sha256
        assert bundled.model.preprocessing.size == 32
        headless = {name: value for name, value in resnet18.items() if not name.startswith("fc.")}
        safetensors.torch.save_file(resnet18, tmp_path / "own.safetensors", metadata={"image_size": "48"})
        torch.save(headless, tmp_path / "headless.pth")
        for name, size in (("own.safetensors", 48), ("headless.pth", 224)):
            backbone = load_backbone(str(tmp_path / name), device="cpu")
            assert backbone.arch == "resnet18" and backbone.origin == name
            assert backbone.model.preprocessing.size == size and not backbone.model.network.training
            state = backbone.model.network.state_dict()
            assert all(torch.equal(state[key], value) for key, value in headless.items())

    def test_files_that_are_none_are_refused(self, tmp_path):
        with pytest.raises(GradinvError, match="no model or weights file"):
            load_backbone("nowhere.pth")
        with pytest.raises(GradinvError, match="between 8 and 1024"):
            load_backbone("resnet18-tiny", device="cpu", image_size=4)

    def test_a_fitted_layer_makes_it_a_model(self, tmp_path, resnet18):
        torch.save(resnet18, tmp_path / "own.pth")
        backbone = load_backbone(str(tmp_path / "own.pth"), device="cpu", image_size=32)
        weight, bias = torch.randn(2, 512), torch.randn(2)
        path = tmp_path / "fitted.safetensors"
        save_fitted(path, backbone, weight, bias, ["n02129165", "n01443537"], 61.236, fit="by hand")
        model = load_model(str(path), device="cpu")
        assert [item.name for item in model.classes] == ["lion", "goldfish"] and model.accuracy == 61.24
        assert torch.equal(model.final_layer.weight, weight) and torch.equal(model.final_layer.bias, bias)
        pixels = torch.rand(2, 3, 32, 32)
        full = torchvision.models.resnet18(num_classes=2)
        full.load_state_dict({**resnet18, "fc.weight": weight, "fc.bias": bias})
        assert torch.equal(model.predict(pixels), full.eval()(model.preprocessing.normalise(pixels)).argmax(1))
        with safetensors.safe_open(path, framework="pt") as file:
            assert file.metadata()["fit"] == "by hand" and file.metadata()["backbone"] == "own, own.pth"


def checkpoint(encoder, zipped):
    """The bytes of a file with all that MoCo's training writes; without `zipped` in the format of its year."""
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], 0.03, momentum=0.9)
    parameter.sum().backward()
    optimizer.step()
    query = {name: value for name, value in encoder.items() if not name.startswith("fc.")}
    query |= {"fc.0.weight": torch.ones(512, 512), "fc.0.bias": torch.ones(512)}
    query |= {"fc.2.weight": torch.ones(128, 512), "fc.2.bias": torch.ones(128)}
    state = {f"module.encoder_q.{name}": value.half() for name, value in query.items()}
    state |= {"module.encoder_k.conv1.weight": torch.zeros(64, 3, 7, 7), "module.queue": torch.zeros(128, 8)}
    state |= {"module.queue_ptr": torch.zeros(1, dtype=torch.long)}
    content = {"epoch": 800, "arch": "resnet50", "state_dict": state, "optimizer": optimizer.state_dict()}
    packed = io.BytesIO()
    torch.save(content, packed, _use_new_zipfile_serialization=zipped)
    return packed.getvalue()


class TestMoco:
    """The published checkpoint's way into the cache, from a local server with a small one of the same layout."""

    INFO = ModelInfo(
        "resnet50-moco", "", arch="resnet18", size=32, classes=1000, accuracy=71.1, origin="", headless=True
    )

    PATH = "/mirror/moco.pth.tar"

    @pytest.fixture
    def server(self, server, tmp_path, monkeypatch, resnet18):
        monkeypatch.setenv("GRADINV_CACHE", str(tmp_path / "cache"))
        monkeypatch.setitem(MODELS, "resnet50-moco", self.INFO)
        monkeypatch.setenv("GRADINV_MOCO_URL", f"{server.url}{self.PATH}")
        self.serve(server, checkpoint(resnet18, zipped=True), monkeypatch)
        return server

    def serve(self, server, body, monkeypatch):
        """Give out a file, and know of it what is known of the published one."""
        server.files[self.PATH] = body
        monkeypatch.setattr(backbones, "_MOCO_MD5", hashlib.md5(body).hexdigest()[:8])

    def kept(self, tmp_path):
        """The names in the cache."""
        folder = tmp_path / "cache" / "models"
        return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []

    @pytest.mark.parametrize("zipped", [True, False])
    def test_first_use_downloads_and_the_second_needs_no_server(self, server, tmp_path, monkeypatch, resnet18, zipped):
        self.serve(server, checkpoint(resnet18, zipped), monkeypatch)
        reported = []
        first = load_backbone("resnet50-moco", device="cpu", progress=lambda *numbers: reported.append(numbers))
        body = server.files.pop(self.PATH)
        assert reported[-1] == (len(body), len(body)) and len(reported) > 1
        assert first.model.name == "resnet50-moco" and first.model.preprocessing.size == 32
        assert first.model.sha256 == hashlib.sha256(body).hexdigest()
        state = first.model.network.state_dict()
        encoder = {name: value for name, value in resnet18.items() if not name.startswith("fc.")}
        assert set(state) == {*encoder, "fc.weight", "fc.bias"} and state["fc.weight"].shape == (1, 512)
        assert all(torch.equal(state[name], value.half().to(value.dtype)) for name, value in encoder.items())
        load_backbone("resnet50-moco", device="cpu")
        assert len(server.asked) == 1 and self.kept(tmp_path) == ["moco_v2_800ep_pretrain.pth.tar"]

    def test_without_a_final_layer_the_command_is_named(self, server):
        with pytest.raises(GradinvError, match=r"no final layer yet; fit one once with `gradinv head --imagenet DIR`"):
            load_model("resnet50-moco", device="cpu")
        assert server.asked == []

    def test_what_does_not_come_as_it_was_published_is_not_kept(self, server, tmp_path):
        """As any published file: what may go wrong with one is tested with the sample set's."""
        server.files[self.PATH] += b"tampered"
        with pytest.raises(GradinvError, match=r"other contents than published; .* put the file at .*tar"):
            load_backbone("resnet50-moco", device="cpu")
        assert self.kept(tmp_path) == []

    def test_an_address_that_is_none_is_refused(self, server, monkeypatch):
        monkeypatch.setenv("GRADINV_MOCO_URL", "mirror/moco.pth.tar")
        with pytest.raises(GradinvError, match="must begin with https://"):
            load_backbone("resnet50-moco", device="cpu")

    def test_a_file_of_another_layout_is_refused(self, server, monkeypatch, resnet18):
        packed = io.BytesIO()
        torch.save({"state_dict": resnet18}, packed)
        self.serve(server, packed.getvalue(), monkeypatch)
        with pytest.raises(GradinvError, match=r"is not a checkpoint of MoCo \(it has no layers encoder_q"):
            load_backbone("resnet50-moco", device="cpu")
