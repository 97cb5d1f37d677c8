"""D-Softmax: the softmax loss dissected into an intra-class and an inter-class term that do not see each other.

Source: He, Wang, Li, Wang, "Softmax Dissection: Towards Understanding Intra- and Inter-class Objective for Embedding
Learning", AAAI 2020, arXiv 1908.01281. With epsilon = e^{s d}:

    intra = log(1 + epsilon / e^{z_y}) = log(1 + e^{s d - z_y})
    inter = log(1 + sum over k != y of e^{z_k}) = log(1 + e^N)

`d` is the end point: the cosine around which the pull towards the own class lets go, within about 1/s. Softmax is the
same intra term with a moving end point N / s, which falls by ln(1/r) / s when negatives are sampled at rate r; d does
not move. That is why the sampled variants work: D-Softmax-B gives the inter term to a random part of the batch,
D-Softmax-K sums it over a random part of the classes.

The paper's text beyond its abstract could not be read by us. The averaging is therefore our choice: each term is a mean
over the samples that have it; and the sampled sum is used as it is, not scaled by 1/r. Not to be confused with the
frequency-banded "D-Softmax" of Chen et al., 2016.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megaclass.objectives.objective import register


@register("d-softmax")
@dataclass(frozen=True)
class DSoftmax:
    """log(1 + e^{s d - z_y}) + log(1 + e^N), with the end point `d` as a cosine (default 0.9)."""

    end_point: float = 0.9
    needs_positive: bool = False

    def intra(self, positive: Tensor, scale: float) -> Tensor:
        """log(1 + e^{s d - z_y}), [batch]."""
        return torch.logaddexp(torch.zeros_like(positive), scale * self.end_point - positive)

    def inter(self, negative_lse: Tensor, positive: Tensor | None) -> Tensor:
        """log(1 + e^N), [m]; exactly zero where there is no negative."""
        return torch.logaddexp(torch.zeros_like(negative_lse), negative_lse)
