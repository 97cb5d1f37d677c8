"""Made-up samples: one random pattern per class plus noise, computed when asked for and never stored.

Separate because tests and benchmarks need any number of classes at once, without a data set on disk. The patterns are
8 x 8 random cells drawn up to the image size, so that a small backbone can tell them apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megaclass.data.bad_samples import BadSample
from megaclass.data.counter import Stream, hash_counters
from megaclass.data.open_batches import open_batches
from megaclass.data.open_order import OrderOptions
from megaclass.data.options import ReaderOptions
from megaclass.data.reader import BatchReader

_CELLS = 8


@dataclass(frozen=True)
class SyntheticSamples:
    """Sample i is of populated class `i div samples_per_class`: pattern of the class + noise of the sample.

    Populated are `num_populated` classes, evenly spread over all, or all of them.

    Pattern cells and noise pixels are evenly distributed, with standard deviation 1 and `noise`; their sum is scaled
    to the range of uint8, so nothing is cut off.
    """

    num_classes: int
    samples_per_class: int
    noise: float
    image_size: int
    channels: int
    seed: int
    num_populated: int | None = None

    @property
    def num_samples(self) -> int:
        """Ids are in [0, num_samples)."""
        return (self.num_populated or self.num_classes) * self.samples_per_class

    def labels(self, sample_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """The classes [n] int64 of samples [n]."""
        populated = sample_ids // self.samples_per_class
        return populated if self.num_populated is None else populated * self.num_classes // self.num_populated

    def class_counts(self) -> NDArray[np.int64]:
        """Samples of each class, [num_classes]."""
        counts = np.zeros(self.num_classes, np.int64)
        counts[self.labels(np.arange(0, self.num_samples, self.samples_per_class))] = self.samples_per_class
        return counts

    def read(self, sample_ids: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.int64], dict[int, BadSample]]:
        """Images [n, image_size, image_size, channels] uint8, labels [n] int64, and no bad ones."""
        labels = self.labels(sample_ids)
        size, channels = self.image_size, self.channels
        cells = self._values(Stream.PATTERN, labels, _CELLS * _CELLS * channels)
        pixel_cells = np.arange(size) * _CELLS // size
        patterns = cells.reshape(-1, _CELLS, _CELLS, channels)[:, pixel_cells][:, :, pixel_cells]
        images = self._values(Stream.NOISE, sample_ids, size * size * channels).reshape(-1, size, size, channels)
        images *= self.noise
        images += patterns
        images *= 127.5 / (1.0 + self.noise)
        images += 128.0
        return images.astype(np.uint8), labels, {}

    def _values(self, stream: Stream, keys: NDArray[np.int64], num_values: int) -> NDArray[np.float32]:
        """[n, num_values] float32, evenly distributed in (-1, 1): four from each 64 random bits."""
        bits = hash_counters(self.seed, stream, keys[:, None], np.arange(math.ceil(num_values / 4)))
        values = bits.astype("<u8").view("<u2")[:, :num_values].astype(np.float32)
        values -= 32767.5
        values /= 32768.0
        return values


class SyntheticReader(BatchReader):
    """Batches of synthetic samples, in the same order logic as `IndexedReader`.

    Args:
        options: what every reader is told; no sample is bad.
        num_classes, samples_per_class, noise, num_populated: see `SyntheticSamples`.
        order, label_noise: as for `IndexedReader`.

    Raises:
        ConfigError: wrong labels of a single class.
        DataError: an epoch is smaller than a global batch, or there are too few classes for the order.
    """

    def __init__(
        self,
        options: ReaderOptions,
        *,
        num_classes: int,
        samples_per_class: int,
        noise: float,
        order: OrderOptions | None = None,
        label_noise: float = 0.0,
        num_populated: int | None = None,
    ) -> None:
        samples = SyntheticSamples(
            num_classes, samples_per_class, noise, options.image_size, options.channels, options.seed, num_populated
        )
        batches = open_batches(
            samples,
            options,
            num_classes=num_classes,
            shard_sizes=np.array([samples.num_samples]),
            true_labels=lambda: samples.labels(np.arange(samples.num_samples)),
            label_noise=label_noise,
            order=order,
            what="the synthetic data set",
        )
        super().__init__(
            batches.plan,
            batches.make,
            options,
            class_counts=samples.class_counts(),
            num_samples=samples.num_samples,
        )
