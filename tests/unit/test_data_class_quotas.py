"""How often each class comes in an epoch: exact to one, adding up, and even over epochs."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaclass.data.class_quotas import ClassQuotas

SIZES = st.lists(st.integers(1, 9) | st.integers(100, 3000), min_size=1, max_size=40)
BALANCES = st.sampled_from([0.01, 0.25, 0.5, 0.75, 1.0])


def quotas(sizes: list[int], balance: float, epoch: int, seed: int = 5) -> np.ndarray:
    """Visits of each class in an epoch, [classes]."""
    each = ClassQuotas(np.array(sizes), balance, seed)
    return each.visits_before(epoch + 1) - each.visits_before(epoch)


def shares(sizes: list[int], balance: float) -> np.ndarray:
    weights = np.array(sizes) ** (1 - balance)
    return sum(sizes) * weights / weights.sum()


@settings(max_examples=200, deadline=None)
@given(SIZES, BALANCES, st.integers(0, 2**63 - 1), st.integers(0, 500))
def test_the_quotas_of_an_epoch_add_up_and_are_the_shares_to_one(
    sizes: list[int], balance: float, seed: int, epoch: int
) -> None:
    found = quotas(sizes, balance, epoch, seed)
    assert found.sum() == sum(sizes)
    assert (np.abs(found - shares(sizes, balance)) < 1 + 1e-4).all()
    # At full balance, in exact numbers: all classes alike, to one.
    if balance == 1:
        share = Fraction(sum(sizes), len(sizes))
        assert set(found.tolist()) <= {share.numerator // share.denominator, -(-share.numerator // share.denominator)}


@settings(max_examples=100, deadline=None)
@given(SIZES, BALANCES, st.integers(0, 2**63 - 1), st.integers(1, 1000))
def test_over_epochs_no_class_falls_behind_its_share(
    sizes: list[int], balance: float, seed: int, num_epochs: int
) -> None:
    found = ClassQuotas(np.array(sizes), balance, seed).visits_before(num_epochs)
    assert found.sum() == num_epochs * sum(sizes)
    assert (np.abs(found - num_epochs * shares(sizes, balance)) < 5).all()


def test_equal_classes_get_what_they_have() -> None:
    for balance in (0.3, 1.0):
        assert quotas([7] * 13, balance, 4).tolist() == [7] * 13


def test_half_a_balance_is_the_square_root() -> None:
    # Weights 1, 2, 3 and 10 of 114 samples.
    assert quotas([1, 4, 9, 100], 0.5, 0).tolist() == pytest.approx([7.125, 14.25, 21.375, 71.25], abs=1)


def test_seeds_round_differently() -> None:
    one, other = (quotas([1, 2, 3, 5, 8] * 20, 1.0, 0, seed) for seed in (1, 2))
    assert not np.array_equal(one, other)
