"""The group: what several independent reconstructions agree on."""

from __future__ import annotations

from torch import Tensor

from gradinv.attack.registration import displacement, warp
from gradinv.execution.distributed import ALONE, Ranks
from gradinv.types import GradinvError


def consensus(seeds: Tensor, registration: str = "lazy", *, count: int | None = None, ranks: Ranks = ALONE) -> Tensor:
    """The mean over the seeds, registered or lazy: (G, B, 3, H, W) → (B, 3, H, W) in the same space (Eqn 12).

    E = (1 / G) Σ_g F(x̂_g). F is the identity (`lazy`), or warps an image onto the group's mean by an `affine` map.
    The displacement is measured from the mean of the other seeds: in the mean of all, an image would find its own
    ghost, at no displacement. The mean of all lies (G − 1) / G of the way there, and so far an image moves.
    Each of several ranks gives its own seeds, of `count` in all, and gets the mean of all, by all-reduce: once for a
    lazy mean, twice for a registered one, since each rank warps its own seeds alone.
    Raises GradinvError for another registration.
    """
    if registration not in ("lazy", "affine"):
        raise GradinvError(f"There is no registration {registration!r}; take lazy or affine.")
    count = len(seeds) if count is None else count
    if registration == "affine" and count > 1:
        others = (ranks.sum(seeds) - seeds) / (count - 1)
        images = seeds.flatten(0, 1)
        field = displacement(images, others.flatten(0, 1)) * ((count - 1) / count)
        seeds = warp(images, field).view_as(seeds)
    return seeds.mean(0) if ranks.count == 1 else ranks.sum(seeds) / count
