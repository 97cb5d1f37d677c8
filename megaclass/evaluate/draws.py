"""What the protocols draw at random: pairs, folds and trials, from a counter generator.

Philox numbers are a pure function of (seed, purpose, counter). Only its raw 64-bit numbers are used: numpy promises
those for good, while what `Generator.choice` or `permutation` make of them may change with a version, and with it
every figure ever reported.

Source: Salmon, Moraes, Dror, Shaw, Parallel random numbers: as easy as 1, 2, 3, SC 2011 (Philox).
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What numbers are drawn for; each has a stream of its own. The values are part of every reported figure."""

    FOLDS = 1
    ROC_PAIRS = 2
    ONE_SHOT = 20


class Draws:
    """The stream of one (seed, purpose); each call continues where the last one ended."""

    def __init__(self, seed: int, purpose: Purpose) -> None:
        self._philox = np.random.Philox(key=np.array([seed, int(purpose)], dtype=np.uint64))

    def raw(self, count: int) -> np.ndarray:
        """The next `count` numbers, uint64, uniform."""
        return np.asarray(self._philox.random_raw(count), dtype=np.uint64)

    def permutation(self, length: int) -> np.ndarray:
        """`range(length)` in drawn order: [length] int64."""
        return np.argsort(self.raw(length), kind="stable")

    def distinct(self, total: int, count: int) -> np.ndarray:
        """`count` different numbers below `total` in drawn order: [count] int64.

        Memory grows with `count`, not with `total`. The remainder of a 64-bit number favours small results by less
        than total / 2⁶⁴, which no figure shows.
        """
        assert 0 <= count <= total
        if total <= 4 * count:
            return self.permutation(total)[:count]
        drawn = np.empty(0, dtype=np.int64)
        while len(drawn) < count:
            more = (self.raw(count) % np.uint64(total)).astype(np.int64)
            drawn = np.concatenate([drawn, more])
            _, first = np.unique(drawn, return_index=True)
            drawn = drawn[np.sort(first)]
        return drawn[:count]
