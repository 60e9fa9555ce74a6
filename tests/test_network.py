from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models import ResNet
from torchvision.models.resnet import BasicBlock, Bottleneck

from gradinv.network import STEM, Segment, node_shapes, parts_of, soft_maximum
from gradinv.types import GradinvError


@pytest.fixture(params=[(BasicBlock, [1, 2, 1, 2]), (Bottleneck, [2, 1, 1, 2])], ids=["basic", "bottleneck"])
def network(request: pytest.FixtureRequest) -> ResNet:
    """A random ResNet with running statistics that are not the defaults."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = ResNet(*request.param, num_classes=7)
        network.train()
        with torch.no_grad():
            network(torch.randn(8, 3, 64, 64))
    return network.eval()


def hooked(network: nn.Module, images: torch.Tensor, name: str) -> torch.Tensor:
    found = []
    handle = network.get_submodule(name).register_forward_hook(lambda _, __, output: found.append(output))
    with torch.no_grad():
        network(images)
    handle.remove()
    return found[0]


def test_every_node_is_the_networks_own(network):
    images = torch.randn(2, 3, 64, 64)
    nodes = parts_of(network).nodes
    with torch.no_grad():
        found = Segment(network, nodes[-1], nodes)(images)
    assert tuple(found) == nodes
    assert nodes[0] == STEM and nodes[-1] == "layer4.1"
    for name, value in found.items():
        expected = hooked(network, images, name)
        if ".conv" in name:
            expected = network.get_submodule(name.replace("conv", "bn"))(expected)
        torch.testing.assert_close(value.relu(), expected.relu())


def test_shapes_are_those_of_a_pass(network):
    nodes = parts_of(network).nodes
    with torch.no_grad():
        found = Segment(network, nodes[-1], nodes)(torch.randn(1, 3, 96, 96))
    assert node_shapes(network, 96) == {name: tuple(value.shape[1:]) for name, value in found.items()}


def test_a_segment_depends_on_the_parameters_that_it_names(network):
    for upper in parts_of(network).nodes:
        segment = Segment(network, upper)
        total = segment(torch.randn(1, 3, 64, 64))[upper].square().sum()
        named = dict(network.named_parameters())
        gradients = torch.autograd.grad(total, list(named.values()), allow_unused=True)
        needed = {name for name, gradient in zip(named, gradients, strict=True) if gradient is not None}
        assert sorted(segment.parameters) == sorted(needed)


def test_a_units_slope_and_offset_are_its_batch_normalisation(network):
    for block in parts_of(network).blocks:
        for unit in block.all_units:
            values = torch.randn(2, unit.conv.out_channels, 3, 3)
            expected = values * unit.slope.view(-1, 1, 1) + unit.offset.view(-1, 1, 1)
            torch.testing.assert_close(unit.bn(values), expected)


def test_the_soft_maximum_becomes_the_maximum(network):
    pool, values = parts_of(network).pool, torch.randn(2, 3, 8, 8, dtype=torch.float64)
    exact = pool(values)
    off = [float((soft_maximum(values, pool, beta) - exact).abs().max()) for beta in (1.0, 10.0, 1000.0)]
    assert off[0] > off[1] > off[2]
    assert off[2] < 1e-2
    # One window by hand: the lower right one of a 2 × 2 map holds all four values.
    four = torch.tensor([[[[0.0, 1.0], [2.0, 3.0]]]])
    weights = (0.5 * four.flatten()).softmax(0)
    assert soft_maximum(four, pool, 0.5).item() == pytest.approx(float((weights * four.flatten()).sum()))


@pytest.mark.parametrize("sharpness", [0.3, 3.0, 10.0])
def test_the_soft_maximum_is_the_same_by_averages_and_by_windows(network, monkeypatch, sharpness):
    pool = parts_of(network).pool
    values = (4 * torch.randn(2, 5, 8, 8)).requires_grad_()
    fast = soft_maximum(values, pool, sharpness).relu()
    monkeypatch.setattr("gradinv.network._SHARPEST", 0.0)
    slow = soft_maximum(values, pool, sharpness).relu()
    torch.testing.assert_close(fast, slow, atol=1e-4, rtol=1e-4)
    cotangent = torch.randn(fast.shape)
    torch.testing.assert_close(
        *(torch.autograd.grad(found, values, cotangent)[0] for found in (fast, slow)), atol=1e-3, rtol=1e-3
    )


def test_stages_stand_for_their_last_block_and_other_names_are_refused(network, small_model):
    assert parts_of(network).node("layer4") == "layer4.1"
    assert parts_of(network).node("layer4.0.conv1") == "layer4.0.conv1"
    for name in ("layer5", "layer1.9", "conv1", ""):
        with pytest.raises(GradinvError, match="has no node"):
            parts_of(network).node(name)
    with pytest.raises(GradinvError, match="lies above"):
        Segment(network, "layer2", ["layer3"])
    with pytest.raises(GradinvError, match="torchvision's ResNets"):
        parts_of(small_model.network)
