"""Margins: what is done to the cosine of a sample and its own class before the scale.

Plain elementwise functions, differentiated truly: the widely used public ArcFace code rewrites the positive logit
outside the graph, so that its derivative there is 1 whatever the angle; ours is the derivative of the formula.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from megaclass.errors import ConfigError

Margin = Callable[[Tensor], Tensor]


def no_margin(cosine: Tensor) -> Tensor:
    """The cosine as it is, [batch]."""
    return cosine


def additive_cosine(cosine: Tensor, margin: float) -> Tensor:
    """cos(theta) - m, [batch]. Source: CosFace, Wang et al., CVPR 2018, arXiv 1801.09414, eq. 4."""
    return cosine - margin


def additive_angle(cosine: Tensor, margin: float) -> Tensor:
    """cos(theta + m), [batch], and cos(theta) - m sin(m) where theta + m would pass pi.

    Without the second branch the logit would rise again for samples opposite to their class. At the seam it drops from
    -1 to -cos(m) - m sin(m), so the whole is monotone. Source: ArcFace, Deng et al., CVPR 2019, arXiv 1801.07698,
    eq. 3.
    """
    cosine = cosine.clamp(-1.0, 1.0)
    # The floor keeps the square root's derivative finite at theta = 0, where the tangent it multiplies vanishes.
    sine = (1.0 - cosine * cosine).clamp_min(1e-12).sqrt()
    shifted = cosine * math.cos(margin) - sine * math.sin(margin)
    return torch.where(cosine > -math.cos(margin), shifted, cosine - margin * math.sin(margin))


def build(name: str, margin: float) -> Margin:
    """The margin function `none`, `cosine` or `angle` with its size (in cosine, or in radians).

    Raises:
        ConfigError: the size is outside the range in which the margin means something.
    """
    if name == "none":
        return no_margin
    largest, unit = {"cosine": (1.0, "in cosine"), "angle": (math.pi / 2, "radians")}[name]
    if not 0 <= margin <= largest:
        raise ConfigError(f"classifier.margin {margin} is outside [0, {largest:.4g}] ({unit}); usual are 0.3 to 0.5")
    return partial({"cosine": additive_cosine, "angle": additive_angle}[name], margin=margin)
