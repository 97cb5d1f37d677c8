"""SFace: gradients along the sphere, re-scaled by where the sample stands; dissected by construction.

Source: Zhong, Deng, Hu, Zhao, Li, Wen, "SFace: Sigmoid-Constrained Hypersphere Loss for Robust Face Recognition", IEEE
TIP 2021, arXiv 2205.12010, eq. 7 to 9; s 64, k 80, a 0.80, b 1.23 radians. With the factors in brackets held constant:

    intra = -[1 / (1 + e^{-k (theta_y - a)})] s cos(theta_y)
    inter = sum over k != y of [1 / (1 + e^{k (theta_k - b)})] s cos(theta_k)

Both are linear in the cosine, so the value says little; what counts is the gradient. It can be negative.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megaclass.kernels.terms import Function
from megaclass.objectives.margin import angle_of
from megaclass.objectives.objective import OBJECTIVES, Objective, Values
from megaclass.objectives.presets import PRESETS, Preset


@OBJECTIVES.register("sface")
@dataclass(frozen=True)
class SFace(Objective):
    """The two terms of the module's description.

    Attributes:
        steepness: k of both sigmoids.
        intra_angle: a, below which the pull towards the own class fades, radians.
        inter_angle: b, above which the push from another class fades, radians.
    """

    steepness: float = 80.0
    intra_angle: float = 0.80
    inter_angle: float = 1.23
    needs_angle: ClassVar[bool] = True
    is_exponential: ClassVar[bool] = False

    def intra(self, positive: Tensor, values: Values, bias: Tensor | None) -> Tensor:
        """-[factor] z_y, [batch]."""
        angle = angle_of(positive.detach() / values.scale)
        return -torch.sigmoid(self.steepness * (angle - self.intra_angle)) * positive

    def inter(self, negatives: Tensor, positive: Tensor | None, values: Values) -> Tensor:
        """The sum itself, [m]."""
        return negatives

    def end_point(self, negatives: Tensor, values: Values, bias: Tensor | None) -> Tensor:
        """S cos(a)."""
        return negatives.new_tensor(values.scale * math.cos(self.intra_angle))

    def negative_function(self, values: Values, bias: Tensor | None) -> Function | None:
        """[factor] s z, whose derivative is taken to be factor times s."""
        scale = values.scale

        def apply(cosines: Tensor) -> tuple[Tensor, Tensor, None]:
            slopes = scale * torch.sigmoid(self.steepness * (self.inter_angle - angle_of(cosines)))
            return slopes * cosines, slopes, None

        return apply


PRESETS["sface"] = Preset("sface", scale=64.0)
