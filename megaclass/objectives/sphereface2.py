"""SphereFace2: one binary classification for every class, with a learned bias; dissected by construction.

Source: Wen, Liu, Weller, Raj, Singh, "SphereFace2: Binary Classification is All You Need for Deep Face Recognition",
ICLR 2022, arXiv 2108.01513, eq. 6 and 7, variant C (additive margin in cosine). With r the scale,
g(z) = 2 ((z + 1) / 2)^t - 1 and a learned bias b:

    intra = w (lambda / r) log(1 + e^{-(r (g(z_y) - m) + b)})
    inter = w ((1 - lambda) / r) sum over k != y of log(1 + e^{r (g(z_k) + m) + b})

lambda 0.7, r 40, m 0.4, t 3, w 50. The authors' code leaves the difference g(z) - z out of the graph; here the
derivative is that of the formula.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megaclass.kernels.terms import Function
from megaclass.objectives.margin import MARGINS, Facts, Margin
from megaclass.objectives.objective import OBJECTIVES, Objective, Values
from megaclass.objectives.presets import PRESETS, Preset
from megaclass.objectives.registry import check_hyper


@MARGINS.register("sphereface2")
@dataclass(frozen=True)
class SphereFace2Margin(Margin):
    """g(z) - m with g(z) = 2 ((z + 1) / 2)^t - 1.

    Attributes:
        exponent: t; a value above 1 spreads the cosines of far-away pairs less.
    """

    exponent: float = 3.0
    needs_angle: ClassVar[bool] = True
    default: ClassVar[float | None] = 0.4

    def __post_init__(self) -> None:
        """The function must rise."""
        check_hyper("exponent", self.exponent, 0.0, math.inf)

    def __call__(self, cosine: Tensor, size: Tensor, facts: Facts) -> Tensor:
        """The formula."""
        return 2.0 * ((cosine.clamp(-1.0, 1.0) + 1.0) / 2.0) ** self.exponent - 1.0 - size


@OBJECTIVES.register("sphereface2")
@dataclass(frozen=True)
class SphereFace2(Objective):
    """The two terms of the module's description; z_y = r (g - m) comes from the margin `sphereface2`.

    Attributes:
        positive_share: lambda, how much the own class counts.
        loss_weight: w.
        exponent: t, the same as the margin's.
    """

    positive_share: float = 0.7
    loss_weight: float = 50.0
    exponent: float = 3.0
    needs_angle: ClassVar[bool] = True
    is_exponential: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Both terms must count, or no bias balances them."""
        check_hyper("positive_share", self.positive_share, 0.0, 1.0)
        check_hyper("exponent", self.exponent, 0.0, math.inf)

    def intra(self, positive: Tensor, values: Values, bias: Tensor | None) -> Tensor:
        """W (lambda / r) log(1 + e^{-(z_y + b)}), [batch]."""
        assert bias is not None
        factor = self.loss_weight * self.positive_share / values.scale
        return factor * torch.logaddexp(torch.zeros_like(positive), -(positive + bias))

    def inter(self, negatives: Tensor, positive: Tensor | None, values: Values) -> Tensor:
        """W ((1 - lambda) / r) times the sum, [m]."""
        return negatives * (self.loss_weight * (1.0 - self.positive_share) / values.scale)

    def end_point(self, negatives: Tensor, values: Values, bias: Tensor | None) -> Tensor:
        """-b."""
        assert bias is not None
        return -bias

    def negative_function(self, values: Values, bias: Tensor | None) -> Function | None:
        """log(1 + e^{r (g(z) + m) + b}) with its derivatives in z and b."""
        assert bias is not None
        scale, margin, t = values.scale, values.margin, self.exponent

        def apply(cosines: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            half = (cosines.clamp(-1.0, 1.0) + 1.0) / 2.0
            logits = scale * (2.0 * half**t - 1.0 + margin) + bias
            probability = torch.sigmoid(logits)
            slopes = scale * t * half ** (t - 1.0) * probability
            return torch.logaddexp(torch.zeros_like(logits), logits), slopes, probability

        return apply

    def initial_bias(self, values: Values, num_classes: int) -> float:
        """The b at which positives and drawn negatives, all at cosine 0, balance: the loss has no slope in b there."""
        at_zero = 2.0 * 0.5**self.exponent - 1.0
        own, other = values.scale * (at_zero - values.margin), values.scale * (at_zero + values.margin)
        num_negatives = max(1.0, values.sampling_rate * (num_classes - 1))
        share = self.positive_share / ((1.0 - self.positive_share) * num_negatives)
        # With u = e^b: share (1 + u e^other) = u e^other (1 + u e^own). Its positive root has two forms; taking the one
        # that adds, no digits cancel, and no exponential is large.
        gap = 1.0 - share
        root = abs(gap) + math.sqrt(gap**2 + 4.0 * share * math.exp(own - other))
        if gap > 0:
            return math.log(2.0 * share) - other - math.log(root)
        return math.log(root) - math.log(2.0) - own


PRESETS["sphereface2"] = Preset("sphereface2", margin_kind="sphereface2", scale=40.0, margin=0.4)
