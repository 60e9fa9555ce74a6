"""How close reconstructions come to the originals. Only the evaluation calls this: the attack never sees an original.

Everything here takes pixels in [0, 1] of shape (B, 3, H, W) and answers one number an image.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from skimage.metrics import structural_similarity
from torch import Tensor

from gradinv.types import GradinvError

SSIM_WINDOW = 7  # pixels a side of the uniform window


def psnr(images: Tensor, originals: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, 10·log10(1 / mean squared error), per image: (B,) float64.

    The error is averaged within an image only. It is infinite where an image equals its original.
    """
    _same_shape(images, originals)
    error = (images.detach().cpu().double() - originals.detach().cpu().double()).square().mean(dim=(1, 2, 3))
    return -10 * error.log10()


def ssim(images: Tensor, originals: Tensor) -> Tensor:
    """Structural similarity in [−1, 1], per image: (B,) float64.

    scikit-image's, with a uniform 7 × 7 window and a data range of 1, averaged over the three channels.
    Raises GradinvError for images smaller than the window.
    """
    _same_shape(images, originals)
    if min(images.shape[-2:]) < SSIM_WINDOW:
        raise GradinvError(f"SSIM needs images of at least {SSIM_WINDOW} × {SSIM_WINDOW} pixels.")
    pairs = zip(images.detach().cpu().double().numpy(), originals.detach().cpu().double().numpy(), strict=True)
    return torch.tensor(
        [structural_similarity(a, b, win_size=SSIM_WINDOW, data_range=1, channel_axis=0) for a, b in pairs],
        dtype=torch.float64,
    )


def constant_colour(originals: Tensor) -> Tensor:
    """The baseline: each original's mean colour everywhere, (B, 3, H, W). No constant colour has a higher PSNR."""
    return originals.mean(dim=(2, 3), keepdim=True).expand_as(originals).clone()


def measure(images: Tensor, originals: Tensor) -> dict[str, list[float | None]]:
    """PSNR and SSIM per image as JSON can hold them: `{"psnr": […], "ssim": […]}`.

    What is not a finite number is None: the PSNR of identical images is infinite, that of diverged ones undefined.
    """
    values = {"psnr": psnr(images, originals), "ssim": ssim(images, originals)}
    return {name: [x if math.isfinite(x) else None for x in column.tolist()] for name, column in values.items()}


def mean(values: Sequence[float | None]) -> float | None:
    """The mean, or None where a value is missing: what is left out of a mean would pass unnoticed."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def columns(measured: Mapping[str, Any]) -> list[list[float | None]]:
    """The metrics of run.json as a table's six columns of one number an image.

    PSNR, then SSIM: each of the seeds on average, of the consensus, and of the constant colours.
    """
    table: list[list[float | None]] = []
    for name in ("psnr", "ssim"):
        seeds = [mean(values) for values in zip(*(seed[name] for seed in measured["seeds"]), strict=True)]
        table += [seeds, measured["consensus"][name], measured["baseline"][name]]
    return table


def pair(images: Tensor, restored: Sequence[int], originals: Tensor, labels: Sequence[int]) -> Tensor:
    """For each original the index of its reconstruction: a permutation (B,) int64, `images[pair(…)]` follows them.

    Reconstructions come back in no particular order. An original is paired with a reconstruction whose restored label
    is its own. Distance decides only where labels do not: by optimal assignment on the mean squared error among the
    images that share a label, and then among those that no label has paired (wrongly restored ones). Pairing all by
    distance would permute blurred reconstructions and misreport them.
    """
    _same_shape(images, originals)
    if not len(restored) == len(labels) == len(images):
        raise GradinvError(
            f"{len(images)} images need as many restored and true labels, not {len(restored)} and {len(labels)}."
        )
    found = torch.full((len(labels),), -1, dtype=torch.int64)
    for label in Counter(labels):
        _assign(
            found,
            [k for k, y in enumerate(labels) if y == label],
            [k for k, y in enumerate(restored) if y == label],
            images,
            originals,
        )
    taken = set(found.tolist())
    _assign(
        found,
        [k for k, index in enumerate(found.tolist()) if index < 0],
        [k for k in range(len(restored)) if k not in taken],
        images,
        originals,
    )
    return found


def _assign(found: Tensor, rows: list[int], columns: list[int], images: Tensor, originals: Tensor) -> None:
    """Write into `found` the cheapest assignment of originals `rows` to images `columns`, as many as there are."""
    if not rows or not columns:
        return
    distances = torch.stack(
        [(images[columns] - originals[row]).double().square().mean(dim=(1, 2, 3)).cpu() for row in rows]
    )
    # A diverged image is as far as can be; the solver refuses NaN.
    cost = distances.nan_to_num(nan=1e9, posinf=1e9).numpy()
    for row, column in zip(*linear_sum_assignment(cost), strict=True):
        found[rows[row]] = columns[column]


def _same_shape(images: Tensor, originals: Tensor) -> None:
    if images.shape != originals.shape or images.ndim != 4 or images.shape[1] != 3:
        raise GradinvError(
            f"Images are compared one to one as (B, 3, H, W), not {tuple(images.shape)} with {tuple(originals.shape)}."
        )
