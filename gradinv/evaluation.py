"""The paper's tables and more, measured on any model and image folder, batch by batch.

An evaluation is a `Plan`: rows of a table, each measured on the same batches. A task is one row on one batch. Its
values are appended to `results.jsonl` as soon as they are there, so that an evaluation that was stopped goes on where
it was, and yields the same table. Files of its folder:

    plan.json       what is measured; another plan is refused
    results.jsonl   one finished task a line: {"row", "batch", "values"} (or "error", which is tried again next time)
    results.json    the table: {"command", "config", "rows": [{"name", "n", "mean", "stderr", …}]}
    results.csv     the same, one line a row
    figure.html     the same, drawn; figure.json is Plotly's own form

Here, and nowhere in the attack, originals and true labels are known: to draw the batch, play the client and measure.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import signal
import statistics
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from multiprocessing import connection
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from gradinv import gallery, metrics, peers
from gradinv.config import AttackConfig
from gradinv.defenses import Defence, parse_all
from gradinv.gallery import Gallery, Progress
from gradinv.images import to_pixels
from gradinv.inversion import invert
from gradinv.labels import METHODS as LABEL_METHODS
from gradinv.labels import restore_labels
from gradinv.models import Model, load_model
from gradinv.objective import Objective
from gradinv.peers import PeerResult, Stopped, breaching_attack
from gradinv.prior import has_decoder
from gradinv.recording import DirectoryStore
from gradinv.sources import ImageFolder, Picture
from gradinv.stepping import resolve_mode
from gradinv.types import Gradients, GradinvError, Observation, Snapshot
from gradinv.victim import observe

HALVES = ("report", "tune", "all")

GROUP_WEIGHT = 0.01
"""α_group of the ablation's group rows where the settings leave the group out (the paper's)."""

REPEATED_CLASSES = 10 / 32
"""Where labels repeat, K images come from about so many times K classes: 32 from 10."""

TIMED_ITERATIONS, TIMED_ROUNDS = 12, 2
"""Each attack of the comparison is timed over the second half of so many iterations, all in turn, so many times."""

Values = Mapping[str, float | None]
"""What one task measured, by metric; None where a number is missing or not finite."""


# --- what is measured


@dataclass(frozen=True)
class Row:
    """One row of the table.

    `config` is the attack; None where nothing is optimised. `judged` says which images stand for the row when gains
    are stated: the seeds (mean over them) or the group's consensus. The gain is over the best of the rows `over`.
    `series` groups rows of several sizes in the figure. With `weigh_like` the weight of gradient matching belongs to
    that way to compare and is scaled to the row's own.
    """

    name: str
    batch_size: int
    config: AttackConfig | None = None
    repeats: bool = False
    defence: str = "none"
    peer: str | None = None
    judged: str = "seeds"
    over: tuple[str, ...] = ()
    series: str = ""
    weigh_like: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        facts = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return {**facts, "config": self.config and self.config.to_dict(), "over": list(self.over)}


@dataclass(frozen=True)
class Plan:
    """An evaluation: which rows, on which network, from which pictures.

    `half` limits each class to the earlier half of its sorted files ("report"), to the later ("tune"), or to neither.
    The settings of the presets were tuned on later halves only, so what is reported comes from the earlier.
    """

    command: str
    model: str
    imagenet: str
    rows: tuple[Row, ...]
    batches: int
    seed: int = 0
    half: str = "report"
    image_size: int | None = None
    device: str = "auto"
    lpips: bool = False

    def __post_init__(self) -> None:
        if self.command not in EXPERIMENTS:
            raise GradinvError(f"There is no evaluation {self.command!r}; take one of {', '.join(EXPERIMENTS)}.")
        if self.batches < 1:
            raise GradinvError(f"At least one batch has to be measured, not {self.batches}.")
        if self.half not in HALVES:
            raise GradinvError(f"half takes one of {', '.join(HALVES)}, not {self.half!r}.")
        if not self.rows:
            raise GradinvError("An evaluation needs at least one row; name a size or a defence.")
        for row in self.rows:
            if row.batch_size < 1:
                raise GradinvError(f"A batch holds at least one image, not {row.batch_size}.")
            defences_of(row.defence)
        if len({row.name for row in self.rows}) < len(self.rows):
            raise GradinvError("Each size and each defence is measured once; name none of them twice.")

    @property
    def tasks(self) -> list[tuple[Row, int]]:
        """Every row of the first batch, then of the second …: whatever has been measured can be compared."""
        return [(row, batch) for batch in range(self.batches) for row in self.rows]

    def identity(self, model: Model) -> dict[str, Any]:
        """What may not differ where an evaluation goes on. Batches and rows may be added, so their numbers may."""
        facts = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        del facts["batches"]
        return {
            **facts,
            "model": {"name": model.name, "sha256": model.sha256},
            "imagenet": str(Path(self.imagenet).expanduser().resolve()),
            "device": model.device.type,
            "rows": [row.to_dict() for row in self.rows],
        }


@dataclass(frozen=True)
class Column:
    """A metric in the table: its heading and how many digits are shown."""

    title: str
    digits: int


COLUMNS = {
    "psnr": Column("PSNR seeds", 2),
    "consensus_psnr": Column("PSNR consensus", 2),
    "constant_psnr": Column("PSNR constant", 2),
    "ssim": Column("SSIM seeds", 3),
    "consensus_ssim": Column("SSIM consensus", 3),
    "constant_ssim": Column("SSIM constant", 3),
    "fft2d": Column("FFT2D seeds", 3),
    "consensus_fft2d": Column("FFT2D consensus", 3),
    "lpips": Column("LPIPS seeds", 3),
    "consensus_lpips": Column("LPIPS consensus", 3),
    "l2_distance": Column("‖∇−ΔW‖", 3),
    "sign_match": Column("signs %", 2),
    "distance": Column("cosine distance", 4),
    "labels": Column("labels %", 2),
    "found": Column("found %", 2),
    "residual": Column("residual", 4),
    "iip": Column("IIP %", 1),
    "seconds": Column("s", 1),
    "seconds_per_iteration": Column("s/iteration", 3),
    **{f"labels {method}": Column(f"{method} %", 2) for method in LABEL_METHODS},
}
"""Every metric of every evaluation, in the table's order."""


@dataclass(frozen=True)
class Experiment:
    """One of the evaluations: what its rows measure (`task`), its usual number of batches, and what is shown of it.

    `metrics` are the table's columns, `panels` the figure's: a title and the metrics drawn in it. Where batches have
    several `sizes` these are the usual ones; `defences` says whether it takes any.
    """

    task: Callable[[Bench, Row, int], Values]
    batches: int
    metrics: tuple[str, ...]
    panels: tuple[tuple[str, tuple[str, ...]], ...]
    sizes: tuple[int, ...] = ()
    defences: bool = False


# --- the rows


def label_rows(sizes: Sequence[int]) -> tuple[Row, ...]:
    """Table 1, and the same with labels that repeat."""
    return tuple(
        Row(f"K={size} {series}", size, repeats=repeats, series=series)
        for repeats, series in ((False, "distinct"), (True, "repeated"))
        for size in sizes
    )


def identification_rows(sizes: Sequence[int], defences: Sequence[str]) -> tuple[Row, ...]:
    """Distinct labels, repeated labels, and distinct labels behind each defence."""
    return label_rows(sizes) + tuple(
        Row(f"K={size} {defence}", size, defence=defence, series=defence)
        for defence in defences
        if defence != "none"
        for size in sizes
    )


def ablation_rows(config: AttackConfig, batch_size: int) -> tuple[Row, ...]:
    """Table 2: each row adds to the one above. Then two controls that never see the gradients of the layers.

    The features come out of the final layer's gradient, so the first control still knows that layer; the second knows
    only BN statistics, labels and TV. What all rows share are the choices that are not terms: optimiser, box, stages.
    Settings without a group or a registration get GROUP_WEIGHT and the registration of the `paper` preset.
    Raises GradinvError for a single seed, which has no group.
    """
    if config.seeds < 2:
        raise GradinvError("The ablation's group rows need at least two seeds; set seeds to 2 or more.")
    change = dataclasses.replace
    fidelity = change(config, group=0.0, registration="lazy")
    bare = {"tv": 0.0, "l2": 0.0, "bn": "none", "features": 0.0, "errors": "predicted", "layers": "all"}
    registration = AttackConfig().registration if config.registration == "lazy" else config.registration
    lazy = change(config, group=config.group or GROUP_WEIGHT, registration="lazy")
    blind = change(fidelity, gradient=0.0, features=0.0, errors="predicted", start="random")
    rows = (
        ("gradient only", change(fidelity, **bare, start="random"), "seeds", ""),
        ("+ fidelity", fidelity, "seeds", "gradient only"),
        ("+ lazy group", lazy, "consensus", "+ fidelity"),
        ("+ registered group", change(lazy, registration=registration), "consensus", "+ lazy group"),
        ("gradient off", change(fidelity, gradient=0.0), "seeds", "+ fidelity"),
        ("gradient and features off", blind, "seeds", "+ fidelity"),
    )
    return tuple(
        Row(name, batch_size, config=row, judged=judged, over=(over,) if over else ())
        for name, row, judged, over in rows
    )


def matching_rows(config: AttackConfig, batch_size: int) -> tuple[Row, ...]:
    """Table 5: the same attack with either way to compare gradients.

    The weight that the settings name belongs to their own way; the other one's is scaled on each batch so that both
    pull the same start with a pixel gradient of the same norm.
    """
    return tuple(
        Row(
            name,
            batch_size,
            config=dataclasses.replace(config, match=name),
            over=over,
            weigh_like="" if name == config.match else config.match,
        )
        for name, over in (("l2", ()), ("cosine", ("l2",)))
    )


def size_rows(config: AttackConfig, sizes: Sequence[int]) -> tuple[Row, ...]:
    """Quality and IIP against the batch size; a smaller batch holds the first pictures of a larger one."""
    judged = "consensus" if config.seeds > 1 else "seeds"
    return tuple(Row(f"K={size}", size, config=config, judged=judged) for size in sizes)


def defence_rows(config: AttackConfig, batch_size: int, defences: Sequence[str]) -> tuple[Row, ...]:
    """The same attack behind each defence."""
    judged = "consensus" if config.seeds > 1 else "seeds"
    over = ("none",) if "none" in defences else ()
    return tuple(
        Row(text, batch_size, config=config, defence=text, judged=judged, over=over if text != "none" else ())
        for text in defences
    )


def comparison_rows(config: AttackConfig, batch_size: int, model: Model, *, several: bool) -> tuple[Row, ...]:
    """Both attacks of `breaching`, then ours with one seed, from the decoder's picture where there is a decoder, and
    with all seeds where `several` are asked for. Gains are over the better peer by each metric.

    Raises GradinvError for a client in train mode, which `breaching` would attack in eval mode.
    """
    if config.bn == "inferred":
        raise GradinvError("The comparison is made with a client in eval mode; take approx, exact or none for bn.")
    single = dataclasses.replace(config, seeds=1)
    peer_rows = tuple(Row(f"breaching {name}", batch_size, config=single, peer=name) for name in peers.BREACHING)
    over = tuple(row.name for row in peer_rows)
    ours = [Row("ours", batch_size, config=dataclasses.replace(single, start="random"), over=over)]
    if has_decoder(model):
        start = dataclasses.replace(single, start="decoder")
        ours.append(Row("ours, decoder's start", batch_size, config=start, over=over))
    if several:
        name = f"ours, {config.seeds} seeds" + (", decoder's start" if config.start == "decoder" else "")
        ours.append(Row(name, batch_size, config=config, judged="consensus", over=over))
    return (*peer_rows, *ours, Row(TIMING, batch_size, config=config))


TIMING = "timing"
"""The row of the comparison that times all others in turn; it is no row of the table."""


def chosen_rows(rows: Sequence[Row], patterns: Sequence[str]) -> tuple[Row, ...]:
    """Those whose name fits one of the patterns, in which * stands for anything. Raises GradinvError for none."""
    for pattern in patterns:
        if not any(fnmatchcase(row.name, pattern) for row in rows):
            raise GradinvError(f"There is no row {pattern!r}; take some of {', '.join(row.name for row in rows)}.")
    return tuple(row for row in rows if any(fnmatchcase(row.name, pattern) for pattern in patterns))


# --- the bench: what tasks share


@dataclass(frozen=True, eq=False)
class Batch:
    """The client's batch: which pictures, and their labels (B,)."""

    pictures: tuple[Picture, ...]
    labels: Tensor


class Bench:
    """What all tasks of a process share: the network, the folder, and the gallery once somebody asks for it."""

    def __init__(
        self, plan: Plan, model: Model, stop: threading.Event | None = None, report: Progress | None = None
    ) -> None:
        """`report` is told how far the gallery is while it is made.

        Raises GradinvError where the folder is not there or lacks classes that the largest batch needs.
        """
        self.plan = plan
        self.model = model
        self.stop = stop or threading.Event()
        self._report = report
        self.folder = ImageFolder(plan.imagenet)
        self._files: dict[int, list[Picture]] = {}
        wnids = {item.wnid for item in self.folder.classes}
        self._classes = [label for label, item in enumerate(model.classes) if item.wnid in wnids]
        needed = max(_classes_of(row) for row in plan.rows)
        if len(self._classes) < needed:
            raise GradinvError(
                f"{self.folder.root} has pictures of {len(self._classes)} classes that {model.name} knows, and a batch "
                f"needs {needed}; take smaller batches or another folder."
            )

    @cached_property
    def gallery(self) -> Gallery:
        """The pooled features of every picture of the folder, also of those that no batch is drawn from."""
        return Gallery.of(self.model, self.folder.root, progress=self._progress)

    def _progress(self, done: int, total: int) -> None:
        if self.stop.is_set():
            raise KeyboardInterrupt  # the gallery keeps what is done
        if self._report is not None:
            self._report(done, total)

    def places(self, batch: Batch) -> list[int]:
        """Where the batch's pictures are in the gallery."""
        return [self.gallery.index(self.folder.root / picture.key) for picture in batch.pictures]

    def files(self, label: int) -> list[Picture]:
        """The pictures of a class that batches are drawn from, by file name."""
        if label not in self._files:
            files = self.folder.pictures(self.model.classes[label].wnid)
            middle = len(files) // 2
            halves = {"report": files[:middle], "tune": files[middle:], "all": files}
            self._files[label] = halves[self.plan.half]
        return self._files[label]

    def draw(self, row: Row, batch: int) -> Batch:
        """The pictures of a batch. They depend on the evaluation's seed, the batch's number, its size and whether
        labels repeat, and on nothing else; without repeats a smaller batch holds the first of a larger one.

        Raises GradinvError where a class has too few pictures.
        """
        generator = random.Random(f"{self.plan.seed}/{batch}/{row.repeats}")
        classes = [label for label in generator.sample(self._classes, len(self._classes)) if self.files(label)]
        chosen = classes[: _classes_of(row)]
        left = {label: generator.sample(self.files(label), len(self.files(label))) for label in chosen}
        pictures: list[Picture] = []
        labels: list[int] = []
        while len(labels) < row.batch_size:
            open_labels = [label for label in chosen if left[label]]
            if not open_labels or (not row.repeats and len(labels) >= len(chosen)):
                raise GradinvError(
                    f"{self.folder.root} has too few pictures for a batch of {row.batch_size}; take a smaller batch or "
                    "both halves (--half all)."
                )
            label = generator.choice(open_labels) if row.repeats else chosen[len(labels)]
            labels.append(label)
            pictures.append(left[label].pop())
        return Batch(tuple(pictures), torch.tensor(labels))

    def pixels(self, batch: Batch) -> Tensor:
        """Decoded: (B, 3, S, S) in [0, 1]."""
        return torch.stack([to_pixels(picture.open(), self.model.preprocessing) for picture in batch.pictures])

    def defend(self, observation: Observation, row: Row, batch: int) -> Observation:
        """The observation behind the row's defence; each batch has its own noise."""
        for defence in defences_of(row.defence, self.plan.seed + batch):
            observation = defence(observation)
        return observation


def defences_of(text: str, seed: int = 0) -> list[Defence]:
    """The defences of one row, several joined by +, such as "clip:1+noise:1e-3". Raises GradinvError."""
    return parse_all(re.split(r"\+(?=[a-z])", text), seed)


def _classes_of(row: Row) -> int:
    return math.ceil(REPEATED_CLASSES * row.batch_size) if row.repeats else row.batch_size


# --- the tasks


@torch.no_grad()
def final_gradient(model: Model, features: Tensor, labels: Tensor) -> Gradients:
    """The final layer's gradient from its input alone: ∇W = AᵀF/K and ∇b = Aᵀ1/K with A = p − y.

    features: the batch's pooled features F (K, D); labels: (K,). In eval mode this is what autograd gives for the whole
    batch, because no image's features depend on the others: identical to `victim.observe` up to rounding (a gallery
    that was read back holds its features as half floats, with a relative error of 5e-4).
    """
    layer = model.final_layer
    features, labels = features.to(layer.weight), labels.to(layer.weight.device)
    errors = F.linear(features, layer.weight, layer.bias).softmax(1) - F.one_hot(labels, layer.out_features)
    gradients = {f"{model.final}.weight": errors.T @ features / len(labels)}
    if layer.bias is not None:
        gradients[f"{model.final}.bias"] = errors.mean(0)
    return gradients


def observe_final(bench: Bench, batch: Batch) -> Observation:
    """An observation of the final layer only, without a pass through the network: labels and features need no more."""
    features = bench.gallery.features[bench.places(batch)]
    model = bench.model
    return Observation(
        gradients=final_gradient(model, features, batch.labels),
        batch_size=len(batch.labels),
        preprocessing=model.preprocessing,
        model_name=model.name,
        model_sha256=model.sha256,
    )


def labels_task(bench: Bench, row: Row, number: int) -> Values:
    """The share of labels that each method restores, in percent."""
    batch = bench.draw(row, number)
    observation = observe_final(bench, batch)
    values: dict[str, float | None] = {}
    for method in LABEL_METHODS:
        # Column minimum has no answer for more images than classes.
        restored = None
        with contextlib.suppress(GradinvError):
            restored = restore_labels(bench.model, observation, method).labels
        values[f"labels {method}"] = None if restored is None else _labels_right(restored, batch.labels)
    return values


def identification_task(bench: Bench, row: Row, number: int) -> Values:
    """Whose features the gradient holds: the share of the batch's pictures ranked first in the whole folder."""
    batch = bench.draw(row, number)
    if row.defence == "none":
        observation = observe_final(bench, batch)
    else:
        # A defence acts on the whole gradient (a norm over all layers), so all of it is needed.
        observation = bench.defend(observe(bench.model, bench.pixels(batch), batch.labels), row, number)
    return identify(bench, batch, observation)


def identify(bench: Bench, batch: Batch, observation: Observation) -> dict[str, float | None]:
    """Labels restored and pictures found, in percent, and the features' residual.

    A picture counts once however many features point to it. Where a defence leaves nothing to solve, nothing is found.
    """
    own = bench.places(batch)
    try:
        found = gallery.identify(bench.model, observation, bench.gallery, top=1)
    except GradinvError:
        return {"labels": 0.0, "found": 0.0, "residual": None}
    first = set(found.places.flatten().tolist())
    return {
        "labels": _labels_right(found.labels.labels, batch.labels),
        "found": 100 * len(first & set(own)) / len(own),
        "residual": _finite(found.residual),
    }


def inversion_task(bench: Bench, row: Row, number: int) -> Values:
    """One inversion and everything that is measured of its images. PSNR, SSIM and the distances are means over the
    batch and the seeds; `consensus_…` are those of the group; `constant_…` those of each original's mean colour."""
    config = _config(row, number)
    batch = bench.draw(row, number)
    pixels = bench.pixels(batch)
    observation = _observe(bench, row, number, config, pixels, batch.labels)
    if row.weigh_like:
        config = _weighed(bench, observation, config, row.weigh_like)
    if row.peer is not None:
        return _measure_peer(bench, row, config, observation, pixels, batch.labels)
    last = _run(bench, observation, config)
    restored = torch.tensor(last.labels)
    seconds = {"seconds": last.seconds, "seconds_per_iteration": last.seconds / max(1, config.iterations)}
    values = {**_quality(bench, last.seeds, last.consensus, restored, observation, pixels, batch.labels), **seconds}
    if bench.plan.command == "batch-size":
        paired = last.consensus[metrics.pair(last.consensus, restored.tolist(), pixels, batch.labels.tolist())]
        inside = _iip(bench, paired, batch)
        values["iip"] = 100 * float(inside.double().mean())
    if bench.plan.command == "defences":
        values["found"] = identify(bench, batch, observation)["found"]
    return values


def comparison_task(bench: Bench, row: Row, number: int) -> Values:
    """As `inversion_task`; the row `timing` times all attacks in turn in this process, seconds an iteration each."""
    return _timing(bench, row, number) if row.name == TIMING else inversion_task(bench, row, number)


def _config(row: Row, number: int) -> AttackConfig:
    """The row's settings; each batch has its own noise."""
    if row.config is None:
        raise GradinvError(f"The row {row.name} has no attack.")
    return dataclasses.replace(row.config, seed=row.config.seed + number)


def _observe(bench: Bench, row: Row, number: int, config: AttackConfig, pixels: Tensor, labels: Tensor) -> Observation:
    mode = "train" if config.bn == "inferred" else "eval"
    observation = observe(bench.model, pixels, labels, share_bn=config.bn == "exact", mode=mode)
    return bench.defend(observation, row, number)


def _run(bench: Bench, observation: Observation, config: AttackConfig) -> Snapshot:
    """The last snapshot of an inversion. Raises Stopped where it was not allowed to end."""
    last: Snapshot | None = None
    for snapshot in invert(bench.model, observation, config, stop=bench.stop):
        last = snapshot
    if last is None or not last.final:
        raise Stopped
    return last


def _quality(
    bench: Bench,
    seeds: Tensor,
    consensus: Tensor,
    restored: Tensor,
    observation: Observation,
    pixels: Tensor,
    labels: Tensor,
) -> dict[str, float | None]:
    """What is measured of reconstructions: seeds (G, B, 3, S, S) and consensus (B, 3, S, S), pixels in [0, 1]."""
    each = [_scores(bench, images, restored, pixels, labels) for images in seeds]
    matches = [gradient_match(bench.model, images, restored, observation) for images in seeds]
    values = {name: metrics.mean([scores[name] for scores in each]) for name in each[0]}
    together = _scores(bench, consensus, restored, pixels, labels)
    constant = metrics.measure(metrics.constant_colour(pixels), pixels, ("psnr", "ssim"))
    return {
        **values,
        **{f"consensus_{name}": value for name, value in together.items()},
        **{f"constant_{name}": metrics.mean(constant[name]) for name in ("psnr", "ssim")},
        **{name: metrics.mean([match[name] for match in matches]) for name in matches[0]},
        "labels": _labels_right(restored, labels),
    }


def _scores(bench: Bench, images: Tensor, restored: Tensor, pixels: Tensor, labels: Tensor) -> dict[str, float | None]:
    """Means over the batch, after pairing: images (B, 3, S, S) against the originals."""
    paired = images[metrics.pair(images, restored.tolist(), pixels, labels.tolist())]
    names = ("psnr", "ssim", "fft2d", "lpips") if bench.plan.lpips else ("psnr", "ssim", "fft2d")
    return {name: metrics.mean(column) for name, column in metrics.measure(paired, pixels, names).items()}


def gradient_match(model: Model, images: Tensor, labels: Tensor, observation: Observation) -> dict[str, float | None]:
    """How close the gradient of reconstructions comes to the observed one, over all parameters of the network.

    images: pixels (B, 3, S, S), as they are shown; labels: the restored ones (B,). → `l2_distance` ‖∇ − ΔW‖₂,
    `sign_match` the share of entries of the same sign in percent, `distance` one minus the cosine similarity (Table 5).
    """
    own = observe(model, images, labels, mode=observation.mode).gradients
    square = dot = length = target_length = 0.0
    same = count = 0
    for name, found in own.items():
        target = observation.gradients[name].to(found)
        square += float((found - target).double().square().sum())
        dot += float((found.double() * target).sum())
        length += float(found.double().square().sum())
        target_length += float(target.double().square().sum())
        same += int((found.sign() == target.sign()).sum())
        count += found.numel()
    norms = math.sqrt(length * target_length)
    return {
        "l2_distance": _finite(math.sqrt(square)),
        "sign_match": 100 * same / count,
        "distance": _finite(1 - dot / norms) if norms > 0 else None,
    }


def _labels_right(restored: Tensor, labels: Tensor) -> float:
    """The share of the labels, in percent, that were restored, each as often as it is there."""
    right = Counter(restored.tolist()) & Counter(labels.tolist())
    return 100 * sum(right.values()) / len(labels)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _weighed(bench: Bench, observation: Observation, config: AttackConfig, like: str) -> AttackConfig:
    """The settings with the weight of gradient matching scaled: it belongs to the way `like` to compare gradients, and
    the settings' own way shall pull the same noise with a pixel gradient of the same norm."""
    labels = restore_labels(bench.model, observation, config.labels).labels
    size = bench.model.preprocessing.size
    generator = torch.Generator().manual_seed(config.seed)
    noise = config.start_scale * torch.randn(observation.batch_size, 3, size, size, generator=generator)

    def pull(match: str) -> float:
        only = dataclasses.replace(
            config, match=match, gradient=1.0, features=0.0, bn="none", tv=0.0, l2=0.0, group=0.0
        )
        images = noise.to(bench.model.device).requires_grad_()
        judgement = Objective(bench.model, observation, labels, only)(images, images.detach())
        return float(torch.autograd.grad(judgement.total, images)[0].norm())

    return dataclasses.replace(config, gradient=config.gradient * pull(like) / max(pull(config.match), 1e-30))


def _measure_peer(
    bench: Bench, row: Row, config: AttackConfig, observation: Observation, pixels: Tensor, labels: Tensor
) -> Values:
    """The peer is given the labels that ours restores, so that neither has an advantage from them."""
    restored = restore_labels(bench.model, observation, config.labels).labels.cpu()
    result = _run_peer(bench, row, config, observation, restored)
    return {
        **_quality(bench, result.pixels[None], result.pixels, restored, observation, pixels, labels),
        "seconds": result.seconds,
        "seconds_per_iteration": result.seconds_per_iteration,
    }


def _run_peer(bench: Bench, row: Row, config: AttackConfig, observation: Observation, labels: Tensor) -> PeerResult:
    name = row.peer or ""
    return breaching_attack(
        name, bench.model, observation, labels, config.iterations, seed=config.seed, stop=bench.stop
    )


def _timing(bench: Bench, row: Row, number: int) -> Values:
    """Seconds an iteration by row: short runs of all attacks in turn, the mean over the rounds."""
    batch = bench.draw(row, number)
    pixels = bench.pixels(batch)
    rows = [other for other in bench.plan.rows if other.name != TIMING]
    taken: dict[str, list[float | None]] = {other.name: [] for other in rows}
    for _ in range(TIMED_ROUNDS):
        for other in rows:
            config = _shortened(_config(other, number), bench.model.device)
            observation = _observe(bench, other, number, config, pixels, batch.labels)
            if other.peer is not None:
                labels = restore_labels(bench.model, observation, config.labels).labels
                found = _run_peer(bench, other, config, observation, labels).seconds_per_iteration
            else:
                half = TIMED_ITERATIONS // 2
                stamps = [s.seconds for s in invert(bench.model, observation, config, every=half, stop=bench.stop)]
                if bench.stop.is_set():
                    raise Stopped
                found = (stamps[-1] - stamps[1]) / (TIMED_ITERATIONS - half)
            taken[other.name].append(found)
    return {name: metrics.mean(values) for name, values in taken.items()}


def _shortened(config: AttackConfig, device: torch.device) -> AttackConfig:
    """A few iterations that are executed, and register the group, as those of the whole run are."""
    interval = max(1, round(config.registration_interval * config.iterations))
    return dataclasses.replace(
        config,
        iterations=TIMED_ITERATIONS,
        stepping=resolve_mode(config.stepping, device, config.iterations * config.seeds),
        registration_interval=interval / TIMED_ITERATIONS,
    )


def _iip(bench: Bench, images: Tensor, batch: Batch) -> Tensor:
    """Whether each reconstruction's nearest neighbour in the folder is its own original: (B,) bool."""
    return metrics.iip(bench.model, images, bench.places(batch), bench.gallery)


# --- what the evaluations are


QUALITY = ("psnr", "consensus_psnr", "constant_psnr", "ssim", "consensus_ssim", "constant_ssim")
PSNR_PANEL = ("PSNR in dB", ("psnr", "consensus_psnr", "constant_psnr"))
SSIM_PANEL = ("SSIM", ("ssim", "consensus_ssim", "constant_ssim"))
METHODS = tuple(f"labels {method}" for method in LABEL_METHODS)

EXPERIMENTS: dict[str, Experiment] = {
    "labels": Experiment(
        labels_task,
        batches=1000,
        metrics=METHODS,
        panels=(("labels restored in %", METHODS),),
        sizes=(1, 2, 4, 8, 16, 32, 64),
    ),
    "ablation": Experiment(
        inversion_task,
        batches=8,
        metrics=(*QUALITY, "fft2d", "lpips", "distance", "labels", "seconds_per_iteration"),
        panels=(PSNR_PANEL, SSIM_PANEL),
    ),
    "matching": Experiment(
        inversion_task,
        batches=8,
        metrics=("l2_distance", "sign_match", "distance", *QUALITY),
        panels=(("cosine distance", ("distance",)), PSNR_PANEL, SSIM_PANEL),
    ),
    "identify": Experiment(
        identification_task,
        batches=20,
        metrics=("found", "labels", "residual"),
        panels=(("found at rank 1 in %", ("found",)), ("labels restored in %", ("labels",))),
        sizes=(8, 16, 32),
        defences=True,
    ),
    "batch-size": Experiment(
        inversion_task,
        batches=8,
        metrics=(*QUALITY, "iip", "distance", "labels", "seconds_per_iteration"),
        panels=(PSNR_PANEL, SSIM_PANEL, ("IIP in %", ("iip",))),
        sizes=(1, 2, 4, 8, 16, 32, 48),
    ),
    "defences": Experiment(
        inversion_task,
        batches=8,
        metrics=(*QUALITY, "labels", "found", "distance"),
        panels=(PSNR_PANEL, SSIM_PANEL, ("found and labels in %", ("found", "labels"))),
        defences=True,
    ),
    "compare": Experiment(
        comparison_task,
        batches=8,
        metrics=(*QUALITY, "distance", "labels", "seconds_per_iteration"),
        panels=(PSNR_PANEL, SSIM_PANEL, ("seconds an iteration", ("seconds_per_iteration",))),
    ),
}


# --- the folder of an evaluation


class Ledger:
    """What has been measured so far, in the evaluation's folder; every finished task is kept at once."""

    def __init__(self, folder: str | Path, plan: Plan, model: Model) -> None:
        """Open the folder, which `begin` makes where it is not there.

        A torn last line, as a killed process leaves it, is dropped. Raises GradinvError where the folder holds
        something else, another evaluation, or damaged results.
        """
        self.folder = Path(folder).expanduser()
        self.plan = plan
        self.values: dict[tuple[str, int], Values] = {}
        self.errors: dict[tuple[str, int], str] = {}
        self._store = DirectoryStore(self.folder)
        self._model = model
        self._known: list[dict[str, Any]] = []
        if self.folder.exists() and not self.folder.is_dir():
            raise GradinvError(f"{self.folder} is a file; name a folder with --out.")
        names = self._store.names() if self.folder.is_dir() else []
        if "plan.json" in names:
            self._check(plan.identity(model))
            if "results.jsonl" in names:
                self._read()
        elif names:
            raise GradinvError(f"{self.folder} is not empty and holds no evaluation; name another folder with --out.")

    def begin(self) -> None:
        """Write down what is measured, before the first task, beside the rows that were measured here before."""
        plan = self.plan.identity(self._model)
        names = {row["name"] for row in plan["rows"]}
        rows = [*(row for row in self._known if row["name"] not in names), *plan["rows"]]
        self._store.write("plan.json", json.dumps({**plan, "rows": rows}, indent=2).encode())

    def _check(self, identity: Mapping[str, Any]) -> None:
        try:
            known = json.loads(self._store.read("plan.json"))
            for row in known["rows"]:
                # A setting that is newer than the evaluation has its default.
                row["config"] = row["config"] and AttackConfig.from_dict(row["config"]).to_dict()
            # Through JSON, so that both sides are what JSON can hold.
            mine = json.loads(json.dumps(identity))
            rows = {row["name"]: row for row in known["rows"]}
            same = all(rows.get(row["name"], row) == row for row in mine["rows"])
            other = [name for name in mine if known[name] != mine[name] and not (name == "rows" and same)]
        except (ValueError, KeyError, TypeError) as error:
            raise GradinvError(
                f"The plan in {self.folder} is damaged ({error!r}); remove that folder or name another with --out."
            ) from error
        self._known = known["rows"]
        if other:
            raise GradinvError(
                f"{self.folder} holds another evaluation ({_difference(known, mine, other[0])}); repeat its command or "
                "name another folder with --out."
            )

    def _read(self) -> None:
        data = self._store.read("results.jsonl")
        complete = data[: data.rfind(b"\n") + 1]
        if len(complete) < len(data):
            self._store.write("results.jsonl", complete)
        for number, line in enumerate(complete.splitlines(), 1):
            try:
                entry = json.loads(line)
                key = (str(entry["row"]), int(entry["batch"]))
                if "error" in entry:
                    self.errors[key] = str(entry["error"])
                    continue
                self.values[key] = {
                    str(name): None if value is None else float(value) for name, value in entry["values"].items()
                }
                self.errors.pop(key, None)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise GradinvError(
                    f"Line {number} of {self.folder / 'results.jsonl'} is damaged; remove that line and go on."
                ) from error

    @property
    def missing(self) -> list[tuple[Row, int]]:
        """The plan's tasks that have no values yet, in order; those that failed before are among them."""
        return [task for task in self.plan.tasks if (task[0].name, task[1]) not in self.values]

    def add(self, row: Row, batch: int, outcome: Values | str) -> None:
        """Keep a finished task: its values, or the sentence that says why there are none."""
        key, entry = (row.name, batch), {"row": row.name, "batch": batch}
        if isinstance(outcome, str):
            self.errors[key] = outcome
            line = {**entry, "error": outcome}
        else:
            self.values[key] = outcome
            self.errors.pop(key, None)
            line = {**entry, "values": dict(outcome)}
        self._store.append("results.jsonl", json.dumps(line).encode() + b"\n")

    def write(self) -> dict[str, Any]:
        """Write results.json and results.csv of what there is; → the former's content."""
        self.begin()
        rows = summarise(self.plan, self.values)
        result = {"command": self.plan.command, "config": self._config(), "rows": rows}
        self._store.write("results.json", json.dumps(result, indent=2).encode())
        names = [name for name in COLUMNS if any(name in row["mean"] for row in rows)]
        text = io.StringIO()
        writer = csv.writer(text)
        gains = [name for name in GAINS if any(name in row.get("gain", {}) for row in rows)]
        writer.writerow(
            ["row", "n", *(title for name in names for title in (name, f"{name}_stderr"))]
            + [title for name in gains for title in (f"{name}_gain", f"{name}_gain_stderr")]
        )
        for row in rows:
            cells = [value for name in names for value in (row["mean"].get(name), row["stderr"].get(name))]
            for name in gains:
                gain = row.get("gain", {}).get(name, {})
                cells += [gain.get("mean"), gain.get("stderr")]
            writer.writerow([row["name"], row["n"], *cells])
        self._store.write("results.csv", text.getvalue().encode())
        return result

    def _config(self) -> dict[str, Any]:
        return {**self.plan.identity(self._model), "batches": self.plan.batches}

    def draw(self) -> str | None:
        """Write figure.html and figure.json of what there is; → why not, in a sentence, where plotly is missing."""
        try:
            drawn = figure(self.plan, summarise(self.plan, self.values))
        except ImportError:
            return "No figure was drawn, because plotly is not installed (pip install 'gradinv[app]')."
        self._store.write("figure.html", drawn.to_html(include_plotlyjs=True).encode())
        self._store.write("figure.json", drawn.to_json().encode())
        return None


def _difference(known: Mapping[str, Any], mine: Mapping[str, Any], name: str) -> str:
    """In words: the first thing in which two plans differ."""
    if name != "rows":
        here, there = ((item["name"] if name == "model" else item) for item in (mine[name], known[name]))
        return f"{name} {there}, not {here}" if here != there else f"another version of the {name} {here}"
    rows = {row["name"]: _flat(row) for row in known["rows"]}
    for row in mine["rows"]:
        here = _flat(row)
        there = rows.get(row["name"], here)
        if changed := [key for key in here if there.get(key) != here[key]]:
            return f"{changed[0]} {there.get(changed[0])}, not {here[changed[0]]}"
    return "other rows"


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row's facts and its settings as one mapping."""
    return {**{key: value for key, value in row.items() if key != "config"}, **(row["config"] or {})}


# --- running


def measure(
    ledger: Ledger,
    model: Model,
    *,
    workers: int = 1,
    stop: threading.Event | None = None,
    report: Progress | None = None,
) -> Iterator[tuple[Row, int]]:
    """Do the tasks that are missing and keep each; yields every one that is done. Ends early where `stop` is set.

    With several workers each is a process of its own, with its share of this one's threads. A task that fails with a
    GradinvError is noted and the others go on. `report` is told how far the gallery is, where one is needed. Raises
    GradinvError where nothing can be measured, and KeyboardInterrupt where `stop` is set while the gallery is made.
    """
    stop = stop or threading.Event()
    if workers < 1:
        raise GradinvError(f"At least one worker has to do the work, not {workers}.")
    if any(row.peer is not None for row in ledger.plan.rows):
        peers.require_breaching()
    bench = Bench(ledger.plan, model, stop, report)
    missing = ledger.missing
    if any(row.config is None for row, _ in missing) or ledger.plan.command in ("batch-size", "defences"):
        _ = bench.gallery  # once, before several processes would each make it
    if ledger.plan.lpips:
        metrics.lpips(torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 64, 64))  # said now where it cannot be had
    ledger.begin()
    workers = min(workers, len(missing))
    outcomes = _in_processes(ledger.plan, missing, workers, stop) if workers > 1 else _in_turn(bench, missing)
    for (row, batch), outcome in outcomes:
        ledger.add(row, batch, outcome)
        yield row, batch
    if ledger.errors and not ledger.values and not stop.is_set():
        raise GradinvError(next(iter(ledger.errors.values())))


def _in_turn(bench: Bench, tasks: Sequence[tuple[Row, int]]) -> Iterator[tuple[tuple[Row, int], Values | str]]:
    for row, batch in tasks:
        try:
            yield (row, batch), _do(bench, row, batch)
        except Stopped:
            return
        if bench.stop.is_set():
            return


def _do(bench: Bench, row: Row, batch: int) -> Values | str:
    try:
        return EXPERIMENTS[bench.plan.command].task(bench, row, batch)
    except GradinvError as error:
        return str(error)


_bench: Bench | None = None
"""In a worker process: the bench that its tasks share."""


def _in_processes(
    plan: Plan, tasks: Sequence[tuple[Row, int]], workers: int, stop: threading.Event
) -> Iterator[tuple[tuple[Row, int], Values | str]]:
    # spawn: a forked child of a process whose torch has started threads may hang.
    context = multiprocessing.get_context("spawn")
    ending = context.Event()
    threads = max(1, torch.get_num_threads() // workers)
    waiting = iter(tasks)
    with ProcessPoolExecutor(workers, context, _start_worker, (plan, threads, ending)) as pool:
        running = {pool.submit(_work, task) for task in itertools.islice(waiting, 2 * workers)}
        try:
            while running:
                done, running = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
                if stop.is_set():
                    return
                for future in done:
                    yield future.result()
                running |= {pool.submit(_work, task) for task in itertools.islice(waiting, len(done))}
        except BrokenProcessPool as error:
            raise GradinvError(
                "A worker process has ended, perhaps for want of memory; repeat the command with fewer workers."
            ) from error
        finally:
            ending.set()  # a task in progress ends within one evaluation
            pool.shutdown(cancel_futures=True)


def _start_worker(plan: Plan, threads: int, ending: Event) -> None:
    global _bench
    # Ctrl-C reaches every process of the terminal; the parent decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    # Of an event, only `is_set` is asked.
    stop = cast(threading.Event, ending)
    _bench = Bench(plan, load_model(plan.model, device=plan.device, image_size=plan.image_size), stop)


def _end_with_parent() -> None:
    """A parent that was killed cannot end its workers, and nobody would take what they go on to measure."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _work(task: tuple[Row, int]) -> tuple[tuple[Row, int], Values | str]:
    assert _bench is not None
    return task, _do(_bench, *task)


# --- the table and the figure

GAINS = ("psnr", "ssim")
"""The metrics whose gains over another row are stated."""


def summarise(plan: Plan, values: Mapping[tuple[str, int], Values]) -> list[dict[str, Any]]:
    """The table: by row its name, the number of batches `n`, and by metric `mean` and `stderr` over them.

    `stderr` is the standard error of the mean, s/√n; None for a single batch. A mean is None where a batch has no
    number: what is left out of a mean would pass unnoticed. `gain` is the mean of the differences to another row,
    batch by batch, with their standard error, over the batches that both have.
    """
    timed = {number: found for (name, number), found in values.items() if name == TIMING}
    by_row: dict[str, dict[int, Values]] = {}
    for row in plan.rows:
        if row.name == TIMING:
            continue
        found = {batch: values[row.name, batch] for batch in range(plan.batches) if (row.name, batch) in values}
        by_row[row.name] = found
    judged = {row.name: row.judged for row in plan.rows}
    table = []
    for row in plan.rows:
        if row.name == TIMING:
            continue
        found = by_row[row.name]
        columns: dict[str, list[float | None]] = {}
        for one in found.values():
            for name, value in one.items():
                columns.setdefault(name, []).append(value)
        if any(one.peer for one in plan.rows):
            columns["seconds_per_iteration"] = [timed[number].get(row.name) for number in sorted(timed)]
        entry: dict[str, Any] = {
            "name": row.name,
            "n": len(found),
            "mean": {name: metrics.mean(column) for name, column in columns.items()},
            "stderr": {name: standard_error(column) for name, column in columns.items()},
            "batch_size": row.batch_size,
            "judged": row.judged,
            "defence": row.defence,
            "notes": [defence.note for defence in defences_of(row.defence)],
            "series": row.series,
        }
        gains = {name: _gain(name, row, by_row, judged) for name in GAINS}
        if row.over and any(gains.values()):
            entry["gain"] = {name: gain for name, gain in gains.items() if gain}
        table.append(entry)
    return table


def _gain(
    metric: str, row: Row, by_row: Mapping[str, Mapping[int, Values]], judged: Mapping[str, str]
) -> dict[str, Any] | None:
    """The paired gain of a row over the best of those it is compared with, or None where there is nothing to pair."""
    best: dict[str, Any] | None = None
    for other in row.over:
        own, theirs = (_judged(metric, name, by_row, judged) for name in (row.name, other))
        pairs = [(own[batch], theirs[batch]) for batch in own if batch in theirs]
        differences = [a - b for a, b in pairs if a is not None and b is not None]
        if not pairs or len(differences) < len(pairs):
            continue
        gain = {"over": other, "n": len(pairs), "mean": metrics.mean(differences)}
        if best is None or gain["mean"] < best["mean"]:
            best = {**gain, "stderr": standard_error(differences)}
    return best


def _judged(
    metric: str, name: str, by_row: Mapping[str, Mapping[int, Values]], judged: Mapping[str, str]
) -> dict[int, float | None]:
    key = f"consensus_{metric}" if judged.get(name) == "consensus" else metric
    return {batch: values.get(key) for batch, values in by_row.get(name, {}).items()}


def standard_error(values: Sequence[float | None]) -> float | None:
    """s/√n with the sample standard deviation s (n − 1); None for fewer than two values or where one is missing."""
    known = [value for value in values if value is not None]
    if len(known) < 2 or len(known) < len(values):
        return None
    return statistics.stdev(known) / math.sqrt(len(known))


def figure(plan: Plan, rows: Sequence[Mapping[str, Any]]) -> Any:
    """The table as a Plotly figure with standard errors: lines over the batch size where rows have one, else bars.

    Raises ImportError without plotly.
    """
    from plotly.subplots import make_subplots

    from gradinv.figures import COLOURS

    experiment = EXPERIMENTS[plan.command]
    panels = [
        (title, [name for name in names if any(row["mean"].get(name) is not None for row in rows)])
        for title, names in experiment.panels
    ]
    panels = [(title, names) for title, names in panels if names]
    drawn = make_subplots(rows=max(1, len(panels)), cols=1, subplot_titles=[title for title, _ in panels])
    series = list(dict.fromkeys(row["series"] for row in rows))
    for place, (_, names) in enumerate(panels, 1):
        for index, (name, one) in enumerate((name, one) for one in series for name in names):
            chosen = [row for row in rows if row["series"] == one and row["mean"].get(name) is not None]
            label = " ".join(part for part in (COLUMNS[name].title, one) if part)
            error = {"type": "data", "array": [row["stderr"].get(name) or 0 for row in chosen]}
            common = {"name": label, "legendgroup": label, "error_y": error}
            colour = COLOURS[index % len(COLOURS)]
            y = [row["mean"][name] for row in chosen]
            if experiment.sizes:
                x = [row["batch_size"] for row in chosen]
                drawn.add_scatter(x=x, y=y, mode="lines+markers", line_color=colour, row=place, col=1, **common)
            else:
                x = [row["name"] for row in chosen]
                drawn.add_bar(x=x, y=y, marker_color=colour, row=place, col=1, **common)
    if experiment.sizes:
        drawn.update_xaxes(title_text="batch size", type="log", tickvals=sorted({row["batch_size"] for row in rows}))
    note = f"{plan.command}: mean ± standard error over {max((row['n'] for row in rows), default=0)} batches"
    return drawn.update_layout(
        title=note, paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)", height=120 + 320 * max(1, len(panels))
    )
