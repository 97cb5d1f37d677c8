"""Trains the runs of a study, several at a time, each in a process of its own with one thread.

A run goes through `train.run.train` as on the command line. What it would have shown there goes to output.log in its
run directory. Processes, because a run owns signals, threads and torch's settings. They are forked from a server that
has imported what a run needs and does nothing else, so that nothing of one run reaches another and a short run does not
spend a third of its time on imports. They stand in process groups of their own: a Ctrl-C reaches this process alone,
which then asks every run once to save and stop. When this process dies, however it dies, they do the same.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from megaclass import config
from megaclass.errors import ConfigError
from megaclass.observe.values import read_json
from megaclass.study.cases import Run, is_done
from megaclass.train.outcome import OUTCOME, PREEMPTED

OUTPUT = "output.log"
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# Imported once, by the server; the second and third are what torch imports when an optimizer is made.
_PRELOADED = ["torch", "torch._dynamo", "torch.nn.parallel.distributed", "megaclass.train.run", "matplotlib.figure"]
_TOLD_TO_STOP = (PREEMPTED, -signal.SIGTERM, -signal.SIGKILL)
_SECONDS_BETWEEN_LOOKS = 0.5
_SECONDS_TO_SAVE = 60.0
_LONGEST_REASON = 500


@dataclass(frozen=True)
class Failure:
    """A run that has ended without being completed: its exit code (negative: killed by that signal), why, its log."""

    case: str
    seed: int
    code: int
    reason: str
    log: Path

    @property
    def words(self) -> str:
        """How and why, and where more is said."""
        return f"exit code {self.code}: {self.reason} (see {self.log})"


@dataclass(frozen=True)
class Ended:
    """What became of the runs.

    Attributes:
        failures: in the order in which they failed.
        is_stopped: whether a signal came, and runs are missing because of it.
    """

    failures: Sequence[Failure]
    is_stopped: bool


@dataclass
class _Running:
    run: Run
    process: ForkServerProcess
    since: float


@dataclass(frozen=True)
class Progress:
    """How far the runs are.

    Attributes:
        done: runs that have ended, well or not.
        rest_seconds: expected until the last one ends; None while no run has been completed.
        ended: what has ended since the last time, each with the seconds it took, and how it failed if it did.
    """

    done: int
    rest_seconds: float | None
    ended: Sequence[tuple[Run, float, Failure | None]]


def train_all(runs: Sequence[Run], jobs: int, tell: Callable[[Progress], None]) -> Ended:
    """Train these runs, `jobs` at a time, in their order; a failed one does not stop the others. Tells twice a second.

    The first of `STOP_SIGNALS` makes every live run save and stop, and no other start; the second ends them at once.
    Must be called in the main thread. Leaves no process behind.

    Raises:
        ConfigError: this process is itself a rank of a distributed run.
    """
    assert jobs >= 1, jobs
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or "TORCHELASTIC_RUN_ID" in os.environ:
        raise ConfigError("a study starts processes of its own, one rank each; start it without torchrun")
    waiting, running = list(runs), list[_Running]()
    failures, times = list[Failure](), list[float]()
    with _signals() as received:
        num_told = 0
        try:
            while running or (waiting and not received):
                while waiting and not received and len(running) < jobs:
                    running.append(_start(waiting.pop(0)))
                wait([one.process.sentinel for one in running], _SECONDS_BETWEEN_LOOKS)
                ended = []
                for one in [one for one in running if not one.process.is_alive()]:
                    running.remove(one)
                    seconds, failure = time.monotonic() - one.since, _judge(one)
                    ended.append((one.run, seconds, failure))
                    if failure is None:
                        times.append(seconds)
                    elif not (received and failure.code in _TOLD_TO_STOP):
                        failures.append(failure)
                if len(received) > num_told:
                    for one in running:
                        (one.process.kill if num_told else one.process.terminate)()
                    num_told += 1
                done = len(runs) - len(waiting) - len(running)
                tell(Progress(done, _rest(times, running, len(waiting), jobs), ended))
        finally:
            for one in running:
                one.process.kill()
                one.process.join()
    return Ended(failures, bool(received) and any(not is_done(run) for run in runs))


def _start(run: Run) -> _Running:
    run.folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    _start_server()
    process = context.Process(
        target=_train, args=(run.config.model_dump(mode="json"), str(run.folder / OUTPUT)), name=str(run.folder)
    )
    # Read by libraries when they are loaded, so it must stand in the environment the server is born with.
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        process.start()
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
    return _Running(run, process, time.monotonic())


def _start_server() -> None:
    """Start the server of the runs, if there is none, deaf to what stops a study.

    A closed terminal and `timeout` signal the whole process group. The server alone knows how a run has ended, so it
    must outlive the runs that are saving. A blocked signal is inherited; `_train` lets them through again.
    """
    resource_tracker.ensure_running()  # unblocks SIGTERM when it starts, so it comes first
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _train(content: dict[str, Any], output: str) -> None:
    """What the process of a run does."""
    os.setpgid(0, 0)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.close(file)
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    import torch

    from megaclass.train.run import train

    torch.set_num_threads(1)
    sys.exit(train(config.validate(content)))


def _end_with_parent() -> None:
    """When the process of the study is gone, save and stop; one that does not is ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_SECONDS_TO_SAVE)
    os._exit(128 + signal.SIGTERM)


def _judge(ended: _Running) -> Failure | None:
    """Why a run whose process has ended is not completed; None if it is."""
    run, code = ended.run, ended.process.exitcode
    ended.process.join()
    assert code is not None
    if code == 0 and is_done(run):
        return None
    log = run.folder / OUTPUT
    outcome = read_json(run.folder / OUTCOME)
    if code < 0:
        reason = f"killed by {signal.Signals(-code).name}"
    elif outcome.get("code") == code and outcome.get("reason"):
        reason = str(outcome["reason"])
    else:  # it ended before it owned its run directory
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.exists() else []
        reason = lines[-1].strip() if lines else "it left no word"
    return Failure(run.case, run.seed, code, reason[:_LONGEST_REASON], log)


def _rest(times: Sequence[float], running: Sequence[_Running], num_waiting: int, jobs: int) -> float | None:
    """Expected seconds until the last run ends, if all take as long as those that are done took on average."""
    if not times:
        return None
    usual, now = sum(times) / len(times), time.monotonic()
    work = sum(max(0.0, usual - (now - one.since)) for one in running) + usual * num_waiting
    return work / max(1, min(jobs, len(running) + num_waiting))


@contextmanager
def _signals() -> Iterator[list[int]]:
    """The numbers of the stop signals that have come, for the length of a `with` block."""
    received: list[int] = []
    before: dict[int, Callable[..., Any] | int | None] = {}
    for number in STOP_SIGNALS:
        before[number] = signal.signal(number, lambda number, _: received.append(number))
    try:
        yield received
    finally:
        for stop, handler in before.items():
            signal.signal(stop, handler)
