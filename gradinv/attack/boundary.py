"""Where the network is cut: above the boundary everything is solved, below it the pixels are searched for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor
from torch.nn import functional as F

from gradinv.config import APART, FROM_ABOVE, FROM_PAINTING, AttackConfig
from gradinv.models import Model
from gradinv.network import STEM, Segment, parts_of, skip_of, stage_of
from gradinv.prior import painted_from
from gradinv.types import GradinvError, Recovered, SolvedNode

USABLE = 0.5
"""The relative error up to which solved activations are worth searching with, as the median over the images."""

EXPLAINED = 0.5
"""The share of the final layer's gradient up to which what is left unexplained may be noise. With wrong labels it is
more, and then nothing below is solved."""

LOGITS, FEATURES = "logits", "features"
"""What the network as a whole gives beside nodes: the final layer's output and its input."""


def settled(model: Model, recovered: Recovered, config: AttackConfig) -> AttackConfig:
    """What `boundary=auto` becomes: the lowest node that is solved well enough to search below it.

    Where there is none (the gradient was changed, the client was in train mode, the images are many or large) it is
    `matching_instead`. Any other boundary stays as it is. Raises GradinvError where it names a node that could not be
    solved.
    """
    if not config.needs_layers:  # the control, which uses none
        return replace(config, boundary="loss") if config.boundary == "auto" else config
    explained = recovered.residual is not None and recovered.residual <= EXPLAINED
    usable = [node for node in recovered.nodes if explained and node.typical_error <= USABLE]
    if config.boundary != "auto":
        boundary = _solved(model, recovered, config.boundary).name
        return _fitting(model, recovered, replace(config, boundary=boundary))
    if usable and stage_of(usable[-1].name) != "layer4":
        return _fitting(model, recovered, replace(config, boundary=usable[-1].name))
    instead = matching_instead(model, config)
    if recovered.features is None:  # then there are no output errors either
        return replace(instead, boundary="loss", features=0.0, start="random")
    return instead


def _fitting(model: Model, recovered: Recovered, config: AttackConfig) -> AttackConfig:
    """The settings that fit a node as the boundary. Seeds do not meet above the first stage; and from a picture that is
    painted from the first stage, from the third, below which little is known then, or from the node itself, the search
    needs no annealing from far away. Fields that differ from the `demo` preset were chosen, and stay."""
    new = {} if stage_of(config.boundary) in (STEM, "layer1") else APART
    painted = painted_from(model, recovered) if config.start == "decoder" else None
    if painted is not None:
        stage = stage_of(painted.name)
        near = stage in ("layer1", "layer3") or painted.name == config.boundary
        new = new | (FROM_PAINTING[stage] if near else FROM_ABOVE)
    usual = AttackConfig.preset("demo", model.name)
    changes = {name: value for name, value in new.items() if getattr(config, name) == getattr(usual, name)}
    if ("pooling" in changes) != ("tv_schedule" in changes):  # they go together
        del changes["pooling" if "pooling" in changes else "tv_schedule"]
    return replace(config, **changes)


def matching_instead(model: Model, config: AttackConfig) -> AttackConfig:
    """The `matching` preset in the place of the `demo` preset, for a config whose layers cannot be solved. Fields that
    differ from the latter were chosen, and stay as far as they have a meaning for the whole network."""
    usual, instead = (AttackConfig.preset(name, model.name).to_dict() for name in ("demo", "matching"))
    chosen = {name: value for name, value in config.to_dict().items() if value != usual[name]}
    return AttackConfig.from_dict({**instead, **chosen, "boundary": "logits", "pooling": ()})


def _solved(model: Model, recovered: Recovered, boundary: str) -> SolvedNode:
    name = parts_of(model.network).node(boundary)
    found = next((node for node in recovered.nodes if node.name == name), None)
    if found is None:
        reached = f"down to {recovered.nodes[-1].name} only" if recovered.nodes else "at no node"
        raise GradinvError(
            f"The activations of {name} could not be solved, {reached} ({recovered.stopped.rstrip('.')}); set boundary "
            "to auto or logits."
        )
    return found


Cotangents = Callable[[Mapping[str, Tensor], slice], Mapping[str, Tensor]]
"""From what the network makes of a part of the batch to the loss's derivative with respect to some of it, by name."""


@dataclass(frozen=True, eq=False)
class Boundary:
    """The network as far as an attack runs it, and what is known where it ends.

    `run` takes normalised images (B, 3, S, S) and the sharpness of the stem's maximum (None: the maximum itself) to
    values by name. `cotangents` are the derivatives of the client's loss with respect to those where the network is
    cut; pulled back they give the images' share of the gradient of `parameters`. `solved` are the nodes whose
    activations the images are held to.
    """

    run: Callable[[Tensor, float | None], Mapping[str, Tensor]]
    cotangents: Cotangents
    parameters: frozenset[str]
    solved: tuple[SolvedNode, ...] = ()


def boundary_of(model: Model, recovered: Recovered, config: AttackConfig) -> Boundary:
    """The boundary that a `settled` config names. Raises GradinvError where what it needs is not solved."""
    if config.boundary in ("loss", "logits") or not config.needs_layers:
        if config.pooling:
            raise GradinvError("The stem's maximum is softened where a node is the boundary only; leave pooling empty.")
        return _whole(model, recovered, config)
    lowest = _solved(model, recovered, config.boundary)
    solved = _held_to(recovered, lowest) if config.activations > 0 else ()
    like = next(model.network.parameters()).detach()
    pulled, below = _pulled(model, recovered, lowest) if config.gradient > 0 else ({}, frozenset[str]())
    pulled = {name: cotangent.to(like) for name, cotangent in pulled.items()}
    order = parts_of(model.network).nodes
    names = [*(node.name for node in solved), *pulled]
    top = max((name for name in names if name in order), key=order.index)
    segment = Segment(model.network, top, names)
    return Boundary(segment, lambda _, part: {name: own[part] for name, own in pulled.items()}, below, solved)


def _pulled(model: Model, recovered: Recovered, lowest: SolvedNode) -> tuple[dict[str, Tensor], frozenset[str]]:
    """The lowest cotangents at or above the boundary that carry all of the gradient below, and its parameters.

    Within a block the shortcut leads past a node: what it adds to the block's output has the output's cotangent. Both
    are linear in the block's input, whatever the masks in it are.
    """
    network = parts_of(model.network)
    blocks = {node: block for block in network.blocks for node in block.nodes[:-1]}
    known = {node.name: node.cotangent for node in recovered.nodes if node.cotangent is not None}
    for node in reversed(recovered.nodes[: recovered.nodes.index(lowest) + 1]):
        block = blocks.get(node.name)
        if node.name not in known or (block is not None and block.name not in known):
            continue
        if block is None:
            return {node.name: known[node.name]}, frozenset(network.below(node.name))
        past = () if block.shortcut is None else block.shortcut.parameters()
        found = {node.name: known[node.name], skip_of(block.name): known[block.name]}
        return found, frozenset((*network.below(node.name), *past))
    raise GradinvError(f"No cotangent is known at or above {lowest.name}; set gradient to 0 or boundary to logits.")


def _held_to(recovered: Recovered, lowest: SolvedNode) -> tuple[SolvedNode, ...]:
    """The boundary alone, or within a block also the block's output: what lies above follows from it, also where it is
    known more exactly, and each further node adds local minima (docs/results.md)."""
    block = lowest.name.rpartition(".conv")[0]
    output = (node for node in recovered.nodes if node.name == block and node.typical_error <= USABLE)
    return (lowest, *output)


def _whole(model: Model, recovered: Recovered, config: AttackConfig) -> Boundary:
    """The whole network, with the output errors of the current images (the paper) or with those that are solved."""
    count, labels = len(recovered.labels), recovered.labels.to(model.device)
    # The client's own rescaling multiplies each gradient that is compared with its (clipping, for one).
    factor = recovered.scale / count
    smoothing = recovered.label_smoothing

    def predicted(values: Mapping[str, Tensor], part: slice) -> Mapping[str, Tensor]:
        """s (softmax(z) − (1 − ε) y − ε/N) / K: the paper's, where s = 1 and ε = 0."""
        logits = values[LOGITS]
        given = (1 - smoothing) * F.one_hot(labels[part], logits.shape[1]) + smoothing / logits.shape[1]
        return {LOGITS: (logits.softmax(1) - given) * factor}

    def known(_: Mapping[str, Tensor], part: slice) -> Mapping[str, Tensor]:
        """s A / K."""
        return {LOGITS: errors[part]}

    cotangents: Cotangents = predicted
    if config.boundary == "logits" and config.gradient > 0:
        if recovered.output_errors is None:
            raise GradinvError("The output errors are not solved; recover them, or set boundary to loss.")
        errors, cotangents = recovered.output_errors.to(model.device) * factor, known

    def run(images: Tensor, _: float | None) -> Mapping[str, Tensor]:
        inputs: list[Tensor] = []
        handle = model.final_layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        try:
            logits = model.network(images)
        finally:
            handle.remove()
        return {FEATURES: inputs[0], LOGITS: logits}

    parameters = frozenset(name for name, _ in model.network.named_parameters())
    return Boundary(run, cotangents, parameters)
