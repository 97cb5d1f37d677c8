"""Run a function on several gloo ranks of this machine and get their results, or a failing rank's traceback.

Ranks are forked from a server process that has imported torch and this package once, so starting one costs a small
part of a second. The server starts no threads and has never touched gloo or CUDA, which is what makes forking it
safe; forking the test process itself would not be.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

PRELOAD = [
    "torch",
    "torch.distributed",
    "torch._dynamo",  # DDP and the optimizers import it when first used, which takes two seconds
    "torch.nn.parallel.distributed",
    "numpy",
    "pytest",
    "hypothesis",
    "megaclass",
    "megaclass.config",
    "megaclass.parallel.process",
    "megaclass.train.run",
    "megaclass.evaluate.verification",
    "matplotlib.figure",
]
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def spawn(function: Callable[..., Any], world_size: int, *args: Any, seconds: float = 90.0) -> list[Any]:
    """The results of `function(world, *args)` on `world_size` gloo ranks, in the order of the ranks.

    Args:
        function: a module-level function; it runs inside `megaclass.parallel.process.world` on the CPU with one thread.
        world_size: number of processes; 1 gives a world without a group.
        args: the same for every rank; copied, so changes made by a rank are not seen here.
        seconds: time limit over everything.

    Raises:
        AssertionError: a rank raised (with its traceback), died, or the time limit passed. All ranks are then gone.
    """
    context = _server()
    payload = pickle.dumps((function, args))
    port = _free_port()
    ranks: list[Any] = []
    receivers: list[Connection] = []
    try:
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_run, args=(rank, world_size, port, payload, sender), daemon=True)
            process.start()
            sender.close()
            ranks.append(process)
            receivers.append(receiver)
        return _collect(ranks, receivers, time.monotonic() + seconds)
    finally:
        for process in ranks:
            if process.is_alive():
                process.kill()
            process.join()
            process.close()
        for receiver in receivers:
            receiver.close()


def _collect(ranks: list[Any], receivers: list[Connection], deadline: float) -> list[Any]:
    """Wait for one message of every rank; the first that is not a result ends the wait."""
    results: list[Any] = [None] * len(ranks)
    pending = {receiver: rank for rank, receiver in enumerate(receivers)}
    while pending:
        ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise AssertionError(f"ranks {sorted(pending.values())} of {len(ranks)} did not finish in time")
        for receiver in ready:
            assert isinstance(receiver, Connection)
            rank = pending.pop(receiver)
            try:
                succeeded, value = pickle.loads(receiver.recv_bytes())
            except EOFError:
                ranks[rank].join(10)
                raise AssertionError(f"rank {rank} died with exit code {ranks[rank].exitcode}") from None
            assert succeeded, f"rank {rank} of {len(ranks)} failed:\n{value}"
            results[rank] = value
    for process in ranks:
        process.join(max(0.0, deadline - time.monotonic()))
    return results


def _run(rank: int, world_size: int, port: int, payload: bytes, sender: Connection) -> None:
    """What a rank's process does: join the world, call the function, send one message."""
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME="lo",
        **_ONE_THREAD,
    )
    import torch

    from megaclass.parallel import process

    torch.set_num_threads(1)
    sent = False
    try:
        function, args = pickle.loads(payload)
        with process.world(device="cpu", timeout_seconds=60) as world:
            try:
                result = function(world, *args)
            except BaseException:
                # Sent before the connections go down: the other ranks' complaints about that must not arrive first.
                sent = True
                sender.send_bytes(pickle.dumps((False, traceback.format_exc())))
                raise
        # Plain pickle copies tensors; multiprocessing's own would pass handles to memory of a process about to end.
        sender.send_bytes(pickle.dumps((True, result)))
    except BaseException:
        if not sent:
            with suppress(OSError):
                sender.send_bytes(pickle.dumps((False, traceback.format_exc())))
    finally:
        sender.close()


def _server() -> Any:
    """The multiprocessing context whose server process has everything imported; started with one thread."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    from multiprocessing import forkserver

    before = {name: os.environ.get(name) for name in _ONE_THREAD}
    os.environ.update(_ONE_THREAD)
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return context


def _free_port() -> int:
    """A TCP port of the loopback interface that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
