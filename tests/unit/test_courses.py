"""Courses of hyper-parameters: what holds at the points, before, between and after them, and what is refused."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaclass.errors import ConfigError
from megaclass.objectives import presets
from megaclass.objectives.courses import SHAPES, course

POINTS = [[0.25, 8.0], [0.5, 16.0], [0.75, 4.0]]


@pytest.mark.parametrize("shape", SHAPES)
def test_values_hold_at_the_points_before_the_first_and_after_the_last(shape: str) -> None:
    moving = course("scale", shape, POINTS)
    assert [moving.at(share) for share in (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)] == [8, 8, 8, 16, 4, 4, 4]
    assert moving.values == [8.0, 16.0, 4.0]


@pytest.mark.parametrize(
    ("shape", "quarter", "half", "falling"),
    [
        ("step", 8.0, 8.0, 16.0),
        ("linear", 10.0, 12.0, 13.0),
        ("cosine", 8 + 4 * (1 - math.sqrt(0.5)), 12.0, 16 - 6 * (1 - math.sqrt(0.5))),
    ],
)
def test_values_between_the_points(shape: str, quarter: float, half: float, falling: float) -> None:
    moving = course("scale", shape, POINTS)
    assert moving.at(0.3125) == pytest.approx(quarter, rel=1e-12)
    assert moving.at(0.375) == pytest.approx(half, rel=1e-12)
    assert moving.at(0.5625) == pytest.approx(falling, rel=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_single_point_is_a_constant(shape: str) -> None:
    moving = course("scale", shape, [[0.5, 3.0]])
    assert [moving.at(share) for share in (0.0, 0.4, 0.5, 1.0)] == [3.0] * 4


@pytest.mark.parametrize("shape", SHAPES)
@settings(max_examples=50, deadline=None)
@given(share=st.floats(0, 1))
def test_nothing_outside_the_range_of_the_points_is_reached(shape: str, share: float) -> None:
    moving = course("scale", shape, POINTS)
    assert min(moving.values) <= moving.at(share) <= max(moving.values)


def test_the_heated_up_preset_lowers_scale_and_learning_rate_for_the_last_quarter() -> None:
    preset = presets.resolve("heated-up")
    values = [preset.values(share) for share in (0.0, 0.74, 0.75, 1.0)]
    assert [now.scale for now in values] == [16.0, 16.0, 4.0, 4.0]
    assert [now.learning_rate for now in values] == [1.0, 1.0, 0.1, 0.1]


def test_a_preset_without_a_schedule_stays_as_it_is() -> None:
    preset = presets.resolve("d-softmax-k", end_point=0.8, sampling_rate=0.25)
    assert preset.values(0.0) == preset.values(1.0)
    assert (preset.values(0.3).end_point, preset.values(0.3).sampling_rate) == (0.8, 0.25)


@pytest.mark.parametrize(
    ("shape", "points", "message"),
    [
        ("quadratic", [[0, 1]], r"scale.shape 'quadratic' does not exist; there are step, linear, cosine"),
        ("linear", [], r"scale.points \[\]: give \[share of the run, value\] pairs, at least one"),
        ("linear", [[0, 1], [0.5]], r"scale.points \[\[0, 1\], \[0.5\]\]: give \[share of the run, value\] pairs"),
        ("linear", [[0, 1], [1.5, 2]], r"scale.points .*1.5.*: shares of the run must lie in \[0, 1\]"),
        ("linear", [[-0.1, 1]], r"scale.points \[\[-0.1, 1\]\]: shares of the run must lie in \[0, 1\]"),
        ("step", [[math.nan, 1]], r"scale.points \[\[nan, 1\]\]: shares of the run must lie in \[0, 1\]"),
        ("cosine", [[0.5, 1], [0.2, 2]], r"scale.points .*: the point at 0.2 ends before it starts, at 0.5; .*rise"),
        ("cosine", [[0.5, 1], [0.5, 2]], r"scale.points .*: the point at 0.5 ends before it starts, at 0.5"),
    ],
)
def test_a_course_that_makes_no_sense_is_refused(shape: str, points: list[list[float]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        course("scale", shape, points)
