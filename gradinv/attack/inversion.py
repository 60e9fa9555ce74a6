"""The attack: from an observation back to images, as a stream of snapshots."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradinv.attack.objective import Objective
from gradinv.attack.state import Run, RunState
from gradinv.checks import check_memory, check_observation, parallel_seeds
from gradinv.config import AttackConfig
from gradinv.distributed import ALONE, Ranks
from gradinv.models import Model
from gradinv.prior import preview
from gradinv.recovery.labels import RestoredLabels, restore_labels
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
    ranks: Ranks = ALONE,
) -> Snapshots:
    """Reconstruct the batch behind an observation: x̂* = argmin L_grad + R_fidelity + R_group (Eqns 1–2, 9–12).

    Yields the start (step 0), then a snapshot every `every` steps and whenever `interval` seconds have passed since
    the last one, and always the last step. When `stop` is set, the current state is yielded within one evaluation
    and the run ends. On the CPU the same config gives the same images with as many threads, whatever the
    snapshots. With `resume` it goes on from there, first yielding that step once more: on the CPU it then gives the
    very images that it would have given uninterrupted.

    Several `ranks` share the seeds: each calls this with the same arguments, goes through all snapshots, which hold
    every seed on each rank, and stops where any of them is told to.

    Raises GradinvError, at once, for an observation that does not belong to the model or is not finite, for a config
    that it cannot serve, and where memory would not suffice; and during the run where the objective stops being
    finite or a rank is lost. Also where `resume` is the state of another run.
    """
    check_observation(model, observation)
    ranks.check(model.device)
    own = replace(config, seeds=len(ranks.share(config.seeds)))
    check_memory(model, observation.batch_size, own)
    restored = restore_labels(model, observation, config.labels)
    objective = Objective(model, observation, restored.labels, config)
    start = _start(model, objective, config) if resume is None else None
    run = Run(model, observation.batch_size, config, start, ranks)
    if resume is not None:
        run.restore(resume)
    # By the whole run's steps, so that each number of ranks executes them alike.
    steps = config.iterations * config.seeds
    parallel = parallel_seeds(model, observation.batch_size, own)
    stepper = Stepper(objective, config.stepping, steps=steps, parallel=parallel)
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
        """Where the run stands at the snapshot that came last, to `resume` from, with as many ranks as may be."""
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
        return _snapshot(run, stepper, known, judgements, step, time.perf_counter() - started)

    yield snapshot(begun)
    for step in range(begun + 1, steps + 1):
        done = run.step(step - 1, stepper, stop)
        if done is None:
            yield snapshot(step - 1)
            return
        judgements = done
        now = time.perf_counter()
        due = (every is not None and step % every == 0) or (interval is not None and now - emitted >= interval)
        due, stopped = run.ranks.any(due or step == steps, stop.is_set())
        if due or stopped:
            emitted = now
            yield snapshot(step)
            (stopped,) = run.ranks.any(stop.is_set())  # by whoever looked at it
        if stopped:
            return


def _start(model: Model, objective: Objective, config: AttackConfig) -> Tensor | None:
    """The normalised picture (B, 3, S, S) that every seed's noise is added to, or None for noise alone."""
    if config.start == "random" or objective.recovered is None:
        return None
    return model.preprocessing.normalise(preview(model, objective.recovered.features))


def _snapshot(
    run: Run,
    stepper: Stepper,
    known: _Known,
    judgements: list[Stepped],
    step: int,
    seconds: float,
) -> Snapshot:
    full = run.gather()
    preprocessing = run.model.preprocessing
    terms, distance = _values(run, known.weights, judgements) if judgements else ({}, ())
    return Snapshot(
        step=step,
        steps=run.config.iterations,
        seeds=preprocessing.denormalise(full).cpu(),
        consensus=preprocessing.denormalise(run.consensus(step)).cpu(),
        terms=terms,
        distance=distance,
        seconds=seconds,
        labels=tuple(known.restored.labels.tolist()),
        label_method=known.restored.method,
        label_confidence=known.restored.confidence,
        features_residual=known.residual,
        stepping=stepper.mode if judgements else "",
        parallel_seeds=stepper.parallel,
    )


def _values(
    run: Run, weights: Mapping[str, float], judgements: list[Stepped]
) -> tuple[dict[str, Term], tuple[float, ...]]:
    """Every seed's terms and distance, of all ranks."""
    rows = [[float(judged.raw[name]) for name in weights] + [float(judged.distance)] for judged in judgements]
    found = run.ranks.gather(torch.tensor(rows, dtype=torch.float64), run.config.seeds)
    *columns, distance = (tuple(column) for column in found.T.tolist())
    terms = {
        name: Term(raw, tuple(weight * value for value in raw))
        for (name, weight), raw in zip(weights.items(), columns, strict=True)
    }
    return terms, distance
