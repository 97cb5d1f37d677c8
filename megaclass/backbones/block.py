"""`Block`: the repeated part of a network, at which memory is saved.

Separate because two things are done block by block whatever the network: activations are recomputed (here), and
parameters are sharded (`train/fsdp.py`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


class Block(nn.Module):
    """One of the blocks a network is made of; a subclass says in `compute` what it does.

    Attributes:
        recomputes: keep only the input of a forward pass in training, and compute the rest again in backward.
    """

    recomputes = False

    @abstractmethod
    def compute(self, x: Tensor) -> Tensor:
        """The block's output for the input `x`; no random numbers, as a second pass must give the same."""

    def forward(self, x: Tensor) -> Tensor:
        """`compute`, with or without what it leaves for the backward pass."""
        if not (self.recomputes and self.training and torch.is_grad_enabled()):
            return self.compute(x)
        out: Tensor = checkpoint(
            self.compute, x, use_reentrant=False, preserve_rng_state=False, context_fn=self._contexts
        )
        return out

    def _contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Those of the first and of the second pass."""
        return nullcontext(), _statistics_kept(self)


def blocks(network: nn.Module) -> list[Block]:
    """The blocks of a network, in the order they were made."""
    return [module for module in network.modules() if isinstance(module, Block)]


def recompute_blocks(network: nn.Module) -> None:
    """Let every block of a network recompute its activations in backward.

    Cost: one more forward pass of the blocks; kept are the input of each block, and the inside of one at a time.
    """
    for block in blocks(network):
        block.recomputes = True


@contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """Batch norms inside see the batch a second time: their running statistics are of the first time alone."""
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]
    own = [dict(norm._buffers) for norm in norms]
    for norm, buffers in zip(norms, own, strict=True):
        norm._buffers.update({name: None if one is None else one.clone() for name, one in buffers.items()})
        norm.is_repeated = True  # type: ignore[assignment]
    try:
        yield
    finally:
        for norm, buffers in zip(norms, own, strict=True):
            norm._buffers.update(buffers)
            del norm.is_repeated
