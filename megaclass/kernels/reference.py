"""The class layer written as plainly as possible: dense, any dtype. The specification of the other kernels."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megaclass.kernels.interface import Candidates, Monitor, Negatives, RowBlock
from megaclass.kernels.memory import Memory
from megaclass.kernels.terms import Exponential, Term


def forward(
    embeddings: Tensor,
    candidates: Candidates,
    labels: Tensor,
    term: Term,
    *,
    monitor: bool = False,
    memory: Memory | None = None,
) -> Negatives:
    """Sums with all logits in memory at once; see `negatives.Kernel`.

    Cost: several [m, n] matrices.
    """
    weight, per_class = candidates.weight, candidates.rows_per_class
    rows = candidates.weight_rows
    active = (weight if rows is None else weight[rows]).to(embeddings.dtype)
    classes = torch.arange(len(active) // per_class, device=weight.device)
    if candidates.rows is not None:
        classes = candidates.rows
    # A row of length zero has no direction: cosine and gradient are zero.
    length = active.norm(dim=1, keepdim=True)
    inverse = torch.where(length > 0, 1 / length, 0.0)
    unit = active * inverse
    every = (embeddings @ unit.T).unflatten(1, (len(classes), per_class))
    cosines, best = every.max(dim=2)
    is_negative = labels[:, None] != classes[None, :]
    log_weight = torch.as_tensor(candidates.log_weight, dtype=cosines.dtype, device=cosines.device)

    maximum = bias_derivative = None
    if isinstance(term, Exponential):
        mapped, map_slopes = (cosines, None) if term.transform is None else term.transform(cosines)
        exponents = torch.where(is_negative, term.scale * mapped + log_weight, -torch.inf)
        if term.use_maximum:
            maximum = _largest(exponents)
            exponents = exponents - maximum.clamp_min(torch.finfo(maximum.dtype).min)[:, None]
        values = exponents.exp()
        slopes = term.scale * values * (1.0 if map_slopes is None else map_slopes)
    else:
        counts = torch.where(is_negative, log_weight.exp(), 0.0)
        values, slopes, bias_slopes = term.function(cosines)
        values, slopes = values * counts, slopes * counts
        bias_derivative = None if bias_slopes is None else (bias_slopes * counts).sum(dim=1)

    on_best = torch.zeros_like(every).scatter_(2, best[:, :, None], slopes[:, :, None]).flatten(1)

    def row_pass(coefficients: Tensor, out: Tensor | None = None) -> Iterator[RowBlock]:
        direction = (coefficients[:, None] * on_best).T @ embeddings
        tangential = direction - unit * (unit * direction).sum(dim=1, keepdim=True)
        yield RowBlock(0, len(unit), torch.mul(tangential, inverse, out=out))

    seen = None
    if monitor:
        seen = Monitor(
            torch.where(is_negative, cosines, 0.0).sum(),
            is_negative.sum().to(cosines.dtype),
            torch.cat(
                [torch.where(is_negative, cosines, -torch.inf).flatten(), cosines.new_tensor([-torch.inf])]
            ).max(),
        )
    return Negatives(values.sum(dim=1), on_best @ unit, row_pass, maximum, bias_derivative, seen)


def _largest(x: Tensor) -> Tensor:
    """The largest along the last dimension; minus infinity where it is empty."""
    return torch.cat([x, x.new_full((*x.shape[:-1], 1), -torch.inf)], dim=-1).amax(dim=-1)
