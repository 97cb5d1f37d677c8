"""Which classes look like duplicates of one another, and which classes and samples look mislabelled.

Pure mathematics on embeddings, labels and class weights; where they come from is `train.classes`' business. Everything
is a ranking: no threshold here says what is wrong with a data set. All cosines are float32, computed for a tile of
samples and classes (or of classes and classes) at a time, so that no table of [samples, classes] or [classes, classes]
is ever held.

A class may have several rows (sub-centres). The cosine of a sample and a class is then the largest over the class's
rows, and the cosine of two classes the largest over pairs of their rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megaclass.evaluate.similarity import blocks

TILE_ROWS = 4096
TILE_SAMPLES = 2048
PERCENTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99)


class ClassRows(Protocol):
    """The class weights, read a range of classes at a time.

    Attributes:
        num_classes: classes are in [0, num_classes).
        rows_per_class: rows of each class, next to each other.
    """

    @property
    def num_classes(self) -> int:
        """Classes are in [0, num_classes)."""

    @property
    def rows_per_class(self) -> int:
        """Rows of each class, at least 1."""

    def read(self, start: int, stop: int) -> Tensor:
        """Rows of the classes [start, stop): [(stop - start) * rows_per_class, dim] float32, unit length."""


class NearestClasses(NamedTuple):
    """Where each sample lies among the class weights; all [n], on the CPU.

    Attributes:
        own_cosine: float32, with the class of the sample's label.
        other_class: int64, the nearest of all other classes.
        other_cosine: float32, with that class.
    """

    own_cosine: Tensor
    other_class: Tensor
    other_cosine: Tensor

    @property
    def margin(self) -> Tensor:
        """`other_cosine - own_cosine`, [n]: positive where another class is nearer than the own."""
        return self.other_cosine - self.own_cosine


def nearest_classes(embeddings: Tensor, labels: Tensor, rows: ClassRows) -> NearestClasses:
    """Cosine of every sample with its own class, and the nearest of all other classes.

    Args:
        embeddings: [n, dim] float32, unit length.
        labels: [n] int64, on the CPU.
        rows: the class weights, of two classes or more; the cosines are computed where they lie.

    Returns:
        See `NearestClasses`; of equally near classes the first.

    Cost: n * rows * dim multiplications in float32, one pass over the class weights, memory for one tile.
    """
    num_samples = len(labels)
    own_cosine, other_cosine = torch.zeros(num_samples), torch.full((num_samples,), -torch.inf)
    other_class = torch.full((num_samples,), -1, dtype=torch.int64)
    for classes in _class_blocks(rows):
        weight = rows.read(classes.start, classes.stop)
        for part in blocks(num_samples, TILE_SAMPLES):
            cosines = class_cosines(embeddings[part].to(weight.device), weight, rows.rows_per_class)
            column = labels[part] - classes.start
            is_here = (column >= 0) & (column < cosines.shape[1])
            at = torch.nonzero(is_here).flatten().to(weight.device), column[is_here].to(weight.device)
            own_cosine[part][is_here] = cosines[at].cpu()
            # The own class is no candidate for the nearest other one.
            cosines[at] = -torch.inf
            best, best_column = (found.cpu() for found in cosines.max(dim=1))
            is_nearer = best > other_cosine[part]
            other_cosine[part][is_nearer] = best[is_nearer]
            other_class[part][is_nearer] = best_column[is_nearer] + classes.start
    return NearestClasses(own_cosine, other_class, other_cosine)


class ClosePairs(NamedTuple):
    """The pairs of classes with the largest cosines of their class weights, largest first; on the CPU.

    Attributes:
        pairs: [p, 2] int64, the lower class first.
        cosines: [p] float32.
        nearest_cosine: [num_classes] float32, of each class with the nearest other one; minus infinity if alone.
    """

    pairs: Tensor
    cosines: Tensor
    nearest_cosine: Tensor


def close_pairs(rows: ClassRows, num_pairs: int) -> ClosePairs:
    """The `num_pairs` pairs of classes (all, where there are fewer) whose class weights are most alike.

    Which of several pairs with equal cosines is the last of the list is left open.

    Cost: rows² * dim / 2 multiplications in float32; the class weights are read once for each block of them; memory
    for one tile of classes and classes.
    """
    nearest = torch.full((rows.num_classes,), -torch.inf)
    cosines, pairs = torch.empty(0), torch.empty(0, 2, dtype=torch.int64)
    for left in _class_blocks(rows):
        left_weight = rows.read(left.start, left.stop)
        for right in _class_blocks(rows, left.start):
            right_weight = rows.read(right.start, right.stop)
            tile = class_cosines(left_weight, right_weight, rows.rows_per_class)
            tile = tile.unflatten(0, (-1, rows.rows_per_class)).amax(dim=1)
            if right.start == left.start:
                # A class with itself is no pair, and the lower half repeats the upper.
                tile.masked_fill_(torch.ones_like(tile, dtype=torch.bool).tril(), -torch.inf)
            best = tile.amax(dim=1).cpu()
            nearest[left] = torch.maximum(nearest[left], best)
            nearest[right] = torch.maximum(nearest[right], tile.amax(dim=0).cpu())
            if len(cosines) < num_pairs or bool(best.max() > cosines[-1]):
                found, place = tile.flatten().topk(min(num_pairs, tile.numel()))
                found, place = found.cpu(), place[found > -torch.inf].cpu()
                found = found[found > -torch.inf]
                new = torch.stack([place // tile.shape[1] + left.start, place % tile.shape[1] + right.start], dim=1)
                cosines, pairs = torch.cat([cosines, found]), torch.cat([pairs, new])
                order = np.lexsort((pairs[:, 1].numpy(), pairs[:, 0].numpy(), -cosines.numpy()))[:num_pairs]
                cosines, pairs = cosines[torch.from_numpy(order)], pairs[torch.from_numpy(order)]
    return ClosePairs(pairs, cosines, nearest)


@dataclass(frozen=True)
class DuplicateCandidate:
    """A pair of classes that may be one, `first` the lower.

    Attributes:
        weight_cosine: of the class weights.
        mean_cosine: of the mean embeddings of their samples; None if one of the classes has no sample.
        first_share: share of the samples of `first` that are nearer to the class weight of `second`, a tie as half;
            None if it has no sample.
        second_share: the same the other way round.
    """

    first: int
    second: int
    weight_cosine: float
    mean_cosine: float | None
    first_share: float | None
    second_share: float | None

    @property
    def confusion(self) -> float:
        """The two shares together, at most 1; a share that is not known counts as 0.

        It is 1 where the samples do not depend on which of the two labels they have: whatever share of them then lies
        nearer to `second`, the rest of the other class's samples lies nearer to `first`.
        """
        return min((self.first_share or 0.0) + (self.second_share or 0.0), 1.0)

    @property
    def score(self) -> float:
        """Mean of `weight_cosine`, `mean_cosine` and `confusion`, 1 for the same class twice; what is None counts 0."""
        return (self.weight_cosine + (self.mean_cosine or 0.0) + self.confusion) / 3


def duplicates(embeddings: Tensor, labels: Tensor, rows: ClassRows, candidates: ClosePairs) -> list[DuplicateCandidate]:
    """The candidates judged by their samples as well as their class weights, the highest score first.

    Args:
        embeddings: [n, dim] float32, unit length.
        labels: [n] int64, on the CPU.
        rows: the class weights.
        candidates: of the same class weights.

    Cost: the samples and rows of each candidate are read once; memory for those of one pair and an order of samples.
    """
    order = torch.argsort(labels, stable=True)
    starts = torch.searchsorted(labels[order], torch.arange(rows.num_classes + 1))
    judged = []
    for (first, second), cosine in zip(candidates.pairs.tolist(), candidates.cosines.tolist(), strict=True):
        weight = torch.cat([rows.read(label, label + 1) for label in (first, second)])
        shares: list[float | None] = [None, None]
        means = []
        for place, label in enumerate((first, second)):
            samples = embeddings[order[starts[label] : starts[label + 1]]].to(weight.device)
            if len(samples):
                cosines = class_cosines(samples, weight, rows.rows_per_class)
                ahead = cosines[:, 1 - place] - cosines[:, place]
                shares[place] = float((ahead.sign() + 1).mean() / 2)
                means.append(samples.mean(dim=0))
        mean_cosine = float(torch.cosine_similarity(means[0], means[1], dim=0)) if len(means) == 2 else None
        judged.append(DuplicateCandidate(first, second, cosine, mean_cosine, *shares))
    return sorted(judged, key=lambda pair: (-pair.score, pair.first, pair.second))


def strays(nearest: NearestClasses) -> NDArray[np.int64]:
    """Places of the samples that are nearer to another class than to their own, the largest margin first."""
    margin = nearest.margin.numpy()
    found = np.flatnonzero(margin > 0)
    return found[np.argsort(-margin[found], kind="stable")].astype(np.int64)


@dataclass(frozen=True)
class ClassStatistics:
    """Every class by its own samples; all [num_classes], and NaN where a class has no sample.

    Attributes:
        num_samples: int64.
        mean_cosine: float64, mean of the cosines of the class's samples with its class weight.
        spread: float64, their standard deviation (population).
        stray_share: float64, share of its samples that are nearer to another class.
    """

    num_samples: NDArray[np.int64]
    mean_cosine: NDArray[np.float64]
    spread: NDArray[np.float64]
    stray_share: NDArray[np.float64]

    @cached_property
    def by_share(self) -> NDArray[np.int64]:
        """Classes that have samples, the largest share of strays first, then the lowest mean cosine."""
        return self._ranked(self.mean_cosine, -self.stray_share)

    @cached_property
    def by_cosine(self) -> NDArray[np.int64]:
        """Classes that have samples, the lowest mean cosine first, then the largest spread."""
        return self._ranked(-self.spread, self.mean_cosine)

    def _ranked(self, *keys: NDArray[np.float64]) -> NDArray[np.int64]:
        return np.lexsort(keys)[: int((self.num_samples > 0).sum())].astype(np.int64)


def class_statistics(nearest: NearestClasses, labels: Tensor, num_classes: int) -> ClassStatistics:
    """The statistics of every class.

    Args:
        nearest: of all samples.
        labels: [n] int64, on the CPU.
        num_classes: labels are in [0, num_classes).
    """
    classes, cosine = labels.numpy(), nearest.own_cosine.double().numpy()
    count = np.bincount(classes, minlength=num_classes)
    divisor = np.where(count, count, np.nan)
    mean = np.bincount(classes, cosine, num_classes) / divisor
    # About the mean rather than from sums of squares, which would cancel for classes that are tight.
    variance = np.bincount(classes, (cosine - mean[classes]) ** 2, num_classes) / divisor
    share = np.bincount(classes, (nearest.margin > 0).numpy().astype(np.float64), num_classes) / divisor
    return ClassStatistics(count, mean, np.sqrt(variance), share)


def percentiles(values: Tensor) -> dict[str, float]:
    """The percentiles of `PERCENTILES` of the finite values, by their number as text; empty if there are none."""
    finite = values[torch.isfinite(values)].double().numpy()
    if not len(finite):
        return {}
    found = np.percentile(finite, PERCENTILES)
    return {str(percent): float(value) for percent, value in zip(PERCENTILES, found, strict=True)}


def class_cosines(unit: Tensor, weight: Tensor, rows_per_class: int) -> Tensor:
    """Cosines [n, classes] of unit vectors [n, dim] with the unit rows [classes * rows_per_class, dim] of classes."""
    return (unit @ weight.T).unflatten(1, (-1, rows_per_class)).amax(dim=2)


def _class_blocks(rows: ClassRows, start: int = 0) -> list[slice]:
    """Ranges of classes from `start` on, of about `TILE_ROWS` rows each."""
    size = max(1, TILE_ROWS // rows.rows_per_class)
    return [slice(start + part.start, start + part.stop) for part in blocks(rows.num_classes - start, size)]
