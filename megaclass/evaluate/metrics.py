"""What can be said of scores alone: accuracy over folds, true accepts at a rate of false ones, equal error rate.

Pure functions of numpy arrays, separate from the protocols because they know nothing of samples or embeddings. A
pair is accepted when its score is at least the threshold. scikit-learn's ROC serves where the pairs are few; with
millions of negatives its several full-length arrays would cost ten times the memory of the scores, so the other two
work on sorted scores.
"""

from __future__ import annotations

import numpy as np
from sklearn.metrics import roc_curve


def best_threshold(scores: np.ndarray, is_same: np.ndarray) -> float:
    """The threshold with the highest accuracy on these pairs.

    It lies half-way between the lowest accepted and the highest rejected score, so that a gap between the two kinds
    is cut in the middle; of several best thresholds the highest is taken.

    Args:
        scores: [p] float64.
        is_same: [p] bool, with at least one of each.
    """
    false_rate, true_rate, thresholds = roc_curve(is_same, scores, drop_intermediate=False)
    num_same = int(is_same.sum())
    correct = true_rate * num_same + (1 - false_rate) * (len(scores) - num_same)
    best = int(np.argmax(np.rint(correct)))
    # The last threshold accepts everything, the first (infinite) nothing: neither has a neighbour to meet half-way.
    if best == 0 or best == len(thresholds) - 1:
        return float(thresholds[best])
    middle = (thresholds[best] + thresholds[best + 1]) / 2
    # Between neighbouring floats there is no middle, and rounding may fall on the rejected score.
    return float(middle if middle > thresholds[best + 1] else thresholds[best])


def fold_accuracy(scores: np.ndarray, is_same: np.ndarray, folds: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation over folds of the accuracy at the threshold that is best on the other folds.

    Args:
        scores: [p] float64.
        is_same: [p] bool.
        folds: [p] integers, the fold of each pair.

    Returns:
        mean, and standard deviation (of the population: divided by the number of folds).

    Source: Huang et al., Labeled Faces in the Wild, 2007 (ten folds, threshold from the other nine).
    """
    accuracies = []
    for fold in np.unique(folds):
        tested = folds == fold
        threshold = best_threshold(scores[~tested], is_same[~tested])
        accuracies.append(np.mean((scores[tested] >= threshold) == is_same[tested]))
    return float(np.mean(accuracies)), float(np.std(accuracies))


def tar_at_far(positive: np.ndarray, negative: np.ndarray, one_in: int) -> float | None:
    """Share of positive pairs accepted while at most one in `one_in` negative pairs is.

    A positive pair that scores like the first negative one too many is not accepted.

    Args:
        positive: [p] float64, sorted upwards.
        negative: [q] float64, sorted upwards.
        one_in: 1 / the rate of false accepts, e.g. 1000.

    Returns:
        The share, or None where there are fewer than `one_in` negative pairs, which could not show such a rate.
    """
    allowed = len(negative) // one_in
    if allowed == 0 or len(positive) == 0:
        return None
    if allowed == len(negative):
        return 1.0
    first_too_many = negative[len(negative) - allowed - 1]
    return float(1 - np.searchsorted(positive, first_too_many, side="right") / len(positive))


def equal_error_rate(positive: np.ndarray, negative: np.ndarray) -> float:
    """The rate at which as large a share of negative pairs is accepted as of positive ones is rejected.

    The ROC is followed at the thresholds where a positive pair drops out; between its points it is a straight line.

    Args:
        positive: [p] float64, sorted upwards, not empty.
        negative: [q] float64, sorted upwards, not empty.
    """
    at = np.unique(positive)

    def rates(side: str) -> tuple[np.ndarray, np.ndarray]:
        false_accepts = 1 - np.searchsorted(negative, at, side=side) / len(negative)  # type: ignore[call-overload]
        false_rejects = np.searchsorted(positive, at, side=side) / len(positive)  # type: ignore[call-overload]
        return false_accepts, false_rejects

    # Two points per score: threshold at it ("left": pairs below are rejected) and just above it ("right").
    (accepts_at, rejects_at), (accepts_above, rejects_above) = rates("left"), rates("right")
    accepts = np.concatenate([[1.0], np.stack([accepts_at, accepts_above], axis=1).reshape(-1), [0.0]])
    rejects = np.concatenate([[0.0], np.stack([rejects_at, rejects_above], axis=1).reshape(-1), [1.0]])
    gap = accepts - rejects
    after = int(np.argmax(gap <= 0))
    share = gap[after - 1] / (gap[after - 1] - gap[after])
    return float(accepts[after - 1] + share * (accepts[after] - accepts[after - 1]))
