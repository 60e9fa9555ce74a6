"""The tasks: one row of a table, measured on one batch.

Here, and nowhere in the attack, originals and true labels are known: to draw the batch, play the client and measure.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from gradinv import gallery, metrics
from gradinv.attack.inversion import invert
from gradinv.attack.objective import Objective
from gradinv.breaching import Reconstruction, Stopped, breaching_attack
from gradinv.client import final_gradient, observe
from gradinv.config import AttackConfig
from gradinv.evaluation.bench import Batch, Bench
from gradinv.evaluation.plan import TIMING, Row, Values
from gradinv.execution.stepping import resolve_mode
from gradinv.models import Model
from gradinv.network import Segment
from gradinv.prior import FEATURES, paint
from gradinv.recovery.labels import METHODS as LABEL_METHODS
from gradinv.recovery.labels import restore_labels
from gradinv.recovery.recover import recover
from gradinv.sources import pixels_of
from gradinv.types import GradinvError, Observation, Prior, Snapshot

TIMED_ITERATIONS, TIMED_ROUNDS = 12, 2
"""Each attack of the comparison is timed over the second half of so many iterations, all in turn, so many times."""


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
        values[f"labels {method}"] = None  # column minimum has no answer for more images than classes
        with contextlib.suppress(GradinvError):
            restored = restore_labels(bench.model, observation, method).labels
            values[f"labels {method}"] = _labels_right(restored, batch.labels)
    return values


def identification_task(bench: Bench, row: Row, number: int) -> Values:
    """Whose features the gradient holds: the share of the batch's pictures ranked first in the whole folder."""
    batch = bench.draw(row, number)
    if row.defence == "none":
        observation = observe_final(bench, batch)
    else:
        # A defence acts on the whole gradient (a norm over all layers), so all of it is needed.
        observation = bench.defend(observe(bench.model, batch.pixels, batch.labels), row, number)
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
    observation = _observe(bench, row, number, config, batch)
    if row.weigh_like:
        config = _weighed(bench, observation, config, row.weigh_like)
    if row.peer is not None:
        return _measure_peer(bench, row.peer, config, observation, batch)
    last, run = _run(bench, observation, config)
    restored = torch.tensor(last.labels)
    if last.prior is not None:
        run = {**run, **_prior(bench, last, last.prior, batch)}
    values = {**_quality(bench, last.seeds, last.consensus, restored, observation, batch), **run}
    if bench.plan.command == "batch-size":
        # Whether each reconstruction's nearest neighbour in the folder is its own original.
        paired = _paired(last.consensus, restored, batch)
        inside = gallery.iip(bench.model, paired, bench.places(batch), bench.gallery)
        values["iip"] = 100 * float(inside.double().mean())
    if bench.plan.command == "defences":
        values["found"] = identify(bench, batch, observation)["found"]
    return values


def comparison_task(bench: Bench, row: Row, number: int) -> Values:
    """As `inversion_task`; the row `timing` times all attacks in turn in this process, seconds an iteration each."""
    return _timing(bench, row, number) if row.name == TIMING else inversion_task(bench, row, number)


def _config(row: Row, number: int) -> AttackConfig:
    """The row's settings; each batch has its own noise."""
    assert row.config is not None
    return dataclasses.replace(row.config, seed=row.config.seed + number)


def _observe(bench: Bench, row: Row, number: int, config: AttackConfig, batch: Batch) -> Observation:
    mode = "train" if config.bn == "inferred" else "eval"
    observation = observe(bench.model, batch.pixels, batch.labels, share_bn=config.bn == "exact", mode=mode)
    return bench.defend(observation, row, number)


def _run(bench: Bench, observation: Observation, config: AttackConfig) -> tuple[Snapshot, Values]:
    """The last snapshot of an inversion, how long it took with and without the search, and what was known beforehand:
    so many numbers of each image, with so large an error. Raises Stopped where it was not allowed to end."""
    last: Snapshot | None = None
    began = time.perf_counter()
    snapshots = invert(bench.model, observation, config, stop=bench.stop)
    solved = time.perf_counter()
    for snapshot in snapshots:
        last = snapshot
    if last is None or not last.final:
        raise Stopped
    values: dict[str, float | None] = {
        "seconds_solving": solved - began,
        "seconds": time.perf_counter() - began,
        "seconds_per_iteration": last.seconds / max(1, last.steps),
    }
    if config.needs_layers:
        node = next((node for node in snapshots.recovered.nodes if node.name == last.boundary), None)
        values["known"] = 0.0 if node is None else float(node.activation[0].numel())
        values["known_error"] = None if node is None else 100 * node.typical_error
    if last.prior is not None:
        values["agreement_psnr"] = float(metrics.psnr(last.consensus, last.prior.pixels).mean())
        for name in ("activations", "features", "gradient"):
            if name in last.prior.misfit and name in last.terms:
                values["prior_misfit"] = _finite(last.prior.misfit[name])
                values["misfit"] = metrics.mean(last.terms[name].raw)
                break
    return last, values


def _prior(bench: Bench, last: Snapshot, prior: Prior, batch: Batch) -> Values:
    """How good the picture is that the learned prior paints alone, and as a control the one that it paints of another
    picture of the same class, one that is not in the batch, known exactly: what the prior would imagine."""
    painted = _paired(prior.pixels, torch.tensor(last.labels), batch)
    values = {f"prior_{name}": value for name, value in _means(painted, batch, ("psnr", "ssim")).items()}
    if prior.node == FEATURES:
        return values
    others = pixels_of(bench.others(batch), bench.model.preprocessing)
    normalised = bench.model.preprocessing.normalise(others.to(bench.model.device))
    with torch.no_grad():
        held = Segment(bench.model.network, prior.node)(normalised)[prior.node].relu()
    control = _means(paint(bench.model, prior.node, held).cpu(), batch, ("psnr", "ssim"))
    return {**values, **{f"control_{name}": value for name, value in control.items()}}


def _quality(
    bench: Bench, seeds: Tensor, consensus: Tensor, restored: Tensor, observation: Observation, batch: Batch
) -> dict[str, float | None]:
    """What is measured of reconstructions: seeds (G, B, 3, S, S) and consensus (B, 3, S, S), pixels in [0, 1]."""
    names = ("psnr", "ssim", "fft2d", "lpips") if bench.plan.lpips else ("psnr", "ssim", "fft2d")
    each = [
        {
            **_means(_paired(images, restored, batch), batch, names),
            **gradient_match(bench.model, images, restored, observation),
        }
        for images in seeds
    ]
    together = _means(_paired(consensus, restored, batch), batch, names)
    constant = _means(metrics.constant_colour(batch.pixels), batch, ("psnr", "ssim"))
    return {
        **{name: metrics.mean([one[name] for one in each]) for name in each[0]},
        **{f"consensus_{name}": value for name, value in together.items()},
        **{f"constant_{name}": value for name, value in constant.items()},
        "labels": _labels_right(restored, batch.labels),
    }


def _paired(images: Tensor, restored: Tensor, batch: Batch) -> Tensor:
    """Images (B, 3, S, S) of the restored labels, in the originals' order."""
    return images[metrics.pair(images, restored.tolist(), batch.pixels, batch.labels.tolist())]


def _means(images: Tensor, batch: Batch, names: tuple[str, ...]) -> dict[str, float | None]:
    """Those metrics of images (B, 3, S, S) in the originals' order, means over the batch."""
    return {name: metrics.mean(column) for name, column in metrics.measure(images, batch.pixels, names).items()}


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
    return 100 * metrics.labels_right(restored.tolist(), labels.tolist()) / len(labels)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _weighed(bench: Bench, observation: Observation, config: AttackConfig, like: str) -> AttackConfig:
    """The settings with the weight of gradient matching scaled: it belongs to the way `like` to compare gradients, and
    the settings' own way shall pull the same noise with a pixel gradient of the same norm."""
    recovered = recover(bench.model, observation, config)
    size = bench.model.preprocessing.size
    generator = torch.Generator().manual_seed(config.seed)
    noise = config.start_scale * torch.randn(observation.batch_size, 3, size, size, generator=generator)

    def pull(match: str) -> float:
        only = dataclasses.replace(
            config, match=match, gradient=1.0, features=0.0, bn="none", tv=0.0, l2=0.0, group=0.0
        )
        images = noise.to(bench.model.device).requires_grad_()
        found = Objective(bench.model, observation, recovered, only)(images, images.detach())
        return float(torch.autograd.grad(found.total, images)[0].norm())

    return dataclasses.replace(config, gradient=config.gradient * pull(like) / max(pull(config.match), 1e-30))


def _measure_peer(bench: Bench, peer: str, config: AttackConfig, observation: Observation, batch: Batch) -> Values:
    """The peer is given the labels that ours restores, so that neither has an advantage from them."""
    restored, result = _run_peer(bench, peer, config, observation)
    return {
        **_quality(bench, result.pixels[None], result.pixels, restored, observation, batch),
        "seconds": result.seconds,
        "seconds_per_iteration": result.seconds_per_iteration,
    }


def _run_peer(bench: Bench, peer: str, config: AttackConfig, observation: Observation) -> tuple[Tensor, Reconstruction]:
    restored = restore_labels(bench.model, observation, config.labels).labels.cpu()
    iterations, seed = config.iterations, config.seed
    return restored, breaching_attack(peer, bench.model, observation, restored, iterations, seed=seed, stop=bench.stop)


def _timing(bench: Bench, row: Row, number: int) -> Values:
    """Seconds an iteration by row: short runs of all attacks in turn, the mean over the rounds."""
    batch = bench.draw(row, number)
    rows = [other for other in bench.plan.rows if other.name != TIMING]
    taken: dict[str, list[float | None]] = {other.name: [] for other in rows}
    for _ in range(TIMED_ROUNDS):
        for other in rows:
            config = _shortened(_config(other, number), bench.model.device)
            observation = _observe(bench, other, number, config, batch)
            if other.peer is not None:
                found = _run_peer(bench, other.peer, config, observation)[1].seconds_per_iteration
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


TASKS: dict[str, Callable[[Bench, Row, int], Values]] = {
    "labels": labels_task,
    "ablation": inversion_task,
    "matching": inversion_task,
    "ingredients": inversion_task,
    "identify": identification_task,
    "batch-size": inversion_task,
    "defences": inversion_task,
    "compare": comparison_task,
}
"""By evaluation what measures a row on the batch of that number."""
