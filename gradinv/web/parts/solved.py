"""What was solved before the pixels: a ladder of the network's layers, and what that says in words."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from itertools import groupby
from typing import Any

from gradinv.cli import say
from gradinv.network import stage_of
from gradinv.web.parts import markup
from gradinv.web.parts.inversion import Layer, Solving

WHOLE = ("logits", "loss")  # boundaries that are no node
MISFIT = {
    "distance": (
        "Distance of the gradients",
        "One minus the cosine similarity of each seed’s gradient and the shared one by step, and their mean",
    ),
    "activations.raw": (
        "Misfit of the solved activations",
        "How far each seed’s activations are from the solved ones by step, and their mean",
    ),
}
"""By its column of the curves, all that an attacker has to go by: what it is called, and what its chart shows."""


def recorded(run: Mapping[str, Any]) -> Solving | None:
    """What the content of run.json says of it; None where nothing was solved, or nothing was recorded of that."""
    if not (found := run.get("recovered")) or not found["nodes"]:
        return None
    layers = [
        Layer(
            node["name"],
            tuple(node["shape"]),
            # What is not finite is null.
            tuple(float("inf") if value is None else value for value in node["error"]),
        )
        for node in found["nodes"]
    ]
    return Solving((), tuple(layers), run.get("boundary", ""), found["stopped"], found["seconds"])


def matching_instead(solving: Solving) -> bool:
    """Whether pixels are searched through the whole network, since no layer could be solved well enough."""
    return solving.boundary in WHOLE


def ladder(solving: Solving) -> str:
    """HTML: a mark for each layer, from the output down to the images, filled where it is solved, and the words."""
    known = {layer.name: layer for layer in solving.layers}
    names = solving.nodes or tuple(known)
    stages = [
        f'<span><small title="{escape(markup.TERMS.get(stage, stage))}">{escape(stage)}</small>'
        f"{''.join(_mark(name, known.get(name)) for name in own)}</span>"
        for stage, own in groupby(names, stage_of)
    ]
    counted = f"{f'{len(known)} of ' if solving.nodes else ''}{markup.count(len(names), 'layer')} solved"
    marks = f'<div class="gi-ladder" role="img" aria-label="{counted}">{"".join(stages)}</div>' if names else ""
    return f'<div class="gi-solved">{marks}<p>{escape(words(solving))}</p></div>'


def _mark(name: str, layer: Layer | None) -> str:
    if layer is None:
        return f'<i title="{escape(name)}"></i>'
    kind = "exact" if say.exact(layer.errors) else "near"
    return f'<i class="gi-{kind}" title="{escape(name)}: {escape(say.known(layer.errors))}"></i>'


def words(solving: Solving) -> str:
    """In a sentence or two how far it has come, and at its end what is searched below."""
    if solving.boundary is None:
        if not solving.layers:
            return "The labels are read, and the final layer is solved."
        return f"Solved: {_told(solving.layers[-1])}."
    if matching_instead(solving):
        why = f" {solving.stopped}" if solving.stopped else ""
        return (
            "The gradient does not determine the layers well enough, so pixels are searched for until their gradient "
            f"matches, by the preset Matching.{why}"
        )
    best = [layer for layer in solving.layers if say.exact(layer.errors)]
    lowest = next((layer for layer in solving.layers if layer.name == solving.boundary), solving.layers[-1])
    parts = [_told(layer) for layer in dict.fromkeys((*best[-1:], lowest))]
    below = solving.boundary or lowest.name
    return (
        f"Solved without a search in {markup.duration(solving.seconds)}: {'; '.join(parts)}. "
        f"Pixels are searched for below {below} only."
    )


def _told(layer: Layer) -> str:
    sides = " × ".join(str(side) for side in layer.shape)
    return f"{layer.name}, {layer.numbers:,} numbers of each picture ({sides}) known {say.known(layer.errors)}"
