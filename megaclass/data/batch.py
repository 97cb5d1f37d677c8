"""What a reader yields: `Batch`, and the `Reader` protocol every source of batches follows.

Separate from the readers because the training loop and the evaluation know only these two names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class SkippedSample:
    """One sample that could not be used and was replaced.

    Attributes:
        sample_id: its id in the split.
        reason: from a small fixed set, `bad_samples.REASONS`.
        detail: what exactly was found and where, in words.
        shard: the file it lies in; None where there is none.
        key: its name in the shard; None where not even that could be read.
    """

    sample_id: int
    reason: str
    detail: str
    shard: str | None = None
    key: str | None = None


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch.

    Attributes:
        images: [batch, channels, height, width], uint8 in any layout, or float32 in [-1, 1] where augmentation left no
            whole numbers. `to` makes float32 of both: eight bits are a quarter of what has to be moved between
            processes and to a GPU, which can do this on the side.
        labels: [batch] int64 global class ids.
        ids: [batch] int64 sample ids: positions in the split's manifest order, independent of ranks.
        position: samples consumed after this batch, over all ranks; a reader that seeks to it continues with the
            next batch.
        skipped: samples of this rank's part that were replaced by others under the `skip` policy.
        num_read: samples taken from the data set for it, bad ones and substitutes included, counted where they are
            read; None from a reader that does not count.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor
    position: int
    skipped: tuple[SkippedSample, ...] = ()
    num_read: int | None = None

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on `device` and its images as contiguous float32 in [-1, 1].

        Copied asynchronously from pinned memory where possible, and normalised there.
        """
        images = self.images.to(device, non_blocking=True)
        if images.dtype == torch.uint8:
            images = normalise(images)
        return replace(self, images=images, labels=self.labels.to(device, non_blocking=True))


def normalise(pixels: Tensor) -> Tensor:
    """uint8 [...] as contiguous float32 in [-1, 1]: x / 127.5 - 1."""
    divided = pixels.to(torch.float32, memory_format=torch.contiguous_format)
    # A tensor on the device: by a number of Python's, a GPU multiplies with the rounded 1 / 127.5 instead.
    return divided.div_(torch.full((), 127.5, device=pixels.device)).sub_(1.0)


class Reader(Protocol):
    """An endless source of full batches for one rank.

    Attributes:
        num_classes: labels are in [0, num_classes).
        num_samples: positions of one epoch, over all ranks: as many as there are samples.
        class_counts: [num_classes] int64, samples of each class, by their true labels, however often the order
            visits them; same on every rank.
    """

    num_classes: int
    num_samples: int
    class_counts: NDArray[np.int64]

    def __iter__(self) -> Iterator[Batch]:
        """Endless; every batch is full; starts at the position last given to `seek` (0 at first)."""
        ...

    def seek(self, position: int) -> None:
        """Continue after `position` samples of the one global sequence, counted over all ranks."""
        ...

    def close(self) -> None:
        """End worker processes and release open files."""
        ...
