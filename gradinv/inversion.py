"""The attack: from an observation back to images, as a stream of snapshots."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional as F

from gradinv.config import AttackConfig
from gradinv.consensus import consensus
from gradinv.labels import RestoredLabels, restore_labels
from gradinv.models import Model
from gradinv.objective import Objective, check_train_mode, running_statistics
from gradinv.prior import preview
from gradinv.stepping import Stepped, Stepper
from gradinv.types import MODES, BatchNormStatistics, GradinvError, Observation, Snapshot, Term


def invert(
    model: Model,
    observation: Observation,
    config: AttackConfig,
    *,
    every: int | None = None,
    interval: float | None = None,
    stop: threading.Event | None = None,
    resume: RunState | None = None,
) -> Snapshots:
    """Reconstruct the batch behind an observation: x̂* = argmin L_grad + R_fidelity + R_group (Eqns 1–2, 9–12).

    Yields the start (step 0), then a snapshot every `every` steps and whenever `interval` seconds have passed since
    the last one, and always the last step. When `stop` is set, the current state is yielded within one evaluation
    and the run ends. The same config on the same device gives the same images, whatever the snapshots. With `resume`
    it goes on from there, first yielding that step once more: on the CPU it then gives the very images that it would
    have given uninterrupted.

    Raises GradinvError, at once, for an observation that does not belong to the model or is not finite, for a config
    that it cannot serve, and where memory would not suffice; and during the run where the objective stops being
    finite. Also where `resume` is the state of another run.
    """
    check_observation(model, observation)
    check_memory(model, observation.batch_size, config)
    restored = restore_labels(model, observation, config.labels)
    objective = Objective(model, observation, restored.labels, config)
    start = _start(model, objective, config) if resume is None else None
    run = _Run(model, observation.batch_size, config, start)
    if resume is not None:
        run.restore(resume)
    stepper = Stepper(objective, config.stepping, steps=config.iterations * config.seeds)
    known = _Known(objective.weights, restored, None if objective.recovered is None else objective.recovered.residual)
    stream = _iterate(run, stepper, known, every, interval, stop or threading.Event(), resume)
    return Snapshots(run, stream)


@dataclass(frozen=True, eq=False)
class RunState:
    """All that the steps after the first `step` depend on, on the CPU; `seconds` is how long those had taken."""

    step: int
    seconds: float
    tensors: Mapping[str, Tensor]

    def pack(self) -> bytes:
        """The content of a safetensors file that `load` reads."""
        facts = {"step": self.step, "seconds": self.seconds}
        return safetensors.torch.save(dict(self.tensors), metadata={"state": json.dumps(facts)})

    @classmethod
    def load(cls, path: str | Path) -> RunState:
        """Raises GradinvError where there is no such file or it is not a whole state."""
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                facts = json.loads((file.metadata() or {})["state"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            return cls(int(facts["step"]), float(facts["seconds"]), tensors)
        except FileNotFoundError as error:
            raise GradinvError(f"There is no saved state {path}, so the run has to be started again.") from error
        except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
            raise GradinvError(f"The saved state {path} is damaged ({error}); start the run again.") from error


class Snapshots(Iterator[Snapshot]):
    """The snapshots of a run as they come."""

    def __init__(self, run: _Run, stream: Generator[Snapshot]) -> None:
        self._run = run
        self._stream = stream
        self._last: Snapshot | None = None

    def __next__(self) -> Snapshot:
        self._last = next(self._stream)
        return self._last

    def close(self) -> None:
        """End the run; no further snapshot comes."""
        self._stream.close()

    def state(self) -> RunState:
        """Where the run stands at the snapshot that came last, to `resume` from."""
        if self._last is None:
            raise RuntimeError("The state of a run is known from its first snapshot on.")
        return RunState(self._last.step, self._last.seconds, self._run.tensors())


@dataclass(frozen=True, eq=False)
class _Known:
    """What a run knows from its start on: the terms' weights, the labels, and the recovered features' residual."""

    weights: Mapping[str, float]
    restored: RestoredLabels
    residual: float | None


def _iterate(
    run: _Run,
    stepper: Stepper,
    known: _Known,
    every: int | None,
    interval: float | None,
    stop: threading.Event,
    resume: RunState | None,
) -> Generator[Snapshot]:
    begun, before = (0, 0.0) if resume is None else (resume.step, resume.seconds)
    emitted = time.perf_counter()
    started = emitted - before
    judgements: list[Stepped] = []
    steps = run.config.iterations

    def snapshot(step: int) -> Snapshot:
        return _snapshot(run, known, judgements, step, time.perf_counter() - started)

    yield snapshot(begun)
    for step in range(begun + 1, steps + 1):
        done = run.step(step - 1, stepper, stop)
        if done is None:
            yield snapshot(step - 1)
            return
        judgements = done
        now = time.perf_counter()
        due = (every is not None and step % every == 0) or (interval is not None and now - emitted >= interval)
        if due or step == steps or stop.is_set():
            emitted = now
            yield snapshot(step)
        if stop.is_set():
            return


def _start(model: Model, objective: Objective, config: AttackConfig) -> Tensor | None:
    """The normalised picture (B, 3, S, S) that every seed's noise is added to, or None for noise alone."""
    if config.start == "random" or objective.recovered is None:
        return None
    return model.preprocessing.normalise(preview(model, objective.recovered.features))


class _Run:
    """The state that is optimised: every seed's images, their generators, one Adam over all.

    `_group` is the group's mean that the seeds are drawn to: once registration has begun it is held between two.
    """

    def __init__(self, model: Model, batch_size: int, config: AttackConfig, start: Tensor | None = None) -> None:
        self.model = model
        self.config = config
        size = model.preprocessing.size
        self._plan = stage_plan(config, size)
        self._generators = [
            torch.Generator(model.device).manual_seed(_seed_of(config.seed, index)) for index in range(config.seeds)
        ]
        side = self._plan[0][1]
        noise = [self._normal(index, (batch_size, 3, side, side)) for index in range(config.seeds)]
        self.images = torch.stack(noise) * config.start_scale
        if start is not None:
            self.images += F.interpolate(start, (side, side), mode="area")
        self._group: Tensor | None = None
        self._limits = model.preprocessing.bounds(self.images)
        self._project()
        self._adam = self._optimiser()

    def _optimiser(self) -> torch.optim.Adam:
        self.images.requires_grad_()
        return torch.optim.Adam([self.images], lr=self.config.learning_rate)

    def _normal(self, index: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self._generators[index], device=self.model.device)

    def _project(self) -> None:
        if self.config.box:
            low, high = self._limits
            self.images.data.clamp_(low, high)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that changes from step to step, copied to the CPU; `restore` takes it."""
        adam = self._adam.state_dict()["state"].get(0, {})
        found = {"images": self.images, **{f"adam.{name}": value for name, value in adam.items()}}
        found |= {f"generator.{index}": generator.get_state() for index, generator in enumerate(self._generators)}
        if self._group is not None:
            found["group"] = self._group
        return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in found.items()}

    def restore(self, state: RunState) -> None:
        """Go back to where `tensors` was called. Raises GradinvError for the state of another run."""
        # Copies: the run goes on in place.
        tensors, device = {name: value.clone() for name, value in state.tensors.items()}, self.model.device
        sides = {side for _, side in self._plan}
        count, batch_size = self.images.shape[:2]
        try:
            images = tensors["images"]
            side = images.shape[-1]
            if images.shape != (count, batch_size, 3, side, side) or side not in sides:
                raise GradinvError(f"images of the shape {tuple(images.shape)}")
            if not 0 <= state.step <= self.config.iterations:
                raise GradinvError(f"{state.step} steps")
            for index, generator in enumerate(self._generators):
                generator.set_state(tensors[f"generator.{index}"])
        except (GradinvError, KeyError, IndexError, RuntimeError, TypeError) as error:
            raise GradinvError(f"The saved state is that of another run ({error}); start this one again.") from error
        self.images = images.to(device)
        self._adam = self._optimiser()
        adam = {name.removeprefix("adam."): value for name, value in tensors.items() if name.startswith("adam.")}
        if adam:
            self._adam.load_state_dict({**self._adam.state_dict(), "state": {0: adam}})
        self._group = tensors["group"].to(device) if "group" in tensors else None

    def full_size(self) -> Tensor:
        """Every seed's normalised images (G, B, 3, S, S), upsampled where the stage is coarser."""
        return upsample(self.images, self.model.preprocessing.size)

    def step(self, step: int, stepper: Stepper, stop: threading.Event) -> list[Stepped] | None:
        """One iteration of every seed; None, and nothing changed, where `stop` was set on the way."""
        config = self.config
        self._enter_stage(step)
        group = self._drawn_to(step)
        judgements, gradients = [], []
        for images in self.images:
            if stop.is_set():
                return None
            full = upsample(images, self.model.preprocessing.size)
            judgement = stepper(full, group)
            # Through the upsampling of a coarse stage.
            gradients.append(torch.autograd.grad(full, images, judgement.gradient)[0])
            judgements.append(judgement)
        gradient = torch.stack(gradients)
        if not torch.isfinite(gradient).all():
            raise GradinvError(
                f"The objective stopped being finite at iteration {step + 1}; "
                "take a lower learning rate or other weights."
            )
        self.images.grad = gradient.sign() if config.optimiser_step == "sign" else gradient
        rate = learning_rate(step, config)
        self._adam.param_groups[0]["lr"] = rate
        self._adam.step()
        with torch.no_grad():
            if config.noise > 0:
                noise = [self._normal(index, tuple(images.shape)) for index, images in enumerate(self.images)]
                self.images += rate * config.noise * torch.stack(noise)
            self._project()
        return judgements

    def consensus(self, step: int) -> Tensor:
        """What the seeds agree on after `step` steps, normalised (B, 3, S, S): registered once that has begun."""
        begun = step >= self.config.registration_start * self.config.iterations
        with torch.no_grad():
            return consensus(self.full_size(), self.config.registration if begun else "lazy")

    def _drawn_to(self, step: int) -> Tensor:
        """E(x̂_{g∈G}) of Eqn 11: the plain mean of this step, or the registered mean (Eqn 12), renewed at intervals."""
        config = self.config
        if config.group == 0:  # nothing is drawn to it
            return self.full_size().detach().mean(0)
        first = math.ceil(config.registration_start * config.iterations)
        interval = max(1, round(config.registration_interval * config.iterations))
        held = config.registration != "lazy" and step > first and (step - first) % interval > 0
        if self._group is None or not held:
            self._group = self.consensus(step)
        return self._group

    def _enter_stage(self, step: int) -> None:
        side = next(side for first, side in reversed(self._plan) if step >= first)
        if side != self.images.shape[-1]:
            self.images = upsample(self.images.detach(), side)
            # Adam's moments belong to the coarser pixels: a new stage starts them afresh.
            self._adam = self._optimiser()


def upsample(images: Tensor, side: int) -> Tensor:
    """(…, 3, h, h) → (…, 3, side, side), bilinear; the images themselves where they have that size."""
    if images.shape[-1] == side:
        return images
    flat = F.interpolate(images.reshape(-1, *images.shape[-3:]), (side, side), mode="bilinear", align_corners=False)
    return flat.reshape(*images.shape[:-2], side, side)


def stage_plan(config: AttackConfig, size: int) -> list[tuple[int, int]]:
    """Coarse to fine: the first step and the side in pixels of each stage, the last at full size."""
    shares = config.stages or (1.0,)
    plan, first = [], 0.0
    for index, share in enumerate(shares):
        side = max(1, size >> (len(shares) - 1 - index))
        plan.append((round(first * config.iterations), side))
        first += share
    return plan


def learning_rate(step: int, config: AttackConfig) -> float:
    """Linear warm-up, then cosine decay to 0 at the end of the run."""
    warmup = min(config.warmup, config.iterations // 10)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, config.iterations - warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def check_observation(model: Model, observation: Observation) -> None:
    """Raises GradinvError, in one sentence, for an observation that is not one of this model or is not finite."""
    _check_origin(model, observation)
    count = observation.batch_size
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise GradinvError(f"The observation's batch size must be a whole number of at least 1, not {count!r}.")
    if observation.mode not in MODES:
        raise GradinvError(
            f"The observation's forward mode must be {' or '.join(MODES)}, not {observation.mode!r}; say in which one "
            "the client took its gradient."
        )
    if observation.mode == "eval" and observation.running is not None:
        raise GradinvError(
            "The observation holds running statistics after a step, but its forward mode is eval, in which none are "
            "kept; set its mode to train, or leave them out."
        )
    if observation.mode == "train":
        check_train_mode(model, count)
    _check_gradients(model, observation.gradients)
    for statistics, whose in ((observation.bn, "batch"), (observation.running, "running")):
        if statistics is not None:
            _check_statistics(model, statistics, whose)


def _check_origin(model: Model, observation: Observation) -> None:
    if observation.model_sha256 != model.sha256:
        theirs, ours = f"{observation.model_sha256:.8}…", f"{model.sha256:.8}…"
        if observation.model_name == model.name:
            raise GradinvError(
                f"The observation was made with other weights of {model.name} (sha256 {theirs}) than those loaded "
                f"(sha256 {ours}); load the file that it was made with."
            )
        raise GradinvError(
            f"The observation is of the network {observation.model_name} (sha256 {theirs}), not of {model.name} "
            f"(sha256 {ours}); load that one."
        )
    theirs_at, ours_at = observation.preprocessing, model.preprocessing
    if theirs_at.size != ours_at.size:
        raise GradinvError(
            f"The observation is of {theirs_at.size}-px images, the model is set to {ours_at.size} px; set the same "
            "image size."
        )
    if theirs_at != ours_at:
        raise GradinvError(
            f"The observation's preprocessing ({theirs_at}) is not the model's ({ours_at}); take that of the loaded "
            "model."
        )


def _check_gradients(model: Model, gradients: Mapping[str, Tensor]) -> None:
    expected = dict(model.network.named_parameters())
    if missing := [name for name in expected if name not in gradients]:
        raise GradinvError(
            f"The observation lacks the gradient of {missing[0]}{_others(missing)}; {model.name} has {len(expected)} "
            "parameters, and the gradient of each one is needed."
        )
    if unknown := [name for name in gradients if name not in expected]:
        raise GradinvError(
            f"The observation holds a gradient of {unknown[0]}{_others(unknown)}, which {model.name} does not have; "
            "name them as the model's own named_parameters() does."
        )
    for name, parameter in expected.items():
        _check_tensor(gradients[name], parameter.shape, f"gradient of {name}")
    if not any(gradient.any() for gradient in gradients.values()):
        raise GradinvError("Every gradient of the observation is zero, so there is nothing to match.")


def _check_statistics(model: Model, statistics: BatchNormStatistics, whose: str) -> None:
    expected = running_statistics(model.network).mean
    for kind, given in (("mean", statistics.mean), ("variance", statistics.var)):
        if missing := [name for name in expected if name not in given]:
            raise GradinvError(
                f"The observation's {whose} statistics lack the {kind} of the BN layer {missing[0]}{_others(missing)}; "
                "give each layer's, or none."
            )
        if unknown := [name for name in given if name not in expected]:
            raise GradinvError(
                f"The observation's {whose} statistics name a BN layer {unknown[0]}{_others(unknown)} that "
                f"{model.name} does not have."
            )
        for name, value in expected.items():
            what = f"{whose} {kind} of the BN layer {name}"
            _check_tensor(given[name], value.shape, what)
            if kind == "variance" and (given[name] < 0).any():
                raise GradinvError(f"The {what} is negative, which no variance is; measure it again.")


def _check_tensor(value: Tensor, shape: torch.Size, what: str) -> None:
    if not isinstance(value, Tensor):
        raise GradinvError(f"The {what} is {value!r}; a tensor is expected.")
    if value.shape != shape:
        raise GradinvError(f"The {what} has the shape {tuple(value.shape)} instead of {tuple(shape)}.")
    if not value.is_floating_point():
        raise GradinvError(f"The {what} holds {value.dtype}; floating-point numbers are expected.")
    if not torch.isfinite(value).all():
        raise GradinvError(f"The {what} holds values that are not finite, so there is nothing to match.")


def _others(names: Sequence[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def estimate_memory(model: Model, batch_size: int, config: AttackConfig) -> int:
    """About how many bytes a run adds to the loaded model, from above.

    Per seed its images, Adam's two moments, the gradient and a snapshot; once, since seeds take turns, the gradients
    with their double backward and the activations of one evaluation.
    """
    size = model.preprocessing.size
    image_bytes = 4 * batch_size * 3 * size * size
    parameter_bytes = 4 * sum(parameter.numel() for parameter in model.network.parameters())
    # A ResNet keeps about 180 (ResNet-18: 50) float32 values a pixel; the double backward holds about four times that.
    activations = 4 * 180 * image_bytes // 3
    return config.seeds * 8 * image_bytes + 8 * parameter_bytes + activations


def check_memory(model: Model, batch_size: int, config: AttackConfig) -> None:
    """Raises GradinvError where `estimate_memory` exceeds what is free on the model's device."""
    if model.device.type == "cuda":
        free = torch.cuda.mem_get_info(model.device)[0]
    else:
        free = psutil.virtual_memory().available
    needed = estimate_memory(model, batch_size, config)
    if needed > free:
        raise GradinvError(
            f"{config.seeds} seeds of {batch_size} images need about {needed / 2**30:.1f} GiB and "
            f"{free / 2**30:.1f} GiB are free; take fewer seeds or a smaller batch."
        )


def _seed_of(seed: int, index: int) -> int:
    # Spread so that seed 0 of run 1 is not seed 1 of run 0.
    return (seed * 1_000_003 + index * 7_919 + 1) % 2**63


def _snapshot(
    run: _Run,
    known: _Known,
    judgements: list[Stepped],
    step: int,
    seconds: float,
) -> Snapshot:
    full = run.full_size().detach()
    preprocessing = run.model.preprocessing
    terms: Mapping[str, Term] = {
        name: Term(
            raw=(raw := tuple(float(judgement.raw[name]) for judgement in judgements)),
            weighted=tuple(weight * value for value in raw),
        )
        for name, weight in known.weights.items()
        if judgements
    }
    return Snapshot(
        step=step,
        steps=run.config.iterations,
        seeds=preprocessing.denormalise(full).cpu(),
        consensus=preprocessing.denormalise(run.consensus(step)).cpu(),
        terms=terms,
        distance=tuple(float(judgement.distance) for judgement in judgements),
        seconds=seconds,
        labels=tuple(known.restored.labels.tolist()),
        label_method=known.restored.method,
        label_confidence=known.restored.confidence,
        features_residual=known.residual,
    )
