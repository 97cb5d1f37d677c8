"""Objectives, margins and presets: formulas, derivatives by finite differences, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megaclass import objectives
from megaclass.errors import ConfigError
from megaclass.objectives import margins, presets
from megaclass.objectives.d_softmax import DSoftmax
from megaclass.objectives.softmax import Softmax


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_epsilon_is_the_exponential_of_the_end_point() -> None:
    """A public implementation uses s*d itself, 27 instead of 5e11 at s = 30, d = 0.9."""
    loss = DSoftmax(end_point=0.9).intra(double(0.0), 30.0)
    assert math.isclose(float(loss), math.log1p(math.exp(27.0)), rel_tol=1e-14)


def test_intra_is_one_half_pull_at_the_end_point() -> None:
    cosine = double(0.9).requires_grad_()
    DSoftmax(end_point=0.9).intra(32.0 * cosine, 32.0).sum().backward()
    assert math.isclose(float(cosine.grad), -16.0, rel_tol=1e-12)


def test_softmax_is_the_intra_term_with_a_moving_end_point() -> None:
    """Put epsilon = M: the identity the dissection starts from."""
    scale, lse, positive = 32.0, double(13.6), double(20.0)
    moved = DSoftmax(end_point=float(lse) / scale).intra(positive, scale)
    assert torch.allclose(moved, Softmax().inter(lse, positive), rtol=1e-12)


@pytest.mark.parametrize("negative_lse", [-math.inf, -50.0, 0.0, 30.0, 250.0])
def test_losses_never_saturate(negative_lse: float) -> None:
    lse, positive = double(negative_lse), double(-64.0)
    softmax = float(Softmax().inter(lse, positive))
    assert math.isclose(softmax, max(negative_lse + 64.0, 0.0) + math.log1p(math.exp(-abs(negative_lse + 64.0))))
    assert float(DSoftmax().inter(lse, None)) >= max(negative_lse, 0.0)


def test_no_negative_costs_nothing_and_has_no_gradient() -> None:
    lse = double(-math.inf).requires_grad_()
    loss = DSoftmax().inter(lse, None)
    loss.sum().backward()
    assert float(loss.detach()) == 0.0
    assert float(lse.grad) == 0.0


MARGINS = [("none", 0.0), ("cosine", 0.35), ("angle", 0.5), ("angle", 0.0), ("angle", 1.2)]


@pytest.mark.parametrize(("name", "size"), MARGINS)
@given(cosine=st.floats(-0.999, 0.999))
def test_margins_are_differentiated_truly(name: str, size: float, cosine: float) -> None:
    seam = -math.cos(size)
    if name == "angle" and abs(cosine - seam) < 1e-3:
        return  # the function jumps down there
    margin = margins.build(name, size)
    x = double(cosine).requires_grad_()
    margin(x).sum().backward()
    step = 1e-6 * (1 - cosine * cosine)
    numeric = float(margin(double(cosine + step)) - margin(double(cosine - step))) / (2 * step)
    assert math.isclose(float(x.grad), numeric, rel_tol=1e-5, abs_tol=1e-6)


def test_arcface_derivative_is_not_the_straight_through_one() -> None:
    """The factors sin(theta + m) / sin(theta) that the public peer replaces by 1."""
    x = double(-0.01, 0.63, -0.33, 0.66).requires_grad_()
    margins.additive_angle(x, 0.5).sum().backward()
    theta = torch.arccos(x.detach())
    assert torch.allclose(x.grad, torch.sin(theta + 0.5) / torch.sin(theta), rtol=1e-10)
    assert float((x.grad - 1).abs().min()) > 0.1


@pytest.mark.parametrize("size", [0.1, 0.5, 1.5])
def test_arcface_is_monotone_over_the_whole_range(size: float) -> None:
    """Without the guard past pi - m the logit would rise from cos -0.95 to cos -0.999."""
    cosines = torch.linspace(-1, 1, 20001, dtype=torch.float64)
    assert bool((margins.additive_angle(cosines, size).diff() >= 0).all())


def test_arcface_is_finite_at_both_ends() -> None:
    x = torch.tensor([-1.0, 1.0, 1.0000001], requires_grad=True)
    margins.additive_angle(x, 0.5).sum().backward()
    assert bool(torch.isfinite(x.grad).all())


def test_margin_out_of_range_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"classifier.margin 1.5 is outside \[0, 1\] \(in cosine\)"):
        margins.build("cosine", 1.5)


def test_unknown_names_suggest_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'd-softmax'"):
        objectives.build("d-sofmax")
    with pytest.raises(ConfigError, match="did you mean 'partial-fc'"):
        presets.resolve("partialfc")


def test_options_that_mean_nothing_for_a_preset_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"classifier.end_point 0.8 means nothing for preset 'arcface'.*d-softmax-k"):
        presets.resolve("arcface", end_point=0.8)
    with pytest.raises(ConfigError, match="cannot be turned off for 'partial-fc'"):
        presets.resolve("partial-fc", batch_positives=False)
    assert presets.resolve("d-softmax-k", sampling_rate=0.25, end_point=None).sampling_rate == 0.25


def test_unsafe_scale_is_refused_with_the_largest_safe_one() -> None:
    presets.check_exponents(64.0, 10_000_000)
    with pytest.raises(ConfigError, match=r"classifier.scale 80.0 is unsafe for 10000000 classes.*scale < 71.9"):
        presets.check_exponents(80.0, 10_000_000)
