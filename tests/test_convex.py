from __future__ import annotations

import functools
import threading
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models import ResNet
from torchvision.models.resnet import BasicBlock, Bottleneck

from gradinv.network import Block, Segment, parts_of
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

    def silence(self, first: int, *names: str) -> None:
        """No gradient passes through these units' channels from `first` on, as where few channels are alive."""
        for name in names or self.cotangents:
            self.cotangents[name][:, first:] = 0
            self.gradients[f"{name}.weight"][first:] = 0


def noisy(values: dict[str, Tensor], level: float) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    noise = {k: torch.randn(v.shape, generator=generator, dtype=v.dtype) for k, v in values.items()}
    return {name: value * (1 + level * noise[name]) for name, value in values.items()}


@functools.cache
def network_and_noise(kind: type[BasicBlock | Bottleneck]) -> tuple[ResNet, Tensor]:
    """A ResNet with random weights, everything in double, and the random state that pictures are drawn from."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = ResNet(kind, [1, 2, 1, 1], num_classes=10).double()
        network.train()
        with torch.no_grad():
            for _ in range(20):
                network(smooth(8))
        return network.eval(), torch.get_rng_state()


def smooth(count: int) -> Tensor:
    coarse = F.interpolate(torch.randn(count, 3, 8, 8).double(), (32, 32))
    return coarse + 0.3 * torch.randn(coarse.shape).double()


def known(kind: type[BasicBlock | Bottleneck], name: str, count: int) -> Known:
    """A block with its equations, of smooth pictures."""
    network, state = network_and_noise(kind)
    with torch.random.fork_rng():
        torch.set_rng_state(state)
        pictures = smooth(count)
    blocks, nodes = parts_of(network).blocks, parts_of(network).nodes
    index = [block.name for block in blocks].index(name)
    block = blocks[index]
    found = Segment(network, nodes[-1], nodes)(pictures)
    loss = F.cross_entropy(network.fc(found[nodes[-1]].relu().mean((2, 3))), torch.arange(count))
    behind = {unit: found[unit.name] for unit in block.units[:-1]} | {block.units[-1]: found[name]}
    if block.shortcut is not None:
        behind[block.shortcut] = found[name]
    derived = torch.autograd.grad(loss, [*behind.values(), *(unit.conv.weight for unit in behind)])
    return Known(
        block,
        {f"{unit.name}.weight": value for unit, value in zip(behind, derived[len(behind) :], strict=True)},
        {unit.name: value * unit.slope.view(-1, 1, 1) for unit, value in zip(behind, derived, strict=False)},
        {node: found[node].detach().relu() for node in block.nodes},
        found[blocks[index - 1].name].detach().relu(),
    )


CASES = [(BasicBlock, "layer2.0"), (BasicBlock, "layer2.1"), (Bottleneck, "layer2.0"), (Bottleneck, "layer2.1")]


@pytest.mark.parametrize(("kind", "name"), CASES, ids=lambda part: getattr(part, "__name__", part))
def test_solves_a_block_that_is_determined(kind, name):
    case = known(kind, name, 2)
    solution = case.solve()
    assert solution.x.shape == case.truth.shape and solution.x.min() >= 0
    assert solution.equations > solution.unknowns
    assert case.errors(solution).max() < 1e-3
    assert solution.error.shape == (2,) and solution.error.max() < 3e-3
    assert solution.residual < 1e-3


def test_tells_how_much_noise_costs():
    case = known(BasicBlock, "layer2.0", 2)
    case.cotangents, case.activations = noisy(case.cotangents, 0.01), noisy(case.activations, 0.01)
    solution = case.solve(noise=0.01)
    ratio = solution.error / case.errors(solution)
    assert ratio.min() > 1 / 3 and ratio.max() < 3


@pytest.mark.parametrize("noise", [0, 1e-3])
def test_claims_little_where_equations_are_too_few(noise):
    case = known(BasicBlock, "layer2.0", 4)
    case.silence(4, "layer2.0.conv1", "layer2.0.downsample.0")
    case.activations = noisy(case.activations, noise)
    solution = case.solve(noise=max(noise, 1e-6))
    assert solution.equations < solution.unknowns
    true = case.errors(solution)
    assert true.min() > 0.02
    ratio = solution.error / true
    assert ratio.min() > 1 / 2 and ratio.max() < 2


def test_cotangents_that_are_wrong_are_seen():
    case = known(BasicBlock, "layer2.1", 4)
    case.silence(8)  # too few equations to see it from the gradient alone
    generator = torch.Generator().manual_seed(1)
    for value in case.cotangents.values():
        value *= torch.rand(value.shape, generator=generator) > 0.1
    solution = case.solve(iterations=100)
    true = case.errors(solution)
    assert (true < 1).all() and (solution.error > true / 3).all()


def test_an_event_ends_it_within_an_iteration(monkeypatch):
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


def test_channels_that_are_settled_stay_and_help():
    case = known(BasicBlock, "layer2.1", 8)
    case.silence(8)  # the gradient alone says too little
    settled = case.truth.clone()
    settled[:, ::4] = torch.nan
    alone, helped = case.solve(iterations=100), case.solve(iterations=100, settled=settled)
    assert torch.equal(helped.x[:, 1::4], case.truth[:, 1::4])
    rest = (alone.x - case.truth)[:, ::4].norm(), (helped.x - case.truth)[:, ::4].norm()
    assert rest[1] < 0.5 * rest[0]
    assert (helped.error < alone.error).all()


def test_solves_the_inner_node_of_a_bottleneck():
    case = known(Bottleneck, "layer2.0", 4)
    unit, output = case.block.units[1], case.activations["layer2.0.conv2"]
    case.silence(26, unit.name)
    case.truth = case.activations["layer2.0.conv1"]
    layer = Layer(unit, output - unit.offset.view(-1, 1, 1), output > 0)
    equations = Equations(unit, case.cotangents[unit.name], case.gradients[f"{unit.name}.weight"])
    assert equations.gradient[:26, 0].numel() < case.truth[:, 0].numel()  # fewer than unknowns
    solution = solve_convex([equations], [layer], tuple(case.truth.shape))
    true = case.errors(solution)
    assert true.max() < 0.15 and (solution.error / true).min() > 1 / 3
