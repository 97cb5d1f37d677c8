"""`Draw`, one sampler result, and the `Sampler` protocol."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megaclass.parallel.shard import ClassShard


@dataclass(frozen=True)
class Draw:
    """One sampler result.

    Attributes:
        rows: [n] int64, unique and sorted local classes of this shard that are negative candidates; None: all.
        batch_rows: [m] int64, sorted positions in the global batch that have an inter term, the same on every rank;
            None: all.
        log_weight: a number, or [n] float64: ln of what each negative's contribution is multiplied by;
            ln(1 / inclusion probability) makes the sum unbiased.
    """

    rows: Tensor | None = None
    batch_rows: Tensor | None = None
    log_weight: float | Tensor = 0.0


class Sampler(Protocol):
    """Makes the draw of one forward pass."""

    def draw(self, labels: Tensor, shard: ClassShard, draw_id: int, rate: float) -> Draw:
        """Draw number `draw_id` for the global batch's `labels` [global batch] int64 (same on every rank).

        `rate` is the share of the classes, or of the batch, that is drawn; it may change from step to step.
        """
        ...

    def drawn(self, shard: ClassShard, draw_id: int, rate: float) -> Tensor:
        """Classes of this shard that draw `draw_id` will hold whatever its labels, [n] int64 on the host.

        Unique and sorted; a forecast for whoever fetches rows ahead of time, so it may leave out any.
        """
        ...
