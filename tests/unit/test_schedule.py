"""Schedules: their ends, their shape, and what they promise between."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaclass.config import Optim
from megaclass.optim.schedule import base_rates, learning_rate_factor

SCHEDULES = ["constant", "cosine", "polynomial", "step"]


def _factors(total_steps, **options):
    optim = Optim(**options)
    return [learning_rate_factor(optim, step, total_steps) for step in range(total_steps)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_rises_linearly_to_one(schedule):
    factors = _factors(100, schedule=schedule, warmup_steps=9)
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[9] == 1.0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_warm_up_the_first_step_has_the_full_rate(schedule):
    assert _factors(10, schedule=schedule)[0] == 1.0


@pytest.mark.parametrize("schedule", ["cosine", "polynomial"])
@pytest.mark.parametrize("warmup_steps", [0, 7])
def test_the_last_step_has_the_final_fraction(schedule, warmup_steps):
    factors = _factors(50, schedule=schedule, warmup_steps=warmup_steps, final_fraction=0.05)
    assert factors[-1] == pytest.approx(0.05)
    assert all(later < earlier for earlier, later in pairwise(factors[warmup_steps:]))


def test_known_values():
    assert _factors(5, schedule="cosine") == pytest.approx([1, 0.8535533906, 0.5, 0.1464466094, 0], abs=1e-9)
    assert _factors(5, schedule="polynomial", power=2.0) == pytest.approx([1, 0.5625, 0.25, 0.0625, 0])
    assert _factors(5, schedule="polynomial", power=1.0, final_fraction=0.5) == pytest.approx(
        [1, 0.875, 0.75, 0.625, 0.5]
    )
    assert _factors(4, schedule="constant") == [1, 1, 1, 1]
    assert _factors(10, schedule="step", milestones=(0.5, 0.75), gamma=0.1) == pytest.approx(
        [1, 1, 1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01]
    )


@given(
    schedule=st.sampled_from(SCHEDULES),
    total_steps=st.integers(1, 300),
    warmup_share=st.floats(0, 0.99),
    final_fraction=st.floats(0, 1),
    power=st.floats(0.5, 4),
)
def test_factors_stay_in_range_and_smooth_ones_do_not_jump(schedule, total_steps, warmup_share, final_fraction, power):
    warmup_steps = int(total_steps * warmup_share)
    factors = _factors(
        total_steps, schedule=schedule, warmup_steps=warmup_steps, final_fraction=final_fraction, power=power
    )
    assert all(0 <= factor <= 1 for factor in factors)
    if schedule in ("constant", "cosine") or (schedule == "polynomial" and power >= 1):
        longest = max(1 / (warmup_steps + 1), 4 / max(1, total_steps - 1 - warmup_steps))
        assert all(abs(b - a) <= longest + 1e-9 for a, b in pairwise(factors))


def test_a_step_outside_the_run_is_caught():
    for step in (-1, 10):
        with pytest.raises(AssertionError):
            learning_rate_factor(Optim(), step, 10)


def test_base_rates_scale_with_the_batch_only_when_asked():
    assert base_rates(Optim(lr=0.1), 512) == (0.1, 0.1)
    assert base_rates(Optim(lr=0.1, class_lr=0.3), 512) == (0.1, 0.3)
    assert base_rates(Optim(lr=0.1, reference_batch_size=256), 512) == pytest.approx((0.2, 0.2))
    rates = base_rates(Optim(lr=0.1, class_lr=0.4, reference_batch_size=256), 64)
    assert (rates.backbone, rates.classes) == pytest.approx((0.025, 0.1))
