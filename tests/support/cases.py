"""The cases of the oracle test: preset x class count x batch x kernel, and how a classifier is built for one."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from megaclass import objectives, sampling
from megaclass.classifier import ShardedClassifier
from megaclass.objectives import margins, presets
from megaclass.parallel.collectives import Group
from megaclass.parallel.shard import ClassShard

DIM = 7
SEED = 5
ALL_PRESETS = tuple(presets.PRESETS)


@dataclass(frozen=True)
class Case:
    """One configuration of the class layer and its input."""

    preset: str
    num_classes: int
    batch_size: int  # per rank
    labels: str  # "any": anywhere; "first": all on the first shard, so that other ranks have no positive
    batch_positives: bool | None = None
    kernel: str = "auto"
    dtype: torch.dtype = torch.float64

    def settings(self) -> presets.Preset:
        """The preset with options that make a small case interesting."""
        options: dict[str, float | bool | None] = {"scale": 16.0, "batch_positives": self.batch_positives}
        if presets.PRESETS[self.preset].sampling_rate is not None:
            options["sampling_rate"] = 0.3
        return presets.resolve(self.preset, **options)

    def inputs(self, world_size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Global embeddings [G, dim] of unequal lengths, labels [G] and class weights [C, dim], in the case's type."""
        generator = torch.Generator().manual_seed(self.num_classes * 100 + self.batch_size)
        global_batch = self.batch_size * world_size
        weight = torch.randn(self.num_classes, DIM, generator=generator, dtype=torch.float64)
        embeddings = 3 * torch.randn(global_batch, DIM, generator=generator, dtype=torch.float64)
        highest = self.num_classes if self.labels == "any" else max(1, self.num_classes // 4)
        labels = torch.randint(0, highest, (global_batch,), generator=generator)
        # Half the samples lie near their class: both ends of every loss are exercised.
        embeddings[::2] += 4 * weight[labels[::2]]
        return embeddings.to(self.dtype), labels, weight.to(self.dtype)

    def build(self, shard: ClassShard, group: Group, *, grad_divisor: int) -> ShardedClassifier:
        """The sharded classifier of this case, with the case's class weights in its rows."""
        settings = self.settings()
        options = {} if settings.end_point is None else {"end_point": settings.end_point}
        classifier = ShardedClassifier(
            DIM,
            shard,
            objectives.build(settings.objective, **options),
            margins.build(settings.margin_kind, settings.margin or 0.0),
            self.sampler(),
            scale=settings.scale,
            seed=SEED,
            group=group,
            grad_divisor=grad_divisor,
            kernel=self.kernel,
            dtype=self.dtype,
        )
        classifier.weight.data.copy_(self.inputs(shard.count)[2][shard.start : shard.stop])
        return classifier

    def sampler(self) -> sampling.Sampler:
        """The sampler of this case."""
        settings = self.settings()
        return sampling.build(settings.sampler, settings.sampling_rate, SEED, bool(settings.batch_positives))


def all_cases() -> list[Case]:
    """Every preset x class counts that do not divide (one below the number of ranks) x batches x label layouts."""
    cases = [
        Case(preset, num_classes, batch_size, labels)
        for preset, num_classes, batch_size, labels in itertools.product(
            ALL_PRESETS, (3, 13, 1003), (1, 5), ("any", "first")
        )
    ]
    cases += [Case(preset, 13, 5, "any", kernel="reference") for preset in ALL_PRESETS]
    cases += [Case(preset, 13, 5, "any", dtype=torch.float32) for preset in ALL_PRESETS]
    cases += [Case("d-softmax-k", num_classes, 5, "any", batch_positives=True) for num_classes in (3, 13, 1003)]
    return cases
