"""Which shard gets which embeddings of a batch, and the way their gradients go back.

A sample has two addressees: the shard that owns its class needs its embedding, and every shard does if it has an inter
term. `Gathered` sends everything to everyone. `Routed` is for a loss whose inter term covers a part of the batch only
(D-Softmax-B): that part goes to everyone, and the rest of the batch only to the owners, so that what a rank receives
hardly grows with the number of ranks. The loss is the same; only the wire differs.

Apart from the class layer, because what travels is no part of the mathematics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megaclass.parallel.collectives import (
    Group,
    Pending,
    all_gather_batch,
    group_rank,
    group_size,
    reduce_scatter_batch,
    route_rows,
)


class PendingGradient(Protocol):
    """A gradient that is on its way to the rank its samples came from."""

    def wait(self) -> Tensor:
        """The gradient [batch, dim] of this rank's embeddings."""
        ...


class Exchange(Protocol):
    """One global batch, G samples of W ranks, as one shard sees it.

    Attributes:
        own: [o, dim] embeddings among which are all those of this shard's classes.
        inter: [m, dim] those that have an inter term; the same on every rank.
    """

    own: Tensor
    inter: Tensor

    def spread(self, values: Tensor) -> Tensor:
        """Numbers of `own`, [o], at their places in the global batch, [G], with zeros between."""
        ...

    def at_own(self, values: Tensor) -> Tensor:
        """Numbers of the global batch, [G], for those in `own`, [o]."""
        ...

    def send_back(self, own: Tensor, inter: Tensor) -> PendingGradient:
        """Start sending back gradients of `own` and `inter`, both partial (sum over shards); they are used up."""
        ...


def exchange(sent: Tensor, owner: Tensor, batch_rows: Tensor | None, group: Group, *, dtype: torch.dtype) -> Exchange:
    """Send the embeddings `sent` [batch, dim] of this rank where they are needed.

    Args:
        sent: this rank's part, in the type it travels in.
        owner: [G] int64, the rank that owns each sample's class; the same on every rank.
        batch_rows: [m] int64, sorted samples that have an inter term, the same on every rank; None: all.
        group: the ranks.
        dtype: what is computed in.

    Cost per rank, forward: W B rows received if all are gathered; else about B rows (those of its own classes) and m,
    which is done where it is less. Backward the same. Routing makes the host wait for one read of W (W + 1) counts on a
    GPU.
    """
    if batch_rows is None or len(batch_rows) + len(sent) >= len(owner):
        return Gathered(all_gather_batch(sent, group).to(dtype), batch_rows, group)
    return Routed(sent, owner, batch_rows, group, dtype)


class Gathered:
    """Everything to everyone: `everything` [G, dim] has come by one all-gather or several; one reduce-scatter back."""

    def __init__(self, everything: Tensor, batch_rows: Tensor | None, group: Group) -> None:
        self.own = everything
        self.inter = self.own if batch_rows is None else self.own[batch_rows]
        self._batch_rows = batch_rows
        self._group = group

    def spread(self, values: Tensor) -> Tensor:
        """See `Exchange.spread`; every sample is here."""
        return values

    def at_own(self, values: Tensor) -> Tensor:
        """See `Exchange.at_own`; every sample is here."""
        return values

    def send_back(self, own: Tensor, inter: Tensor) -> PendingGradient:
        """See `Exchange.send_back`."""
        if self._batch_rows is None:
            own += inter
        else:
            own.index_add_(0, self._batch_rows, inter)
        return reduce_scatter_batch(own, self._group)


class Routed:
    """The inter part to everyone, the rest to the owners: an all-gather and an all-to-all, and both ways back.

    The parts of the inter part that ranks hold may differ in length; they are padded to the longest.
    """

    def __init__(self, sent: Tensor, owner: Tensor, batch_rows: Tensor, group: Group, dtype: torch.dtype) -> None:
        size, rank, batch = group_size(group), group_rank(group), len(sent)
        counts = torch.cat([
            torch.bincount(torch.arange(len(owner), device=owner.device) // batch * size + owner, minlength=size**2),
            torch.bincount(batch_rows // batch, minlength=size),
        ]).tolist()  # fmt: skip
        parts = counts[size**2 :]
        self._group = group
        self._send = counts[rank * size : (rank + 1) * size]
        self._receive = counts[rank : size**2 : size]
        self._order = owner[rank * batch : (rank + 1) * batch].argsort(stable=True)
        # Each rank sends in the order of its batch, and ranks come one after another.
        self._place = (owner == rank).nonzero()[:, 0]
        self._num_samples = len(owner)
        self._longest = max(parts)
        first = sum(parts[:rank])
        self._mine = batch_rows[first : first + parts[rank]] - rank * batch
        self._slots = torch.cat([
            torch.arange(part, device=owner.device) + other * self._longest for other, part in enumerate(parts)
        ])  # fmt: skip
        self.own = route_rows(sent[self._order], self._send, self._receive, group).wait().to(dtype)
        padded = sent.new_zeros(self._longest, sent.shape[1])
        padded[: len(self._mine)] = sent[self._mine]
        self.inter = all_gather_batch(padded, group)[self._slots].to(dtype)

    def spread(self, values: Tensor) -> Tensor:
        """See `Exchange.spread`."""
        return values.new_zeros(self._num_samples).index_copy_(0, self._place, values)

    def at_own(self, values: Tensor) -> Tensor:
        """See `Exchange.at_own`."""
        return values[self._place]

    def send_back(self, own: Tensor, inter: Tensor) -> PendingGradient:
        """See `Exchange.send_back`."""
        padded = inter.new_zeros(group_size(self._group) * self._longest, inter.shape[1])
        padded[self._slots] = inter
        to_inter = reduce_scatter_batch(padded, self._group)
        to_own = route_rows(own, self._receive, self._send, self._group)
        return _Returning(to_own, to_inter, self._order, self._mine)


@dataclass(frozen=True)
class _Returning:
    """Both gradients of this rank's embeddings on their way."""

    own: Pending
    inter: Pending
    order: Tensor
    mine: Tensor

    def wait(self) -> Tensor:
        """See `PendingGradient.wait`."""
        sorted_by_owner, inter = self.own.wait(), self.inter.wait()
        gradient = torch.empty_like(sorted_by_owner)
        gradient[self.order] = sorted_by_owner
        return gradient.index_add_(0, self.mine, inter[: len(self.mine)])
