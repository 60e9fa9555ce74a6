"""One frozen dataclass configures a run. The command line and the page are built from its fields."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from gradinv.errors import GradinvError


def _option(default: Any, help: str, *, choices: tuple[str, ...] = (), least: float | None = None) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices, "least": least})


@dataclass(frozen=True)
class Attack:
    """Everything that decides what an inversion does. The defaults are the `paper` preset.

    Numbers follow arXiv 2104.07586 (its Eqns 1–3 and 8–12) where a field has a counterpart there. Lengths of time are
    in iterations, weights multiply the term they are named after, and images are optimised in normalised space.
    """

    seeds: int = _option(8, "independent reconstructions, |G| in the paper", least=1)
    iterations: int = _option(20_000, "optimisation steps of each seed", least=1)
    seed: int = _option(0, "where all randomness comes from", least=0)
    labels: str = _option(
        "column-minimum",
        "how labels are restored: column minimum (Eqn 8, distinct labels), LLG, bias-corrected or iLRG (these count "
        "repeated ones), or the one that explains the gradient best",
        choices=("auto", "column-minimum", "llg", "bias-corrected", "ilrg"),
    )

    match: str = _option(
        "l2",
        "how gradients are compared: l2 per layer (Eqn 3), one cosine over all, or the mean of the layers' cosines",
        choices=("l2", "cosine", "layer-cosine"),
    )
    gradient: float = _option(1e-3, "weight of gradient matching, α_G (0: control without the gradient)", least=0)
    layers: str = _option(
        "all",
        "which parameters are matched: all, or only those up to and including a stage or a node, such as layer3 or "
        "layer3.0.conv1",
    )
    boundary: str = _option(
        "loss",
        "down to where the network is solved and no more searched through: loss (the output errors p − y are predicted "
        "by the network for the current images, as in the paper), logits (p − y are recovered in closed form from the "
        "final layer's gradient), a node (such as layer2 or layer3.0.conv1: the layers above it are solved), or auto "
        "(the lowest node that the gradient determines; where there is none the matching preset runs instead)",
    )
    activations: float = _option(
        0.0, "weight of the solved activations at and above a node as the boundary (not in the paper)", least=0
    )
    features: float = _option(
        0.0,
        "weight of the recovered features' cosine distance (not in the paper); left out where a node below them is the "
        "boundary",
        least=0,
    )
    bn: str = _option(
        "approx",
        "which BN statistics are matched: those stored in the weights, the client's own batch as it leaked, that batch "
        "inferred from two successive running statistics, or none",
        choices=("approx", "exact", "inferred", "none"),
    )
    bn_weight: float = _option(0.1, "weight of the BN term, α_BN (0 is the same as bn=none)", least=0)
    bn_form: str = _option(
        "raw", "raw distances as in the paper, or each relative to the target's spread", choices=("raw", "relative")
    )
    tv: float = _option(1e-4, "weight of total variation, α_tv", least=0)
    tv_form: str = _option(
        "paper",
        "total variation: the paper's four difference maps, mean absolute differences of R, G, B or luma and chroma, "
        "or differences of luma and chroma that are smooth where they are small",
        choices=("paper", "rgb", "luma-chroma", "smooth"),
    )
    tv_chroma: float = _option(
        3.0, "what the two chroma channels count in the luma-chroma and smooth forms, where luma counts 1", least=0
    )
    tv_schedule: tuple[float, ...] = _option(
        (), "what the weight of total variation is multiplied by in each annealing stage (empty: 1 throughout)"
    )
    l2: float = _option(1e-6, "weight of the image's ℓ2 norm, α_ℓ2", least=0)
    group: float = _option(0.01, "weight of group consistency, α_group (Eqn 11)", least=0)
    registration: str = _option(
        "affine",
        "how the group's images are aligned to their mean before they are averaged (Eqn 12): not at all (lazy) or by "
        "an affine map",
        choices=("lazy", "affine"),
    )
    registration_start: float = _option(0.25, "share of the run before the first registration", least=0)
    registration_interval: float = _option(0.005, "share of the run between two registrations", least=0)

    optimiser: str = _option(
        "adam",
        "Adam, or L-BFGS over pixels that a sigmoid keeps in [0, 1] (with it the settings of Adam's step, learning "
        "rate, noise and projection do nothing)",
        choices=("adam", "l-bfgs"),
    )
    pooling: tuple[float, ...] = _option(
        (),
        "annealing where a node is the boundary: in each of these equal stages the stem's maximum over a window is "
        "softened to a mean weighted by softmax(β v), with this β (0: the maximum itself; empty: that throughout)",
    )
    optimiser_step: str = _option(
        "gradient", "what Adam is fed: the pixel gradient or its sign", choices=("gradient", "sign")
    )
    learning_rate: float = _option(0.1, "Adam's learning rate after warm-up, then cosine decay to 0", least=0)
    warmup: int = _option(50, "steps of linear warm-up (at most a tenth of the run)", least=0)
    noise: float = _option(0.2, "pixel noise after each step, α_n, times the current learning rate", least=0)
    projection: bool = _option(False, "project pixels onto [0, 1] after each step")
    start: str = _option(
        "random",
        "what a seed starts from: noise, or the picture that a learned decoder makes of the lowest solved activations, "
        "or else of the recovered features (a prior learned from public pictures)",
        choices=("random", "decoder"),
    )
    prior: float = _option(
        0.0, "weight of the squared distance of the pixels from the decoder's picture, with start=decoder", least=0
    )
    start_scale: float = _option(1.0, "standard deviation of the random start, in normalised units", least=0)
    meetings: tuple[float, ...] = _option(
        (),
        "shares of the run after which the seeds meet: each goes on from what all agree on, with noise of its own "
        "(empty: each goes its own way; not in the paper)",
    )
    meeting_scale: float = _option(0.3, "standard deviation of that noise, in normalised units", least=0)
    stages: tuple[float, ...] = _option(
        (),
        "coarse to fine: the share of the steps spent at each resolution, coarsest first; each stage doubles the side "
        "and the last is full size (empty: full size throughout)",
    )

    @property
    def needs_layers(self) -> bool:
        """Whether the attack takes anything from the layers below the final one."""
        return self.boundary not in ("loss", "logits") and (self.gradient > 0 or self.activations > 0)

    @property
    def needs_features(self) -> bool:
        """Whether the attack takes more from the final layer than the labels."""
        known_errors = self.gradient > 0 and self.boundary == "logits"
        return self.features > 0 or known_errors or self.needs_layers or self.start == "decoder"


@dataclass(frozen=True)
class Execution:
    """How an attack is executed: with the same result, to rounding, in another time and memory."""

    stepping: str = _option(
        "auto",
        "how a step is executed, with the same result to rounding: by autograd, by a recording of its operations, by "
        "that as a CUDA graph, or by whichever is fastest here",
        choices=("auto", "eager", "traced", "graph"),
    )
    micro_batch: int = _option(
        0,
        "how many images the network takes at a time, with the same result: less memory, more time (0: all at once)",
        least=0,
    )
    parallel_seeds: int = _option(
        0,
        "how many seeds a CPU works on at a time, each with its share of the threads and with the same result to "
        "rounding (0: as many as there are threads, where that takes no more than a quarter of the memory)",
        least=0,
    )


@dataclass(frozen=True)
class AttackConfig(Execution, Attack):
    """An attack and how it is executed. Every field is an option of the command line, and of the page where the network
    has a use for it."""

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value: Any = getattr(self, item.name)
            choices, least = item.metadata["choices"], item.metadata["least"]
            expected = type(item.default)
            if expected is tuple and isinstance(value, list):  # as JSON has it
                object.__setattr__(self, item.name, value := tuple(value))
            numeric = int | float if expected is float else expected
            if not isinstance(value, numeric) or (expected is not bool and isinstance(value, bool)):
                raise GradinvError(f"{item.name} takes a value of type {expected.__name__}, not {value!r}.")
            if (gone := retired(item.name, value)) is not None:
                raise GradinvError(gone)
            if choices and value not in choices:
                raise GradinvError(f"{item.name} takes one of {', '.join(choices)}, not {value!r}.")
            if least is not None and not least <= cast(float, value) < math.inf:  # NaN is refused too
                raise GradinvError(f"{item.name} must be a finite number of at least {least:g}, not {value!r}.")
        if not _BOUNDARY.fullmatch(self.boundary):
            raise GradinvError(
                "boundary takes loss, logits, auto, or a node's name such as maxpool, layer2, layer2.1 or "
                f"layer3.0.conv1, not {self.boundary!r}."
            )
        shares = self.stages
        if shares and not (all(_real(s) and 0 < s <= 1 for s in shares) and math.isclose(sum(shares), 1, abs_tol=1e-6)):
            raise GradinvError(f"stages are positive shares of the steps that sum to 1, not {shares!r}.")
        for name in ("pooling", "tv_schedule"):
            values = getattr(self, name)
            if not all(_real(value) and 0 <= value < math.inf for value in values):
                raise GradinvError(f"{name} takes finite numbers of at least 0, not {values!r}.")
        if not all(_real(share) and 0 < share < 1 for share in self.meetings):
            raise GradinvError(f"meetings are shares of the run between 0 and 1, not {self.meetings!r}.")
        counts = len(self.pooling), len(self.tv_schedule)
        if all(counts) and counts[0] != counts[1]:
            raise GradinvError(
                f"pooling has {counts[0]} annealing stages and tv_schedule {counts[1]}; give as many, or leave one "
                "empty."
            )

    @classmethod
    def preset(cls, name: str, model: str | None = None, **changes: Any) -> AttackConfig:
        """The preset of that name (`paper`, `matching`, `demo`), for a model where it depends on one, and single fields
        changed.

        Raises GradinvError for an unknown preset, an unknown field, or a value out of range.
        """
        if name not in PRESETS:
            raise GradinvError(f"There is no preset {name!r}; take one of {', '.join(PRESETS)}.")
        return cls.from_dict({**PRESETS[name], **PRESETS_BY_MODEL.get((name, model or ""), {}), **changes})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AttackConfig:
        """The inverse of `to_dict`; missing fields take their defaults. What older versions wrote is `upgraded`. Raises
        GradinvError for an unknown key."""
        values = _without_luma(upgraded(values))
        known = {item.name for item in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise GradinvError(f"There is no setting {unknown[0]!r}; known are {', '.join(sorted(known))}.")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Every field, as JSON can hold it: `from_dict(json.loads(json.dumps(c.to_dict()))) == c`."""
        values = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def upgraded(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as they are called today. What older versions called `errors` belongs to an attack that knew no solved
    layers, so that what has come since is off unless it is set as well. Raises GradinvError for an unknown value."""
    found = {RENAMED.get(name, name): value for name, value in settings.items()}
    if found.get("bn_weight") == 0:
        found |= {"bn": "none", "bn_weight": AttackConfig.bn_weight}
    if "errors" not in found:
        return found
    errors = found.pop("errors")
    if errors not in _ERRORS:
        raise GradinvError(f"errors, which is called boundary now, took one of {', '.join(_ERRORS)}, not {errors!r}.")
    since = {name: getattr(AttackConfig, name) for name in ("activations", "optimiser", "pooling", "tv_schedule")}
    return {**since, **found, "boundary": _ERRORS[errors]}


def _without_luma(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Luma had a share `tv_luma` beside `tv_chroma`: two numbers say what these and `tv` said."""
    found = dict(settings)
    luma = found.pop("tv_luma", 1.0)
    if not _real(luma) or not 0 <= luma < math.inf:
        raise GradinvError(f"tv_luma was a finite number of at least 0, not {luma!r}; set tv and tv_chroma instead.")
    if (gone := retired("tv_luma", float(luma))) is not None:
        raise GradinvError(gone)
    form, tv, chroma = (found.get(name, getattr(Attack, name)) for name in ("tv_form", "tv", "tv_chroma"))
    if luma != 1 and form in ("luma-chroma", "smooth"):
        found |= {"tv": tv * luma, "tv_chroma": chroma / luma}
    return found


def retired(name: str, value: object) -> str | None:
    """Of a choice that older versions had, the sentence that says what replaced it; None for any other value."""
    instead = _RETIRED.get((name, str(value)))
    return None if instead is None else f"{name}={value} is gone; take {instead}."


def recorded(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Every field of a config as some version recorded it, under today's names; choices that are gone stay, so that it
    may be one that no longer runs. Raises GradinvError for an unknown key or value."""
    found = upgraded(settings)
    gone = {name: value for name, value in found.items() if retired(name, value) is not None}
    return AttackConfig.from_dict({name: found[name] for name in found if name not in gone}).to_dict() | gone


_RETIRED = {
    ("registration", "shift"): "affine, which finds shifts as well",
    ("registration", "flow"): "affine: dense flow gained nothing over it",
    ("tv_luma", "0.0"): "another tv_chroma, since luma always counts 1",
    ("stepping", "packed"): "traced, which is as fast or faster by now",
}
RENAMED = {"box": "projection"}
"""Settings of older versions that have another name now."""

_ERRORS = {"predicted": "loss", "recovered": "logits"}
_BOUNDARY = re.compile(r"loss|logits|auto|maxpool|layer[1-4](\.\d+(\.conv[1-3])?)?")


def _real(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# What both presets of ours have; what they are made of was measured: docs/results.md and
# docs/gradient-matching.md.
_OURS: dict[str, Any] = {
    "seeds": 2,
    "match": "cosine",
    "layers": "layer3",
    "bn_form": "relative",
    "bn_weight": 0.02,
    "l2": 0.0,
    "group": 0.0,
    "registration": "lazy",
    "labels": "auto",
    "noise": 0.0,
    "projection": True,
}
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "matching": _OURS
    | {
        "iterations": 250,
        "gradient": 1.0,
        "boundary": "logits",
        "features": 0.5,
        "tv": 0.2,
        "tv_form": "luma-chroma",
        "tv_chroma": 2.0,
        "optimiser_step": "sign",
        "learning_rate": 0.2,
        "start_scale": 0.1,
        "stages": (0.25, 0.3, 0.45),
    },
    "demo": _OURS
    | {
        "iterations": 300,
        "gradient": 0.0,
        "boundary": "auto",
        "activations": 1.0,
        "bn": "none",
        "tv": 0.6,
        "tv_form": "smooth",
        "tv_chroma": 1.0,
        "tv_schedule": (1.0, 1.0, 0.5, 0.33, 0.17, 0.5, 0.33, 0.17),
        "optimiser": "l-bfgs",
        "pooling": (0.3, 1.0, 3.0, 10.0, 0.0, 3.0, 10.0, 0.0),
        "meetings": (0.625,),
        "start_scale": 0.45,
    },
}
# What `demo` becomes where the search starts from a picture that was painted near its boundary, by the stage of what it
# was painted from: the higher that lies, the less it says of the pixels, and the more the search is drawn to it.
_FROM_HIGH: dict[str, Any] = {
    "iterations": 50,
    "pooling": (0.0,),
    "tv_schedule": (0.1,),
    "meetings": (),
    "start_scale": 0.1,
}
FROM_PAINTING: dict[str, dict[str, Any]] = {
    "layer1": {
        "iterations": 150,
        "prior": 0.15,
        "pooling": (3.0, 10.0, 0.0),
        "tv_schedule": (0.17, 0.1, 0.05),
        "meetings": (),
        "start_scale": 0.03,
    },
    "layer2": {**_FROM_HIGH, "prior": 10.0},
    "layer3": {**_FROM_HIGH, "prior": 100.0},
}
# And where it was painted from a stage above: much is still to be found, so the annealing stays.
FROM_ABOVE: dict[str, Any] = {"start_scale": 0.3}
# What it becomes where the boundary lies above the first stage: the seeds differ by what the boundary leaves open, and
# the mean of seeds that never met is nearer than what they find after a meeting.
APART: dict[str, Any] = {
    "pooling": (0.3, 1.0, 3.0, 10.0, 0.0),
    "tv_schedule": (1.0, 1.0, 0.5, 0.33, 0.17),
    "meetings": (),
}
# Where an iteration costs a third, three times as many fit in the same minutes.
PRESETS_BY_MODEL: dict[tuple[str, str], dict[str, Any]] = {
    ("matching", "resnet18-tiny"): {"iterations": 800},
}
