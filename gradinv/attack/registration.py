"""Registration: the affine map that lays an image on a reference, found without learned weights (Eqn 12's F).

Everything is batched, image by image independent, and stays on the device. A displacement field u, (B, 2, H, W) in
pixels, x before y, says where a pixel of the aligned image is looked up: aligned(x) = image(x + u(x)).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from gradinv.types import GradinvError

SMALLEST = 0.25
"""Pixels. A field that moves nothing further is none: resampling would blur, which alone raises PSNR."""

MARGIN, MARGINS = 0.24, (0.2, 0.6)
"""Share by which the part of the image that the reference does not explain, 1 − ρ², must fall for a warp to be kept:
MARGIN for each 64th of the side that it moves on average, within the bounds MARGINS.

Fitted to noise alone, a shift or an affine map explains up to about a tenth of it. Reconstructions differ by more than
noise: fits to them go 2 to 8 of 64 pixels far, explain up to a third, and lower PSNR. A true shift explains more the
larger it is: of 48 pictures of 64 px 47 or 48 keep one of 1 to 8 px at a noise of 0.15, and 32 to 48 at 0.3."""

LEAST_CORRELATION = 0.5
"""With less similarity than this after the warp, the image and the reference do not show the same."""

LARGEST = 0.25  # of the longer side: further displacements are taken for errors
LEAST_OVERLAP = 0.5  # of the area
LEAST_SIDE = 8  # pixels; smaller images are left alone
WORK_SIDE = 128  # larger images are scaled down to this for the search; the field is scaled up again
COARSEST_SIDE = 12  # the pyramid ends before its images get smaller

BLUR = 1.0  # pixels of each level, standard deviation: what is finer is noise more than picture
BAND = 0.12  # cycles a pixel, standard deviation of the band that phase correlation looks at
DAMPING = 1e-3  # of the Gauss-Newton steps, relative to the diagonal
ROUNDS = 4  # Gauss-Newton steps a level


@torch.no_grad()
def displacement(images: Tensor, reference: Tensor) -> Tensor:
    """The field u (B, 2, H, W), in pixels, that lays each image (B, 3, H, W) on its reference (B, 3, H, W).

    Phase correlation finds a start. From coarse to fine, Gauss-Newton then fits an affine map: it minimises the squared
    difference between the image and gain · reference + offset within their overlap, of luma, smoothed. Gain and offset
    are free, so this maximises their zero-mean normalised correlation ρ.

    An image keeps u = 0 unless 1 − ρ² within the overlap falls by MARGIN, by more the further it moves, and ρ reaches
    LEAST_CORRELATION. It also does if it moves less than SMALLEST, is not finite, or is smaller than LEAST_SIDE.
    Raises GradinvError for shapes that differ.
    """
    if images.shape != reference.shape or images.dim() != 4 or images.shape[1] != 3:
        shapes = f"{tuple(images.shape)} and {tuple(reference.shape)}"
        raise GradinvError(f"Images and reference must both have the shape (B, 3, H, W), not {shapes}.")
    height, width = images.shape[-2:]
    dtype = torch.promote_types(images.dtype, torch.float32)  # half precision is too coarse for the normal equations
    none = torch.zeros(len(images), 2, height, width, dtype=dtype, device=images.device)
    if min(height, width) < LEAST_SIDE or not len(images):
        return none
    finite = (torch.isfinite(images) & torch.isfinite(reference)).flatten(1).all(1)
    pyramid = _pyramid(*(_luma(x.to(dtype).nan_to_num(0, 0, 0)) for x in (images, reference)))
    finest = pyramid[-1]

    still = torch.zeros_like(finest.slopes)
    start = _better(finest, _phase_shift(finest)[:, :, None, None].expand_as(still), still)
    found = _better(finest, _fit(pyramid, start), start)
    found = _better(finest, found, still, _margin(found), LEAST_CORRELATION)

    if found.shape[-2:] != none.shape[-2:]:
        ratio = torch.tensor([width / found.shape[-1], height / found.shape[-2]], dtype=dtype, device=images.device)
        found = F.interpolate(found, (height, width), mode="bilinear", align_corners=False) * ratio[:, None, None]
    moves = finite & (found.square().sum(1).flatten(1).amax(1).sqrt() >= SMALLEST)
    return torch.where(moves[:, None, None, None], found, none)


@torch.no_grad()
def warp(images: Tensor, field: Tensor) -> Tensor:
    """image(x + u(x)) of images (B, 3, H, W) and fields (B, 2, H, W): bicubic, the border pixels continued beyond it.

    Bicubic because it blurs least; what it overshoots is clamped to each image's own range, channel by channel.
    Images that do not move come back exactly.
    """
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    warped = _look(images.to(field.dtype), field).to(images.dtype).clamp(low, high)
    moves = (field != 0).flatten(1).any(1)
    return torch.where(moves[:, None, None, None], warped, images)


@dataclass(frozen=True, eq=False)
class _Level:
    """One scale of the luma of the images and their references, (B, 1, h, w), smoothed, with zero mean and unit
    variance, and their slopes along x and y, (B, 2, h, w) a pixel."""

    images: Tensor
    reference: Tensor
    slopes: Tensor
    reference_slopes: Tensor

    @property
    def size(self) -> tuple[int, int]:
        return self.images.shape[-2], self.images.shape[-1]


def _luma(images: Tensor) -> Tensor:
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=images.dtype, device=images.device)
    return (images * weights[:, None, None]).sum(1, keepdim=True)


def _pyramid(images: Tensor, reference: Tensor) -> list[_Level]:
    """Coarsest first, each level twice as large as the one before."""
    height, width = images.shape[-2:]
    scale = min(1.0, WORK_SIDE / max(height, width))
    levels: list[_Level] = []
    while not levels or min(height, width) * scale >= COARSEST_SIDE:
        size = (max(1, round(height * scale)), max(1, round(width * scale)))
        both = [_standardised(_smooth(_resize(x, size))) for x in (images, reference)]
        levels.insert(0, _Level(both[0], both[1], _slopes(both[0]), _slopes(both[1])))
        scale /= 2
    return levels


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    if x.shape[-2:] == size:
        return x
    return F.interpolate(x, size, mode="bilinear", align_corners=False, antialias=True)


def _smooth(x: Tensor) -> Tensor:
    radius = round(3 * BLUR)
    offsets = torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device)
    kernel = torch.exp(-offsets.square() / (2 * BLUR**2))
    kernel = kernel / kernel.sum()
    padded = F.pad(x, (radius, radius, radius, radius), mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))


def _standardised(x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, dim=(2, 3), keepdim=True, correction=0)
    return (x - mean) / variance.sqrt().clamp(min=1e-6)


def _slopes(x: Tensor) -> Tensor:
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    across = padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]
    down = padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]
    return torch.cat([across, down], 1) / 2


def _grid(field: Tensor) -> Tensor:
    """Where a field looks, as `grid_sample` takes it: (B, H, W, 2), the outer edges of the image at −1 and 1."""
    height, width = field.shape[-2:]
    x = torch.arange(width, dtype=field.dtype, device=field.device)
    y = torch.arange(height, dtype=field.dtype, device=field.device)[:, None]
    return torch.stack([(2 * (x + field[:, 0]) + 1) / width - 1, (2 * (y + field[:, 1]) + 1) / height - 1], -1)


def _look(x: Tensor, field: Tensor) -> Tensor:
    # Bilinear would draw every shift towards half pixels, where it smooths the noise away.
    return F.grid_sample(x, _grid(field), mode="bicubic", padding_mode="border", align_corners=False)


def _overlap(field: Tensor) -> Tensor:
    """(B, 1, H, W): 1 where the field looks into the image, 0 where it looks beyond."""
    x, y = _grid(field).abs().unbind(-1)
    return ((x <= 1) & (y <= 1))[:, None].to(field.dtype)


def _correlation(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """ρ, the zero-mean normalised cross-correlation of a and b (B, 1, H, W) within the mask: (B,)."""
    weight = mask / mask.sum((2, 3), keepdim=True).clamp(min=1)
    a = a - (a * weight).sum((2, 3), keepdim=True)
    b = b - (b * weight).sum((2, 3), keepdim=True)
    variances = (a.square() * weight).sum((1, 2, 3)) * (b.square() * weight).sum((1, 2, 3))
    return (a * b * weight).sum((1, 2, 3)) / variances.sqrt().clamp(min=1e-9)


def _margin(field: Tensor) -> Tensor:
    """What each image's field (B, 2, h, w) must explain to be kept, (B,): see MARGIN."""
    distance = field.square().sum(1).flatten(1).mean(1).sqrt()  # root mean square, pixels
    return (MARGIN * 64 * distance / max(field.shape[-2:])).clamp(*MARGINS)


def _better(level: _Level, new: Tensor, old: Tensor, margin: Tensor | float = 0.0, least: float = -1.0) -> Tensor:
    """Image by image the new field where, with ρ within the overlap of both fields, 1 − ρ² falls by the share `margin`
    (B,) at least and ρ exceeds `least`, and the field is no runaway; elsewhere the old one."""
    mask = _overlap(new) * _overlap(old)
    before = _correlation(_look(level.images, old), level.reference, mask)
    after = _correlation(_look(level.images, new), level.reference, mask)
    better = (after > before) & (after > least) & (1 - after.square() < (1 - margin) * (1 - before.square()))
    near = new.flatten(1).abs().amax(1) <= LARGEST * max(level.size)
    sound = better & near & (mask.mean((1, 2, 3)) >= LEAST_OVERLAP)
    return torch.where(sound[:, None, None, None], new, old)


def _phase_shift(level: _Level) -> Tensor:
    """Pixels (B, 2), x before y: the highest peak of the phase correlation up to LARGEST away, to sub-pixels.

    A Hann window keeps the borders, which wrap around, from counting; a Gaussian band keeps out the noise.
    """
    height, width = level.size
    dtype, device = level.images.dtype, level.images.device
    # Two more, since its first and last value are 0.
    window = torch.hann_window(height + 2, periodic=False, dtype=dtype, device=device)[1:-1, None]
    window = window * torch.hann_window(width + 2, periodic=False, dtype=dtype, device=device)[1:-1]
    images, reference = (torch.fft.rfft2(x[:, 0] * window) for x in (level.images, level.reference))
    cross = images * reference.conj()
    down = torch.fft.fftfreq(height, dtype=dtype, device=device)[:, None]
    across = torch.fft.rfftfreq(width, dtype=dtype, device=device)
    band = torch.exp(-(down.square() + across.square()) / (2 * BAND**2))
    surface = torch.fft.irfft2(cross / cross.abs().clamp(min=1e-9) * band, s=(height, width))
    reach = (int(LARGEST * height), int(LARGEST * width))
    surface = surface.roll(reach, (1, 2))[:, : 2 * reach[0] + 1, : 2 * reach[1] + 1]
    peak = surface.flatten(1).argmax(1)
    rows, columns = peak // surface.shape[2], peak % surface.shape[2]
    each = torch.arange(len(peak), device=peak.device)
    x = columns - reach[1] + _vertex(surface[each, rows], columns)
    y = rows - reach[0] + _vertex(surface[each, :, columns], rows)
    return torch.stack([x, y], 1)


def _vertex(lines: Tensor, peaks: Tensor) -> Tensor:
    """Of the parabola through the peak (B,) of each line (B, N) and its neighbours: its offset from the peak."""
    inner = peaks.clamp(1, lines.shape[1] - 2)
    before, at, after = (lines.gather(1, (inner + step)[:, None])[:, 0] for step in (-1, 0, 1))
    offset = 0.5 * (before - after) / (before - 2 * at + after).clamp(max=-1e-9)
    return torch.where(inner == peaks, offset.clamp(-0.5, 0.5), 0)


def _linear(level: _Level) -> Tensor:
    """What an affine map's field is made of, 1, x and y from −1 to 1: (3, h, w)."""
    height, width = level.size
    one = torch.ones_like(level.images[0, 0])
    x = torch.linspace(-1, 1, width, dtype=one.dtype, device=one.device).expand(height, width)
    y = torch.linspace(-1, 1, height, dtype=one.dtype, device=one.device)[:, None].expand(height, width)
    return torch.stack([one, x, y])


def _fit(levels: list[_Level], field: Tensor) -> Tensor:
    """A field (B, 2, h, w) → the same plus the affine map that lays the images on their references best, found level by
    level."""
    basis = _linear(levels[-1])
    for level in levels:
        scale = basis.shape[-1] / level.size[1]
        coarse = _resize(basis[:, None], level.size)[:, 0]
        weights = _gauss_newton(level, _resize(field, level.size) / scale, coarse)
        field = field + scale * torch.einsum("bck,khw->bchw", weights, basis)
    return field


def _gauss_newton(level: _Level, start: Tensor, basis: Tensor) -> Tensor:
    """The weights (B, 2, K) of `basis` (K, h, w), in pixels of the level, that improve the field `start` (B, 2, h, w).

    Minimises the mean over the overlap of (image(x + u) − gain · reference − offset)². The slope is the mean of the
    image's and the reference's, which converges in second order and halves the noise in it. Of all rounds the weights
    of the smallest value are returned, so that no image gets worse.
    """
    count = 2 * len(basis)
    weights = start.new_zeros(len(start), 2, len(basis))
    best, smallest = weights, start.new_full((len(start),), torch.inf)
    everything = torch.cat([level.images, level.slopes], 1)
    for turn in range(ROUNDS + 1):
        field = start + torch.einsum("bck,khw->bchw", weights, basis)
        seen = _look(everything, field)
        mask = _overlap(field)
        mask = mask / mask.sum((2, 3), keepdim=True).clamp(min=1)
        image = seen[:, :1] - (seen[:, :1] * mask).sum((2, 3), keepdim=True)
        reference = level.reference - (level.reference * mask).sum((2, 3), keepdim=True)
        variance = (reference.square() * mask).sum((2, 3), keepdim=True).clamp(min=1e-6)
        gain = (image * reference * mask).sum((2, 3), keepdim=True) / variance
        difference = image - gain * reference

        # Relative to the variance of what is seen, or an image would be moved to where it is flat.
        spread = (image.square() * mask).sum((1, 2, 3)).clamp(min=1e-6)
        value = (difference.square() * mask).sum((1, 2, 3)) / spread
        enough = (mask > 0).to(value).mean((1, 2, 3)) >= LEAST_OVERLAP
        improved = enough & (gain[:, 0, 0, 0] > 0) & (value < smallest)
        smallest = torch.where(improved, value, smallest)
        best = torch.where(improved[:, None, None], weights, best)
        if turn == ROUNDS:
            break

        slopes = (seen[:, 1:] + gain * level.reference_slopes) / 2
        directions = (slopes[:, :, None] * basis).flatten(1, 2)
        columns = torch.cat([directions, reference, torch.ones_like(reference)], 1).flatten(2)
        weighted = columns * mask.flatten(2)
        normal = weighted @ columns.transpose(1, 2)
        right = -(weighted @ difference.flatten(2).transpose(1, 2))[..., 0]
        normal = normal + torch.diag_embed(DAMPING * normal.diagonal(dim1=1, dim2=2) + 1e-6)
        # solve_ex, which does not raise where one image is beyond all numbers: its weights become NaN and are not kept.
        step, _ = torch.linalg.solve_ex(normal, right[..., None])
        weights = weights + step[:, :count, 0].view_as(weights)
    return best
