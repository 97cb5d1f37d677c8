"""Processor time and memory of this process together with its decoding workers; Linux only.

Separate because a reader's work is spread over processes that the clock and the memory of one do not show.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path


def cpu_seconds() -> float:
    """Processor time that this process and its living children have used so far, all threads."""
    return time.process_time() + sum(time.clock_gettime(_clock(pid)) for pid in _children())


def resident_bytes() -> int:
    """Memory of this process and its living children; what they share is counted once."""
    return _summed("Pss:")


def mapped_bytes() -> int:
    """The same with what is shared counted by each: for differences, which then no other program's end can change."""
    return _summed("Rss:")


def _children() -> list[int]:
    return [child.pid for child in multiprocessing.active_children() if child.pid is not None]


def _clock(pid: int) -> int:
    """The clock of a process's processor time (clock_getcpuclockid(3), which Python has for threads only)."""
    return (~pid << 3) | 2


def _summed(field: str) -> int:
    total = 0
    for pid in (os.getpid(), *_children()):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        total += next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
    return total
