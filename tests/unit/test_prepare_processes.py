"""Work in several processes: results in order, errors as they come, nobody left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megaclass.errors import ConfigError, DataError
from megaclass.prepare.processes import CHUNK, check_jobs, in_order


def squared(number: int) -> tuple[int, int]:
    if number % 7 == 0:
        time.sleep(0.01)
    return number * number, os.getpid()


def fail_at_fifty(number: int) -> int:
    if number == 50:
        raise ValueError("fifty")
    return number


def die_at_fifty(number: int) -> int:
    if number == 50:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.parametrize(
    ("count", "jobs", "processes"), [(0, 3, 0), (5, 3, 1), (CHUNK, 3, 1), (203, 3, 3), (203, 1, 1)]
)
def test_results_come_in_order(count: int, jobs: int, processes: int) -> None:
    results = list(in_order(squared, range(count), jobs))
    assert [result for result, _ in results] == [number * number for number in range(count)]
    assert len({process for _, process in results}) <= processes
    assert jobs == 1 or count <= CHUNK or os.getpid() not in {process for _, process in results}


def test_items_are_read_only_as_far_as_needed() -> None:
    read = 0

    def items() -> Iterator[int]:
        nonlocal read
        for number in range(10_000):
            read += 1
            yield number

    results = in_order(squared, items(), 2)
    for _ in range(10 * CHUNK):
        next(results)
    assert read <= (10 + 2 * 2 + 2) * CHUNK
    results.close()


def test_an_error_of_the_work_is_raised_where_it_belongs() -> None:
    results = in_order(fail_at_fifty, range(200), 2)
    assert [next(results) for _ in range(CHUNK * (50 // CHUNK))] == list(range(CHUNK * (50 // CHUNK)))
    with pytest.raises(ValueError, match="fifty"):
        list(results)


def test_a_process_that_dies_is_an_error() -> None:
    with pytest.raises(DataError, match="a process that decodes images died, perhaps for want of memory; run the same"):
        list(in_order(die_at_fifty, range(200), 2))


def test_jobs_below_one() -> None:
    with pytest.raises(ConfigError, match="jobs is 0; it must be at least 1"):
        check_jobs(0)


SCRIPT = """
import signal, sys
from tests.unit.test_prepare_processes import squared
from megaclass.prepare.processes import in_order

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background are started deaf to it
    try:
        for number, (_, process) in enumerate(in_order(squared, iter(int, 1), 2)):
            if number % 4 == 0:
                print(process, flush=True)
    except KeyboardInterrupt:
        sys.exit(130)
"""


def is_alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_their_parent(number: signal.Signals, tmp_path: Path) -> None:
    """Ctrl-C goes to all processes of the terminal, the others to the parent alone."""
    (tmp_path / "endless.py").write_text(SCRIPT)
    parent = subprocess.Popen(
        [sys.executable, tmp_path / "endless.py"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert parent.stdout is not None
    workers = {int(parent.stdout.readline()) for _ in range(40)}
    assert parent.pid not in workers
    (os.killpg if number == signal.SIGINT else os.kill)(parent.pid, number)
    _, said = parent.communicate(timeout=60)
    assert parent.returncode == (130 if number == signal.SIGINT else -number)
    if number == signal.SIGINT:
        assert said == ""
    deadline = time.monotonic() + 30
    while any(is_alive(worker) for worker in workers):
        assert time.monotonic() < deadline, workers
        time.sleep(0.05)
