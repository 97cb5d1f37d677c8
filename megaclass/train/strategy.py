"""`Strategy`: how the backbone is kept and stepped; what DDP and other engines do differently, and only that.

The class weights are never part of it: they live in `ShardedClassifier` with a row optimizer of their own.

A strategy may keep a part of the backbone on each rank. What leaves it is whole: checkpoints hold whole tensors in the
same names and types whatever wrote them, so that a run may go on under another strategy and at another world size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from megaclass.errors import CheckpointError
from megaclass.optim.ema import MovingAverage


class Gradients(NamedTuple):
    """The backbone's gradients after the last micro-batch, averaged over ranks, as far as this rank holds them.

    Attributes:
        replicated: gradients that are the same on every rank.
        sharded: this rank's part of all others; over all ranks every number counts once. Of any shape.
    """

    replicated: list[Tensor]
    sharded: list[Tensor]


def remember_buffers(module: nn.Module) -> Callable[[], None]:
    """Copies the buffers of a module, a few numbers per channel; what it returns puts them back."""
    before = [(buffer, buffer.clone()) for buffer in module.buffers()]

    def put_back() -> None:
        with torch.no_grad():
            for buffer, values in before:
                buffer.copy_(values)

    return put_back


class Strategy(Protocol):
    """The backbone with its optimizer.

    Attributes:
        grad_divisor: what the wrapper divides gradients by; the class layer multiplies the embedding gradient by it.
        model: what the loop calls: images [batch, channels, height, width] -> embeddings [batch, dim].
        backbone: the module that is trained. Its tensors may be this rank's parts of them: `whole` is for evaluation,
            `backbone_state` for checkpoints.
    """

    grad_divisor: int
    model: nn.Module
    backbone: nn.Module

    def begin(self) -> None:
        """Called before the first micro-batch of a step."""
        ...

    def accumulate(self, is_last: bool) -> AbstractContextManager[None]:
        """Context of one micro-batch's forward and backward; gradients need to travel in the last one only."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss` to the backbone's."""
        ...

    def gradients(self) -> Gradients:
        """What the joint norm is taken of, after the last micro-batch; on every rank at least one tensor, even empty.

        Sends nothing: the norm's one all-reduce sums the sharded ones together with the class rows'.
        """
        ...

    def step(self, learning_rate: float, coefficient: Tensor) -> None:
        """Multiply the gradients by `coefficient` (clipping), update the backbone, clear the gradients.

        Args:
            learning_rate: of every parameter in this step.
            coefficient: scalar, the same on every rank, in the type and on the device of the joint norm.
        """
        ...

    def skip(self) -> None:
        """Leave the step out, on every rank: no gradient, and nothing the forward pass has changed, stays."""
        ...

    def whole(self) -> AbstractContextManager[nn.Module]:
        """Context in which the module it gives holds the whole present backbone on every rank, for evaluation.

        All ranks enter and leave together; inside, calling the module sends nothing (in `eval` mode), as ranks call it
        different numbers of times.
        """
        ...

    def average(self, decay: float) -> MovingAverage:
        """A moving average of the backbone, in parts where that is; its `state_dict` is whole, as `backbone_state` is.

        `load_state_dict` takes whole tensors on every rank, and both are called on all ranks together.
        """
        ...

    def backbone_state(self) -> dict[str, Tensor]:
        """Whole parameters and buffers by the names of the bare module's `state_dict`, in the type they are trained in.

        Called on all ranks together. Rank 0 gets all; other ranks may get fewer, or none.
        """
        ...

    def optimizer_state(self) -> dict[str, Tensor]:
        """Whole tensors of the optimizer's state as `PARAMETER/KEY`; before the first step empty, or zeros.

        KEY and layout are torch's: `momentum_buffer`, `exp_avg`, `exp_avg_sq` of the parameter's shape, `step` a
        scalar. Called on all ranks together. Rank 0 gets all; other ranks may get fewer, or none.
        """
        ...

    def load_backbone(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `backbone_state` of any strategy gave on rank 0; the same on every rank, in host memory.

        Raises:
            CheckpointError: names or shapes are not this backbone's.
        """
        ...

    def load_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `optimizer_state` of any strategy gave on rank 0; called after `load_backbone`."""
        ...


def check_tensors(own: Mapping[str, torch.Size], found: Mapping[str, Tensor]) -> None:
    """Refuse tensors of a checkpoint whose names or shapes are not those of this run's backbone.

    Raises:
        CheckpointError: names what differs.
    """
    if own.keys() != found.keys():
        different = ", ".join(sorted(own.keys() ^ found.keys())[:5])
        raise CheckpointError(f"the checkpoint's backbone is not this run's: {different}; check the backbone options")
    for name, shape in own.items():
        if found[name].shape != shape:
            raise CheckpointError(
                f"tensor {name} has shape {list(found[name].shape)} in the checkpoint and {list(shape)} here; check "
                "the backbone options"
            )


@torch.no_grad()
def load_module(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy named tensors into a module's parameters and buffers, each whole on this rank; names must match exactly.

    Raises:
        CheckpointError: names or shapes are not the module's.
    """
    own = dict(module.state_dict())
    check_tensors({name: tensor.shape for name, tensor in own.items()}, tensors)
    for name, tensor in own.items():
        tensor.copy_(tensors[name])
