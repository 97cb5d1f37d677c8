"""The backbone under torch's DistributedDataParallel, with a torch optimizer; one process runs without the wrapper."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from megaclass.parallel.process import World
from megaclass.train.bucket_order import fix_bucket_order

# torch 2.13 renamed the option and warns about the old name, which 2.11 still needs.
_NEW_NAME = "forward_sync_buffers"
_OPTIONS = inspect.signature(DistributedDataParallel).parameters
_NO_BUFFER_TRAFFIC: dict[str, Any] = {_NEW_NAME if _NEW_NAME in _OPTIONS else "broadcast_buffers": False}


class DDPStrategy:
    """DistributedDataParallel over the backbone; see `strategy.Strategy`.

    Buffers are not broadcast at every step: synchronised batch norm keeps them equal, and local batch norm keeps its
    own on purpose.
    """

    def __init__(self, backbone: nn.Module, optimizer: torch.optim.Optimizer, world: World) -> None:
        self.backbone = backbone
        self.optimizer = optimizer
        self.grad_divisor = world.size
        self._wrapped: DistributedDataParallel | None = None
        if world.size > 1:
            self._wrapped = DistributedDataParallel(
                backbone,
                device_ids=[world.device.index] if world.device.type == "cuda" else None,
                process_group=world.group,
                **_NO_BUFFER_TRAFFIC,
            )
            fix_bucket_order(self._wrapped)
        self.model: nn.Module = backbone if self._wrapped is None else self._wrapped

    def begin(self) -> None:
        """Remember the buffers; running statistics are a few numbers per channel."""
        self._before = [(buffer, buffer.clone()) for buffer in self.backbone.buffers()]

    def accumulate(self, is_last: bool) -> AbstractContextManager[None]:
        """No traffic before the last micro-batch."""
        if self._wrapped is None or is_last:
            return nullcontext()
        return self._wrapped.no_sync()

    def backward(self, loss: Tensor) -> None:
        """Plain autograd; DDP's hooks average over ranks."""
        loss.backward()

    def gradients(self) -> list[Tensor]:
        """Gradients of all parameters that have one."""
        return [parameter.grad for parameter in self.backbone.parameters() if parameter.grad is not None]

    def step(self, learning_rate: float, coefficient: Tensor) -> None:
        """Scale, step, clear."""
        torch._foreach_mul_(self.gradients(), coefficient)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def skip(self) -> None:
        """Clear the gradients and put the buffers back: one NaN would stay in a running mean for ever."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, before in self._before:
                buffer.copy_(before)

    def state(self) -> dict[str, Tensor]:
        """`PARAMETER/KEY` -> tensor, for every tensor of the optimizer's state."""
        return {
            f"{name}/{key}": value
            for name, parameter in self.backbone.named_parameters()
            for key, value in self.optimizer.state.get(parameter, {}).items()
            if isinstance(value, Tensor)
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Put tensors back beside the parameters they belong to."""
        parameters = dict(self.backbone.named_parameters())
        for full_name, value in state.items():
            name, key = full_name.rsplit("/", 1)
            parameter = parameters[name]
            # The step count too: torch's fused optimizers want it where the parameter is.
            self.optimizer.state[parameter][key] = value.to(parameter.device)
