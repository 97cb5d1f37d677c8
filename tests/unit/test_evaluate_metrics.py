"""Scores → accuracy over folds, TAR at FAR, equal error rate: against definitions and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_curve

from megaclass.evaluate.metrics import best_threshold, equal_error_rate, fold_accuracy, tar_at_far

# Few different values, so that ties are common.
SCORES = st.lists(st.integers(-8, 8).map(lambda value: value / 8), min_size=1, max_size=60)


@given(SCORES, SCORES)
def test_best_threshold_is_the_best_there_is(positive, negative):
    scores = np.array(positive + negative)
    same = np.arange(len(scores)) < len(positive)
    accuracy = np.mean((scores >= best_threshold(scores, same)) == same)
    candidates = [*scores, np.inf]
    assert accuracy == max(np.mean((scores >= candidate) == same) for candidate in candidates)


def test_best_threshold_cuts_a_gap_in_the_middle():
    assert best_threshold(np.array([0.0, 0.25, 0.75, 1.0]), np.array([False, False, True, True])) == 0.5


def test_best_threshold_between_neighbouring_numbers():
    low = 0.5
    high = np.nextafter(low, 1)
    assert best_threshold(np.array([low, high]), np.array([False, True])) == high


def test_fold_accuracy_tests_each_fold_at_the_others_threshold():
    # Fold 0 alone would be cut at 0.85 without a mistake; the threshold from folds 1 and 2 is 0.5.
    scores = np.array([0.9, 0.8, 0.7, 0.3, 0.7, 0.3])
    same = np.array([True, False] * 3)
    folds = np.array([0, 0, 1, 1, 2, 2])
    mean, deviation = fold_accuracy(scores, same, folds)
    accuracies = []
    for fold in range(3):
        threshold = best_threshold(scores[folds != fold], same[folds != fold])
        accuracies.append(np.mean((scores[folds == fold] >= threshold) == same[folds == fold]))
    assert accuracies[0] == 0.5
    assert mean == pytest.approx(np.mean(accuracies))
    assert deviation == pytest.approx(np.std(accuracies))


@given(SCORES, SCORES, st.sampled_from([2, 3, 10]))
def test_tar_at_far_is_the_best_threshold_with_few_enough_false_accepts(positive, negative, one_in):
    got = tar_at_far(np.sort(positive), np.sort(negative), one_in)
    if len(negative) < one_in:
        assert got is None
        return
    positive, negative = np.array(positive), np.array(negative)
    thresholds = [*positive, *negative, np.inf]
    allowed = [t for t in thresholds if (negative >= t).sum() * one_in <= len(negative)]
    assert got == pytest.approx(max(np.mean(positive >= t) for t in allowed))


def test_tar_at_far_of_known_scores():
    negative = np.arange(10_000) / 10_000
    positive = np.array([0.5, 0.98995, 0.99, 0.9989, 0.9999, 1.0])
    assert tar_at_far(positive, negative, 100) == pytest.approx(5 / 6)
    assert tar_at_far(positive, negative, 1000) == pytest.approx(2 / 6)
    assert tar_at_far(positive, negative, 10_000) == pytest.approx(2 / 6)
    assert tar_at_far(positive, negative[1:], 10_000) is None


@given(SCORES, SCORES)
def test_equal_error_rate_lies_on_the_roc_of_scikit_learn(positive, negative):
    scores, same = np.array(positive + negative), np.arange(len(positive) + len(negative)) < len(positive)
    false_rate, true_rate, _ = roc_curve(same, scores, drop_intermediate=False)
    # Where 1 - TPR - FPR, which falls along the ROC, meets zero; between two points the ROC is straight.
    gap = 1 - true_rate - false_rate
    after = int(np.argmax(gap <= 1e-12))
    share = gap[after - 1] / (gap[after - 1] - gap[after])
    expected = false_rate[after - 1] + share * (false_rate[after] - false_rate[after - 1])
    assert equal_error_rate(np.sort(positive), np.sort(negative)) == pytest.approx(expected, abs=1e-9)


def test_equal_error_rate_at_the_extremes():
    low, high = np.array([0.0, 0.1, 0.2]), np.array([0.7, 0.8])
    assert equal_error_rate(high, low) == 0
    assert equal_error_rate(low, high) == 1
    assert equal_error_rate(np.zeros(7), np.zeros(5)) == 0.5
