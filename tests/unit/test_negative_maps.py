"""Negative maps: derivatives by finite differences, formulas written again from the papers, the filter, the state."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from megaclass.errors import ConfigError
from megaclass.kernels.terms import Transform
from megaclass.objectives import NEGATIVE_MAPS, NegativeMap
from megaclass.objectives.curricularface import CurricularMap
from megaclass.objectives.negative_map import Positives, filtered, filtered_function
from megaclass.objectives.objective import Values
from megaclass.objectives.quadratic import CircleMap, QuadraticMap
from megaclass.objectives.uniface import UniFace
from tests.support.slopes import numeric_slope

FEW = settings(max_examples=40, deadline=None)
COSINES = st.floats(-0.999, 0.999)
MARGINS = st.floats(0.0, 1.0)


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Three samples whose own class stands at 0.1, 0.5 and 0.9 before the margin and 0.3 lower after it.
POSITIVES = Positives(double(0.1, 0.5, 0.9), double(-0.2, 0.2, 0.6), torch.tensor(0.4, dtype=torch.float64))


def applied(negative_map: NegativeMap, margin: float, cosine: float) -> tuple[float, float]:
    """Value and derivative at one cosine, a negative of the second sample."""
    transform = negative_map.bind(POSITIVES, margin)
    cosines = torch.full((3, 1), cosine, dtype=torch.float64)
    if transform is None:
        return cosine, 1.0
    mapped, slopes = transform(cosines)
    assert cosines.tolist() == [[cosine]] * 3  # a kernel reads them again
    return float(mapped[1, 0]), 1.0 if slopes is None else float(slopes[1, 0])


# Circle loss holds its factor constant: its derivative is compared with the paper's below.
@pytest.mark.parametrize("name", [name for name in NEGATIVE_MAPS.names() if name != "circle"])
@FEW
@given(cosine=COSINES, margin=MARGINS)
def test_maps_are_differentiated_truly(name: str, cosine: float, margin: float) -> None:
    negative_map = NEGATIVE_MAPS.build(name, {"negative_goal": 0.1, "negative_weight": 1.7})
    numeric = numeric_slope(lambda at: applied(negative_map, margin, at)[0], cosine)
    assert math.isclose(applied(negative_map, margin, cosine)[1], numeric, rel_tol=1e-7, abs_tol=1e-7)


@FEW
@given(cosine=COSINES, margin=MARGINS)
def test_circle_holds_alpha_constant(cosine: float, margin: float) -> None:
    value, slope = applied(CircleMap(), margin, cosine)
    alpha = max(0.0, cosine + margin)
    assert value == pytest.approx(alpha * (cosine - margin), abs=1e-15)
    assert slope == pytest.approx(alpha, abs=1e-15)


@FEW
@given(cosine=COSINES, margin=MARGINS)
def test_circle_is_exactly_the_quadratic_map_with_goal_zero_and_weight_one(cosine: float, margin: float) -> None:
    """Equal in value; the derivatives are z + m and 2 z, so they meet at z = m alone."""
    assume(abs(cosine + margin) > 1e-12)
    circle, quadratic = applied(CircleMap(), margin, cosine), applied(QuadraticMap(), margin, cosine)
    assert circle[0] == pytest.approx(quadratic[0], abs=1e-14)
    assert quadratic[1] == (2 * cosine if cosine > -margin else 0.0)
    assert applied(CircleMap(), margin, margin)[1] == pytest.approx(applied(QuadraticMap(), margin, margin)[1])


@FEW
@given(cosine=COSINES, margin=MARGINS, goal=st.floats(-0.5, 0.5), weight=st.floats(0.1, 3))
def test_the_quadratic_map_is_a_parabola_right_of_its_left_zero(
    cosine: float, margin: float, goal: float, weight: float
) -> None:
    left = goal - margin / math.sqrt(weight)
    assume(abs(cosine - left) > 1e-12)
    expected = weight * (cosine - goal) ** 2 - margin**2 if cosine > left else 0.0
    negative_map = QuadraticMap(negative_goal=goal, negative_weight=weight)
    assert applied(negative_map, margin, cosine)[0] == pytest.approx(expected, abs=1e-13)


@FEW
@given(cosine=COSINES)
def test_curricularface_lets_hard_negatives_count_more(cosine: float) -> None:
    """Hard: above the own cosine after the margin, 0.2; t already holds the batch: 0.01 mean + 0.99 t."""
    value, slope = applied(CurricularMap(), 0.5, cosine)
    t = 0.01 * (0.1 + 0.5 + 0.9) / 3 + 0.99 * 0.4
    is_hard = cosine > 0.2
    assert value == pytest.approx(cosine * (t + cosine) if is_hard else cosine, abs=1e-14)
    assert slope == pytest.approx(t + 2 * cosine if is_hard else 1.0, abs=1e-14)


def test_the_border_of_curricularface_is_each_samples_own() -> None:
    transform = CurricularMap().bind(POSITIVES, 0.5)
    assert transform is not None
    cosines = double(0.05, 0.4, 0.7).expand(3, 3).clone()
    assert (transform(cosines)[0] != cosines).tolist() == [
        [True, True, True],
        [False, True, True],
        [False] * 2 + [True],
    ]


def test_the_state_of_curricularface_is_a_running_mean_of_the_positive_cosines() -> None:
    curricular, batches = CurricularMap(momentum=0.1), (double(0.2, 0.4), double(-0.6, 0.8))
    assert curricular.initial_state == 0.0
    state = torch.tensor(curricular.initial_state, dtype=torch.float64)
    for cosines in batches:
        state = curricular.next_state(Positives(cosines, cosines - 0.3, state))
    assert float(state) == pytest.approx(0.9 * (0.1 * 0.3) + 0.1 * 0.1)
    assert [name for name in NEGATIVE_MAPS.names() if NEGATIVE_MAPS.find(name).initial_state is not None] == [
        "curricular"
    ]
    assert QuadraticMap().next_state(POSITIVES) is POSITIVES.state


@pytest.mark.parametrize("name", NEGATIVE_MAPS.names())
@pytest.mark.parametrize("margin", [0.0, 0.25, 0.9])
@pytest.mark.parametrize("goal", [-0.3, 0.0, 0.3, 1.2, 2.5])
def test_the_largest_value_is_the_one_declared(name: str, margin: float, goal: float) -> None:
    """It decides whether float32 holds the exponentials. Each is attained, the curricular map's at z = t = 1."""
    negative_map = NEGATIVE_MAPS.build(name, {"negative_goal": goal})
    transform = negative_map.bind(Positives(double(1.0), double(-0.2), torch.tensor(1.0, dtype=torch.float64)), margin)
    cosines = torch.linspace(-1, 1, 2001, dtype=torch.float64)[None]
    values = cosines if transform is None else transform(cosines)[0]
    assert float(values.max()) == pytest.approx(negative_map.largest(margin), abs=1e-12)


# --- the filter -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", [None, QuadraticMap().bind(None, 0.25)])
def test_the_filter_drops_negatives_above_the_threshold_and_no_other(inner: Transform | None) -> None:
    cosines = double(-0.9, 0.1, 0.4, 0.400001, 0.99)[None]
    mapped, slopes = filtered(inner, 0.4)(cosines)
    before, slopes_before = (cosines, None) if inner is None else inner(cosines)
    assert mapped[0, 3:].tolist() == [-math.inf, -math.inf]
    assert torch.equal(mapped[0, :3], before[0, :3])
    assert (slopes is None) == (slopes_before is None)
    if slopes is not None:
        assert torch.equal(slopes, slopes_before)
        assert bool(torch.isfinite(slopes * mapped.exp()).all())


def test_the_filter_takes_terms_of_their_own_out_with_all_derivatives() -> None:
    cosines, bias = double(-0.9, 0.4, 0.401, 0.99)[None], torch.tensor(2.0, dtype=torch.float64)
    function = UniFace().negative_function(Values(scale=16.0), bias)
    assert function is not None
    for kept, dropped in zip(function(cosines), filtered_function(function, 0.4)(cosines), strict=True):
        assert dropped[0, 2:].tolist() == [0.0, 0.0]
        assert torch.equal(dropped[0, :2], kept[0, :2])
        assert float(kept.abs().min()) > 0


def test_an_unknown_map_is_refused_with_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match=r"classifier.negative_map 'quadratics' does not exist; did you mean 'quadratic'"
    ):
        NEGATIVE_MAPS.build("quadratics")
