"""A row optimizer for class rows in the host's memory: it updates the part that is on the device, which then goes back.

Separate because the optimizers themselves know one matrix and its state, wherever those are.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megaclass.host_rows import HostRows
from megaclass.kernels.interface import RowBlock
from megaclass.kernels.row_gradient import RowGradient, found
from megaclass.optim.rowwise import RowOptimizer


class HostedRowOptimizer:
    """`RowOptimizer.step` and `step_in_backward` for rows on the host; each ends the step of its `HostRows`.

    Args:
        optimizer: of the rows on the host; its state is theirs.
        rows: brings them to the device, `weight` and the state by its names.
    """

    def __init__(self, optimizer: RowOptimizer, rows: HostRows) -> None:
        self._optimizer = optimizer
        self._rows = rows

    @property
    def state(self) -> dict[str, Tensor]:
        """The optimizer's state of all rows, on the host; behind the device until `HostRows.flush`."""
        return self._optimizer.state

    @torch.no_grad()
    def step(self, gradient: RowGradient, lr: float, number: int = 0) -> None:
        """As `RowOptimizer.step`; `gradient` counts the rows of the shard."""
        assert gradient.rows is not None
        position, _ = found(gradient.rows, self._rows.numbers)
        self._over().step(RowGradient(position, gradient.values), lr, number)
        self._rows.write_back()

    @torch.no_grad()
    def step_in_backward(
        self, blocks: Iterator[RowBlock], rows: Tensor | None, own: RowGradient, lr: float, number: int
    ) -> None:
        """As `RowOptimizer.step_in_backward`; `rows` and `own` count the rows of the part on the device."""
        self._over().step_in_backward(blocks, rows, own, lr, number)
        self._rows.write_back()

    def _over(self) -> RowOptimizer:
        assert self._rows.now is not None
        entries = {name: entry.flatten(0, 1) for name, entry in self._rows.now.entries.items()}
        return self._optimizer.over(entries.pop("weight"), entries, self._rows.numbers)
