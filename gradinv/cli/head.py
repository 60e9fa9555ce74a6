"""`gradinv head`: a final layer for a network that was trained without labels."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gradinv import __version__
from gradinv.backbones import check_writable, load_backbone, save_fitted
from gradinv.cli.progress import counted
from gradinv.cli.say import answer, complain, say
from gradinv.gallery import Gallery
from gradinv.models import MODELS, Model, fitted_file
from gradinv.sources import ImageFolder
from gradinv.types import GradinvError

CHUNK = 8192  # pictures whose logits are held at once: 1000 classes take 33 MB


def run(args: argparse.Namespace) -> int:
    try:
        answer(args, _fit(args))
    except KeyboardInterrupt as stopped:
        # The gallery has a sentence of its own: the features that it has computed are kept.
        return complain(f"{str(stopped) or 'Interrupted.'} No network was written.", 130)
    return 0


def _fit(args: argparse.Namespace) -> dict[str, Any]:
    """Everything from the pictures to the written network: → what is to be known of it."""
    started = time.perf_counter()
    # What would be wrong after a download or an hour of pictures is said before.
    _check(args)
    target = _choose_target(args)
    check_writable(target)
    folder = ImageFolder(args.imagenet)
    second = None if args.val is None else ImageFolder(args.val)
    if second is not None and second.root.resolve() == folder.root.resolve():
        raise GradinvError("--val names the folder that is fitted to; name another, or leave --val out.")

    with counted(unit="B", unit_scale=True, leave=False) as progress:
        shape: dict[str, Any] = {"image_size": args.image_size, "mean": args.mean, "std": args.std}
        backbone = load_backbone(args.model, device=args.device, **shape, progress=progress)
    model, size = backbone.model, backbone.model.preprocessing.size
    say(f"{model.name}: {model.final_layer.in_features} features at {size} × {size} px, on {model.device}")
    pictures = _features(model, folder)
    if len(pictures.wnids) < 2:
        raise GradinvError(f"All pictures are of one class, {pictures.wnids[0]}; a final layer needs at least two.")
    if second is None:
        fitted, held_out = _split(pictures, args.held_out, args.seed)
    else:
        fitted, held_out = pictures, _features(model, second).of_classes(pictures.wnids)
    counts = {"fitted": len(fitted.labels), "held_out": len(held_out.labels)}
    say(f"{counts['fitted']} pictures of {len(fitted.wnids)} classes to fit, {counts['held_out']} to measure")

    with counted(unit="pass", leave=False) as progress:
        found: dict[str, Any] = {"epochs": args.epochs, "decay": args.decay, "device": model.device}
        weight, bias, passes = fit(fitted.features, fitted.labels, len(fitted.wnids), **found, progress=progress)
    accuracy = {"fitted": fitted.accuracy(weight, bias), "held_out": held_out.accuracy(weight, bias)}
    how = {"pictures": counts, "accuracy": accuracy, "decay": args.decay, "passes": passes, "seed": args.seed}
    layer = weight, bias, fitted.wnids, accuracy["held_out"]
    save_fitted(target, backbone, *layer, fit=json.dumps(how), gradinv=__version__)
    seconds = time.perf_counter() - started
    say(
        f"Top-1 {accuracy['held_out']:.1f} % of the held-out pictures, {accuracy['fitted']:.1f} % of those that it was "
        f"fitted to; {passes} passes, {seconds:.0f} s"
    )
    say(f"The network is in {target}; attack it with --model {target if args.out else args.model}.")
    origin = {"name": model.name, "arch": backbone.arch, "origin": backbone.origin, "sha256": model.sha256}
    told = {"file": str(target), "backbone": {**origin, "image_size": size}, "classes": len(fitted.wnids)}
    return {"format": 1, **told, **how, "seconds": round(seconds, 1)}


def _check(args: argparse.Namespace) -> None:
    if not 0 < args.held_out < 1:
        raise GradinvError(f"--held-out takes a share between 0 and 1, not {args.held_out:g}.")
    if args.epochs < 1:
        raise GradinvError(f"--epochs takes a number of at least 1, not {args.epochs}.")
    if not 0 <= args.decay < math.inf:
        raise GradinvError(f"--decay takes a number of at least 0, not {args.decay:g}.")


def _choose_target(args: argparse.Namespace) -> Path:
    """The file to write. Raises GradinvError where it has to be named, or is there and not the command's own."""
    if args.out is None:
        if args.model not in MODELS or not MODELS[args.model].headless:
            raise GradinvError("Name the file to write the network to with --out FILE (a .safetensors file).")
        return fitted_file(args.model)
    path = Path(args.out).expanduser()
    if path.is_file():
        raise GradinvError(f"{path} is there already; name another file with --out, or remove it first.")
    return path


@dataclass(frozen=True, eq=False)
class _Pictures:
    """Pooled features (N, D), float32 on the CPU, of N pictures, and their labels (N,): places in `wnids`."""

    features: Tensor
    labels: Tensor
    wnids: list[str]

    def only(self, chosen: Tensor) -> _Pictures:
        """Those of a mask (N,) or of indices."""
        return _Pictures(self.features[chosen], self.labels[chosen], self.wnids)

    def accuracy(self, weight: Tensor, bias: Tensor) -> float:
        """The share in percent whose label a final layer (C, D), (C,) finds, to two digits."""
        parts = zip(self.features.split(CHUNK), self.labels.split(CHUNK), strict=True)
        right = sum(int((F.linear(part, weight, bias).argmax(1) == truth).sum()) for part, truth in parts)
        return round(100 * right / len(self.labels), 2)

    def of_classes(self, wnids: Sequence[str]) -> _Pictures:
        """Those of the given classes, with their labels there. Raises GradinvError where there are none."""
        place = {wnid: index for index, wnid in enumerate(wnids)}
        labels = torch.tensor([place.get(wnid, -1) for wnid in self.wnids])[self.labels]
        if not (labels >= 0).any():
            raise GradinvError("The two folders have no class in common; name two parts of one data set.")
        if unknown := sum(wnid not in place for wnid in self.wnids):
            say(f"Classes of the second folder that the first lacks are left out: {unknown}.")
        known = labels >= 0
        return _Pictures(self.features[known], labels[known], list(wnids))


def _features(model: Model, folder: ImageFolder) -> _Pictures:
    """The pooled features of the pictures in a folder's class folders. Raises GradinvError where there are none."""
    with counted(unit="picture", leave=False) as progress:
        gallery = Gallery.of(model, folder.root, progress=progress)
    for note in gallery.notes:
        say(note)
    known = {item.wnid for item in folder.classes}
    named = [path.relative_to(folder.root).parts[0] for path in gallery.paths]
    rows = [row for row, name in enumerate(named) if name in known]
    if not rows:
        raise GradinvError(f"The class folders of {folder.root} hold no pictures; name the folder that does.")
    features = gallery.features if len(rows) == len(named) else gallery.features[rows]
    if not features.isfinite().all():
        raise GradinvError(f"{model.name} gives features that are not finite; these weights cannot be used.")
    wnids = sorted({named[row] for row in rows})
    place = {wnid: index for index, wnid in enumerate(wnids)}
    return _Pictures(features, torch.tensor([place[named[row]] for row in rows]), wnids)


def _split(pictures: _Pictures, share: float, seed: int) -> tuple[_Pictures, _Pictures]:
    """→ (to fit, held out): of each class its share at random, but never its last picture."""
    generator = torch.Generator().manual_seed(seed)
    held = torch.zeros(len(pictures.labels), dtype=torch.bool)
    for label in range(len(pictures.wnids)):
        (own,) = (pictures.labels == label).nonzero(as_tuple=True)
        count = min(len(own) - 1, math.floor(share * len(own) + 0.5))
        held[own[torch.randperm(len(own), generator=generator)[:count]]] = True
    if not held.any():
        raise GradinvError(
            f"A share of {share:g} of so few pictures is none; give a larger --held-out, or a second folder with --val."
        )
    return pictures.only(~held), pictures.only(held)


def fit(
    features: Tensor,
    labels: Tensor,
    classes: int,
    *,
    epochs: int,
    decay: float,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Tensor, Tensor, int]:
    """Multinomial logistic regression on features (N, D) and labels (N,): → (weight (C, D), bias (C,), passes).

    It minimises Σ cross-entropy + decay / 2 · ‖W‖² (divided by N) over z = (x − mean) / deviation by L-BFGS from zero,
    on `device`; the scaling is then folded into what is returned, which takes x itself, on the CPU. A feature that
    never changes gets no weight. The problem is convex, so there is nothing to be seeded.
    """
    deviation, mean = (moment.to(device) for moment in torch.std_mean(features, 0, correction=0))
    scale = torch.where(deviation > 1e-6 * deviation.max(), 1 / deviation, 0)
    weight = torch.zeros(classes, features.shape[1], device=device, requires_grad=True)
    bias = torch.zeros(classes, device=device, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [weight, bias], max_iter=epochs, max_eval=epochs, history_size=10, line_search_fn="strong_wolfe"
    )
    passes = 0

    def closure() -> float:
        nonlocal passes
        optimiser.zero_grad()
        total = 0.0
        # In parts, since neither the features of a million pictures nor their logits need fit into a GPU's memory.
        for part, truth in zip(features.split(CHUNK), labels.split(CHUNK), strict=True):
            logits = F.linear((part.to(device) - mean) * scale, weight, bias)
            loss = F.cross_entropy(logits, truth.to(device), reduction="sum") / len(labels)
            loss.backward()
            total += loss.item()
        penalty = decay / (2 * len(labels)) * weight.square().sum()
        penalty.backward()
        passes += 1
        progress(passes, epochs)
        return total + penalty.item()

    optimiser.step(closure)
    with torch.no_grad():
        folded = weight * scale
        return folded.cpu(), (bias - folded @ mean).cpu(), passes
