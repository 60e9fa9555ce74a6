"""How one evaluation of the objective is executed: by autograd, as a flat recording of it, or as a CUDA graph.

A gradient through a gradient makes autograd compute much that nobody asks for: derivatives with respect to weights
that stay fixed, constants anew in every step, additions of zeros. So the first evaluation is recorded, below autograd,
as the list of ATen operations that it consists of; what the gradient does not need is dropped, and a flat Python
function is generated that runs the rest. Its numbers are autograd's to the last bit: all operations that are left
are the same.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from gradinv.objective import Objective
from gradinv.types import GradinvError

log = logging.getLogger(__name__)
aten = torch.ops.aten

MODES = ("auto", "eager", "traced", "graph")

# Recording and checking cost two to three evaluations; each one after that takes 0.45 to 0.75 of the time.
_WORTH_TRACING = 20
# By how much the check lets the pixel gradient deviate from autograd's, relative to its norm. On a CPU nothing should;
# on a GPU kernels may sum in another order at each call.
_CPU_TOLERANCE = 1e-5
_GPU_TOLERANCE = 1e-3
# What is computed of constants alone is computed once and kept, unless it takes more bytes than this.
_LARGEST_CONSTANT = 1 << 20
# Smaller tensors are not worth a search for memory to reuse.
_LEAST_REUSED = 1 << 12

# Operations that exist in a form that writes to its first argument, elementwise, so with the same result.
_IN_PLACE = {
    aten.add.Scalar: aten.add_.Scalar,
    aten.add.Tensor: aten.add_.Tensor,
    aten.addcmul.default: aten.addcmul_.default,
    aten.clamp_min.Tensor: aten.clamp_min_.Tensor,
    aten.div.Scalar: aten.div_.Scalar,
    aten.div.Tensor: aten.div_.Tensor,
    aten.masked_fill.Scalar: aten.masked_fill_.Scalar,
    aten.mul.Scalar: aten.mul_.Scalar,
    aten.mul.Tensor: aten.mul_.Tensor,
    aten.neg.default: aten.neg_.default,
    aten.pow.Tensor_Scalar: aten.pow_.Scalar,
    aten.relu.default: aten.relu_.default,
    aten.sub.Tensor: aten.sub_.Tensor,
}
_OUT_OF_PLACE = {writing: pure for pure, writing in _IN_PLACE.items()}
_COMMUTATIVE = {aten.add.Tensor, aten.mul.Tensor}
_SAME = {aten.alias.default, aten.detach.default, aten.lift_fresh.default}
_ZEROS = {aten.new_zeros.default, aten.zeros.default, aten.zeros_like.default}


@dataclass(frozen=True, eq=False)
class Stepped:
    """One evaluation: the `gradient` of the weighted sum with respect to the images (B, 3, S, S), and as scalars each
    term's `raw` value and the gradients' cosine `distance`; all detached."""

    gradient: Tensor
    raw: Mapping[str, Tensor]
    distance: Tensor


Program = Callable[[Tensor, Tensor], Sequence[Tensor]]


class Stepper:
    """Evaluates an objective together with the gradient of its total.

    `mode` says how: `eager` is autograd, the reference; `traced` records the first evaluation, compares what the
    recording gives with autograd in the second, and from then on runs the recording; `graph` does the same and replays
    the recording as a CUDA graph (not yet measured on a GPU). Where recording, capture or comparison fails, one
    sentence is logged, `mode` becomes `eager`, and so it goes on. Any thread may call it, one at a time; nothing is
    left behind in the thread or in the objective.
    """

    def __init__(self, objective: Objective, mode: str = "auto", *, steps: int | None = None) -> None:
        """`auto` becomes what pays for so many evaluations (`steps`; None: many) at the first one.

        Raises GradinvError for an unknown mode.
        """
        if mode not in MODES:
            raise GradinvError(f"stepping takes one of {', '.join(MODES)}, not {mode!r}.")
        self.mode = mode
        self._objective = objective
        self._steps = steps
        self._program: Program | None = None
        self._checked = False
        self._names: list[str] = []

    def __call__(self, images: Tensor, group: Tensor) -> Stepped:
        """Judge normalised images (B, 3, S, S) against the observation and the group's consensus, of the same shape.

        The shape stays the same from call to call. Raises GradinvError for `graph` where there is no CUDA device.
        """
        self.mode = resolve_mode(self.mode, images.device, self._steps)
        images, group = images.detach(), group.detach()
        if self.mode == "eager":
            return evaluate(self._objective, images, group)
        if self._program is None:
            return self._record(images, group)
        if not self._checked:
            return self._check(self._program, images, group)
        return self._run(self._program, images, group)

    def _record(self, images: Tensor, group: Tensor) -> Stepped:
        tape = _Tape()
        try:
            stepped = evaluate(self._objective, images, group, tape)
            self._program = tape.program([stepped.gradient, *stepped.raw.values(), stepped.distance])
        except Exception as error:  # Whatever it is: where autograd fails as well, that is what the caller gets to see.
            self._give_up(f"the evaluation cannot be recorded ({_one_line(error)})")
            return evaluate(self._objective, images, group)
        self._names = list(stepped.raw)
        return stepped

    def _check(self, program: Program, images: Tensor, group: Tensor) -> Stepped:
        """With other images than those of the recording, in which a value of theirs may have been frozen."""
        expected = evaluate(self._objective, images, group)
        try:
            if self.mode == "graph":
                self._program = program = _captured(program, images, group)
            deviation = _deviation(self._run(program, images, group), expected)
        except Exception as error:
            self._give_up(f"the recorded evaluation cannot be run ({_one_line(error)})")
            return expected
        # Written so that NaN does not pass.
        if not deviation <= (_CPU_TOLERANCE if images.device.type == "cpu" else _GPU_TOLERANCE):
            self._give_up(f"the recorded evaluation deviates from autograd's by a share of {deviation:.1e}")
        self._checked = True
        return expected

    def _run(self, program: Program, images: Tensor, group: Tensor) -> Stepped:
        with torch.no_grad():
            gradient, *raw, distance = program(images, group)
        return Stepped(gradient, dict(zip(self._names, raw, strict=True)), distance)

    def _give_up(self, reason: str) -> None:
        log.warning("Every step runs eagerly, which is slower: %s.", reason)
        self.mode = "eager"
        self._program = None


def resolve_mode(mode: str, device: torch.device, steps: int | None = None) -> str:
    """The mode itself; for `auto` a CUDA graph on a GPU, a recording on a CPU, autograd for a few steps or elsewhere.

    Raises GradinvError for `graph` without a CUDA device.
    """
    if mode == "graph" and device.type != "cuda":
        raise GradinvError("stepping=graph needs a CUDA device; take auto, traced or eager.")
    if mode != "auto":
        return mode
    if steps is not None and steps < _WORTH_TRACING:
        return "eager"
    return {"cuda": "graph", "cpu": "traced"}.get(device.type, "eager")


def evaluate(objective: Objective, images: Tensor, group: Tensor, tape: _Tape | None = None) -> Stepped:
    """The reference: the objective and autograd's gradient of its total, recorded on the tape where there is one."""
    with torch.enable_grad():
        images = images.detach().requires_grad_()
        with tape.recording(images, group) if tape is not None else nullcontext():
            judgement = objective(images, group)
            (gradient,) = torch.autograd.grad(judgement.total, images)
    return Stepped(gradient, judgement.raw, judgement.distance)


def _deviation(found: Stepped, expected: Stepped) -> float:
    """The largest relative deviation of the gradient (by its norm), the terms and the distance."""
    pairs = [(found.gradient, expected.gradient), *((found.raw[name], raw) for name, raw in expected.raw.items())]
    if not expected.distance.isnan():
        pairs.append((found.distance, expected.distance))
    return max(float((a - b).norm() / b.norm().clamp(min=torch.finfo(b.dtype).tiny)) for a, b in pairs)


def _one_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")


def _captured(program: Program, images: Tensor, group: Tensor) -> Program:
    """The program as a CUDA graph: thousands of small kernels started at once, on buffers that stay where they are."""
    buffers = images.clone(), group.clone()
    stream = torch.cuda.Stream(images.device)
    stream.wait_stream(torch.cuda.current_stream(images.device))
    with torch.cuda.stream(stream), torch.no_grad():
        for _ in range(3):  # Libraries choose their kernels and take their workspaces before the capture.
            program(*buffers)
    torch.cuda.current_stream(images.device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # What other threads do on the device meanwhile is theirs.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"), torch.no_grad():
        results = program(*buffers)

    def replay(images: Tensor, group: Tensor) -> Sequence[Tensor]:
        for buffer, given in zip(buffers, (images, group), strict=True):
            buffer.copy_(given)
        graph.replay()
        return [result.clone() for result in results]

    return replay


class _Unrecordable(Exception):
    """The evaluation does something that a recording would not repeat; the message says what."""


@dataclass(frozen=True, eq=False)
class _Value:
    """A tensor in the recording: the memory that it looks at, its layout (shape, strides, type, device), and the tensor
    itself where it is the same in each evaluation."""

    memory: int
    layout: tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]
    constant: Tensor | None = None

    @classmethod
    def of(cls, tensor: Tensor, memory: int, constant: Tensor | None = None) -> _Value:
        return cls(memory, (tensor.shape, tensor.stride(), tensor.dtype, tensor.device), constant)

    @property
    def nbytes(self) -> int:
        return self.layout[0].numel() * self.layout[2].itemsize


@dataclass(frozen=True, eq=False)
class _Node:
    """One ATen operation. Its arguments hold a `_Value` where a tensor was; None stands for an output that is none."""

    operation: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[_Value | None, ...]
    several: bool  # whether it returns a tuple or a list

    @property
    def inputs(self) -> list[_Value]:
        return list(_leaves((self.args, self.kwargs), _Value))

    @property
    def results(self) -> list[_Value]:
        return [value for value in self.outputs if value is not None]

    @property
    def written(self) -> list[_Value]:
        """What the operation changes in place."""
        arguments = enumerate(self.operation._schema.arguments)
        writes = [(index, a.name) for index, a in arguments if a.alias_info is not None and a.alias_info.is_write]
        given = [self.args[i] if i < len(self.args) else self.kwargs.get(name) for i, name in writes]
        return list(_leaves(given, _Value))

    def argument(self, name: str) -> Any:
        """By its name in the operation's schema; None where it is not given."""
        names = [argument.name for argument in self.operation._schema.arguments]
        given = {**dict(zip(names, self.args, strict=False)), **self.kwargs}
        return given.get(name)


def _leaves(tree: Any, kind: type) -> Iterator[Any]:
    if isinstance(tree, kind):
        yield tree
    elif isinstance(tree, list | tuple):
        for branch in tree:
            yield from _leaves(branch, kind)
    elif isinstance(tree, dict):
        for branch in tree.values():
            yield from _leaves(branch, kind)


def _replace(tree: Any, kind: type, by: Callable[[Any], Any]) -> Any:
    if isinstance(tree, kind):
        return by(tree)
    if isinstance(tree, list | tuple):
        return type(tree)([_replace(branch, kind, by) for branch in tree])
    if isinstance(tree, dict):
        return {key: _replace(branch, kind, by) for key, branch in tree.items()}
    return tree


class _Tape(TorchDispatchMode):
    """Records the operations that reach ATen from one thread while it is open; they run as usual.

    Tensors are known by identity as long as they live. The tape keeps none of them alive but those from outside.
    """

    def __init__(self) -> None:
        super().__init__()
        self._nodes: list[_Node] = []
        self._inputs: list[_Value] = []
        self._known = WeakTensorKeyDictionary()
        self._outside: dict[int, int] = {}  # by the address of a storage
        self._foreign: set[int] = set()
        self._varying: set[int] = set()
        self._memories = itertools.count()

    def recording(self, *inputs: Tensor) -> Self:
        """The tape, to be opened: it treats these tensors as what changes from evaluation to evaluation."""
        self._inputs = [self._add(tensor, next(self._memories)) for tensor in inputs]
        self._varying = {value.memory for value in self._inputs}
        self._foreign.update(self._varying)
        return self

    def _add(self, tensor: Tensor, memory: int, constant: Tensor | None = None) -> _Value:
        value = self._known[tensor] = _Value.of(tensor, memory, constant)
        return value

    def _value(self, tensor: Tensor) -> _Value:
        """What stands for the tensor. One that no recorded operation made comes from outside and is held."""
        known: _Value | None = self._known.get(tensor)
        if known is not None:
            return known
        storage = tensor.untyped_storage()._cdata
        if storage not in self._outside:
            self._outside[storage] = next(self._memories)
            self._foreign.add(self._outside[storage])
        return self._add(tensor, self._outside[storage], tensor.detach())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        values = _replace((args, kwargs), Tensor, self._value)
        result = func(*args, **kwargs)
        several = not isinstance(result, Tensor)
        # Only what an operation was given can its results look at.
        memories = {t.untyped_storage()._cdata: self._value(t).memory for t in _leaves((args, kwargs), Tensor)}

        def output(tensor: Any) -> _Value | None:
            if not isinstance(tensor, Tensor):
                return None
            memory = memories.get(tensor.untyped_storage()._cdata)
            return self._known.get(tensor) or self._add(tensor, next(self._memories) if memory is None else memory)

        found = result if isinstance(result, list | tuple) else [result]
        node = _Node(func, values[0], values[1], tuple(map(output, found)), several)
        if any(value.memory in self._varying for value in node.inputs):
            if torch.Tag.dynamic_output_shape in func.tags or any(not isinstance(t, Tensor | None) for t in found):
                raise _Unrecordable(f"{func} makes what follows depend on the images' values")
            self._varying.update(value.memory for value in node.results)
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise _Unrecordable(f"{func} draws random numbers")
        if any(value.memory in self._foreign for value in node.written) or _tracks(node):
            raise _Unrecordable(f"{func} changes a tensor that outlives the evaluation")
        self._varying.update(value.memory for value in node.written)
        self._nodes.append(node)
        return result

    def program(self, results: Sequence[Tensor]) -> Program:
        """A function of the inputs that runs what was recorded, as far as these results need it, and returns them."""
        outputs = [self._value(tensor) for tensor in results]
        nodes, outputs = _without_writes(_needed(self._nodes, outputs), outputs, self._inputs)
        nodes, outputs = _simplified(nodes, outputs, self._inputs)
        nodes = _reusing(_needed(nodes, outputs), outputs, self._inputs)
        return _generated(nodes, outputs, self._inputs)


def _tracks(node: _Node) -> bool:
    # The one change in place that schemas do not tell.
    return bool(node.argument("training")) and node.argument("running_mean") is not None


def _needed(nodes: Sequence[_Node], outputs: Sequence[_Value]) -> list[_Node]:
    """The nodes that the outputs need, in order. A change in place is needed where the changed memory is."""
    values, memories = set(outputs), {value.memory for value in outputs}
    kept = []
    for node in reversed(nodes):
        if not values.isdisjoint(node.results) or any(value.memory in memories for value in node.written):
            kept.append(node)
            values.update(node.inputs)
            memories.update(value.memory for value in node.inputs)
    return kept[::-1]


def _without_writes(
    nodes: Sequence[_Node], outputs: Sequence[_Value], inputs: Sequence[_Value]
) -> tuple[list[_Node], list[_Value]]:
    """The same without detached twins of tensors and, where memory is looked at in one way only, without changes in
    place, so that what remains may be reordered, merged and left out."""
    twin: dict[_Value, _Value] = {}
    for node in nodes:
        if node.operation in _SAME:
            twin[node.results[0]] = twin.get(node.inputs[0], node.inputs[0])
    views: dict[int, set[_Value]] = {}
    for value in itertools.chain(inputs, *(node.inputs + node.results for node in nodes)):
        views.setdefault(value.memory, set()).add(twin.get(value, value))
    latest: dict[_Value, _Value] = {}
    fresh = itertools.count(-1, -1)

    def now(value: _Value) -> _Value:
        value = twin.get(value, value)
        return latest.get(value, value)

    kept = []
    for node in nodes:
        if node.operation in _SAME:
            continue
        args, kwargs = _replace((node.args, node.kwargs), _Value, now)
        operation, results = node.operation, node.outputs
        if operation in _OUT_OF_PLACE and len(views[node.written[0].memory]) == 1:
            changed = twin.get(node.written[0], node.written[0])
            latest[changed] = replace(changed, memory=next(fresh))
            operation, results = _OUT_OF_PLACE[operation], (latest[changed],)
        kept.append(_Node(operation, args, kwargs, results, node.several))
    return kept, [now(value) for value in outputs]


def _simplified(
    nodes: Sequence[_Node], outputs: Sequence[_Value], inputs: Sequence[_Value]
) -> tuple[list[_Node], list[_Value]]:
    """The same with constants computed, each computation done once, and additions of zeros left out."""
    changing = {value.memory for node in nodes for value in node.written}
    varying, zeros = set(inputs), set[_Value]()
    same: dict[_Value, _Value] = {}
    done: dict[Any, _Node] = {}

    def now(value: _Value) -> _Value:
        return same.get(value, value)

    kept = []
    for node in nodes:
        args, kwargs = _replace((node.args, node.kwargs), _Value, now)
        node = _Node(node.operation, args, kwargs, node.outputs, node.several)
        if any(value.memory in changing for value in node.inputs + node.results):
            varying.update(node.results)
            kept.append(node)
            continue
        if node.operation in _ZEROS:
            zeros.update(node.results)
        if varying.isdisjoint(node.inputs) and _keepable(node):
            same.update(_computed(node))
            zeros.update(same[value] for value in node.results if value in zeros)
            continue
        varying.update(node.results)
        if (term := _other_than_zero(node, zeros)) is not None:
            same[node.results[0]] = term
            continue
        key = _key((node.operation, args, kwargs))
        if key in done:
            same.update(zip(node.results, done[key].results, strict=True))
            continue
        done[key] = node
        kept.append(node)
    return kept, [now(value) for value in outputs]


def _keepable(node: _Node) -> bool:
    """Whether what the node makes of constants takes little memory, or none of its own."""
    held = {value.memory for value in node.inputs}
    return all(value.memory in held or value.nbytes <= _LARGEST_CONSTANT for value in node.results)


def _computed(node: _Node) -> dict[_Value, _Value]:
    """By each result of a node with constant arguments the same with its tensor."""
    args, kwargs = _replace((node.args, node.kwargs), _Value, lambda value: value.constant)
    with torch.no_grad():
        result = node.operation(*args, **kwargs)
    tensors = zip(node.outputs, result if node.several else [result], strict=True)
    return {value: replace(value, constant=tensor) for value, tensor in tensors if value is not None}


def _other_than_zero(node: _Node, zeros: set[_Value]) -> _Value | None:
    """For the sum of a tensor and zeros, of the same layout as the tensor, that tensor; for all else None."""
    if node.operation is not aten.add.Tensor or node.kwargs or len(node.inputs) != 2:
        return None
    for term, other in (node.inputs, node.inputs[::-1]):
        if other in zeros and term.layout == node.results[0].layout:
            return term
    return None


def _key(tree: Any) -> Any:
    """Equal for equal trees, and with 1, 1.0 and True told apart."""
    if isinstance(tree, list | tuple):
        return tuple(map(_key, tree))
    if isinstance(tree, dict):
        return tuple((key, _key(branch)) for key, branch in sorted(tree.items()))
    return type(tree), tree


def _reusing(nodes: Sequence[_Node], outputs: Sequence[_Value], inputs: Sequence[_Value]) -> list[_Node]:
    """The same with elementwise results written over an argument that nothing needs any more: less memory to fetch."""
    last: dict[int, int] = {}
    for index, node in enumerate(nodes):
        last.update((value.memory, index) for value in node.inputs + node.results)
    foreign = itertools.chain(inputs, outputs, *(node.inputs for node in nodes))
    held = {value.memory for value in foreign if value in inputs or value in outputs or value.constant is not None}

    def reusable(value: Any, node: _Node, index: int) -> bool:
        return (
            isinstance(value, _Value)
            and value.nbytes >= _LEAST_REUSED
            and value.layout == node.results[0].layout
            and value.memory not in held
            and last[value.memory] == index
            and all(other is value or other.memory != value.memory for other in node.inputs)
        )

    kept = []
    for index, node in enumerate(nodes):
        args, kwargs, operation = node.args, node.kwargs, node.operation
        if operation in _IN_PLACE:
            orders = [args, args[::-1]] if operation in _COMMUTATIVE and not kwargs else [args]
            chosen = next((order for order in orders if reusable(order[0], node, index)), None)
            if chosen is not None:
                node = _Node(_IN_PLACE[operation], chosen, kwargs, node.outputs, False)
        elif operation is aten.threshold_backward.default and reusable(args[0], node, index):
            kwargs = {**kwargs, "grad_input": args[0]}
            node = _Node(aten.threshold_backward.grad_input, args, kwargs, node.outputs, False)
        kept.append(node)
    return kept


def _generated(nodes: Sequence[_Node], outputs: Sequence[_Value], inputs: Sequence[_Value]) -> Program:
    """A Python function of one line an operation, which lets go of each tensor after its last use."""
    space: dict[str, Any] = {}
    names: dict[Any, str] = {}

    def held(prefix: str, thing: Any) -> str:
        name = names.setdefault((prefix, id(thing)), f"{prefix}{len(names)}")
        space[name] = thing
        return name

    def text(tree: Any) -> str:
        if isinstance(tree, _Value):
            return (
                names.setdefault(tree, f"v{len(names)}") if tree.constant is None else held("constant", tree.constant)
            )
        if isinstance(tree, list):
            return f"[{', '.join(map(text, tree))}]"
        if tree is None or isinstance(tree, bool | int | str) or (isinstance(tree, float) and math.isfinite(tree)):
            return repr(tree)
        return held("thing", tree)

    last: dict[_Value, int] = {}
    for index, node in enumerate(nodes):
        last.update(dict.fromkeys((value for value in node.inputs + node.results if value.constant is None), index))
    last.update(dict.fromkeys(outputs, len(nodes)))
    ending: dict[int, list[_Value]] = {}
    for value, index in last.items():
        ending.setdefault(index, []).append(value)
    lines = [f"def program({', '.join(map(text, inputs))}):"]
    for index, node in enumerate(nodes):
        targets = ["_" if value is None else text(value) for value in node.outputs]
        given = [*map(text, node.args), *(f"{name}={text(value)}" for name, value in node.kwargs.items())]
        target = f"({', '.join(targets)},)" if node.several else targets[0]
        lines.append(f"    {target} = {held('operation', node.operation)}({', '.join(given)})")
        if index in ending:
            lines.append(f"    del {', '.join(map(text, ending[index]))}")
    lines.append(f"    return [{', '.join(map(text, outputs))}]")
    exec(compile("\n".join(lines), "<recorded evaluation>", "exec"), space)
    # Taken out, so that the function and its constants are no cycle and go when the stepper goes.
    program: Program = space.pop("program")
    return program
