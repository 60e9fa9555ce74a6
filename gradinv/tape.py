"""A flat recording of an evaluation: the ATen operations that it consists of, as far as they are needed.

A gradient through a gradient makes autograd compute much that nobody asks for: derivatives with respect to weights
that stay fixed, constants anew in every step, additions of zeros. So an evaluation is recorded, below autograd, as the
list of ATen operations that it consists of; what the results do not need is dropped, and a flat Python function is
generated that runs the rest. Its numbers are autograd's to the last bit: all operations that are left are the same,
unless it is for packed weights.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

aten = torch.ops.aten
_library = torch.ops.mkldnn

Program = Callable[[Tensor, Tensor], Sequence[Tensor]]

# What is computed of constants alone is computed once and kept, unless it takes more bytes than this.
_LARGEST_CONSTANT = 1 << 20
# Smaller tensors are not worth a search for memory to reuse.
_LEAST_REUSED = 1 << 12
# The library computes the channels of a pixel in vectors of so many floats, at the most.
_VECTOR = 16

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
_CONVOLUTIONS = {aten.convolution.default, aten.convolution_backward.default}
_ZEROS = {aten.new_zeros.default, aten.zeros.default, aten.zeros_like.default}


PACKED_CONVOLUTIONS = ("_convolution_pointwise", "_convolution_transpose_pointwise")
"""The names of torch's convolutions with packed weights, forward and transposed."""


def can_pack() -> bool:
    """Whether convolutions on this CPU are oneDNN's, and torch offers its layout of weights."""
    return bool(torch.backends.mkldnn.is_available()) and all(hasattr(_library, name) for name in PACKED_CONVOLUTIONS)


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

    Tensors are known by identity as long as they live. The tape keeps none of them alive but those from outside. One
    that is `packed`, where `can_pack()`, makes programs with constant weights in the library's layout and with strided
    convolutions to few channels in phases, whose results are the same to rounding.
    """

    def __init__(self, *, packed: bool = False) -> None:
        super().__init__()
        self._for_packed = packed
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
        if self._for_packed and (phases := _in_phases(func, args)) is not None:
            with self:
                return phases()
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
        nodes = _needed(_packed(nodes) if self._for_packed else nodes, outputs)
        nodes = _reusing(nodes, outputs, self._inputs)
        return _generated(nodes, outputs, self._inputs)


def _in_phases(func: Any, args: Sequence[Any]) -> Callable[[], Any] | None:
    """What a strided transposed convolution to few channels is replaced by, as a first layer's gradient with respect
    to the images is one; None for any other operation.

    The library fills its vectors with the channels of a pixel, and three of them would leave most of it idle.
    """
    if func is aten.convolution.default:
        given, weight, bias, (step, *steps), padding, dilation, transposed, added, groups = args
        if not transposed or bias is not None:
            return None
        corners = zip(given.shape[2:], (step, *steps), padding, weight.shape[2:], added, strict=True)
        sides = [(side - 1) * stride - 2 * pad + taps + more for side, stride, pad, taps, more in corners]
        others = None
    elif func is aten.convolution_backward.default:
        given, inputs, weight, _, (step, *steps), padding, dilation, transposed, _, groups, mask = args
        if transposed or not mask[0]:
            return None
        sides, others = list(inputs.shape[2:]), [False, *mask[1:]]
    else:
        return None
    few = weight.ndim == 4 and weight.shape[1] * step**2 <= _VECTOR
    plain = {*steps} == {step} and {*dilation} == {1} and groups == 1
    if step == 1 or not few or not plain or any(side % step for side in sides):
        return None

    def run() -> Any:
        found = _unstrided(given, weight, step, padding, sides)
        return found if others is None else (found, *func(*args[:-1], others)[1:])

    return run


def _unstrided(given: Tensor, weight: Tensor, step: int, padding: Sequence[int], sides: Sequence[int]) -> Tensor:
    """The transposed convolution of what is given (B, C, h, w) with weights (C, c, m, n), whose stride s divides the
    sides of the result (B, c, H, W): one of stride 1 to s² times the channels.

    In each direction the result at s·i + a is Σ given[i + (a + p − k) / s] · weight[k] over those taps k for which this
    is a whole number: for each phase a < s a convolution with every s-th tap, in reverse.
    """
    front = [-pad % step for pad in padding]  # zeros before the first tap, so that phase a has the taps a, a + s, …
    count = [-(-(taps + more) // step) for taps, more in zip(weight.shape[2:], front, strict=True)]
    back = [step * n - taps - more for n, taps, more in zip(count, weight.shape[2:], front, strict=True)]
    (m, n), (rows, columns) = count, (side // step for side in sides)
    phases = F.pad(weight, (front[1], back[1], front[0], back[0])).view(*weight.shape[:2], m, step, n, step)
    phases = phases.flip(2, 4).permute(1, 3, 5, 0, 2, 4).reshape(-1, len(weight), m, n)
    # So many more before the first pixel, and after the last, as the taps reach.
    reach = [(pad + more) // step for pad, more in zip(padding, front, strict=True)]
    before = [n - 1 - to for n, to in zip(count, reach, strict=True)]
    after = [side // step - have + to for side, have, to in zip(sides, given.shape[2:], reach, strict=True)]
    margin = [max(0, *pair) for pair in zip(before, after, strict=True)]
    top, left = (more - wanted for more, wanted in zip(margin, before, strict=True))
    found = F.conv2d(given, phases, padding=margin)
    return F.pixel_shuffle(found[:, :, top : top + rows, left : left + columns], step)


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


def _packed(nodes: Sequence[_Node]) -> list[_Node]:
    """The same with the weights of convolutions, where they are constant, in the layout that oneDNN computes in.

    Given them in torch's layout it converts them in each call, which for small maps takes as long as the convolution.
    """
    packs = _Packs(min(value.memory for node in nodes for value in node.results))
    kept: list[_Node] = []
    for node in nodes:
        transposed = node.operation in _CONVOLUTIONS and node.argument("transposed")
        found = None
        if node.operation is aten.convolution.default:
            added = node.argument("output_padding") if transposed else None
            found = packs.convolution(node, node.argument("input"), node.argument("bias"), added)
        elif node.operation is aten.convolution_backward.default and node.outputs[0] and not transposed:
            # The gradient with respect to the input is the transposed convolution with the same weights.
            found = packs.convolution(node, node.argument("grad_output"), None, _added(node))
        kept += found or [node]
        if found and node.several:
            rest = _Node(
                node.operation,
                (*node.args[:-1], [False, *node.argument("output_mask")[1:]]),
                node.kwargs,
                (None, *node.outputs[1:]),
                True,
            )
            kept += [rest] if rest.results else []
    return kept


def _added(node: _Node) -> list[int]:
    """How much a transposed convolution has to add to each side of its result for that of this one's input."""
    sides = zip(
        *(node.argument(name).layout[0][2:] for name in ("input", "grad_output", "weight")),
        *(node.argument(name) for name in ("stride", "padding", "dilation")),
        strict=True,
    )
    return [side - ((out - 1) * step - 2 * pad + apart * (taps - 1) + 1) for side, out, taps, step, pad, apart in sides]


class _Packs:
    """The packed weights of a recording, each made once; new values look at memories below `lowest`."""

    def __init__(self, lowest: int) -> None:
        self._made: dict[Any, Tensor] = {}
        self._fresh = itertools.count(min(lowest, 0) - 1, -1)

    def convolution(self, node: _Node, given: _Value, bias: Any, added: list[int] | None) -> list[_Node] | None:
        """The node's first output as the convolution of what is given with the node's weights, transposed where sides
        are `added` to; None where the weights cannot be packed."""
        weight = node.argument("weight").constant
        if weight is None or weight.ndim != 4 or weight.dtype is not torch.float32 or node.argument("groups") != 1:
            return None
        if added is None:
            pack, name = _library._reorder_convolution_weight, PACKED_CONVOLUTIONS[0]
        else:
            pack, name = _library._reorder_convolution_transpose_weight, PACKED_CONVOLUTIONS[1]
        run = getattr(_library, name).default
        stride, padding, dilation = (node.argument(name) for name in ("stride", "padding", "dilation"))
        rest = [padding, *([] if added is None else [added]), stride, dilation, 1]
        shape, strides, *_ = given.layout
        key = _key((id(weight), rest, shape))
        arguments = (*rest, "none", [], "")
        try:
            if key not in self._made:
                self._made[key] = pack(weight, *rest, list(shape))
            trial = run(torch.empty_strided(shape, strides), self._made[key], None, *arguments)
        except RuntimeError:  # not in this build of the library
            return None
        # Its layout is the library's choice; what follows was recorded for another.
        plain = {"memory_format": torch.contiguous_format}
        if _Value.of(trial.clone(**plain), 0).layout != node.results[0].layout:
            return None
        made = _Value.of(trial, next(self._fresh))
        return [
            _Node(run, (given, self._made[key], bias, *arguments), {}, (made,), False),
            _Node(aten.clone.default, (made,), plain, node.outputs[:1], False),
        ]


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
