"""How many positions of each epoch a class gets, in whole numbers that add up, at rates between even and its size.

Separate because it is arithmetic over classes that knows neither samples nor positions.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megaclass.data.counter import Stream, hash_counters

# Shares are whole numbers of this part of a visit, so that they add up exactly, and are the same on every machine.
_UNIT = 1 << 24
# The golden section of a unit, made odd: its first multiples are spread evenly, however many one takes.
_STEP = 10368889
_WEIGHT_UNIT = 1 << 20


class ClassQuotas:
    """Visits of every class, epoch by epoch: its share of the epoch, or that rounded up or down.

    The share of a class with n samples is proportional to n^(1 - balance). Of the shares' fractions, laid end to end on
    a line, those that one point of each unit falls into are rounded up. The point moves on by the golden section in
    every epoch. So the quotas of an epoch add up to the number of samples, and over epochs those of a class to its
    share; how often it was visited before an epoch can be told without going through the epochs.

    Args:
        sizes: [classes] int64, samples of each class, at least 1.
        balance: above 0, at most 1.
        seed: where the point begins.

    Source: systematic sampling with unequal probabilities: Madow, *On the theory of systematic sampling, II*, 1949.
    """

    def __init__(self, sizes: NDArray[np.int64], balance: float, seed: int) -> None:
        assert 0 < balance <= 1, balance
        num_visits = int(sizes.sum())
        assert num_visits < 1 << 38, num_visits
        distinct, kinds, counts = np.unique(sizes, return_inverse=True, return_counts=True)
        # Rounded, because machines may differ in the last bit of a power.
        weights = [round(size ** (1.0 - balance) * _WEIGHT_UNIT) for size in distinct.tolist()]
        total = sum(weight * count for weight, count in zip(weights, counts.tolist(), strict=True))
        shares = np.array([num_visits * _UNIT * weight // total for weight in weights], np.int64)[kinds]
        # What rounding down took is less than one part of each class.
        shares[: num_visits * _UNIT - sum(share * int(n) for share, n in _counted(shares))] += 1
        self._whole, fractions = np.divmod(shares, _UNIT)
        self._bounds = np.concatenate(([0], np.cumsum(fractions)))
        self._first_point = int(hash_counters(seed, Stream.BALANCE)) % _UNIT

    def visits_before(self, epoch: int) -> NDArray[np.int64]:
        """[classes] int64, visits of each class in the epochs 0 to `epoch` - 1.

        Cost: time in proportion to the classes and to the epochs.
        """
        points = np.sort((self._first_point + np.arange(epoch, dtype=np.int64) * _STEP) % _UNIT)
        units, rests = np.divmod(self._bounds, _UNIT)
        # Of each bound, the points below it: one of each epoch in every unit.
        return self._whole * epoch + np.diff(units * epoch + np.searchsorted(points, rests))


def _counted(values: NDArray[np.int64]) -> list[tuple[int, int]]:
    """The distinct values with their numbers."""
    distinct, counts = np.unique(values, return_counts=True)
    return list(zip(distinct.tolist(), counts.tolist(), strict=True))
