"""Memory that one pass takes over from another, on a CPU.

A large tensor that is made anew costs a CPU as much as filling it: the system hands out cleared pages, one fault each.
A GPU's allocator keeps what it was given, and there the backbone wants the same memory between two passes, so on a GPU
nothing is kept here.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

# A larger tensor goes back to the system after its pass: it would be missing elsewhere more than its pages cost.
KEEP_BYTES = 256 * 2**20


class Memory:
    """Tensors by name, each made once and used again by every later pass that is given this."""

    def __init__(self) -> None:
        self._pieces: dict[str, Tensor] = {}

    def piece(self, name: str, num_rows: int, num_columns: int, like: Tensor) -> Tensor:
        """Uninitialised [num_rows, num_columns] in the type and on the device of `like`.

        The same memory at every call with this name: what was there before is overwritten.
        """
        size = num_rows * num_columns
        held = self._pieces.get(name)
        if held is None or held.numel() < size or held.dtype != like.dtype:
            held = self._pieces[name] = like.new_empty(size)
        return held[:size].view(num_rows, num_columns)

    def drop_large(self) -> None:
        """Forget the tensors above `KEEP_BYTES`."""
        self._pieces = {name: held for name, held in self._pieces.items() if held.nbytes <= KEEP_BYTES}


class Pool:
    """The memory of passes that are over, for those to come; as much as passes were ever open at once.

    Args:
        device: of the passes.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_kept = device.type == "cpu"
        self._spare: list[Memory] = []

    def take(self) -> Memory:
        """Memory that nobody else has."""
        return self._spare.pop() if self._spare else Memory()

    def give_back(self, memory: Memory) -> None:
        """Let the next one have it; nothing may read what stands there any more."""
        if self._is_kept:
            memory.drop_large()
            self._spare.append(memory)

    def give_back_after(self, holder: Tensor, memory: Memory) -> None:
        """The same, once nobody holds that tensor; a view of it does not count as holding it."""
        if self._is_kept:
            weakref.finalize(holder, self.give_back, memory).atexit = False
