"""Seconds of one collective among GPUs of several nodes.

Inside a node all GPUs are joined by fast links; across nodes each GPU has a network card of its own ("rails"). NCCL's
algorithms: rings for everything, and for all-reduce a tree where that is faster (its start grows with the logarithm of
the ranks). Traffic inside and across nodes is pipelined, so the slower of the two counts; the start of a message is
added. None of it was measured by us.

Source: Patarasuk and Yuan, Bandwidth optimal all-reduce algorithms, 2009, for the bytes of rings; Sanders et al.,
Two-tree algorithms for full bandwidth broadcast, 2009, for the tree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megaclass.plan.devices import Device
from megaclass.plan.step import Collective


@dataclass(frozen=True)
class Layout:
    """So many ranks, so many in each node."""

    ranks: int
    per_node: int

    @property
    def nodes(self) -> int:
        """The last one may be short."""
        return -(-self.ranks // self.per_node)

    @property
    def near(self) -> int:
        """Ranks of a full node."""
        return min(self.ranks, self.per_node)


def ring_start(device: Device, layout: Layout) -> float:
    """Seconds until the first byte has gone round the ring."""
    across = layout.nodes if layout.nodes > 1 else 0
    return (layout.ranks - 1 - max(0, across - 1)) * device.hop_seconds + across * device.network_hop_seconds


def tree_start(device: Device, layout: Layout) -> float:
    """Seconds until the first byte has gone up and down the tree: along the chain of a node, then over nodes."""
    deep = math.ceil(math.log2(layout.nodes)) if layout.nodes > 1 else 0
    return 2 * ((layout.near - 1) * device.hop_seconds + deep * device.network_hop_seconds)


def seconds(device: Device, layout: Layout, name: str, sent_bytes: float) -> float:
    """One collective of which each rank sends `sent_bytes` with a ring; see `step.Collective`."""
    if layout.ranks == 1:
        return 0.0
    start = ring_start(device, layout)
    # What a rank sends round the ring leaves its node over its card once per node; the rest stays on the fast links.
    share = (layout.nodes - 1) / (layout.ranks - 1)
    if name == "all-to-all":
        share = (layout.ranks - layout.near) / (layout.ranks - 1)
    near, far = sent_bytes * (1 - share) / device.link_bandwidth, sent_bytes * share / device.network_bandwidth
    if name == "all-reduce":
        # A rail carries one part in `near` of the tensor from node to node.
        start = min(2 * start, tree_start(device, layout))
    return device.latency_seconds + start + max(near, far)


def collective(device: Device, layout: Layout, one: Collective) -> float:
    """All of its exchanges in a step."""
    return one.count * seconds(device, layout, one.name, one.sent_bytes / one.count)
