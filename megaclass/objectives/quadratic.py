"""Quadratic transformations of both similarities: `circle`, `so-softmax` and its dissected form.

SO-softmax is RECONSTRUCTED. Source: Zhang, Yang, Zhang, Cao, Pattern Recognition 131 (2022) 108877, of which only the
abstract could be read: a generalised softmax that combines positive and negative similarity, each passed through a
quadratic transformation aimed at a goal. Its coefficients are not public. What stands here is the general form

    L = log(1 + e^{N - s g_p(z_y)}),   N = log sum over k != y of e^{s g_n(z_k)}
    g_p(z) = m^2 - a_p (z - o_p)^2
    g_n(z) = a_n (z - o_n)^2 - m^2   for z above the left zero of that parabola, 0 below it

with goals o_p = 1, o_n = 0, weights a_p = a_n = 1 and the margin m as its offset. `so-d-softmax` puts the same g_p and
g_n into D-Softmax; its end point is a value of g_p (0.05: a cosine of 0.89 at m = 0.25).

Circle loss in its form with class weights (Sun et al., CVPR 2020, arXiv 2002.10857, eq. 4 to 8; gamma 256, m 0.25) is
exactly the member with the default goals and weights: alpha_n (z - m) with alpha_n = [z + m]+ is g_n, and
alpha_p (z - 1 + m) with alpha_p = [1 + m - z]+ is g_p. Its authors hold alpha constant in the gradient; `circle` does
too, the quadratic margin and map differentiate truly (on (-m, 0) that pulls a negative up towards its goal, 0).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from megaclass.kernels.terms import Quadratic, Transform
from megaclass.objectives.margin import MARGINS, Facts, Margin
from megaclass.objectives.negative_map import NEGATIVE_MAPS, NegativeMap, Positives
from megaclass.objectives.presets import PRESETS, Preset
from megaclass.objectives.registry import check_hyper


@MARGINS.register("quadratic")
@dataclass(frozen=True)
class QuadraticMargin(Margin):
    """g_p(z) = m^2 - a_p (z - o_p)^2.

    Attributes:
        positive_goal: o_p, the similarity a sample should have with its class.
        positive_weight: a_p.
    """

    positive_goal: float = 1.0
    positive_weight: float = 1.0
    default: ClassVar[float | None] = 0.25

    def __call__(self, cosine: Tensor, size: Tensor, facts: Facts) -> Tensor:
        """The formula."""
        return size * size - self.positive_weight * (cosine - self.positive_goal) ** 2


@NEGATIVE_MAPS.register("quadratic")
@dataclass(frozen=True)
class QuadraticMap(NegativeMap):
    """g_n(z) = a_n (z - o_n)^2 - m^2, and 0 below o_n - m / sqrt(a_n).

    Attributes:
        negative_goal: o_n, the similarity a sample should have with other classes.
        negative_weight: a_n.
    """

    negative_goal: float = 0.0
    negative_weight: float = 1.0

    def __post_init__(self) -> None:
        """Without a positive weight there is no zero to begin at."""
        check_hyper("negative_weight", self.negative_weight, 0.0, math.inf)

    def bind(self, positives: Positives | None, margin: float) -> Transform | None:
        """The formula and its derivative."""
        return Quadratic(self.negative_goal, self.negative_weight, margin)

    def largest(self, margin: float) -> float:
        """At 1, unless the goal lies above it: then 0."""
        if self.negative_goal > 1.0:
            return 0.0
        return max(0.0, self.negative_weight * (1.0 - self.negative_goal) ** 2 - margin * margin)


@MARGINS.register("circle")
@dataclass(frozen=True)
class CircleMargin(Margin):
    """alpha_p (z - 1 + m) with alpha_p = [1 + m - z]+ held constant in the gradient."""

    default: ClassVar[float | None] = 0.25

    def __call__(self, cosine: Tensor, size: Tensor, facts: Facts) -> Tensor:
        """The formula."""
        return (1.0 + size - cosine.detach()).clamp_min(0.0) * (cosine - 1.0 + size)


@NEGATIVE_MAPS.register("circle")
@dataclass(frozen=True)
class CircleMap(NegativeMap):
    """alpha_n (z - m) with alpha_n = [z + m]+ held constant in the gradient."""

    def bind(self, positives: Positives | None, margin: float) -> Transform | None:
        """The formula; its derivative is taken to be alpha_n."""

        def apply(cosines: Tensor) -> tuple[Tensor, Tensor]:
            factor = (cosines + margin).clamp_min(0.0)
            return factor * (cosines - margin), factor

        return apply

    def largest(self, margin: float) -> float:
        """(1 + m) (1 - m), at 1."""
        return max(0.0, 1.0 - margin * margin)


PRESETS["circle"] = Preset("softmax", margin_kind="circle", negative_map="circle", scale=256.0, margin=0.25)
PRESETS["so-softmax"] = Preset("softmax", margin_kind="quadratic", negative_map="quadratic", scale=80.0, margin=0.25)
PRESETS["so-d-softmax"] = Preset(
    "d-softmax", margin_kind="quadratic", negative_map="quadratic", scale=80.0, margin=0.25, end_point=0.05
)
