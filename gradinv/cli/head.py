"""`gradinv head`: a final layer for a network that was trained without labels."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from gradinv.cli.say import complain, speaker
from gradinv.cli.task import add_normalisation

# torch takes seconds to import: what needs it is imported by the functions, so that help and mistakes answer at once.
if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from gradinv.models import Model
    from gradinv.sources import ImageFolder


CHUNK = 8192  # pictures whose logits are held at once: 1000 classes take 33 MB

HELP = "fit a final layer to a network that has none, on a folder of labelled pictures"
EXAMPLES = """\
examples:
  gradinv head --imagenet imagenet/train --val imagenet/val    MoCo v2; --model resnet50-moco works from then on
  gradinv head --imagenet imagenet/val                         the same with 45,000 pictures, tested on the other 5,000
  gradinv head --imagenet tiny --model backbone.pth --image-size 64 --out mine.safetensors

Each picture's pooled features are computed once and kept: to fit again, with another --decay, takes little time.
Multinomial logistic regression is fitted to them by L-BFGS.
"""


def add_arguments(parser: argparse.ArgumentParser, chosen: bool) -> None:
    """The pictures, the network and the fit."""
    parser.add_argument("--imagenet", metavar="DIR", help="a folder in ImageNet layout (else: GRADINV_IMAGENET)")
    parser.add_argument(
        "--model",
        default="resnet50-moco",
        help="a name that `gradinv models` lists, or a weights file with or without a final layer, also a checkpoint "
        "of MoCo (default: %(default)s, downloaded on first use)",
    )
    parser.add_argument("--image-size", type=int, metavar="PX", help="side of the images (default: the model's own)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, … (default: %(default)s)")
    add_normalisation(parser)
    tested = parser.add_mutually_exclusive_group()
    tested.add_argument("--val", metavar="DIR", help="a second folder, whose pictures only measure the accuracy")
    tested.add_argument(
        "--held-out",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="share of each class's pictures that only measures the accuracy (default: %(default)s)",
    )
    parser.add_argument(
        "--epochs", type=int, default=100, metavar="N", help="passes over the features, about (default: %(default)s)"
    )
    parser.add_argument(
        "--decay",
        type=float,
        default=100,
        metavar="X",
        help="weight of half the squared norm of the weights against the summed cross-entropy (default: %(default)g)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the held-out share (default: %(default)s)")
    parser.add_argument(
        "--out", metavar="FILE", help="the network, a .safetensors file (default: where --model resnet50-moco finds it)"
    )


def run(args: argparse.Namespace) -> int:
    say = speaker(args)
    try:
        result = _fit(args, say)
    except KeyboardInterrupt as stopped:
        # The gallery has a sentence of its own: the features that it has computed are kept.
        return complain(f"{str(stopped) or 'Interrupted.'} No network was written.", 130)
    if args.json:
        print(json.dumps(result, indent=2))
    return 0


def _fit(args: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Everything from the pictures to the written network: → what is to be known of it."""
    from gradinv import __version__
    from gradinv.backbones import check_writable, load_backbone, save_fitted
    from gradinv.sources import ImageFolder
    from gradinv.types import GradinvError

    started = time.perf_counter()
    # What would be wrong after a download or an hour of pictures is said before.
    _check(args)
    target = _choose_target(args)
    check_writable(target)
    folder = ImageFolder(args.imagenet)
    second = None if args.val is None else ImageFolder(args.val)
    if second is not None and second.root.resolve() == folder.root.resolve():
        raise GradinvError("--val names the folder that is fitted to; name another, or leave --val out.")

    with _Bar("B") as bar:
        shape: dict[str, Any] = {"image_size": args.image_size, "mean": args.mean, "std": args.std}
        backbone = load_backbone(args.model, device=args.device, **shape, progress=bar.to)
    model, size = backbone.model, backbone.model.preprocessing.size
    say(f"{model.name}: {model.final_layer.in_features} features at {size} × {size} px, on {model.device}")
    pictures = _features(model, folder, say)
    if len(pictures.wnids) < 2:
        raise GradinvError(f"All pictures are of one class, {pictures.wnids[0]}; a final layer needs at least two.")
    if second is None:
        fitted, held_out = _split(pictures, args.held_out, args.seed)
    else:
        fitted, held_out = pictures, _features(model, second, say).of_classes(pictures.wnids, say)
    counts = {"fitted": len(fitted.labels), "held_out": len(held_out.labels)}
    say(f"{counts['fitted']} pictures of {len(fitted.wnids)} classes to fit, {counts['held_out']} to measure")

    with _Bar("pass", args.epochs) as bar:
        found: dict[str, Any] = {"epochs": args.epochs, "decay": args.decay, "device": model.device, "progress": bar.to}
        weight, bias, passes = fit(fitted.features, fitted.labels, len(fitted.wnids), **found)
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
    from gradinv.types import GradinvError

    if not 0 < args.held_out < 1:
        raise GradinvError(f"--held-out takes a share between 0 and 1, not {args.held_out:g}.")
    if args.epochs < 1:
        raise GradinvError(f"--epochs takes a number of at least 1, not {args.epochs}.")
    if not 0 <= args.decay < math.inf:
        raise GradinvError(f"--decay takes a number of at least 0, not {args.decay:g}.")


def _choose_target(args: argparse.Namespace) -> Path:
    """The file to write. Raises GradinvError where it has to be named, or is there and not the command's own."""
    from gradinv.models import MODELS, fitted_file
    from gradinv.types import GradinvError

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
        from torch.nn import functional as F

        parts = zip(self.features.split(CHUNK), self.labels.split(CHUNK), strict=True)
        right = sum(int((F.linear(part, weight, bias).argmax(1) == truth).sum()) for part, truth in parts)
        return round(100 * right / len(self.labels), 2)

    def of_classes(self, wnids: Sequence[str], say: Callable[[str], None]) -> _Pictures:
        """Those of the given classes, with their labels there. Raises GradinvError where there are none."""
        import torch

        from gradinv.types import GradinvError

        place = {wnid: index for index, wnid in enumerate(wnids)}
        labels = torch.tensor([place.get(wnid, -1) for wnid in self.wnids])[self.labels]
        if not (labels >= 0).any():
            raise GradinvError("The two folders have no class in common; name two parts of one data set.")
        if unknown := sum(wnid not in place for wnid in self.wnids):
            say(f"Classes of the second folder that the first lacks are left out: {unknown}.")
        known = labels >= 0
        return _Pictures(self.features[known], labels[known], list(wnids))


def _features(model: Model, folder: ImageFolder, say: Callable[[str], None]) -> _Pictures:
    """The pooled features of the pictures in a folder's class folders. Raises GradinvError where there are none."""
    import torch

    from gradinv.gallery import Gallery
    from gradinv.types import GradinvError

    with _Bar("picture") as bar:
        gallery = Gallery.of(model, folder.root, progress=bar.to)
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
    import torch

    from gradinv.types import GradinvError

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
    progress: Callable[[int], None] | None = None,
) -> tuple[Tensor, Tensor, int]:
    """Multinomial logistic regression on features (N, D) and labels (N,): → (weight (C, D), bias (C,), passes).

    It minimises Σ cross-entropy + decay / 2 · ‖W‖² (divided by N) over z = (x − mean) / deviation by L-BFGS from zero,
    on `device`; the scaling is then folded into what is returned, which takes x itself, on the CPU. A feature that
    never changes gets no weight. The problem is convex, so there is nothing to be seeded.
    """
    import torch
    from torch.nn import functional as F

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
        if progress is not None:
            progress(passes)
        return total + penalty.item()

    optimiser.step(closure)
    with torch.no_grad():
        folded = weight * scale
        return folded.cpu(), (bias - folded @ mean).cpu(), passes


class _Bar:
    """A progress bar on the standard error, where that is a terminal, for those who report how far they are."""

    def __init__(self, unit: str, total: int | None = None) -> None:
        self._unit, self._total = unit, total

    def __enter__(self) -> Self:
        from tqdm import tqdm

        self._bar = tqdm(total=self._total, unit=self._unit, unit_scale=self._unit == "B", leave=False, disable=None)
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def to(self, count: int, total: int | None = None) -> None:
        """So much is done, of a total that may be known by now only."""
        self._bar.total = total or self._total
        self._bar.update(count - self._bar.n)
