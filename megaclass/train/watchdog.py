"""Ending a process that hangs or has lost its agent: a collective that waits for ever has no other cure.

Separate because it runs in a thread of its own beside everything else, and ends the process without asking.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from megaclass.errors import PeerError, UserError
from megaclass.parallel.process import recorded_collectives
from megaclass.train.outcome import exit_code_for_process, is_under_agent, record_outcome

LOST_AGENT = "loss of the agent"
_SECONDS_BETWEEN_QUESTIONS = 1.0
_SECONDS_TO_NOTICE = 8.0
_SECONDS_TO_DUMP = 20.0


@dataclass(frozen=True)
class Hang:
    """What is known when nothing has happened for too long: the last phase and step, and for how long.

    With a `code` it is the failure of another rank, whose exit code that is; `phase` then says why.
    """

    phase: str
    step: int
    seconds: float
    code: int = PeerError.exit_code


class Watchdog:
    """Calls `on_hang` once if no beat comes for `seconds`, or if the agent dies; a `with` block, with a thread.

    A torchrun agent that is killed leaves its ranks running without anyone to stop or restart them; they notice that
    they have been handed to another parent, and end.

    Time in which the process itself was stopped (SIGSTOP, a suspended computer) does not count, since then the
    watching thread stood still as well. Cost: a beat is one assignment; the thread wakes at most twenty times within
    the limit.

    Args:
        seconds: longest time between two beats, outside of pauses.
        on_hang: called in the watching thread; `end_process` makes the usual one.
        failure: why another rank has failed, if it has; asked once a second. A collective on a GPU may never notice.
    """

    def __init__(
        self, seconds: float, on_hang: Callable[[Hang], None], failure: Callable[[], UserError | None] = lambda: None
    ) -> None:
        assert seconds > 0, seconds
        self._seconds = seconds
        self._on_hang = on_hang
        self._failure = failure
        self._last: tuple[str, int] = ("start", 0)
        self._num_pauses = 0
        self._agent = os.getppid() if is_under_agent() else None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()

    def beat(self, phase: str, step: int) -> None:
        """Say that step `step` has come to `phase`."""
        # A new tuple every time: the watching thread compares identities and needs no lock.
        self._last = (phase, step)

    @contextmanager
    def pause(self, phase: str) -> Iterator[None]:
        """A block that may take as long as it needs, such as an evaluation; pauses may nest."""
        step = self._last[1]
        self._last = (phase, step)
        self._num_pauses += 1
        try:
            yield
        finally:
            self._last = (f"after {phase}", step)
            self._num_pauses -= 1

    def _watch(self) -> None:
        interval = min(self._seconds / 20, 1.0)
        seen, num_intervals = self._last, 0
        next_question = time.monotonic() + _SECONDS_BETWEEN_QUESTIONS
        while not self._done.wait(interval):
            last = self._last
            if self._agent is not None and os.getppid() != self._agent:
                self._on_hang(Hang(LOST_AGENT, last[1], 0.0))
                return
            if time.monotonic() >= next_question:
                next_question = time.monotonic() + _SECONDS_BETWEEN_QUESTIONS
                told = self._failure()
                # Most notice by themselves, and end in order: they are given the time to.
                if told is not None and not self._done.wait(_SECONDS_TO_NOTICE):
                    self._on_hang(Hang(str(told), last[1], 0.0, told.exit_code))
                    return
            num_intervals = 0 if last is not seen or self._num_pauses else num_intervals + 1
            seen = last
            if num_intervals * interval >= self._seconds:
                self._on_hang(Hang(last[0], last[1], num_intervals * interval))
                return


def end_process(run_dir: Path, rank: int) -> Callable[[Hang], None]:
    """The `on_hang` of a run: stacks of all threads to `stacks-rank-R.txt`, one line, the outcome, and exit code 6.

    A rank of several also leaves its newest collectives, in `collectives-rank-R.json`: compared over the ranks, they
    show which one did not take part. The process ends by `os._exit`: neither a hung collective nor the clean-up of its
    group can be interrupted.
    """

    def end(hang: Hang) -> None:
        stacks = Path(run_dir) / f"stacks-rank-{rank}.txt"
        host = socket.gethostname()
        line = (
            f"rank {rank} on host {host} hangs: nothing for {hang.seconds:.0f} s since phase {hang.phase!r} of step "
            f"{hang.step} (run.hang_seconds); its stacks are in {stacks}; another rank may be the cause, see their logs"
        )
        if hang.phase == LOST_AGENT:
            line = f"rank {rank} on host {host} ends at step {hang.step}: its agent is gone; start the run again"
        if hang.code != PeerError.exit_code:
            line = f"rank {rank} on host {host} ends at step {hang.step}: {hang.phase}"
        try:
            with stacks.open("w", encoding="utf-8") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            line += f" (not written: {error.strerror})"
        try:
            # Not print: the thread that hangs may hold the lock of the stream.
            os.write(2, f"{line}\n".encode())
            record_outcome(run_dir, rank, hang.code, line, hang.step)
            if hang.phase != LOST_AGENT and hang.code == PeerError.exit_code:
                _dump_collectives(Path(run_dir) / f"collectives-rank-{rank}.json")
        finally:
            os._exit(exit_code_for_process(hang.code, is_under_agent()))

    return end


def _dump_collectives(path: Path) -> None:
    # A driver that hangs may never answer, and may keep Python's lock; the timer needs neither, and ends the process.
    with open(os.devnull, "w") as nowhere:
        faulthandler.dump_traceback_later(_SECONDS_TO_DUMP, exit=True, file=nowhere)
        with suppress(OSError, RuntimeError):
            if (recorded := recorded_collectives()) is not None:
                path.write_bytes(recorded)
