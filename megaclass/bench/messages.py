"""What it takes ranks of this machine to send: each collective, and DistributedDataParallel around a backbone.

Among other work, because a step sends nothing on its own: between two measurements every rank copies more than its
caches hold and runs a little Python, so that the threads that send have gone to sleep and find nothing where it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from megaclass.parallel.collectives import (
    all_gather_batch,
    max_over_ranks,
    reduce_scatter_batch,
    route_rows,
    sum_over_ranks,
)
from megaclass.parallel.process import World
from megaclass.plan.machine import Message

# Bytes of a rank's own tensor: one that only its latency counts for, and one that only its size does.
_SMALL, _LARGE = 256, 4 * 2**20
# Parameter tensors of the two modules that are wrapped.
_FEW, _MANY = 8, 136
# More than the caches of a core and its neighbours.
_COPIED = 2**23


@dataclass(frozen=True)
class Sent:
    """Of a group of ranks; nothing for one rank.

    Attributes:
        messages: start and seconds per byte of each collective.
        wrapper: processor seconds of DistributedDataParallel in a step, fixed and for each parameter tensor.
    """

    messages: dict[str, Message]
    wrapper: tuple[float, float]


def sent(world: World, repeats: int = 5) -> Sent:
    """Measure all; every rank calls it."""
    if world.size == 1:
        return Sent({}, (0.0, 0.0))
    between = _Between(world)
    small = _exchanges(world, between, _SMALL, 4 * repeats)
    large = _exchanges(world, between, _LARGE, repeats)
    messages = {}
    for name in small:
        slopes = [max(0.0, (large[name][i] - small[name][i]) / (_LARGE - _SMALL)) for i in (0, 1)]
        messages[name] = Message((small[name][0], slopes[0]), (small[name][1], slopes[1]))
    few, many = (_wrapped(world, between, number, 4 * repeats) for number in (_FEW, _MANY))
    each = max(0.0, (many - few) / (_MANY - _FEW))
    fixed = max(0.0, few - _FEW * each - messages["all-reduce"].cpu_seconds(4 * _FEW))
    return Sent(messages, (fixed, each))


class _Between:
    """The other work, and a meeting of all ranks before it."""

    def __init__(self, world: World) -> None:
        self._group = world.group
        self._source = torch.randn(_COPIED // 4)
        self._target = torch.empty_like(self._source)
        self._chain = nn.Sequential(*(nn.SiLU() for _ in range(16)))
        self._one = torch.randn(8)

    def __call__(self) -> None:
        sum_over_ranks(torch.ones(1), self._group)
        self._chain(self._one)
        for _ in range(2):
            self._target.copy_(self._source)


def _exchanges(world: World, between: _Between, num_bytes: int, repeats: int) -> dict[str, tuple[float, float]]:
    """Wall and processor seconds of each collective, on tensors of so many bytes on each rank."""
    size, number = world.size, num_bytes // 4
    own = torch.ones(number // size * size, 1)
    each = [len(own) // size] * size
    ways: dict[str, Callable[[], Any]] = {
        "all-reduce": lambda: sum_over_ranks(own, world.group),
        "maximum": lambda: max_over_ranks(own, world.group),
        "all-gather": lambda: all_gather_batch(own, world.group),
        "reduce-scatter": lambda: reduce_scatter_batch(own, world.group).wait(),
        "all-to-all": lambda: route_rows(own, each, each, world.group).wait(),
    }
    found = {}
    for name, way in ways.items():
        wall, cpu = [], []
        for turn in range(repeats + 1):
            between()
            begin, used = time.perf_counter(), time.process_time()
            way()
            if turn:
                wall.append(time.perf_counter() - begin)
                cpu.append(time.process_time() - used)
        found[name] = median(wall), median(cpu)
    return found


class _Scaled(nn.Module):
    """Multiplies by one number, its only parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def _wrapped(world: World, between: _Between, number: int, repeats: int) -> float:
    """Processor seconds that wrapping adds to forward and backward of a chain with so many parameter tensors."""
    x = torch.ones(8)
    bare = nn.Sequential(*(_Scaled() for _ in range(number)))
    wrapped = DistributedDataParallel(nn.Sequential(*(_Scaled() for _ in range(number))), process_group=world.group)

    def seconds(module: nn.Module) -> float:
        between()
        used = time.process_time()
        module(x).sum().backward()
        used = time.process_time() - used
        module.zero_grad()
        return used

    # The first passes lay out the buckets.
    pairs = [(seconds(wrapped), seconds(bare)) for _ in range(repeats + 3)][3:]
    return median(one - other for one, other in pairs)
