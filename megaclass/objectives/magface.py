"""MagFace: a margin that grows with the length of the embedding, and a term that rewards length.

Source: Meng, Zhao, Huang, Zhou, "MagFace: A Universal Representation for Face Recognition and Quality Assessment",
CVPR 2021, arXiv 2103.06627, eq. 3 and section 3.3; lengths 10 to 110, margins 0.45 to 0.8, lambda_g 35, s 64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from megaclass.objectives.margin import MARGINS, Facts, Margin
from megaclass.objectives.margins import AdditiveAngle
from megaclass.objectives.presets import PRESETS, Preset
from megaclass.objectives.registry import check_hyper


@MARGINS.register("magface")
@dataclass(frozen=True)
class MagFace(Margin):
    """cos(theta + m(a)), m(a) linear from the size of the margin up to `largest_margin`; plus lambda_g (1/a + a/u^2).

    a is the length of the embedding clipped to [l, u]; the margin and the term both have a gradient in it. Past pi the
    cosine goes on as ArcFace's does.

    Attributes:
        largest_margin: m(u), radians; the size of the margin is m(l).
        smallest_norm, largest_norm: l and u.
        norm_weight: lambda_g.
    """

    largest_margin: float = 0.8
    smallest_norm: float = 10.0
    largest_norm: float = 110.0
    norm_weight: float = 35.0
    needs_norm: ClassVar[bool] = True
    needs_angle: ClassVar[bool] = True
    default: ClassVar[float | None] = 0.45
    largest: ClassVar[float] = math.pi / 2
    unit: ClassVar[str] = "radians"

    def __post_init__(self) -> None:
        """The margin is linear between two lengths, and a length stands in a denominator."""
        check_hyper("smallest_norm", self.smallest_norm, 0.0, self.largest_norm)

    @property
    def limit(self) -> float:
        """A margin above that of the longest embeddings would fall with the length, and reward poor samples."""
        return min(self.largest, self.largest_margin)

    def __call__(self, cosine: Tensor, size: Tensor, facts: Facts) -> Tensor:
        """ArcFace with the margin of each sample's length."""
        share = (self._length(facts) - self.smallest_norm) / (self.largest_norm - self.smallest_norm)
        return AdditiveAngle()(cosine, size + (self.largest_margin - size) * share, facts)

    def penalty(self, facts: Facts) -> Tensor | None:
        """lambda_g (1/a + a/u^2), [batch]: smallest at a = u."""
        length = self._length(facts)
        return self.norm_weight * (1.0 / length + length / self.largest_norm**2)

    def _length(self, facts: Facts) -> Tensor:
        assert facts.norm is not None
        return facts.norm.clamp(self.smallest_norm, self.largest_norm)


PRESETS["magface"] = Preset("softmax", margin_kind="magface", scale=64.0, margin=0.45)
