"""Softmax cross-entropy, written with the two numbers of this package.

With a margin on the positive cosine it is CosFace or ArcFace; with sampled negatives it is Partial-FC.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megaclass.objectives.objective import register


@register("softmax")
@dataclass(frozen=True)
class Softmax:
    """-log( e^{z_y} / (e^{z_y} + e^N) ) = log(1 + e^{N - z_y}): one entangled term.

    The loss is never clamped: a true loss of 200 is reported as 200.
    """

    needs_positive: bool = True

    def intra(self, positive: Tensor, scale: float) -> Tensor:
        """Zero: softmax has no term of its own class alone."""
        return torch.zeros_like(positive)

    def inter(self, negative_lse: Tensor, positive: Tensor | None) -> Tensor:
        """log(1 + e^{N - z_y}), [m]."""
        assert positive is not None
        # Not softplus: torch's becomes linear above 20 and is off by 2e-9 there, which spoils float64 comparisons.
        return torch.logaddexp(torch.zeros_like(positive), negative_lse - positive)
