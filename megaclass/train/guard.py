"""What keeps a run from harming itself or others: one owner per run directory, one common stop, finite numbers.

Separate from the loop because none of it is training. The watchdog over hangs is in `watchdog`, the record of how a
process ended in `outcome`.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from megaclass.errors import ConfigError, NoProgressError, NumericError
from megaclass.parallel.agreement import Agreement
from megaclass.train.outcome import OUTCOME, is_under_agent, launcher_was_told

if TYPE_CHECKING:
    from megaclass.parallel.process import World

LOCK = ".lock"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)

MAX_STARTS = 5
"""Starts by one agent at the same step before the run is given up."""

_ANSWER_SECONDS = 120.0
_REPEAT_SECONDS = 2.0


@contextmanager
def own_run_directory(run_dir: Path, world: World) -> Iterator[None]:
    """Own the run directory for the length of a `with` block; on every rank, and refused on all ranks alike.

    Rank 0 makes the folder and holds an exclusive `flock` on `.lock` in it, whose content says who: host, pid, since.
    The operating system frees the lock when the process dies, however it dies, so there are no stale locks; the file
    itself stays. Its first act is to remove the `outcome.json` of an earlier start.

    On a shared disk the lock works across hosts where the file system passes `flock` on (NFS since Linux 2.6.12,
    Lustre mounted with `-o flock`, GPFS, CephFS). A file system that refuses is refused here; one that pretends (Lustre
    with `localflock`) protects within a host only.

    Raises:
        ConfigError: the folder cannot be made, written or locked, or another live run owns it.
        PeerError: rank 0 did not answer in time.
    """
    talk = Agreement(world, "run-directory")
    if not world.is_main:
        error = talk.hear("owner", _ANSWER_SECONDS)["error"]
        if error is not None:
            repeated = ConfigError(error)
            repeated.is_repeated = True
            raise repeated
        yield
        return
    try:
        handle = [_lock(Path(run_dir))]
    except ConfigError as error:
        talk.tell("owner", {"error": str(error)})
        raise
    # A forked child (a decoding process) would hold the lock open beyond our death.
    os.register_at_fork(after_in_child=lambda: _close(handle))
    try:
        talk.tell("owner", {"error": None})
        yield
    finally:
        _close(handle)


def _lock(run_dir: Path) -> int:
    """An open, locked handle of the run directory's lock file."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        handle = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise ConfigError(
            f"run directory {run_dir} cannot be written: {error.strerror}; give another run.dir"
        ) from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        owner = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(owner).encode(), 0)
        (run_dir / OUTCOME).unlink(missing_ok=True)
    except BlockingIOError:
        os.close(handle)
        raise ConfigError(
            f"run directory {run_dir} is in use by {_owner(run_dir / LOCK)}; "
            "wait until that run has ended, stop it, or give another run.dir"
        ) from None
    except OSError as error:
        os.close(handle)
        raise ConfigError(
            f"run directory {run_dir} cannot be locked: {error.strerror}; give a run.dir on a disk that can"
        ) from None
    return handle


def _owner(lock: Path) -> str:
    """Who holds the lock; it may have taken it this very moment and not have written its name yet."""
    for _ in range(20):
        with suppress(OSError, ValueError, KeyError, TypeError):
            owner = json.loads(lock.read_bytes()[:1000])
            return f"pid {owner['pid']} on host {owner['host']} since {owner['since']}"
        time.sleep(0.02)
    return "another run"


def _close(handle: list[int]) -> None:
    while handle:
        os.close(handle.pop())


class StopSignal:
    """The stop signals (SIGTERM and its like) as the wish to save and stop, granted at one step on all ranks.

    A `with` block.

    A handler only sets a flag. A second SIGTERM or SIGINT ends the process at once with 128 + the signal's number.
    Under an agent a repetition within two seconds counts as the same request: schedulers signal every process, and the
    agent passes on to its ranks what it has got.

    Must be entered in the main thread, on every rank the same number of times.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._key = Agreement(world, "stop").key("at")
        self._received: int | None = None
        self._last_end_seconds: float | None = None
        self._is_by_another_launcher = False
        self._previous: dict[int, Any] = {}

    @property
    def name(self) -> str | None:
        """Name of the first signal this rank received, None before."""
        return None if self._received is None else signal.Signals(self._received).name

    @property
    def is_by_another_launcher(self) -> bool:
        """Whether all ranks stop because a launcher was told to, and this node's was not; known once they have agreed.

        Not where an agent stops its ranks by itself, as it does to let another node join.
        """
        return self._is_by_another_launcher

    def __enter__(self) -> StopSignal:
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def agreed(self, step: int) -> bool:
        """Whether all ranks stop now, before `step`; to be asked at the start of every step, with no step left out.

        A rank that has been signalled when it starts step t publishes t + 2, unless another was first; everyone stops
        at the start of the step that was published. No rank can be past it: to start step t + 2, a rank needs the
        results of step t's collectives on the host, at the latest, which the signalled rank joins only after it has
        published. So the loop must read something of every step's collectives back before it starts the step after
        the next. A rank one step ahead has seen nothing yet and stops at t + 2 like the others. If it publishes
        t + 3 itself and is first, the same holds for that number.

        Cost: one look at the store per step; no collective. In a world of one: none, and the stop is immediate.
        """
        store = self._world.store
        if store is None:
            return self._received is not None
        if self._received is not None:
            store.compare_set(self._key, "", f"{step + 2} {'launcher' if launcher_was_told() else 'agent'}")
        if not store.check([self._key]):
            return False
        at, _, who = store.get(self._key).decode().partition(" ")
        self._is_by_another_launcher = who == "launcher" and not launcher_was_told()
        return step >= int(at)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number in (signal.SIGTERM, signal.SIGINT):
            last, self._last_end_seconds = self._last_end_seconds, now
            if last is not None and not (is_under_agent() and now - last < _REPEAT_SECONDS):
                os.write(2, f"second {signal.Signals(number).name}: ending at once, nothing is saved\n".encode())
                os._exit(128 + number)
        if self._received is None:
            self._received = number


class FiniteGuard:
    """Counts steps that were skipped because loss or gradient was not finite, and ends a run with too many in a row."""

    def __init__(self, limit: int) -> None:
        assert limit >= 1, limit
        self._limit = limit
        self.num_in_a_row = 0
        self.num_skipped = 0

    def record(self, step: int, is_finite: bool) -> None:
        """Take note of a step; `is_finite` is the same on every rank, so that all of them end together.

        Raises:
            NumericError: this is the last step of `limit` skipped ones in a row.
        """
        if is_finite:
            self.num_in_a_row = 0
            return
        self.num_in_a_row += 1
        self.num_skipped += 1
        if self.num_in_a_row >= self._limit:
            raise NumericError(
                f"step {step}: loss or gradient not finite in {self.num_in_a_row} steps in a row "
                f"(train.non_finite_limit {self._limit}); lower optim.lr or classifier.scale, or set optim.clip_norm"
            )


def check_progress(attempts: Sequence[Mapping[str, Any]], agent_run: str | None, step: int) -> None:
    """End a run that its agent starts again and again without a new checkpoint in between.

    Args:
        attempts: the lines of attempts.jsonl, this start not among them; each with `agent_run` and `start_step`.
        agent_run: id of the agent's run, None without an agent (a person who starts again knows why).
        step: where this start would continue.

    Raises:
        NoProgressError: the last `MAX_STARTS` starts by this agent began at this step too.
    """
    if agent_run is None:
        return
    last = attempts[-MAX_STARTS:]
    if len(last) == MAX_STARTS and all(
        line.get("agent_run") == agent_run and line.get("start_step") == step for line in last
    ):
        raise NoProgressError(
            f"the last {MAX_STARTS} starts all began at step {step} and ended without a new checkpoint; see train.log "
            "and the ranks' output for what ends them, mend it, and start the run again"
        )
