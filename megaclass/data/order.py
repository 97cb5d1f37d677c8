"""The order of samples: which sample stands at a position of the one infinite sequence, and who reads which positions.

Separate because it is the contract between ranks, restarts and world sizes: every function here is pure, so any rank
can compute any part of the sequence, and the whole state of a reader is one integer. Position p is sample
`perm(seed, p div N)[p mod N]`: every epoch has its own permutation, and batches run on over the end of an epoch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megaclass.data.counter import Stream, absorb, hash_counters

_ROUNDS = 8
# Of the order of classes: no option, so that N classes of a split are the same N in every run.
_CLASS_KEY = 0
# Feistel networks over a handful of values miss many permutations; over 256 values and walked down they do not.
_MIN_BITS = 8


@dataclass(frozen=True)
class SampleOrder:
    """Position → sample id, by a permutation of [0, num_samples) of each epoch that is computed and never stored.

    The permutation is a keyed Feistel network over the smallest power of two that holds N, in which positions that
    come out at N or above walk on along their cycle until they come out below.

    Attributes:
        num_samples: N, at least 1.
        seed: of the permutations.
        shuffle: False reads every epoch in manifest order.
        stream: what is ordered; orders of different streams have nothing to do with each other.

    Source: Black and Rogaway, *Ciphers with arbitrary finite domains*, CT-RSA 2002 (cycle walking over a Feistel
        network); the round function is the counter hash.

    Cost: O(1) memory; below two passes over the network per position on average (more below 128 samples).
    """

    num_samples: int
    seed: int
    shuffle: bool = True
    stream: Stream = Stream.ORDER

    def __post_init__(self) -> None:
        assert self.num_samples >= 1, self.num_samples

    def sample_ids(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Sample ids [n] int64 at positions [n] of the sequence (not negative, in any order)."""
        epochs, offsets = np.divmod(np.asarray(positions, np.int64), self.num_samples)
        if not self.shuffle:
            return offsets
        result = offsets.astype(np.uint64)
        keys = hash_counters(self.seed, self.stream, epochs)
        # Of each round and position, all of the hash but its last counter: the same however far a position walks.
        states = np.stack([hash_counters(number, Stream.ORDER, keys) for number in range(_ROUNDS)])
        walking = np.arange(len(result))
        while len(walking):
            values = self._feistel(result[walking], states[:, walking])
            result[walking] = values
            walking = walking[values >= self.num_samples]
        return result.astype(np.int64)

    def epochs(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The epoch [n] int64 each position lies in, from 0."""
        return np.asarray(positions, np.int64) // self.num_samples

    def _feistel(self, values: NDArray[np.uint64], states: NDArray[np.uint64]) -> NDArray[np.uint64]:
        bits = max((self.num_samples - 1).bit_length(), _MIN_BITS)
        low_bits = np.uint64((bits + 1) // 2)
        low_mask = np.uint64((1 << int(low_bits)) - 1)
        high_mask = np.uint64((1 << (bits - int(low_bits))) - 1)
        high, low = values >> low_bits, values & low_mask
        # The halves may differ by a bit, so they are changed in turn instead of swapped; each round undoes itself.
        for number, state in enumerate(states):
            if number % 2:
                low = low ^ (absorb(state, high) & low_mask)
            else:
                high = high ^ (absorb(state, low) & high_mask)
        return (high << low_bits) | low


def first_classes(num_classes: int, num_kept: int) -> NDArray[np.int64]:
    """The classes [num_kept] int64 of a split that make its subset of `num_kept` classes, in their new order.

    A function of the two counts and of no seed. Subsets are nested: a smaller one is the beginning of a larger one, so
    a class has the same new label in all subsets that hold it.
    """
    assert 1 <= num_kept <= num_classes, (num_kept, num_classes)
    return SampleOrder(num_classes, _CLASS_KEY, stream=Stream.CLASS_ORDER).sample_ids(np.arange(num_kept))


def rank_positions(position: int, batch_size: int, rank: int, world_size: int) -> NDArray[np.int64]:
    """The positions [batch_size] int64 that `rank` reads of the micro-batch that starts at `position`.

    A micro-batch covers `batch_size * world_size` positions in a row over all ranks, rank after rank, and the next one
    follows directly: micro-batch a of a step that starts at P is `P + a*(G/A)` onwards, whatever the world size. So
    with the same G and A, what all ranks together see of a micro-batch does not depend on how many they are.
    """
    assert 0 <= rank < world_size, (rank, world_size)
    return position + rank * batch_size + np.arange(batch_size, dtype=np.int64)
