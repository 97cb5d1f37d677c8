"""What a margin knows of the samples: lengths of embeddings, random numbers, a size for each."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megaclass import counter
from megaclass.objectives import MARGINS
from megaclass.objectives.margin import Facts
from tests.support.slopes import numeric_slope

KEY = counter.stream_key(3, counter.STREAM_MARGIN, 11)
NORMS = torch.tensor([21.0, 3.0, 77.0], dtype=torch.float64)
FEW = settings(max_examples=40, deadline=None)


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_adaface_uses_the_statistics_of_the_batch() -> None:
    """Lengths are clipped to [0.001, 100]; the deviation is the unbiased one; q is clipped to [-1, 1]."""
    raw, cosines = [0.0, 9.0, 30.0, 250.0], double(0.4, -0.6, 0.8, 0.1)
    clipped = [0.001, 9.0, 30.0, 100.0]
    mean = sum(clipped) / 4
    std = math.sqrt(sum((norm - mean) ** 2 for norm in clipped) / 3)
    for concentration in (0.333, 5.0):
        margin = MARGINS.build("adaface", {"concentration": concentration})
        found = margin(cosines, double(0.4), Facts(double(*raw)))
        for cosine, norm, adjusted in zip(cosines.tolist(), clipped, found.tolist(), strict=True):
            q = min(1.0, max(-1.0, concentration * (norm - mean) / (std + 0.001)))
            expected = math.cos(math.acos(cosine) - 0.4 * q) - (0.4 + 0.4 * q)
            assert adjusted == pytest.approx(expected, abs=1e-12)


def test_adaface_keeps_the_angle_between_zero_and_pi() -> None:
    norms = double(1.0, 99.0)
    adjusted = MARGINS.build("adaface", {"concentration": 9.0})(double(-0.99, 0.99), double(0.4), Facts(norms))
    assert adjusted.tolist() == pytest.approx([-1.0, 1.0 - 0.8])


def test_adaface_with_one_sample_has_quality_zero_and_no_gradient_in_the_length() -> None:
    norm, cosine = double(37.0).requires_grad_(), double(0.3).requires_grad_()
    adjusted = MARGINS.build("adaface")(cosine, double(0.4), Facts(norm))
    assert float(adjusted.detach()) == pytest.approx(0.3 - 0.4)
    adjusted.sum().backward()
    assert norm.grad is None


@FEW
@given(cosine=st.floats(-0.6, 0.99), norm=st.floats(0.5, 200))
def test_magface_moves_the_margin_with_the_length_and_rewards_length(cosine: float, norm: float) -> None:
    hyper = {"largest_margin": 0.7, "smallest_norm": 5.0, "largest_norm": 90.0, "norm_weight": 20.0}
    margin, length = MARGINS.build("magface", hyper), min(90.0, max(5.0, norm))
    size = 0.3 + (0.7 - 0.3) * (length - 5) / (90 - 5)
    facts = Facts(double(norm))
    adjusted = margin(double(cosine), double(0.3), facts)
    assert float(adjusted) == pytest.approx(math.cos(math.acos(cosine) + size), abs=1e-12)
    penalty = margin.penalty(facts)
    assert penalty is not None
    assert float(penalty) == pytest.approx(20.0 * (1 / length + length / 90**2), rel=1e-12)
    assert float(penalty) >= 20.0 * 2 / 90 - 1e-12  # smallest at the largest length


@FEW
@given(norm=st.floats(11, 109), cosine=st.floats(-0.6, 0.999))
def test_magface_is_differentiated_in_the_length_too(norm: float, cosine: float) -> None:
    margin = MARGINS.build("magface")

    def total(length: Tensor) -> Tensor:
        facts = Facts(length)
        penalty = margin.penalty(facts)
        assert penalty is not None
        return margin(double(cosine), double(0.45), facts) + penalty

    length = double(norm).requires_grad_()
    total(length).sum().backward()
    numeric = numeric_slope(lambda at: float(total(double(at))), norm, step=1e-4)
    assert math.isclose(float(length.grad), numeric, rel_tol=1e-5, abs_tol=1e-7)


def test_only_magface_has_a_loss_of_the_samples_own() -> None:
    facts = Facts(NORMS, KEY)
    assert [name for name in MARGINS.names() if MARGINS.build(name).penalty(facts) is not None] == ["magface"]


@pytest.mark.parametrize(("name", "plain"), [("elastic-angle", "angle"), ("elastic-cosine", "cosine")])
def test_elasticface_draws_margins_around_the_size(name: str, plain: str) -> None:
    """Read back from the adjusted cosine: normal with the given deviation, and equal when replayed."""
    cosines = torch.full((40_001,), 0.5, dtype=torch.float64)
    margin = MARGINS.build(name, {"deviation": 0.02})
    adjusted = margin(cosines, double(0.4), Facts(key=KEY))
    drawn = torch.arccos(adjusted) - math.acos(0.5) if plain == "angle" else cosines - adjusted
    assert abs(float(drawn.mean()) - 0.4) < 5 * 0.02 / 200
    assert float(drawn.std()) == pytest.approx(0.02, rel=5 / math.sqrt(2 * 40_000))
    assert float(((drawn - 0.4).abs() < 0.02).double().mean()) == pytest.approx(0.6827, abs=5 * 0.0024)
    assert torch.equal(margin(cosines, double(0.4), Facts(key=KEY)), adjusted)
    other = margin(cosines, double(0.4), Facts(key=counter.stream_key(3, counter.STREAM_MARGIN, 12)))
    assert abs(float(torch.corrcoef(torch.stack([adjusted, other]))[0, 1])) < 5 / 200
    # A sample's margin depends on its place in the global batch alone, not on how many there are.
    assert torch.equal(margin(cosines[:7], double(0.4), Facts(key=KEY)), adjusted[:7])
    fixed = MARGINS.build(name, {"deviation": 0.0})(cosines[:7], double(0.4), Facts(key=KEY))
    torch.testing.assert_close(fixed, MARGINS.build(plain)(cosines[:7], double(0.4), Facts()), rtol=0, atol=0)


@pytest.mark.parametrize("name", MARGINS.names())
def test_each_sample_may_have_a_size_of_its_own(name: str) -> None:
    """What per-class margins need."""
    margin, facts, cosines = MARGINS.build(name), Facts(NORMS, KEY), double(0.7, -0.2, 0.1)
    together = margin(cosines, double(0.5, 0.2, 0.0), facts)
    alone = [margin(cosines, double(size), facts)[place] for place, size in enumerate((0.5, 0.2, 0.0))]
    assert together.tolist() == [float(x) for x in alone]


def test_margins_say_what_they_need() -> None:
    kinds = {name: MARGINS.find(name) for name in MARGINS.names()}
    assert {name for name, kind in kinds.items() if kind.needs_norm} == {"adaface", "magface"}
    assert {name for name, kind in kinds.items() if not kind.needs_angle} == {
        "none", "cosine", "elastic-cosine", "quadratic", "circle",
    }  # fmt: skip
