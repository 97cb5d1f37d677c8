"""What every reader is told, whatever it reads.

Separate because it goes as it is from `open.py` through each reader to what makes its batches. What only some of them
are told, such as an order, is an argument beside it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megaclass.config import Augment


@dataclass(frozen=True)
class ReaderOptions:
    """The batches that one rank is to read. The configuration refuses what a reader cannot do of it.

    Attributes:
        batch_size: of one rank and one micro-batch: global batch / (world size * accumulation steps).
        rank, world_size: which part of every micro-batch to read.
        seed: of the order, the augmentation and the substitutes; same on every rank.
        image_size, channels: of the images yielded, [batch, channels, image_size, image_size].
        augment: random changes; each drawn from (seed, visit, sample id).
        workers: decoding processes; 0 decodes in the trainer's process. Changes no number.
        on_bad_sample: `stop` raises; `skip` puts another sample, picked by hash, in its place.
        bad_sample_budget: largest share of skipped samples; see `SkipBudget`.
        accumulation_steps: micro-batches per step; only to check that the data set holds a global batch.
    """

    batch_size: int
    rank: int
    world_size: int
    seed: int
    image_size: int
    channels: int
    augment: Augment = field(default_factory=Augment)
    workers: int = 0
    on_bad_sample: Literal["stop", "skip"] = "stop"
    bad_sample_budget: float = 0.001
    accumulation_steps: int = 1

    @property
    def micro_batch_size(self) -> int:
        """Samples of a micro-batch over all ranks: positions from one batch to the next."""
        return self.batch_size * self.world_size

    @property
    def is_skipping(self) -> bool:
        """Whether bad samples are replaced by others instead of ending the run."""
        return self.on_bad_sample == "skip"
