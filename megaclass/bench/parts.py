"""Samplers and row optimizers timed alone, beside what they replace."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from megaclass.bench.heads import row_options
from megaclass.bench.measure import Times, calibrated, percentiles
from megaclass.counter import STREAM_ROWS, stream_key
from megaclass.kernels.row_gradient import RowGradient
from megaclass.optim import rowwise
from megaclass.parallel.process import World
from megaclass.sampling.picks import stratified, uniform

Report = dict[str, Any]


def samplers(num_classes: int, num_picks: int, repeats: int) -> list[Report]:
    """Milliseconds to draw so many of so many classes: ours, and what draws a number for every class."""
    cpu = torch.device("cpu")
    draws = iter(range(1 << 62))

    def key() -> int:
        return stream_key(0, STREAM_ROWS, next(draws))

    def top_of_random() -> None:
        torch.rand(num_classes).topk(num_picks).indices.sort()

    ways: dict[str, Callable[[], Any]] = {
        "stratified": lambda: stratified(num_classes, num_picks, 0, num_classes, key=key(), device=cpu),
        "uniform": lambda: uniform(num_classes, num_picks, 0, num_classes, key=key(), device=cpu),
        "rand + topk + sort": top_of_random,
        "randperm": lambda: torch.randperm(num_classes)[:num_picks].sort(),
    }
    case = {"num_classes": num_classes, "num_picks": num_picks}
    # Every way leaves sorted int64 numbers behind, and that is all it must write.
    return _interleaved(case, ways, repeats, dict.fromkeys(ways, 8 * num_picks))


def optimizers(num_rows: int, dim: int, num_drawn: int, repeats: int) -> list[Report]:
    """Milliseconds of a step on so many drawn rows: row-sparse, and torch's dense optimizers with a dense gradient."""
    generator = torch.Generator().manual_seed(0)
    rows = stratified(num_rows, num_drawn, 0, num_rows, key=1, device=torch.device("cpu"))
    gradient = RowGradient(rows, torch.randn(num_drawn, dim, generator=generator))
    ways: dict[str, Callable[[], Any]] = {}
    moved: dict[str, int] = {}
    for name in ("sgd", "adamw", "adagrad"):
        for dtype in (torch.float32, torch.bfloat16):
            weight = torch.randn(num_rows, dim, generator=generator).to(dtype)
            optimizer = rowwise.build(name, weight, row_options())
            label = f"row {name}, {str(dtype).removeprefix('torch.')}"
            ways[label] = _step(optimizer, gradient)
            # Of the drawn rows: weights and state read and written, gradient read.
            state = sum(entry[0].nbytes for entry in optimizer.state.values())
            moved[label] = num_drawn * (2 * (weight[0].nbytes + state) + 4 * dim)
    for name, kind in (("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)):
        parameter = torch.nn.Parameter(torch.randn(num_rows, dim, generator=generator))
        parameter.grad = torch.zeros_like(parameter).index_add_(0, rows, gradient.values)
        options: dict[str, Any] = {"momentum": 0.9} if name == "sgd" else {}
        ways[f"torch {name}, dense"] = kind([parameter], lr=0.1, **options).step
        moved[f"torch {name}, dense"] = num_rows * dim * 4 * (5 if name == "sgd" else 7)
    return _interleaved({"num_rows": num_rows, "dim": dim, "num_drawn": num_drawn}, ways, repeats, moved)


def _step(optimizer: rowwise.RowOptimizer, gradient: RowGradient) -> Callable[[], None]:
    return lambda: optimizer.step(gradient, 0.1)


def _interleaved(
    case: dict[str, Any], ways: dict[str, Callable[[], Any]], repeats: int, moved: dict[str, int]
) -> list[Report]:
    """Each way in turn, on one thread, as a rank has it; `moved`: the least bytes each must read and write."""
    torch.set_num_threads(1)
    _, copied = calibrated(World(0, 1, 0, torch.device("cpu"), None, None), 64, 64, False)
    found = {name: Times([], []) for name in ways}
    for number in range(repeats + 1):
        for name, way in ways.items():
            wall, cpu = time.perf_counter(), time.process_time()
            way()
            if number:
                found[name].cpu.append(time.process_time() - cpu)
                found[name].wall.append(time.perf_counter() - wall)
    return [
        {
            "case": case,
            "impl": name,
            "repeats": repeats,
            "wall_ms": percentiles(times.wall),
            "cpu_ms": percentiles(times.cpu)["p50"],
            "cpu_ms_spread": percentiles(times.cpu),
            "floor_ms": 1000 * moved[name] / copied,
            "floor_bytes": moved[name],
        }
        for name, times in found.items()
    ]
