"""UniFace (UCE): binary cross-entropies that share one learned threshold; dissected by construction.

Source: Zhou, Li, et al., "UniFace: Unified Cross-Entropy Loss for Deep Face Recognition", ICCV 2023, eq. 6 to 10:

    intra = log(1 + e^{-(s (z_y - m) - b)})
    inter = lambda sum over k != y of log(1 + e^{s z_k - b})

s 64, m 0.4, lambda 1; the bias b begins at ln(10 r C) for C classes of which the share r is drawn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megaclass.kernels.terms import Function
from megaclass.objectives.objective import OBJECTIVES, Objective, Values
from megaclass.objectives.presets import PRESETS, Preset


@OBJECTIVES.register("uniface")
@dataclass(frozen=True)
class UniFace(Objective):
    """The two terms of the module's description; s (z_y - m) comes from the margin `cosine`.

    Attributes:
        negative_share: lambda, how much each negative counts.
    """

    negative_share: float = 1.0
    is_exponential: ClassVar[bool] = False

    def intra(self, positive: Tensor, values: Values, bias: Tensor | None) -> Tensor:
        """log(1 + e^{b - z_y}), [batch]."""
        assert bias is not None
        return torch.logaddexp(torch.zeros_like(positive), bias - positive)

    def inter(self, negatives: Tensor, positive: Tensor | None, values: Values) -> Tensor:
        """Lambda times the sum, [m]."""
        return self.negative_share * negatives

    def end_point(self, negatives: Tensor, values: Values, bias: Tensor | None) -> Tensor:
        """B."""
        assert bias is not None
        return bias

    def negative_function(self, values: Values, bias: Tensor | None) -> Function | None:
        """log(1 + e^{s z - b}) with its derivatives in z and b."""
        assert bias is not None
        scale = values.scale

        def apply(cosines: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            logits = scale * cosines - bias
            probability = torch.sigmoid(logits)
            return torch.logaddexp(torch.zeros_like(logits), logits), scale * probability, -probability

        return apply

    def initial_bias(self, values: Values, num_classes: int) -> float:
        """ln(10 r C)."""
        return math.log(10.0 * max(1.0, values.sampling_rate * num_classes))


PRESETS["uniface"] = Preset("uniface", margin_kind="cosine", scale=64.0, margin=0.4)
