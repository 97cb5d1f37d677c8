"""Which class rows one pass works on: all of the shard's, or the few that were brought from the host.

Separate because it is where the two places that rows may live in meet: what follows sees a matrix, the places of the
drawn classes in it, and the place of each sample's own class.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megaclass.host_rows import HostRows
from megaclass.parallel.shard import ClassShard
from megaclass.sampling.draw import Draw, Sampler


@dataclass(frozen=True)
class PassRows:
    """The class rows of one pass.

    Attributes:
        weight: [k * rows_per_class, dim] on the device: all rows of the shard, or those of the classes that are needed.
        draw: of this pass; its rows are places of classes in `weight`.
        label: [G] int64 local class of each sample, -1 where another shard owns it.
        own: [G] int64 place of that class in `weight`, -1 elsewhere.
    """

    weight: Tensor
    draw: Draw
    label: Tensor
    own: Tensor


def on_device(
    weight: Tensor, sampler: Sampler, labels: Tensor, shard: ClassShard, number: int, rate: float
) -> PassRows:
    """All rows are at hand: a class's place is its number in the shard."""
    label = shard.to_row(labels)
    return PassRows(weight, sampler.draw(labels, shard, number, rate), label, label)


def from_host(
    rows: HostRows, sampler: Sampler, labels: Tensor, shard: ClassShard, number: int, rate: float
) -> PassRows:
    """The drawn classes and the samples' own are brought to the device; those of the next draw are begun.

    Labels [G] int64 are on the device, the same on every rank; `number` is that of the draw.

    Cost: waits for the device, as the host must know the labels to gather their rows.
    """
    on_host = labels.cpu()
    draw, label = sampler.draw(on_host, shard, number, rate), shard.to_row(on_host)
    drawn = draw.rows
    assert drawn is not None, "a draw of all rows has no use for rows on the host"
    part = rows.load(torch.unique(torch.cat([drawn, label[label >= 0]])))
    rows.read_ahead(sampler.drawn(shard, number + 1, rate))
    if isinstance(draw.log_weight, Tensor):
        draw = replace(draw, log_weight=draw.log_weight.to(labels.device))
    weight = part.entries["weight"].flatten(0, 1)
    return PassRows(weight, replace(draw, rows=rows.places(drawn)), label.to(labels.device), rows.places(label))
