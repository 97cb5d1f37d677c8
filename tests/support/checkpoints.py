"""Ranks as threads that share a store, and snapshots whose every value tells where it belongs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megaclass.checkpoint import save
from megaclass.checkpoint.snapshot import Snapshot
from megaclass.parallel.process import World
from megaclass.parallel.shard import ClassShard

ALONE = World(0, 1, 0, torch.device("cpu"), None, None)


def make_worlds(size: int, store: dist.Store | None = None) -> list[World]:
    """Worlds of `size` ranks without a process group, for functions that only use the store."""
    if size == 1:
        return [ALONE]
    shared = dist.HashStore() if store is None else store
    shared.set_timeout(timedelta(seconds=20))
    return [World(rank, size, rank, torch.device("cpu"), None, shared) for rank in range(size)]


def on_threads(worlds: list[World], function: Callable[[World], Any]) -> list[Any]:
    """What `function(world)` returned, or the exception it raised, on each rank."""
    results: list[Any] = [None] * len(worlds)

    def run(world: World) -> None:
        try:
            results[world.rank] = function(world)
        except BaseException as error:
            results[world.rank] = error

    threads = [threading.Thread(target=run, args=(world,), daemon=True) for world in worlds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a rank hangs"
    return results


def make_snapshot(shard: ClassShard, step: int = 10, attempt: int = 1, dim: int = 7) -> Snapshot:
    """A snapshot with tensors of several types and ranks, the sharded ones cut from the same global ones."""
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(shard.num_classes, dim, generator=generator)
    count = torch.arange(shard.num_classes) + step
    rows = slice(shard.start, shard.stop)
    return Snapshot(
        step=step,
        position=step * 32,
        attempt=attempt,
        replicated={
            "backbone.conv": torch.randn(3, 2, 5, generator=generator),
            "backbone.scalar": torch.tensor(step),
            "backbone.half": torch.randn(5, generator=generator).to(torch.bfloat16),
            "backbone.mask": torch.tensor([True, False, True]),
            "backbone.empty": torch.empty(0, 4),
        },
        sharded={"class.weight": weight[rows], "class.count": count[rows], "class.momentum": weight[rows] * 0.5},
        num_classes=shard.num_classes,
        config={"train": {"seed": 0, "steps": 100}, "optim": {"lr": 0.1, "betas": [0.9, 0.999]}},
        extra={"attempts": attempt, "note": "é", "ratio": 1e-5},
    )


def save_on(
    worlds: list[World], directory: Path, num_classes: int, *, step: int = 10, attempt: int = 1, **options: Any
) -> list[Any]:
    """The result of `save` on every rank of a world of threads."""

    def run(world: World) -> Path:
        shard = ClassShard(num_classes, world.rank, world.size)
        snapshot = make_snapshot(shard, step, attempt)
        return save(directory, snapshot, shard, world, timeout_seconds=20, **{"keep": 2, **options})

    return on_threads(worlds, run)


def save_good(directory: Path, num_classes: int = 13, size: int = 2, **options: Any) -> Path:
    """The folder of a checkpoint that `size` ranks have saved; the test fails where one could not."""
    results = save_on(make_worlds(size), directory, num_classes, **options)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    assert len(set(results)) == 1
    return results[0]


def assert_same(found: Snapshot, expected: Snapshot) -> None:
    """Fail unless two snapshots are equal to the bit, types and shapes included."""
    for name in ("step", "position", "attempt", "num_classes", "config", "extra"):
        assert getattr(found, name) == getattr(expected, name), name
    for kind in ("replicated", "sharded"):
        left, right = getattr(found, kind), getattr(expected, kind)
        assert left.keys() == right.keys()
        for name, tensor in right.items():
            assert left[name].dtype == tensor.dtype
            assert left[name].shape == tensor.shape
            assert torch.equal(left[name], tensor), name
