"""Everything that sends tensors between ranks: the only file that does.

One function per pattern on the wire, each with the way its result is laid out ("in -> out"), its gradient if it has
one, and its cost. The group is always an argument; None, or a group of one, means there is nobody to talk to, and the
same code then runs without sending anything.

The class layer computes its own gradients (`class_layer.py`), so its pair `start_gather` and
`reduce_scatter_batch`, each the adjoint of the other, are plain functions. `sum_over_shards` is used while torch
differentiates a loss of which every rank holds its own copy: its backward is the identity. The stock differentiable
all-reduce sums there again and makes every gradient too large by the number of ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaclass.marks import part

Group = dist.ProcessGroup | None

# torch 2.13 renamed the two single-tensor collectives and warns about the old names, which 2.11 still needs.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def group_size(group: Group) -> int:
    """Number of ranks in `group`; 1 for None."""
    return 1 if group is None else dist.get_world_size(group)


def group_rank(group: Group) -> int:
    """Position of this rank in `group`; 0 for None."""
    return 0 if group is None else dist.get_rank(group)


class Pending:
    """What a collective that is still on its way will give to this rank; `wait()` gives it."""

    def __init__(self, result: Tensor, work: dist.Work | None) -> None:
        self._result = result
        self._work = work

    def wait(self) -> Tensor:
        """The result; blocks until it has arrived (on CUDA: the current stream does)."""
        if self._work is not None:
            self._work.wait()
        return self._result


def start_gather(x: Tensor, group: Group) -> Pending:
    """Start gathering all ranks' parts of a batch, one after another along dimension 0.

    In -> out: different [batch, ...] of equal shape per rank -> [world size * batch, ...], same on every rank. Returned
    at once, so that other work hides the transfer. Gradient: none; its adjoint is `reduce_scatter_batch`. Cost:
    (W - 1) * numel(x) elements received.
    """
    if group_size(group) == 1:
        return Pending(x, None)
    out = x.new_empty((group_size(group) * x.shape[0], *x.shape[1:]))
    return Pending(out, _all_gather_single(out, x.contiguous(), group=group, async_op=True))


def all_gather_batch(x: Tensor, group: Group) -> Tensor:
    """`start_gather`, and waits for it."""
    return start_gather(x, group).wait()


def reduce_scatter_batch(x: Tensor, group: Group) -> Pending:
    """Start summing partial [world size * batch, ...] tensors over ranks; each rank gets its own [batch, ...] part.

    In -> out: partial (sum over ranks) -> this rank's part of the sum. Returned at once, so that other work hides the
    transfer. Gradient: none; the adjoint of `start_gather`. Cost: (W - 1) / W * numel(x) elements sent.
    """
    if group_size(group) == 1:
        return Pending(x, None)
    assert x.shape[0] % group_size(group) == 0, (x.shape, group_size(group))
    mine = x.new_empty((x.shape[0] // group_size(group), *x.shape[1:]))
    work = _reduce_scatter_single(mine, x.contiguous(), group=group, async_op=True)
    return Pending(mine, work)


def route_rows(x: Tensor, send: list[int], receive: list[int], group: Group) -> Pending:
    """Start sending the first `send[0]` rows of `x` to rank 0, the next `send[1]` to rank 1, and so on.

    In -> out: different [sum of send, width] per rank -> different [sum of receive, width], in the order of the ranks
    they come from; `receive` says how many each sends here. Gradient: none; its adjoint is itself with `send` and
    `receive` exchanged. Cost: one all-to-all of the rows.
    """
    out = x.new_empty((sum(receive), *x.shape[1:]))
    work = dist.all_to_all_single(out, x.contiguous(), receive, send, group=group, async_op=True)
    return Pending(out, work)


class _SumOverShards(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        out = x.clone()
        dist.all_reduce(out, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def sum_over_shards(x: Tensor, group: Group) -> Tensor:
    """Sum of what every shard contributes to a loss that every rank then computes alike.

    In -> out: partial -> same on every rank. Gradient: the identity, because each rank differentiates its own copy of
    one and the same loss. Cost: one all-reduce of numel(x) elements.
    """
    if group_size(group) == 1:
        return x
    return _SumOverShards.apply(x, group)


def sum_over_ranks(x: Tensor, group: Group) -> Tensor:
    """Sum over ranks without a gradient, for norms, counts and metrics.

    In -> out: different per rank -> same on every rank. Cost: one all-reduce of numel(x) elements.
    """
    if group_size(group) == 1:
        return x.detach()
    out = x.detach().clone()
    dist.all_reduce(out, group=group)
    return out


def max_over_ranks(x: Tensor, group: Group) -> Tensor:
    """Elementwise maximum over ranks, without a gradient.

    In -> out: different per rank -> same on every rank. Cost: one all-reduce of numel(x) elements.
    """
    if group_size(group) == 1:
        return x.detach()
    out = x.detach().clone()
    dist.all_reduce(out, op=dist.ReduceOp.MAX, group=group)
    return out


class _BatchMoments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, moments: Tensor, group: Group) -> Tensor:
        ctx.group = group
        with part("batch norm"):
            return sum_over_ranks(moments, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        with part("batch norm"):
            return sum_over_ranks(grad, ctx.group), None


def batch_moments(moments: Tensor, group: Group) -> Tensor:
    """Sum over ranks of packed batch statistics (count, sum, sum of squares), for synchronised batch norm.

    In -> out: partial -> same on every rank. Gradient: summed over ranks as well, because every rank goes on with the
    sum differently (its own samples). Cost: one all-reduce of numel(moments) elements each way.
    """
    if group_size(group) == 1:
        return moments
    return _BatchMoments.apply(moments, group)


def gather_uneven(x: Tensor, group: Group) -> Tensor:
    """All ranks' rows, one after another along dimension 0, where ranks may hold different numbers of rows.

    In -> out: different [n_r, ...] per rank -> [sum of n_r, ...], same on every rank. Gradient: none. Cost: two
    all-gathers: the lengths, then the rows padded to the longest.
    """
    if group_size(group) == 1:
        return x.detach()
    lengths = all_gather_batch(torch.tensor([x.shape[0]], device=x.device), group).tolist()
    padded = x.new_zeros((max(lengths), *x.shape[1:]))
    padded[: x.shape[0]] = x.detach()
    parts = all_gather_batch(padded, group).split(max(lengths)) if max(lengths) else [x.detach()] * len(lengths)
    return torch.cat([rows[:length] for rows, length in zip(parts, lengths, strict=True)])


def broadcast_from_main(x: Tensor, group: Group) -> None:
    """Overwrite `x` on every rank with rank 0's; no gradient. Cost: one broadcast."""
    if group_size(group) > 1:
        dist.broadcast(x, group_src=0, group=group)
