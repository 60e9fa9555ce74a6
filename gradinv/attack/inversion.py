"""The attack: from an observation back to images, as a stream of snapshots."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from gradinv.attack.boundary import settled
from gradinv.attack.memory import check_memory, parallel_seeds
from gradinv.attack.objective import Objective
from gradinv.attack.optimiser import Adam, upsample
from gradinv.attack.state import Run, RunState, learning_rate, meeting_steps
from gradinv.checks import check_observation
from gradinv.config import AttackConfig
from gradinv.execution.distributed import ALONE, Ranks
from gradinv.execution.stepping import PixelGradient, Stepper
from gradinv.models import Model
from gradinv.prior import painting
from gradinv.recovery.examination import examine
from gradinv.recovery.recover import recover
from gradinv.types import GradinvError, Observation, Prior, Recovered, Snapshot, SolvedNode, TermValues

T = TypeVar("T")

DIVERGED = "The objective stopped being finite at iteration {}; take a lower learning rate or other weights."


@torch.inference_mode(False)
@torch.enable_grad()
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
    recovered: Recovered | None = None,
    labels: Tensor | None = None,
    progress: Callable[[SolvedNode], None] | None = None,
) -> Snapshots:
    """Reconstruct the batch behind an observation: x̂* = argmin L_grad + R_fidelity + R_group (Eqn 1, Eqn 2).

    `examine` says first what the gradient is, whatever its file says (`Snapshots.recovered.notes`). What it determines
    without a search is solved next, with the `labels` (B,) where they are known, unless it is `recovered` already; with
    `boundary=auto` that decides what runs (see `settled`), and each snapshot says so. `progress` hears of each node as
    it is solved.

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
    model = model.differentiable()
    check_observation(model, observation)
    ranks.check(model.device)
    share = len(ranks.share(config.seeds))
    check_memory(model, observation.batch_size, replace(config, seeds=share))
    examined = examine(model, observation)
    recovered = recovered or recover(
        model, observation, config, labels=labels, stop=stop, progress=progress, examined=examined
    )
    observation = examined.observation
    config = settled(model, recovered, config)
    painted = painting(model, recovered) if config.start == "decoder" else None
    start = None if painted is None else model.preprocessing.normalise(painted.pixels)
    objective = Objective(model, observation, recovered, config, start)
    prior = None
    if painted is not None and start is not None:
        prior = Prior(painted.node, painted.pixels.cpu(), objective.misfit(start))
    run = Run(model, observation.batch_size, config, start, ranks, objective.separable)
    if resume is not None:
        run.restore(resume)
    parallel = parallel_seeds(model, observation.batch_size, replace(config, seeds=share))
    emission = _Emission(run, recovered, prior, parallel, every, interval, 0.0 if resume is None else resume.seconds)
    stream = iterate(run, objective, parallel, stop or threading.Event(), emission.due, emission.snapshot)
    return Snapshots(run, stream, recovered)


def iterate(
    run: Run,
    objective: Objective,
    parallel: int,
    stop: threading.Event,
    due: Callable[[int], bool],
    emit: Callable[[int, Done | None], T],
) -> Generator[T]:
    """The loop, from where the run stands: evaluate, step, noise, project, emit.

    Yields `emit(steps, what the last one found)` at the start, after each step that is `due`, and where `stop` is set,
    which ends it. Several ranks go through it together. Raises GradinvError where the objective is not finite on any
    rank, or one is lost.
    """
    config, optimiser, ranks = run.config, run.optimiser, run.ranks
    annealed: tuple[float | None, float] | None = None
    done: Done | None = None
    yield emit(run.begun, None)
    for step in range(run.begun, config.iterations):
        stage = run.enter(step)
        if stage.annealed != annealed:
            annealed = stage.annealed
            judged = objective.annealed(*annealed)
            stepper = Stepper(judged, config.stepping, steps=_evaluations(run, annealed), parallel=parallel)

        # Evaluate Eqn 1 and Eqn 2 of each seed: L_grad (Eqn 3) with the labels of Eqn 8, R_fidelity (Eqn 9, Eqn 10),
        # R_group (Eqn 11) towards the group's mean (Eqn 12); and the gradient with respect to the pixels.
        trial = optimiser.trial.requires_grad_()
        full = upsample(trial, run.model.preprocessing.size)
        found = stepper.each(full.detach(), run.group_target(step, stage), stop)
        if any(ranks.any(len(found) < len(full))):  # stopped on the way, on any rank: nothing has changed
            yield emit(step, done)
            return
        values = torch.stack([one.parts for one in found])
        # Through the upsampling of a coarse stage.
        (gradient,) = torch.autograd.grad(full, trial, torch.stack([one.gradient for one in found]))
        if any(ranks.any(not optimiser.usable(gradient, values))):
            raise GradinvError(DIVERGED.format(step + 1))
        done = Done(found, judged.weights, stepper)

        # Step: by Adam with the learning rate λ(t), or by L-BFGS, which takes neither rate nor noise.
        rate = learning_rate(step, config)
        optimiser.step(gradient, values, rate)
        # Noise: x̂ ← x̂ + λ(t) α_n η, η ~ N(0, 1).
        if config.noise > 0 and isinstance(optimiser, Adam):
            optimiser.add(rate * config.noise * run.normal(trial.shape))
        # Project onto the pixels' range.
        optimiser.project()
        if step + 1 in meeting_steps(config):
            run.meet(step + 1)

        # Emit.
        wanted, stopped = ranks.any(due(step + 1), stop.is_set())
        if wanted or stopped:
            yield emit(step + 1, done)
            (stopped,) = ranks.any(stop.is_set())  # by whoever looked at it
        if stopped:
            return


@dataclass(frozen=True, eq=False)
class Done:
    """A step that was done: what was found of each seed, with the terms' weights, and how it was executed."""

    found: list[PixelGradient]
    weights: Mapping[str, float]
    stepper: Stepper


class Snapshots(Iterator[Snapshot]):
    """The snapshots of a run as they come. `recovered` is what was solved before, `config` the settled one."""

    def __init__(self, run: Run, stream: Generator[Snapshot], recovered: Recovered) -> None:
        self.recovered = recovered
        self.config = run.config
        self._run = run
        self._stream = stream
        self._last: Snapshot | None = None

    def __next__(self) -> Snapshot:
        with torch.inference_mode(False), torch.enable_grad():
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


def _evaluations(run: Run, annealed: tuple[float | None, float]) -> int:
    """How many there are with the objective annealed like this: of all ranks' seeds, so that each number of ranks
    executes them alike."""
    ends = [*(stage.first for stage in run.plan[1:]), run.config.iterations]
    lengths = [end - stage.first for stage, end in zip(run.plan, ends, strict=True) if stage.annealed == annealed]
    return sum(lengths) * run.config.seeds


@dataclass(eq=False)
class _Emission:
    """When a snapshot is due, and what it holds; `seconds` is how long the steps before a resumption had taken."""

    run: Run
    recovered: Recovered
    prior: Prior | None
    parallel: int
    every: int | None
    interval: float | None
    seconds: float
    _started: float | None = None
    _emitted: float = 0.0

    def due(self, step: int) -> bool:
        now = time.perf_counter()
        waited = self.interval is not None and now - self._emitted >= self.interval
        return waited or step == self.run.config.iterations or (self.every is not None and step % self.every == 0)

    def snapshot(self, step: int, done: Done | None) -> Snapshot:
        self._emitted = time.perf_counter()
        if self._started is None:
            self._started = self._emitted - self.seconds
        run, recovered = self.run, self.recovered
        full = run.gather()
        preprocessing = run.model.preprocessing
        terms, distance = ({}, ()) if done is None else _values(run, done)
        return Snapshot(
            step=step,
            steps=run.config.iterations,
            seeds=preprocessing.denormalise(full).cpu(),
            consensus=preprocessing.denormalise(run.consensus(step)).cpu(),
            terms=terms,
            distance=distance,
            seconds=time.perf_counter() - self._started,
            labels=tuple(recovered.labels.tolist()),
            label_method=recovered.method,
            label_confidence=recovered.confidence,
            features_residual=recovered.residual,
            stepping="" if done is None else done.stepper.mode,
            parallel_seeds=self.parallel if done is None else done.stepper.parallel,
            boundary=run.config.boundary,
            prior=self.prior,
            meetings=meeting_steps(run.config),
        )


def _values(run: Run, done: Done) -> tuple[dict[str, TermValues], tuple[float, ...]]:
    """Every seed's terms and distance, of all ranks; no distance where no gradient is matched."""
    rows = [[float(own.raw[name]) for name in done.weights] + [float(own.distance)] for own in done.found]
    found = run.ranks.gather(torch.tensor(rows, dtype=torch.float64), run.config.seeds)
    *columns, distance = (tuple(column) for column in found.T.tolist())
    terms = {
        name: TermValues(raw, tuple(weight * value for value in raw))
        for (name, weight), raw in zip(done.weights.items(), columns, strict=True)
    }
    return terms, distance if "gradient" in terms else ()
