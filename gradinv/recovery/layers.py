"""The way down: layer by layer from the pooled features towards the images, each a linear problem."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import psutil
import torch
from torch import Tensor

from gradinv.models import Model
from gradinv.network import STEM, Block, Unit, node_shapes, parts_of
from gradinv.recovery.convex import solve_convex
from gradinv.recovery.convex_problem import Layer, layers_of_input, mean_of_input
from gradinv.recovery.convolution import Equations, Known, Solution, affine, solve_input
from gradinv.recovery.final_layer import COMPUTED, Fit, rounding
from gradinv.recovery.gates import Gate, gate, mended_by_bias, mended_by_residual
from gradinv.recovery.last_block import Pooled, Unsolved, last_gate
from gradinv.types import Observation, SolvedNode

_USELESS = 0.5  # a node whose typical image has a larger relative error is not said to be solved
_TOO_ROUGH = 0.1  # below a node with a larger one the masks are guesses, and nothing is solved
# Where a solution of fewer equations for each unknown has a larger error than this, the layers' own are taken as well.
_AMPLE, _FINE = 1.5, 1e-3
# A gradient of at least so many numbers, of which at least this share is 0, may be pruned.
_COUNTED, _PRUNED = 1000, 0.02
_CROSSTALK = 0.1  # the share of the cotangents' relative error that reaches values which should be 0
_ROUNDING = 4e-7  # the relative error of what float32 gradients give at the best
_STOPPED = "The way down was stopped."
_ITERATIONS = 3200  # of the convex search, shared out among the images
_LIKE_ABOVE = 3.0  # a residual this many times as large as those above comes of a wrong equation
_ROUNDS = 3  # of mending masks and solving again


def solve_layers(
    model: Model,
    observation: Observation,
    fit: Fit,
    *,
    until: str | None = None,
    stop: threading.Event | None = None,
    progress: Callable[[SolvedNode], None] | None = None,
) -> tuple[tuple[SolvedNode, ...], str]:
    """Solve the network's nodes from the last block downwards, as far as the gradient determines them.

    fit: the final layer's solution, in whose order the images stay; until: the lowest node that is wanted, None for as
    many as there are. `progress` is called with each node, `stop` ends the way
    between two, or within an iteration of the convex step. → the nodes, the highest
    first, float32 on the model's device, and a sentence that says why there are no more ("" where `until` was reached).
    Computed in float64 on the CPU. Raises GradinvError where the network has no such node.
    """
    lowest = None if until is None else parts_of(model.network).node(until)
    if observation.mode != "eval":
        return (), "In train mode batch normalisation mixes the images, so no layer below the final one is linear."
    for unit in (unit for block in parts_of(model.network).blocks for unit in block.all_units):
        if unit.conv.groups != 1 or unit.conv.dilation != (1, 1):
            return (), f"{unit.name} is a grouped or dilated convolution, of which the layers' equations do not hold."
    way = _Way(model, observation, fit, stop or threading.Event())
    try:
        for node in way.down():
            if progress is not None:
                progress(node)
            if node.name == lowest:
                return way.nodes(), ""
            if way.stop.is_set():
                return way.nodes(), _STOPPED
    except Unsolved as error:
        return way.nodes(), _STOPPED if way.stop.is_set() else f"{error}."
    return way.nodes(), "Below the stem's max pooling nothing is linear."


@dataclass(frozen=True, eq=False)
class _Step:
    """One convolution on the way, the node that is its input, and the bias of the batch normalisation in front of that
    node, None for the stem, where the max pooling lies between."""

    block: Block
    unit: Unit
    node: str
    bias: str | None

    @property
    def first(self) -> bool:
        """Whether it is the block's first: its input is also the skip's."""
        return self.unit is self.block.units[0]

    @property
    def last(self) -> bool:
        """Whether its output goes into the block's output."""
        return self.unit is self.block.units[-1]


class _Way:
    """Where the way down stands: `_gate` is that of the node above, `_outer` that of the block's output."""

    def __init__(self, model: Model, observation: Observation, fit: Fit, stop: threading.Event) -> None:
        self.stop = stop
        self._model = model
        self._observation = observation
        self._fit = fit
        self._shapes = node_shapes(model.network, model.preprocessing.size)
        self._solved: list[SolvedNode] = []
        self._taken: dict[str, Tensor] = {}  # gradients as the present step has taken them

    def nodes(self) -> tuple[SolvedNode, ...]:
        """What is solved so far, on the model's device."""
        device = self._model.device
        return tuple(
            replace(
                node,
                activation=node.activation.float().to(device),
                cotangent=None if node.cotangent is None else node.cotangent.float().to(device),
                error=node.error.float(),
            )
            for node in self._solved
        )

    def _by_name(self) -> dict[str, SolvedNode]:
        return {node.name: node for node in self._solved}

    def down(self) -> Iterator[SolvedNode]:
        """Each node as it is solved. Raises Unsolved where the way ends."""
        self._gate = self._outer = self._top()
        for step in self._steps():
            began = time.perf_counter()
            self._taken.clear()
            if step.last:
                self._outer = self._gate
            node = self._solve(step)
            self._solved.append(replace(node, seconds=time.perf_counter() - began))
            yield self._solved[-1]
            if node.typical_error > _TOO_ROUGH:
                error = 100 * node.typical_error
                raise Unsolved(f"{node.name} is known to {error:.0f} % only, too rough to go on below it")

    def _steps(self) -> Iterator[_Step]:
        blocks = parts_of(self._model.network).blocks
        for index in range(len(blocks) - 1, -1, -1):
            block, below = blocks[index], blocks[index - 1] if index else None
            for place in range(len(block.units) - 1, 0, -1):
                lower = block.units[place - 1]
                yield _Step(block, block.units[place], lower.name, f"{lower.bn_name}.bias")
            bias = None if below is None else f"{below.units[-1].bn_name}.bias"
            yield _Step(block, block.units[0], STEM if below is None else below.name, bias)

    def _top(self) -> Gate:
        """The mask of the last block, from the features."""
        block = parts_of(self._model.network).blocks[-1]
        _, height, width = self._shapes[block.name]
        gradients = {f"{unit.name}.weight": self._gradient(f"{unit.name}.weight") for unit in block.units[-2:]}
        pooled = self._pooled(height * width)
        # All cotangents are proportional to what the final layer's equations give, which is no more exact than this.
        least = max(_ROUNDING, rounding(self._observation.gradients[f"{self._model.final}.weight"]))
        self._floor = (pooled.sigma.norm(dim=1) / pooled.features.norm(dim=1)).clamp(min=least)
        top = last_gate(block, gradients, pooled, height, width)
        return self._mended_by(top, f"{block.units[-1].bn_name}.bias")

    def _pooled(self, positions: int) -> Pooled:
        """F by least squares of s AᵀF = K ∇W, not clamped, with what the residual says of its precision."""
        final, images = self._model.final, self._observation.batch_size
        errors, gradient = self._fit.output_errors, self._gradient(f"{final}.weight")
        factor = self._fit.scale / images
        inverse = torch.linalg.inv(errors @ errors.T)
        features = inverse @ errors @ gradient / factor
        left = factor * errors.T @ features - gradient
        noise = (left.square().sum(0) / max(1, len(left) - images)).sqrt() / factor
        sigma = inverse.diagonal().sqrt()[:, None] * noise
        weight = self._model.final_layer.weight.detach().cpu().double()
        return Pooled(features, sigma, factor / positions * errors @ weight)

    def _solve(self, step: _Step) -> SolvedNode:
        """The input of a step's convolution; the way then stands at that node. Raises Unsolved."""
        shape = (self._observation.batch_size, *self._shapes[step.node])
        unknowns = shape[0] * shape[2] * shape[3]
        equations = self._equations(step)
        count = sum(part.count(*shape[2:]) for part in equations)
        needed, free = _memory(equations, shape), psutil.virtual_memory().available
        if needed > free:
            raise Unsolved(
                f"Solving {step.node} takes about {needed / 2**30:.1f} GiB of memory and "
                f"{free / 2**30:.1f} GiB are free"
            )
        known = self._known(step, shape) if count < _AMPLE * unknowns else None
        solution, mended, added = self._linear(step, shape, known, count)
        fine = solution is not None and float(solution.error.median()) <= _FINE
        if count < _AMPLE * unknowns and not fine:
            node = self._convex(step, shape, solution if added else None)
            if node is not None and (solution is None or node.error.median() < solution.error.median()):
                return node
        if solution is None:
            raise Unsolved(f"{step.unit.name} gives {count:,} equations for {unknowns:,} unknowns of {step.node}")
        error = self._error(solution, equations)
        if not float(error.median()) < _USELESS:
            raise Unsolved(
                f"{step.node} drowns in noise: {count:,} equations for {unknowns:,} unknowns leave an error of "
                f"{100 * float(error.median()):.0f} %"
            )
        share = float((mended.mask != self._gate.mask).double().mean())
        self._take(step, mended)
        self._pass(step, shape, solution)
        return SolvedNode(
            step.node,
            solution.x.clamp(min=0) * self._gate.mask,
            self._gate.cotangent,
            "exact",
            error,
            solution.residual,
            count + added,
            unknowns,
            share,
            0.0,
        )

    def _error(self, solution: Solution, equations: Sequence[Equations]) -> Tensor:
        """The relative error of each image (B,), which is at least that of all cotangents. What is left unexplained ten
        times as much as in the final layer is no noise but a wrong equation, of which σ knows nothing."""
        error = (solution.error.square() + self._floor.square()).sqrt()
        right = torch.cat([part.gradient.flatten() for part in equations])
        final = self._gradient(f"{self._model.final}.weight")
        relative = solution.residual / max(self._fit.residual, _ROUNDING)
        absolute = relative * float(right.square().mean() / final.square().mean().clamp(min=1e-300)) ** 0.5
        return (error.clamp(min=solution.residual) if min(relative, absolute) > 10 else error).clamp(max=1)

    def _pass(self, step: _Step, shape: tuple[int, int, int, int], solution: Solution) -> None:
        """Go through the ReLU of the node that was solved."""
        self._gate = gate(self._pulled(step, shape), solution, _CROSSTALK * self._floor)
        if step.bias is not None:
            self._gate = self._mended_by(self._gate, step.bias)

    def _mended_by(self, found: Gate, bias: str) -> Gate:
        """A gate with its mask mended by the gradient of a bias; as it is where the client does not train that, and
        where that is rounded so coarsely that the rounding would be taken for wrong entries."""
        given = self._observation.gradients.get(bias)
        if given is None or rounding(given) > COMPUTED:
            return found
        return mended_by_bias(found, self._gradient(bias))[0]

    def _take(self, step: _Step, mended: Gate) -> None:
        """Go on with a gate of which some masks were set right."""
        self._gate = mended
        if step.last:
            self._outer = mended
        if self._solved:
            self._solved[-1] = replace(self._solved[-1], cotangent=mended.cotangent)

    def _linear(
        self, step: _Step, shape: tuple[int, int, int, int], known: Known | None, count: int
    ) -> tuple[Solution | None, Gate, int]:
        """By linear equations alone: the solution, None where they are too few; the gate above, mended on the way; how
        many of what was known of each channel beforehand was made use of."""
        unknowns = shape[0] * shape[2] * shape[3]
        completed = None
        if known is not None and count >= (1 - known.share) * unknowns:
            completed = (*self._exact(step, shape, known), round(known.share * unknowns))
        if count < unknowns or (completed and float(completed[0].error.median()) <= _FINE):
            return completed or (None, self._gate, 0)
        plain = (*self._exact(step, shape), 0)
        return completed if completed and completed[0].error.median() <= plain[0].error.median() else plain

    def _known(self, step: _Step, shape: tuple[int, int, int, int]) -> Known | None:
        """What a block's output says of its input where the shortcut is the identity: x = out − BN(conv(h)) where
        out > 0, with h the block's last inner node. None elsewhere, and where the output is not solved."""
        solved = self._by_name()
        if not step.first or step.block.shortcut is not None or step.block.name not in solved:
            return None
        output, inner = solved[step.block.name], solved[step.block.units[-2].name]
        rest = affine(step.block.units[-1], inner.activation * inner.on)
        sizes = [part.flatten(1).square().mean(1).sqrt() for part in (output.activation, rest)]
        sigma = torch.hypot(output.error * sizes[0], inner.error * sizes[1]).view(-1, 1, 1, 1)
        on = output.on & (output.activation > 0)
        return Known((output.activation - rest).clamp(min=0), on, sigma.expand(shape))

    def _exact(
        self, step: _Step, shape: tuple[int, int, int, int], known: Known | None = None
    ) -> tuple[Solution, Gate]:
        """By the gradient's equations, and the entries that are known beside them: the solution, and the gate above it,
        its masks mended on the way."""
        equations, above = self._equations(step), self._gate
        # Rounding and noise leave about as much unexplained in every layer.
        expected = _LIKE_ABOVE * max(_ROUNDING, self._fit.residual, *(node.residual for node in self._solved))
        best = now = solve_input(equations, shape, known=known, expected=expected), above
        for _ in range(_ROUNDS):
            if best[0].residual <= expected and not best[0].suspects.any():
                break
            solution, behind = now
            mended, turned = mended_by_residual(behind, equations[0], solution.x.clamp(min=0), solution.suspects)
            equations = [self._behind(step.unit, mended), *equations[1:]]
            now = solve_input(equations, shape, known=known, expected=expected), mended
            best = min(best, now, key=lambda pair: _unexplained(pair[0], expected))
            if not turned:
                break
        return best

    def _convex(self, step: _Step, shape: tuple[int, int, int, int], solution: Solution | None) -> SolvedNode | None:
        """By the layers' own equations as well, and the way then stands at that node; None where the block's
        activations above are not known, or this does not help. Of a `solution` the channels that it determines stay."""
        above = self._layers(step)
        if above is None:
            return None
        layers, mean, noise = above
        settled = None
        if solution is not None:
            size = solution.x.square().mean().sqrt()
            vague = solution.sigma.square().mean((0, 2, 3)).sqrt() > _FINE * size
            if float(vague.double().mean()) <= 0.5:
                settled = torch.where(vague.view(-1, 1, 1), torch.nan, solution.x.clamp(min=0))
        found = solve_convex(
            self._equations(step),
            layers,
            shape,
            mean=mean,
            settled=settled,
            noise=noise,
            # An iteration takes as long as there are images, and gains the less the more unknowns there are.
            iterations=min(max(_ITERATIONS // shape[0], 100), 400),
            stop=self.stop,
        )
        if not float(found.error.median()) < _USELESS:
            return None
        x = found.x.double()
        size = x.flatten(1).square().mean(1).sqrt()
        sigma = (found.error.double() * size).view(-1, 1, 1, 1).expand(shape)
        if solution is not None and settled is not None:
            sigma = torch.where(settled.isnan(), sigma, solution.sigma)
        self._pass(step, shape, Solution(x, sigma, found.residual, torch.zeros(0)))
        error = sigma.flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1).clamp(min=1e-30)
        return SolvedNode(
            step.node,
            x,
            self._gate.cotangent,
            "convex",
            error,
            found.residual,
            found.equations,
            found.unknowns,
            0.0,
            0.0,
        )

    def _layers(self, step: _Step) -> tuple[list[Layer], Tensor | None, float] | None:
        """What the activations above say of the step's input, its mean, and the relative error of these activations;
        None where they are not known."""
        solved = self._by_name()
        if step.first and step.block.name in solved:
            names = [name for name in step.block.nodes if name in solved]
            known = {name: solved[name].activation * solved[name].on for name in names}
            layers, mean = layers_of_input(step.block, known), mean_of_input(step.block, known)
        elif not step.first and not step.last:
            names = [step.unit.name]
            output = solved[step.unit.name]
            target = output.activation * output.on - step.unit.offset.double()[:, None, None]
            layers, mean = [Layer(step.unit, target, output.on)], None
        else:
            return None
        return layers, mean, max(1e-6, *(solved[name].typical_error for name in names))

    def _equations(self, step: _Step) -> list[Equations]:
        """Those of the step's convolution, and of the shortcut where that has the same input."""
        found = [self._behind(step.unit, self._gate)]
        if step.first and step.block.shortcut is not None:
            found.append(self._behind(step.block.shortcut, self._outer))
        return found

    def _behind(self, unit: Unit, gate: Gate) -> Equations:
        slope = unit.slope.cpu().double().view(-1, 1, 1)
        return Equations(unit, gate.cotangent * slope, self._gradient(f"{unit.name}.weight"))

    def _pulled(self, step: _Step, shape: tuple[int, int, int, int]) -> Tensor:
        """The cotangent of the node's ReLU output: through the convolution, and through the skip."""
        pulled = sum(part.pulled_back(*shape[2:]) for part in self._equations(step))
        identity = step.first and step.block.shortcut is None
        return torch.as_tensor(pulled + self._outer.cotangent if identity else pulled)

    def _gradient(self, name: str) -> Tensor:
        if name not in self._taken:
            gradient = self._observation.gradients[name].detach().cpu().double()
            if _is_pruned(gradient):
                raise Unsolved(f"Entries of the gradient of {name} were set to 0, and so are no equations")
            self._taken[name] = gradient
        return self._taken[name]


def _unexplained(solution: Solution, expected: float) -> tuple[float, float]:
    """What is better in a solution comes first: a residual down to the expected one, and the fewer channels had to be
    set aside for it the better."""
    return max(solution.residual, expected), float(solution.suspects.sum())


def _memory(equations: Sequence[Equations], shape: tuple[int, int, int, int]) -> int:
    """About how many bytes solving an input of that shape takes: measured on the bundled networks, and rounded up."""
    images, channels, height, width = shape
    unknowns = images * height * width
    rows = sum(part.gradient[:, 0].numel() for part in equations)
    # Squares of the unknowns are formed by least squares, and by the convex step only where those are the cheaper form.
    squares = 4 * unknowns**2 if unknowns <= 2 * rows else 3 * rows**2
    return 8 * (6 * rows * unknowns + squares + channels * (20 * unknowns + 8 * rows))


def _is_pruned(gradient: Tensor) -> bool:
    """Whether zeros stand where small numbers were: then all others are larger than a limit, and they differ from each
    other, which those of a quantised gradient do not."""
    count = int(gradient.count_nonzero())
    if gradient.numel() < _COUNTED or count > (1 - _PRUNED) * gradient.numel() or count < 2:
        return False
    sizes = gradient.abs()
    smallest = sizes.where(sizes > 0, math.inf).min()
    # The median of the others is less than 20 times the smallest: counted, since a median takes ten times as long.
    if int((sizes < 20 * smallest).count_nonzero()) - (gradient.numel() - count) <= (count - 1) // 2:
        return False
    return len(gradient[gradient != 0].abs().unique()) > 0.5 * count
