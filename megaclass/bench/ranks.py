"""Running a benchmark on several ranks of this machine, each a process of its own with one thread."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
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
    for rank in range(world_size):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(rank, world_size, port, function, args, sender), daemon=True)
        with _one_thread():
            process.start()
        sender.close()
        ranks.append(process)
        receivers.append(receiver)
    try:
        return [_answer(rank, receiver, seconds) for rank, receiver in enumerate(receivers)]
    finally:
        for process in ranks:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()


def _answer(rank: int, receiver: Connection, seconds: float) -> Any:
    if not receiver.poll(seconds):
        raise PeerError(f"rank {rank} gave no answer within {seconds:.0f} s")
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


class _one_thread:
    """Processes started inside use one thread: ranks that share cores must not each take all of them."""

    def __enter__(self) -> None:
        self._before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"

    def __exit__(self, *_: object) -> None:
        if self._before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = self._before


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port
