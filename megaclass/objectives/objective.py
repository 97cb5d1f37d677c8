"""`Objective`, `Values` and the registry: what a loss does with the positive logit and the negatives of each sample.

Separate from the implementations so that each of them imports this file and nothing else of ours.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from megaclass.kernels.terms import Function
from megaclass.objectives.registry import Registry


@dataclass(frozen=True)
class Values:
    """The hyper-parameters a schedule may move, as they are at one step; the same on every rank.

    Attributes:
        scale: multiplier of the cosines.
        margin: size of the margin, in cosine or in radians.
        end_point: cosine at which a dissected intra term lets go.
        sampling_rate: share of the classes, or of the batch, that is drawn.
        learning_rate: factor on the learning rates of the optimizers.
    """

    scale: float
    margin: float = 0.0
    end_point: float = 0.9
    sampling_rate: float = 1.0
    learning_rate: float = 1.0


class Objective(ABC):
    """What a loss does with the positive logit z_y and the negatives of each sample.

    The loss of a batch is the mean of `intra` over all its samples plus the mean of `inter` over the samples that have
    an inter term. z_y is the scale times the cosine after the margin. The negatives come as their log-sum-exp N, or,
    where `negative_function` gives one, as the sum of what it gives for each of them.

    An implementation is a frozen dataclass whose fields are its own hyper-parameters, registered by name.

    Attributes:
        needs_positive: whether `inter` uses z_y: the loss is *entangled*, and z_y of the whole batch is sent along with
            the sums. Otherwise it is *dissected*: the intra term needs only the rank that owns the class, and keeps its
            strength when negatives are sampled.
        needs_angle: whether the cosines must really be such, in [-1, 1].
        is_exponential: whether it is built on a log-sum-exp; otherwise it has a `negative_function`.
        default_end_point: the end point's default; None for a loss without that option.
    """

    needs_positive: ClassVar[bool] = False
    needs_angle: ClassVar[bool] = False
    is_exponential: ClassVar[bool] = True
    default_end_point: ClassVar[float | None] = None

    @abstractmethod
    def intra(self, positive: Tensor, values: Values, bias: Tensor | None) -> Tensor:
        """[batch] positive logits -> [batch] losses of the own class alone, elementwise."""

    @abstractmethod
    def inter(self, negatives: Tensor, positive: Tensor | None, values: Values) -> Tensor:
        """[m] log-sum-exps (minus infinity where there is no negative) or sums, and logits -> [m] losses."""

    @abstractmethod
    def end_point(self, negatives: Tensor, values: Values, bias: Tensor | None) -> Tensor:
        """The positive logit at which the pull towards the own class is half its strength: a scalar, or [m]."""

    def negative_function(self, values: Values, bias: Tensor | None) -> Function | None:
        """What each negative adds, for a loss that is a sum over classes; None for one built on a log-sum-exp."""
        return None

    def initial_bias(self, values: Values, num_classes: int) -> float | None:
        """Where a learned scalar, the same on every rank, begins; None for a loss without one."""
        return None


OBJECTIVES: Registry[Objective] = Registry("objective")
