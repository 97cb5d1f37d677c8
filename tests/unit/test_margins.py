"""Margins: derivatives by finite differences, formulas written again from the papers, ranges."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from megaclass import counter
from megaclass.errors import ConfigError
from megaclass.objectives import MARGINS
from megaclass.objectives.margin import Facts, Margin, check_size, continued_cosine
from tests.support.slopes import numeric_slope

KEY = counter.stream_key(3, counter.STREAM_MARGIN, 11)
NORMS = torch.tensor([21.0, 3.0, 77.0], dtype=torch.float64)
HYPER = {"angle_factor": 1.3, "cosine_margin": 0.2, "positive_goal": 0.9, "positive_weight": 1.4, "exponent": 2.5}
# Their value and their derivative do not belong together, as their papers or their names say.
HELD_CONSTANT = {
    "angle-straight-through": lambda cosine, size: 1.0,
    "circle": lambda cosine, size: 1.0 + size - cosine,
}
FEW = settings(max_examples=40, deadline=None)
COSINES = st.floats(-0.999, 0.999)


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def value(margin: Margin, cosine: float, size: float, norm: float = 21.0) -> float:
    """The adjusted cosine of the first of three samples; two others make a batch of it."""
    facts = Facts(torch.cat([double(norm), NORMS[1:]]), KEY)
    return float(margin(double(cosine, 0.1, 0.2), double(size, 0.1, 0.1), facts)[0])


def slope(margin: Margin, cosine: float, size: float) -> float:
    x = double(cosine, 0.1, 0.2).requires_grad_()
    adjusted = margin(x, double(size, 0.1, 0.1), Facts(NORMS, KEY))[0]
    return float(torch.autograd.grad(adjusted, x)[0][0])


# --- derivatives ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in MARGINS.names() if name not in HELD_CONSTANT])
@FEW
@given(cosine=COSINES, share=st.floats(0, 1))
@example(cosine=-0.95, share=0.33)
def test_margins_are_differentiated_truly(name: str, cosine: float, share: float) -> None:
    margin = MARGINS.build(name, HYPER)
    size = share * margin.largest
    # Next to a seam of the formula the difference straddles both branches; `numeric_slope` leaves that out.
    numeric = numeric_slope(lambda at: value(margin, at, size), cosine, step=1e-6 * (1 - cosine * cosine) ** 1.5)
    assert math.isclose(slope(margin, cosine, size), numeric, rel_tol=1e-4, abs_tol=1e-5)


@pytest.mark.parametrize("name", HELD_CONSTANT)
@FEW
@given(cosine=COSINES, size=st.floats(0, 1))
def test_margins_that_hold_a_factor_constant_have_the_documented_derivative(
    name: str, cosine: float, size: float
) -> None:
    expected = HELD_CONSTANT[name](cosine, size)
    assert math.isclose(slope(MARGINS.build(name), cosine, size), expected, rel_tol=1e-12, abs_tol=1e-14)


@pytest.mark.parametrize("name", MARGINS.names())
def test_derivatives_are_finite_where_the_angle_ends(name: str) -> None:
    """Embeddings on their class weight or opposite to it, and a cosine that rounding has carried beyond one."""
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor([-1.0, 1.0, 1.0000001], dtype=dtype, requires_grad=True)
        MARGINS.build(name)(x, x.new_tensor(0.5), Facts(NORMS.to(dtype), KEY)).sum().backward()
        assert bool(torch.isfinite(x.grad).all())


# --- formulas ---------------------------------------------------------------------------------------------------------


@FEW
@given(cosine=COSINES, size=st.floats(0, 1))
def test_cosface_subtracts_in_cosine_and_none_does_nothing(cosine: float, size: float) -> None:
    assert value(MARGINS.build("cosine"), cosine, size) == pytest.approx(cosine - size, rel=1e-12, abs=1e-15)
    assert value(MARGINS.build("none"), cosine, size) == cosine


@pytest.mark.parametrize("name", ["angle", "angle-straight-through"])
@FEW
@given(cosine=COSINES, size=st.floats(0, math.pi / 2))
@example(cosine=-0.97, size=0.5)
def test_arcface_adds_to_the_angle_up_to_pi(name: str, cosine: float, size: float) -> None:
    theta = math.acos(cosine)
    assume(abs(theta + size - math.pi) > 1e-9)
    expected = math.cos(theta + size) if theta + size < math.pi else cosine - size * math.sin(size)
    assert value(MARGINS.build(name), cosine, size) == pytest.approx(expected, abs=1e-12)


def test_the_derivative_of_arcface_is_not_the_straight_through_one() -> None:
    """The factors sin(theta + m) / sin(theta) that public code replaces by 1."""
    x = double(-0.01, 0.63, -0.33, 0.66)
    theta = torch.arccos(x)
    true = torch.sin(theta + 0.5) / torch.sin(theta)
    found = double(*(slope(MARGINS.build("angle"), cosine, 0.5) for cosine in x.tolist()))
    torch.testing.assert_close(found, true, rtol=1e-10, atol=0)
    assert float((true - 1).abs().min()) > 0.1


@pytest.mark.parametrize("size", [0.1, 0.5, 1.5])
@pytest.mark.parametrize("name", ["angle", "combined", "sphereface", "cosine", "sphereface2"])
def test_margins_are_monotone_over_the_whole_range(name: str, size: float) -> None:
    """Without the guard past pi - m, cos(theta + m) would rise again for samples opposite to their class."""
    cosines = torch.linspace(-1, 1, 20001, dtype=torch.float64)
    assert float(torch.cos(torch.arccos(cosines) + size).diff().min()) < 0
    assert float(MARGINS.build(name, HYPER)(cosines, double(size), Facts()).diff().min()) >= 0


@FEW
@given(cosine=COSINES, size=st.floats(0, 1.5), m1=st.floats(0.5, 2), m3=st.floats(0, 0.5))
def test_the_combined_margin_really_combines_all_three(cosine: float, size: float, m1: float, m3: float) -> None:
    angle = m1 * math.acos(cosine) + size
    k = math.floor(angle / math.pi)
    margin = MARGINS.build("combined", {"angle_factor": m1, "cosine_margin": m3})
    expected = (-1) ** k * math.cos(angle) - 2 * k - m3
    assert value(margin, cosine, size) == pytest.approx(expected, abs=1e-9)
    if angle < math.pi:
        assert expected == pytest.approx(math.cos(angle) - m3, abs=1e-15)


@FEW
@given(cosine=COSINES, size=st.floats(0, 1))
def test_the_combined_margin_has_cosface_and_arcface_as_special_cases(cosine: float, size: float) -> None:
    cosface = MARGINS.build("combined", {"angle_factor": 1.0, "cosine_margin": size})
    assert value(cosface, cosine, 0.0) == pytest.approx(cosine - size, abs=1e-12)
    arcface = MARGINS.build("combined", {"angle_factor": 1.0, "cosine_margin": 0.0})
    if math.acos(cosine) + size < math.pi:  # beyond, each falls on in its own way
        assert value(arcface, cosine, size) == pytest.approx(value(MARGINS.build("angle"), cosine, size), abs=1e-12)


def test_the_continued_cosine_falls_without_a_jump() -> None:
    angles = torch.linspace(0, 4 * math.pi, 40001, dtype=torch.float64)
    steps = continued_cosine(angles).diff()
    assert float(steps.max()) <= 1e-14
    assert float(steps.min()) > -4e-4
    assert continued_cosine(double(0.0, math.pi, 2 * math.pi, 4 * math.pi)).tolist() == pytest.approx([1, -1, -3, -7])


@FEW
@given(cosine=COSINES, size=st.floats(0, 3))
def test_sphereface_is_the_psi_of_its_paper(cosine: float, size: float) -> None:
    """The size of the margin is m - 1."""
    angle = (1 + size) * math.acos(cosine)
    k = int(angle // math.pi)
    expected = (-1) ** k * math.cos(angle) - 2 * k
    assert value(MARGINS.build("sphereface"), cosine, size) == pytest.approx(expected, abs=1e-9)


@FEW
@given(cosine=COSINES, size=st.floats(0, 1), t=st.floats(1, 5))
def test_the_margin_of_sphereface2_is_that_of_its_paper(cosine: float, size: float, t: float) -> None:
    expected = 2 * ((cosine + 1) / 2) ** t - 1 - size
    assert value(MARGINS.build("sphereface2", {"exponent": t}), cosine, size) == pytest.approx(expected, abs=1e-12)


@FEW
@given(cosine=COSINES, size=st.floats(0, 1))
def test_circle_is_exactly_the_quadratic_margin_with_goal_and_weight_one(cosine: float, size: float) -> None:
    """Equal in value; in the gradient Circle loss holds alpha constant, which is one half of the truth at m = 0."""
    circle, quadratic = MARGINS.build("circle"), MARGINS.build("quadratic")
    assert value(circle, cosine, size) == pytest.approx(value(quadratic, cosine, size), abs=1e-14)
    alpha = 1 + size - cosine
    assert value(circle, cosine, size) == pytest.approx(alpha * (cosine - (1 - size)), abs=1e-14)
    assert slope(quadratic, cosine, size) == pytest.approx(2 * (1 - cosine), abs=1e-12)
    assert slope(circle, cosine, 0.0) == pytest.approx(slope(quadratic, cosine, 0.0) / 2, abs=1e-12)


@FEW
@given(cosine=COSINES, size=st.floats(0, 1), goal=st.floats(0.5, 1.5), weight=st.floats(0.1, 3))
def test_the_quadratic_margin_aims_at_its_goal(cosine: float, size: float, goal: float, weight: float) -> None:
    margin = MARGINS.build("quadratic", {"positive_goal": goal, "positive_weight": weight})
    assert value(margin, cosine, size) == pytest.approx(size**2 - weight * (cosine - goal) ** 2, abs=1e-12)
    assert value(margin, goal, size) >= value(margin, cosine, size)


# --- ranges -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("cosine", 1.5, r"classifier.margin 1.5 is outside \[0, 1\] \(in cosine\); usual are 0.3 to 0.5"),
        ("angle", 1.6, r"classifier.margin 1.6 is outside \[0, 1.571\] \(radians\)"),
        ("combined", -0.1, r"classifier.margin -0.1 is outside \[0, 1.571\] \(radians\)"),
        ("sphereface", 3.5, r"classifier.margin 3.5 is outside \[0, 3\] \(the factor of the angle, less one\)"),
        ("circle", math.nan, r"classifier.margin nan is outside \[0, 1\]"),
    ],
)
def test_a_margin_outside_its_range_is_refused(name: str, size: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_size(MARGINS.build(name), size)


@pytest.mark.parametrize("name", MARGINS.names())
def test_defaults_and_ends_of_the_range_are_allowed(name: str) -> None:
    margin = MARGINS.build(name)
    for size in (0.0, margin.default, margin.limit):
        if size is not None:
            check_size(margin, size)


def test_an_unknown_margin_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"classifier.margin_kind 'angel' does not exist; did you mean 'angle'"):
        MARGINS.build("angel")
