"""A prior learned from public pictures: decoders that paint a picture from what was solved of it.

A `Painter` takes the activations of a node that the layers' equations give, a `Decoder` the pooled features, which are
all that is left where a changed gradient determines no layer. Nothing here belongs to the paper. An attacker who uses
it has pictures of the same kind as the client's; wherever it is used, the user is told so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradinv.models import MODELS, Model
from gradinv.network import node_shapes
from gradinv.types import GradinvError, Recovered, SolvedNode
from gradinv.weights import bundled

# By the name of the network whose features they take. assets/SOURCES.md says where they come from.
DECODERS = {
    "resnet50-tiny": "8c59f9833be1c1ddf0899e5bfe605ea4aa54e0f5b4f438dad1e8a18e7b453cff",
    "resnet18-tiny": "afb4f40674cff7554e6c38770695bfb593c12d85ef0053e93fabdd67a5f027f5",
}
# By the network's name and the node whose activations they take.
PAINTERS: dict[str, dict[str, str]] = {
    "resnet50-tiny": {
        "layer2.3": "42bf44ac99155234bd63922677b026d91e3a6bdb4610780c67babd984cbb711a",
        "layer1.2": "c4035824141d56cdc0a096975990830db8cf2ce038b7c998d82a766a2a585976",
    },
    "resnet18-tiny": {
        "layer3.1": "364475ded5318314cc5f69232cd66e101e16516c4021d6317785391d22a3f5eb",
        "layer2.1": "f8f93da1802819474a77ee5ab16118ffd9e715805dd35312c8771ffa4ca44551",
        "layer1.1": "7582b244e2fa163e5558ceb988a4577efb745e35510a7c4fc58655b20a711021",
    },
}
TRUSTED = 0.25
"""The relative error up to which activations are painted from, as the median over the images."""
FEATURES = "features"
"""What a picture is said to be painted from where it is the pooled features."""
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


class Painter(nn.Module):
    """Activations of a node (B, C, H, W) → pixels (B, 3, f H, f W), f = 2^n the node's stride: residual blocks of 3×3
    convolutions at each resolution, pixel shuffles between them. Convolutions only, so that it takes maps of any size.
    """

    # By n: channels and residual blocks at each resolution, the coarsest first, the finest that of half a picture.
    PLANS: ClassVar = {2: ((112, 48), (2, 1)), 3: ((160, 96, 48), (2, 1, 1)), 4: ((224, 128, 80, 48), (2, 1, 1, 1))}

    scale: Tensor

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        widths, blocks = self.PLANS[stride.bit_length() - 1]
        # The root mean square of each channel over the training pictures.
        self.register_buffer("scale", torch.ones(channels))
        layers: list[nn.Module] = [nn.Conv2d(channels, widths[0], 1)]
        for index, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            if index:
                layers += [nn.Conv2d(widths[index - 1], 4 * width, 1), nn.PixelShuffle(2)]
            layers += [_Residual(width) for _ in range(count)]
        layers += [nn.LeakyReLU(0.1), nn.Conv2d(widths[-1], 12, 3, padding=1), nn.PixelShuffle(2)]
        self.layers = nn.Sequential(*layers)
        self.eval()

    def forward(self, activations: Tensor) -> Tensor:
        """What is painted is not clamped to [0, 1]."""
        painted: Tensor = self.layers(activations / self.scale[:, None, None])
        return painted


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        with torch.no_grad():
            self.second.weight.mul_(0.1)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.leaky_relu(self.first(F.leaky_relu(x, 0.1)), 0.1)
        return x + cast(Tensor, self.second(inner))


def _trained_for(model: Model) -> bool:
    """Whether these are exactly the weights of the network of that name."""
    info = MODELS.get(model.name)
    return info is not None and info.sha256 == model.sha256


def _load(network: nn.Module, file: str, sha256: str, model: Model) -> None:
    """Its trained weights, frozen, on the model's device. Raises GradinvError where the file is bad."""
    network.load_state_dict(bundled(file, sha256))
    network.requires_grad_(False).to(model.device)


def load_decoder(model: Model) -> Decoder:
    """The decoder of a model, on its device, frozen. Raises GradinvError where there is none or its file is bad."""
    if not _trained_for(model) or model.name not in DECODERS or model.preprocessing.size != SIZE:
        raise GradinvError(
            f"There is no decoder for {model.name} at {model.preprocessing.size} px; only {' and '.join(DECODERS)} at "
            f"{SIZE} px have one, so start from noise (start=random)."
        )
    decoder = Decoder(model.final_layer.in_features)
    _load(decoder, f"{model.name}-decoder", DECODERS[model.name], model)
    return decoder


@dataclass(frozen=True, eq=False)
class Painting:
    """What a learned prior makes of each image: pixels (B, 3, S, S) in [0, 1], painted from the activations of `node`
    or from the pooled FEATURES."""

    node: str
    pixels: Tensor


def painted_from(model: Model, recovered: Recovered) -> SolvedNode | None:
    """The node that a picture is painted from: the lowest that there is a painter for and that is known well enough.
    None where there is none."""
    known = PAINTERS.get(model.name, {}) if _trained_for(model) else {}
    usable = [node for node in recovered.nodes if node.name in known and node.typical_error <= TRUSTED]
    return usable[-1] if usable else None


@torch.no_grad()
def paint(model: Model, node: str, activations: Tensor) -> Tensor:
    """What the painter of a node makes of its activations (B, C, H, W): pixels (B, 3, S, S) in [0, 1].

    Raises GradinvError where the painter's file is bad.
    """
    given = activations.to(model.device, torch.float32).nan_to_num(0.0, 0.0, 0.0)
    channels, side, _ = node_shapes(model.network, SIZE)[node]
    painter = Painter(channels, SIZE // side)
    _load(painter, f"{model.name}-painter-{node}", PAINTERS[model.name][node], model)
    painted = [painter(part.contiguous(memory_format=torch.channels_last)) for part in given.split(8)]
    size = model.preprocessing.size
    # Where the picture's side is no multiple of the node's stride, what is painted reaches beyond it.
    return torch.cat(painted)[..., :size, :size].clamp(0, 1).contiguous()


def painting(model: Model, recovered: Recovered) -> Painting | None:
    """From the node that it is `painted_from`, else from the features; None where these are not known either.

    Raises GradinvError where the model has no decoder.
    """
    if (node := painted_from(model, recovered)) is not None:
        return Painting(node.name, paint(model, node.name, node.activation))
    if recovered.features is None:
        return None
    return Painting(FEATURES, preview(model, recovered.features))


@torch.no_grad()
def preview(model: Model, features: Tensor) -> Tensor:
    """A blurred first picture of each image, from its recovered features: (B, D) → pixels (B, 3, S, S) in [0, 1].

    Raises GradinvError where the model has no decoder.
    """
    pixels: Tensor = load_decoder(model)(features.to(model.device))
    return pixels
