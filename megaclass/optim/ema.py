"""A moving average of the backbone over steps, which is often the better network to evaluate.

It keeps plain tensors beside the module and not a second module, so that wrappers, process groups and optimizers that
hold the module's own tensors never notice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from megaclass.errors import CheckpointError

NUM_UPDATES = "num_updates"


class MovingAverage:
    """The exponential moving average of a module's parameters and buffers, or of live tensors given by their names.

    Update number t (from 0) weighs the average with min(decay, (1 + t) / (10 + t)), so that the first steps do not
    stay in it for long. Integer buffers are copied. Same on every rank if the module is. The module must already be on
    its device and in its type. Cost: one copy of the module; a second one inside `applied`.
    """

    def __init__(self, module: nn.Module | Mapping[str, Tensor], decay: float) -> None:
        assert 0 < decay < 1, decay
        self._decay = decay
        self._current = dict(module.state_dict() if isinstance(module, nn.Module) else module)
        self._average = {name: tensor.detach().clone() for name, tensor in self._current.items()}
        self._averaged = [name for name, tensor in self._current.items() if tensor.is_floating_point()]
        self._copied = [name for name in self._current if name not in set(self._averaged)]
        self._num_updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Take the module's present values into the average; call once after each step."""
        decay = min(self._decay, (1 + self._num_updates) / (10 + self._num_updates))
        torch._foreach_lerp_(
            [self._average[name] for name in self._averaged],
            [self._current[name] for name in self._averaged],
            1 - decay,
        )
        for name in self._copied:
            self._average[name].copy_(self._current[name])
        self._num_updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The module holds the averaged values inside the `with` block and gets its own back, to the bit, after it."""
        own = {name: tensor.clone() for name, tensor in self._current.items()}
        _copy(self._average, self._current)
        try:
            yield
        finally:
            _copy(own, self._current)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged tensors by their names in the module, and `num_updates`, an int64 scalar."""
        return {**self._average, NUM_UPDATES: torch.tensor(self._num_updates)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave.

        Raises:
            CheckpointError: names or shapes differ from the module's.
        """
        expected = {name: tuple(tensor.shape) for name, tensor in MovingAverage.state_dict(self).items()}
        found = {name: tuple(tensor.shape) for name, tensor in state.items()}
        different = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        if different:
            name = different[0]
            raise CheckpointError(
                f"moving average: {name!r} has shape {found.get(name, 'none')} in the checkpoint and "
                f"{expected.get(name, 'none')} here ({len(different)} tensors differ); it belongs to another backbone, "
                "so give the backbone options it was saved with"
            )
        _copy({name: state[name] for name in self._average}, self._average)
        self._num_updates = int(state[NUM_UPDATES])


@torch.no_grad()
def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    """Overwrite every tensor of `target` with the one of the same name."""
    for name, tensor in target.items():
        tensor.copy_(source[name])
