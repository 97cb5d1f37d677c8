"""Optimizers of the class weights that touch only the rows that have a gradient.

They are lazy: momentum, moments and weight decay of a row move only in the steps in which that row was drawn. That is
not the dense optimizer made fast but a different one (a dense momentum would go on moving rows that were not drawn);
with all rows drawn the two agree. Separate from torch's optimizers because those want a gradient of the whole matrix,
which never exists here.

State is held as tensors with one entry per row, so a checkpoint can save it as it saves the rows themselves: one
global tensor, loadable at any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from megaclass.config import Optim
from megaclass.errors import ConfigError
from megaclass.kernels.row_gradient import RowGradient

# Rows updated at a time when all rows have a gradient: bounds the temporaries without being felt in the time.
_BLOCK_ROWS = 32768

_Update = Callable[[Tensor, dict[str, Tensor], Tensor], None]


class RowOptimizer(Protocol):
    """Updates this rank's class weights in place from a `RowGradient`.

    Attributes:
        state: by name, a [rows, dim] or [rows] tensor with one entry per row of the weights; read and overwritten in
            place by the checkpoint.
    """

    state: dict[str, Tensor]

    def step(self, gradient: RowGradient, lr: float) -> None:
        """Update the rows of `gradient` with learning rate `lr`; every other row and its state stay as they are."""
        ...


class RowSGD:
    """Stochastic gradient descent with momentum, on the drawn rows only.

    Per drawn row: g = gradient + weight_decay * w; b = momentum * b + g; w = w - lr * b. State: `momentum`
    [rows, dim] if momentum is not 0, else none. Cost beyond the drawn rows: none.
    """

    def __init__(self, weight: Tensor, *, momentum: float, weight_decay: float = 0.0) -> None:
        self._weight = weight
        self._momentum = momentum
        self._weight_decay = weight_decay
        self.state: dict[str, Tensor] = {}
        if momentum:
            self.state["momentum"] = torch.zeros_like(weight, requires_grad=False)

    def step(self, gradient: RowGradient, lr: float) -> None:
        """Update the rows of `gradient`; see `RowOptimizer.step`."""

        def update(weight: Tensor, state: dict[str, Tensor], values: Tensor) -> None:
            if "momentum" not in state:
                weight.mul_(1 - lr * self._weight_decay).add_(values, alpha=-lr)
                return
            buffer = state["momentum"].mul_(self._momentum).add_(values)
            if self._weight_decay:
                buffer.add_(weight, alpha=self._weight_decay)
            weight.add_(buffer, alpha=-lr)

        _update_rows(self._weight, self.state, gradient, update)


class RowAdamW:
    """Adam with decoupled weight decay, on the drawn rows only.

    The bias correction of a row counts the steps in which that row was drawn, so a rare class starts like a new one
    and not with moments that look long averaged. State: `exp_avg` and `exp_avg_sq` [rows, dim], `num_steps` [rows]
    int64.

    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization, ICLR 2019, algorithm 2.
    """

    def __init__(
        self, weight: Tensor, *, betas: tuple[float, float], eps: float = 1e-8, weight_decay: float = 0.0
    ) -> None:
        self._weight = weight
        self._betas = betas
        self._eps = eps
        self._weight_decay = weight_decay
        self.state = {
            "exp_avg": torch.zeros_like(weight, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(weight, requires_grad=False),
            "num_steps": torch.zeros(weight.shape[0], dtype=torch.int64, device=weight.device),
        }

    def step(self, gradient: RowGradient, lr: float) -> None:
        """Update the rows of `gradient`; see `RowOptimizer.step`."""

        def update(weight: Tensor, state: dict[str, Tensor], values: Tensor) -> None:
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

        _update_rows(self._weight, self.state, gradient, update)


def build(name: str, weight: Tensor, optim: Optim) -> RowOptimizer:
    """The row optimizer `name` (`sgd` or `adamw`) for `weight` [rows, dim], this rank's rows.

    Class rows have no weight decay: the losses see only their direction.

    Raises:
        ConfigError: the name is not known.
    """
    if name == "sgd":
        return RowSGD(weight, momentum=optim.momentum)
    if name == "adamw":
        return RowAdamW(weight, betas=optim.betas)
    raise ConfigError(f"optim.class_name: {name!r} is not known; allowed are sgd, adamw")


@torch.no_grad()
def _update_rows(weight: Tensor, state: dict[str, Tensor], gradient: RowGradient, update: _Update) -> None:
    """Run `update` in place on the rows of `gradient` and their state.

    With rows given, only copies of [n, dim] are made; with all rows, views, so nothing is copied.
    """
    rows, values = gradient.rows, gradient.values
    assert values.dtype == weight.dtype, (values.dtype, weight.dtype)
    if rows is None:
        assert values.shape == weight.shape, (values.shape, weight.shape)
        for begin in range(0, weight.shape[0], _BLOCK_ROWS):
            block = slice(begin, begin + _BLOCK_ROWS)
            update(weight[block], {name: entry[block] for name, entry in state.items()}, values[block])
        return
    assert values.shape == (len(rows), weight.shape[1]), (values.shape, len(rows), weight.shape)
    drawn = weight[rows]
    parts = {name: entry[rows] for name, entry in state.items()}
    update(drawn, parts, values)
    # Indexing and not index_copy_, which takes twice as long on the CPU.
    weight[rows] = drawn
    for name, part in parts.items():
        state[name][rows] = part
