"""Which pairs verification draws, and what it makes of them."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megaclass.data.manifest import PAIR_DTYPE
from megaclass.errors import DataError
from megaclass.evaluate import verification as module
from megaclass.evaluate.class_order import class_order
from megaclass.evaluate.draws import Draws, Purpose
from megaclass.evaluate.metrics import equal_error_rate, tar_at_far
from megaclass.evaluate.pairs import fold_pairs, given_folds, negative_pairs, positive_pairs
from megaclass.evaluate.similarity import pair_cosines, unit_length
from megaclass.evaluate.verification import given_verification, negative_scores, positive_scores, verification


def _random(n, dim=7, seed=0):
    return unit_length(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)))


def _one_hot(labels):
    return torch.nn.functional.one_hot(torch.from_numpy(labels)).float()


def _folds(labels, seed=0):
    return fold_pairs(class_order(labels), Draws(seed, Purpose.FOLDS))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30))
def test_every_pair_has_one_number(labels):
    labels = np.array(labels)
    grouping = class_order(labels)
    classes = grouping.classes[grouping.order]
    for space, is_same in (
        (positive_pairs(grouping.order, classes), True),
        (negative_pairs(grouping.order, classes), False),
    ):
        left, right = space.pairs(np.arange(space.total))
        found = [tuple(sorted(pair)) for pair in zip(left.tolist(), right.tolist(), strict=True)]
        expected = [
            pair for pair in combinations(range(len(labels)), 2) if (labels[pair[0]] == labels[pair[1]]) == is_same
        ]
        assert sorted(found) == expected


@settings(max_examples=30)
@given(st.integers(20, 60), st.integers(0, 10**6))
def test_folds_share_no_class_and_balance_their_pairs(num_classes, seed):
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.concatenate([np.repeat(np.arange(num_classes), 2), rng.integers(0, num_classes, 70)]))
    pairs = _folds(labels)
    assert pairs.disjoint
    assert np.array_equal(labels[pairs.left] == labels[pairs.right], pairs.is_same)
    assert not (pairs.left == pairs.right).any()
    unordered = np.sort(np.stack([pairs.left, pairs.right]), axis=0)
    assert len(np.unique(unordered, axis=1).T) == len(pairs.left)
    classes_of_fold = [
        set(labels[np.r_[pairs.left, pairs.right][np.r_[pairs.folds, pairs.folds] == f]]) for f in range(10)
    ]
    assert sum(len(classes) for classes in classes_of_fold) == len(set.union(*classes_of_fold))
    for fold in range(10):
        same = pairs.is_same[pairs.folds == fold]
        assert same.sum() == (~same).sum() > 0


def test_a_large_split_gives_6000_pairs_of_each_kind():
    pairs = _folds(np.arange(500).repeat(7))
    assert pairs.is_same.sum() == (~pairs.is_same).sum() == 6000
    assert np.bincount(pairs.folds).tolist() == [1200] * 10


@pytest.mark.parametrize("labels", [np.arange(13).repeat(4), np.r_[np.arange(9).repeat(5), np.arange(100, 130)]])
def test_with_few_classes_folds_share_them(labels):
    pairs = _folds(labels)
    assert not pairs.disjoint
    assert pairs.is_same.sum() == (~pairs.is_same).sum()
    for fold in range(10):
        assert 0 < pairs.is_same[pairs.folds == fold].sum() == (~pairs.is_same[pairs.folds == fold]).sum()


def test_pairs_do_not_depend_on_names_and_do_on_the_seed():
    labels = np.random.default_rng(0).integers(0, 40, 300)
    names = np.random.default_rng(1).permutation(40) * 1000
    one, renamed, other = _folds(labels), _folds(names[labels]), _folds(labels, seed=1)
    assert np.array_equal(one.left, renamed.left)
    assert np.array_equal(one.right, renamed.right)
    assert not np.array_equal(one.left, other.left)


@pytest.mark.parametrize(
    ("labels", "counts"), [([0] * 30, "435 and 0"), (range(30), "0 and 435"), ([0, 0, 1, 1], "2 and 4")]
)
def test_too_few_pairs_are_an_error(labels, counts):
    with pytest.raises(DataError, match=f"needs at least 10 positive and 10 negative pairs.* have {counts}; evaluate"):
        verification(_random(len(labels)), np.array(labels))


def test_all_pairs_of_a_small_split_are_scored():
    labels = np.random.default_rng(0).integers(0, 13, 101)
    x = _random(101, seed=3)
    grouping, draws = class_order(labels), Draws(0, Purpose.ROC_PAIRS)
    cosines = x.double().numpy() @ x.double().numpy().T
    for scores, is_same in ((positive_scores(x, grouping, draws), True), (negative_scores(x, grouping, draws), False)):
        expected = [cosines[i, j] for i, j in combinations(range(101), 2) if (labels[i] == labels[j]) == is_same]
        np.testing.assert_allclose(np.sort(scores), np.sort(expected), atol=1e-7)


def test_blocks_change_nothing(monkeypatch):
    labels = np.random.default_rng(0).integers(0, 13, 101)
    grouping = class_order(labels)
    found = []
    for rows in (512, 17, 1):
        monkeypatch.setattr(module, "ROWS", rows)
        found.append(np.sort(negative_scores(_random(101), grouping, Draws(0, Purpose.ROC_PAIRS))))
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])


def test_rates_are_those_of_all_pairs():
    labels = np.random.default_rng(0).integers(0, 30, 251)
    x = unit_length(_one_hot(labels)[:, :7] + 0.3 * _random(251))
    outcome = verification(x, labels)
    cosines = x.double().numpy() @ x.double().numpy().T
    upper = np.triu_indices(251, 1)
    same = (labels[:, None] == labels[None])[upper]
    positive, negative = np.sort(cosines[upper][same]), np.sort(cosines[upper][~same])
    assert outcome["num_positive_pairs"] == len(positive)
    assert outcome["num_negative_pairs"] == len(negative)
    assert outcome["eer"] == pytest.approx(equal_error_rate(positive, negative), abs=2 / len(positive))
    for name, one_in in (("1e-2", 100), ("1e-3", 1000), ("1e-4", 10_000)):
        expected = tar_at_far(positive, negative, one_in)
        assert outcome["tar_at_far"][name] == pytest.approx(expected, abs=2 / len(positive))


def test_large_splits_score_a_bounded_number_of_pairs_with_every_sample_equally_often(monkeypatch):
    monkeypatch.setattr(module, "MAX_NEGATIVES", 5000)
    monkeypatch.setattr(module, "MAX_POSITIVES", 300)
    labels = np.arange(250).repeat(4)
    grouping, draws = class_order(labels), Draws(0, Purpose.ROC_PAIRS)
    assert len(positive_scores(_random(1000), grouping, draws)) == 300
    negatives = len(negative_scores(_random(1000), grouping, draws))
    assert 4000 < negatives <= 5000
    everything = verification(unit_length(_one_hot(labels)), labels)
    assert everything["tar_at_far"] == {"1e-2": 1.0, "1e-3": 1.0, "1e-4": None}


def test_perfect_embeddings_make_no_mistake():
    labels = np.random.default_rng(0).permutation(np.arange(53).repeat(5))
    outcome = verification(_one_hot(labels), labels)
    assert outcome["accuracy"] == 1
    assert outcome["accuracy_std"] == 0
    assert outcome["eer"] == 0
    assert outcome["tar_at_far"] == {"1e-2": 1.0, "1e-3": 1.0, "1e-4": 1.0}
    assert outcome["folds_share_classes"] is False


def test_embeddings_of_nothing_are_at_chance():
    labels = np.arange(300).repeat(5)
    outcome = verification(_random(1500, 31), labels)
    assert outcome["accuracy"] == pytest.approx(0.5, abs=0.03)
    assert outcome["eer"] == pytest.approx(0.5, abs=0.03)
    for name, rate in (("1e-2", 1e-2), ("1e-3", 1e-3)):
        assert outcome["tar_at_far"][name] == pytest.approx(rate, abs=5 * np.sqrt(rate / 3000))


def test_one_point_for_everything_accepts_nothing():
    labels = np.arange(60).repeat(5)
    outcome = verification(_random(1).repeat(300, 1), labels)
    assert outcome["accuracy"] == 0.5
    assert outcome["eer"] == 0.5
    assert outcome["tar_at_far"] == {"1e-2": 0.0, "1e-3": 0.0, "1e-4": 0.0}


def _given(left, right, is_same):
    pairs = np.empty(len(left), PAIR_DTYPE)
    pairs["left"], pairs["right"], pairs["is_same"] = left, right, is_same
    return pairs


@settings(deadline=None, max_examples=40)
@given(st.integers(20, 200), st.integers(0, 10**6))
def test_given_pairs_are_compared_in_ten_folds_of_their_order(num_pairs, seed):
    """The plain protocol, written out: each tenth judged at the threshold that is best on the other nine."""
    rng = np.random.default_rng(seed)
    is_same = rng.permutation(np.arange(num_pairs) % 2 == 0)
    x = _random(400, 5, seed)
    left, right = np.arange(num_pairs), 399 - np.arange(num_pairs)
    outcome = given_verification(x, _given(left, right, is_same))
    scores = pair_cosines(x, left, right)
    accuracies = []
    for part in np.array_split(np.arange(num_pairs), 10):
        rest = np.setdiff1d(np.arange(num_pairs), part)
        best = max([np.inf, *scores[rest]], key=lambda t: (np.sum((scores[rest] >= t) == is_same[rest]), t))
        # Half-way between the lowest accepted and the highest rejected one of the nine folds.
        below = scores[rest][scores[rest] < best]
        if np.isfinite(best) and len(below):
            best = (best + below.max()) / 2
        accuracies.append(np.mean((scores[part] >= best) == is_same[part]))
    assert outcome["accuracy"] == pytest.approx(np.mean(accuracies), abs=1e-12)
    assert (outcome["num_positive_pairs"], outcome["num_fold_pairs"]) == (int(is_same.sum()), num_pairs)


def test_perfect_and_hopeless_embeddings_on_given_pairs():
    """As LFW has them: ten times 300 positive pairs, then 300 negative ones."""
    is_same = np.tile(np.repeat([True, False], 300), 10)
    left = np.arange(6000) * 2
    x = torch.zeros(12_000, 3)
    x[:, 0] = 1
    x[torch.from_numpy(left[~is_same])] = torch.tensor([0.0, 1, 0])
    outcome = given_verification(x, _given(left, left + 1, is_same))
    assert (outcome["accuracy"], outcome["accuracy_std"], outcome["eer"]) == (1, 0, 0)
    assert outcome["tar_at_far"] == {"1e-2": 1, "1e-3": 1, "1e-4": None}
    outcome = given_verification(x, _given(left, left + 1, ~is_same))
    assert outcome["accuracy"] == 0.5


def test_folds_of_given_pairs():
    pairs = given_folds(_given(np.arange(23), np.arange(23) + 1, np.arange(23) % 2))
    assert np.bincount(pairs.folds).tolist() == [3, 3, 3, 2, 2, 2, 2, 2, 2, 2]
    assert (np.diff(pairs.folds) >= 0).all()
    with pytest.raises(DataError, match="the 20 given pairs have 2 positive ones, and the folds other than fold 3 in"):
        given_folds(_given(np.arange(20), np.arange(20), np.arange(20) // 2 == 3))
    with pytest.raises(DataError, match="the 0 given pairs have 0 positive ones"):
        given_folds(_given([], [], []))
