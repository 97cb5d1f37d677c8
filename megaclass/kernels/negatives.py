"""The seam of the class layer: two functions over one shard's rows, and the choice of who implements them.

Forward takes unit embeddings and this rank's class weights and gives, per sample, the sum of the exponentials of its
negative logits and the gradient of that sum in the embedding. Both are partial: they are summed over shards. Nothing
of shape [batch, rows] needs to be kept. Backward (`row_pass`), once the loss's derivative in each sum is known, gives
the gradient of the class-weight rows; it is a call of its own so that the embedding gradient can travel meanwhile.

Cosine logits are bounded by the scale, so the exponentials are summed without a shift and without a maximum; whoever
chooses the scale checks that float32 can hold the sum (`objectives.presets.check_exponents`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megaclass.kernels import chunked, reference
from megaclass.kernels.row_gradient import RowGradient


@dataclass(frozen=True)
class Negatives:
    """What the forward pass over one shard's negatives gives.

    Attributes:
        exp_sum: [m], sum over this shard's negatives of e^{s cos + log_weight}; partial: sum over shards.
        embedding_gradient: [m, dim], gradient of `exp_sum` in each unit embedding; partial: sum over shards.
        row_pass: [m] derivatives of the loss in each (complete) sum -> gradient of the rows; may be called once.
    """

    exp_sum: Tensor
    embedding_gradient: Tensor
    row_pass: Callable[[Tensor], RowGradient]


class Kernel(Protocol):
    """One implementation of the forward pass.

    Args of the call:
        embeddings: [m, dim], unit length, float32 or float64.
        weight: [shard rows, dim], this rank's class weights, of any length; normalised inside.
        rows: [n] int64 unique local rows that are negative candidates, or None for all of them.
        labels: [m] int64 local row of each sample's own class, -1 elsewhere; the own class is left out of the sum.
        scale: multiplier of the cosines.
        log_weight: added to every logit, as a correction of the sampling.
    """

    def __call__(
        self,
        embeddings: Tensor,
        weight: Tensor,
        rows: Tensor | None,
        labels: Tensor,
        *,
        scale: float,
        log_weight: float = 0.0,
    ) -> tuple[Tensor, Tensor, Callable[[Tensor], RowGradient]]:
        """Give `exp_sum`, `embedding_gradient` and `row_pass` of `Negatives`."""
        ...


KERNELS: dict[str, Kernel] = {"reference": reference.forward, "chunked": chunked.forward}


def forward(
    embeddings: Tensor,
    weight: Tensor,
    rows: Tensor | None,
    labels: Tensor,
    *,
    scale: float,
    log_weight: float = 0.0,
    kernel: str = "auto",
) -> Negatives:
    """Exponential sums over this shard's negatives, by the chosen kernel; arguments as in `Kernel`.

    `auto` takes the chunked one, whose memory does not grow with batch times classes. Cost: 4 m n dim multiply-adds
    here and 2 (or, recomputing, 4) m n dim in `row_pass`.
    """
    chosen = KERNELS["chunked" if kernel == "auto" else kernel]
    return Negatives(*chosen(embeddings, weight, rows, labels, scale=scale, log_weight=log_weight))
