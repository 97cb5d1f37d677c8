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

    A gradient of all rows is summed into in place, as nothing else of its size should exist; the arguments are used up.
    Cost: one sort of the rows and one copy of the values; one gradient alone is returned as it is.
    """
    assert gradients, "nothing to merge"
    if len(gradients) == 1:
        return gradients[0]
    full = [gradient.values for gradient in gradients if gradient.rows is None]
    partial = [(gradient.rows, gradient.values) for gradient in gradients if gradient.rows is not None]
    if full:
        total = full[0]
        for values in full[1:]:
            total += values
        for rows, values in partial:
            total.index_add_(0, rows, values)
        return RowGradient(None, total)
    rows, position = torch.unique(torch.cat([rows for rows, _ in partial]), return_inverse=True)
    values = torch.cat([values for _, values in partial])
    return RowGradient(rows, values.new_zeros(len(rows), values.shape[1]).index_add_(0, position, values))
