"""Which pairs of samples verification compares: counted, numbered and drawn without ever listing them all.

With the samples sorted by class, a sample's positive partners are those after it up to the end of its class, its
negative partners all those after the end of its class. So every pair has a number, and drawing pairs is drawing
numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megaclass.errors import DataError
from megaclass.evaluate.class_order import ClassOrder
from megaclass.evaluate.draws import Draws

NUM_FOLDS = 10
FOLD_PAIRS = 600


@dataclass(frozen=True)
class PairSpace:
    """All positive or all negative pairs among some samples, numbered from 0.

    Attributes:
        samples: [n] int64 sample indices sorted by class.
        first: [n] position of each sample's first partner; the others follow it.
        ends: [n] running total of the numbers of partners.
    """

    samples: np.ndarray
    first: np.ndarray
    ends: np.ndarray

    @property
    def total(self) -> int:
        """How many pairs there are."""
        return int(self.ends[-1]) if len(self.ends) else 0

    def pairs(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The samples of the pairs with these numbers: left, right, each [p] int64."""
        left = np.searchsorted(self.ends, numbers, side="right")
        before = np.where(left > 0, self.ends[left - 1], 0)
        right = self.first[left] + numbers - before
        return self.samples[left], self.samples[right]


def positive_pairs(samples: np.ndarray, classes: np.ndarray) -> PairSpace:
    """All pairs of one class among `samples` ([n], sorted by class; `classes`: their classes, [n])."""
    ends = np.searchsorted(classes, classes, side="right")
    places = np.arange(len(samples), dtype=np.int64)
    return PairSpace(samples, places + 1, np.cumsum(ends - 1 - places, dtype=np.int64))


def negative_pairs(samples: np.ndarray, classes: np.ndarray) -> PairSpace:
    """All pairs of different classes among `samples` ([n], sorted by class; `classes`: their classes, [n])."""
    ends = np.searchsorted(classes, classes, side="right").astype(np.int64)
    return PairSpace(samples, ends, np.cumsum(len(samples) - ends, dtype=np.int64))


@dataclass(frozen=True)
class FoldPairs:
    """Pairs dealt to folds: as many positive as negative ones in each.

    Attributes:
        left, right: [p] int64 sample indices.
        is_same: [p] bool.
        folds: [p] int64 in [0, 10).
        disjoint: whether no class occurs in two folds.
    """

    left: np.ndarray
    right: np.ndarray
    is_same: np.ndarray
    folds: np.ndarray
    disjoint: bool


def given_folds(pairs: np.ndarray) -> FoldPairs:
    """Pairs that the data set gives, in ten folds of their order; the first have one more where ten is no divisor.

    So the standard sets mean it, whose pairs come fold by fold (LFW: 300 positive, then 300 negative ones). Whether
    folds share classes is not known, so `disjoint` is False.

    Args:
        pairs: [p] with the fields left, right and is_same (`megaclass.data.manifest.PAIR_DTYPE`).

    Raises:
        DataError: without some fold the others have no positive or no negative pair.
    """
    is_same = pairs["is_same"] == 1
    folds = np.repeat(np.arange(NUM_FOLDS), [len(part) for part in np.array_split(is_same, NUM_FOLDS)])
    for fold in range(NUM_FOLDS):
        others = is_same[folds != fold]
        if not others.any() or others.all():
            raise DataError(
                f"the {len(pairs)} given pairs have {int(is_same.sum())} positive ones, and the folds other than fold "
                f"{fold} in their order only one kind; a threshold needs both: give more pairs, the kinds mixed"
            )
    # The fields of packed records lie apart, which torch does not take.
    left, right = np.ascontiguousarray(pairs["left"]), np.ascontiguousarray(pairs["right"])
    return FoldPairs(left, right, is_same, folds, disjoint=False)


def fold_pairs(grouping: ClassOrder, draws: Draws) -> FoldPairs:
    """Up to 600 positive and as many negative pairs in each of ten folds.

    The classes are put in drawn order, those with two samples or more before the others, and dealt to the folds in
    turn; a fold's pairs are drawn without repetition among its own classes. With fewer than 20 classes, or fewer than
    10 that have two samples, that leaves folds without pairs: then up to 6,000 positive and as many negative pairs
    are drawn among all classes and dealt in turn, and `disjoint` is False.

    Raises:
        DataError: fewer than ten positive or ten negative pairs, so that some fold would have none.
    """
    order = draws.permutation(grouping.num_classes)
    order = order[np.argsort(grouping.sizes[order] < 2, kind="stable")]
    disjoint = grouping.num_classes >= 2 * NUM_FOLDS and int((grouping.sizes >= 2).sum()) >= NUM_FOLDS
    sorted_classes = grouping.classes[grouping.order]
    lefts, rights, same, folds = [], [], [], []

    def draw(members: np.ndarray, limit: int, fold: int | None) -> None:
        samples, classes = grouping.order[members], sorted_classes[members]
        spaces = positive_pairs(samples, classes), negative_pairs(samples, classes)
        count = min(limit, spaces[0].total, spaces[1].total)
        if fold is None and count < NUM_FOLDS:
            raise DataError(
                f"verification needs at least {NUM_FOLDS} positive and {NUM_FOLDS} negative pairs; these "
                f"{len(samples)} samples of {grouping.num_classes} classes have {spaces[0].total} and "
                f"{spaces[1].total}; evaluate a larger split or leave verification out of evaluate.protocols"
            )
        for space, is_same in zip(spaces, (True, False), strict=True):
            left, right = space.pairs(draws.distinct(space.total, count))
            lefts.append(left)
            rights.append(right)
            same.append(np.full(count, is_same))
            folds.append(np.arange(count) % NUM_FOLDS if fold is None else np.full(count, fold))

    if disjoint:
        fold_of_class = np.empty(grouping.num_classes, dtype=np.int64)
        fold_of_class[order] = np.arange(grouping.num_classes) % NUM_FOLDS
        for fold in range(NUM_FOLDS):
            draw(np.flatnonzero(fold_of_class[sorted_classes] == fold), FOLD_PAIRS, fold)
    else:
        draw(np.arange(len(sorted_classes)), FOLD_PAIRS * NUM_FOLDS, None)
    return FoldPairs(
        np.concatenate(lefts), np.concatenate(rights), np.concatenate(same), np.concatenate(folds), disjoint
    )
