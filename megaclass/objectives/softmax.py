"""Softmax cross-entropy over cosines, written with the two numbers of this package: `softmax` and `normface`.

Embeddings and class weights have unit length here, always; softmax over scaled cosines is what NormFace is (Wang,
Xiang, Cheng, Yuille, "NormFace", ACM MM 2017, arXiv 1704.06369), so the two names differ in their default scale alone.
With a margin on the positive cosine the same objective is CosFace or ArcFace; with sampled negatives, Partial-FC.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megaclass.objectives.objective import OBJECTIVES, Objective, Values
from megaclass.objectives.presets import PRESETS, Preset


@OBJECTIVES.register("softmax")
@dataclass(frozen=True)
class Softmax(Objective):
    """-log( e^{z_y} / (e^{z_y} + e^N) ) = log(1 + e^{N - z_y}): one entangled term.

    The loss is never clamped: a true loss of 200 is reported as 200.
    """

    needs_positive: ClassVar[bool] = True

    def intra(self, positive: Tensor, values: Values, bias: Tensor | None) -> Tensor:
        """Zero: softmax has no term of its own class alone."""
        return torch.zeros_like(positive)

    def inter(self, negatives: Tensor, positive: Tensor | None, values: Values) -> Tensor:
        """log(1 + e^{N - z_y}), [m]."""
        assert positive is not None
        # Not softplus: torch's becomes linear above 20 and is off by 2e-9 there, which spoils float64 comparisons.
        return torch.logaddexp(torch.zeros_like(positive), negatives - positive)

    def end_point(self, negatives: Tensor, values: Values, bias: Tensor | None) -> Tensor:
        """N, which moves with the negatives: the probability of the own class is one half there."""
        return negatives


PRESETS["softmax"] = Preset("softmax", scale=32.0)
PRESETS["normface"] = Preset("softmax", scale=20.0)
PRESETS["cosface"] = Preset("softmax", margin_kind="cosine", scale=64.0, margin=0.35)
PRESETS["arcface"] = Preset("softmax", margin_kind="angle", scale=64.0, margin=0.5)
PRESETS["arcface-straight-through"] = Preset("softmax", margin_kind="angle-straight-through", scale=64.0, margin=0.5)
PRESETS["combined-margin"] = Preset("softmax", margin_kind="combined", scale=64.0, margin=0.3)
# The logit of each sampled negative is raised by ln(1 / rate): in expectation the sum is that over all classes.
PRESETS["sampled-softmax"] = Preset(
    "softmax", sampler="classes", scale=32.0, sampling_rate=1 / 16, correction="inverse-rate"
)
# An et al., "Killing Two Birds with One Stone: Efficient and Robust Training of Face Recognition CNNs by Partial FC",
# CVPR 2022, arXiv 2203.15565; margin, scale and rate of the authors' published configurations.
PRESETS["partial-fc"] = Preset(
    "softmax", margin_kind="cosine", sampler="partial-fc", scale=64.0, margin=0.4, sampling_rate=0.1
)
# Zhang, Yu, Karaman, Zhang, Chang, "Heated-Up Softmax Embedding", arXiv 1809.04157: scale 16, and for the last quarter
# of the run 4 with a tenth of the learning rate. The bias that the authors' code adds to its logits is left out.
PRESETS["heated-up"] = Preset(
    "softmax",
    scale=16.0,
    schedule={
        "scale": {"shape": "step", "points": [[0.0, 16.0], [0.75, 4.0]]},
        "learning_rate": {"shape": "step", "points": [[0.0, 1.0], [0.75, 0.1]]},
    },
)
