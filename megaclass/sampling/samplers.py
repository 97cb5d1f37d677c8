"""The samplers: all rows, parts of the classes, parts of the batch, positives alone, hard negatives.

Where classes are always in (the batch's own, or near ones) beside classes drawn at random, they count with weight one;
the correction for the sampling applies to the drawn ones, and the sum is then unbiased given what is always in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megaclass.counter import STREAM_BATCH, STREAM_ROWS, stream_key
from megaclass.objectives.presets import Preset
from megaclass.parallel.shard import ClassShard
from megaclass.sampling.draw import Draw, Sampler
from megaclass.sampling.picks import number_drawn, stratified, uniform

# Names of the samplers that draw a part of the classes and read nothing of the others.
FEW_ROWS = ("classes", "partial-fc", "positives")
_PICKS = {"stratified": stratified, "uniform": uniform}
_HOST = torch.device("cpu")
_NOTHING = torch.empty(0, dtype=torch.int64)


class Graph(Protocol):
    """The nearest-class graph; see `megaclass.neighbours`."""

    def near(self, labels: Tensor) -> Tensor:
        """[batch] classes -> [batch, k] their nearest classes, -1 where there are fewer; same on every rank."""
        ...


@dataclass(frozen=True)
class AllRows:
    """Every class is a negative of every sample."""

    def draw(self, labels: Tensor, shard: ClassShard, draw_id: int, rate: float) -> Draw:
        """Nothing is drawn."""
        return Draw()

    def drawn(self, shard: ClassShard, draw_id: int, rate: float) -> Tensor:
        """None by name: all rows are in."""
        return _NOTHING


@dataclass(frozen=True)
class ClassSample:
    """A random part of the classes is negative for the whole batch: D-Softmax-K, sampled softmax.

    Attributes:
        seed: seed of the run.
        batch_positives: whether the batch's own classes join the drawn ones (beyond the quota).
        is_corrected: multiply what drawn classes contribute by 1 / (probability of being drawn).
        picks: `stratified` or `uniform`.
    """

    seed: int
    batch_positives: bool = False
    is_corrected: bool = False
    picks: str = "stratified"

    def draw(self, labels: Tensor, shard: ClassShard, draw_id: int, rate: float) -> Draw:
        """This shard's part of max(1, round(rate * classes)) picks; cost O(picks / ranks) where stratified."""
        num_picks = number_drawn(rate, shard.num_classes)
        rows = _drawn(num_picks, labels.device, shard, stream_key(self.seed, STREAM_ROWS, draw_id), self.picks)
        log_weight = _log_weight(num_picks, shard) if self.is_corrected else 0.0
        return (
            _joined(rows, _owned(labels, shard), log_weight) if self.batch_positives else Draw(rows, None, log_weight)
        )

    def drawn(self, shard: ClassShard, draw_id: int, rate: float) -> Tensor:
        """All picks: they do not depend on the labels."""
        num_picks = number_drawn(rate, shard.num_classes)
        return _drawn(num_picks, _HOST, shard, stream_key(self.seed, STREAM_ROWS, draw_id), self.picks)


@dataclass(frozen=True)
class PartialFC:
    """The batch's own classes, always, and random ones until the quota is full: Partial-FC.

    The quota is the sampling rate's share of the classes; where the batch's own classes alone are more, they exceed it.
    Random ones are drawn from all classes, so a few may coincide with the batch's and the quota is missed by those.
    Where no random one is drawn there is nothing that a correction could apply to.

    Attributes:
        seed, is_corrected, picks: as in `ClassSample`.
    """

    seed: int
    is_corrected: bool = False
    picks: str = "stratified"

    def draw(self, labels: Tensor, shard: ClassShard, draw_id: int, rate: float) -> Draw:
        """The union of both kinds on this shard; counting the batch's classes reads from the device."""
        num_picks = max(0, number_drawn(rate, shard.num_classes) - len(torch.unique(labels)))
        rows = _drawn(num_picks, labels.device, shard, stream_key(self.seed, STREAM_ROWS, draw_id), self.picks)
        return _joined(rows, _owned(labels, shard), _log_weight(num_picks, shard) if self.is_corrected else 0.0)

    def drawn(self, shard: ClassShard, draw_id: int, rate: float) -> Tensor:
        """None: how many are drawn depends on the labels, and with it which."""
        return _NOTHING


@dataclass(frozen=True)
class PositivesOnly:
    """The classes of the batch are each other's only negatives: no row is touched that has no positive."""

    def draw(self, labels: Tensor, shard: ClassShard, draw_id: int, rate: float) -> Draw:
        """The batch's own classes on this shard."""
        return Draw(torch.unique(_owned(labels, shard)))

    def drawn(self, shard: ClassShard, draw_id: int, rate: float) -> Tensor:
        """None: the labels say everything."""
        return _NOTHING


@dataclass(frozen=True)
class HardSample:
    """The classes nearest to the batch's own, mixed with random ones: ANN softmax, KNN softmax, HF-Softmax.

    Attributes:
        graph: gives the nearest classes.
        seed, batch_positives, is_corrected, picks: as in `ClassSample`.
    """

    graph: Graph
    seed: int
    batch_positives: bool = True
    is_corrected: bool = False
    picks: str = "stratified"

    def draw(self, labels: Tensor, shard: ClassShard, draw_id: int, rate: float) -> Draw:
        """The union on this shard of near classes, random picks and, by default, the batch's own classes."""
        num_picks = number_drawn(rate, shard.num_classes)
        rows = _drawn(num_picks, labels.device, shard, stream_key(self.seed, STREAM_ROWS, draw_id), self.picks)
        near = self.graph.near(labels).flatten()
        always = torch.cat([near, labels]) if self.batch_positives else near
        return _joined(rows, _owned(always, shard), _log_weight(num_picks, shard) if self.is_corrected else 0.0)

    def drawn(self, shard: ClassShard, draw_id: int, rate: float) -> Tensor:
        """The random picks."""
        num_picks = number_drawn(rate, shard.num_classes)
        return _drawn(num_picks, _HOST, shard, stream_key(self.seed, STREAM_ROWS, draw_id), self.picks)


@dataclass(frozen=True)
class BatchSample:
    """A random part of the batch meets all classes: D-Softmax-B.

    Attributes:
        seed: seed of the run.
    """

    seed: int

    def draw(self, labels: Tensor, shard: ClassShard, draw_id: int, rate: float) -> Draw:
        """max(1, round(rate * global batch)) stratified positions, the same on every rank."""
        size = len(labels)
        positions = stratified(
            size, number_drawn(rate, size), 0, size,
            key=stream_key(self.seed, STREAM_BATCH, draw_id), device=labels.device,
        )  # fmt: skip
        return Draw(batch_rows=positions)

    def drawn(self, shard: ClassShard, draw_id: int, rate: float) -> Tensor:
        """None by name: all rows are in."""
        return _NOTHING


def build(preset: Preset, seed: int, graph: Graph | None = None) -> Sampler:
    """The sampler a resolved preset names; `hard` needs the graph."""
    is_corrected, picks = preset.correction == "inverse-rate", preset.draw or "stratified"
    if preset.sampler == "classes":
        return ClassSample(seed, bool(preset.batch_positives), is_corrected, picks)
    if preset.sampler == "partial-fc":
        return PartialFC(seed, is_corrected, picks)
    if preset.sampler == "hard":
        assert graph is not None
        return HardSample(graph, seed, bool(preset.batch_positives), is_corrected, picks)
    if preset.sampler == "batch":
        return BatchSample(seed)
    return PositivesOnly() if preset.sampler == "positives" else AllRows()


def _drawn(num_picks: int, device: torch.device, shard: ClassShard, key: int, picks: str) -> Tensor:
    """This shard's part of the picks, as local classes."""
    return _PICKS[picks](shard.num_classes, num_picks, shard.start, shard.stop, key=key, device=device) - shard.start


def _owned(classes: Tensor, shard: ClassShard) -> Tensor:
    """Those of global classes [k] (-1: none) that are rows here, as local classes."""
    own = shard.to_row(classes)
    return own[own >= 0]


def _log_weight(num_picks: int, shard: ClassShard) -> float:
    return math.log(shard.num_classes / num_picks) if num_picks else 0.0


def _joined(rows: Tensor, always: Tensor, log_weight: float) -> Draw:
    """Drawn local classes and those that are always in; the latter have weight one."""
    union = torch.unique(torch.cat([rows, always]))
    if not log_weight:
        return Draw(union)
    return Draw(union, None, log_weight * torch.isin(union, always, invert=True).double())
