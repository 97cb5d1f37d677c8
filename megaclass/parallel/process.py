"""Starting and stopping the group of processes: the only file that does so.

Under torchrun the environment says which rank this is; without it the run is a world of one and there is no process
group at all (`World.group` is None), which every collective understands.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d
from torch.distributed.rendezvous import rendezvous

from megaclass.errors import ConfigError, PeerError


@dataclass(frozen=True)
class World:
    """This process among all: its rank, the number of ranks, its device, and how to reach the others.

    `group` carries tensors (NCCL on GPUs, gloo on CPUs); `store` carries small keys for decisions that must not be
    collectives. Both are None in a world of one.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    group: dist.ProcessGroup | None
    store: c10d.Store | None

    @property
    def is_main(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.rank == 0

    def wait_for(self, key: str, seconds: float) -> str:
        """The value another rank publishes under `key`, waited for without a collective.

        Used where one rank works alone for long (scoring an evaluation): a collective would run into its time limit.

        Raises:
            PeerError: nothing came within `seconds`.
        """
        assert self.store is not None
        deadline = time.monotonic() + seconds
        while not self.store.check([key]):
            if time.monotonic() > deadline:
                raise PeerError(f"rank {self.rank} waited {seconds:.0f} s for {key!r} from another rank; see its log")
            time.sleep(0.02)
        return self.store.get(key).decode()

    def publish(self, key: str, value: str) -> None:
        """Make `value` known to all ranks that wait for `key`; nothing to do in a world of one."""
        if self.store is not None:
            self.store.set(key, value)


def choose_device(name: str, local_rank: int) -> torch.device:
    """The device for `train.device` (`auto`, `cpu` or `cuda`) on this rank."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("train.device cuda: torch finds no CUDA device here; use --train.device cpu")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {local_rank} has no GPU: this node has {torch.cuda.device_count()}; "
            "start at most that many processes per node"
        )
    return torch.device("cuda", local_rank)


@contextmanager
def world(device: str = "auto", timeout_seconds: float = 300.0) -> Iterator[World]:
    """Join the other ranks for the length of a `with` block.

    Processes that leave normally meet at a barrier first, so that none takes the connections down under another; one
    that leaves by an exception does not wait for peers that may never come.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = choose_device(device, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if size == 1:
        yield World(0, 1, 0, chosen, None, None)
        return
    timeout = timedelta(seconds=timeout_seconds)
    store = _join(rank, size, timeout)
    dist.init_process_group(
        "nccl" if chosen.type == "cuda" else "gloo",
        store=c10d.PrefixStore("group", store),
        rank=rank,
        world_size=size,
        timeout=timeout,
        device_id=chosen if chosen.type == "cuda" else None,
    )
    try:
        yield World(rank, size, local_rank, chosen, dist.group.WORLD, c10d.PrefixStore("megaclass", store))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _join(rank: int, size: int, timeout: timedelta) -> c10d.Store:
    """The store all ranks share, holding nothing of an earlier attempt.

    torchrun hands its own store to the ranks it restarts, with the addresses the dead ones left there, and restarted
    ranks then connect to nobody. With one agent its restart count tells attempts apart; several agents count apart, and
    `launch/torchrun.sh` therefore turns the sharing off.
    """
    store, _, _ = next(iter(rendezvous("env://", rank, size, timeout=timeout)))
    store.set_timeout(timeout)
    is_shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if is_shared and os.environ.get("GROUP_WORLD_SIZE") == "1":
        store = c10d.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    joined: c10d.Store = store
    return joined
