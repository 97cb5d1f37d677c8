"""The backbone under torch's DistributedDataParallel, with a torch optimizer; one process runs without the wrapper."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from megaclass.optim.ema import MovingAverage
from megaclass.parallel.process import World
from megaclass.train.bucket_order import fix_bucket_order
from megaclass.train.strategy import Gradients, load_module, remember_buffers

# torch 2.13 renamed the option and warns about the old name, which 2.11 still needs.
_NEW_NAME = "forward_sync_buffers"
_OPTIONS = inspect.signature(DistributedDataParallel).parameters
_NO_BUFFER_TRAFFIC: dict[str, Any] = {_NEW_NAME if _NEW_NAME in _OPTIONS else "broadcast_buffers": False}


class DDPStrategy:
    """DistributedDataParallel over the backbone; see `strategy.Strategy`.

    Buffers are not broadcast at every step: synchronised batch norm keeps them equal, and local batch norm keeps its
    own on purpose.

    Args:
        backbone: on this rank's device.
        optimizer: of its parameters.
        world: the ranks.
        forward: what computes the backbone's forward pass with its parameters; the backbone itself, or compiled.
    """

    def __init__(self, backbone: nn.Module, optimizer: torch.optim.Optimizer, world: World, forward: nn.Module) -> None:
        self.backbone = backbone
        self.optimizer = optimizer
        self.grad_divisor = world.size
        self._wrapped: DistributedDataParallel | None = None
        if world.size > 1:
            self._wrapped = DistributedDataParallel(
                forward,
                device_ids=[world.device.index] if world.device.type == "cuda" else None,
                process_group=world.group,
                **_NO_BUFFER_TRAFFIC,
            )
            fix_bucket_order(self._wrapped)
        self.model: nn.Module = forward if self._wrapped is None else self._wrapped

    def begin(self) -> None:
        """Remember the buffers."""
        self._put_buffers_back = remember_buffers(self.backbone)

    def accumulate(self, is_last: bool) -> AbstractContextManager[None]:
        """No traffic before the last micro-batch."""
        if self._wrapped is None or is_last:
            return nullcontext()
        return self._wrapped.no_sync()

    def backward(self, loss: Tensor) -> None:
        """Plain autograd; DDP's hooks average over ranks."""
        loss.backward()

    def gradients(self) -> Gradients:
        """Gradients of all parameters that have one; DDP has made them the same on every rank."""
        return Gradients([one.grad for one in self.backbone.parameters() if one.grad is not None], [])

    def step(self, learning_rate: float, coefficient: Tensor) -> None:
        """Scale, step, clear."""
        torch._foreach_mul_(self.gradients().replicated, coefficient)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def skip(self) -> None:
        """Clear the gradients and put the buffers back: one NaN would stay in a running mean for ever."""
        self.optimizer.zero_grad(set_to_none=True)
        self._put_buffers_back()

    def whole(self) -> AbstractContextManager[nn.Module]:
        """The backbone itself."""
        return nullcontext(self.backbone)

    def average(self, decay: float) -> MovingAverage:
        """Of the whole backbone."""
        return MovingAverage(self.backbone, decay)

    def backbone_state(self) -> dict[str, Tensor]:
        """The live tensors."""
        return dict(self.backbone.state_dict())

    def optimizer_state(self) -> dict[str, Tensor]:
        """The live tensors."""
        return {
            f"{name}/{key}": value
            for name, parameter in self.backbone.named_parameters()
            for key, value in self.optimizer.state.get(parameter, {}).items()
            if isinstance(value, Tensor)
        }

    def load_backbone(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy into the backbone."""
        load_module(self.backbone, tensors)

    def load_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        """Put tensors back beside the parameters they belong to."""
        parameters = dict(self.backbone.named_parameters())
        for full_name, value in tensors.items():
            name, key = full_name.rsplit("/", 1)
            parameter = parameters[name]
            # The step count too: torch's fused optimizers want it where the parameter is. They read a moment beside its
            # parameter number by number, so it must be laid out as that is (channels last).
            placed = value.to(parameter.device)
            if placed.shape == parameter.shape:
                placed = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(placed)
            self.optimizer.state[parameter][key] = placed
