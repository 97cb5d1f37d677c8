"""Batch norm over the batch of this rank or of all ranks, with torch's parameters and buffers either way.

Torch's own synchronised batch norm refuses CPU tensors, and training must give the same numbers on one process and on
several wherever it runs; so the CPU has one of ours here, built from torch's native kernels. The two kinds, and torch's
plain modules, read each other's checkpoints.

Running statistics of the `sync` kind are the same on every rank. Those of the `local` kind are this rank's own, and
what is saved is rank 0's.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules._functions import SyncBatchNorm as _CudaSyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm

from megaclass.parallel.collectives import Group, batch_moments, group_size


def batch_norm(
    num_features: int,
    dims: Literal[0, 2],
    kind: Literal["local", "sync"],
    group: Group,
    *,
    eps: float = 1e-5,
    momentum: float = 0.1,
    learn_scale: bool = True,
) -> nn.Module:
    """A batch norm module over `num_features` channels.

    Args:
        num_features: channels, dimension 1 of the input.
        dims: spatial dimensions of the input: 0 for [batch, channels], 2 for [batch, channels, height, width].
        kind: `local`: statistics of this rank's batch; `sync`: of all ranks' batches together, which equals one
            process that sees the whole batch (to rounding, with the gradients averaged as DDP does).
        group: the ranks of `sync`. A group of one (or None) computes in the same way as a larger one, so that world
            sizes differ by the rounding of a few float64 sums and not by that of two implementations.
        eps: added to the variance.
        momentum: weight of the newest batch in the running statistics.
        learn_scale: False fixes the scale at 1 (the shift is still learned): the usual end of an embedding network.

    Cost: `sync` sends one all-reduce of 2 * num_features + 1 float64 forward and one of 2 * num_features backward.
    """
    if kind == "local":
        module: nn.Module = (nn.BatchNorm2d if dims else nn.BatchNorm1d)(num_features, eps=eps, momentum=momentum)
    else:
        module = SynchronisedBatchNorm(num_features, dims, group, eps=eps, momentum=momentum)
    assert isinstance(module.weight, nn.Parameter)
    module.weight.requires_grad_(learn_scale)
    return module


class SynchronisedBatchNorm(_BatchNorm):
    """Batch norm over the batches of all ranks of a group, on CPU and CUDA.

    Parameters and buffers are named as in `torch.nn.BatchNorm2d`. The gradients of scale and shift are this rank's
    share, like those of any other parameter: the strategy averages them. It is not a `torch.nn.SyncBatchNorm`, because
    DDP refuses modules that hold one on the CPU.

    Attributes:
        is_repeated: set while a block computes its forward pass again (`block.py`), on the same batch as the last one.
    """

    is_repeated = False

    def __init__(self, num_features: int, dims: int, group: Group, *, eps: float, momentum: float) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum)
        self._dims = dims
        self._group = group
        self._moments: tuple[float, Tensor, Tensor] | None = None

    def _check_input_dim(self, x: Tensor) -> None:
        assert x.dim() == self._dims + 2, f"batch norm over {self._dims} spatial dimensions got {tuple(x.shape)}"

    def forward(self, x: Tensor) -> Tensor:
        """`x` [batch, channels, ...] normalised per channel, in the type of `x`."""
        if not self.training:
            return super().forward(x)
        self._check_input_dim(x)
        if x.is_cuda and group_size(self._group) == 1:
            return super().forward(x)
        return self.synchronised(x)

    def synchronised(self, x: Tensor) -> Tensor:
        """The part of `forward` that talks to other ranks: a program of torch's compiler ends before it."""
        assert self.momentum is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        if x.is_cuda:
            return _CudaSyncBatchNorm.apply(
                x,
                self.weight,
                self.bias,
                self.running_mean,
                self.running_var,
                self.eps,
                self.momentum,
                self._group,
                group_size(self._group),
            )
        if not self.is_repeated:
            self._moments = _global_moments(x.detach(), self.running_mean.dtype, self._group)
        # Of a repeated pass they are those of the pass it repeats, and nothing is sent.
        assert self._moments is not None
        count, mean, var = self._moments
        assert count > 1, "batch norm needs more than one value per channel to train"
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (count / (count - 1)), self.momentum)
        return _Normalise.apply(x, self.weight, self.bias, mean, var, self.eps, count, self._group)


def _global_moments(x: Tensor, dtype: torch.dtype, group: Group) -> tuple[float, Tensor, Tensor]:
    """Values per channel, and their mean and biased variance [channels], over all ranks: the same on every rank.

    Each rank's own mean and variance come from torch's kernel. They are merged as sums and sums of squares in float64,
    where the cancellation that makes this unsafe in float32 is far below float32's own rounding.
    """
    scratch = torch.zeros(x.shape[1], dtype=dtype)
    local_mean, local_var = torch.batch_norm_update_stats(x, scratch, scratch.clone(), 0.0)
    local_count = x.numel() // x.shape[1]
    mean, var = local_mean.double(), local_var.double()
    packed = torch.cat([mean.new_tensor([1.0]), mean, var + mean.square()]) * local_count
    total = batch_moments(packed, group)  # partial -> same on every rank
    count = float(total[0])
    mean, square = (total[1:] / count).chunk(2)
    return count, mean.to(dtype), (square - mean.square()).clamp_min(0).to(dtype)


class _Normalise(torch.autograd.Function):
    """y = (x - mean) / sqrt(var + eps) * weight + bias, where mean and var depend on every rank's x.

    With x^ the normalised input, g the gradient of y, and E the mean over all ranks' values of a channel, the gradient
    of x is weight / sqrt(var + eps) * (g - E[g] - x^ E[g x^]): the chain rule through mean and var on all ranks.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        var: Tensor,
        eps: float,
        count: float,
        group: Group,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, var)
        ctx.eps, ctx.count, ctx.group = eps, count, group
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var = ctx.saved_tensors
        # Told that mean and var are constants, torch's kernel gives the plain sums of g x^ and g over this rank.
        _, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, mean, var, None, None, False, ctx.eps, [False, True, True]
        )
        shared = batch_moments(torch.cat([grad_weight, grad_bias]), ctx.group) / ctx.count  # partial -> same everywhere
        grad_x = None
        if ctx.needs_input_grad[0]:
            slope = weight * torch.rsqrt(var + ctx.eps)
            along, offset = (-slope * part for part in shared.chunk(2))
            grad_x = F.batch_norm(x, mean, var, along, offset, training=False, eps=ctx.eps)
            grad_x.addcmul_(grad, slope.to(grad.dtype).view(-1, *[1] * (x.dim() - 2)))
        return grad_x, grad_weight if ctx.needs_input_grad[1] else None, grad_bias, None, None, None, None, None
