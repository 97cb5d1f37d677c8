"""Starting and stopping the group of processes: the only file that does so.

Under torchrun the environment says which rank this is; without it the run is a world of one and there is no process
group at all (`World.group` is None), which every collective understands.
"""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed import distributed_c10d as c10d
from torch.distributed.device_mesh import DeviceMesh
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


# How long a leaving rank 0, which may hold the store, lets the others look for its reason.
_SECONDS_TO_LEAVE = 10.0


def environment_rank() -> int:
    """The rank of this process as torchrun gave it; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


@contextmanager
def world(device: str = "auto", timeout_seconds: float = 300.0) -> Iterator[World]:
    """Join the other ranks for the length of a `with` block.

    Processes that leave normally meet at a barrier first, so that none takes the connections down under another; one
    that leaves by an exception does not wait for peers that may never come.

    Raises:
        ConfigError: a rank cannot have its device; on every rank.
        PeerError: not all ranks came within the time.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = environment_rank()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if size == 1:
        yield World(0, 1, 0, _take_device(device, local_rank), None, None)
        return
    timeout = timedelta(seconds=timeout_seconds)
    try:
        store = _join(rank, size, timeout)
        chosen = _agree_on_devices(store, device, rank, size, local_rank)
        dist.init_process_group(
            "nccl" if chosen.type == "cuda" else "gloo",
            store=c10d.PrefixStore("group", store),
            rank=rank,
            world_size=size,
            timeout=timeout,
            device_id=chosen if chosen.type == "cuda" else None,
        )
    except RuntimeError as error:
        raise PeerError(
            f"rank {rank} could not meet the other {size - 1} ranks within {timeout_seconds:.0f} s "
            f"({str(error).splitlines()[0][:200]}); see whether all were started, and MASTER_ADDR and MASTER_PORT"
        ) from error
    try:
        yield World(rank, size, local_rank, chosen, dist.group.WORLD, c10d.PrefixStore("megaclass", store))
        dist.barrier()
    except BaseException:
        dist.destroy_process_group()
        _leave(store, rank, size)
        raise
    dist.destroy_process_group()


def mesh_of(world: World) -> DeviceMesh:
    """All ranks in one row, as torch's sharding of modules wants them; the group is the one we have, not a new one.

    Only for a world of several ranks.
    """
    assert world.group is not None
    return DeviceMesh.from_group(world.group, world.device.type)


def group_of_one(device: torch.device) -> None:
    """A default process group of this process alone, for code of others that insists on one; lasts until its end."""
    if dist.is_initialized():
        return
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", rank=0, world_size=1, store=HashStore(),
        device_id=device if device.type == "cuda" else None,
    )  # fmt: skip
    atexit.register(dist.destroy_process_group)


def _take_device(name: str, local_rank: int) -> torch.device:
    chosen = choose_device(name, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    return chosen


def _agree_on_devices(store: c10d.Store, name: str, rank: int, size: int, local_rank: int) -> torch.device:
    """This rank's device; if any rank cannot have its own, all raise, as a group without it would wait for ever."""
    fault = ""
    try:
        chosen = _take_device(name, local_rank)
    except ConfigError as error:
        fault = str(error)
    store.set(f"device/{rank}", fault)
    if rank == 0:
        faults = [store.get(f"device/{other}").decode() for other in range(size)]
        store.set("device", next((found for found in faults if found), ""))
    agreed = store.get("device").decode()
    if agreed:
        _leave(store, rank, size)
        raise ConfigError(fault or agreed)
    return chosen


def _leave(store: c10d.Store, rank: int, size: int) -> None:
    """Say that this rank is gone; rank 0 stays until the others have said so, or until it has waited long enough."""
    deadline = time.monotonic() + _SECONDS_TO_LEAVE
    with suppress(RuntimeError):
        store.set(f"left/{rank}", "")
        while rank == 0 and time.monotonic() < deadline:
            if store.check([f"left/{other}" for other in range(size)]):
                return
            time.sleep(0.05)


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
