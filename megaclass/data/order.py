"""The order of samples: which sample stands at a position of the one infinite sequence, and who reads which positions.

Separate because it is the contract between ranks, restarts and world sizes: every function here is pure, so any rank
can compute any part of the sequence, and the whole state of a reader is one integer. Position p is sample
`perm(seed, p div N)[p mod N]`: every epoch has its own permutation, and batches run on over the end of an epoch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megaclass.data.counter import Stream, absorb, hash_counters

_ROUNDS = 8
# Of the order of classes: no option, so that N classes of a split are the same N in every run.
_CLASS_KEY = 0
# Feistel networks over a handful of values miss many permutations; over 256 values and walked down they do not.
_MIN_BITS = 8


class Order(Protocol):
    """Position → sample and which visit of it; a pure function of the position."""

    def visits(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Sample ids [n] int64 at positions [n], and a number [n] int64 that no other visit of the sample has.

        Augmentation is drawn from both, so that no two visits look alike.
        """
        ...


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
        return permuted(offsets, self.num_samples, hash_counters(self.seed, self.stream, epochs))

    def visits(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Sample ids [n] at positions [n], and how often each sample came before, [n]: the epoch, from 0."""
        return self.sample_ids(positions), np.asarray(positions, np.int64) // self.num_samples


@dataclass(frozen=True)
class RepeatedOrder:
    """Every sample of another order `repeats` times in a row, each time as a visit of its own.

    Source: Hoffer et al., *Augment your batch*, CVPR 2020; Berman et al., *MultiGrain*, 2019 (repeated augmentation).
    """

    order: Order
    repeats: int

    def visits(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Sample ids [n] at positions [n], and how often each sample came before, [n]."""
        places, copies = np.divmod(np.asarray(positions, np.int64), self.repeats)
        ids, before = self.order.visits(places)
        return ids, before * self.repeats + copies


def permuted(offsets: NDArray[np.int64], sizes: int | NDArray[np.int64], keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Where offsets [n] go in permutations of [0, size), one for each key [n]; `sizes` is one for all or [n].

    Cost: below two passes over the network per offset on average where the size is 128 or more, 256 / size below.
    """
    result = offsets.astype(np.uint64)
    # Of each round and offset, all of the hash but its last counter: the same however far an offset walks.
    states = np.stack([hash_counters(number, Stream.ORDER, keys) for number in range(_ROUNDS)])
    limits = np.broadcast_to(np.asarray(sizes).astype(np.uint64), result.shape)
    # The exponent of a float is the number of bits of a whole number below 2**53.
    bits = np.maximum(np.frexp((limits - np.uint64(1)).astype(np.float64))[1], _MIN_BITS).astype(np.uint64)
    walking = np.arange(len(result))
    while len(walking):
        values = _feistel(result[walking], bits[walking], states[:, walking])
        result[walking] = values
        walking = walking[values >= limits[walking]]
    return result.astype(np.int64)


def _feistel(values: NDArray[np.uint64], bits: NDArray[np.uint64], states: NDArray[np.uint64]) -> NDArray[np.uint64]:
    one = np.uint64(1)
    low_bits = (bits + one) >> one
    low_mask = (one << low_bits) - one
    high_mask = (one << (bits - low_bits)) - one
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
