"""A prior learned from public pictures: decoders that turn recovered features into a first picture.

Nothing here belongs to the paper. An attacker who uses it has pictures of the same kind as the client's; wherever it is
used, the user is told so.
"""

from __future__ import annotations

import hashlib

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradinv.models import MODELS, Model
from gradinv.paths import ASSETS
from gradinv.types import GradinvError

# By the name of the network whose features they take. assets/SOURCES.md says where they come from.
DECODERS = {
    "resnet50-tiny": "8c59f9833be1c1ddf0899e5bfe605ea4aa54e0f5b4f438dad1e8a18e7b453cff",
    "resnet18-tiny": "afb4f40674cff7554e6c38770695bfb593c12d85ef0053e93fabdd67a5f027f5",
}
SIZE = 64  # pixels a side of what a decoder paints


class Decoder(nn.Module):
    """Pooled features (B, D) → pixels in [0, 1], (B, 3, 64, 64): two linear layers, pixel shuffles from 4 px up."""

    scale: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(1))
        self.fc = nn.Sequential(nn.Linear(features, 384), nn.LeakyReLU(0.1), nn.Linear(384, 8192))
        self.c8 = nn.Conv2d(128, 512, 3, padding=1)
        self.c16 = nn.Conv2d(128, 256, 3, padding=1)
        self.c32 = nn.Conv2d(64, 64, 3, padding=1)
        self.out = nn.Conv2d(64, 12, 3, padding=1)
        self.eval()

    def forward(self, features: Tensor) -> Tensor:
        x = F.leaky_relu(self.fc(features / self.scale), 0.1).view(-1, 512, 4, 4)
        for layer in (self.c8, self.c16, self.c32):
            x = F.leaky_relu(layer(F.pixel_shuffle(x, 2)), 0.1)
        return F.pixel_shuffle(self.out(x), 2).sigmoid()


def has_decoder(model: Model) -> bool:
    """Whether a decoder was trained for exactly these weights, used at the size that it paints."""
    info = MODELS.get(model.name)
    known = info is not None and info.sha256 == model.sha256 and model.name in DECODERS
    return known and model.preprocessing.size == SIZE


def load_decoder(model: Model) -> Decoder:
    """The decoder of a model, on its device, frozen. Raises GradinvError where there is none or its file is bad."""
    if not has_decoder(model):
        raise GradinvError(
            f"There is no decoder for {model.name} at {model.preprocessing.size} px; only {' and '.join(DECODERS)} at "
            f"{SIZE} px have one, so start from noise (start=random)."
        )
    path = ASSETS / "models" / f"{model.name}-decoder.safetensors"
    if not path.is_file():
        raise GradinvError(f"The decoder {path} is missing; reinstall or set GRADINV_ASSETS to its folder.")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != DECODERS[model.name]:
        raise GradinvError(f"The decoder {path} is damaged (wrong sha256); restore that file.")
    decoder = Decoder(model.final_layer.in_features)
    decoder.load_state_dict({name: value.float() for name, value in safetensors.torch.load(data).items()})
    return decoder.requires_grad_(False).to(model.device)


@torch.no_grad()
def preview(model: Model, features: Tensor) -> Tensor:
    """A blurred first picture of each image, from its recovered features: (B, D) → pixels (B, 3, S, S) in [0, 1].

    Raises GradinvError where the model has no decoder.
    """
    pixels: Tensor = load_decoder(model)(features.to(model.device))
    return pixels
