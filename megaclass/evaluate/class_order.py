"""Samples grouped by class, in an order that does not depend on how classes are numbered.

Classes are counted in the order in which their first sample stands in the split. All that the protocols draw refers
to this order, so that giving the classes other labels changes no figure.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ClassOrder:
    """Samples grouped by class.

    Attributes:
        classes: [n] int64, number of each sample's class by first appearance.
        order: [n] int64, samples class after class, within a class as they stand in the split.
        sizes: [num_classes] int64, samples of each class.
        labels: [num_classes] int64, label of each class.
    """

    classes: np.ndarray
    order: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray

    @property
    def num_classes(self) -> int:
        """Classes that have a sample."""
        return len(self.sizes)


def class_order(labels: np.ndarray) -> ClassOrder:
    """The grouping of samples with these labels ([n] int64)."""
    values, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    by_appearance = np.argsort(first)
    number = np.empty(len(values), dtype=np.int64)
    number[by_appearance] = np.arange(len(values))
    classes = number[inverse.reshape(-1)]
    return ClassOrder(
        classes=classes,
        order=np.argsort(classes, kind="stable"),
        sizes=np.bincount(classes, minlength=len(values)),
        labels=values[by_appearance],
    )
