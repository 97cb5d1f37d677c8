"""How much one rank has to do in a step: rows, samples, logits; counted from the configuration without a tensor."""

from __future__ import annotations

from dataclasses import dataclass

from megaclass.config import Config
from megaclass.errors import ConfigError
from megaclass.objectives.presets import Preset
from megaclass.parallel.shard import ClassShard
from megaclass.sampling.picks import number_drawn


@dataclass(frozen=True)
class Work:
    """The head's work of the rank with the largest shard, for one micro-batch.

    Expected numbers: labels are taken to be spread evenly, and all classes of a batch to be different.

    Attributes:
        world_size: ranks.
        num_classes: over all ranks.
        dim: of the embedding.
        num_rows: class-weight rows of the shard, sub-centres included.
        batch: samples of this rank in a micro-batch.
        global_batch: over all ranks.
        inter_batch: samples that have an inter term.
        num_candidates: rows that are negatives.
        num_touched: rows that have a gradient.
        is_sampled: whether candidates are a list of rows rather than all of them.
        num_micro: micro-batches of a step.
    """

    world_size: int
    num_classes: int
    dim: int
    num_rows: int
    batch: int
    global_batch: int
    inter_batch: int
    num_candidates: int
    num_touched: int
    is_sampled: bool
    num_micro: int

    @property
    def num_logits(self) -> int:
        """Products of one sample and one row in a micro-batch."""
        return self.inter_batch * self.num_candidates

    @property
    def is_routed(self) -> bool:
        """Whether embeddings without an inter term go to the owners of their classes alone."""
        return self.inter_batch + self.batch < self.global_batch

    @property
    def num_gathered(self) -> int:
        """Samples whose embeddings come to this rank: all, or those with an inter term and those of its classes."""
        return self.inter_batch + self.batch if self.is_routed else self.global_batch


def count(config: Config, preset: Preset, num_classes: int, world_size: int) -> Work:
    """The work of one rank.

    Raises:
        ConfigError: no rank or no class.
    """
    for name, value in (("world size", world_size), ("number of classes", num_classes)):
        if value < 1:
            raise ConfigError(f"{name} {value} is less than 1; give at least 1")
    batch = config.train.global_batch_size // (world_size * config.train.accumulation_steps)
    everyone = batch * world_size
    shard = ClassShard(num_classes, 0, world_size).num_rows
    own = min(shard, -(-everyone // world_size))
    rate = max(preset.reached("sampling_rate"), default=1.0)
    drawn = min(shard, -(-number_drawn(rate, num_classes) // world_size))
    candidates, joined = shard, 0
    if preset.sampler == "classes":
        candidates, joined = drawn, own if preset.batch_positives else 0
    elif preset.sampler == "partial-fc":
        candidates, joined = max(drawn, own), 0
    elif preset.sampler == "positives":
        candidates = own
    elif preset.sampler == "hard":
        candidates, joined = drawn, own * ((preset.num_neighbours or 0) + bool(preset.batch_positives))
    # Of classes that join a random draw, the share of the draw is in it already.
    candidates = min(shard, candidates + round(joined * (1 - candidates / shard)))
    includes_own = preset.sampler in ("partial-fc", "positives") or bool(preset.batch_positives)
    touched = candidates if includes_own else candidates + round(own * (1 - candidates / shard))
    centres = config.classifier.sub_centres
    return Work(
        world_size=world_size,
        num_classes=num_classes,
        dim=config.backbone.dim,
        num_rows=shard * centres,
        batch=batch,
        global_batch=everyone,
        inter_batch=number_drawn(rate, everyone) if preset.sampler == "batch" else everyone,
        num_candidates=candidates * centres,
        num_touched=min(shard, touched) * centres
        if centres == 1 or candidates == shard
        else candidates * centres + own,
        is_sampled=preset.sampler not in ("all", "batch"),
        num_micro=config.train.accumulation_steps,
    )
