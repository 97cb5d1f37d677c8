"""`NegativeMap`, its registry, and the two every loss can have: the identity and the filter for noisy labels.

A negative map changes the cosine of each negative before the scale. Separate from the implementations so that each of
them imports this file and nothing else of ours. A map gives its value and its derivative itself, because the kernels
work chunk by chunk and keep no graph.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from megaclass.kernels.terms import Filtered, Function, Transform
from megaclass.objectives.registry import Registry


@dataclass(frozen=True)
class Positives:
    """What a map may know of the samples whose negatives it changes; the same on every rank, without a gradient.

    Attributes:
        cosine: [global batch] with the own class, before the margin.
        adjusted: [m] the same after the margin, of the samples that have an inter term.
        state: the map's running state, a scalar.
    """

    cosine: Tensor
    adjusted: Tensor
    state: Tensor


class NegativeMap(ABC):
    """[m, n] cosines of negatives -> [m, n] transformed, elementwise.

    An implementation is a frozen dataclass whose fields are its own hyper-parameters.

    Attributes:
        needs_positive: whether it uses the positive cosines, which then take one all-reduce before the negatives.
        initial_state: where a running scalar begins; None for a map without one.
    """

    needs_positive: ClassVar[bool] = False
    initial_state: ClassVar[float | None] = None

    @abstractmethod
    def bind(self, positives: Positives | None, margin: float) -> Transform | None:
        """The map for one batch; None is the identity. `margin` is the size of the margin at this step."""

    @abstractmethod
    def largest(self, margin: float) -> float:
        """The least upper bound of the map on [-1, 1]."""

    def next_state(self, positives: Positives) -> Tensor:
        """The running state after this batch, which the batch itself already uses."""
        return positives.state


NEGATIVE_MAPS: Registry[NegativeMap] = Registry("negative_map")


@NEGATIVE_MAPS.register("identity")
@dataclass(frozen=True)
class Identity(NegativeMap):
    """The cosine as it is; costs nothing."""

    def bind(self, positives: Positives | None, margin: float) -> Transform | None:
        """None."""
        return None

    def largest(self, margin: float) -> float:
        """1."""
        return 1.0


def filtered(transform: Transform | None, threshold: float) -> Transform:
    """Drop negatives whose cosine is above `threshold`: most likely they are the same class under another label.

    A dropped negative counts for nothing in the sum. Source: Partial FC, arXiv 2203.15565, section 3.3, whose published
    code sets the cosine of such a negative to zero instead of leaving it out (threshold 0.4).
    """
    return Filtered(transform, threshold)


def filtered_function(function: Function, threshold: float) -> Function:
    """The same for a loss that is a sum over classes."""

    def apply(cosines: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        is_dropped = cosines > threshold
        values, slopes, bias_slopes = function(cosines)
        values, slopes = values.masked_fill(is_dropped, 0.0), slopes.masked_fill(is_dropped, 0.0)
        return values, slopes, None if bias_slopes is None else bias_slopes.masked_fill(is_dropped, 0.0)

    return apply
