"""A network without a final layer, for `gradinv head` to fit one to: from a file, or MoCo's as it is published."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from gradinv import weights
from gradinv.downloads import Progress, address, cache_folder, fetch
from gradinv.models import (
    MODELS,
    Model,
    Moments,
    check_size,
    choose_device,
    existing,
    from_state,
    load_model,
    normalising,
    side_of,
)
from gradinv.paths import reason, replace_whole
from gradinv.types import GradinvError

MOCO_URL = "https://dl.fbaipublicfiles.com/moco/moco_checkpoints/moco_v2_800ep/moco_v2_800ep_pretrain.pth.tar"
"""Where the MoCo v2 backbone is published, as the README of facebookresearch/moco has it; GRADINV_MOCO_URL names a
mirror."""

# That README states the first 8 of the 32 digits of the file's md5, and nothing else of it is published. They tell a
# damaged or an exchanged file, but would not stop somebody who forges one: it is read as weights only.
_MOCO_MD5 = "a04e12f8"

# Both encoders, the queue and the momentum of the optimiser would be 370 MB.
_MOCO_MOST = 1_000_000_000


@dataclass(frozen=True, eq=False)
class Backbone:
    """A network whose final layer is about to be fitted: the `model` has one, but it may mean nothing.

    `arch` is torchvision's name of it, `origin` says for people where its weights are from.
    """

    model: Model
    arch: str
    origin: str


def load_backbone(
    name: str,
    *,
    device: str | torch.device = "auto",
    image_size: int | None = None,
    mean: Moments = None,
    std: Moments = None,
    progress: Progress | None = None,
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
    check_size(image_size)
    path = _moco_file(progress) if info is not None else existing(name)
    state, metadata = weights.read(path)
    encoder = {key.removeprefix("encoder_q."): value for key, value in state.items() if key.startswith("encoder_q.")}
    if info is not None and not encoder:
        raise GradinvError(f"{path} is not a checkpoint of MoCo (it has no layers encoder_q.*); remove it.")
    size = image_size or (info.size if info is not None else side_of(state, metadata))
    # MoCo's own head, two layers before the contrast, knows no classes and is dropped.
    state = {key: value for key, value in (encoder or state).items() if not key.startswith("fc.")}
    arch = info.arch if info is not None else metadata.get("arch") or weights.guess_architecture(state)
    state |= {key: torch.zeros(shape) for key, shape in weights.shapes(arch).items() if key.startswith("fc.")}
    # What else the file states is of the classes that it had.
    stated = {"arch": arch} | {key: metadata[key] for key in ("mean", "std") if key in metadata}
    model = from_state(name if info is not None else path.stem, path, state, stated, size)
    model.network.eval().to(target)
    return Backbone(normalising(model, mean, std), arch, info.origin if info is not None else path.name)


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
        raise GradinvError(f"{path} cannot be written ({reason(error)}); make room there or name another.") from error


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
        why = f"{path.parent} is a file" if path.parent.is_file() else reason(error)
        raise GradinvError(f"{path} cannot be written ({why}); name another.") from error


def _moco_file(progress: Progress | None) -> Path:
    """The published checkpoint in the cache, fetched if it is not there or damaged."""
    path = cache_folder("models") / MOCO_URL.rsplit("/", 1)[-1]
    return fetch(
        address("GRADINV_MOCO_URL", MOCO_URL),
        path,
        ("md5", _MOCO_MD5),
        _MOCO_MOST,
        what="The MoCo v2 backbone",
        instead=f"try again later or put the file at {path}",
        progress=progress,
    )
