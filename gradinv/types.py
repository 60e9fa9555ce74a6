"""The shapes that everything else is built on, defined once.

Conventions
-----------
Images are float32 of shape (B, 3, H, W). *Pixels* are in [0, 1]; *normalised* images are what the network takes,
(pixels − mean) / std. Every docstring says which. B is the batch size (the K of the paper), G the number of seeds.
"""

from __future__ import annotations

import json
import math
import operator
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from gradinv.errors import GradinvError as GradinvError
from gradinv.names import place_of, wrapper
from gradinv.paths import reason, replace_whole


def memory_exhausted(error: BaseException) -> str | None:
    """One sentence where memory ran out, the GPU's or the machine's; None for any other error."""
    text = str(error) if isinstance(error, RuntimeError) else ""
    if isinstance(error, torch.OutOfMemoryError) or "CUDA error: out of memory" in text or "ALLOC_FAILED" in text:
        return "The GPU ran out of memory; choose fewer pictures or a smaller model."
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        return "The machine ran out of memory; choose fewer pictures or seeds, or a smaller model."
    return None


Gradients: TypeAlias = Mapping[str, Tensor]
"""From parameter name to the gradient of the batch's mean cross-entropy, in the parameter's shape."""

_NAME = re.compile(r"[\w.]{1,200}")

MODES = ("eval", "train")
"""The forward modes of a client: BN by the running statistics, or by those of the batch."""


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes the network's input: shorter side to `resize`, centre crop to `size`, normalise."""

    size: int
    resize: int
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        """Take any three numbers, or one for all channels. Raises GradinvError for others, and a std that is not above
        0."""
        for name in ("mean", "std"):
            object.__setattr__(self, name, _triple(name, getattr(self, name)))

    def normalises_as(self, other: Preprocessing) -> bool:
        """Whether mean and std are the same, also where they have been through float32."""
        pairs = zip((*self.mean, *self.std), (*other.mean, *other.std), strict=True)
        return all(math.isclose(one, two, rel_tol=1e-5, abs_tol=1e-7) for one, two in pairs)

    def normalise(self, pixels: Tensor) -> Tensor:
        """Pixels in [0, 1], (…, 3, H, W) → normalised, the same shape."""
        mean, std = self._moments(pixels)
        return (pixels - mean) / std

    def denormalise(self, normalised: Tensor) -> Tensor:
        """Normalised, (…, 3, H, W) → pixels clamped to [0, 1], the same shape."""
        mean, std = self._moments(normalised)
        return (normalised * std + mean).clamp(0, 1)

    def bounds(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """What black and white are after normalisation: two tensors of shape (3, 1, 1)."""
        mean, std = self._moments(like)
        return -mean / std, (1 - mean) / std

    def _moments(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean = torch.tensor(self.mean, dtype=like.dtype, device=like.device)
        std = torch.tensor(self.std, dtype=like.dtype, device=like.device)
        return mean.view(3, 1, 1), std.view(3, 1, 1)


@dataclass(frozen=True, eq=False)
class BatchNormStatistics:
    """Per BN layer (by module name) the mean and the variance of its input over batch and space, each (C,).

    The variance is the biased one, except in `Observation.running`, where it is what torch keeps.
    """

    mean: Mapping[str, Tensor]
    var: Mapping[str, Tensor]

    def without(self, prefix: str) -> BatchNormStatistics:
        """The same with a prefix taken off all names."""
        if not prefix:
            return self
        mean, var = ({name.removeprefix(prefix): v for name, v in part.items()} for part in (self.mean, self.var))
        return BatchNormStatistics(mean, var)


@dataclass(frozen=True, eq=False)
class Observation:
    """All that the attacker has. It never holds an image or a true label.

    Of layers that the client does not train, `gradients` has none.
    `bn` is the client's own batch statistics if they leaked ("exact"), else None; the running statistics stored in
    the weights ("approx") need no field, they are in the model. `mode` is the client's forward mode, "eval" or "train".
    A client in train mode shares `running`, its running statistics after the step, as torch keeps them (averaged with
    the layer's momentum, unbiased variance): with those in the weights they tell the batch's own ("inferred").
    `label_smoothing` is ε where the client's labels are (1 − ε) y + ε/N; where it is not known, 0 will do, and it is
    solved for.
    """

    gradients: Gradients
    batch_size: int
    preprocessing: Preprocessing
    model_name: str
    model_sha256: str
    bn: BatchNormStatistics | None = None
    mode: str = "eval"
    running: BatchNormStatistics | None = None
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        """Take gradients as a mapping by name, or in the order of the network's parameters; as tensors or as NumPy
        arrays. What has none, None, is left out, and the prefix of what wraps the network is taken off the names.

        Raises GradinvError for what is none of these, and for a batch size that is no whole number of at least 1.
        """
        object.__setattr__(self, "batch_size", _whole(self.batch_size))
        for field, kind in _KINDS.items():
            value = getattr(self, field)
            if not isinstance(value, kind) and not (value is None and kind is BatchNormStatistics):
                raise GradinvError(f"The observation's {field} is a {type(value).__name__}; give a {kind.__name__}.")
        given = self.gradients
        if isinstance(given, list | tuple):
            given = {place_of(index, len(given)): value for index, value in enumerate(given)}
        if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
            raise GradinvError(
                "Gradients are given by their parameter's name, or as a list in the parameters' order, not as "
                f"{type(self.gradients).__name__}."
            )
        gradients = {name: _tensor(f"gradient of {name}", v) for name, v in given.items() if v is not None}
        if given and not gradients:
            raise GradinvError("Every gradient is None; observe after backward(), with parameters that require theirs.")
        prefix = wrapper(gradients)
        object.__setattr__(self, "gradients", {name.removeprefix(prefix): v for name, v in gradients.items()})
        for field in ("bn", "running"):
            if (statistics := getattr(self, field)) is not None:
                object.__setattr__(self, field, statistics.without(prefix))

    def negated(self) -> Observation:
        """The gradient that an update −η ∇L came of, up to the factor η, which the attack solves for."""
        return replace(self, gradients={name: -value for name, value in self.gradients.items()})

    def pack(self) -> bytes:
        """The content of a safetensors file for `load`: tensors as they are, the rest as JSON in its metadata."""
        tensors = {f"gradient/{name}": value for name, value in self.gradients.items()}
        for kind, statistics in (("bn", self.bn), ("running", self.running)):
            if statistics is not None:
                tensors |= {f"{kind}.mean/{name}": value for name, value in statistics.mean.items()}
                tensors |= {f"{kind}.var/{name}": value for name, value in statistics.var.items()}
        facts = {
            "format": 1,
            "batch_size": self.batch_size,
            "preprocessing": asdict(self.preprocessing),
            "model_name": self.model_name,
            "model_sha256": self.model_sha256,
            "mode": self.mode,
            "label_smoothing": self.label_smoothing,
        }
        # A copy, since the format refuses one tensor under two names.
        plain = torch.contiguous_format
        packed = {name: value.detach().cpu().clone(memory_format=plain) for name, value in tensors.items()}
        return safetensors.torch.save(packed, metadata={"observation": json.dumps(facts)})

    def save(self, path: str | Path) -> None:
        """Write to a file. Raises GradinvError where that is not possible."""
        try:
            replace_whole(Path(path).expanduser(), lambda part: part.write_bytes(self.pack()))
        except OSError as error:
            raise GradinvError(f"Cannot write the observation to {path}: {reason(error)}.") from error

    @classmethod
    def load(cls, path: str | Path) -> Observation:
        """Read what `save` wrote. Raises GradinvError where the file is not an observation."""
        try:
            data = Path(path).expanduser().read_bytes()
        except OSError as error:
            raise GradinvError(f"Cannot read an observation from {path}: {reason(error)}.") from error
        return cls.unpack(data, str(path))

    @classmethod
    def unpack(cls, data: bytes, path: str) -> Observation:
        """The inverse of `pack`; `path` is what errors call the file. Raises GradinvError for what is none."""
        try:
            tensors = safetensors.torch.load(data)
            # Only now is it sure that there is a header. The reader of bytes leaves its metadata out.
            size = int.from_bytes(data[:8], "little")
            metadata = json.loads(data[8 : 8 + size]).get("__metadata__") or {}
        except Exception as error:  # the reader raises half a dozen types for what is damaged
            why = "it is no complete safetensors file"
            raise GradinvError(f"Cannot read an observation from {path}: {why}.") from error
        try:
            facts = json.loads(metadata["observation"])
            if facts["format"] != 1:
                raise GradinvError(
                    f"The observation {path} is of format {facts['format']!s:.20}, and this version reads format 1; "
                    "use the version of gradinv that wrote it."
                )
            shape = facts["preprocessing"]
            preprocessing = Preprocessing(int(shape["size"]), int(shape["resize"]), shape["mean"], shape["std"])
            parts: dict[str, dict[str, Tensor]] = {kind: {} for kind in _PARTS}
            for key, value in tensors.items():
                kind, name = key.split("/", 1)
                if not _NAME.fullmatch(name):
                    raise ValueError("a tensor is not named as a module's parameters are")
                parts[kind][name] = value
            gradients, bn_mean, bn_var, running_mean, running_var = parts.values()
            told = {name: facts[name] for name in ("batch_size", "model_name", "model_sha256", "mode")}
        except GradinvError:
            raise
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise GradinvError(
                f"{path} is a safetensors file, but not an observation as Observation.save writes it ({error!s:.80})."
            ) from error
        try:
            return cls(
                gradients=gradients,
                preprocessing=preprocessing,
                bn=BatchNormStatistics(bn_mean, bn_var) if bn_mean or bn_var else None,
                running=BatchNormStatistics(running_mean, running_var) if running_mean or running_var else None,
                label_smoothing=facts.get("label_smoothing", 0.0),
                **told,
            )
        except GradinvError as error:
            raise GradinvError(f"The observation {path} cannot be used: {error}") from error


_KINDS = {
    "model_name": str,
    "model_sha256": str,
    "preprocessing": Preprocessing,
    "bn": BatchNormStatistics,
    "running": BatchNormStatistics,
}
_PARTS = ("gradient", "bn.mean", "bn.var", "running.mean", "running.var")


def _triple(name: str, value: Any) -> tuple[float, float, float]:
    """Of each channel the mean or the std. Raises GradinvError."""
    try:
        values = [float(value)] * 3 if np.ndim(value) == 0 else [float(one) for one in value]
    except (TypeError, ValueError):
        values = []
    least = -math.inf if name == "mean" else 0.0
    if len(values) != 3 or not all(math.isfinite(one) and one > least for one in values):
        wanted = "three numbers, or one," if name == "mean" else "three numbers above 0, or one,"
        raise GradinvError(f"The {name} to normalise by is {wanted} not {value!r:.60}.")
    return values[0], values[1], values[2]


def _whole(count: object) -> int:
    """A batch size as people have it: a number of Python or NumPy, or a tensor of one. Raises GradinvError."""
    if isinstance(count, Tensor | np.ndarray) and count.ndim == 0:
        count = count.item()
    try:
        number = None if isinstance(count, bool) else operator.index(count)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or number < 1:
        raise GradinvError(f"The batch size must be a whole number of at least 1, not {count!r:.40}.")
    return number


def _tensor(what: str, value: object) -> Tensor:
    """A tensor of a gradient, which no graph holds on to. Raises GradinvError for what is no array of numbers."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiu":
        return torch.tensor(value)
    if not isinstance(value, Tensor):
        raise GradinvError(f"The {what} is {value!r:.40}; a tensor is expected.")
    if value.is_meta:
        raise GradinvError(f"The {what} is on the meta device, without numbers; give the one that was computed.")
    if value.layout != torch.strided:
        value = value.to_dense()
    return value.clone() if value.is_inference() else value.detach()


@dataclass(frozen=True, eq=False)
class SolvedNode:
    """The activations of one node of the network (see `gradinv.network`), as the gradient gives them away.

    `activation` (B, C, H, W) is what the node holds for each image, at least 0. `cotangent`, of the same shape, is the
    derivative of the client's loss with respect to the pre-activation, 0 where the unit is off, with the client's own
    rescaling (`Recovered.scale`) in it; None where it is not known. `method` is "exact" where linear equations
    determine the node, the gradient's and what the block's output says of its input, "convex" where inequalities were
    needed.

    `error` is the estimated relative error ‖x − x*‖ / ‖x*‖ of each image (B,), `residual` the share of the equations'
    right side that is left unexplained. `equations` and `unknowns` are counted per channel of the node. `mended` is
    the share of the mask's entries, of the node above, that were wrong at first and were set right by the residual.
    """

    name: str
    activation: Tensor
    cotangent: Tensor | None
    method: str
    error: Tensor
    residual: float
    equations: int
    unknowns: int
    mended: float
    seconds: float

    @property
    def typical_error(self) -> float:
        """The median of `error` over the images."""
        return float(self.error.median())

    @property
    def on(self) -> Tensor:
        """Which units are on, (B, C, H, W) bool: through those alone the loss has a derivative. Of an activation that
        is not known exactly small values may be those of units that are off."""
        return self.activation > 0 if self.cotangent is None else self.cotangent != 0


@dataclass(frozen=True, eq=False)
class Recovered:
    """What the gradient says without a search, in closed form, from the labels down through the layers.

    `labels` (B,) int64 with the `method` that read them and its `confidence`. `features` F (B, D) and `output_errors`
    A = p − y (B, N) solve the final layer, up to a share `residual` of its gradient; the client multiplied its gradient
    by `scale`. They are None where the config asks for none or the final layer does not determine them. All images go
    in the labels' order. `nodes` are the solved ones, the highest first, `stopped` says in a sentence why there are no
    more. `notes` are sentences on what the gradient was found to be where it is not what the observation says.
    `label_smoothing` is ε of the client's labels, (1 − ε) y + ε/N, told or solved for.
    """

    labels: Tensor
    method: str
    confidence: float
    features: Tensor | None = None
    output_errors: Tensor | None = None
    residual: float | None = None
    scale: float = 1.0
    nodes: tuple[SolvedNode, ...] = ()
    stopped: str = ""
    notes: tuple[str, ...] = ()
    label_smoothing: float = 0.0


@dataclass(frozen=True)
class TermValues:
    """One term of the objective at one step: per seed its value before (`raw`) and after (`weighted`) its weight."""

    raw: tuple[float, ...]
    weighted: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Prior:
    """What a learned prior paints before the search: pixels (B, 3, H, W) in [0, 1], on the CPU, from the activations of
    `node`, or from the pooled features where that is "features". `misfit` has the objective's terms of that picture by
    name, before their weights: what it leaves unexplained of what was solved or observed."""

    node: str
    pixels: Tensor
    misfit: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A run at one step: detached, on the CPU, self-contained.

    `seeds` are each seed's pixels (G, B, 3, H, W), `consensus` the group's pixels (B, 3, H, W), both in [0, 1] and at
    full size also while a coarser stage is optimised. `terms` go by name and are those of the last step. `distance`
    is, per seed, one minus the cosine similarity between the gradient of the seed's images and the observed one over
    all matched parameters, empty where none is matched. `seconds` counts from the start of the run. `labels` are the
    restored labels, one an image, `label_method` is what read them and `label_confidence` how far to trust them, in
    [0, 1], None where nobody says.
    `features_residual` is what the recovered features leave unexplained, None where the attack does without them.
    `stepping` ("" before the first step) and `parallel_seeds` say how the steps were executed. `boundary` is down to
    where the network was solved: a node's name, "logits" or "loss". `prior` is what a learned prior painted beforehand,
    None in a run without one. `meetings` are the steps after which the seeds meet.
    """

    step: int
    steps: int
    seeds: Tensor
    consensus: Tensor
    terms: Mapping[str, TermValues]
    distance: tuple[float, ...]
    seconds: float
    labels: tuple[int, ...]
    label_method: str = ""
    label_confidence: float | None = None
    features_residual: float | None = None
    stepping: str = ""
    parallel_seeds: int = 1
    boundary: str = ""
    prior: Prior | None = None
    meetings: tuple[int, ...] = ()

    @property
    def final(self) -> bool:
        """Whether the last iteration has been done."""
        return self.step >= self.steps
