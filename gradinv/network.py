"""How a ResNet is put together, from the images up: the only place that knows its parts by name.

A *node* is an activation behind a ReLU. It is called after the module that it comes out of: `maxpool` is the pooled
stem, `layer1.0.conv1` what follows that convolution, its batch normalisation and a ReLU, `layer1.0` the block's output.
Since max pooling and ReLU commute, the pooled stem is a node as well.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import ResNet
from torchvision.models.resnet import BasicBlock, Bottleneck

from gradinv.types import GradinvError

STEM = "maxpool"
"""The lowest node: what comes out of the stem."""

_STAGES = ("layer1", "layer2", "layer3", "layer4")
# What pads a window of the soft maximum: below any activation, and finite, or its product with 0 would be no number.
_NOTHING = -1e4
_SHARPEST = 10.0  # up to here exponentials of a stem's values fit into float32


@dataclass(frozen=True, eq=False)
class Unit:
    """A convolution without bias and the batch normalisation behind it. `name` and `bn_name` are the modules' own."""

    name: str
    conv: nn.Conv2d
    bn_name: str
    bn: nn.BatchNorm2d

    def __call__(self, inputs: Tensor) -> Tensor:
        """(B, C, H, W) → (B, O, H', W'), before any ReLU."""
        return cast(Tensor, self.bn(self.conv(inputs)))

    @property
    def slope(self) -> Tensor:
        """What the batch normalisation multiplies each channel by in eval mode, γ / √(σ² + ε): (O,)."""
        variance = cast(Tensor, self.bn.running_var)
        return (self.bn.weight / (variance + self.bn.eps).sqrt()).detach()

    @property
    def offset(self) -> Tensor:
        """What it then adds, β − μ γ / √(σ² + ε): (O,)."""
        return (self.bn.bias - cast(Tensor, self.bn.running_mean) * self.slope).detach()

    def parameters(self) -> tuple[str, ...]:
        """The names of its parameters."""
        return f"{self.name}.weight", f"{self.bn_name}.weight", f"{self.bn_name}.bias"


@dataclass(frozen=True, eq=False)
class Block:
    """A residual block: `units` one after the other with a ReLU between them, added to the input or to the `shortcut`
    of the input, and a ReLU. Nodes: each unit's output but the last one's, then the block's."""

    name: str
    units: tuple[Unit, ...]
    shortcut: Unit | None

    @property
    def nodes(self) -> tuple[str, ...]:
        """Its nodes, the lowest first."""
        return (*(unit.name for unit in self.units[:-1]), self.name)

    @property
    def all_units(self) -> tuple[Unit, ...]:
        """The units and the shortcut, where there is one."""
        return self.units if self.shortcut is None else (*self.units, self.shortcut)


@dataclass(frozen=True, eq=False)
class Parts:
    """A ResNet in the order in which it computes: the stem's unit, its max pooling, the blocks."""

    stem: Unit
    pool: nn.MaxPool2d
    blocks: tuple[Block, ...]

    @property
    def nodes(self) -> tuple[str, ...]:
        """All nodes, the lowest first."""
        return (STEM, *(node for block in self.blocks for node in block.nodes))

    def node(self, name: str) -> str:
        """The node of that name; a stage's name, such as layer2, is that of its last block's output.

        Raises GradinvError where there is none.
        """
        if name in self.nodes:
            return name
        stage = [block.name for block in self.blocks if block.name.startswith(f"{name}.")]
        if name in _STAGES and stage:
            return stage[-1]
        raise GradinvError(f"The network has no node {name!r}; from the images up it has {', '.join(self.nodes)}.")

    def below(self, upper: str) -> tuple[str, ...]:
        """The names of the parameters that a node depends on, in the network's order."""
        names = list(self.stem.parameters())
        for block in self.blocks if upper != STEM else ():
            for unit in block.all_units:
                names += unit.parameters()
                if unit.name == upper:
                    return tuple(names)
            if block.name == upper:
                break
        return tuple(names)


def parts_of(network: nn.Module) -> Parts:
    """Take a network apart. Raises GradinvError where it is not a ResNet as torchvision builds them."""
    if not isinstance(network, ResNet):
        raise GradinvError(
            f"Layers are solved for torchvision's ResNets, and this network is a {type(network).__name__}; set "
            "boundary to logits or loss."
        )
    stem = _unit(network, "conv1", "bn1")
    blocks = []
    for stage in _STAGES:
        for index, block in enumerate(cast(nn.Sequential, getattr(network, stage))):
            name = f"{stage}.{index}"
            if not isinstance(block, BasicBlock | Bottleneck):
                raise GradinvError(f"The block {name} is a {type(block).__name__}, which no ResNet of torchvision has.")
            count = 3 if isinstance(block, Bottleneck) else 2
            units = tuple(_unit(network, f"{name}.conv{i}", f"{name}.bn{i}") for i in range(1, count + 1))
            skip = f"{name}.downsample"
            shortcut = None if block.downsample is None else _unit(network, f"{skip}.0", f"{skip}.1")
            blocks.append(Block(name, units, shortcut))
    return Parts(stem, cast(nn.MaxPool2d, network.maxpool), tuple(blocks))


def _unit(network: nn.Module, conv: str, bn: str) -> Unit:
    return Unit(conv, cast(nn.Conv2d, network.get_submodule(conv)), bn, cast(nn.BatchNorm2d, network.get_submodule(bn)))


def stage_of(node: str) -> str:
    """The stage that a node lies in, such as layer2; of the stem its own name."""
    return node.partition(".")[0]


def skip_of(block: str) -> str:
    """What a `Segment` calls that which a block's shortcut adds to its output."""
    return f"{block}.skip"


class Segment:
    """The network from the images up to a node, and no further.

    Calling it gives pre-activations: what a node is before its ReLU. They have a derivative also where the unit is off.
    A node within a block is not all that goes on upwards: beside it the shortcut leads past it, see `skip_of`.
    """

    def __init__(self, network: nn.Module, upper: str, nodes: Collection[str] = ()) -> None:
        """upper: where the network is cut; nodes: those below that are wanted as well. Raises GradinvError where the
        network is no ResNet or has no such nodes."""
        self._parts = parts_of(network)
        self.upper = self._parts.node(upper)
        skips = {skip_of(block.name) for block in self._parts.blocks}
        self._skips = skips.intersection(nodes)
        self._wanted = {self.upper, *(self._parts.node(name) for name in set(nodes) - skips)}
        order = self._parts.nodes
        if above := [name for name in self._wanted if order.index(name) > order.index(self.upper)]:
            raise GradinvError(f"The node {above[0]} lies above {self.upper}, where the network is cut.")
        self.parameters = self._parts.below(self.upper)

    def __call__(self, images: Tensor, sharpness: float | None = None) -> Mapping[str, Tensor]:
        """Normalised images (B, 3, S, S) → each wanted node's pre-activations (B, C, H, W), by name.

        With a `sharpness` β the stem's maximum over a window is softened to Σ softmax(β v) v over its values v.
        """
        found: dict[str, Tensor] = {}
        stem = self._parts.stem(images)
        value = self._parts.pool(stem) if sharpness is None else soft_maximum(stem, self._parts.pool, sharpness)
        if self._done(STEM, value, found):
            return found
        value = F.relu(value)
        for block in self._parts.blocks:
            inner = value
            skipped = skip_of(block.name) in self._skips
            if skipped:
                found[skip_of(block.name)] = value if block.shortcut is None else block.shortcut(value)
            for unit in block.units[:-1]:
                inner = unit(inner)
                if self._done(unit.name, inner, found):
                    return found
                inner = F.relu(inner)
            past = found[skip_of(block.name)] if skipped else value if block.shortcut is None else block.shortcut(value)
            value = block.units[-1](inner) + past
            if self._done(block.name, value, found):
                return found
            value = F.relu(value)
        raise AssertionError("The upper node is one of the network's.")

    def _done(self, name: str, value: Tensor, found: dict[str, Tensor]) -> bool:
        if name in self._wanted:
            found[name] = value
        return name == self.upper


def soft_maximum(values: Tensor, pool: nn.MaxPool2d, sharpness: float) -> Tensor:
    """Max pooling with each maximum replaced by Σ softmax(β v) v over its window: (B, C, H, W) → (B, C, H', W').

    A gradient then reaches every value of a window, not only the present maximum; β → ∞ is the maximum itself.
    """
    kernel, stride, padding = (cast(int, getattr(pool, name)) for name in ("kernel_size", "stride", "padding"))
    if sharpness > _SHARPEST:
        padded = F.pad(values, (padding,) * 4, value=_NOTHING)
        windows = padded.unfold(2, kernel, stride).unfold(3, kernel, stride).flatten(4)
        weights = (sharpness * windows).softmax(-1)
        return (weights * windows).sum(-1)
    # As a quotient of two average poolings it takes a seventh of the time. Float32 holds exponents from -80 to 80, of
    # which a channel's largest value takes the last; at the highest sharpness that reaches 16 below it.
    largest = values.detach().amax((2, 3), keepdim=True)
    weights = (sharpness * (values - largest) + 80).clamp(min=-80).exp()
    return F.avg_pool2d(weights * values, kernel, stride, padding) / F.avg_pool2d(weights, kernel, stride, padding)


def node_shapes(network: nn.Module, size: int) -> dict[str, tuple[int, int, int]]:
    """The shape (C, H, W) of each node for images of `size` pixels, the lowest first."""
    found = parts_of(network)
    side = _side(found.pool, _side(found.stem.conv, size))
    shapes = {STEM: (found.stem.conv.out_channels, side, side)}
    for block in found.blocks:
        for unit, node in zip(block.units, block.nodes, strict=True):
            side = _side(unit.conv, side)
            shapes[node] = (unit.conv.out_channels, side, side)
    return shapes


def _side(layer: nn.Conv2d | nn.MaxPool2d, side: int) -> int:
    """Of the square map behind a layer."""
    given = (layer.kernel_size, layer.stride, layer.padding)
    kernel, stride, padding = (value[0] if isinstance(value, tuple) else cast(int, value) for value in given)
    return (side + 2 * padding - kernel) // stride + 1
