"""What became of every sample that was read, over all ranks and attempts, and the check that none is unaccounted for.

Separate because it is the proof of the data layer's promise and must not rely on it: samples read are counted by the
readers where they read, samples trained by the loop where it trains, and the position comes from the order. Three
counts of one thing that are kept apart can disagree; one from which the others are computed cannot.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from megaclass.data.bad_samples import REASONS
from megaclass.data.batch import Batch
from megaclass.errors import DataError
from megaclass.parallel.collectives import sum_over_ranks
from megaclass.parallel.process import World


@dataclass(frozen=True)
class SampleCounts:
    """Samples of the steps that stand, over all ranks and attempts, up to a step; steps that were lost are not in it.

    Attributes:
        step: the last step counted.
        trained: samples that a step was taken with, substitutes included.
        read: samples that were taken from the data set for it, usable or not, substitutes included.
        skipped: unusable samples by reason, unusable substitutes included.
        unlisted: of these, how many found the list of skipped samples full.
        epochs_checked: epoch ends at which the counts were compared.
    """

    step: int = 0
    trained: int = 0
    read: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    unlisted: int = 0
    epochs_checked: int = 0

    @property
    def num_skipped(self) -> int:
        """Over all reasons."""
        return sum(self.skipped.values())

    def to_state(self) -> dict[str, Any]:
        """What a checkpoint keeps; plain JSON."""
        return {"read": self.read, "unlisted": self.unlisted, "epochs_checked": self.epochs_checked}

    def to_summary(self) -> dict[str, Any]:
        """What summary.json tells; the replayed ones are counted elsewhere."""
        return {
            "read": self.read,
            "trained": self.trained,
            "skipped": self.skipped,
            "unlisted": self.unlisted,
            "step": self.step,
            "epochs_checked": self.epochs_checked,
        }

    def check(self, position: int) -> None:
        """Compare the counts with each other and with the position of the order.

        Raises:
            AssertionError: they disagree; a fault of ours.
        """
        told = f"step {self.step}: {self.read} samples read, {self.trained} trained, {self.num_skipped} skipped"
        # Raised and not asserted: it must hold in an optimised interpreter, too.
        if self.trained != position:
            raise AssertionError(f"{told}, but the order stands at {position}: trained is not the position")
        if self.read != self.trained + self.num_skipped:
            raise AssertionError(f"{told}: read is not trained + skipped, samples are unaccounted for")


class SampleAccount:
    """Counts this rank's samples step by step, and adds up and checks all ranks' when asked to.

    Args:
        world: this process among all.
        num_samples: of an epoch.
        budget: largest share of skipped samples, `dataset.bad_sample_budget`.
        position: samples trained before this attempt.
        step: steps taken before this attempt.
        extra: what the checkpoint holds of earlier attempts, `skipped` and `samples`; empty for a new run.

    Attributes:
        settled: the counts as of the last `settle`.
    """

    def __init__(
        self, world: World, num_samples: int, budget: float, *, position: int, step: int, extra: dict[str, Any]
    ) -> None:
        self._world = world
        self._num_samples = num_samples
        self._budget = budget
        skipped = dict(extra.get("skipped", {}))
        # Checkpoints written before reading was counted apart hold the skipped samples alone.
        state = {"read": position + sum(skipped.values()), "unlisted": 0, "epochs_checked": 0}
        state |= extra.get("samples", {})
        self.settled = SampleCounts(step=step, trained=position, skipped=skipped, **state)
        self._forget()

    def count(self, batches: Sequence[Batch], num_unlisted: int = 0) -> None:
        """Add one step's batches of this rank; `num_unlisted` of their skipped samples found the list full."""
        for batch in batches:
            self._trained += len(batch.ids)
            self._read += len(batch.ids) + len(batch.skipped) if batch.num_read is None else batch.num_read
            for sample in batch.skipped:
                self._skipped[sample.reason] += 1
        self._unlisted += num_unlisted

    def is_end_of_epoch(self, position: int, global_batch_size: int) -> bool:
        """Whether the step that ended at `position` went over the end of an epoch."""
        return position // self._num_samples > (position - global_batch_size) // self._num_samples

    def settle(self, step: int, position: int, is_end_of_epoch: bool = False) -> SampleCounts:
        """The counts up to `step` over all ranks, compared with the position; a collective, called by all ranks.

        Raises:
            AssertionError: see `SampleCounts.check`; on all ranks alike.
            DataError: the whole run has skipped more than the budget allows; on all ranks alike.
        """
        own = [self._trained, self._read, self._unlisted, *(self._skipped[reason] for reason in REASONS)]
        summed = sum_over_ranks(torch.tensor(own, device=self._world.device), self._world.group).tolist()
        trained, read, unlisted, *reasons = summed
        before = self.settled
        skipped = dict(before.skipped)
        for reason, number in zip(REASONS, reasons, strict=True):
            if number:
                skipped[reason] = skipped.get(reason, 0) + number
        self.settled = SampleCounts(
            step=step,
            trained=before.trained + trained,
            read=before.read + read,
            skipped=dict(sorted(skipped.items())),
            unlisted=before.unlisted + unlisted,
            epochs_checked=before.epochs_checked + is_end_of_epoch,
        )
        self._forget()
        self.settled.check(position)
        self._check_budget()
        return self.settled

    def _check_budget(self) -> None:
        """The readers judge a rank's share since the run was started or continued; this is the run's, exactly."""
        counts = self.settled
        allowed = math.floor(self._budget * max(counts.read, self._num_samples) + 1e-9)
        if counts.num_skipped > allowed:
            raise DataError(
                f"{counts.num_skipped} of the {counts.read} samples read up to step {counts.step} had to be skipped, "
                f"allowed are {allowed} (dataset.bad_sample_budget {self._budget:g}); skipped/ in the run directory "
                "lists them; repair the data set or raise the budget"
            )

    def _forget(self) -> None:
        self._trained = self._read = self._unlisted = 0
        self._skipped = dict.fromkeys(REASONS, 0)
