"""Random numbers that are a pure function of counters: seed, purpose, position, sample, and nothing else.

Separate because everything random about reading (the order, the substitutes of bad samples, the augmentation, the
synthetic images) rests on it. No generator state exists, so nothing has to be saved or sent to another rank or
worker, and any number can be computed again on its own.

Source: the mixing function is the finaliser of SplitMix64 (Steele, Lea, Flood, *Fast splittable pseudorandom number
generators*, OOPSLA 2014); counters are absorbed one after the other, each followed by a full mix.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


class Stream(IntEnum):
    """What numbers are drawn for; equal counters of different streams give unrelated numbers."""

    ORDER = 1
    SUBSTITUTE = 2
    AUGMENT = 3
    SHARD_ORDER = 4
    SHUFFLE_BUFFER = 5
    PATTERN = 6
    NOISE = 7
    LABEL_NOISE = 8
    CLASS_ORDER = 9
    BACK_OFF = 10
    WINDOW = 11
    DEAL = 12
    BALANCE = 13


def hash_counters(seed: int, stream: Stream, *counters: ArrayLike) -> NDArray[np.uint64]:
    """64 random bits for every element of the counters, broadcast against each other.

    Args:
        seed: in [0, 2**64).
        stream: what the numbers are for.
        counters: integers below 2**64, not negative; scalars or arrays. Their order matters.

    Returns:
        uint64, of the broadcast shape of the counters (a 0-dimensional array for scalars).
    """
    state = np.asarray(seed, np.uint64)
    for counter in (int(stream), *counters):
        state = absorb(state, counter)
    return state


def absorb(state: NDArray[np.uint64], counter: ArrayLike) -> NDArray[np.uint64]:
    """What `hash_counters` returns with one counter more, from what it returned: for many that begin alike."""
    # Wrapping around is what the hash means; numpy warns about it for scalars only.
    with np.errstate(over="ignore"):
        return np.asarray(_mix(state + (np.asarray(counter).astype(np.uint64) + np.uint64(1)) * _GOLDEN))


def uniform(bits: NDArray[np.uint64]) -> NDArray[np.float64]:
    """The bits as numbers in [0, 1), multiples of 2**-53; same shape."""
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    state = (state ^ (state >> np.uint64(30))) * _MIX_1
    state = (state ^ (state >> np.uint64(27))) * _MIX_2
    return state ^ (state >> np.uint64(31))
