"""`Loss`: the choices that make one loss, put together; and `Balance`, what class counts do to it.

Separate from the classifier, which owns rows and gradients, so that a loss can be built, checked and described without
any row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megaclass.objectives.margin import MARGINS, Margin
from megaclass.objectives.negative_map import NEGATIVE_MAPS, NegativeMap
from megaclass.objectives.objective import OBJECTIVES, Objective
from megaclass.objectives.presets import Preset, check_exponents, check_negatives
from megaclass.parallel.shard import ClassShard
from megaclass.sampling import Sampler
from megaclass.sampling import samplers as all_samplers


@dataclass(frozen=True)
class Loss:
    """What the class layer computes; immutable, the same on every rank.

    Attributes:
        preset: the resolved options, and how they move over the run.
        objective, margin, negative_map, sampler: the parts.
        use_maximum: sum exponentials relative to each sample's largest.
        negative_filter: negatives with a cosine above it are dropped; None keeps all.
        rows_per_class: sub-centres; the one with the largest cosine stands for its class. Source: Deng et al.,
            "Sub-center ArcFace", ECCV 2020.
        normalisation: `l2` or `batch-norm`, see `micro_batch.normalised`.
        seed: of random margins.
    """

    preset: Preset
    objective: Objective
    margin: Margin
    negative_map: NegativeMap
    sampler: Sampler
    use_maximum: bool
    negative_filter: float | None
    rows_per_class: int
    normalisation: str
    seed: int

    @property
    def sends_whole_batch(self) -> bool:
        """Whether every shard gets every embedding, so that none need wait for the draw."""
        return self.preset.sampler != "batch"


def build(
    preset: Preset,
    num_classes: int,
    *,
    seed: int,
    negative_filter: float | None = None,
    rows_per_class: int = 1,
    normalisation: str = "l2",
    graph: all_samplers.Graph | None = None,
) -> Loss:
    """The loss of a resolved preset over so many classes.

    Raises:
        ConfigError: no negative in the whole matrix, exponents that float32 cannot hold, or embeddings without unit
            length for a margin in angles.
    """
    check_negatives(preset, num_classes)
    use_maximum = check_exponents(preset, num_classes, normalisation)
    return Loss(
        preset=preset,
        objective=OBJECTIVES.build(preset.objective, preset.hyper),
        margin=MARGINS.build(preset.margin_kind, preset.hyper),
        negative_map=NEGATIVE_MAPS.build(preset.negative_map, preset.hyper),
        sampler=all_samplers.build(preset, seed, graph),
        use_maximum=use_maximum,
        negative_filter=negative_filter,
        rows_per_class=rows_per_class,
        normalisation=normalisation,
        seed=seed,
    )


@dataclass(frozen=True)
class Balance:
    """Weights and margins of this shard's classes.

    Attributes:
        weights: [shard.num_rows], what the samples of each class count; None: all one.
        margin_factors: [shard.num_rows], what the margin is multiplied by for them; None: all one.
    """

    weights: Tensor | None
    margin_factors: Tensor | None

    def to(self, like: Tensor) -> Balance:
        """The same in the type and on the device of `like`."""
        return Balance(*(None if x is None else x.to(like) for x in (self.weights, self.margin_factors)))


def balance(
    counts: NDArray[np.int64], shard: ClassShard, *, weight_power: float, margin_power: float
) -> Balance | None:
    """Weights n^-a and margin factors (n / smallest n)^-b of this shard's classes, for classes with n samples.

    Weights are scaled so that their mean over the training samples is one; a = 1 lets every class count alike. The
    margin of the rarest class is the given one and falls for larger ones; b = 1/4 is that of label-distribution-aware
    margins (Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss", NeurIPS 2019, eq.
    13).

    Args:
        counts: [num_classes] training samples of each class, of all shards; a class without any counts as one.
        shard: which of them are here.
        weight_power: a; 0 leaves all weights at one.
        margin_power: b; 0 leaves all margins alike.
    """
    if not weight_power and not margin_power:
        return None
    n = np.maximum(counts, 1).astype(np.float64)
    own = slice(shard.start, shard.stop)
    weights = margins = None
    if weight_power:
        raw = n**-weight_power
        weights = torch.from_numpy((raw * (counts.sum() / (counts * raw).sum()))[own])
    if margin_power:
        margins = torch.from_numpy((n / n.min())[own] ** -margin_power)
    return Balance(weights, margins)
