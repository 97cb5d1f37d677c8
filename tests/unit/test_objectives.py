"""Objectives: derivatives by finite differences, formulas written again from the papers, biases and end points."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megaclass.objectives import OBJECTIVES
from megaclass.objectives.d_softmax import DSoftmax
from megaclass.objectives.objective import Objective, Values
from megaclass.objectives.sface import SFace
from megaclass.objectives.softmax import Softmax
from megaclass.objectives.sphereface2 import SphereFace2
from megaclass.objectives.uniface import UniFace
from tests.support.slopes import numeric_slope

VALUES = Values(scale=19.0, margin=0.3, end_point=0.7, sampling_rate=0.25)
SUMS = ("sface", "sphereface2", "uniface")
COSINES = st.floats(-0.99, 0.99)
BIASES = st.floats(-12.0, 12.0)
FEW = settings(max_examples=40, deadline=None)


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def log_one_plus_exp(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def logistic(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


def bias_of(objective: Objective, value: float) -> Tensor | None:
    has_bias = objective.initial_bias(VALUES, 13) is not None
    return torch.tensor(value, dtype=torch.float64) if has_bias else None


# --- derivatives ------------------------------------------------------------------------------------------------------


# SFace's holds its factor constant: its derivative is compared with the paper's below.
@pytest.mark.parametrize("name", [name for name in OBJECTIVES.names() if name != "sface"])
@FEW
@given(logit=st.floats(-40, 40), bias=BIASES)
def test_intra_is_differentiated_truly(name: str, logit: float, bias: float) -> None:
    objective = OBJECTIVES.build(name)
    x, b = double(logit).requires_grad_(), bias_of(objective, bias)
    if b is not None:
        b.requires_grad_()
    value = objective.intra(x, VALUES, b)
    if value.requires_grad:  # softmax has nothing there
        value.sum().backward()
    numeric = numeric_slope(lambda at: float(objective.intra(double(at), VALUES, bias_of(objective, bias))), logit)
    assert math.isclose(0.0 if x.grad is None else float(x.grad), numeric, rel_tol=1e-6, abs_tol=1e-8)
    if b is not None:
        numeric = numeric_slope(lambda at: float(objective.intra(double(logit), VALUES, bias_of(objective, at))), bias)
        assert math.isclose(float(b.grad), numeric, rel_tol=1e-6, abs_tol=1e-8)


@pytest.mark.parametrize("name", OBJECTIVES.names())
@FEW
@given(total=st.floats(-30, 60), logit=st.floats(-40, 40))
def test_inter_is_differentiated_truly(name: str, total: float, logit: float) -> None:
    objective = OBJECTIVES.build(name)
    x, z = double(total).requires_grad_(), double(logit).requires_grad_()
    objective.inter(x, z if objective.needs_positive else None, VALUES).sum().backward()
    numeric = numeric_slope(lambda at: float(objective.inter(double(at), double(logit), VALUES)), total)
    assert math.isclose(float(x.grad), numeric, rel_tol=1e-6, abs_tol=1e-8)
    if objective.needs_positive:
        numeric = numeric_slope(lambda at: float(objective.inter(double(total), double(at), VALUES)), logit)
        assert math.isclose(float(z.grad), numeric, rel_tol=1e-6, abs_tol=1e-8)


@pytest.mark.parametrize("name", [name for name in SUMS if name != "sface"])
@FEW
@given(cosine=COSINES, bias=BIASES)
def test_terms_of_negatives_are_differentiated_truly(name: str, cosine: float, bias: float) -> None:
    objective = OBJECTIVES.build(name)

    def terms(at: float, bias: float) -> list[float]:
        function = objective.negative_function(VALUES, bias_of(objective, bias))
        assert function is not None
        return [float(x) for x in function(double(at)[None])]

    _, slope, bias_slope = terms(cosine, bias)
    numeric = numeric_slope(lambda at: terms(at, bias)[0], cosine)
    assert math.isclose(slope, numeric, rel_tol=1e-6, abs_tol=1e-7)
    numeric = numeric_slope(lambda at: terms(cosine, at)[0], bias)
    assert math.isclose(bias_slope, numeric, rel_tol=1e-6, abs_tol=1e-8)


def test_the_objectives_that_are_sums_are_those_with_a_function_of_their_own() -> None:
    for name in OBJECTIVES.names():
        objective = OBJECTIVES.build(name)
        function = objective.negative_function(VALUES, bias_of(objective, 0.5))
        assert (function is None) == objective.is_exponential == (name not in SUMS), name


# --- formulas ---------------------------------------------------------------------------------------------------------


@FEW
@given(own=COSINES, others=st.lists(COSINES, min_size=1, max_size=7))
def test_softmax_is_the_cross_entropy(own: float, others: list[float]) -> None:
    total = math.log(sum(math.exp(VALUES.scale * z) for z in others))
    value = Softmax().inter(double(total), double(VALUES.scale * own), VALUES)
    logits = VALUES.scale * double(own, *others)
    expected = torch.nn.functional.cross_entropy(logits[None], torch.tensor([0]))
    torch.testing.assert_close(value[0], expected, rtol=1e-11, atol=1e-14)
    assert float(Softmax().intra(double(own), VALUES, None)) == 0.0


@FEW
@given(own=COSINES, others=st.lists(COSINES, min_size=1, max_size=7))
def test_d_softmax_is_the_formula_of_the_paper(own: float, others: list[float]) -> None:
    s, d = VALUES.scale, VALUES.end_point
    mass = sum(math.exp(s * z) for z in others)
    intra = float(DSoftmax().intra(double(s * own), VALUES, None))
    inter = float(DSoftmax().inter(double(math.log(mass)), None, VALUES))
    assert math.isclose(intra, math.log1p(math.exp(s * d) / math.exp(s * own)), rel_tol=1e-12)
    assert math.isclose(inter, math.log1p(mass), rel_tol=1e-12)


def test_epsilon_is_the_exponential_of_the_end_point() -> None:
    """A public implementation uses s*d itself, 27 instead of 5e11 at s = 30, d = 0.9."""
    intra = float(DSoftmax().intra(double(0.0), Values(scale=30.0, end_point=0.9), None))
    assert math.isclose(intra, math.log1p(math.exp(27.0)), rel_tol=1e-14)
    assert abs(intra - math.log1p(27.0)) > 23


def test_the_pull_of_d_softmax_is_half_its_strength_at_the_end_point() -> None:
    cosine = double(0.9).requires_grad_()
    DSoftmax().intra(32.0 * cosine, Values(scale=32.0, end_point=0.9), None).sum().backward()
    assert math.isclose(float(cosine.grad), -16.0, rel_tol=1e-12)


@FEW
@given(lse=st.floats(-20, 60), logit=st.floats(-40, 40))
def test_softmax_is_the_intra_term_with_a_moving_end_point(lse: float, logit: float) -> None:
    """Put epsilon = M, that is d = N / s: the identity the dissection starts from."""
    moved = Values(scale=VALUES.scale, end_point=lse / VALUES.scale)
    intra = DSoftmax().intra(double(logit), moved, None)
    torch.testing.assert_close(intra, Softmax().inter(double(lse), double(logit), VALUES), rtol=1e-11, atol=1e-13)


@FEW
@given(cosine=COSINES, bias=BIASES)
def test_sphereface2_is_the_formula_of_the_paper(cosine: float, bias: float) -> None:
    share, weight, t, r, m = 0.6, 41.0, 2.5, VALUES.scale, VALUES.margin
    objective = SphereFace2(positive_share=share, loss_weight=weight, exponent=t)
    g = 2 * ((cosine + 1) / 2) ** t - 1
    intra = objective.intra(double(r * (g - m)), VALUES, double(bias))
    expected = weight * share / r * log_one_plus_exp(-(r * (g - m) + bias))
    assert math.isclose(float(intra), expected, rel_tol=1e-11)
    function = objective.negative_function(VALUES, torch.tensor(bias, dtype=torch.float64))
    assert function is not None
    value = objective.inter(function(double(cosine)[None])[0].sum(dim=1), None, VALUES)
    expected = weight * (1 - share) / r * log_one_plus_exp(r * (g + m) + bias)
    assert math.isclose(float(value), expected, rel_tol=1e-11)


@FEW
@given(cosine=COSINES, bias=BIASES)
def test_uniface_is_the_formula_of_the_paper(cosine: float, bias: float) -> None:
    s, m = VALUES.scale, VALUES.margin
    objective, b = UniFace(negative_share=0.7), torch.tensor(bias, dtype=torch.float64)
    intra = objective.intra(double(s * (cosine - m)), VALUES, b)
    assert math.isclose(float(intra), log_one_plus_exp(-(s * (cosine - m) - bias)), rel_tol=1e-11)
    function = objective.negative_function(VALUES, b)
    assert function is not None
    inter = objective.inter(function(double(cosine)[None])[0].sum(dim=1), None, VALUES)
    assert math.isclose(float(inter), 0.7 * log_one_plus_exp(s * cosine - bias), rel_tol=1e-11)


@FEW
@given(cosine=COSINES)
def test_sface_holds_its_factors_constant(cosine: float) -> None:
    """Value and derivative of the paper: a linear function of the cosine with a factor from the angle."""
    k, a, b, s = 60.0, 0.9, 1.1, VALUES.scale
    objective, theta = SFace(steepness=k, intra_angle=a, inter_angle=b), math.acos(cosine)
    x = double(cosine).requires_grad_()
    value = objective.intra(s * x, VALUES, None)
    value.sum().backward()
    factor = logistic(k * (theta - a))
    assert math.isclose(float(value.detach()), -factor * s * cosine, rel_tol=1e-9, abs_tol=1e-12)
    assert math.isclose(float(x.grad), -factor * s, rel_tol=1e-9, abs_tol=1e-12)
    function = objective.negative_function(VALUES, None)
    assert function is not None
    term, slope, bias_slope = function(double(cosine)[None])
    factor = logistic(-k * (theta - b))
    assert math.isclose(float(term), factor * s * cosine, rel_tol=1e-9, abs_tol=1e-12)
    assert math.isclose(float(slope), factor * s, rel_tol=1e-9, abs_tol=1e-12)
    assert bias_slope is None
    assert float(objective.inter(double(3.7), None, VALUES)) == 3.7


# --- where a bias begins ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_classes", [2, 3, 13, 10_000_019])
@pytest.mark.parametrize(("scale", "margin"), [(40.0, 0.4), (64.0, 0.9), (8.0, 0.0)])
@pytest.mark.parametrize("rate", [1.0, 1 / 16])
def test_the_bias_of_sphereface2_begins_where_the_loss_has_no_slope(
    num_classes: int, scale: float, margin: float, rate: float
) -> None:
    """Positive and all drawn negatives at cosine 0; with few classes the plain root formula cancels to nothing."""
    values = Values(scale=scale, margin=margin, sampling_rate=rate)
    objective = SphereFace2()
    start = objective.initial_bias(values, num_classes)
    bias = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    at_zero = 2 * 0.5**3 - 1
    pull = objective.intra(double(scale * (at_zero - margin)), values, bias)
    (slope,) = torch.autograd.grad(pull.sum(), bias)
    function = objective.negative_function(values, bias.detach())
    assert function is not None
    _, _, bias_slope = function(double(0.0)[None])
    assert bias_slope is not None
    push = max(1.0, rate * (num_classes - 1)) * objective.inter(bias_slope.sum(dim=1), None, values)
    assert float(slope) < 0 < float(push)
    assert math.isclose(float(push), -float(slope), rel_tol=1e-9)


@pytest.mark.parametrize(("rate", "num_classes", "drawn"), [(1.0, 13, 13), (0.25, 1004, 251), (0.01, 13, 1)])
def test_the_bias_of_uniface_begins_at_the_logarithm_of_ten_times_the_negatives(
    rate: float, num_classes: int, drawn: int
) -> None:
    start = UniFace().initial_bias(Values(scale=64.0, sampling_rate=rate), num_classes)
    assert math.isclose(start, math.log(10 * drawn), rel_tol=1e-12)


def test_losses_without_a_bias_begin_with_none() -> None:
    assert [name for name in OBJECTIVES.names() if OBJECTIVES.build(name).initial_bias(VALUES, 13) is not None] == [
        "sphereface2", "uniface",
    ]  # fmt: skip


# --- the end point ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in OBJECTIVES.names() if name != "sface"])
def test_the_pull_is_half_its_strength_at_the_reported_end_point(name: str) -> None:
    objective, sums = OBJECTIVES.build(name), double(3.0, 11.0)
    bias = bias_of(objective, 2.5)

    def pull(logits: Tensor) -> Tensor:
        z = logits.clone().requires_grad_()
        total = objective.intra(z, VALUES, bias)
        total = total + objective.inter(sums, z if objective.needs_positive else None, VALUES)
        return torch.autograd.grad(total.sum(), z)[0]

    ends = objective.end_point(sums, VALUES, bias).expand(2)
    torch.testing.assert_close(pull(ends), 0.5 * pull(torch.full_like(ends, -400.0)), rtol=1e-9, atol=0)


def test_the_pull_of_sface_is_half_its_strength_at_its_angle() -> None:
    objective = SFace()
    end = objective.end_point(double(0.0), VALUES, None)
    assert math.isclose(float(objective.intra(end[None], VALUES, None) / end), -0.5, rel_tol=1e-9)
