"""The class layer chunk by chunk over classes, in plain torch, for CPU and GPU.

Chunks run over classes and never over the batch: the batch is small, the classes are many, and a chunk of classes is
touched once per pass. No logits matrix and no second copy of the rows ever exists; the exponentials are kept between
the two passes only where they are small (`KEEP_BYTES`), and are computed again otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from megaclass.kernels.row_gradient import RowGradient

# About 2,048 rows keep a chunk's logits and rows in the second- and third-level cache of a CPU core.
CHUNK_ROWS = 2048
# Exponentials up to this size are kept for the second pass rather than computed again: one third of its work.
KEEP_BYTES = 256 * 2**20


def forward(
    embeddings: Tensor,
    weight: Tensor,
    rows: Tensor | None,
    labels: Tensor,
    *,
    scale: float,
    log_weight: float = 0.0,
) -> tuple[Tensor, Tensor, Callable[[Tensor], RowGradient]]:
    """Exponential sums accumulated over chunks of classes; see `negatives.Kernel`.

    Cost: [m, CHUNK_ROWS] logits and [CHUNK_ROWS, dim] rows at a time, and [m, n] exponentials if they fit KEEP_BYTES.
    """
    num_rows = len(weight) if rows is None else len(rows)
    keep = len(embeddings) * num_rows * embeddings.element_size() <= KEEP_BYTES
    exp_sum = embeddings.new_zeros(len(embeddings))
    gradient = torch.zeros_like(embeddings)
    kept: list[Tensor] = []
    for start, stop in _chunks(num_rows):
        unit, _ = _unit_rows(weight, rows, start, stop)
        exponentials = _exponentials(embeddings, unit, rows, labels, start, stop, scale, log_weight)
        exp_sum += exponentials.sum(dim=1)
        gradient.addmm_(exponentials, unit, alpha=scale)
        if keep:
            kept.append(exponentials)

    def row_pass(coefficients: Tensor) -> RowGradient:
        values = embeddings.new_empty(num_rows, embeddings.shape[1])
        weighted = embeddings * (scale * coefficients)[:, None]
        for number, (start, stop) in enumerate(_chunks(num_rows)):
            unit, length = _unit_rows(weight, rows, start, stop)
            if keep:
                exponentials = kept[number]
            else:
                exponentials = _exponentials(embeddings, unit, rows, labels, start, stop, scale, log_weight)
            direction = torch.mm(exponentials.T, weighted, out=values[start:stop])
            # Only the part across the row counts: its length is normalised away.
            radial = torch.linalg.vecdot(unit, direction)[:, None]
            direction.sub_(unit.mul_(radial)).div_(length)
        kept.clear()
        return RowGradient(rows, values)

    return exp_sum, gradient, row_pass


def _chunks(num_rows: int) -> Iterator[tuple[int, int]]:
    for start in range(0, num_rows, CHUNK_ROWS):
        yield start, min(start + CHUNK_ROWS, num_rows)


def _unit_rows(weight: Tensor, rows: Tensor | None, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Rows [chunk, dim] brought to unit length, and their lengths [chunk, 1]."""
    chunk = weight[start:stop] if rows is None else weight.index_select(0, rows[start:stop])
    length = torch.linalg.vector_norm(chunk, dim=1, keepdim=True).clamp_min(torch.finfo(chunk.dtype).tiny)
    return chunk / length, length


def _exponentials(
    embeddings: Tensor,
    unit: Tensor,
    rows: Tensor | None,
    labels: Tensor,
    start: int,
    stop: int,
    scale: float,
    log_weight: float,
) -> Tensor:
    """e^{s cos + log_weight} of every sample and every row of one chunk, [m, chunk]; zero at a sample's own class."""
    logits = embeddings @ unit.T
    exponentials = logits.mul_(scale).add_(log_weight).exp_() if log_weight else logits.mul_(scale).exp_()
    candidates = torch.arange(start, stop, device=labels.device) if rows is None else rows[start:stop]
    # A sample's own class stands in at most one column. Looking it up costs a search in the chunk's sorted rows
    # instead of a comparison of every sample with every row; samples without one write to column 0 what is there.
    column = torch.searchsorted(candidates, labels).clamp_max_(stop - start - 1)
    is_own = candidates[column] == labels
    column = torch.where(is_own, column, 0)[:, None]
    return exponentials.scatter_(1, column, exponentials.gather(1, column).masked_fill_(is_own[:, None], 0.0))
