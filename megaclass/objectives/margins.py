"""The margins of CosFace and ArcFace, both at once, and none."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megaclass.objectives.margin import MARGINS, Facts, Margin, angle_of, continued_cosine
from megaclass.objectives.registry import check_hyper


@MARGINS.register("none")
@dataclass(frozen=True)
class NoMargin(Margin):
    """The cosine as it is."""

    def __call__(self, cosine: Tensor, size: Tensor, facts: Facts) -> Tensor:
        """The argument."""
        return cosine


@MARGINS.register("cosine")
@dataclass(frozen=True)
class AdditiveCosine(Margin):
    """cos(theta) - m. Source: CosFace, Wang et al., CVPR 2018, arXiv 1801.09414, eq. 4; m 0.35."""

    default: ClassVar[float | None] = 0.35

    def __call__(self, cosine: Tensor, size: Tensor, facts: Facts) -> Tensor:
        """cos(theta) - m."""
        return cosine - size


@MARGINS.register("angle")
@dataclass(frozen=True)
class AdditiveAngle(Margin):
    """cos(theta + m), and cos(theta) - m sin(m) where theta + m would pass pi.

    Without the second branch the logit would rise again for samples opposite to their class. At the seam it drops from
    -1 to -cos(m) - m sin(m), so the whole is monotone. Source: ArcFace, Deng et al., CVPR 2019, arXiv 1801.07698,
    eq. 3; m 0.5 radians.
    """

    needs_angle: ClassVar[bool] = True
    default: ClassVar[float | None] = 0.5
    largest: ClassVar[float] = math.pi / 2
    unit: ClassVar[str] = "radians"

    def __call__(self, cosine: Tensor, size: Tensor, facts: Facts) -> Tensor:
        """The formula, through sines and cosines instead of the angle."""
        cosine = cosine.clamp(-1.0, 1.0)
        # The floor keeps the square root's derivative finite at theta = 0, where the tangent it multiplies vanishes.
        sine = (1.0 - cosine * cosine).clamp_min(1e-12).sqrt()
        shifted = cosine * torch.cos(size) - sine * torch.sin(size)
        return torch.where(cosine > -torch.cos(size), shifted, cosine - size * torch.sin(size))


@MARGINS.register("angle-straight-through")
@dataclass(frozen=True)
class StraightThroughAngle(AdditiveAngle):
    """ArcFace's value with derivative 1 in the cosine, as the widely used public code has it.

    That code rewrites the positive logit outside the graph. For reproducing runs made with it; `angle` has the
    derivative sin(theta + m) / sin(theta) that belongs to the formula.
    """

    def __call__(self, cosine: Tensor, size: Tensor, facts: Facts) -> Tensor:
        """The value of `angle`; the gradient of the cosine itself."""
        shift = super().__call__(cosine.detach(), size, facts) - cosine.detach()
        return cosine + shift


@MARGINS.register("combined")
@dataclass(frozen=True)
class CombinedMargin(Margin):
    """cos(m1 theta + m2) - m3, all three at once; m2 is the size of the margin.

    Where m1 theta + m2 passes pi the cosine goes on falling (`continued_cosine`). Source: ArcFace, section 2.3 and
    table 2, where (1, 0.3, 0.2) is the best combination. Public code often applies only one of the three.

    Attributes:
        angle_factor: m1, of SphereFace.
        cosine_margin: m3, of CosFace.
    """

    angle_factor: float = 1.0
    cosine_margin: float = 0.2
    needs_angle: ClassVar[bool] = True
    default: ClassVar[float | None] = 0.3
    largest: ClassVar[float] = math.pi / 2
    unit: ClassVar[str] = "radians"

    def __post_init__(self) -> None:
        """The adjusted cosine must fall with the angle."""
        check_hyper("angle_factor", self.angle_factor, 0.0, math.inf)

    def __call__(self, cosine: Tensor, size: Tensor, facts: Facts) -> Tensor:
        """The formula."""
        return continued_cosine(self.angle_factor * angle_of(cosine) + size) - self.cosine_margin
