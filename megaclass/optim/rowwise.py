"""Optimizers of the class weights that touch only the rows that have a gradient.

By default they are lazy: momentum, moments and weight decay of a row move only in the steps in which that row was
drawn. That is not the dense optimizer made fast but a different one (a dense momentum goes on moving rows that were not
drawn); with all rows drawn the two agree. `is_dense` treats every other row as having a gradient of zero, as torch's
own optimizers and the public Partial-FC do, at the cost of all rows in every step. Separate from torch's optimizers
because those want a gradient of the whole matrix, which never exists here.

Rows and momentum may be stored in bfloat16: they are updated in float32 and rounded stochastically (`rounding.py`) with
bits that depend on the seed, the step, the global row and the column, so that no world size changes them.

State is held as tensors with one entry per row, so a checkpoint can save it as it saves the rows themselves: one
global tensor, loadable at any number of ranks.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megaclass.counter import STREAM_ROUNDING, mix, stream_key
from megaclass.errors import ConfigError
from megaclass.kernels.interface import RowBlock
from megaclass.kernels.row_gradient import RowGradient, found
from megaclass.optim import rounding

if TYPE_CHECKING:
    from megaclass.config import Optim

# Bytes (of float32) of the rows updated at a time: bounds the temporaries. On a CPU they stay in a core's cache from
# one operator to the next; a GPU has no such cache, and starting operators must not be felt in the time.
BLOCK_BYTES = {"cpu": 2**20, "cuda": 2**25}


class RowOptimizer(ABC):
    """Updates this rank's class weights in place from a `RowGradient`.

    Args:
        weight: [rows, dim], this rank's rows.
        seed: of stochastic rounding.
        first_row: global number of this rank's first row, for the same.
        is_dense: rows without a gradient get one of zero.

    Attributes:
        state: by name, a [rows, dim] or [rows] tensor with one entry per row of the weights; read and overwritten in
            place by the checkpoint.
    """

    state: dict[str, Tensor]

    def __init__(self, weight: Tensor, *, seed: int = 0, first_row: int = 0, is_dense: bool = False) -> None:
        self._weight = weight
        self._seed = seed
        self._first_row = first_row
        self._is_dense = is_dense
        self._numbers: Tensor | None = None
        self.state = {}

    def over(self, weight: Tensor, state: dict[str, Tensor], numbers: Tensor) -> RowOptimizer:
        """The same optimizer for a copy of some rows.

        Args:
            weight: [n, dim], the copy.
            state: by name, the copy of their state.
            numbers: [n] int64, which rows of this rank they are; stochastic rounding depends on it.
        """
        assert not self._is_dense
        other = copy.copy(self)
        other._weight, other.state, other._numbers = weight, state, numbers
        return other

    @property
    def _block_rows(self) -> int:
        return block_rows(self._weight.shape[1], self._weight.device.type)

    @abstractmethod
    def _update(self, weight: Tensor, state: dict[str, Tensor], values: Tensor, lr: float) -> None:
        """Change rows [n, dim] and their state in place for gradients `values`; all of them float32 or wider."""

    @torch.no_grad()
    def step(self, gradient: RowGradient, lr: float, number: int = 0) -> None:
        """Update the rows of `gradient` with learning rate `lr`.

        Unless dense, every other row and its state stay as they are. Cost: the drawn rows, read and written once, and
        temporaries of `block_rows` rows.

        Args:
            gradient: of this rank's rows; its values are not changed.
            lr: learning rate of the rows.
            number: of the step; with the seed it determines stochastic rounding.
        """
        rows, values = gradient.rows, gradient.values
        if rows is None:
            assert values.shape == self._weight.shape, (values.shape, self._weight.shape)
        else:
            assert values.shape == (len(rows), self._weight.shape[1]), (values.shape, len(rows), self._weight.shape)
        if rows is not None and self._is_dense:
            self._step_all(rows, values, lr, number)
            return
        for start, stop in ranges(len(values), self._block_rows):
            self._step_block(slice(start, stop) if rows is None else rows[start:stop], values[start:stop], lr, number)

    @torch.no_grad()
    def step_in_backward(
        self, blocks: Iterator[RowBlock], rows: Tensor | None, own: RowGradient, lr: float, number: int
    ) -> None:
        """Update rows while their gradient is being computed: no gradient of more than a block ever exists.

        Args:
            blocks: the gradient of the candidates' rows.
            rows: [n] which rows those are, sorted; None: all.
            own: gradients of the samples' own rows, sorted.
            lr: learning rate of the rows.
            number: of the step.
        """
        assert not self._is_dense
        assert own.rows is not None
        if rows is None:
            position, is_candidate = own.rows, torch.ones_like(own.rows, dtype=torch.bool)
        else:
            position, is_candidate = found(own.rows, rows)
        for block in blocks:
            inside = ((position >= block.start) & (position < block.stop) & is_candidate).nonzero()[:, 0]
            block.values.index_add_(0, position[inside] - block.start, own.values[inside])
            for start, stop in ranges(len(block.values), self._block_rows):
                first, last = block.start + start, block.start + stop
                loaded = None if block.rows is None else block.rows[start:stop]
                where = slice(first, last) if rows is None else rows[first:last]
                self._step_block(where, block.values[start:stop], lr, number, loaded)
        alone = (~is_candidate).nonzero()[:, 0]
        self.step(RowGradient(own.rows[alone], own.values[alone]), lr, number)

    def _step_all(self, rows: Tensor, values: Tensor, lr: float, number: int) -> None:
        """One step of the dense optimizer: every row, with zero where there is no gradient."""
        order = rows.argsort()
        rows, values = rows[order], values[order]
        parts = ranges(len(self._weight), self._block_rows)
        ends = [start for start, _ in parts] + [len(self._weight)]
        cuts = torch.searchsorted(rows, torch.tensor(ends, device=rows.device)).tolist()
        for (start, stop), first, last in zip(parts, cuts, cuts[1:], strict=False):
            filled = values.new_zeros(stop - start, values.shape[1])
            filled[rows[first:last] - start] = values[first:last]
            self._step_block(slice(start, stop), filled, lr, number)

    def _step_block(
        self, where: slice | Tensor, values: Tensor, lr: float, number: int, loaded: Tensor | None = None
    ) -> None:
        """Update some rows: in place where they are a range and wide enough, else through copies.

        `loaded` is what the kernel has of the rows already, a view or a copy of them (`RowBlock.rows`).
        """
        state = {name: _widened(_taken(entry, where)) for name, entry in self.state.items()}
        weight = _widened(_taken(self._weight, where)) if loaded is None else loaded
        assert values.dtype == weight.dtype, (values.dtype, weight.dtype)
        self._update(weight, state, values, lr)
        key = stream_key(self._seed, STREAM_ROUNDING, number)
        self._store(self._weight, where, weight, key)
        for name, entry in self.state.items():
            self._store(entry, where, state[name], mix(key))

    def _store(self, target: Tensor, where: slice | Tensor, values: Tensor, key: int) -> None:
        """Put updated rows into `target`, unless they are a view of it."""
        if isinstance(where, slice) and values.dtype == target.dtype:
            return
        if target.dtype == torch.bfloat16:
            local = torch.arange(where.start, where.stop, device=target.device) if isinstance(where, slice) else where
            if self._numbers is not None:
                local = self._numbers[local]
            values = rounding.stochastically(values, local + self._first_row, key)
        # Indexing and not index_copy_, which takes twice as long on the CPU.
        target[where] = values


class RowSGD(RowOptimizer):
    """Stochastic gradient descent with momentum.

    Per row: g = gradient + weight_decay * w; b = momentum * b + g; w = w - lr * b. State: `momentum` [rows, dim] in
    `momentum_dtype` if momentum is not 0, else none.
    """

    def __init__(
        self,
        weight: Tensor,
        *,
        momentum: float,
        weight_decay: float = 0.0,
        momentum_dtype: torch.dtype | None = None,
        seed: int = 0,
        first_row: int = 0,
        is_dense: bool = False,
    ) -> None:
        super().__init__(weight, seed=seed, first_row=first_row, is_dense=is_dense)
        self._momentum = momentum
        self._weight_decay = weight_decay
        if momentum:
            self.state["momentum"] = torch.zeros_like(
                weight, dtype=momentum_dtype or _wide_type(weight.dtype), requires_grad=False
            )

    def _update(self, weight: Tensor, state: dict[str, Tensor], values: Tensor, lr: float) -> None:
        if "momentum" not in state:
            weight.mul_(1 - lr * self._weight_decay).add_(values, alpha=-lr)
            return
        buffer = state["momentum"].mul_(self._momentum).add_(values)
        if self._weight_decay:
            buffer.add_(weight, alpha=self._weight_decay)
        weight.add_(buffer, alpha=-lr)


class RowAdamW(RowOptimizer):
    """Adam with decoupled weight decay.

    The bias correction of a row counts the steps in which that row was drawn, so a rare class starts like a new one
    and not with moments that look long averaged. State: `exp_avg` and `exp_avg_sq` [rows, dim], `num_steps` [rows]
    int64.

    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization, ICLR 2019, algorithm 2.
    """

    def __init__(
        self,
        weight: Tensor,
        *,
        betas: tuple[float, float],
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        seed: int = 0,
        first_row: int = 0,
        is_dense: bool = False,
    ) -> None:
        super().__init__(weight, seed=seed, first_row=first_row, is_dense=is_dense)
        self._betas = betas
        self._eps = eps
        self._weight_decay = weight_decay
        dtype = _wide_type(weight.dtype)
        self.state = {
            "exp_avg": torch.zeros_like(weight, dtype=dtype, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(weight, dtype=dtype, requires_grad=False),
            "num_steps": torch.zeros(weight.shape[0], dtype=torch.int64, device=weight.device),
        }

    def _update(self, weight: Tensor, state: dict[str, Tensor], values: Tensor, lr: float) -> None:
        first, second = self._betas
        num_steps = state["num_steps"].add_(1).double()
        state["exp_avg"].lerp_(values, 1 - first)
        state["exp_avg_sq"].mul_(second).addcmul_(values, values, value=1 - second)
        # In float64, where 1 - beta**n keeps its digits for small n and a beta near 1.
        rate = (lr / (1 - first**num_steps)).to(weight.dtype).unsqueeze(1)
        spread = (1 - second**num_steps).sqrt().to(weight.dtype).unsqueeze(1)
        change = state["exp_avg_sq"].sqrt().div_(spread).add_(self._eps).reciprocal_()
        change.mul_(state["exp_avg"]).mul_(rate)
        weight.mul_(1 - lr * self._weight_decay).sub_(change)


class RowAdagrad(RowOptimizer):
    """Adagrad with one number per row.

    Per row: a = a + mean of g squared over the row; w = w - lr * g / (sqrt(a) + eps). A row without a gradient does not
    move under either semantics, so lazy and dense are the same. State: `square_sum` [rows] float32: four bytes a row.

    Source: Duchi et al., "Adaptive Subgradient Methods", JMLR 2011, with the sum shared by a row as in recommender
    systems' embedding tables (Mudigere et al., arXiv 2104.05158, section 4.1.4).
    """

    def __init__(
        self, weight: Tensor, *, eps: float = 1e-8, seed: int = 0, first_row: int = 0, is_dense: bool = False
    ) -> None:
        # A gradient of zero moves nothing here: the dense walk over all rows would be for nothing.
        super().__init__(weight, seed=seed, first_row=first_row, is_dense=False)
        self._eps = eps
        self.state["square_sum"] = torch.zeros(
            weight.shape[0], dtype=_wide_type(weight.dtype), device=weight.device, requires_grad=False
        )

    def _update(self, weight: Tensor, state: dict[str, Tensor], values: Tensor, lr: float) -> None:
        total = state["square_sum"].add_(torch.linalg.vecdot(values, values), alpha=1 / values.shape[1])
        weight.addcmul_(values, (-lr / (total.sqrt() + self._eps)).unsqueeze(1))


def build(name: str, weight: Tensor, optim: Optim, *, seed: int = 0, first_row: int = 0) -> RowOptimizer:
    """The row optimizer `name` (`sgd`, `adamw` or `adagrad`) for `weight` [rows, dim], this rank's rows.

    Class rows have no weight decay: the losses see only their direction.

    Raises:
        ConfigError: the name is not known.
    """
    is_dense = optim.untouched_rows == "dense"
    if name == "sgd":
        dtype = torch.bfloat16 if optim.row_momentum_dtype == "bfloat16" else None
        return RowSGD(
            weight, momentum=optim.momentum, momentum_dtype=dtype, seed=seed, first_row=first_row, is_dense=is_dense
        )
    if name == "adamw":
        return RowAdamW(weight, betas=optim.betas, seed=seed, first_row=first_row, is_dense=is_dense)
    if name == "adagrad":
        return RowAdagrad(weight, seed=seed, first_row=first_row, is_dense=is_dense)
    raise ConfigError(f"optim.class_name: {name!r} is not known; allowed are sgd, adamw, adagrad")


def _wide_type(dtype: torch.dtype) -> torch.dtype:
    """The type numbers of `dtype` are computed in."""
    return torch.float32 if dtype == torch.bfloat16 else dtype


def block_rows(dim: int, device_type: str) -> int:
    """How many rows are updated together on such a device."""
    return max(1, BLOCK_BYTES[device_type] // (4 * dim))


def ranges(num_rows: int, size: int) -> list[tuple[int, int]]:
    """Rows in ranges of at most so many."""
    return [(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]


def _taken(entry: Tensor, where: slice | Tensor) -> Tensor:
    """A view of a range of rows, or a copy of single ones; indexing would take several times as long on the CPU."""
    return entry[where] if isinstance(where, slice) else entry.index_select(0, where)


def _widened(part: Tensor) -> Tensor:
    """`part` itself, or a float32 copy of bfloat16."""
    return part.float() if part.dtype == torch.bfloat16 else part
