"""One gradient norm over the replicated backbone and the sharded class weights, and the factor that limits it.

Separate because the two kinds of gradient count differently: every rank holds the same backbone gradient, which counts
once, but a different part of the class rows' gradient, which is summed over ranks.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from megaclass.parallel.collectives import Group, sum_over_ranks

# Numbers whose norm is taken at a time on the CPU.
PIECE = 1 << 20


def joint_norm(replicated_gradients: Iterable[Tensor], row_values: Tensor | None, group: Group) -> Tensor:
    """The 2-norm of all gradients together, a scalar that is the same on every rank.

    Args:
        replicated_gradients: gradients of the backbone, the same on every rank (so after the strategy's reduction).
        row_values: `RowGradient.values` of this rank's rows [n, dim]; None where this rank has none. Every rank must
            call, also one without rows.
        group: the ranks that hold the shards.

    Returns:
        float64 on the CPU and for float64 gradients, else float32. Not finite if any gradient on any rank is not
        finite: the caller then skips the step.

    Cost: one pass over the gradients and one all-reduce of one number.
    """
    gradients = list(replicated_gradients)
    everything = gradients if row_values is None else [*gradients, row_values]
    assert everything, "no gradient at all to take the norm of"
    device = everything[0].device
    # Squares of float32 overflow from 2e19 on; on the CPU the wider sum costs nothing.
    wide = device.type == "cpu" or any(gradient.dtype == torch.float64 for gradient in everything)
    dtype = torch.float64 if wide else torch.float32
    replicated = _squared_norm(gradients, dtype, device)
    sharded = _squared_norm([] if row_values is None else [row_values], dtype, device)
    return (replicated + sum_over_ranks(sharded, group)).sqrt()  # partial -> same on every rank


def clip_coefficient(norm: Tensor, max_norm: float | None) -> Tensor:
    """The factor, at most 1, that brings gradients of joint norm `norm` to `max_norm`; 1 if that is None.

    A scalar of the type of `norm`, on its device, so that nothing waits for its value. A norm of NaN gives NaN.
    """
    if max_norm is None:
        return torch.ones_like(norm)
    return (max_norm / norm).clamp(max=1.0)


def _squared_norm(gradients: list[Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Sum of the squares of all entries, a scalar of `dtype`; 0 for no tensors."""
    filled = [gradient.detach() for gradient in gradients if gradient.numel()]
    if not filled:
        return torch.zeros((), dtype=dtype, device=device)
    if device.type == "cpu":
        # The norm of a float32 tensor in float64 makes a copy of it in that type: one piece at a time.
        filled = [piece for gradient in filled for piece in gradient.reshape(-1).split(PIECE)]
    return torch.stack(torch._foreach_norm(filled, 2, dtype=dtype)).square().sum()
