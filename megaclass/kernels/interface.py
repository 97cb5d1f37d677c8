"""What goes into a kernel and what comes out: `Candidates`, `Negatives`, `RowBlock`.

Separate so that the kernels and the seam that chooses among them can both import it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Candidates:
    """The negatives of one shard: which of its classes, and how much each counts.

    Attributes:
        weight: [classes * rows_per_class, dim], this rank's class weights, of any length; normalised inside. bfloat16
            rows are multiplied with embeddings rounded to bfloat16, and summed in float32.
        rows: [n] int64 unique and sorted local classes that are negative candidates, or None for all of them.
        log_weight: [n] or a number: ln of what each contribution is multiplied by, as a correction of the sampling.
        rows_per_class: sub-centres; the one with the largest cosine stands for its class.
    """

    weight: Tensor
    rows: Tensor | None = None
    log_weight: float | Tensor = 0.0
    rows_per_class: int = 1

    @property
    def num_classes(self) -> int:
        """Number of candidate classes n."""
        return len(self.weight) // self.rows_per_class if self.rows is None else len(self.rows)

    @property
    def weight_rows(self) -> Tensor | None:
        """The rows of `weight` the candidates stand for, [n * rows_per_class] int64, sorted; None for all of them."""
        return None if self.rows is None else rows_of(self.rows, self.rows_per_class)


def rows_of(classes: Tensor, rows_per_class: int) -> Tensor:
    """The rows [n * rows_per_class] of local classes [n]: a class's rows lie next to each other."""
    if rows_per_class == 1:
        return classes
    return (classes[:, None] * rows_per_class + torch.arange(rows_per_class, device=classes.device)).flatten()


@dataclass(frozen=True)
class Monitor:
    """The cosines of this shard's negatives in three numbers, scalars on the device; partial.

    Attributes:
        cosine_sum: over all pairs of a sample and one of its negatives here (a sub-centre class counts once).
        num_pairs: number of those pairs.
        cosine_max: the largest; minus infinity where there is none.
    """

    cosine_sum: Tensor
    num_pairs: Tensor
    cosine_max: Tensor


@dataclass(frozen=True)
class RowBlock:
    """The gradient of some of the candidates' rows.

    Attributes:
        start, stop: which of the rows that the candidates stand for (positions in `Candidates.weight_rows`).
        values: [stop - start, dim], float32 (float64 for float64 rows); valid until the next block is asked for, unless
            they stand in memory that was given for all.
        rows: [stop - start, dim], the rows themselves in the type of `values`, if the kernel has them at hand: a view
            of the class weights where those are all candidates and of that type, else a copy that may be written to.
    """

    start: int
    stop: int
    values: Tensor
    rows: Tensor | None = None


# Memory for the gradient of all rows or None -> that gradient, block by block.
RowBlocks = Callable[[Tensor | None], Iterator[RowBlock]]


class RowPass(Protocol):
    """The second pass over the candidates, once the loss is known."""

    def __call__(self, coefficients: Tensor, out: Tensor | None = None) -> Iterator[RowBlock]:
        """The gradient of the candidates' rows, block by block in rising order; may be called once.

        Args:
            coefficients: [m] derivative of the loss in each `Negatives.total`.
            out: memory [rows, dim] in which the blocks are to stand; None: a block's memory is the next one's too.
        """
        ...


@dataclass(frozen=True)
class Negatives:
    """What the forward pass over one shard's negatives gives.

    Attributes:
        total: [m], sum over this shard's negatives of what each contributes, divided by e^{maximum} where there is
            one; partial: sum over shards (after bringing the maxima together).
        embedding_gradient: [m, dim], gradient of `total` in each embedding; partial: sum over shards.
        row_pass: the second pass.
        maximum: [m], this shard's largest exponent of each sample, for a term that uses it; minus infinity where there
            is no negative.
        bias_derivative: [m], derivative of `total` in the learned bias, for a term that has one; partial.
        monitor: if it was asked for.
    """

    total: Tensor
    embedding_gradient: Tensor
    row_pass: RowPass
    maximum: Tensor | None = None
    bias_derivative: Tensor | None = None
    monitor: Monitor | None = None
