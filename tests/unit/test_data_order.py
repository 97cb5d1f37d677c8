from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaclass.data.order import SampleOrder, rank_positions


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**63 - 1), st.integers(0, 10**6))
def test_every_epoch_is_a_permutation(num_samples: int, seed: int, epoch: int) -> None:
    ids = SampleOrder(num_samples, seed).sample_ids(np.arange(num_samples) + epoch * num_samples)
    assert np.array_equal(np.sort(ids), np.arange(num_samples))


@pytest.mark.parametrize("num_samples", [1, 2, 3, 255, 256, 257, 65_536, 65_537])
def test_permutations_at_the_edges_of_powers_of_two(num_samples: int) -> None:
    ids = SampleOrder(num_samples, 1).sample_ids(np.arange(num_samples))
    assert np.array_equal(np.sort(ids), np.arange(num_samples))


def test_a_position_does_not_depend_on_the_others_asked_for() -> None:
    order = SampleOrder(101, 5)
    every = order.sample_ids(np.arange(500))
    some = np.array([499, 3, 3, 100, 101])
    assert np.array_equal(order.sample_ids(some), every[some])


def test_epochs_and_seeds_differ() -> None:
    order = SampleOrder(1000, 5)
    ids = order.sample_ids(np.arange(3000)).reshape(3, 1000)
    # Two random permutations agree in about one place.
    assert (ids[0] == ids[1]).sum() < 10
    assert (ids[1] == ids[2]).sum() < 10
    assert (ids[0] == SampleOrder(1000, 6).sample_ids(np.arange(1000))).sum() < 10
    assert (ids[0] == np.arange(1000)).sum() < 10
    assert order.visits(np.array([0, 999, 1000, 2999]))[1].tolist() == [0, 0, 1, 2]


def test_all_permutations_of_five_are_equally_likely() -> None:
    num_epochs = 24_000
    ids = SampleOrder(5, 9).sample_ids(np.arange(num_epochs * 5)).reshape(num_epochs, 5)
    _, counts = np.unique(ids, axis=0, return_counts=True)
    expected = num_epochs / math.factorial(5)
    # 119 degrees of freedom: 119 +- 15.
    assert len(counts) == 120
    assert ((counts - expected) ** 2 / expected).sum() < 190


def test_neighbours_are_not_kept_together() -> None:
    ids = SampleOrder(10_000, 2).sample_ids(np.arange(10_000))
    assert abs(np.corrcoef(ids[:-1], ids[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(np.arange(10_000), ids)[0, 1]) < 0.05
    assert (np.abs(np.diff(ids)) == 1).sum() < 15


def test_without_shuffle_manifest_order() -> None:
    order = SampleOrder(5, 0, shuffle=False)
    assert order.sample_ids(np.arange(3, 12)).tolist() == [3, 4, 0, 1, 2, 3, 4, 0, 1]


@given(st.sampled_from([1, 2, 3, 4, 6, 12]), st.sampled_from([1, 2, 3]), st.integers(0, 10**9))
def test_a_micro_batch_is_the_same_block_at_every_world_size(world_size: int, accumulation: int, step: int) -> None:
    global_batch = 72
    batch_size = global_batch // (world_size * accumulation)
    for number in range(accumulation):
        start = step * global_batch + number * batch_size * world_size
        parts = [rank_positions(start, batch_size, rank, world_size) for rank in range(world_size)]
        first = step * global_batch + number * (global_batch // accumulation)
        assert np.concatenate(parts).tolist() == list(range(first, first + global_batch // accumulation))
