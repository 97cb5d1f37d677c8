"""The gradient of some rows of a matrix, kept apart from the matrix.

A row without an entry has no gradient at all, which is not the same as a zero one: no optimizer touches it. Nothing of
the size of the whole matrix is ever made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megaclass.kernels.interface import RowBlock, RowBlocks
from megaclass.kernels.memory import Memory


@dataclass(frozen=True)
class RowGradient:
    """Gradients of the rows `rows` of this rank's class weights.

    Attributes:
        rows: [n] int64, unique; None means all rows, in order.
        values: [n, dim], float32 (float64 for float64 rows).
    """

    rows: Tensor | None
    values: Tensor


# Candidates' blocks, which rows they are (None: all), the samples' own rows -> the rows are updated.
RowUpdate = Callable[[Iterator[RowBlock], Tensor | None, RowGradient], None]


def collect(blocks: RowBlocks, rows: Tensor | None, num_rows: int, own: RowGradient, memory: Memory) -> RowGradient:
    """The gradient of the candidates' rows and that of the samples' own rows as one.

    Args:
        blocks: the gradient of the candidates' rows, as the kernel makes it in memory it is given.
        rows: [n] which rows those are, sorted; None: all `num_rows`.
        num_rows: rows of the shard.
        own: gradients of the samples' own rows; its rows are given and sorted.
        memory: in which the values are to stand.

    Cost: one buffer [n (+ own rows that are no candidates), dim], filled block by block.
    """
    assert own.rows is not None
    dim = own.values.shape[1]
    if rows is None:
        values = memory.piece("row gradient", num_rows, dim, own.values)
        for _ in blocks(values):
            pass
        return RowGradient(None, values.index_add_(0, own.rows, own.values))
    position, is_candidate = found(own.rows, rows)
    alone = (~is_candidate).nonzero()[:, 0]
    values = memory.piece("row gradient", len(rows) + len(alone), dim, own.values)
    for _ in blocks(values[: len(rows)]):
        pass
    values[len(rows) :] = own.values[alone]
    together = is_candidate.nonzero()[:, 0]
    values.index_add_(0, position[together], own.values[together])
    return RowGradient(torch.cat([rows, own.rows[alone]]), values)


def found(wanted: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Where each of `wanted` [k] stands in sorted `rows` [n] (a place to read without fault), and whether it does."""
    if len(rows) == 0:
        return torch.zeros_like(wanted), torch.zeros_like(wanted, dtype=torch.bool)
    position = torch.searchsorted(rows, wanted).clamp_max_(len(rows) - 1)
    return position, rows[position] == wanted


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
