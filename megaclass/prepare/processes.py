"""The same work on many items in several processes: results in the order of the items, in bounded memory.

Separate because it knows nothing of images. Workers are started anew and not forked: a fork would copy whatever threads
and locks the caller has. What they work with is sent once, items and results in chunks. They are deaf to Ctrl-C, which
a terminal sends to them too, and end when their parent says so or is gone.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any

from megaclass.errors import ConfigError, DataError

# Items sent at a time: enough that sending costs little beside decoding a small image, few enough that the results of
# large ones fit into memory.
CHUNK = 16
_CHUNKS_AHEAD = 2

# What a worker does with an item; set once in each worker.
_work: Callable[[Any], Any] | None = None


def check_jobs(jobs: int) -> None:
    """Refuse a number of processes that cannot be.

    Raises:
        ConfigError: it is below 1.
    """
    if jobs < 1:
        raise ConfigError(f"jobs is {jobs}; it must be at least 1")


def in_order(work: Callable[[Any], Any], items: Iterable[Any], jobs: int) -> Generator[Any, None, None]:
    """`work(item)` for each item, in the order of the items; close it to end the processes early.

    Args:
        work: picklable, as are its results; it runs in this process if one suffices.
        items: picklable; read only as far as they are needed.
        jobs: processes that work at the same time. No more are started than there are chunks.

    Raises:
        DataError: a process died.

    Cost: at most two chunks of results and items for each process, beside the one being used.
    """
    items = iter(items)
    first = [chunk for chunk in (list(islice(items, CHUNK)) for _ in range(jobs)) if chunk]
    if len(first) <= 1:
        for chunk in first:
            yield from map(work, chunk)
        yield from map(work, items)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(len(first), context, _start_worker, (work,))
    pending: deque[Future[list[Any]]] = deque()
    try:
        pending += [_submit(pool, chunk) for chunk in first]
        while pending:
            while len(pending) <= _CHUNKS_AHEAD * len(first) and (chunk := list(islice(items, CHUNK))):
                pending.append(_submit(pool, chunk))
            yield from pending.popleft().result()
    except BrokenProcessPool:
        raise DataError(
            "a process that decodes images died, perhaps for want of memory; run the same command again to continue, "
            "with fewer --jobs"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, chunk: list[Any]) -> Future[list[Any]]:
    # This may start a worker, which Ctrl-C must not reach before it has turned deaf: a signal waits where it is
    # blocked, and what is blocked is inherited.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        return pool.submit(_work_on, chunk)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(work: Callable[[Any], Any]) -> None:
    global _work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _work = work


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work_on(chunk: list[Any]) -> list[Any]:
    assert _work is not None
    return [_work(item) for item in chunk]
