"""`Strategy`: how the backbone is replicated and stepped; what DDP and other engines do differently, and only that.

The class weights are never part of it: they live in `ShardedClassifier` with a row optimizer of their own.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor, nn


class Strategy(Protocol):
    """The replicated backbone with its optimizer.

    Attributes:
        grad_divisor: what the wrapper divides gradients by; the class layer multiplies the embedding gradient by it.
        model: what the loop calls: images [batch, channels, height, width] -> embeddings [batch, dim].
        backbone: the bare module, for evaluation, averaging and checkpoints.
    """

    grad_divisor: int
    model: nn.Module
    backbone: nn.Module

    def begin(self) -> None:
        """Called before the first micro-batch of a step."""
        ...

    def accumulate(self, is_last: bool) -> AbstractContextManager[None]:
        """Context of one micro-batch's forward and backward; gradients travel in the last one only."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss` to the backbone's."""
        ...

    def gradients(self) -> list[Tensor]:
        """The backbone's gradients, the same on every rank after the last micro-batch."""
        ...

    def step(self, learning_rate: float, coefficient: Tensor) -> None:
        """Multiply the gradients by `coefficient` (clipping), update the backbone, clear the gradients."""
        ...

    def skip(self) -> None:
        """Leave the step out: no gradient, and nothing the forward pass has changed, stays."""
        ...

    def state(self) -> dict[str, Tensor]:
        """The optimizer's state as named tensors, the same on every rank."""
        ...

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from what `state` gave."""
        ...
