"""One gradient norm over the backbone and the sharded class weights, and the factor that limits it.

Separate because the two kinds of gradient count differently: a replicated gradient is the same on every rank and
counts once; of a sharded one (the class rows', and the backbone's under some strategies) every rank holds a different
part, and the parts are summed over ranks.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from megaclass.parallel.collectives import Group, sum_over_ranks

# Numbers whose norm is taken at a time on the CPU.
PIECE = 1 << 20


def joint_norm(replicated: Iterable[Tensor], sharded: Iterable[Tensor], group: Group) -> Tensor:
    """The 2-norm of all gradients together, a scalar that is the same on every rank.

    Args:
        replicated: gradients that are the same on every rank (so after the strategy's reduction).
        sharded: this rank's part of all others, such as `RowGradient.values` of its rows [n, dim]; none where it has
            none. Every rank must call, also one without any.
        group: the ranks that hold the shards.

    Returns:
        float64 on the CPU and for float64 gradients, else float32. Not finite if any gradient on any rank is not
        finite: the caller then skips the step.

    Cost: one pass over the gradients and one all-reduce of one number.
    """
    replicated, sharded = list(replicated), list(sharded)
    everything = [*replicated, *sharded]
    assert everything, "no gradient at all to take the norm of"
    # Parts of the backbone may be on the host; the group of a GPU's ranks carries nothing from there.
    device = next((gradient.device for gradient in everything if gradient.is_cuda), everything[0].device)
    # Squares of float32 overflow from 2e19 on; on the CPU the wider sum costs nothing.
    wide = device.type == "cpu" or any(gradient.dtype == torch.float64 for gradient in everything)
    dtype = torch.float64 if wide else torch.float32
    own = _squared_norm(sharded, dtype, device)
    return (_squared_norm(replicated, dtype, device) + sum_over_ranks(own, group)).sqrt()  # partial -> same everywhere


def clip_coefficient(norm: Tensor, max_norm: float | None) -> Tensor:
    """The factor, at most 1, that brings gradients of joint norm `norm` to `max_norm`; 1 if that is None.

    A scalar of the type of `norm`, on its device, so that nothing waits for its value. A norm of NaN gives NaN.
    """
    if max_norm is None:
        return torch.ones_like(norm)
    return (max_norm / norm).clamp(max=1.0)


def _squared_norm(gradients: list[Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Sum of the squares of all entries, a scalar of `dtype` on `device`; 0 for no tensors."""
    total = torch.zeros((), dtype=dtype, device=device)
    filled = [gradient.detach() for gradient in gradients if gradient.numel()]
    for place in dict.fromkeys(gradient.device for gradient in filled):
        here = [gradient for gradient in filled if gradient.device == place]
        if place.type == "cpu":
            # The norm of a float32 tensor in float64 makes a copy of it in that type: one piece at a time.
            here = [piece for gradient in here for piece in gradient.reshape(-1).split(PIECE)]
        total += torch.stack(torch._foreach_norm(here, 2, dtype=dtype)).square().sum().to(device)
    return total
