"""What makes a sample unusable, and how many of them a run may skip.

Separate because the parser, the decoder and all readers share the reasons, and because the budget is counted where
batches are consumed while bad samples are met in worker processes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from megaclass.data.batch import SkippedSample
from megaclass.errors import DataError

REASONS = ("unreadable", "bad-tar", "bad-label", "bad-image", "image-too-large", "unsupported-image")


class BadSample(Exception):
    """One sample that cannot be used: a reason from `REASONS`, and what exactly was found and where.

    Never reaches the user as it is: the `stop` policy turns it into a `DataError`, `skip` into a `SkippedSample`.
    `shard` and `key` are those of `SkippedSample`.
    """

    def __init__(self, reason: str, detail: str, shard: str | None = None, key: str | None = None) -> None:
        assert reason in REASONS, reason
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail
        self.shard = shard
        self.key = key

    def located(self, where: str, shard: str | None = None, key: str | None = None) -> BadSample:
        """The same with the place in front, in words: shard, key, offset."""
        return BadSample(self.reason, f"{where}: {self.detail}", shard or self.shard, key or self.key)

    def as_skipped(self, sample_id: int) -> SkippedSample:
        """What a batch tells of it under the `skip` policy."""
        return SkippedSample(sample_id, self.reason, self.detail, self.shard, self.key)

    def as_data_error(self) -> DataError:
        """The error that ends the run under the `stop` policy."""
        return DataError(
            f"{self.detail} ({self.reason}); repair the data set, or set dataset.on_bad_sample: skip to go on without "
            "such samples"
        )


class SkipBudget:
    """Counts the skipped samples of one rank and stops the run when they are too many.

    Allowed is `share` of the samples read (used and skipped, bad substitutes included), but never less than that share
    of one epoch's part of this rank: a bad sample in the first batch is judged as one of an epoch. With several ranks
    the bad samples fall on them by chance, so four standard deviations of that count are allowed on top and no
    communication is needed. Counts start anew with every iteration.
    """

    def __init__(self, share: float, num_samples: int, world_size: int) -> None:
        self._share = share
        self._epoch_samples = num_samples / world_size
        self._is_shared = world_size > 1
        self._num_read = 0
        self._num_skipped = 0

    def restart(self) -> None:
        """Forget the counts."""
        self._num_read = self._num_skipped = 0

    def count(self, num_used: int, skipped: Sequence[SkippedSample]) -> None:
        """Add a batch of `num_used` samples in which others were skipped.

        Raises:
            DataError: more samples were skipped than allowed.
        """
        self._num_read += num_used + len(skipped)
        self._num_skipped += len(skipped)
        expected = self._share * max(self._num_read, self._epoch_samples)
        allowed = math.floor(expected + (4 * math.sqrt(expected) if self._is_shared else 0) + 1e-9)
        if skipped and self._num_skipped > allowed:
            raise DataError(
                f"{self._num_skipped} of the {self._num_read} samples this rank read had to be "
                f"skipped, allowed are {allowed} (dataset.bad_sample_budget {self._share:g}); the last was "
                f"{skipped[-1].detail} ({skipped[-1].reason}); repair the data set or raise the budget"
            )
