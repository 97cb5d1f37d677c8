"""Orders by class: what comes how often, what stands together, and all of it from the position alone."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaclass.data.class_order import BalancedOrder, ClassBatchOrder, ClassMembers, dealt
from megaclass.data.class_quotas import ClassQuotas
from megaclass.data.counter import Stream, hash_counters
from megaclass.data.order import Order, RepeatedOrder, SampleOrder

# Classes without samples, of one, of a few, and of more than are sorted.
SIZES = st.lists(st.integers(0, 6) | st.integers(30, 90), min_size=1, max_size=25).filter(any)
SEEDS = st.integers(0, 2**63 - 1)


def mixed_labels(sizes: list[int]) -> np.ndarray:
    """Labels of samples that lie in no order."""
    return np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))


def visit_all(order: Order, count: int, start: int = 0) -> tuple[np.ndarray, np.ndarray]:
    return order.visits(np.arange(start, start + count))


def assert_pure(order: Order, again: Order, positions: list[int]) -> None:
    """Asked for in any company and by anyone, a position gives the same."""
    every = visit_all(order, max(positions) + 1)
    some = again.visits(np.array(positions))
    assert all(np.array_equal(found, one[positions]) for found, one in zip(some, every, strict=True))


def assert_visits_are_counted(ids: np.ndarray, visits: np.ndarray) -> None:
    """No sample has a visit twice."""
    assert len(np.unique(np.stack([ids, visits]), axis=1).T) == len(ids)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 80), st.integers(1, 80), SEEDS)
def test_what_is_dealt_is_even_and_no_hand_holds_one_twice(size: int, hand_size: int, seed: int) -> None:
    hand_size = min(hand_size, size)
    numbers = np.arange(5 * size * hand_size // math.gcd(size, hand_size))
    key = hash_counters(seed, Stream.DEAL, np.zeros(len(numbers)))
    members, before = dealt(numbers, np.full_like(numbers, size), np.full_like(numbers, hand_size), key)
    assert (np.bincount(members, minlength=size) == len(numbers) // size).all()
    for start in range(0, len(numbers), hand_size):
        assert len(set(members[start : start + hand_size].tolist())) == hand_size
        counts = np.bincount(members[: start + hand_size], minlength=size)
        assert counts.max() - counts.min() <= 1
    assert_visits_are_counted(members, before)
    assert before.max() == len(numbers) // size - 1


def test_all_deals_of_four_are_equally_likely() -> None:
    num_deals = 24_000
    numbers = np.arange(4 * num_deals)
    key = np.full(len(numbers), 77, np.uint64)
    members, _ = dealt(numbers, np.full_like(numbers, 4), np.full_like(numbers, 4), key)
    _, counts = np.unique(members.reshape(-1, 4), axis=0, return_counts=True)
    # 23 degrees of freedom: 23 +- 7.
    assert len(counts) == 24
    assert ((counts - num_deals / 24) ** 2 / (num_deals / 24)).sum() < 56


@settings(max_examples=100, deadline=None)
@given(SIZES, st.sampled_from([0.2, 0.5, 1.0]), SEEDS, st.integers(1, 6))
def test_a_balanced_epoch_holds_each_class_by_its_quota_and_its_samples_evenly(
    sizes: list[int], balance: float, seed: int, num_epochs: int
) -> None:
    labels = mixed_labels(sizes)
    order = BalancedOrder(ClassMembers(labels, seed), balance, seed)
    ids, visits = visit_all(order, num_epochs * len(labels))
    filled = np.flatnonzero(sizes)
    quotas = ClassQuotas(np.array(sizes)[filled], balance, seed)
    for epoch in range(1, num_epochs + 1):
        seen = ids[: epoch * len(labels)]
        assert np.array_equal(np.bincount(labels[seen], minlength=len(sizes))[filled], quotas.visits_before(epoch))
        counts = np.bincount(seen, minlength=len(labels))
        for label in filled:
            own = counts[labels == label]
            assert own.max() - own.min() <= 1
    assert_visits_are_counted(ids, visits)
    assert visits.max() == np.bincount(ids).max() - 1


@settings(max_examples=50, deadline=None)
@given(SIZES, SEEDS, st.data())
def test_a_balanced_position_does_not_depend_on_the_others_asked_for(
    sizes: list[int], seed: int, data: st.DataObject
) -> None:
    labels = mixed_labels(sizes)
    positions = data.draw(st.lists(st.integers(0, 4 * len(labels) - 1), min_size=1))
    one, again = (BalancedOrder(ClassMembers(labels, seed), 0.7, seed) for _ in range(2))
    assert_pure(one, again, positions)


def test_a_balanced_order_is_mixed_and_differs_by_epoch_and_seed() -> None:
    labels = mixed_labels([1, 2, 5, 400, 592])
    ids, _ = visit_all(BalancedOrder(ClassMembers(labels, 3), 1.0, 3), 3000)
    classes = labels[ids].reshape(3, 1000)
    assert (np.bincount(classes[0]) == 200).all()
    # Of independent classes a fifth agree: 200 +- 13.
    for one, two in ((classes[0], classes[1]), (classes[1], classes[2]), (classes[0, 1:], classes[0, :-1])):
        assert 140 < (one == two).sum() < 260
    other, _ = visit_all(BalancedOrder(ClassMembers(labels, 4), 1.0, 4), 1000)
    assert 140 < (labels[other] == classes[0]).sum() < 260


def test_a_class_is_as_likely_early_as_late() -> None:
    labels = mixed_labels([1, 3, 9, 27])
    ids, _ = visit_all(BalancedOrder(ClassMembers(labels, 3), 1.0, 3), 2000 * 40)
    classes = labels[ids].reshape(2000, 40)
    for label in range(4):
        places = np.array([np.flatnonzero(epoch == label).mean() for epoch in classes])
        assert abs(places.mean() - 19.5) < 4.5 * places.std() / math.sqrt(2000)


@settings(max_examples=200, deadline=None)
@given(SIZES, st.integers(1, 12), SEEDS, st.data())
def test_every_micro_batch_holds_distinct_classes_of_so_many_samples(
    sizes: list[int], samples_per_class: int, seed: int, data: st.DataObject
) -> None:
    labels = mixed_labels(sizes)
    filled = np.flatnonzero(sizes)
    num_together = data.draw(st.integers(1, len(filled)))
    size = num_together * samples_per_class
    order = ClassBatchOrder(ClassMembers(labels, seed), samples_per_class, size, seed)
    num_batches = 3 * len(filled)
    ids, visits = visit_all(order, num_batches * size)
    for batch in ids.reshape(num_batches, size):
        counts = np.bincount(labels[batch], minlength=len(sizes))
        assert set(counts.tolist()) <= {0, samples_per_class}
        for label in np.flatnonzero(counts):
            # Repeated only where there are too few, and then as evenly as can be.
            own = np.bincount(batch, minlength=len(labels))[labels == label]
            assert own.max() == -(-samples_per_class // sizes[label])
            assert own.min() == samples_per_class // sizes[label]
    assert_visits_are_counted(ids, visits)
    # Classes equally often, to one at the end of a hand and to two within; and so the samples of each.
    groups = np.bincount(labels[ids], minlength=len(sizes))[filled] // samples_per_class
    assert groups.max() - groups.min() <= 2
    hand = len(filled) // num_together * size
    groups = np.bincount(labels[ids[: len(ids) // hand * hand]], minlength=len(sizes))[filled] // samples_per_class
    assert groups.max() - groups.min() <= 1
    for label in filled:
        own = np.bincount(ids, minlength=len(labels))[labels == label]
        assert own.max() - own.min() <= 2


@settings(max_examples=50, deadline=None)
@given(SIZES, SEEDS, st.data())
def test_a_position_of_a_class_batch_does_not_depend_on_the_others_asked_for(
    sizes: list[int], seed: int, data: st.DataObject
) -> None:
    labels = mixed_labels(sizes)
    positions = data.draw(st.lists(st.integers(0, 4 * len(labels) - 1), min_size=1))
    size = 3 * data.draw(st.integers(1, int(np.count_nonzero(sizes))))
    one, again = (ClassBatchOrder(ClassMembers(labels, seed), 3, size, seed) for _ in range(2))
    assert_pure(one, again, positions)


def test_classes_that_stand_together_change() -> None:
    labels = np.repeat(np.arange(1003), 5)
    order = ClassBatchOrder(ClassMembers(labels, 3), 4, 4 * 20, 3)
    ids, _ = visit_all(order, 80 * 50 * 4)
    batches = labels[ids].reshape(200, 20, 4)[:, :, 0]
    rounds = batches.reshape(4, 1000)
    for one, two in pairwise(rounds):
        assert (one == two).sum() < 10
    # A class met 19 others of 1,002 in each round; twice in two rounds only by chance, 0.36 a class.
    neighbours = [{label: set(batch) for batch in part.reshape(50, 20).tolist() for label in batch} for part in rounds]
    met_again = [len(neighbours[0][label] & neighbours[1][label]) - 1 for label in neighbours[0].keys() & neighbours[1]]
    assert sum(met_again) / len(met_again) < 0.6
    other, _ = visit_all(ClassBatchOrder(ClassMembers(labels, 4), 4, 80, 4), 4000)
    assert (labels[other][::4] == batches.reshape(-1)[:1000]).sum() < 10


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 200), st.integers(1, 7), SEEDS)
def test_repeats_are_visits_of_their_own(num_samples: int, repeats: int, seed: int) -> None:
    order = RepeatedOrder(SampleOrder(num_samples, seed), repeats)
    ids, visits = visit_all(order, 3 * num_samples * repeats)
    single = SampleOrder(num_samples, seed).sample_ids(np.arange(3 * num_samples))
    assert np.array_equal(ids, np.repeat(single, repeats))
    assert_visits_are_counted(ids, visits)
    assert (np.bincount(ids) == 3 * repeats).all()
    assert visits.max() == 3 * repeats - 1


@pytest.mark.parametrize("num_classes", [1, 4, 50])
def test_one_class_alone_and_all_classes_together(num_classes: int) -> None:
    """The ends of what P can be."""
    labels = mixed_labels([3] * num_classes)
    for num_together in (1, num_classes):
        ids, _ = visit_all(ClassBatchOrder(ClassMembers(labels, 1), 2, 2 * num_together, 1), 6 * num_classes)
        assert (np.bincount(ids) == 2).all()
