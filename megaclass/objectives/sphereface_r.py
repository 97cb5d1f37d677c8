"""SphereFace-R: the multiplicative angular margin with embeddings and class weights of unit length.

Source: Liu, Wen, Raj, Singh, Weller, "SphereFace Revived: Unifying Hyperspherical Face Recognition", TPAMI 2022, arXiv
2109.05565; s 30, m 1.5. Of its variants this is the first, with the function psi of SphereFace (arXiv 1704.08063,
eq. 6), which falls over the whole range of angles. The authors' code multiplies the loss by 50 / s and leaves the
margin out of the graph; here the loss is the plain one and the derivative that of the formula.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from megaclass.objectives.margin import MARGINS, Facts, Margin, angle_of, continued_cosine
from megaclass.objectives.presets import PRESETS, Preset


@MARGINS.register("sphereface")
@dataclass(frozen=True)
class SphereFace(Margin):
    """psi(theta) = (-1)^k cos(m theta) - 2 k, for m theta in [k pi, (k + 1) pi]; the size of the margin is m - 1."""

    needs_angle: ClassVar[bool] = True
    default: ClassVar[float | None] = 0.5
    largest: ClassVar[float] = 3.0
    unit: ClassVar[str] = "the factor of the angle, less one"

    def __call__(self, cosine: Tensor, size: Tensor, facts: Facts) -> Tensor:
        """The formula."""
        return continued_cosine((1.0 + size) * angle_of(cosine))


PRESETS["sphereface-r"] = Preset("softmax", margin_kind="sphereface", scale=30.0, margin=0.5)
