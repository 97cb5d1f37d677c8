"""AdaFace: the margin follows the quality of the image, read off the length of its embedding.

Source: Kim, Jain, Liu, "AdaFace: Quality Adaptive Margin for Face Recognition", CVPR 2022, arXiv 2204.00964, eq. 11 to
14; m 0.4, h 0.333, s 64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megaclass.objectives.margin import MARGINS, Facts, Margin, angle_of
from megaclass.objectives.presets import PRESETS, Preset


@MARGINS.register("adaface")
@dataclass(frozen=True)
class AdaFace(Margin):
    """cos(theta - m q) - (m + m q), q = clip(h (|x| - mean) / (std + 0.001), -1, 1) without a gradient.

    Mean and standard deviation are those of the global batch, with lengths clipped to [0.001, 100]; the authors' code
    does the same by default and can mix in a running mean. theta - m q is clipped to [0, pi]. The standard deviation is
    the unbiased one; a batch of one sample has q = 0.

    Attributes:
        concentration: h.
    """

    concentration: float = 0.333
    needs_norm: ClassVar[bool] = True
    needs_angle: ClassVar[bool] = True
    default: ClassVar[float | None] = 0.4
    largest: ClassVar[float] = math.pi / 2
    unit: ClassVar[str] = "radians and in cosine"

    def __call__(self, cosine: Tensor, size: Tensor, facts: Facts) -> Tensor:
        """The formula."""
        assert facts.norm is not None
        norm = facts.norm.detach().clamp(0.001, 100.0)
        mean = norm.mean()
        std = ((norm - mean) ** 2).sum().div(max(1, len(norm) - 1)).sqrt()
        quality = (self.concentration * (norm - mean) / (std + 0.001)).clamp(-1.0, 1.0)
        angle = (angle_of(cosine) - size * quality).clamp(0.0, math.pi)
        return torch.cos(angle) - (size + size * quality)


PRESETS["adaface"] = Preset("softmax", margin_kind="adaface", scale=64.0, margin=0.4)
