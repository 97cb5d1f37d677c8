"""What a machine takes for single operators and messages, measured by as many processes at once as a run has ranks."""

from __future__ import annotations

import itertools
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median, pstdev
from typing import Any

import torch
from torch import nn

from megaclass.bench import ranks
from megaclass.bench.messages import Sent, sent
from megaclass.bench.operators import Turn, groups
from megaclass.config import Config
from megaclass.parallel.process import World
from megaclass.plan.machine import Machine
from megaclass.plan.operators import total
from megaclass.plan.program import Program, program
from megaclass.plan.work import Work
from megaclass.train import build

_ROUNDS = 5
# Parts of a step that work block by block.
_BLOCKS = ("class layer", "class rows", "row optimizer")
# Enough batches of the reader that the shards are open and the workers at work.
_BATCHES = 4


def of_run(config: Config, work: Work) -> Machine:
    """The profile of this machine for the operators and the reader of a run, by as many processes as it has ranks.

    Raises:
        ConfigError, PeerError: as `ranks.run`.
    """
    calls = program(config, build.resolve_preset(config), work, device_type="cpu")
    return together(ranks.run(_measure, work.world_size, calls, config))


def together(found: list[Machine]) -> Machine:
    """One machine of what each rank measured: means over ranks."""
    first = found[0]
    operators = {
        key: type(known)(known.kind, known.flops, known.num_bytes, mean(one.operators[key].seconds for one in found))
        for key, known in first.operators.items()
    }
    return Machine(
        name=first.name,
        cores=first.cores,
        ranks=first.ranks,
        flops=mean(one.flops for one in found),
        copied=mean(one.copied for one in found),
        overhead=mean(one.overhead for one in found),
        jitter=mean(one.jitter for one in found),
        operators=operators,
        messages=first.messages,
        wrapper=(mean(one.wrapper[0] for one in found), mean(one.wrapper[1] for one in found)),
        sample_seconds=mean(one.sample_seconds for one in found),
    )


def _measure(world: World, calls: Program, config: Config) -> Machine:
    rounds = Rounds(calls)
    for _ in range(_ROUNDS):
        rounds.take()
    return rounds.machine(world, sent(world), sample_seconds(config, world))


class Rounds:
    """Operators that are measured in turn, round after round, and the primitives that stand for all others."""

    def __init__(self, calls: Program) -> None:
        everything = total(*calls.parts.values())
        blocks = {operator for name in _BLOCKS for operator in calls.parts[name]}
        self._groups = groups(everything, frozenset(blocks))
        self._totals: list[float] = []
        self._overheads: list[float] = []
        self._flops: list[float] = []
        self._copied: list[float] = []
        self._product = torch.randn(512, 512), torch.randn(512, 2048)
        self._source = torch.randn(2**22)
        self._target = torch.empty_like(self._source)
        self.take()  # the first round compiles, and finds pages that were never touched
        self.forget()

    def take(self) -> None:
        """One round."""
        begin = time.thread_time()
        for turn in self.turns:
            turn.take()
        self._totals.append(time.thread_time() - begin)
        left, right = self._product
        self._flops.append(2 * 512 * 512 * 2048 / _timed(lambda: left @ right))
        self._copied.append(2 * self._source.nbytes / _timed(lambda: self._target.copy_(self._source)))
        self._overheads.append(overhead())

    def forget(self) -> None:
        """Begin again."""
        for turn in self.turns:
            turn.seconds.clear()
        for one in (self._totals, self._overheads, self._flops, self._copied):
            one.clear()

    @property
    def turns(self) -> list[Turn]:
        """All operators."""
        return list(itertools.chain.from_iterable(self._groups))

    def machine(self, world: World, exchanges: Sent, reader: float) -> Machine:
        """What this rank found."""
        middle = median(self._totals)
        return Machine(
            name=f"{_processor()}, torch {torch.__version__}",
            cores=len(os.sched_getaffinity(0)),
            ranks=world.size,
            flops=median(self._flops),
            copied=median(self._copied),
            overhead=median(self._overheads),
            jitter=pstdev(self._totals) / middle if middle else 0.0,
            operators={turn.operator.key: turn.known for turn in self.turns},
            messages=exchanges.messages,
            wrapper=exchanges.wrapper,
            sample_seconds=reader,
        )


def _timed(function: Callable[[], Any]) -> float:
    begin = time.thread_time()
    function()
    return time.thread_time() - begin


def overhead() -> float:
    """Seconds that one operator costs beside itself when a module calls it and autograd answers.

    Sixty-four modules on eight numbers, where nothing else takes time.
    """
    chain = nn.Sequential(*(nn.SiLU() for _ in range(64)))
    x = torch.randn(8, requires_grad=True)

    def step() -> None:
        chain(x).backward(torch.ones(8))

    step()
    begin = time.process_time()
    step()
    taken = time.process_time() - begin
    alone = torch.randn(8)
    begin = time.process_time()
    for _ in range(64):
        torch.ops.aten.silu.default(alone)
        torch.ops.aten.silu_backward.default(alone, alone)
    return max(0.0, (taken - (time.process_time() - begin)) / 128)


def sample_seconds(config: Config, world: World) -> float:
    """Processor seconds that the reader takes for one sample where it decodes in the trainer's process."""
    config = config.model_copy(update={"dataset": config.dataset.model_copy(update={"workers": 0})})
    reader = build.build_reader(config, world)
    seconds = []
    try:
        batches = iter(reader)
        for number in range(_BATCHES + 1):
            begin = time.process_time()
            batch = next(batches)
            if number:
                seconds.append((time.process_time() - begin) / len(batch.labels))
    finally:
        reader.close()
    return median(seconds)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {len(os.sched_getaffinity(0))} cores"
