"""Interval sets against sets of whole numbers: a moment n stands for [n, n + 1)."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from megaclass.observe.intervals import Segment, innermost, intersection, length, name_at, union

MOMENTS = range(24)
intervals = st.lists(st.tuples(st.integers(0, 24), st.integers(0, 24)), max_size=8)
ranges = st.lists(st.builds(Segment, st.integers(0, 24), st.integers(0, 24), st.sampled_from("abcd")), max_size=8)


def moments(spans: list[tuple[float, float]]) -> set[int]:
    return {moment for moment in MOMENTS if any(start <= moment < stop for start, stop in spans)}


def is_set(spans: list[tuple[float, float]]) -> bool:
    flat = [end for span in spans for end in span]
    return all(before < after for before, after in pairwise(flat))


@given(intervals)
def test_a_union_holds_what_any_interval_holds(spans: list[tuple[float, float]]) -> None:
    joined = union(spans)
    assert is_set(joined)
    assert moments(joined) == moments(spans)
    assert length(joined) == len(moments(spans))


@given(intervals, intervals)
def test_an_intersection_holds_what_both_hold(
    first: list[tuple[float, float]], second: list[tuple[float, float]]
) -> None:
    common = intersection(union(first), union(second))
    assert is_set(common)
    assert moments(common) == moments(first) & moments(second)
    assert common == intersection(union(second), union(first))
    assert length(common) == len(moments(first) & moments(second))


@given(ranges)
def test_every_moment_belongs_to_the_range_begun_last(spans: list[Segment]) -> None:
    found = innermost(spans)
    assert all(one.start < one.stop for one in found)
    assert all(before.stop <= after.start for before, after in pairwise(found))
    for moment in MOMENTS:
        holding = [one for one in spans if one.start <= moment < one.stop]
        name = name_at(found, moment)
        if not holding:
            assert name is None
        else:
            latest = max(one.start for one in holding)
            shortest = min(one.stop for one in holding if one.start == latest)
            assert name in {one.name for one in holding if (one.start, one.stop) == (latest, shortest)}


def test_intervals_that_touch_become_one_and_do_not_meet() -> None:
    assert union([(3, 4), (1, 3)]) == [(1, 4)]
    assert intersection([(1, 3)], [(3, 4)]) == []
    assert (union([]), intersection([], [(1, 2)]), length([]), innermost([])) == ([], [], 0, [])


def test_a_range_inside_of_another_takes_its_time_from_it() -> None:
    outer, inner = Segment(0, 10, "outer"), Segment(2, 5, "inner")
    assert innermost([inner, outer]) == [Segment(0, 2, "outer"), Segment(2, 5, "inner"), Segment(5, 10, "outer")]
    assert name_at(innermost([outer, inner]), 5) == "outer"
    assert name_at(innermost([outer, inner]), 10) is None
