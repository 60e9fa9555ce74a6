"""What one evaluation of the network gives: the terms of the objective take nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Everything that one forward and backward pass over the current images gives; all of it differentiable.

    `images` are normalised (B, 3, S, S); `values` what the network makes of each image, by name (B, …): pre-activations
    of nodes, or of the whole network its pooled features and its logits; `gradients` those of the matched parameters;
    `means` and `variances` of each BN layer's input, (C,) each. `group` is the consensus of all seeds that they are
    drawn to, not differentiated, in the images' shape.
    """

    images: Tensor
    group: Tensor
    values: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]
    means: Mapping[str, Tensor]
    variances: Mapping[str, Tensor]
