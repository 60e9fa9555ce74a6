"""Networks whose gradients are shared: bundled, from torchvision, or the user's own weights."""

from __future__ import annotations

import contextlib
import copy
import csv
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias
from urllib.error import URLError

import torch
import torchvision
from torch import Tensor, nn

from gradinv import weights
from gradinv.downloads import cache_folder
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
    """What is known of a named model without loading it. `accuracy` is top-1 in percent on validation pictures.

    A `headless` one is published without a final layer: `gradinv head` downloads it and fits one.
    """

    name: str
    description: str
    arch: str
    size: int
    classes: int
    accuracy: float
    origin: str
    sha256: str | None = None
    headless: bool = False

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
            "ResNet-18 at 64 px, 200 ImageNet classes; works offline and on a CPU, three times as fast as ResNet-50",
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
        ModelInfo(
            "resnet50-moco",
            "ResNet-50 at 224 px, trained without labels (MoCo v2, 800 epochs); wants a GPU",
            arch="resnet50",
            size=224,
            classes=1000,
            accuracy=71.1,  # of the linear classifier that its authors fitted
            origin="facebookresearch/moco, downloaded by gradinv head, which fits its final layer",
            headless=True,
        ),
    )
}


@dataclass(frozen=True, eq=False)
class Model:
    """A network in eval mode with what the attacker and the visitor need to know of it.

    `final` names its last linear layer, `accuracy` is top-1 in percent or None where nobody measured it.
    `normalisation_stated` says that mean and std are those that its weights file states.
    """

    name: str
    network: nn.Module
    sha256: str
    preprocessing: Preprocessing
    classes: tuple[ImageClass, ...]
    accuracy: float | None
    final: str = "fc"
    normalisation_stated: bool = False

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

    def differentiable(self) -> Model:
        """This model, or one with a copy of its network where that one's parameters cannot have gradients: they do not
        require any, or were made in inference mode."""
        tensors = [*self.network.parameters(), *self.network.buffers()]
        frozen = not all(parameter.requires_grad for parameter in self.network.parameters())
        if not frozen and not any(tensor.is_inference() for tensor in tensors):
            return self
        return replace(self, network=copy.deepcopy(self.network).requires_grad_())

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

    def at(self, size: int) -> Model:
        """The same network, with the same weights in memory, for pictures of another side in pixels."""
        return self if size == self.preprocessing.size else replace(self, preprocessing=_preprocessing(size))


def choose_device(name: str | torch.device = "auto") -> torch.device:
    """`auto` is a CUDA device where one works, else the CPU. Raises GradinvError for what this machine lacks."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() and _unusable("cuda") is None else "cpu")
    if (reason := _unusable(name)) is not None:
        raise GradinvError(f"The device {name!s} cannot be used here; take cpu or auto.") from reason
    return torch.device(name)


def _unusable(name: str | torch.device) -> Exception | None:
    """What goes wrong there: a GPU may be too old for this build of torch, which is not told before it computes."""
    try:
        (torch.ones(1, device=name) + 1).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        return error
    return None


Moments: TypeAlias = float | Sequence[float] | None
"""A mean or std of pixels in [0, 1]: of each channel, or one for all; None for the network's own."""


def load_model(
    name: str = "auto",
    *,
    device: str | torch.device = "auto",
    image_size: int | None = None,
    mean: Moments = None,
    std: Moments = None,
    like: Preprocessing | None = None,
) -> Model:
    """A named model, `auto`, or a path to the user's own weights.

    `auto` takes `resnet50` where a GPU and its weights are at hand, else `resnet50-tiny`. `image_size` overrides the
    side in pixels at which the network is used, `mean` and `std` what pixels are normalised by (0 and 1: not at all).
    A weights file may state the latter in its metadata; where it does not, they are those of `like`, or ImageNet's.
    Raises GradinvError for an unknown name, a weights file that is none or does not fit (naming the layer), a failed
    download, or a device that is not there.
    """
    target = choose_device(device)
    check_size(image_size)
    if name == "auto":
        here = target.type == "cuda" and _torchvision_file("resnet50").is_file()
        name = "resnet50" if here else "resnet50-tiny"
        log.info("auto chose %s", name)
    info = MODELS.get(name)
    if info is None:
        model = _from_file(existing(name), image_size, like)
    elif info.sha256 is not None:
        state = weights.bundled(info.name, info.sha256)
        model = _named(info, state, info.sha256, image_size, tiny_classes())
    elif info.headless:
        model = _fitted(info, image_size)
    else:
        model = _from_torchvision(info, image_size)
    model.network.eval().to(target)
    return normalising(model, mean, std)


def fitted_file(name: str) -> Path:
    """Where a named headless model lies once its final layer was fitted."""
    return cache_folder("models") / f"{name}.safetensors"


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


def check_size(image_size: int | None) -> None:
    """Raises GradinvError for a side in pixels at which no network is used."""
    if image_size is not None and not 8 <= image_size <= 1024:
        raise GradinvError(f"The image size must be between 8 and 1024 pixels, not {image_size}.")


def existing(name: str) -> Path:
    """The weights file of that path. Raises GradinvError where there is none."""
    path = Path(name).expanduser()
    if not path.is_file():
        raise GradinvError(f"There is no model or weights file {name!r}; named models are {', '.join(MODELS)}.")
    return path


def _preprocessing(size: int, **moments: Any) -> Preprocessing:
    # 224-px networks are evaluated on the centre of a 256-px picture; small ones on the whole shorter side.
    return Preprocessing(size=size, resize=round(size * 256 / 224) if size >= 160 else size, **moments)


def normalising(model: Model, mean: Moments, std: Moments) -> Model:
    """The model with another normalisation. Raises GradinvError where its own weights file states one that differs."""
    told = {name: value for name, value in (("mean", mean), ("std", std)) if value is not None}
    if not told:
        return model
    own, other = model.preprocessing, replace(model.preprocessing, **told)  # type: ignore[arg-type]
    if model.normalisation_stated and not other.normalises_as(own):
        raise GradinvError(
            f"The weights file of {model.name} states mean {own.mean} and std {own.std}, not mean {other.mean} and std "
            f"{other.std}; leave them out, or set those of the file right."
        )
    return replace(model, preprocessing=other)


def _named(
    info: ModelInfo, state: Mapping[str, Tensor], sha256: str, image_size: int | None, classes: tuple[ImageClass, ...]
) -> Model:
    network = weights.build(info.arch, info.classes)
    weights.fill(network, state, info.name)
    return Model(info.name, network, sha256, _preprocessing(image_size or info.size), classes, info.accuracy)


def _torchvision_file(arch: str) -> Path:
    published = torchvision.models.get_model_weights(arch)["IMAGENET1K_V1"]
    return Path(torch.hub.get_dir()) / "checkpoints" / published.url.rsplit("/", 1)[-1]


def _from_torchvision(info: ModelInfo, image_size: int | None) -> Model:
    published = torchvision.models.get_model_weights(info.arch)["IMAGENET1K_V1"]
    path = _torchvision_file(info.arch)
    try:
        # torch announces the download on the output, which may be for a machine.
        with contextlib.redirect_stdout(sys.stderr):
            state = published.get_state_dict(progress=False, check_hash=True)
    except (URLError, OSError, RuntimeError) as error:
        raise GradinvError(
            f"The weights of {info.name} could not be downloaded ({error}); put the file at {path} "
            "or take resnet50-tiny."
        ) from error
    return _named(info, state, weights.sha256_of(path), image_size, imagenet_classes())


def _fitted(info: ModelInfo, image_size: int | None) -> Model:
    path = fitted_file(info.name)
    if not path.is_file():
        raise GradinvError(
            f"{info.name} has no final layer yet; fit one once with `gradinv head --imagenet DIR`, the folder of your "
            "ImageNet pictures."
        )
    model = _from_file(path, image_size)
    # A record of a run knows the classes of a named model by its name, so one of other classes needs another.
    complete = model.classes == imagenet_classes()
    return replace(model, name=info.name if complete else f"{info.name}-{len(model.classes)}")


def _from_file(path: Path, image_size: int | None, like: Preprocessing | None = None) -> Model:
    state, metadata = weights.read(path)
    final = state.get("fc.weight")
    if final is None or final.ndim != 2:
        raise GradinvError(f"{path} {_unfit(state)}.")
    return from_state(path.stem, path, state, metadata, image_size or side_of(state, metadata), like)


def from_state(
    name: str,
    path: Path,
    state: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    size: int,
    like: Preprocessing | None = None,
) -> Model:
    """A model on the CPU, of `size` pixels a side, from a file's tensors and what it says of itself. Where it states no
    mean and std they are those of `like`, or ImageNet's. Raises GradinvError where the tensors do not fit."""
    count = len(state["fc.weight"])
    network = weights.build(metadata.get("arch") or weights.guess_architecture(state), count)
    weights.fill(network, state, path.name)
    accuracy = metadata.get("accuracy")
    stated = weights.stated_moments(metadata)
    return Model(
        name,
        network,
        weights.sha256_of(path),
        _preprocessing(size, **({} if like is None else {"mean": like.mean, "std": like.std}) | stated),
        _name_classes(count, metadata),
        float(accuracy) if accuracy is not None else None,
        normalisation_stated=bool(stated),
    )


def _unfit(state: Mapping[str, Tensor]) -> str:
    """Why the tensors are not those of a ResNet with one final linear layer."""
    if head := sorted({name.rpartition(".")[0] for name in state if name.startswith("fc.")}):
        return f"has no final linear layer fc.weight, but a head of {', '.join(head)}; one linear layer is inverted"
    if "layer1.0.conv1.weight" in state:
        return (
            "has no final linear layer fc.weight; torchvision-style networks are loaded, and gradinv head fits a final "
            "layer to one that lacks it"
        )
    names = list(state)
    shown = f"{names[0]} … {names[-1]}" if len(names) > 1 else "".join(names)
    return f"is not a ResNet as torchvision builds them, which alone are loaded; its layers are {shown:.120}"


def side_of(state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int:
    """The side in pixels that a weights file states, or else that of the bundled or ImageNet's networks."""
    tiny = "fc.weight" in state and len(state["fc.weight"]) == len(tiny_classes())
    return int(metadata.get("image_size", 64 if tiny else 224))


def _name_classes(count: int, metadata: Mapping[str, str]) -> tuple[ImageClass, ...]:
    if "classes" in metadata and len(wnids := json.loads(metadata["classes"])) == count:
        known = {item.wnid: item for item in (*imagenet_classes(), *tiny_classes())}
        return tuple(known.get(wnid, ImageClass(wnid, wnid)) for wnid in wnids)
    for classes in (imagenet_classes(), tiny_classes()):
        if len(classes) == count:
            return classes
    return tuple(ImageClass("", f"class {index}") for index in range(count))
