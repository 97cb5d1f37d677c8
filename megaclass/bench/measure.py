"""Timing and weighing heads on one rank; every rank runs the same and their answers are put together in `ranks.py`."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megaclass.bench.case import Case, Head, batch
from megaclass.bench.heads import Ours
from megaclass.bench.others import build
from megaclass.kernels.product import low_precision, product
from megaclass.parallel.collectives import sum_over_ranks
from megaclass.parallel.process import World

OURS = "megaclass"


@dataclass(frozen=True)
class Times:
    """Seconds of each measured step of one implementation on one rank."""

    wall: list[float]
    cpu: list[float]


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank.

    Attributes:
        interpreter: before anything was built, libraries included.
        peak: the most there was while it was built and stepped.
        peak_in_steps: the most there was from the second step on.
    """

    interpreter: int
    peak: int
    peak_in_steps: int


def make(name: str, case: Case, world: World, peer: Path | None) -> Head:
    """The implementation called `name`."""
    return Ours(case, world) if name == OURS else build(name, case, world, peer)


def timed(
    world: World, case: Case, names: list[str], peer: Path | None, repeats: int, warmup: int = 2
) -> dict[str, Times]:
    """Times of all implementations, built side by side and stepped in turn: A B C A B C, so that none has a quieter
    machine than another.

    CPU time is that of the whole process: the step, and what the process's other threads do for it.
    """
    heads = {name: make(name, case, world, peer) for name in names}
    found = {name: Times([], []) for name in names}
    for number in range(warmup + repeats):
        embeddings, labels = batch(case, world, number)
        for name, head in heads.items():
            meet(world)
            wall, cpu = time.perf_counter(), time.process_time()
            head.step(embeddings, labels)
            finish(world)
            if number >= warmup:
                found[name].wall.append(time.perf_counter() - wall)
                found[name].cpu.append(time.process_time() - cpu)
    return found


def weighed(world: World, case: Case, name: str, peer: Path | None, steps: int = 4) -> Memory:
    """The memory of one implementation, alone in this process."""
    embeddings, labels = batch(case, world, 0)
    meet(world)
    interpreter = reset_peak(world)
    head = make(name, case, world, peer)
    head.step(embeddings, labels)
    first = peak(world)
    reset_peak(world)
    for number in range(1, steps):
        head.step(*batch(case, world, number))
    return Memory(interpreter, max(first, peak(world)), peak(world))


def has_gpu() -> bool:
    """Whether figures are a GPU's."""
    return torch.cuda.is_available()


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Milliseconds below which 20, 50 and 80 % of the steps lie."""
    values = torch.tensor(seconds, dtype=torch.float64) * 1000
    return {f"p{share}": float(torch.quantile(values, share / 100)) for share in (20, 50, 80)}


def meet(world: World) -> None:
    """All ranks here at once, so that no rank's time holds the wait for another."""
    sum_over_ranks(torch.zeros(1, device=world.device), world.group)
    finish(world)


def finish(world: World) -> None:
    """Wait until a GPU has done what it was told."""
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


def reset_peak(world: World) -> int:
    """Start counting the peak anew; returns the bytes in use."""
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(world.device)
    else:
        Path("/proc/self/clear_refs").write_text("5")
    return _now(world)


def _now(world: World) -> int:
    if world.device.type == "cuda":
        return torch.cuda.memory_allocated(world.device)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak(world: World) -> int:
    """The most bytes in use since `reset_peak`: of the process, or of this rank's GPU."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated(world.device)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def calibrated(world: World, dim: int, batch_size: int, is_low: bool) -> tuple[float, float]:
    """What this rank can do at best: floating-point operations and copied bytes per second (read and written).

    Products are those of bfloat16 rows if `is_low`. On a CPU a second is one of processor time, so that ranks that
    share a core do not halve each other's.
    """
    clock = time.perf_counter if world.device.type == "cuda" else time.process_time
    left = torch.randn(batch_size, dim, device=world.device)
    right = torch.randn(dim, 8192, device=world.device)
    source = torch.randn(2**24, device=world.device)
    target = torch.empty_like(source)

    def best(function: object, repeats: int = 5) -> float:
        assert callable(function)
        seconds = []
        for _ in range(repeats):
            begin = clock()
            function()
            finish(world)
            seconds.append(clock() - begin)
        return min(seconds)

    def multiply() -> Tensor:
        with low_precision(is_low, world.device):
            return product(left, right, is_low)

    flops = 2 * batch_size * dim * 8192 / best(multiply)
    return flops, 2 * source.numel() * 4 / best(lambda: target.copy_(source))
