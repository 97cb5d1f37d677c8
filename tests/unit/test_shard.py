"""Blocks of classes: they tile the range, agree with DTensor's rule, and labels find their row."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from megaclass.parallel.shard import ClassShard


@given(num_classes=st.integers(1, 5000), count=st.integers(1, 40))
def test_shards_tile_the_classes(num_classes: int, count: int) -> None:
    shards = [ClassShard(num_classes, index, count) for index in range(count)]
    assert shards[0].start == 0
    assert shards[-1].stop == num_classes
    assert all(left.stop == right.start for left, right in pairwise(shards))
    sizes = [part.shape[0] for part in torch.arange(num_classes).chunk(count)]
    assert [shard.num_rows for shard in shards if shard.num_rows] == sizes


@given(num_classes=st.integers(1, 200), count=st.integers(1, 9))
def test_every_label_has_exactly_one_owner(num_classes: int, count: int) -> None:
    labels = torch.arange(num_classes)
    owners = torch.zeros(num_classes, dtype=torch.int64)
    for index in range(count):
        shard = ClassShard(num_classes, index, count)
        rows = shard.to_row(labels)
        owned = rows >= 0
        owners += owned
        assert torch.equal(rows[owned] + shard.start, labels[owned])
        assert bool((rows < shard.num_rows).all())
    assert bool((owners == 1).all())
