"""The slowest of many ranks: every collective of a step waits for it."""

from __future__ import annotations

import math
from statistics import NormalDist


def slowest(mean: float, deviation: float, ranks: int) -> float:
    """The expected time of the slowest of `ranks` whose times are normal and independent.

    Blom's formula for the largest of n normal values, (n - 0.375) / (n + 0.25), is within 0.02 deviations of the
    expectation for any n; one rank waits for nobody.

    Source: Blom, Statistical Estimates and Transformed Beta-Variables, 1958.
    """
    assert ranks >= 1
    assert mean >= 0
    assert deviation >= 0
    if ranks == 1 or deviation == 0:
        return mean
    return mean + deviation * NormalDist().inv_cdf((ranks - 0.375) / (ranks + 0.25))


def slow_by(ranks: int, deviation: float) -> float:
    """The factor on the step time of ranks whose relative standard deviation is `deviation`."""
    factor = slowest(1.0, deviation, ranks)
    assert math.isfinite(factor)
    return factor
