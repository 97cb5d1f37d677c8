"""The seam of the class layer: two functions over one shard's rows, and the choice of who implements them.

Forward takes unit embeddings and this rank's class weights and gives, per sample, the sum of what its negatives
contribute (`terms.py`) and the gradient of that sum in the embedding. Both are partial: they are summed over shards.
Nothing of shape [batch, rows] needs to be kept. Backward (`row_pass`), once the loss's derivative in each sum is known,
gives the gradient of the class-weight rows; it is a call of its own so that the embedding gradient can travel
meanwhile.

Cosine logits are bounded by the scale, so exponentials are summed without a shift and without a maximum wherever
float32 can hold the sum (`presets.check_exponents`); where it cannot, the sum is relative to each sample's maximum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from megaclass.kernels import chunked, reference
from megaclass.kernels.interface import Candidates, Negatives, RowBlock
from megaclass.kernels.memory import Memory
from megaclass.kernels.terms import Exponential, Summed, Term

__all__ = [
    "FUSED",
    "KERNELS",
    "Candidates",
    "Exponential",
    "Kernel",
    "Negatives",
    "RowBlock",
    "Summed",
    "Term",
    "forward",
]


class Kernel(Protocol):
    """One implementation of the forward pass.

    Args of the call:
        embeddings: [m, dim], float32 or float64; of unit length unless the term uses the maximum.
        candidates: the negatives.
        labels: [m] int64 local class of each sample, -1 elsewhere; the own class is left out of the sum.
        term: what a negative contributes.
        monitor: whether to fill in `Negatives.monitor`.
        memory: for what is large and not needed after the second pass; default: new memory.
    """

    def __call__(
        self,
        embeddings: Tensor,
        candidates: Candidates,
        labels: Tensor,
        term: Term,
        *,
        monitor: bool = False,
        memory: Memory | None = None,
    ) -> Negatives:
        """Give the sums, their gradient and the second pass."""
        ...


def _triton(
    embeddings: Tensor,
    candidates: Candidates,
    labels: Tensor,
    term: Term,
    *,
    monitor: bool = False,
    memory: Memory | None = None,
) -> Negatives:
    """The fused kernels, whose library is imported only here."""
    try:
        from megaclass.kernels import triton
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise ValueError(
            "kernel triton needs the package triton; pip install 'megaclass[triton]', or use classifier.kernel chunked"
        ) from None
    return triton.forward(embeddings, candidates, labels, term, monitor=monitor, memory=memory)


KERNELS: dict[str, Kernel] = {"reference": reference.forward, "chunked": chunked.forward}
FUSED: dict[str, Kernel] = {"triton": _triton}


def forward(
    embeddings: Tensor,
    candidates: Candidates,
    labels: Tensor,
    term: Term,
    *,
    monitor: bool = False,
    memory: Memory | None = None,
    kernel: str = "auto",
) -> Negatives:
    """Sums over this shard's negatives, by the chosen kernel; arguments as in `Kernel`.

    `auto` takes the chunked one, whose memory does not grow with batch times classes. Cost: 4 m n dim multiply-adds
    here and 2 (or, recomputing, 4) m n dim in `row_pass`.
    """
    chosen: Callable[..., Negatives] = (KERNELS | FUSED)["chunked" if kernel == "auto" else kernel]
    return chosen(embeddings, candidates, labels, term, monitor=monitor, memory=memory)
