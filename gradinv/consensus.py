"""The group: what several independent reconstructions agree on."""

from __future__ import annotations

from torch import Tensor


def consensus(seeds: Tensor, registration: str = "lazy") -> Tensor:
    """The lazy mean over the seeds: (G, B, 3, H, W) → (B, 3, H, W) in the same space (Eqn 12 without registration)."""
    return seeds.mean(0)
