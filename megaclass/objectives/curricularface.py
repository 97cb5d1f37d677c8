"""CurricularFace: ArcFace whose hard negatives count more as training goes on.

Source: Huang et al., "CurricularFace: Adaptive Curriculum Learning Loss for Deep Face Recognition", CVPR 2020, arXiv
2004.00288, eq. 8 to 12; m 0.5, s 64. A negative harder than the sample's own class after the margin,
z > cos(theta_y + m), becomes z (t + z); t is the running mean of the positive cosines, t <- 0.01 mean + 0.99 t from 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megaclass.kernels.terms import Transform
from megaclass.objectives.negative_map import NEGATIVE_MAPS, NegativeMap, Positives
from megaclass.objectives.presets import PRESETS, Preset


@NEGATIVE_MAPS.register("curricular")
@dataclass(frozen=True)
class CurricularMap(NegativeMap):
    """z, and z (t + z) where z is above the adjusted positive cosine; neither t nor that border has a gradient.

    Attributes:
        momentum: share of the newest batch's mean positive cosine in t.
    """

    momentum: float = 0.01
    needs_positive: ClassVar[bool] = True
    initial_state: ClassVar[float | None] = 0.0

    def bind(self, positives: Positives | None, margin: float) -> Transform | None:
        """The formula and its derivative, t + 2 z for hard negatives."""
        assert positives is not None
        border, t = positives.adjusted[:, None], self.next_state(positives)

        def apply(cosines: Tensor) -> tuple[Tensor, Tensor]:
            is_hard = cosines > border
            return torch.where(is_hard, cosines * (t + cosines), cosines), torch.where(is_hard, t + 2.0 * cosines, 1.0)

        return apply

    def largest(self, margin: float) -> float:
        """2, at z = t = 1."""
        return 2.0

    def next_state(self, positives: Positives) -> Tensor:
        """0.01 times the mean of the batch's positive cosines plus 0.99 t."""
        return self.momentum * positives.cosine.mean() + (1.0 - self.momentum) * positives.state


PRESETS["curricularface"] = Preset("softmax", margin_kind="angle", negative_map="curricular", scale=64.0, margin=0.5)
