from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models import ResNet
from torchvision.models.resnet import BasicBlock, Bottleneck

from gradinv.network import Block, parts_of
from gradinv.recovery import convex
from gradinv.recovery.convex import ConvexSolution, solve_convex
from gradinv.recovery.convex_problem import Layer, layers_of_input, mean_of_input
from gradinv.recovery.convolution import Equations


@dataclass
class Known:
    """A block of a random network with all that is known of it, and its true input."""

    block: Block
    gradients: dict[str, Tensor]
    cotangents: dict[str, Tensor]
    activations: dict[str, Tensor]
    truth: Tensor

    def solve(self, **changes: object) -> ConvexSolution:
        return solve_convex(
            self.equations(),
            layers_of_input(self.block, self.activations),
            tuple(self.truth.shape),
            mean=mean_of_input(self.block, self.activations),
            **changes,  # type: ignore[arg-type]
        )

    def equations(self) -> list[Equations]:
        units = [unit for unit in (self.block.units[0], self.block.shortcut) if unit is not None]
        return [Equations(u, self.cotangents[u.name], self.gradients[f"{u.name}.weight"]) for u in units]

    def errors(self, solution: ConvexSolution) -> Tensor:
        return (solution.x - self.truth).flatten(1).norm(dim=1) / self.truth.flatten(1).norm(dim=1)


@pytest.fixture(scope="module")
def known() -> Callable[..., Known]:
    """Makes a block's equations: a ResNet with random weights, pictures that are smooth, everything in double."""

    def make(kind: type[BasicBlock | Bottleneck], name: str, count: int, size: int = 32) -> Known:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = ResNet(kind, [1, 2, 1, 1], num_classes=10).double()
            pictures = F.interpolate(torch.randn(8 + count, 3, size // 4, size // 4).double(), (size, size))
            pictures = pictures + 0.3 * torch.randn(pictures.shape).double()
        network.train()
        with torch.no_grad():
            for _ in range(20):
                network(pictures[:8])
        network.eval()
        block = next(block for block in parts_of(network).blocks if block.name == name)
        outputs: dict[str, Tensor] = {}
        nodes: dict[str, Tensor] = {}

        def keep(where: dict[str, Tensor], key: str) -> Callable[..., None]:
            return lambda module, inputs, output: where.update({key: output.clone().requires_grad_() * 1})

        def convolved(key: str) -> Callable[..., Tensor]:
            def hook(module: object, inputs: object, output: Tensor) -> Tensor:
                outputs[key] = output
                return output.clone()

            return hook

        handles = [unit.conv.register_forward_hook(convolved(unit.name)) for unit in block.all_units]
        for unit in block.units[:-1]:
            handles.append(unit.bn.register_forward_hook(keep(nodes, unit.name)))
        module = network.get_submodule(name)
        handles.append(module.register_forward_hook(keep(nodes, name)))
        handles.append(module.register_forward_pre_hook(lambda module, inputs: nodes.update(input=inputs[0].clone())))
        loss = F.cross_entropy(network(pictures[8:]), torch.arange(count))
        weights = {f"{unit.name}.weight": unit.conv.weight for unit in block.all_units}
        found = torch.autograd.grad(loss, [*outputs.values(), *weights.values()])
        for handle in handles:
            handle.remove()
        return Known(
            block,
            dict(zip(weights, found[len(outputs) :], strict=True)),
            dict(zip(outputs, found, strict=False)),
            {key: value.detach().relu() for key, value in nodes.items() if key in block.nodes},
            nodes["input"].detach(),
        )

    return make


CASES = [(BasicBlock, "layer2.0"), (BasicBlock, "layer2.1"), (Bottleneck, "layer2.0"), (Bottleneck, "layer2.1")]
IDS = ["basic strided", "basic identity", "bottleneck strided", "bottleneck identity"]


@pytest.mark.parametrize(("kind", "name"), CASES, ids=IDS)
def test_solves_a_block_that_is_determined(known, kind, name):
    case = known(kind, name, 2)
    solution = case.solve()
    assert solution.x.shape == case.truth.shape and solution.x.min() >= 0
    assert solution.equations > solution.unknowns
    true = case.errors(solution)
    assert true.max() < 1e-3
    assert solution.error.shape == (2,) and solution.error.max() < 3e-3
    assert solution.residual < 1e-3


def test_tells_how_much_noise_costs(known):
    case = known(BasicBlock, "layer2.0", 2)
    generator = torch.Generator().manual_seed(1)
    for name, value in case.cotangents.items():
        noise = torch.randn(value.shape, generator=generator, dtype=value.dtype)
        case.cotangents[name] = value * (1 + 0.01 * noise)
    for name, value in case.activations.items():
        noise = torch.randn(value.shape, generator=generator, dtype=value.dtype)
        case.activations[name] = value * (1 + 0.01 * noise)
    solution = case.solve(noise=0.01)
    ratio = solution.error / case.errors(solution)
    assert ratio.min() > 1 / 3 and ratio.max() < 3


@pytest.mark.parametrize("noise", [0, 1e-3])
def test_claims_little_where_equations_are_too_few(known, noise):
    case = known(BasicBlock, "layer2.0", 4)
    for name in ("layer2.0.conv1", "layer2.0.downsample.0"):
        case.cotangents[name][:, 4:] = 0  # as where few channels are alive
        case.gradients[f"{name}.weight"][4:] = 0
    generator = torch.Generator().manual_seed(1)
    for name, value in case.activations.items():
        values = torch.randn(value.shape, generator=generator, dtype=value.dtype)
        case.activations[name] = value * (1 + noise * values)
    solution = case.solve(noise=max(noise, 1e-6))
    assert solution.equations < solution.unknowns
    true = case.errors(solution)
    assert true.min() > 0.02
    ratio = solution.error / true
    assert ratio.min() > 1 / 2 and ratio.max() < 2


def test_cotangents_that_are_wrong_are_seen(known):
    case = known(BasicBlock, "layer2.1", 4)
    for value in case.cotangents.values():
        value[:, 8:] = 0  # too few equations to see it from the gradient alone
    for value in case.gradients.values():
        value[8:] = 0
    generator = torch.Generator().manual_seed(1)
    for key, value in case.cotangents.items():
        kept = torch.rand(value.shape, generator=generator) > 0.1
        case.cotangents[key] = value * kept
    solution = case.solve(iterations=100)
    assert torch.isfinite(solution.x).all()
    true = case.errors(solution)
    assert (true < 1).all() and (solution.error > true / 3).all()


def test_an_event_ends_it_within_an_iteration(known, monkeypatch):
    case = known(BasicBlock, "layer2.0", 2)
    stop, steps = threading.Event(), []
    step = convex._Search.step

    def stopping(search: convex._Search) -> None:
        step(search)
        steps.append(search.count)
        if len(steps) == 3:
            stop.set()

    monkeypatch.setattr(convex._Search, "step", stopping)
    solution = case.solve(stop=stop)
    assert steps == [1, 2, 3]
    assert torch.equal(solution.error, torch.ones(2, dtype=torch.float64))


def test_channels_that_are_settled_stay_and_help(known):
    case = known(BasicBlock, "layer2.1", 8)
    for value in case.cotangents.values():
        value[:, 8:] = 0  # the gradient alone says too little
    for value in case.gradients.values():
        value[8:] = 0
    settled = case.truth.clone()
    settled[:, ::4] = torch.nan
    alone, helped = case.solve(iterations=100), case.solve(iterations=100, settled=settled)
    assert torch.equal(helped.x[:, 1::4], case.truth[:, 1::4])
    rest = (alone.x - case.truth)[:, ::4].norm(), (helped.x - case.truth)[:, ::4].norm()
    assert rest[1] < 0.5 * rest[0]
    assert (helped.error < alone.error).all()


def test_solves_the_inner_node_of_a_bottleneck(known):
    case = known(Bottleneck, "layer2.0", 4)
    unit, node = case.block.units[1], case.activations["layer2.0.conv1"]
    output = case.activations["layer2.0.conv2"]
    case.cotangents[unit.name][:, 26:] = 0
    gradient = case.gradients[f"{unit.name}.weight"]
    gradient[26:] = 0
    layer = Layer(unit, output - unit.offset.view(-1, 1, 1), output > 0)
    equations = Equations(unit, case.cotangents[unit.name], gradient)
    assert equations.gradient[:26, 0].numel() < node[:, 0].numel()  # fewer than unknowns
    solution = solve_convex([equations], [layer], tuple(node.shape))
    true = (solution.x - node).flatten(1).norm(dim=1) / node.flatten(1).norm(dim=1)
    assert true.max() < 0.15
    ratio = solution.error / true
    assert ratio.min() > 1 / 3
