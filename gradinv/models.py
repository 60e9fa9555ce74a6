"""Networks whose gradients are shared: bundled, from torchvision, or the user's own weights."""

from __future__ import annotations

import contextlib
import copy
import csv
import hashlib
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeAlias
from urllib.error import URLError
from urllib.parse import urlsplit

import safetensors
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn

from gradinv.downloads import cache_folder, download
from gradinv.names import prefixes
from gradinv.paths import ASSETS, replace_whole
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

MOCO_URL = "https://dl.fbaipublicfiles.com/moco/moco_checkpoints/moco_v2_800ep/moco_v2_800ep_pretrain.pth.tar"
"""Where the MoCo v2 backbone is published, as the README of facebookresearch/moco has it; GRADINV_MOCO_URL names a
mirror."""

# That README states the first 8 of the 32 digits of the file's md5, and nothing else of it is published. They tell a
# damaged or an exchanged file, but would not stop somebody who forges one: it is read as weights only.
_MOCO_MD5 = "a04e12f8"

# The file's size is not published. Both encoders, the queue and the momentum of the optimiser would be 370 MB; whoever
# sends much more sends something else.
_MOCO_MOST = 1_000_000_000

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


# Under which of its keys a checkpoint may hold them, in the order in which they are looked for.
_HELD_UNDER = ("state_dict", "model_state_dict", "model", "net", "network", "state_dict_ema", "model_ema", "weights")


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


@dataclass(frozen=True, eq=False)
class Backbone:
    """A network whose final layer is about to be fitted: the `model` has one, but it may mean nothing.

    `arch` is torchvision's name of it, `origin` says for people where its weights are from.
    """

    model: Model
    arch: str
    origin: str


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
    Raises GradinvError for an unknown name, a weights file that is not
    one or does not fit (naming the layer), a failed download, or a device that is not there.
    """
    target = choose_device(device)
    _check_size(image_size)
    if name == "auto":
        here = target.type == "cuda" and _torchvision_file("resnet50").is_file()
        name = "resnet50" if here else "resnet50-tiny"
        log.info("auto chose %s", name)
    info = MODELS.get(name)
    if info is None:
        model = _from_file(_existing(name), image_size, like)
    elif info.bundled:
        model = _bundled(info, image_size)
    elif info.headless:
        model = _fitted(info, image_size)
    else:
        model = _from_torchvision(info, image_size)
    model.network.eval().to(target)
    return _normalising(model, mean, std)


def load_backbone(
    name: str,
    *,
    device: str | torch.device = "auto",
    image_size: int | None = None,
    mean: Moments = None,
    std: Moments = None,
    progress: Callable[[int, int | None], None] | None = None,
) -> Backbone:
    """What `gradinv head` fits a final layer to: a named model, or a path to weights with or without one.

    A path may also lead to a checkpoint of MoCo, whose query encoder is taken. The published one, `resnet50-moco`, is
    downloaded where it is not at hand; `progress` is then called with the bytes received and the size, where the server
    states it. Raises GradinvError as `load_model` does.
    """
    info = MODELS.get(name)
    if info is not None and not info.headless:
        model = load_model(name, device=device, image_size=image_size, mean=mean, std=std)
        return Backbone(model, info.arch, info.origin)
    target = choose_device(device)
    _check_size(image_size)
    path = _moco_file(progress) if info is not None else _existing(name)
    state, metadata = _read_state(path)
    encoder = {key.removeprefix("encoder_q."): value for key, value in state.items() if key.startswith("encoder_q.")}
    if info is not None and not encoder:
        raise GradinvError(f"{path} is not a checkpoint of MoCo (it has no layers encoder_q.*); remove it.")
    size = image_size or (info.size if info is not None else _size(state, metadata))
    # MoCo's own head, two layers before the contrast, knows no classes and is dropped.
    state = {key: value for key, value in (encoder or state).items() if not key.startswith("fc.")}
    arch = info.arch if info is not None else metadata.get("arch") or _guess_architecture(state)
    network = _build(arch, 1)
    empty = {key: torch.zeros_like(value) for key, value in network.state_dict().items() if key.startswith("fc.")}
    _fill(network, {**state, **empty}, path.name)
    network.eval().to(target)
    model = Model(
        name if info is not None else path.stem,
        network,
        _sha256(path),
        _preprocessing(size, **_stated(metadata)),
        _name_classes(1, {}),
        None,
        normalisation_stated=bool(_stated(metadata)),
    )
    return Backbone(_normalising(model, mean, std), arch, info.origin if info is not None else path.name)


def save_fitted(
    path: Path, backbone: Backbone, weight: Tensor, bias: Tensor, wnids: list[str], accuracy: float, **notes: str
) -> None:
    """Write the backbone with a final layer `weight` (N, D), `bias` (N,) of the classes `wnids` for `load_model`.

    `accuracy` is top-1 in percent; `notes` go into the file's metadata, beside what the backbone is. The file is there
    whole or not at all. Raises GradinvError where it cannot be written.
    """
    model = backbone.model
    state = {key: value.detach().cpu().contiguous() for key, value in model.network.state_dict().items()}
    state |= {f"{model.final}.weight": weight.cpu().contiguous(), f"{model.final}.bias": bias.cpu().contiguous()}
    metadata = {
        "arch": backbone.arch,
        "image_size": str(model.preprocessing.size),
        "mean": json.dumps(model.preprocessing.mean),
        "std": json.dumps(model.preprocessing.std),
        "classes": json.dumps(wnids),
        "accuracy": f"{accuracy:.2f}",
        "backbone": f"{model.name}, {backbone.origin}",
        "backbone_sha256": model.sha256,
        **notes,
    }
    check_writable(path)
    try:
        replace_whole(path, partial(safetensors.torch.save_file, state, metadata=metadata))
    except (OSError, safetensors.SafetensorError) as error:
        raise GradinvError(f"{path} cannot be written ({_reason(error)}); make room there or name another.") from error


def check_writable(path: Path) -> None:
    """Make the folder of a file to be written. Raises GradinvError where it could not be written there."""
    if path.suffix != ".safetensors":
        raise GradinvError(f"The network is written as safetensors; name a file that ends in .safetensors, not {path}.")
    if path.is_dir():
        raise GradinvError(f"{path} is a folder; name a file in it.")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        reason = f"{path.parent} is a file" if path.parent.is_file() else _reason(error)
        raise GradinvError(f"{path} cannot be written ({reason}); name another.") from error


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


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


def _check_size(image_size: int | None) -> None:
    if image_size is not None and not 8 <= image_size <= 1024:
        raise GradinvError(f"The image size must be between 8 and 1024 pixels, not {image_size}.")


def _existing(name: str) -> Path:
    path = Path(name).expanduser()
    if not path.is_file():
        raise GradinvError(f"There is no model or weights file {name!r}; named models are {', '.join(MODELS)}.")
    return path


def _preprocessing(size: int, **moments: Any) -> Preprocessing:
    # 224-px networks are evaluated on the centre of a 256-px picture; small ones on the whole shorter side.
    return Preprocessing(size=size, resize=round(size * 256 / 224) if size >= 160 else size, **moments)


def _stated(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The mean and the std of a weights file's metadata. Raises GradinvError or ValueError for what is none."""
    return {name: json.loads(metadata[name]) for name in ("mean", "std") if name in metadata}


def _normalising(model: Model, mean: Moments, std: Moments) -> Model:
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
        # torch announces the download on the output, which may be for a machine.
        with contextlib.redirect_stdout(sys.stderr):
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


def _moco_file(progress: Callable[[int, int | None], None] | None) -> Path:
    """The published checkpoint in the cache, fetched if it is not there or damaged."""
    import pooch  # slow to import, and needed for nothing else here
    import requests

    pooch.get_logger().setLevel("WARNING")  # it would print the hash that it would like to be told
    url = os.environ.get("GRADINV_MOCO_URL") or MOCO_URL
    if urlsplit(url).scheme not in ("http", "https"):
        raise GradinvError(f"The address in GRADINV_MOCO_URL must begin with https:// or http://, not be {url!r}.")
    path = cache_folder("models") / MOCO_URL.rsplit("/", 1)[-1]
    instead = f"try again later or put the file at {path}"
    fetch = partial(_download_moco, progress=progress)
    try:
        if path.is_file():
            with path.open("rb") as file:
                if hashlib.file_digest(file, "md5").hexdigest().startswith(_MOCO_MD5):
                    return path
            path.unlink()
        # Pooch knows whole hashes only, so the downloader compares what is known of this one.
        return Path(pooch.retrieve(url, None, path.name, path.parent, downloader=fetch))
    except requests.HTTPError as error:
        raise GradinvError(f"The MoCo v2 backbone could not be downloaded ({error}); {instead}.") from error
    except requests.RequestException as error:
        host = urlsplit(url).netloc
        raise GradinvError(
            f"The MoCo v2 backbone could not be downloaded from {host}: no connection; {instead}."
        ) from error
    except OSError as error:
        raise GradinvError(
            f"The MoCo v2 backbone could not be kept in {path.parent} ({_reason(error)}); make room there or set "
            "GRADINV_CACHE."
        ) from error
    except ValueError as error:  # of `_download_moco`
        raise GradinvError(f"The MoCo v2 backbone arrived with other contents than published; {instead}.") from error


def _download_moco(url: str, output: str, _: Any, *, progress: Callable[[int, int | None], None] | None = None) -> None:
    """Pooch's downloader, but one that raises ValueError for what is too large or not what was published."""
    download(url, output, _MOCO_MOST, progress)
    with open(output, "rb") as file:
        found = hashlib.file_digest(file, "md5").hexdigest()
    if not found.startswith(_MOCO_MD5):
        raise ValueError(f"{url} has the md5 {found}")


def _from_file(path: Path, image_size: int | None, like: Preprocessing | None = None) -> Model:
    state, metadata = _read_state(path)
    final = state.get("fc.weight")
    if final is None or final.ndim != 2:
        raise GradinvError(f"{path} {_unfit(state)}.")
    count = final.shape[0]
    arch = metadata.get("arch") or _guess_architecture(state)
    network = _build(arch, count)
    _fill(network, state, path.name)
    size = image_size or _size(state, metadata)
    accuracy = metadata.get("accuracy")
    stated = _stated(metadata)
    return Model(
        path.stem,
        network,
        _sha256(path),
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


def _size(state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int:
    """The side in pixels that a weights file states, or else that of the bundled or ImageNet's networks."""
    tiny = "fc.weight" in state and len(state["fc.weight"]) == len(tiny_classes())
    return int(metadata.get("image_size", 64 if tiny else 224))


def _read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name and the file's own metadata; pickled files are read as weights only."""
    metadata: dict[str, str] = {}
    try:
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
            state = safetensors.torch.load_file(path)
            _check_metadata(path, metadata)
            return _unwrapped(state), metadata
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except GradinvError:
        raise
    except Exception as error:  # the readers raise a dozen types for files that are not weights
        # Both are pickles that are more than tensors, which is what a whole network is saved as.
        whole = "Unsupported global" in str(error) or "TorchScript" in str(error)
        hint = "; of a whole network, save network.state_dict()" if whole else ""
        raise GradinvError(
            f"{path} cannot be read as weights (a .safetensors file or a weights-only .pth is expected){hint}."
        ) from error
    if not isinstance(loaded, Mapping) or not loaded:
        raise GradinvError(f"{path} is not a state dict of tensors.")
    found: Any = next((part for part in (loaded.get(key) for key in _HELD_UNDER) if _is_state(part)), loaded)
    if not _is_state(found):
        keys = ", ".join(str(key) for key in loaded)
        raise GradinvError(f"{path} is not a state dict of tensors, nor holds one; it has the keys {keys:.120}.")
    return _unwrapped({str(name): value for name, value in found.items()}), metadata


def _is_state(part: object) -> bool:
    return isinstance(part, Mapping) and bool(part) and all(isinstance(value, Tensor) for value in part.values())


def _unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefix that all names share, and with a head's only linear layer under the head's own name: what a
    Sequential has beside it, as dropout, does nothing in eval mode."""
    # That of MoCo's encoder is its own.
    *_, prefix = (prefix for prefix in prefixes(state, left=1) if "encoder_q" not in prefix)
    state = {name.removeprefix(prefix): value for name, value in state.items()}
    heads = {match[1] for name in state if (match := re.fullmatch(r"(fc\.\d+)\.\w+", name))}
    if len(heads) == 1 and "fc.weight" not in state:
        state = {re.sub(r"^fc\.\d+\.", "fc.", name): value for name, value in state.items()}
    return state


def _check_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    """Raises GradinvError for what a safetensors file says of itself where that cannot be understood."""
    try:
        size, accuracy = int(metadata.get("image_size", 64)), float(metadata.get("accuracy", 0))
        wnids = json.loads(metadata.get("classes", "[]"))
        right = 8 <= size <= 1024 and 0 <= accuracy <= 100
        right = right and isinstance(wnids, list) and all(isinstance(wnid, str) for wnid in wnids)
        Preprocessing(8, 8, **_stated(metadata))
    except ValueError:
        right = False
    if not right:
        raise GradinvError(
            f"{path} cannot be used: of its metadata, image_size has to be 8 to 1024, accuracy a percentage, classes a "
            "list of WordNet ids, and mean and std three numbers each."
        )


def _guess_architecture(state: Mapping[str, Tensor]) -> str:
    """The network of `_ARCHITECTURES` that shares most parameters, by name and shape, with the file."""

    def fit(arch: str) -> int:
        expected = _shapes(arch)
        shared = sum(name in state and state[name].shape == shape for name, shape in expected.items())
        return 2 * shared - len(expected) - len(state)

    return max(_ARCHITECTURES, key=fit)


@cache
def _shapes(arch: str) -> dict[str, torch.Size]:
    """Of the network with one class; it takes a fifth of a second to build."""
    with torch.device("meta"):
        return {name: value.shape for name, value in _build(arch, 1).state_dict().items()}


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
