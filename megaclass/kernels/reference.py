"""The class layer written as plainly as possible: dense, any dtype. The specification of the other kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megaclass.kernels.row_gradient import RowGradient


def forward(
    embeddings: Tensor,
    weight: Tensor,
    rows: Tensor | None,
    labels: Tensor,
    *,
    scale: float,
    log_weight: float = 0.0,
) -> tuple[Tensor, Tensor, Callable[[Tensor], RowGradient]]:
    """Exponential sums with all logits in memory at once; see `negatives.Kernel`.

    Cost: several [m, n] matrices.
    """
    candidates = torch.arange(len(weight), device=weight.device) if rows is None else rows
    active = weight[candidates]
    length = active.norm(dim=1, keepdim=True).clamp_min(torch.finfo(active.dtype).tiny)
    unit = active / length
    exponentials = torch.exp(scale * embeddings @ unit.T + log_weight)
    exponentials = exponentials.masked_fill(labels[:, None] == candidates[None, :], 0.0)

    def row_pass(coefficients: Tensor) -> RowGradient:
        direction = scale * (coefficients[:, None] * exponentials).T @ embeddings
        tangential = direction - unit * (unit * direction).sum(dim=1, keepdim=True)
        return RowGradient(rows, tangential / length)

    return exponentials.sum(dim=1), scale * exponentials @ unit, row_pass
