"""From a position of the one sequence to a finished batch: order, samples, substitutes, augmentation.

Separate because samples on disk and synthetic ones go exactly the same way. Everything here is a pure function of the
position, so it may run in any process.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from megaclass.data.bad_samples import BadSample
from megaclass.data.batch import Batch, SkippedSample
from megaclass.data.counter import Stream, hash_counters
from megaclass.data.options import ReaderOptions
from megaclass.data.order import Order, rank_positions
from megaclass.data.transforms import transform
from megaclass.errors import DataError

_MAX_TRIES = 100


class Samples(Protocol):
    """Samples by id; see `StoredSamples`."""

    @property
    def num_samples(self) -> int:
        """Ids are in [0, num_samples)."""
        ...

    def read(self, sample_ids: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.int64], dict[int, BadSample]]:
        """Images [n, size, size, channels] uint8, labels [n] int64, and the bad ones by place."""
        ...


@dataclass(frozen=True)
class OrderedBatches:
    """Position → the batch of one rank that starts there.

    Attributes:
        samples: where images and labels come from.
        order: which sample stands at a position.
        options: what the reader is told.
    """

    samples: Samples
    order: Order
    options: ReaderOptions

    def plan(self, position: int) -> Iterator[int]:
        """The positions that batches start at, from this one on; endless."""
        return count(position, self.options.micro_batch_size)

    def make(self, position: int) -> Batch:
        """This rank's part of the micro-batch over all ranks that starts at `position`.

        Raises:
            DataError: a bad sample that is not to be skipped, or no good one found in its place.
        """
        options = self.options
        positions = rank_positions(position, options.batch_size, options.rank, options.world_size)
        ids, visits = self.order.visits(positions)
        images, labels, bad = self.samples.read(ids)
        num_read = len(ids)
        skipped: list[SkippedSample] = []
        known_bad = {int(ids[place]) for place in bad}
        for place, error in bad.items():
            if not options.is_skipping:
                raise error.as_data_error()
            skipped.append(error.as_skipped(int(ids[place])))
            ids[place], images[place], labels[place], tries = self._substitute(
                int(positions[place]), known_bad, skipped
            )
            num_read += tries
        pixels = transform(images, ids, visits, options.seed, options.augment)
        end = position + options.micro_batch_size
        return Batch(pixels, torch.from_numpy(labels), torch.from_numpy(ids), end, tuple(skipped), num_read)

    def _substitute(
        self, position: int, known_bad: set[int], skipped: list[SkippedSample]
    ) -> tuple[int, NDArray[np.uint8], int, int]:
        """A good sample in place of the one at `position`, and how many were read to find it.

        Bad ones met on the way join `known_bad` and `skipped`.
        """
        num_read = 0
        picks = hash_counters(self.options.seed, Stream.SUBSTITUTE, position, np.arange(_MAX_TRIES))
        for pick in (picks % np.uint64(self.samples.num_samples)).astype(np.int64).tolist():
            if pick in known_bad:
                continue
            images, labels, bad = self.samples.read(np.array([pick]))
            num_read += 1
            if not bad:
                return pick, images[0], int(labels[0]), num_read
            known_bad.add(pick)
            skipped.append(bad[0].as_skipped(pick))
        raise DataError(
            f"no usable sample found in {_MAX_TRIES} tries in place of a bad one; the last was {skipped[-1].detail} "
            f"({skipped[-1].reason}); repair the data set"
        )
