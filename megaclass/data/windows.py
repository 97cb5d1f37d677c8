"""The order of samples for storage that is slow at random access: shards at random, samples within a window of them.

Separate from `order.py` because it must know how many samples each shard holds; what it promises is the same. Every
epoch has its own permutation of the samples, a pure function of the position, so the whole state is still one integer
and neither ranks nor restarts change the sequence. But while a window is read no other shard is touched.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from megaclass.data.counter import Stream, hash_counters
from megaclass.data.order import SampleOrder

# So few are sorted sooner than a network over a power of two finds its way down to them.
_FEW = 1024


class WindowOrder:
    """Position → sample id; in each epoch the shards in an order of its own, cut into windows that are shuffled alone.

    With S shards that hold samples there are ceil(S / window) windows of as equal numbers of shards as possible. All
    ranks read in the same window, or in two at its end.

    Args:
        shard_sizes: [shards] int64, samples of each shard, in manifest order; their sum is at least 1.
        seed: of the permutations.
        window: shards in a window at most; at S or more it is a permutation of all samples.

    Attributes:
        num_samples: of an epoch.

    Cost: memory in proportion to the shards, and time once per epoch; otherwise that of `SampleOrder` and two binary
    searches.
    """

    def __init__(self, shard_sizes: NDArray[np.int64], seed: int, window: int) -> None:
        sizes = np.asarray(shard_sizes, np.int64)
        assert window >= 1, window
        assert sizes.sum() >= 1
        filled = np.flatnonzero(sizes)
        self.num_samples = int(sizes.sum())
        self._sizes, self._first_ids = sizes[filled], (np.cumsum(sizes) - sizes)[filled]
        self._seed = seed
        num_windows = -(-len(filled) // window)
        self._last_places = np.arange(1, num_windows + 1) * len(filled) // num_windows - 1
        # A batch lies in two epochs at most, since an epoch holds a global batch.
        self._layout = lru_cache(maxsize=2)(self._make_layout)

    def sample_ids(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Sample ids [n] int64 at positions [n] of the sequence (not negative, in any order)."""
        epochs, offsets = np.divmod(np.asarray(positions, np.int64), self.num_samples)
        result = np.empty_like(offsets)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            result[here] = self._of_epoch(epoch, offsets[here])
        return result

    def visits(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Sample ids [n] at positions [n], and how often each sample came before, [n]: the epoch, from 0."""
        return self.sample_ids(positions), np.asarray(positions, np.int64) // self.num_samples

    def _of_epoch(self, epoch: int, offsets: NDArray[np.int64]) -> NDArray[np.int64]:
        """Sample ids at offsets from the beginning of an epoch."""
        shards, ends, window_ends = self._layout(epoch)
        windows = np.searchsorted(window_ends, offsets, side="right")
        places = np.empty_like(offsets)  # as if the shards stood one behind the other in the epoch's order
        for window in np.unique(windows).tolist():
            here = windows == window
            start = int(window_ends[window - 1]) if window else 0
            places[here] = start + self._permuted(
                epoch, window, int(window_ends[window]) - start, offsets[here] - start
            )
        numbers = np.searchsorted(ends, places, side="right")
        inside = places - (ends[numbers] - self._sizes[shards[numbers]])
        return self._first_ids[shards[numbers]] + inside

    def _permuted(self, epoch: int, window: int, size: int, offsets: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where the samples at offsets within a window of `size` samples go."""
        key = int(hash_counters(self._seed, Stream.WINDOW, epoch, window))
        if size <= _FEW:
            return np.argsort(hash_counters(key, Stream.WINDOW, np.arange(size)), kind="stable")[offsets]
        return SampleOrder(size, key).sample_ids(offsets)

    def _make_layout(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """The shards of an epoch in order, where each ends, and where each window ends, in samples."""
        keys = hash_counters(self._seed, Stream.SHARD_ORDER, epoch, np.arange(len(self._sizes)))
        shards = np.argsort(keys, kind="stable")
        ends = np.cumsum(self._sizes[shards])
        return shards, ends, ends[self._last_places]
