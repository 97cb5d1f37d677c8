"""The gradient of some rows of a matrix, kept apart from the matrix.

A row without an entry has no gradient at all, which is not the same as a zero one: no optimizer touches it. Nothing of
the size of the whole matrix is ever made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowGradient:
    """Gradients of the rows `rows` of this rank's class weights.

    Attributes:
        rows: [n] int64, unique and sorted; None means all rows, in order.
        values: [n, dim], in the class weights' type (at least float32).
    """

    rows: Tensor | None
    values: Tensor


def merge(gradients: Sequence[RowGradient]) -> RowGradient:
    """The sum of several row gradients of one matrix: rows unique and sorted, values added where rows meet.

    Cost: one sort of the rows and one copy of the values; one gradient alone is returned as it is.
    """
    assert gradients, "nothing to merge"
    if len(gradients) == 1:
        return gradients[0]
    full = [gradient.values for gradient in gradients if gradient.rows is None]
    if full:
        total = full[0].clone()
        for values in full[1:]:
            total += values
        for gradient in gradients:
            if gradient.rows is not None:
                total.index_add_(0, gradient.rows, gradient.values)
        return RowGradient(None, total)
    rows, position = torch.unique(
        torch.cat([gradient.rows for gradient in gradients if gradient.rows is not None]), return_inverse=True
    )
    values = torch.cat([gradient.values for gradient in gradients])
    return RowGradient(
        rows,
        torch.zeros(len(rows), values.shape[1], dtype=values.dtype).to(values.device).index_add_(0, position, values),
    )
