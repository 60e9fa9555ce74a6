"""The page's job: invert a client's gradient, and publish what comes of it. Nothing here knows of Streamlit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gradinv import figures, metrics, pace
from gradinv.attack.inversion import Snapshots, invert
from gradinv.attack.memory import check_memory
from gradinv.attack.state import RunState
from gradinv.client import observe
from gradinv.config import AttackConfig
from gradinv.defenses import parse_all
from gradinv.jobs import Handle, Status
from gradinv.models import Model
from gradinv.network import Segment, parts_of
from gradinv.pace import MEASURABLE, Pace
from gradinv.recording.recorder import Recorder, thinned
from gradinv.recording.replay import Recording, Resumption
from gradinv.recording.stores import MemoryStore
from gradinv.types import GradinvError, Observation, Recovered, Snapshot, SolvedNode


@dataclass(frozen=True, eq=False)
class Originals:
    """A client's pictures, pixels (B, 3, S, S) in [0, 1], and their labels. Their gradient is taken first, and changed
    by the `defences`, in the notation of `defenses.parse`. `known` gives the gradient of a client in eval mode, without
    defences and BN statistics, where somebody has taken it already."""

    pixels: Tensor
    labels: tuple[int, ...]
    defences: tuple[str, ...] = ()
    known: Callable[[], Observation | None] = lambda: None

    @property
    def batch_size(self) -> int:
        return len(self.pixels)

    @property
    def side(self) -> int:
        return self.pixels.shape[-1]

    def observed(self, model: Model, config: AttackConfig) -> Observation:
        """What the server receives of them, with the BN statistics that the attack assumes to leak."""
        share_bn, mode = config.bn == "exact", "train" if config.bn == "inferred" else "eval"
        known = self.known() if not share_bn and mode == "eval" else None
        observation = known or observe(model, self.pixels, torch.tensor(self.labels), share_bn=share_bn, mode=mode)
        for defence in parse_all(self.defences, config.seed):
            observation = defence(observation)
        return observation


@dataclass(frozen=True, eq=False)
class Shared:
    """A gradient that a client has shared already, of images of `side` pixels that nobody here has.

    `find` brings it once the job's turn has come, so that jobs that wait, and those that have ended, do not hold it; it
    raises GradinvError where it is not held any more.
    """

    batch_size: int
    side: int
    find: Callable[[], Observation]

    def observed(self, model: Model, config: AttackConfig) -> Observation:
        """The gradient as it came."""
        return self.find()


@dataclass(frozen=True, eq=False)
class Pictures:
    """A snapshot as a page draws it: WebP data URIs in the originals' order, the seeds' one row each.

    `restored` has the restored label and `psnr` the consensus's PSNR in dB of each original, None where there are none:
    then the order is that of the labels. `distance` is that of the gradients and `activations` that of the solved
    activations, the mean of the seeds', None at first and where the attack does not compare them. `prior` is what a
    learned prior painted beforehand, empty where there is none.
    """

    restored: tuple[int, ...]
    consensus: tuple[str, ...]
    seeds: tuple[tuple[str, ...], ...]
    psnr: tuple[float | None, ...]
    distance: float | None
    activations: float | None = None
    prior: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layer:
    """A node that was solved: its shape (C, H, W), the estimated relative error of each image, and what it holds of
    each (`figures.activations`), in the originals' order where there are any."""

    name: str
    shape: tuple[int, ...]
    errors: tuple[float, ...]
    tiles: tuple[str, ...] = ()

    @classmethod
    def of(cls, node: SolvedNode, tiles: tuple[str, ...] = ()) -> Layer:
        return cls(node.name, tuple(node.activation.shape[1:]), tuple(node.error.tolist()), tiles)

    @property
    def numbers(self) -> int:
        """How many numbers of each picture it says."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Solving:
    """How far the layers are solved, before the first picture and afterwards.

    `layers` are the solved ones and `nodes` all that can be, the highest first; of a network that cannot be solved
    there are none. `boundary` is what the pixels are searched below, None as long as the solving goes on; then
    `stopped` says why it went no further. `seconds` is what it has taken.
    """

    nodes: tuple[str, ...]
    layers: tuple[Layer, ...] = ()
    boundary: str | None = None
    stopped: str = ""
    seconds: float = 0.0

    @property
    def size(self) -> int:
        """Bytes of the layers' tiles."""
        return sum(len(tile) for layer in self.layers for tile in layer.tiles)


@dataclass(frozen=True, eq=False)
class Kept:
    """What a stopped run needs to go on: where its images stand, what was recovered, and how far the layers went."""

    state: RunState
    recovered: Recovered
    solving: Solving
    store: MemoryStore

    @property
    def size(self) -> int:
        """Bytes."""
        tensors = list(self.state.tensors.values())
        tensors += [t for node in self.recovered.nodes for t in (node.activation, node.cotangent) if t is not None]
        return sum(tensor.nbytes for tensor in tensors)


@dataclass(frozen=True, eq=False)
class Progress:
    """What the page shows of an inversion at one step.

    `seconds` are those of the search. `curves` are the recorded rows so far, `speed` is in seconds an iteration,
    `remaining` in seconds (both None before they are worth telling), `store` the recording itself, `solving` what was
    solved before, `meetings` the steps after which the seeds meet. A run that was stopped has `kept` what it takes to
    go on, where that is not too much.
    """

    step: int
    steps: int
    seconds: float
    speed: float | None
    remaining: float | None
    pictures: Pictures
    curves: tuple[Mapping[str, Any], ...]
    store: MemoryStore
    solving: Solving
    meetings: tuple[int, ...] = ()
    kept: Kept | None = None

    @property
    def total(self) -> float:
        """Seconds with those of the solving."""
        return self.solving.seconds + self.seconds


@dataclass(frozen=True, eq=False)
class Inversion:
    """The page's job: invert the gradient of a `client`'s pictures or one that it shared, and record that in memory.

    `load` gives the worker a model of its own, since hooks on a network hear every thread that runs it. `facts`
    is whatever the page wants to know of the batch; it never reaches the attack.
    """

    INTERVAL = 0.75  # seconds between updates; with a page tick of the same length a change shows within two seconds
    FRAMES = 300  # recorded at most, whatever the length of the run
    KEPT = 64 * 2**20  # bytes that are kept at most of a stopped run, so that it can go on

    load: Callable[[], Model]
    client: Originals | Shared
    config: AttackConfig
    facts: Any = None
    before: Kept | None = None

    @property
    def originals(self) -> Originals | None:
        """What the reconstructions are compared with, where it is known."""
        return self.client if isinstance(self.client, Originals) else None

    @property
    def cost(self) -> int:
        """Batch size × pixels of an image × iterations that are left × seeds."""
        done = 0 if self.before is None else self.before.state.step
        return self.client.batch_size * self.client.side**2 * (self.config.iterations - done) * self.config.seeds

    def check(self) -> None:
        """Raises GradinvError for an empty batch or one without a label for each picture."""
        if (own := self.originals) is None:
            return
        if own.pixels.ndim != 4 or len(own.pixels) == 0:
            raise GradinvError("Choose at least one picture.")
        if len(own.labels) != len(own.pixels):
            raise GradinvError("Every picture needs a class; choose one for each.")

    def __call__(self, handle: Handle) -> Status:
        """Run until the last iteration or `handle.stop`."""
        return _Running(self, handle).run()

    def pictures(self, snapshot: Snapshot) -> Pictures:
        """A live or replayed snapshot of this run, paired with the originals if there are any."""
        own = self.originals
        order = torch.arange(len(snapshot.labels))
        if own is not None:
            order = metrics.pair(snapshot.consensus, snapshot.labels, own.pixels, own.labels)
        consensus = snapshot.consensus[order]
        return Pictures(
            restored=tuple(snapshot.labels[index] for index in order.tolist()),
            consensus=figures.tiles(consensus),
            seeds=tuple(figures.tiles(pixels[order]) for pixels in snapshot.seeds),
            psnr=(None,) * len(order) if own is None else tuple(metrics.psnr(consensus, own.pixels).tolist()),
            distance=metrics.mean(snapshot.distance),
            activations=metrics.mean(snapshot.terms["activations"].raw) if "activations" in snapshot.terms else None,
            prior=() if snapshot.prior is None else figures.tiles(snapshot.prior.pixels[order]),
        )


class _Running:
    """An inversion on a worker: what it publishes of each layer as it is solved, and of each snapshot."""

    def __init__(self, job: Inversion, handle: Handle) -> None:
        self._job, self._handle = job, handle
        self._own, self._before = job.originals, job.before
        self._model = model = job.load()
        if self._own is not None:
            check_memory(model, len(self._own.pixels), job.config)
        self._observation = job.client.observed(model, job.config)
        self._began = time.perf_counter()
        self._clock = Pace()
        self._order: list[int] = []
        if self._before is None:
            self._store = MemoryStore()
            self._solving = Solving(_nodes(model) if job.config.needs_layers else ())
        else:
            self._store, self._solving = self._before.store.copy(), self._before.solving

    def run(self) -> Status:
        run = self._solve()
        own, before = self._own, self._before
        self._recorder = Recorder(
            self._store,
            config=self._job.config,
            model=self._model,
            observation=self._observation,
            originals=None if own is None else own.pixels,
            labels=None if own is None else own.labels,
            defences=() if own is None else own.defences,
            recovered=run.recovered,
            resumed=None if before is None else _resumption(before, self._observation, own),
        )
        last: Snapshot | None = None
        for recorded in self._recorder.follow(thinned(self._shown(run), run.config.iterations / self._job.FRAMES)):
            last = recorded
        done = self._recorder.run["status"] == "done"
        if last is not None:
            # Once more, now that everything is recorded.
            self._publish(last, None if done else self._kept(run))
            self._measure(run.config, last)
        return "done" if done else "stopped"

    def _solve(self) -> Snapshots:
        """Solve the layers, or take what was solved before, and be about to search."""
        before, expected = self._before, pace.estimate(self._model, self._job.config, self._job.client.batch_size)
        drawn = 0.0

        def solved(node: SolvedNode) -> None:
            nonlocal drawn
            self._order = self._order or self._paired(node)
            # Drawing each takes a sixth of what solving takes: now only those that a page can show, the others later.
            due = time.perf_counter() - drawn >= self._job.INTERVAL
            layer = Layer.of(node, self._tiles(node) if due else ())
            drawn = time.perf_counter() if due else drawn
            spent = time.perf_counter() - self._began
            self._solving = replace(self._solving, layers=(*self._solving.layers, layer), seconds=spent)
            self._handle.publish(self._solving, self._solving.size, max(expected - spent, 0.0))

        self._handle.publish(self._solving, self._solving.size, expected if before is None else None)
        run = invert(
            self._model,
            self._observation,
            self._job.config,
            interval=self._job.INTERVAL,
            stop=self._handle.stop,
            progress=solved,
            resume=None if before is None else before.state,
            recovered=None if before is None else before.recovered,
        )
        if before is None:
            # Stopped half-way, nothing is known of how far it would have gone.
            boundary = None if self._handle.stop.is_set() else run.config.boundary
            spent = time.perf_counter() - self._began
            self._solving = replace(self._solving, boundary=boundary, stopped=run.recovered.stopped, seconds=spent)
        return run

    def _tiles(self, node: SolvedNode) -> tuple[str, ...]:
        return figures.activations(node.activation[self._order].float())

    def _paired(self, node: SolvedNode) -> list[int]:
        """The originals' order of what is solved, which comes in the labels': by the first node."""
        own, model = self._own, self._model
        if own is None:
            return list(range(len(node.activation)))
        with torch.no_grad():
            true = Segment(model.network, node.name)(model.preprocessing.normalise(own.pixels.to(model.device)))
        return metrics.aligned(node.activation.float(), true[node.name].relu())[0]

    def _shown(self, snapshots: Snapshots) -> Iterator[Snapshot]:
        first = 0 if self._before is None else self._before.state.step
        for snapshot in snapshots:
            self._clock.add(snapshot.seconds, snapshot.step, first)
            self._publish(snapshot)
            if not all(layer.tiles for layer in self._solving.layers):
                layers = [
                    layer if layer.tiles else replace(layer, tiles=self._tiles(node))
                    for layer, node in zip(self._solving.layers, snapshots.recovered.nodes, strict=True)
                ]
                self._solving = replace(self._solving, layers=tuple(layers))
            yield snapshot

    def _publish(self, snapshot: Snapshot, kept: Kept | None = None) -> None:
        speed, left = self._clock.speed, snapshot.steps - snapshot.step
        progress = Progress(
            step=snapshot.step,
            steps=snapshot.steps,
            seconds=snapshot.seconds,
            speed=speed,
            remaining=0.0 if left == 0 else None if speed is None else speed * left,
            pictures=self._job.pictures(snapshot),
            curves=tuple(self._recorder.curves),
            store=self._store,
            solving=self._solving,
            meetings=snapshot.meetings,
            kept=kept,
        )
        size = sum(len(self._store.read(name)) for name in self._store.names()) + self._solving.size
        self._handle.publish(progress, size + (kept.size if kept else 0), progress.remaining)

    def _kept(self, run: Snapshots) -> Kept | None:
        """What a run that was stopped goes on from; None where it was still solving, or that is too much."""
        if self._solving.boundary is None:
            return None
        kept = Kept(run.state(), run.recovered, self._solving, self._store)
        return kept if kept.size <= self._job.KEPT else None

    def _measure(self, config: AttackConfig, last: Snapshot) -> None:
        """Let later estimates know how long it took."""
        solving, batch_size = self._solving, self._job.client.batch_size
        if last.step >= MEASURABLE and solving.boundary is not None:
            pace.measured(self._model, config, batch_size, solving.seconds + last.seconds * last.steps / last.step)
            if self._before is None and solving.layers:
                pace.solved(self._model, batch_size, solving.seconds)


def _resumption(before: Kept, observation: Observation, own: Originals | None) -> Resumption:
    """What a recorder goes on from, in memory."""
    recording = Recording.open(before.store)
    return Resumption(
        store=before.store,
        run=recording.run,
        curves=recording.curves,
        steps=frozenset(step for step in recording.steps if step <= before.state.step),
        config=AttackConfig.from_dict(recording.run["config"]),
        observation=observation,
        state=before.state,
        originals=None if own is None else own.pixels,
    )


def _nodes(model: Model) -> tuple[str, ...]:
    """The network's nodes that can be solved, the highest first; of one that is no ResNet, none. Of the very highest
    the final layer sees the mean over the picture only."""
    try:
        return tuple(reversed(parts_of(model.network).nodes[:-1]))
    except GradinvError:
        return ()
