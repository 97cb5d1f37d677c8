"""The default reader: tar shards read by index, in an order that is exact to the sample.

Separate from `ordered.py` and `reader.py`, which do the work, because it is the only file that knows both of them and
the samples on disk.
"""

from __future__ import annotations

from pathlib import Path

from megaclass.data.open_batches import open_batches
from megaclass.data.open_order import OrderOptions
from megaclass.data.options import ReaderOptions
from megaclass.data.reader import BatchReader
from megaclass.data.samples import StoredSamples


class IndexedReader(BatchReader):
    """Batches of a split, each sample exactly once per epoch over all ranks, from any position at any world size.

    Args:
        folder: of the data set.
        split: to read.
        options: what every reader is told.
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
        options: ReaderOptions,
        *,
        order: OrderOptions | None = None,
        num_classes: int | None = None,
        label_noise: float = 0.0,
    ) -> None:
        samples = StoredSamples(
            folder, split, image_size=options.image_size, channels=options.channels, num_classes=num_classes
        )
        batches = open_batches(
            samples,
            options,
            num_classes=samples.num_classes,
            shard_sizes=samples.shard_sizes,
            true_labels=lambda: samples.labels,
            label_noise=label_noise,
            order=order,
            what=f"split {split!r} of {folder}",
        )
        super().__init__(
            batches.plan,
            batches.make,
            options,
            class_counts=samples.class_counts,
            num_samples=samples.num_samples,
            release=samples.close,
        )
