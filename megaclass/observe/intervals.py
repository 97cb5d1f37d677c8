"""Arithmetic of sets of intervals: what is on a timeline at the same time.

Pure functions. A set is a list of (start, stop) with start < stop, sorted and without overlap or contact; `union` makes
one of any list. Intervals are half open, so that what ends at a moment does not meet what begins there.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from typing import NamedTuple

Interval = tuple[float, float]


class Segment(NamedTuple):
    """A stretch of time with the name of what it counts for."""

    start: float
    stop: float
    name: str


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The set of all moments that lie in any of `intervals`, which may overlap, touch, be empty, in any order."""
    found: list[Interval] = []
    for start, stop in sorted(intervals):
        if start >= stop:
            continue
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], stop))
        else:
            found.append((start, stop))
    return found


def intersection(first: list[Interval], second: list[Interval]) -> list[Interval]:
    """The set of moments in both sets; cost: one walk along both."""
    found: list[Interval] = []
    i = j = 0
    while i < len(first) and j < len(second):
        start, stop = max(first[i][0], second[j][0]), min(first[i][1], second[j][1])
        if start < stop:
            found.append((start, stop))
        if first[i][1] < second[j][1]:
            i += 1
        else:
            j += 1
    return found


def length(intervals: list[Interval]) -> float:
    """How long a set is in all."""
    return sum(stop - start for start, stop in intervals)


def innermost(ranges: Iterable[Segment]) -> list[Segment]:
    """Named ranges, which may lie in each other, cut so that every moment belongs to one: the one begun last.

    Of two that begin together it is the one that ends first. Sorted; moments in no range are left out.
    """
    waiting = sorted((one for one in ranges if one.start < one.stop), key=lambda one: (one.start, -one.stop))
    found: list[Segment] = []
    open_ranges: list[Segment] = []

    def advance(start: float, stop: float) -> None:
        """Give the time from `start` to `stop` to the open ranges, innermost first."""
        while open_ranges and start < stop:
            inner = open_ranges[-1]
            until = min(stop, inner.stop)
            if start < until:
                found.append(Segment(start, until, inner.name))
                start = until
            if inner.stop <= stop:
                open_ranges.pop()

    now = 0.0
    for one in waiting:
        advance(now, one.start)
        now = one.start
        open_ranges.append(one)
    advance(now, max((one.stop for one in waiting), default=0.0))
    return found


def name_at(segments: list[Segment], moment: float) -> str | None:
    """The name of the segment of `innermost` that holds `moment`; None where there is none."""
    place = bisect_right(segments, moment, key=lambda one: one.start) - 1
    return segments[place].name if place >= 0 and moment < segments[place].stop else None
