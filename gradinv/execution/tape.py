"""A flat recording of an evaluation: the ATen operations that it consists of, as far as they are needed.

A gradient through a gradient makes autograd compute much that nobody asks for: derivatives with respect to weights
that stay fixed, constants anew in every step, additions of zeros. So an evaluation is recorded, below autograd, as the
list of ATen operations that it consists of; what the results do not need is dropped, and a flat Python function is
generated that runs the rest. Its numbers are autograd's to the last bit: all operations that are left are the same.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

aten = torch.ops.aten

Program = Callable[[Tensor, Tensor], Sequence[Tensor]]

# What is computed of constants alone is computed once and kept, unless it takes more bytes than this.
_LARGEST_CONSTANT = 1 << 20

# What each operation that changes its first argument, elementwise, is without the change.
_OUT_OF_PLACE = {
    aten.add_.Scalar: aten.add.Scalar,
    aten.add_.Tensor: aten.add.Tensor,
    aten.addcmul_.default: aten.addcmul.default,
    aten.clamp_min_.Tensor: aten.clamp_min.Tensor,
    aten.div_.Scalar: aten.div.Scalar,
    aten.div_.Tensor: aten.div.Tensor,
    aten.masked_fill_.Scalar: aten.masked_fill.Scalar,
    aten.mul_.Scalar: aten.mul.Scalar,
    aten.mul_.Tensor: aten.mul.Tensor,
    aten.neg_.default: aten.neg.default,
    aten.pow_.Scalar: aten.pow.Tensor_Scalar,
    aten.relu_.default: aten.relu.default,
    aten.sub_.Tensor: aten.sub.Tensor,
}
_SAME = {aten.alias.default, aten.detach.default, aten.lift_fresh.default}
_ZEROS = {aten.new_zeros.default, aten.zeros.default, aten.zeros_like.default}


class Unrecordable(Exception):
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
        return list(leaves((self.args, self.kwargs), _Value))

    @property
    def results(self) -> list[_Value]:
        return [value for value in self.outputs if value is not None]

    @property
    def written(self) -> list[_Value]:
        """What the operation changes in place."""
        arguments = enumerate(self.operation._schema.arguments)
        writes = [(index, a.name) for index, a in arguments if a.alias_info is not None and a.alias_info.is_write]
        given = [self.args[i] if i < len(self.args) else self.kwargs.get(name) for i, name in writes]
        return list(leaves(given, _Value))

    def argument(self, name: str) -> Any:
        """By its name in the operation's schema; None where it is not given."""
        names = [argument.name for argument in self.operation._schema.arguments]
        given = {**dict(zip(names, self.args, strict=False)), **self.kwargs}
        return given.get(name)


def leaves(tree: Any, kind: type) -> Iterator[Any]:
    if isinstance(tree, kind):
        yield tree
    elif isinstance(tree, list | tuple):
        for branch in tree:
            yield from leaves(branch, kind)
    elif isinstance(tree, dict):
        for branch in tree.values():
            yield from leaves(branch, kind)


def _replace(tree: Any, kind: type, by: Callable[[Any], Any]) -> Any:
    if isinstance(tree, kind):
        return by(tree)
    if isinstance(tree, list | tuple):
        return type(tree)([_replace(branch, kind, by) for branch in tree])
    if isinstance(tree, dict):
        return {key: _replace(branch, kind, by) for key, branch in tree.items()}
    return tree


class Tape(TorchDispatchMode):
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
        memories = {t.untyped_storage()._cdata: self._value(t).memory for t in leaves((args, kwargs), Tensor)}

        def output(tensor: Any) -> _Value | None:
            if not isinstance(tensor, Tensor):
                return None
            memory = memories.get(tensor.untyped_storage()._cdata)
            return self._known.get(tensor) or self._add(tensor, next(self._memories) if memory is None else memory)

        found = result if isinstance(result, list | tuple) else [result]
        node = _Node(func, values[0], values[1], tuple(map(output, found)), several)
        if any(value.memory in self._varying for value in node.inputs):
            if torch.Tag.dynamic_output_shape in func.tags or any(not isinstance(t, Tensor | None) for t in found):
                raise Unrecordable(f"{func} makes what follows depend on the images' values")
            self._varying.update(value.memory for value in node.results)
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise Unrecordable(f"{func} draws random numbers")
        if any(value.memory in self._foreign for value in node.written) or _tracks(node):
            raise Unrecordable(f"{func} changes a tensor that outlives the evaluation")
        self._varying.update(value.memory for value in node.written)
        self._nodes.append(node)
        return result

    def program(self, results: Sequence[Tensor]) -> Program:
        """A function of the inputs that runs what was recorded, as far as these results need it, and returns them."""
        outputs = [self._value(tensor) for tensor in results]
        nodes, outputs = _without_writes(_needed(self._nodes, outputs), outputs, self._inputs)
        nodes, outputs = _simplified(nodes, outputs, self._inputs)
        return _generated(_needed(nodes, outputs), outputs, self._inputs)


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
