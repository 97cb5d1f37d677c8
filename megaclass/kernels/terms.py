"""What one negative contributes to a sample's loss, elementwise in its cosine: an exponential, or a term of its own.

Plain data, handed to a kernel; the objectives say which one a loss needs. Both hold whatever may vary from sample to
sample inside their function, so that a kernel only ever sees cosines.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Cosines [m, n] -> their transformed values g [m, n] (minus infinity: the negative does not count) and the derivatives
# of g (None: one everywhere). The argument must not be changed.
Transform = Callable[[Tensor], tuple[Tensor, Tensor | None]]
# Cosines [m, n] -> values f, derivatives of f in the cosine, derivatives of f in the learned bias (None: no bias).
Function = Callable[[Tensor], tuple[Tensor, Tensor, Tensor | None]]


@dataclass(frozen=True)
class Quadratic:
    """g(z) = weight (z - goal)^2 - margin^2, and 0 up to the left zero of that parabola.

    A `Transform` that fused kernels know.

    Attributes:
        goal, weight, margin: the numbers of the formula.
        left: where it begins.
    """

    goal: float
    weight: float
    margin: float

    @property
    def left(self) -> float:
        """The left zero of the parabola."""
        return self.goal - self.margin / math.sqrt(self.weight)

    def __call__(self, cosines: Tensor) -> tuple[Tensor, Tensor]:
        """The formula and its derivative."""
        distance = cosines - self.goal
        is_active = cosines > self.left
        mapped = torch.where(is_active, self.weight * distance * distance - self.margin * self.margin, 0.0)
        return mapped, torch.where(is_active, 2.0 * self.weight * distance, 0.0)


@dataclass(frozen=True)
class Filtered:
    """A transform (None: the identity) without the negatives whose cosine is above `threshold`.

    They count for nothing in the sum. A `Transform` fused kernels know if they know the inner one.
    """

    inner: Transform | None
    threshold: float

    def __call__(self, cosines: Tensor) -> tuple[Tensor, Tensor | None]:
        """Minus infinity for the dropped ones."""
        mapped, slopes = (cosines, None) if self.inner is None else self.inner(cosines)
        return torch.where(cosines > self.threshold, -torch.inf, mapped), slopes


@dataclass(frozen=True)
class Exponential:
    """A negative contributes e^{s g(cos) + log_weight}; the sum is one log-sum-exp short of a loss.

    Attributes:
        scale: the multiplier s.
        transform: the negative map g; None is the identity, which costs nothing.
        use_maximum: sum relative to each sample's largest exponent, for exponents that float32 cannot hold.
    """

    scale: float
    transform: Transform | None = None
    use_maximum: bool = False


@dataclass(frozen=True)
class Summed:
    """A negative contributes e^{log_weight} f(cos): the loss is a sum over classes and needs no row statistics.

    Attributes:
        function: f with its derivatives.
        has_bias: whether f has a learned bias.
    """

    function: Function
    has_bias: bool = False


Term = Exponential | Summed
