"""Verification: are two samples of the same class?

Where the data set gives pairs, these and no others are compared. Else two questions have two sets of pairs. The
accuracy over ten folds uses few pairs, as many positive as negative ones, of classes that no two folds share. True
accepts at a rate of false accepts of one in 10,000 need millions of negative pairs, and equal error is read off the
same ones. Nothing here holds more than 8 million drawn scores.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from megaclass.evaluate import metrics
from megaclass.evaluate.class_order import ClassOrder, class_order
from megaclass.evaluate.draws import Draws, Purpose
from megaclass.evaluate.pairs import FoldPairs, fold_pairs, given_folds, positive_pairs
from megaclass.evaluate.similarity import blocks, on_grid, pair_cosines

MAX_NEGATIVES = 8_000_000
MAX_POSITIVES = 500_000
ROWS = 512
RATES = {"1e-2": 100, "1e-3": 1_000, "1e-4": 10_000}


def verification(embeddings: Tensor, labels: np.ndarray, *, seed: int = 0) -> dict[str, Any]:
    """Accuracy over ten folds, TAR at three rates of false accepts, and the equal error rate.

    Args:
        embeddings: [n, dim] float32, unit length.
        labels: [n] int64.
        seed: of the pairs that are drawn.

    Returns:
        accuracy and accuracy_std over the folds; tar_at_far by rate, None where there are too few negative pairs to
        show it; eer; and what they rest on: num_fold_pairs, folds_share_classes, num_positive_pairs,
        num_negative_pairs.

    Raises:
        DataError: fewer than ten positive or negative pairs.
    """
    grouping = class_order(labels)
    chosen = fold_pairs(grouping, Draws(seed, Purpose.FOLDS))
    scores = pair_cosines(embeddings, chosen.left, chosen.right)
    draws = Draws(seed, Purpose.ROC_PAIRS)
    positive = np.sort(positive_scores(embeddings, grouping, draws))
    negative = negative_scores(embeddings, grouping, draws)
    negative.sort()
    return {
        **_figures(scores, chosen, positive, negative),
        "folds_share_classes": not chosen.disjoint,
    }


def given_verification(embeddings: Tensor, pairs: np.ndarray) -> dict[str, Any]:
    """The same figures on the pairs that a data set gives, in ten folds of their order; nothing is drawn.

    Args:
        embeddings: [n, dim] float32, unit length, in the order of the split.
        pairs: [p] of `megaclass.data.manifest.PAIR_DTYPE`.

    Returns:
        As `verification`, without folds_share_classes, which cannot be known; all figures rest on the same pairs.

    Raises:
        DataError: as `given_folds`.

    Source: Huang et al., Labeled Faces in the Wild, 2007, protocol of view 2.
    """
    chosen = given_folds(pairs)
    scores = pair_cosines(embeddings, chosen.left, chosen.right)
    return _figures(scores, chosen, np.sort(scores[chosen.is_same]), np.sort(scores[~chosen.is_same]))


def _figures(scores: np.ndarray, chosen: FoldPairs, positive: np.ndarray, negative: np.ndarray) -> dict[str, Any]:
    """Accuracy of the pairs in folds, and error rates of positive and negative pairs, whose scores rise."""
    accuracy, deviation = metrics.fold_accuracy(scores, chosen.is_same, chosen.folds)
    return {
        "accuracy": accuracy,
        "accuracy_std": deviation,
        "tar_at_far": {name: metrics.tar_at_far(positive, negative, one_in) for name, one_in in RATES.items()},
        "eer": metrics.equal_error_rate(positive, negative),
        "num_fold_pairs": len(scores),
        "num_positive_pairs": len(positive),
        "num_negative_pairs": len(negative),
    }


def positive_scores(embeddings: Tensor, grouping: ClassOrder, draws: Draws) -> np.ndarray:
    """Cosines of all positive pairs, or of 500,000 drawn ones where there are more: [p] float64."""
    space = positive_pairs(grouping.order, grouping.classes[grouping.order])
    every = space.total <= MAX_POSITIVES
    numbers = np.arange(space.total) if every else draws.distinct(space.total, MAX_POSITIVES)
    return pair_cosines(embeddings, *space.pairs(numbers))


def negative_scores(embeddings: Tensor, grouping: ClassOrder, draws: Draws) -> np.ndarray:
    """Cosines of all negative pairs, or of about 8 million where there would be more: [q] float64, in no order.

    The samples are put in drawn order and cut into equal groups; all negative pairs within the groups are taken. Up to
    4,000 samples make one group, so that these are all pairs. Beyond, groups shrink as samples grow (80 of 200,000
    samples), and every sample still takes part equally often, which independent drawing would not promise; and the
    cosines of a group are one matrix product.

    Cost: about 8 million cosines; memory for their scores twice and a group's embeddings.
    """
    num_samples = len(grouping.classes)
    group_size = max(2, 2 * MAX_NEGATIVES // num_samples)
    order = draws.permutation(num_samples)
    parts = []
    for members in np.array_split(order, -(-num_samples // group_size)):
        chosen = on_grid(embeddings[torch.from_numpy(members).to(embeddings.device)])
        classes = torch.from_numpy(grouping.classes[members]).to(embeddings.device)
        places = torch.arange(len(members), device=embeddings.device)
        for rows in blocks(len(members), ROWS):
            # Columns before this block's rows belong to pairs already taken.
            columns = slice(rows.start, None)
            is_negative = classes[rows, None] != classes[None, columns]
            is_negative &= places[None, columns] > places[rows, None]
            parts.append((chosen[rows] @ chosen[columns].T)[is_negative].cpu().numpy())
    return np.concatenate(parts)
