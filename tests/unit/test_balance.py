"""Per-class weights and margins from class counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megaclass.loss import Balance, balance
from megaclass.parallel.shard import ClassShard

COUNTS = np.array([1, 81, 16, 7, 2, 300, 16])
WHOLE = ClassShard(7, 0, 1)


def weights_of(counts: np.ndarray, power: float) -> np.ndarray:
    made = balance(counts, ClassShard(len(counts), 0, 1), weight_power=power, margin_power=0.0)
    assert made is not None
    assert made.margin_factors is None
    assert made.weights is not None
    return made.weights.numpy()


@settings(max_examples=50, deadline=None)
@given(counts=st.lists(st.integers(0, 10**6), min_size=1, max_size=9).filter(any), power=st.floats(0.01, 2))
def test_the_mean_weight_over_the_samples_is_one(counts: list[int], power: float) -> None:
    n = np.array(counts)
    assert (weights_of(n, power) * n).sum() == pytest.approx(n.sum(), rel=1e-10)


def test_power_one_lets_every_class_count_alike() -> None:
    np.testing.assert_allclose(weights_of(COUNTS, 1.0) * COUNTS, COUNTS.sum() / len(COUNTS), rtol=1e-12)


@pytest.mark.parametrize("power", [0.5, 1.0, 1.7])
def test_weights_fall_with_that_power_of_the_count(power: float) -> None:
    weights = weights_of(COUNTS, power)
    np.testing.assert_allclose(weights / weights[0], COUNTS**-power, rtol=1e-12)


@pytest.mark.parametrize("power", [0.25, 1.0])
def test_the_margin_of_the_rarest_class_is_the_given_one_and_falls_from_there(power: float) -> None:
    made = balance(COUNTS * 2, WHOLE, weight_power=0.0, margin_power=power)
    assert made is not None
    assert made.weights is None
    np.testing.assert_allclose(made.margin_factors.numpy(), COUNTS**-power, rtol=1e-12)


def test_a_class_without_samples_counts_as_one_with_one() -> None:
    made = balance(np.array([0, 1, 16]), ClassShard(3, 0, 1), weight_power=0.5, margin_power=0.25)
    assert made is not None
    assert float(made.weights[0]) == float(made.weights[1]) == pytest.approx(4 * float(made.weights[2]))
    assert made.margin_factors.tolist() == [1.0, 1.0, 0.5]


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_shards_hold_the_parts_of_the_whole(count: int) -> None:
    """Nine shards of seven classes: some are empty."""
    whole = balance(COUNTS, WHOLE, weight_power=0.7, margin_power=0.3)
    parts = [balance(COUNTS, ClassShard(7, index, count), weight_power=0.7, margin_power=0.3) for index in range(count)]
    assert torch.equal(torch.cat([part.weights for part in parts]), whole.weights)
    assert torch.equal(torch.cat([part.margin_factors for part in parts]), whole.margin_factors)


def test_without_powers_there_is_nothing_to_balance() -> None:
    assert balance(COUNTS, WHOLE, weight_power=0.0, margin_power=0.0) is None


def test_a_balance_takes_the_type_of_the_class_weights() -> None:
    moved = Balance(torch.ones(3, dtype=torch.float64), None).to(torch.zeros(1))
    assert moved.weights.dtype == torch.float32
    assert moved.margin_factors is None
