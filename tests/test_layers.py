"""The way down on small random ResNets, on gradients in double precision unless said."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models import ResNet
from torchvision.models.resnet import BasicBlock, Bottleneck

from gradinv.batchnorm import forward_mode
from gradinv.config import AttackConfig
from gradinv.defenses import parse
from gradinv.models import ImageClass, Model
from gradinv.network import Segment, parts_of
from gradinv.recovery import gates, layers, recover
from gradinv.recovery.convolution import Equations, solve_input
from gradinv.recovery.final_layer import FinalLayer
from gradinv.recovery.gates import Gate, mended_by_bias, mended_by_residual
from gradinv.recovery.last_block import Steps, Unsolved
from gradinv.recovery.layers import solve_layers
from gradinv.types import GradinvError, Observation, Preprocessing, Recovered, SolvedNode

CLASSES = 12
LABELS = [3, 7]
AUTO = AttackConfig(boundary="auto", activations=1.0, gradient=0.0, labels="auto")


def resnet(block: type[BasicBlock | Bottleneck], blocks: list[int], size: int, **changes: Any) -> Model:
    """A random network whose features are zero in about half of the channels, as those of trained ones are."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = ResNet(block, blocks, num_classes=CLASSES, **changes).double()
        network.train()
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1.0  # what is stored is the last batch's
        with torch.no_grad():
            network(torch.randn(8, 3, size, size, dtype=torch.float64))
            # A bias that switches whole channels of the last block off, and logits of a trained network's size.
            last = parts_of(network).blocks[-1]
            last.units[-1].bn.bias -= torch.linspace(-0.5, 2, len(last.units[-1].bn.bias))
            parts_of(network).blocks[-2].units[-1].bn.bias -= torch.linspace(-0.5, 2, len(last.units[-1].bn.bias))
            network.fc.weight *= 5
    network.eval()
    classes = tuple(ImageClass(f"n{i:08d}", f"class {i}") for i in range(CLASSES))
    return Model("random", network, "0" * 64, Preprocessing(size, size), classes, None)


BASIC = (BasicBlock, [1, 1, 2, 2])
BOTTLENECK = (Bottleneck, [1, 1, 1, 2])


def batch(model: Model, labels: list[int], seed: int = 0) -> tuple[Tensor, Observation]:
    """Smooth pictures, normalised (B, 3, S, S), and the gradient of their mean cross-entropy in double precision."""
    size = model.preprocessing.size
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(len(labels), 3, size // 4, size // 4, generator=generator, dtype=torch.float64)
    images = model.preprocessing.normalise(F.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1))
    parameters = dict(model.network.named_parameters())
    loss = F.cross_entropy(model.network(images), torch.tensor(labels))
    gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
    return images, Observation(gradients, len(labels), model.preprocessing, model.name, model.sha256)


def judged(model: Model, images: Tensor) -> tuple[Mapping[str, Tensor], Tensor]:
    """Each node's pre-activations, and by way of them the logits."""
    nodes = parts_of(model.network).nodes
    found = Segment(model.network, nodes[-1], nodes)(images)
    return found, model.network.fc(found[nodes[-1]].relu().mean((2, 3)))


@torch.no_grad()
def truth(model: Model, images: Tensor) -> dict[str, Tensor]:
    return {name: value.relu() for name, value in judged(model, images)[0].items()}


@pytest.fixture(scope="module")
def basic() -> Model:
    return resnet(*BASIC, 64)


@pytest.fixture(scope="module")
def two(basic: Model) -> tuple[Tensor, Observation, Recovered, list[int]]:
    """A batch of two: images, the observation, what is recovered from it, and which image each recovered one is."""
    images, observation = batch(basic, LABELS)
    recovered = recover(basic, observation, AUTO)
    return images, observation, recovered, ordered(recovered)


def ordered(recovered: Recovered, labels: list[int] = LABELS) -> list[int]:
    return [labels.index(label) for label in recovered.labels.tolist()]


def relative(found: Tensor, true: Tensor) -> Tensor:
    return (found.double() - true).flatten(1).norm(dim=1) / true.flatten(1).norm(dim=1)


def paired(recovered: Recovered, true: dict[str, Tensor]) -> list[int]:
    """Which true image each recovered one is, by the highest node: labels may repeat."""
    highest = recovered.nodes[0]
    images = true[highest.name]
    return [int(relative(one.expand_as(images), images).argmin()) for one in highest.activation.double()]


def ends_at_once(model: Model, observation: Observation, why: str) -> None:
    recovered = recover(model, observation, AUTO)
    assert recovered.nodes == () and recovered.features is not None
    assert why in recovered.stopped


@pytest.mark.parametrize(
    ("kind", "size", "labels", "boundary", "scale"),
    [
        (BASIC, 64, [3, 3, 8], "auto", 3),
        (BOTTLENECK, 64, [5, 2], "auto", 1),
        (BASIC, 32, [4, 9], "auto", 1),
        # Of larger ones the layers below take long.
        (BASIC, 128, [3, 7], "layer2.0.conv1", 1),
        (BOTTLENECK, 96, [5, 2], "layer2.0.conv2", 1),
    ],
    ids=["basic 64, repeated labels, rescaled", "bottleneck 64", "basic 32", "basic 128", "bottleneck 96"],
)
def test_layers_are_exact_down_to_where_equations_end(kind, size, labels, boundary, scale):
    model = resnet(*kind, size)
    images, observation = batch(model, labels)
    scaled = {name: scale * value for name, value in observation.gradients.items()}
    recovered = recover(model, replace(observation, gradients=scaled), replace(AUTO, boundary=boundary))
    assert recovered.scale == pytest.approx(scale, rel=1e-5)
    true = truth(model, images)
    order = paired(recovered, true)
    assert sorted(order) == list(range(len(labels)))
    assert [labels[image] for image in order] == recovered.labels.tolist()
    exact = [node for node in recovered.nodes if node.method == "exact"]
    assert len(exact) >= 5
    for node in exact:
        assert relative(node.activation, true[node.name][order]).max() < 1e-6, node.name
        assert node.equations >= node.unknowns
    assert bool(recovered.stopped) == (boundary == "auto")


def test_the_steps_of_a_convolution_lead_from_each_position_to_its_neighbours():
    """∇W of two images on a map of 3 × 4, put together from random cotangents and inputs."""
    height, width = 3, 4
    cotangents = torch.randn(2, 40, height, width, dtype=torch.float64)
    inputs = torch.randn(2, 30, height, width, dtype=torch.float64)
    weight = torch.zeros(40, 30, 3, 3, dtype=torch.float64, requires_grad=True)
    F.conv2d(inputs, weight, padding=1).backward(cotangents)
    assert weight.grad is not None
    steps = Steps(weight.grad, 2 * height * width)
    corner = steps.corner(2)
    true = cotangents[:, :, 0, 0].T
    torch.testing.assert_close(corner @ (corner.T @ true), true)
    for image in cotangents:
        found = steps.from_neighbours(left=image[:, 1, 2], above=image[:, 0, 3])
        torch.testing.assert_close(found, image[:, 1, 3])
        torch.testing.assert_close(steps.from_neighbours(left=None, above=image[:, 1, 0]), image[:, 2, 0])
    with pytest.raises(Unsolved, match="tells 40 positions apart, and the images have 41"):
        Steps(weight.grad, 41)


def test_one_image_is_solved_down_to_the_stem(basic):
    images, observation = batch(basic, [6])
    recovered = recover(basic, observation, AUTO)
    assert [node.name for node in recovered.nodes] == list(parts_of(basic.network).nodes[-2::-1])
    assert relative(recovered.nodes[-1].activation, truth(basic, images)["maxpool"]).max() < 1e-6
    assert "max pooling" in recovered.stopped


def test_cotangents_are_those_of_the_loss(basic, two):
    images, _, recovered, order = two
    found, logits = judged(basic, images)
    loss = F.cross_entropy(logits, torch.tensor(LABELS))
    for node in recovered.nodes:
        (expected,) = torch.autograd.grad(loss, found[node.name], retain_graph=True)
        assert relative(node.cotangent, expected[order]).max() < 1e-5, node.name


@pytest.mark.parametrize(("level", "size"), [(1e-5, 64), (1e-3, 32)])  # at 64 px many masks need mending: it takes long
def test_the_error_is_known_within_a_factor_of_two(basic, level, size):
    model = basic if size == 64 else resnet(*BASIC, size)
    images, observation = batch(model, [3, 7, 1])
    norm = torch.cat([value.flatten() for value in observation.gradients.values()]).std()
    generator = torch.Generator().manual_seed(1)
    noisy = {
        name: value + level * norm * torch.randn(value.shape, generator=generator, dtype=value.dtype)
        for name, value in observation.gradients.items()
    }
    recovered = recover(model, replace(observation, gradients=noisy), AUTO)
    order = ordered(recovered, [3, 7, 1])
    true = truth(model, images)
    exact = [node for node in recovered.nodes if node.method == "exact"]
    assert len(exact) >= 5
    for node in exact:
        ratio = float(node.error.median() / relative(node.activation, true[node.name][order]).median())
        assert 0.4 < ratio < 2.5, (node.name, ratio)


def test_half_precision_gradients_go_far(basic, two):
    images, observation, _, _ = two
    rounded = {name: value.half().double() for name, value in observation.gradients.items()}
    # Below that node it takes long.
    until = replace(AUTO, boundary="layer1.0.conv1")
    recovered = recover(basic, replace(observation, gradients=rounded), until)
    true, order = truth(basic, images), ordered(recovered)
    assert len(recovered.nodes) == 11
    for node in recovered.nodes:
        assert relative(node.activation, true[node.name][order]).median() < 3 * float(node.error.median()) < 1


@pytest.mark.parametrize(("defence", "labels"), [("prune:0.9", [3, 7]), ("quantise:6", [3])])
def test_behind_a_defence_the_way_ends_with_a_sentence_and_tells_its_error(basic, defence, labels):
    """Behind noise: test_as_people_have_them."""
    images, observation = batch(basic, labels)
    recovered = recover(basic, parse(defence)(observation), AUTO)
    assert recovered.stopped and ("set to 0" in recovered.stopped) == defence.startswith("prune")
    true = truth(basic, images)
    for node in recovered.nodes:
        # Labels may be wrong as well, so images are paired by what is nearest.
        images = true[node.name]
        nearest = [float(relative(one.double().expand_as(images), images).min()) for one in node.activation]
        assert sorted(nearest)[len(nearest) // 2] < 4 * float(node.error.median()), node.name


def test_features_without_zeros_are_refused():
    model = resnet(*BASIC, 64)
    with torch.no_grad():
        parts_of(model.network).blocks[-1].units[-1].bn.bias += 30
    ends_at_once(model, batch(model, [3, 7, 1])[1], "exactly 0")


@pytest.mark.parametrize("changes", [{"groups": 2, "width_per_group": 32}, {"replace_stride_with_dilation": (0, 0, 1)}])
def test_grouped_and_dilated_convolutions_are_refused(changes):
    model = resnet(*BOTTLENECK, 32, **changes)
    ends_at_once(model, batch(model, [5])[1], "grouped or dilated")


def test_train_mode_ends_above_batch_normalisation(basic):
    with forward_mode(basic.network, "train"):
        _, observation = batch(basic, LABELS)
    ends_at_once(basic, replace(observation, mode="train"), "train mode")


def test_other_networks_keep_their_features(small_model, observation):
    ends_at_once(small_model, observation, "torchvision's ResNets")


def test_a_node_as_the_boundary_is_reached_or_refused(basic):
    _, observation = batch(basic, [3, 7, 1])
    recovered = recover(basic, observation, replace(AUTO, boundary="layer3"))
    assert recovered.nodes[-1].name == "layer3.1" and recovered.stopped == ""
    with pytest.raises(GradinvError, match="does not determine maxpool"):
        recover(basic, observation, replace(AUTO, boundary="maxpool"))
    with pytest.raises(GradinvError, match="no node"):
        recover(basic, observation, replace(AUTO, boundary="layer3.7"))


def test_the_way_down_can_be_stopped_and_tells_each_node(basic):
    _, observation = batch(basic, [3])
    stop, told = threading.Event(), list[SolvedNode]()

    def progress(node: SolvedNode) -> None:
        told.append(node)
        if len(told) == 3:
            stop.set()

    recovered = recover(basic, observation, AUTO, stop=stop, progress=progress)
    names = ["layer4.1.conv1", "layer4.0", "layer4.0.conv1"]
    assert [node.name for node in recovered.nodes] == [node.name for node in told] == names
    assert "stopped" in recovered.stopped


def test_the_way_ends_above_a_layer_that_memory_does_not_suffice_for(basic, two, monkeypatch):
    free = iter([2**40] * 5 + [2**20] * 9)
    monkeypatch.setattr(layers.psutil, "virtual_memory", lambda: SimpleNamespace(available=next(free)))
    found = recover(basic, two[1], AUTO)
    assert len(found.nodes) == 5
    assert re.fullmatch(r"Solving layer3\.0 takes about [0-9.]+ GiB of memory and 0\.0 GiB are free\.", found.stopped)


def test_what_needs_no_layers_solves_none(basic, monkeypatch):
    _, observation = batch(basic, [3])
    monkeypatch.setattr(sys.modules["gradinv.recovery.recover"], "solve_layers", None)
    assert recover(basic, observation, AttackConfig()).features is None
    assert recover(basic, observation, AttackConfig(boundary="logits")).features is not None


@pytest.fixture(scope="module")
def problem(basic: Model, two: tuple[Tensor, Observation, Recovered, list[int]]) -> tuple[Equations, Gate, Tensor]:
    """The last convolution of layer3 as the client has it: its equations, the gate behind it, its true input."""
    images, observation, _, order = two
    found, logits = judged(basic, images)
    (cotangent,) = torch.autograd.grad(F.cross_entropy(logits, torch.tensor(LABELS)), found["layer3.1"])
    block = next(block for block in parts_of(basic.network).blocks if block.name == "layer3.1")
    on = found["layer3.1"][order] > 0
    # What would pass where a unit is off is not in the cotangent: something of the usual size.
    usual = cotangent[cotangent != 0].abs().median()
    gate = Gate(torch.where(on, cotangent[order], usual), on, torch.full(on.shape, 50.0))
    unit = block.units[-1]
    gradient = observation.gradients[f"{unit.name}.weight"]
    equations = Equations(unit, gate.cotangent * unit.slope.view(-1, 1, 1), gradient)
    return equations, gate, found[block.units[0].name].relu().detach()[order]


def wrong(gate: Gate, equations: Equations, entries: list[tuple[int, int, int, int]]) -> tuple[Gate, Equations]:
    mask, margin = gate.mask.clone(), gate.margin.clone()
    for entry in entries:
        mask[entry] ^= True
        margin[entry] = 5.0
    gate = replace(gate, mask=mask, margin=margin)
    return gate, replace(equations, cotangent=gate.cotangent * equations.unit.slope.view(-1, 1, 1))


def strongest(gate: Gate, count: int) -> list[tuple[int, int, int, int]]:
    """Entries through which much passes, of different channels."""
    sizes, places = gate.full.abs().permute(1, 0, 2, 3).flatten(1).max(1)
    images, _, height, width = gate.full.shape
    found = []
    for channel in sizes.argsort(descending=True)[:count].tolist():
        image, row, column = torch.unravel_index(places[channel], (images, height, width))
        found.append((int(image), channel, int(row), int(column)))
    return found


def test_planted_wrong_mask_entries_are_mended_by_the_residual(problem):
    equations, gate, true = problem
    entries = strongest(gate, 3)
    bad, unexplained = wrong(gate, equations, entries)
    solution = solve_input([unexplained], tuple(true.shape))
    assert {entry[1] for entry in entries} <= set(solution.suspects.nonzero()[:, 0].tolist())
    assert relative(solution.x, true).max() < 1e-6  # the suspects' equations are left out
    mended, turned = mended_by_residual(bad, unexplained, solution.x, solution.suspects)
    assert turned == 3 and torch.equal(mended.mask, gate.mask)


def test_planted_wrong_mask_entries_are_mended_by_the_bias(problem):
    equations, gate, _ = problem
    first, second = strongest(gate, 2)
    neighbour = (1 - second[0], *second[1:])
    bad, _ = wrong(gate, equations, [first, second, neighbour])
    mended, turned = mended_by_bias(bad, gate.cotangent.sum((0, 2, 3)))
    assert turned == 3 and torch.equal(mended.mask, gate.mask)
    same, none = mended_by_bias(gate, gate.cotangent.sum((0, 2, 3)))
    assert none == 0 and torch.equal(same.mask, gate.mask)


def test_rounding_of_a_large_channel_turns_no_entry():
    """Rounding grows with a channel's numbers, and two entries may happen to explain it."""
    generator = torch.Generator().manual_seed(0)
    full = torch.randn(2, 64, 4, 4, generator=generator, dtype=torch.float64)
    full[:, 0] *= 1e3
    mask = torch.rand(full.shape, generator=generator) > 0.5
    mask[0, 0, 0, :2] = False
    rounding = 3e-7 * float((full * mask)[:, 0].abs().sum())
    full[0, 0, 0, 1] = rounding - full[0, 0, 0, 0]
    bias_gradient = (full * mask).sum((0, 2, 3))
    bias_gradient[0] += rounding
    margin = torch.ones_like(full)
    assert mended_by_bias(Gate(full, mask, margin), bias_gradient)[1] == 0
    bias_gradient[0] += full[0, 0, 0, 0]
    mended, turned = mended_by_bias(Gate(full, mask, margin), bias_gradient)
    assert turned == 1
    assert mended.mask[0, 0, 0, 0]


def test_equations_hold_for_the_true_input(basic):
    """The linear form of ∇W, and the pulled-back cotangent, against autograd."""
    for unit in parts_of(basic.network).blocks[2].all_units:  # with a stride: 3 × 3 and 1 × 1
        x = torch.rand(2, unit.conv.in_channels, 6, 6, dtype=torch.float64, requires_grad=True)
        output = unit.conv(x)
        cotangent = torch.randn(output.shape, dtype=torch.float64)
        weight, pulled = torch.autograd.grad(output, [unit.conv.weight, x], cotangent)
        equations = Equations(unit, cotangent, weight)
        columns = x.detach().permute(0, 2, 3, 1).reshape(-1, x.shape[1])
        torch.testing.assert_close(equations.matrix(6, 6) @ columns, equations.right_side())
        torch.testing.assert_close(equations.pulled_back(6, 6), pulled)
        taps = unit.conv.kernel_size[0] ** 2
        assert equations.count(6, 6) == (unit.conv.out_channels * taps if taps > 1 else 18)


def test_the_final_layer_is_refined_to_the_last_digit(basic):
    _, observation = batch(basic, [3, 7, 1])
    layer, labels = FinalLayer(basic, observation), torch.tensor([3, 7, 1])
    fit = layer.fit(labels)
    assert layer.refined(fit, labels).residual <= min(fit.residual, 1e-8)


def test_a_wrong_layer_is_never_called_exact(basic, two, monkeypatch):
    """Where masks cannot be mended, the residual tells."""
    images, observation, _, _ = two
    original = layers.last_gate

    def spoilt(*args):
        gate = original(*args)
        mask = gate.mask.clone()
        mask[:, ::7] ^= True
        return replace(gate, mask=mask, margin=torch.full_like(gate.margin, 1e3))

    monkeypatch.setattr(layers, "last_gate", spoilt)
    monkeypatch.setattr(gates, "_FLIPS", 0)
    fit = FinalLayer(basic, observation).fit(torch.tensor(LABELS))
    nodes, stopped = solve_layers(basic, observation, fit)
    true = truth(basic, images)
    assert stopped
    for node in nodes:
        assert float(relative(node.activation, true[node.name]).median()) < max(3 * float(node.error.median()), 1e-5)
