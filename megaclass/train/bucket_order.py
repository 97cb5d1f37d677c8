"""One order of DDP's buckets for the whole life of a run, however often it is started.

DDP lays its buckets out anew after its first backward pass, in the order in which gradients arrived then. Where a
number lies in a bucket decides in which order three ranks or more add it up, and so how the sum is rounded. The first
step after a restart would round unlike the same step of a run that was not interrupted.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class _AllParameters(nn.Module):
    """A sum that depends on every parameter; stands in for the model in one pass."""

    def __init__(self, parameters: list[Tensor]) -> None:
        super().__init__()
        self._parameters_used = tuple(parameters)

    def forward(self) -> Tensor:
        return torch.stack([parameter.float().sum() for parameter in self._parameters_used]).sum() * 0


def fix_bucket_order(wrapped: DistributedDataParallel) -> None:
    """Make DDP lay its buckets out now, from a pass that is the same at every start; before the first real one.

    Gradients then arrive from the last parameter to the first, which is how they come from a network whose layers are
    registered in the order they are used in. No parameter, buffer or gradient is changed. A collective: every rank
    calls it. Cost: one reduction of the gradients.
    """
    module = wrapped.module
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    wrapped.module = _AllParameters(parameters)
    try:
        wrapped().backward()
    finally:
        wrapped.module = module
    for parameter in parameters:
        parameter.grad = None
