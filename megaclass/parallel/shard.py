"""Which global classes are rows of this rank.

Rows are divided in blocks of ceil(classes / shards), like DTensor's `Shard(0)`: the last shards may be short or empty,
and everything must work when they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ClassShard:
    """One of `count` blocks of `num_classes` global classes: an immutable fact about rank and classes."""

    num_classes: int
    index: int
    count: int

    def __post_init__(self) -> None:
        assert self.num_classes >= 1, self.num_classes
        assert 0 <= self.index < self.count, (self.index, self.count)

    @property
    def start(self) -> int:
        """First global class of this shard."""
        return min(self.index * self._block, self.num_classes)

    @property
    def stop(self) -> int:
        """One past the last global class of this shard."""
        return min((self.index + 1) * self._block, self.num_classes)

    @property
    def num_rows(self) -> int:
        """Rows of this shard; may be zero."""
        return self.stop - self.start

    @property
    def _block(self) -> int:
        return -(-self.num_classes // self.count)

    def to_row(self, labels: Tensor) -> Tensor:
        """Local row of each global class id [batch] int64, -1 where another shard owns it."""
        rows = labels - self.start
        return torch.where((rows >= 0) & (rows < self.num_rows), rows, -1)

    def owner_of(self, labels: Tensor) -> Tensor:
        """Index of the shard that owns each global class id [batch] int64."""
        return labels // self._block
