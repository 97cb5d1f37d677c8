"""D-Softmax: the softmax loss dissected into an intra-class and an inter-class term that do not see each other.

Source: He, Wang, Li, Wang, "Softmax Dissection: Towards Understanding Intra- and Inter-class Objective for Embedding
Learning", AAAI 2020, arXiv 1908.01281. With epsilon = e^{s d}:

    intra = log(1 + epsilon / e^{z_y}) = log(1 + e^{s d - z_y})
    inter = log(1 + sum over k != y of e^{z_k}) = log(1 + e^N)

`d` is the end point: the cosine around which the pull towards the own class lets go, within about 1/s. Softmax is the
same intra term with a moving end point N / s, which falls by ln(1/r) / s when negatives are sampled at rate r; d does
not move. That is why the sampled variants work: D-Softmax-B gives the inter term to a random part of the batch,
D-Softmax-K sums it over a random part of the classes.

The paper's text beyond its abstract could not be read by us. The averaging is therefore our choice: each term is a mean
over the samples that have it; the sampled sum is used as it is, unless `correction: inverse-rate` makes it unbiased.
Not to be confused with the frequency-banded "D-Softmax" of Chen et al., 2016.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megaclass.objectives.objective import OBJECTIVES, Objective, Values
from megaclass.objectives.presets import PRESETS, Preset


@OBJECTIVES.register("d-softmax")
@dataclass(frozen=True)
class DSoftmax(Objective):
    """log(1 + e^{s d - z_y}) + log(1 + e^N), with the end point `d` as a cosine (default 0.9)."""

    default_end_point: ClassVar[float | None] = 0.9

    def intra(self, positive: Tensor, values: Values, bias: Tensor | None) -> Tensor:
        """log(1 + e^{s d - z_y}), [batch]."""
        return torch.logaddexp(torch.zeros_like(positive), values.scale * values.end_point - positive)

    def inter(self, negatives: Tensor, positive: Tensor | None, values: Values) -> Tensor:
        """log(1 + e^N), [m]; exactly zero where there is no negative."""
        return torch.logaddexp(torch.zeros_like(negatives), negatives)

    def end_point(self, negatives: Tensor, values: Values, bias: Tensor | None) -> Tensor:
        """S d, whatever the negatives."""
        return negatives.new_tensor(values.scale * values.end_point)


PRESETS["d-softmax"] = Preset("d-softmax", scale=32.0, end_point=0.9)
PRESETS["d-softmax-b"] = Preset("d-softmax", sampler="batch", scale=32.0, end_point=0.9, sampling_rate=1 / 16)
# The batch's own classes are among the negatives: they cost no row, since the intra term touches theirs anyway, and
# keep much of what random rows alone lose (docs/study/README.md).
PRESETS["d-softmax-k"] = Preset(
    "d-softmax", sampler="classes", scale=32.0, end_point=0.9, sampling_rate=1 / 16, batch_positives=True
)
