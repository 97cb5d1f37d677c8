"""What it takes ranks of this machine to send: each collective, and DistributedDataParallel around a backbone.

Among other work, because a step sends nothing on its own: a stretch of work with messages in it is compared with the
same work alone. What a message takes is then also the waking of threads that had gone to sleep, the wait for ranks that
are not at the same place, and what the work finds gone from the caches after another process had the core.
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
# Messages in a stretch of work.
_IN_A_ROW = 8


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
    work = _Work()
    small = _exchanges(world, work, _SMALL, 2 * repeats)
    large = _exchanges(world, work, _LARGE, repeats)
    messages = {}
    for name in small:
        slopes = [max(0.0, (large[name][i] - small[name][i]) / (_LARGE - _SMALL)) for i in (0, 1)]
        messages[name] = Message((small[name][0], slopes[0]), (small[name][1], slopes[1]))
    few, many = (_wrapped(world, work, number, 4 * repeats) for number in (_FEW, _MANY))
    each = max(0.0, (many - few) / (_MANY - _FEW))
    fixed = max(0.0, few - _FEW * each - messages["all-reduce"].cpu_seconds(4 * _FEW))
    return Sent(messages, (fixed, each))


class _Work:
    """The other work, one or two milliseconds: calls of Python, a product, more memory than a core's own cache."""

    def __init__(self) -> None:
        self._source = torch.randn(2**20)
        self._target = torch.empty_like(self._source)
        self._chain = nn.Sequential(*(nn.SiLU() for _ in range(16)))
        self._one = torch.randn(8)
        self._product = torch.randn(64, 512), torch.randn(512, 512)

    def __call__(self) -> None:
        self._chain(self._one)
        self._product[0] @ self._product[1]
        self._target.copy_(self._source)


def _exchanges(world: World, work: _Work, num_bytes: int, repeats: int) -> dict[str, tuple[float, float]]:
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
        _stretch(world, work, way)
        pairs = [(_stretch(world, work, way), _stretch(world, work, None)) for _ in range(repeats)]
        wall, cpu = (median(sending[i] - alone[i] for sending, alone in pairs) / _IN_A_ROW for i in (0, 1))
        found[name] = max(0.0, wall), max(0.0, cpu)
    return found


def _stretch(world: World, work: _Work, way: Callable[[], Any] | None) -> tuple[float, float]:
    """Wall and processor seconds of a stretch of work, with a message after each piece of it or without."""
    sum_over_ranks(torch.ones(1), world.group)
    begin, used = time.perf_counter(), time.process_time()
    for _ in range(_IN_A_ROW):
        work()
        if way is not None:
            way()
    return time.perf_counter() - begin, time.process_time() - used


class _Scaled(nn.Module):
    """Multiplies by one number, its only parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def _wrapped(world: World, work: _Work, number: int, repeats: int) -> float:
    """Processor seconds that wrapping adds to forward and backward of a chain with so many parameter tensors."""
    x = torch.ones(8)
    bare = nn.Sequential(*(_Scaled() for _ in range(number)))
    wrapped = DistributedDataParallel(nn.Sequential(*(_Scaled() for _ in range(number))), process_group=world.group)

    def seconds(module: nn.Module) -> float:
        sum_over_ranks(torch.ones(1), world.group)
        work()
        used = time.process_time()
        module(x).sum().backward()
        used = time.process_time() - used
        module.zero_grad()
        return used

    # The first passes lay out the buckets.
    pairs = [(seconds(wrapped), seconds(bare)) for _ in range(repeats + 3)][3:]
    return median(one - other for one, other in pairs)
