"""How close reconstructions come to the originals. Only the evaluation calls this: the attack never sees an original.

Everything here takes pixels in [0, 1] of shape (B, 3, H, W) and answers one value an image.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import math
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
import torchvision
from scipy.optimize import linear_sum_assignment
from skimage.metrics import structural_similarity
from torch import Tensor, nn
from torch.nn import functional as F

from gradinv.types import GradinvError

SSIM_WINDOW = 7  # pixels a side of the uniform window
LPIPS_LEAST = 31  # pixels a side that AlexNet's layers need


def psnr(images: Tensor, originals: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, 10·log10(1 / mean squared error), per image: (B,) float64.

    The error is averaged within an image only. It is infinite where an image equals its original.
    """
    a, b = _together(images, originals)
    return -10 * (a - b).square().mean(dim=(1, 2, 3)).log10()


def ssim(images: Tensor, originals: Tensor) -> Tensor:
    """Structural similarity in [−1, 1], per image: (B,) float64.

    scikit-image's, with a uniform 7 × 7 window and a data range of 1, averaged over the three channels.
    Raises GradinvError for images smaller than the window.
    """
    pairs = zip(*(x.numpy() for x in _together(images, originals)), strict=True)
    if min(images.shape[-2:]) < SSIM_WINDOW:
        raise GradinvError(f"SSIM needs images of at least {SSIM_WINDOW} × {SSIM_WINDOW} pixels.")
    values = [structural_similarity(a, b, win_size=SSIM_WINDOW, data_range=1, channel_axis=0) for a, b in pairs]
    return torch.tensor(values, dtype=torch.float64)


def fft2d(images: Tensor, originals: Tensor) -> Tensor:
    """Distance of the 2-D Fourier magnitudes in [0, 1], insensitive to translation, per image: (B,) float64.

    (1/3) Σ_c ( (1/HW) Σ_{u,v} (|F x_c|(u, v) − |F y_c|(u, v))² )^½ with the orthonormal transform F: the root mean
    square difference, averaged over the channels. The paper reports an "FFT2D" without a definition; this one is ours.
    It is 0 for images that are circular shifts of each other, at most the root mean square error of the pixels in each
    channel, and does not depend on the size: the same picture tiled has the same distance.
    """
    a, b = (torch.fft.fft2(x, norm="ortho").abs() for x in _together(images, originals))
    return (a - b).square().mean(dim=(2, 3)).sqrt().mean(dim=1)


def lpips(images: Tensor, originals: Tensor) -> Tensor:
    """Learned perceptual distance (Zhang et al. 2018), smaller is nearer, per image: (B,) float64.

    Version 0.1 on AlexNet, the default of the package `lpips` (the paper does not name its network). Raises
    GradinvError where the package is not installed, AlexNet's weights (233 MB, downloaded on first use) cannot be had,
    or images are smaller than 31 px.
    """
    pairs = zip(*(x.float() for x in _together(images, originals)), strict=True)
    if min(images.shape[-2:]) < LPIPS_LEAST:
        raise GradinvError(f"LPIPS needs images of at least {LPIPS_LEAST} × {LPIPS_LEAST} pixels.")
    network = _lpips_network()
    if isinstance(network, GradinvError):
        # Not itself: each time it was raised, what is kept would hold the frames of who asked, with their networks.
        raise GradinvError(str(network))
    with torch.no_grad():
        return torch.cat([network(a[None], b[None], normalize=True).flatten() for a, b in pairs]).double()


def lpips_absent(side: int) -> str:
    """What stands beside an LPIPS that is None, of images of so many pixels a side: the first of its needs that fails
    here."""
    if side < LPIPS_LEAST:
        need = f"images of at least {LPIPS_LEAST} px"
    elif importlib.util.find_spec("lpips") is None:
        need = "the package lpips, which pip install 'gradinv[metrics]' brings"
    else:
        need = "AlexNet's weights, which are downloaded on first use"
    return f"LPIPS was not measured: it needs {need}."


@cache
def _lpips_network() -> nn.Module | GradinvError:
    """The network, or why it cannot be had: what was not there is not looked for once more by this process."""
    try:
        package: Any = importlib.import_module("lpips")
    except ImportError:
        return GradinvError("LPIPS needs the package lpips; install it with pip install 'gradinv[metrics]'.")
    weights = torchvision.models.AlexNet_Weights.IMAGENET1K_V1
    try:
        # The download is announced on the output, where it does not belong.
        with contextlib.redirect_stdout(sys.stderr if sys.stderr.isatty() else io.StringIO()):
            state = weights.get_state_dict(progress=sys.stderr.isatty(), check_hash=True)
    except Exception as error:  # of the network, the disk, and a dozen types for a file that is damaged
        reason = " ".join(str(error).split())
        return GradinvError(
            f"AlexNet's weights for LPIPS could not be downloaded or read ({reason}); put the published "
            f"{weights.url.rsplit('/', 1)[-1]} into {torch.hub.get_dir()}/checkpoints."
        )
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # the package calls torchvision as that was called years ago
        network: nn.Module = package.LPIPS(net="alex", pnet_rand=True, verbose=False)
    # By hand, because the package would download without a check. Its five slices number the layers as AlexNet does.
    slices: nn.Module = network.get_submodule("net")
    slices.load_state_dict({name: state[f"features.{name.split('.', 1)[1]}"] for name in slices.state_dict()})
    return network.eval()


def labels_right(restored: Iterable[int] | Mapping[int, int], true: Iterable[int] | Mapping[int, int]) -> int:
    """How many labels were restored, each as often as it is there; labels, or how often there is each."""
    return (Counter(restored) & Counter(true)).total()


def constant_colour(originals: Tensor) -> Tensor:
    """The baseline: each original's mean colour everywhere, (B, 3, H, W). No constant colour has a higher PSNR."""
    return originals.mean(dim=(2, 3), keepdim=True).expand_as(originals).clone()


MEASURES = {"psnr": psnr, "ssim": ssim, "fft2d": fft2d, "lpips": lpips}


def measure(images: Tensor, originals: Tensor, names: Sequence[str] = tuple(MEASURES)) -> dict[str, list[float | None]]:
    """The named metrics per image as JSON can hold them: `{"psnr": […], "ssim": […], "fft2d": […], "lpips": […]}`.

    What is not a finite number is None: the PSNR of identical images is infinite, that of diverged ones undefined. So
    is an LPIPS that cannot be had (`lpips_absent` says why).
    """
    values = {name: MEASURES[name](images, originals) for name in names if name != "lpips"}
    if "lpips" in names:
        try:
            values["lpips"] = lpips(images, originals)
        except GradinvError:
            values["lpips"] = torch.full((len(images),), math.nan)
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
    images, originals = _together(images, originals)
    if not len(restored) == len(labels) == len(images):
        raise GradinvError(
            f"{len(images)} images need as many restored and true labels, not {len(restored)} and {len(labels)}."
        )
    found = torch.full((len(labels),), -1, dtype=torch.int64)

    def assign(rows: list[int], columns: list[int]) -> None:
        """The cheapest assignment of originals to images, as many as there are."""
        if not rows or not columns:
            return
        distances = [(images[columns] - originals[row]).square().mean(dim=(1, 2, 3)) for row in rows]
        # A diverged image is as far as can be; the solver refuses NaN.
        cost = torch.stack(distances).nan_to_num(nan=1e9, posinf=1e9).numpy()
        for row, column in zip(*linear_sum_assignment(cost), strict=True):
            found[rows[row]] = columns[column]

    for label in set(labels):
        assign([k for k, y in enumerate(labels) if y == label], [k for k, y in enumerate(restored) if y == label])
    taken = set(found.tolist())
    assign((found < 0).nonzero().flatten().tolist(), [k for k in range(len(restored)) if k not in taken])
    return found


def aligned(found: Tensor, true: Tensor) -> tuple[list[int], list[float]]:
    """What was recovered of each image, features or activations (B, …), against the images' own in another order: for
    each image which of the recovered is its, one to one so that the cosine similarities are largest in all, and that
    similarity."""
    similarity = F.normalize(true.cpu().flatten(1)) @ F.normalize(found.cpu().flatten(1)).T
    _, order = linear_sum_assignment(similarity.numpy(), maximize=True)
    return order.tolist(), similarity[range(len(order)), order.tolist()].tolist()


def _together(images: Tensor, originals: Tensor) -> tuple[Tensor, Tensor]:
    """Both as float64 on the CPU. Raises GradinvError where they cannot be compared one to one."""
    if images.shape != originals.shape or images.ndim != 4 or images.shape[1] != 3:
        raise GradinvError(
            f"Images are compared one to one as (B, 3, H, W), not {tuple(images.shape)} with {tuple(originals.shape)}."
        )
    return images.detach().cpu().double(), originals.detach().cpu().double()
