"""The attack: from an observation back to images, as a stream of snapshots."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from gradinv.checks import check_memory, check_observation
from gradinv.config import AttackConfig
from gradinv.labels import RestoredLabels, restore_labels
from gradinv.models import Model
from gradinv.objective import Objective
from gradinv.prior import preview
from gradinv.state import Run, RunState
from gradinv.stepping import Stepped, Stepper
from gradinv.types import Observation, Snapshot, Term


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
    run = Run(model, observation.batch_size, config, start)
    if resume is not None:
        run.restore(resume)
    stepper = Stepper(objective, config.stepping, steps=config.iterations * config.seeds)
    known = _Known(objective.weights, restored, None if objective.recovered is None else objective.recovered.residual)
    stream = _iterate(run, stepper, known, every, interval, stop or threading.Event(), resume)
    return Snapshots(run, stream)


class Snapshots(Iterator[Snapshot]):
    """The snapshots of a run as they come."""

    def __init__(self, run: Run, stream: Generator[Snapshot]) -> None:
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
    run: Run,
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


def _snapshot(
    run: Run,
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
