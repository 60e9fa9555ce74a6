"""Networks whose gradients are shared: bundled, from torchvision, or the user's own weights."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.error import URLError

import safetensors
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn

from gradinv.paths import ASSETS
from gradinv.types import GradinvError, Preprocessing

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageClass:
    """A class of the network: its WordNet id (empty where unknown) and the first of its names."""

    wnid: str
    name: str


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a named model without loading it. `accuracy` is top-1 in percent on validation pictures."""

    name: str
    description: str
    arch: str
    size: int
    classes: int
    accuracy: float
    origin: str
    sha256: str | None = None

    @property
    def bundled(self) -> bool:
        """Whether the weights lie in the assets, so that it works offline."""
        return self.sha256 is not None


MODELS = {
    info.name: info
    for info in (
        ModelInfo(
            "resnet50-tiny",
            "ResNet-50 at 64 px, 200 ImageNet classes; works offline and on a CPU",
            arch="resnet50",
            size=64,
            classes=200,
            accuracy=40.2,
            origin="trained for this project on Tiny ImageNet, bundled",
            sha256="795250bd5e048938cea292e7a23b42b2e746ed9c20d3fe82a5c00d12626df7b6",
        ),
        ModelInfo(
            "resnet18-tiny",
            "ResNet-18 at 64 px, the same classes; about three times as fast",
            arch="resnet18",
            size=64,
            classes=200,
            accuracy=44.5,
            origin="trained for this project on Tiny ImageNet, bundled",
            sha256="1e83903529666e10f2987244837eb0d036bb64acae775aa62754c9b13ca77781",
        ),
        ModelInfo(
            "resnet50",
            "ResNet-50 at 224 px, 1000 ImageNet classes; wants a GPU",
            arch="resnet50",
            size=224,
            classes=1000,
            accuracy=76.1,
            origin="torchvision IMAGENET1K_V1, downloaded on first use (98 MB)",
        ),
    )
}

# What a weights file may hold: the networks of torchvision with BN and a final linear layer called fc.
_ARCHITECTURES: tuple[str, ...] = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "wide_resnet50_2",
    "wide_resnet101_2",
)


@dataclass(frozen=True, eq=False)
class Model:
    """A network in eval mode with what the attacker and the visitor need to know of it.

    `final` names its last linear layer, `accuracy` is top-1 in percent or None where nobody measured it.
    """

    name: str
    network: nn.Module
    sha256: str
    preprocessing: Preprocessing
    classes: tuple[ImageClass, ...]
    accuracy: float | None
    final: str = "fc"

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next(self.network.parameters()).device

    @property
    def final_layer(self) -> nn.Linear:
        """The last linear layer, D features → N classes."""
        layer = self.network.get_submodule(self.final)
        if not isinstance(layer, nn.Linear):
            raise GradinvError(f"The layer {self.final} of {self.name} is not a linear layer.")
        return layer

    def class_index(self, wnid: str) -> int | None:
        """The label of a WordNet id, or None where the network does not know that class."""
        return next((i for i, known in enumerate(self.classes) if known.wnid == wnid), None) if wnid else None

    def class_name(self, label: int) -> str:
        """The first name of a label's class."""
        return self.classes[label].name

    @torch.no_grad()
    def predict(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, S, S) in [0, 1] → the network's own labels (B,), int64, on the CPU."""
        logits: Tensor = self.network(self.preprocessing.normalise(pixels.to(self.device)))
        return logits.argmax(1).cpu()


def choose_device(name: str | torch.device = "auto") -> torch.device:
    """`auto` is a CUDA device where one works, else the CPU. Raises GradinvError for what this machine lacks."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise GradinvError(f"The device {name!s} cannot be used here; take cpu or auto.") from error
    return device


def load_model(name: str = "auto", *, device: str | torch.device = "auto", image_size: int | None = None) -> Model:
    """A named model, `auto`, or a path to the user's own weights.

    `auto` takes `resnet50` where a GPU and its weights are at hand, else `resnet50-tiny`. `image_size` overrides the
    side in pixels at which the network is used. Raises GradinvError for an unknown name, a weights file that is not
    one or does not fit (naming the layer), a failed download, or a device that is not there.
    """
    target = choose_device(device)
    if image_size is not None and not 8 <= image_size <= 1024:
        raise GradinvError(f"The image size must be between 8 and 1024 pixels, not {image_size}.")
    if name == "auto":
        here = target.type == "cuda" and _torchvision_file("resnet50").is_file()
        name = "resnet50" if here else "resnet50-tiny"
        log.info("auto chose %s", name)
    info = MODELS.get(name)
    if info is None:
        path = Path(name).expanduser()
        if not path.is_file():
            raise GradinvError(f"There is no model or weights file {name!r}; named models are {', '.join(MODELS)}.")
        model = _from_file(path, image_size)
    elif info.bundled:
        model = _bundled(info, image_size)
    else:
        model = _from_torchvision(info, image_size)
    model.network.eval().to(target)
    return model


def imagenet_classes() -> tuple[ImageClass, ...]:
    """The 1000 ImageNet classes in the networks' order."""
    return _read_classes(ASSETS / "imagenet-samples.csv")


def tiny_classes() -> tuple[ImageClass, ...]:
    """The 200 classes of the bundled models in their order."""
    return _read_classes(ASSETS / "tiny-imagenet-classes.csv")


@cache
def _read_classes(path: Path) -> tuple[ImageClass, ...]:
    with path.open(newline="", encoding="utf-8") as file:
        return tuple(ImageClass(row["wnid"], row["name"].split(",")[0].strip()) for row in csv.DictReader(file))


def _preprocessing(size: int) -> Preprocessing:
    # 224-px networks are evaluated on the centre of a 256-px picture; small ones on the whole shorter side.
    return Preprocessing(size=size, resize=round(size * 256 / 224) if size >= 160 else size)


def _bundled(info: ModelInfo, image_size: int | None) -> Model:
    path = ASSETS / "models" / f"{info.name}.safetensors"
    if not path.is_file():
        raise GradinvError(f"The bundled weights {path} are missing; reinstall or set GRADINV_ASSETS to their folder.")
    sha256 = _sha256(path)
    if sha256 != info.sha256:
        raise GradinvError(f"The bundled weights {path} are damaged (wrong sha256); restore that file.")
    network = _build(info.arch, info.classes)
    _fill(network, safetensors.torch.load_file(path), path.name)
    return Model(info.name, network, sha256, _preprocessing(image_size or info.size), tiny_classes(), info.accuracy)


def _torchvision_file(arch: str) -> Path:
    weights = torchvision.models.get_model_weights(arch)["IMAGENET1K_V1"]
    return Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[-1]


def _from_torchvision(info: ModelInfo, image_size: int | None) -> Model:
    weights = torchvision.models.get_model_weights(info.arch)["IMAGENET1K_V1"]
    path = _torchvision_file(info.arch)
    try:
        state = weights.get_state_dict(progress=False, check_hash=True)
    except (URLError, OSError, RuntimeError) as error:
        raise GradinvError(
            f"The weights of {info.name} could not be downloaded ({error}); put the file at {path} "
            "or take resnet50-tiny."
        ) from error
    network = _build(info.arch, info.classes)
    _fill(network, state, info.name)
    return Model(
        info.name,
        network,
        _sha256(path),
        _preprocessing(image_size or info.size),
        imagenet_classes(),
        info.accuracy,
    )


def _from_file(path: Path, image_size: int | None) -> Model:
    state, metadata = _read_state(path)
    final = state.get("fc.weight")
    if final is None or final.ndim != 2:
        raise GradinvError(
            f"{path} has no final linear layer fc.weight; only torchvision-style networks can be loaded."
        )
    count = final.shape[0]
    arch = metadata.get("arch") or _guess_architecture(state)
    network = _build(arch, count)
    _fill(network, state, path.name)
    size = image_size or int(metadata.get("image_size", 64 if count == len(tiny_classes()) else 224))
    accuracy = metadata.get("accuracy")
    return Model(
        path.stem,
        network,
        _sha256(path),
        _preprocessing(size),
        _name_classes(count, metadata),
        float(accuracy) if accuracy is not None else None,
    )


def _read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name and the file's own metadata; pickled files are read as weights only."""
    metadata: dict[str, str] = {}
    try:
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
            return safetensors.torch.load_file(path), metadata
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers raise a dozen types for files that are not weights
        raise GradinvError(
            f"{path} cannot be read as weights (a .safetensors file or a weights-only .pth is expected)."
        ) from error
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise GradinvError(f"{path} is not a state dict of tensors.")
    return {str(name).removeprefix("module."): value for name, value in loaded.items()}, metadata


def _guess_architecture(state: Mapping[str, Tensor]) -> str:
    """The network of `_ARCHITECTURES` that shares most parameters, by name and shape, with the file."""

    def fit(arch: str) -> int:
        with torch.device("meta"):
            expected = _build(arch, 1).state_dict()
        shared = sum(name in state and state[name].shape == value.shape for name, value in expected.items())
        return 2 * shared - len(expected) - len(state)

    return max(_ARCHITECTURES, key=fit)


def _build(arch: str, classes: int) -> nn.Module:
    if arch not in _ARCHITECTURES:
        raise GradinvError(f"The architecture {arch!r} is not supported; take one of {', '.join(_ARCHITECTURES)}.")
    builder: Callable[..., nn.Module] = torchvision.models.get_model_builder(arch)
    return builder(weights=None, num_classes=classes)


def _fill(network: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load into float32. Raises GradinvError naming the first layer that is missing, unknown, misshapen or NaN."""
    expected = {k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    given = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    for name, value in expected.items():
        if name not in given:
            raise GradinvError(f"{source} does not fit: it lacks the layer {name}.")
        if given[name].shape != value.shape:
            shapes = f"{tuple(given[name].shape)} instead of {tuple(value.shape)}"
            raise GradinvError(f"{source} does not fit: layer {name} has the shape {shapes}.")
        if not torch.isfinite(given[name]).all():
            raise GradinvError(f"{source} cannot be used: layer {name} holds values that are not finite.")
    if unknown := sorted(set(given) - set(expected)):
        raise GradinvError(f"{source} does not fit: it has a layer {unknown[0]} that the network lacks.")
    network.load_state_dict({name: value.float() for name, value in given.items()}, strict=False)


def _name_classes(count: int, metadata: Mapping[str, str]) -> tuple[ImageClass, ...]:
    known = {item.wnid: item for item in (*imagenet_classes(), *tiny_classes())}
    if "classes" in metadata:
        wnids = json.loads(metadata["classes"])
        if len(wnids) == count:
            return tuple(known.get(wnid, ImageClass(wnid, wnid)) for wnid in wnids)
    for classes in (imagenet_classes(), tiny_classes()):
        if len(classes) == count:
            return classes
    return tuple(ImageClass("", f"class {index}") for index in range(count))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
