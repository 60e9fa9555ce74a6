"""A weights file: its tensors by name, what it says of itself, and the network that they fit."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn

from gradinv.names import prefixes
from gradinv.paths import ASSETS
from gradinv.types import GradinvError, Preprocessing

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


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name and the file's own metadata; pickled files are read as weights only.

    Raises GradinvError for a file that holds no weights or says of itself what cannot be.
    """
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
        Preprocessing(8, 8, **stated_moments(metadata))
    except ValueError:
        right = False
    if not right:
        raise GradinvError(
            f"{path} cannot be used: of its metadata, image_size has to be 8 to 1024, accuracy a percentage, classes a "
            "list of WordNet ids, and mean and std three numbers each."
        )


def stated_moments(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The mean and the std of a weights file's metadata. Raises GradinvError or ValueError for what is none."""
    return {name: json.loads(metadata[name]) for name in ("mean", "std") if name in metadata}


def guess_architecture(state: Mapping[str, Tensor]) -> str:
    """The network of `_ARCHITECTURES` that shares most parameters, by name and shape, with the file."""

    def fit(arch: str) -> int:
        expected = shapes(arch)
        shared = sum(name in state and state[name].shape == shape for name, shape in expected.items())
        return 2 * shared - len(expected) - len(state)

    return max(_ARCHITECTURES, key=fit)


@cache
def shapes(arch: str) -> dict[str, torch.Size]:
    """Of the network with one class; it takes a fifth of a second to build."""
    with torch.device("meta"):
        return {name: value.shape for name, value in build(arch, 1).state_dict().items()}


def build(arch: str, classes: int) -> nn.Module:
    """torchvision's network of that name with random weights. Raises GradinvError for another than `_ARCHITECTURES`."""
    if arch not in _ARCHITECTURES:
        raise GradinvError(f"The architecture {arch!r} is not supported; take one of {', '.join(_ARCHITECTURES)}.")
    builder: Callable[..., nn.Module] = torchvision.models.get_model_builder(arch)
    return builder(weights=None, num_classes=classes)


def fill(network: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
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


def bundled(name: str, sha256: str) -> dict[str, Tensor]:
    """The tensors of a file of the assets. Raises GradinvError where it is missing or another one."""
    path = ASSETS / "models" / f"{name}.safetensors"
    if not path.is_file():
        raise GradinvError(f"The bundled weights {path} are missing; reinstall or set GRADINV_ASSETS to their folder.")
    if sha256_of(path) != sha256:
        raise GradinvError(f"The bundled weights {path} are damaged (wrong sha256); restore that file.")
    return safetensors.torch.load_file(path)


def sha256_of(path: Path) -> str:
    """The file's digest in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
