"""Running a benchmark on several ranks of this machine, each a process of its own with one thread."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any

from megaclass.errors import ConfigError, PeerError, UserError
from megaclass.parallel.process import world


def run(function: Callable[..., Any], world_size: int, *args: Any, seconds: float = 3600.0) -> list[Any]:
    """The results of `function(world, *args)` on fresh processes, in the order of the ranks.

    Raises:
        ConfigError, PeerError: a rank failed (with its traceback, or its message if it was the user's mistake), or the
            time was over. No process is left.
    """
    context = multiprocessing.get_context("spawn")
    port = _free_port()
    ranks, receivers = [], []
    has_all = False
    for rank in range(world_size):
        receiver, sender = context.Pipe(duplex=False)
        # Not a daemon: those may have no children, and a rank's reader may have workers. None outlives `finally`.
        process = context.Process(target=_rank, args=(rank, world_size, port, function, args, sender))
        with _one_thread():
            process.start()
        sender.close()
        ranks.append(process)
        receivers.append(receiver)
    try:
        answers = _answers(receivers, seconds)
        has_all = True
        return answers
    finally:
        for process in ranks:
            process.join(timeout=5 if has_all else 0)
            if process.is_alive():  # one that waits for a rank that failed
                process.kill()
                process.join()


def _answers(receivers: list[Connection], seconds: float) -> list[Any]:
    """All ranks' results, heard in the order they come, so that the first to fail is the one that is told."""
    found: dict[int, Any] = {}
    waiting = {receiver: rank for rank, receiver in enumerate(receivers)}
    deadline = time.monotonic() + seconds
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise PeerError(f"rank {min(waiting.values())} gave no answer within {seconds:.0f} s")
        for receiver in ready:
            assert isinstance(receiver, Connection)
            rank = waiting.pop(receiver)
            found[rank] = _answer(rank, receiver)
    return [found[rank] for rank in range(len(receivers))]


def _answer(rank: int, receiver: Connection) -> Any:
    try:
        kind, value = receiver.recv()
    except EOFError:
        raise PeerError(f"rank {rank} ended without an answer; was it killed for its memory?") from None
    if kind == "mistake":
        raise ConfigError(value)
    if kind == "fault":
        raise PeerError(f"rank {rank} failed:\n{value}")
    return value


def _rank(
    rank: int, world_size: int, port: int, function: Callable[..., Any], args: tuple[Any, ...], sender: Connection
) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    import torch

    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    try:
        with world("auto") as here:
            sender.send(("result", function(here, *args)))
    except UserError as error:
        sender.send(("mistake", str(error)))
    except BaseException:
        sender.send(("fault", traceback.format_exc()))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Processes started inside use one thread: ranks that share cores must not each take all of them."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port
