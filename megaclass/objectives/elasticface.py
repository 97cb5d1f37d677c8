"""ElasticFace: a margin drawn anew for every sample.

Source: Boutros, Damer, Kirchbuchner, Kuijper, "ElasticFace: Elastic Margin Loss for Deep Face Recognition", CVPRW
2022, arXiv 2109.09416, eq. 5 and 6; standard deviation 0.0125, mean 0.5 (angle) and 0.35 (cosine), s 64. The numbers
come from a counter (seed, draw, place in the global batch): the same at any world size and after a restart.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megaclass import counter
from megaclass.objectives.margin import MARGINS, Facts
from megaclass.objectives.margins import AdditiveAngle, AdditiveCosine
from megaclass.objectives.presets import PRESETS, Preset


def _elastic(size: Tensor, deviation: float, cosine: Tensor, facts: Facts) -> Tensor:
    """Margins [batch], normal around `size`."""
    places = torch.arange(len(cosine), device=cosine.device)
    return size + deviation * counter.normal(facts.key, places, cosine.dtype)


@MARGINS.register("elastic-angle")
@dataclass(frozen=True)
class ElasticAngle(AdditiveAngle):
    """ArcFace with margin m ~ N(size, deviation^2)."""

    deviation: float = 0.0125

    def __call__(self, cosine: Tensor, size: Tensor, facts: Facts) -> Tensor:
        """ArcFace's formula with a margin for each sample."""
        return super().__call__(cosine, _elastic(size, self.deviation, cosine, facts), facts)


@MARGINS.register("elastic-cosine")
@dataclass(frozen=True)
class ElasticCosine(AdditiveCosine):
    """CosFace with margin m ~ N(size, deviation^2)."""

    deviation: float = 0.0125

    def __call__(self, cosine: Tensor, size: Tensor, facts: Facts) -> Tensor:
        """CosFace's formula with a margin for each sample."""
        return super().__call__(cosine, _elastic(size, self.deviation, cosine, facts), facts)


PRESETS["elasticface-arc"] = Preset("softmax", margin_kind="elastic-angle", scale=64.0, margin=0.5)
PRESETS["elasticface-cos"] = Preset("softmax", margin_kind="elastic-cosine", scale=64.0, margin=0.35)
