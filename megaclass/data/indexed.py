"""The default reader: tar shards read by index, in an order that is exact to the sample.

Separate from `ordered.py` and `reader.py`, which do the work, because it is the only file that knows both of them and
the samples on disk.
"""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Literal

from megaclass.config import Augment
from megaclass.data.bad_samples import SkipBudget
from megaclass.data.open_batches import open_batches
from megaclass.data.open_order import OrderOptions
from megaclass.data.reader import BatchReader
from megaclass.data.samples import StoredSamples


class IndexedReader(BatchReader):
    """Batches of a split, each sample exactly once per epoch over all ranks, from any position at any world size.

    Args:
        folder: of the data set.
        split: to read.
        batch_size: of one rank and one micro-batch.
        rank, world_size: which part of every micro-batch to read.
        seed: of the order, the augmentation and the substitutes; same on every rank.
        image_size, channels: of the images yielded, [batch, channels, image_size, image_size].
        augment: random changes; each drawn from (seed, visit, sample id).
        workers: decoding processes; changes no number.
        on_bad_sample: `stop` raises; `skip` puts another sample, picked by hash, in its place.
        bad_sample_budget: largest share of skipped samples; see `SkipBudget`.
        accumulation_steps: only to check that the data set holds a global batch.
        order: of the samples; default: all shuffled, once per epoch.
        num_classes: read this many classes only; see `StoredSamples`.
        label_noise: share of samples with a wrong label; see `NoisyLabels`.

    Raises:
        ConfigError: more classes asked for than there are, or wrong labels of a single class.
        DataError: the data set is missing or inconsistent, a shard is cut off, an epoch is smaller than a global
            batch, or there are too few classes for the order.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        image_size: int,
        channels: int,
        augment: Augment | None = None,
        workers: int = 0,
        on_bad_sample: Literal["stop", "skip"] = "stop",
        bad_sample_budget: float = 0.001,
        accumulation_steps: int = 1,
        order: OrderOptions | None = None,
        num_classes: int | None = None,
        label_noise: float = 0.0,
    ) -> None:
        samples = StoredSamples(folder, split, image_size=image_size, channels=channels, num_classes=num_classes)
        batches = open_batches(
            samples,
            num_classes=samples.num_classes,
            shard_sizes=samples.shard_sizes,
            true_labels=lambda: samples.labels,
            label_noise=label_noise,
            order=order,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            accumulation_steps=accumulation_steps,
            seed=seed,
            augment=augment,
            is_skipping=on_bad_sample == "skip",
            what=f"split {split!r} of {folder}",
        )
        super().__init__(
            lambda position: count(position, batch_size * world_size),
            batches.make,
            class_counts=samples.class_counts,
            num_samples=samples.num_samples,
            workers=workers,
            batch_numbers=batch_size * channels * image_size**2,
            budget=SkipBudget(bad_sample_budget, samples.num_samples, world_size),
            release=samples.close,
        )
