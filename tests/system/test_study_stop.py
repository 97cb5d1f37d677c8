"""A study that dies or is told to stop: its runs save, and the same command goes on."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megaclass.cli import main
from megaclass.observe.journal import read_lines, read_metrics
from tests.support.training import small_dataset
from tests.system.test_study import attempts, write

Start = Callable[[Path, Path], subprocess.Popen[str]]
LONG: dict[str, Any] = {"settings": {"train.steps": 100}, "plots": []}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts the command as a process in a process group of its own, and ends it if the test has not."""
    started = []

    def begin(path: Path, out: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "megaclass", "study", str(path), "--out", str(out), "--jobs", "1"]
        made = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        started.append(made)
        return made

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not (lines := read_metrics(run)) or lines[-1]["step"] < step:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"step {step} was not reached"
        time.sleep(0.05)


def wait_until_free(run: Path, seconds: float = 120) -> None:
    """Until no live process owns the run directory."""
    deadline = time.monotonic() + seconds
    with (run / ".lock").open("a") as lock:
        while True:
            try:
                return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                assert time.monotonic() < deadline, "the run outlives its study"
                time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.distributed
def test_the_runs_of_a_study_that_dies_save_and_stop(dataset: Path, tmp_path: Path, start: Start) -> None:
    out = tmp_path / "out"
    process = start(write(tmp_path, dataset, [{"name": "a"}], **LONG), out)
    run = out / "runs" / "a" / "seed-0"
    wait_for_step(run, 3, process)
    process.kill()
    process.communicate()
    wait_until_free(run)
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["status"], summary["exit_code"]) == ("preempted", 75)
    assert 3 <= summary["step"] < 100
    assert not (out / "runs" / "a" / "seed-1").exists()


@pytest.mark.slow
@pytest.mark.distributed
def test_a_study_that_is_told_to_stop_saves_its_runs_and_goes_on(
    dataset: Path, tmp_path: Path, start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = write(tmp_path, dataset, [{"name": "a"}], **LONG), tmp_path / "out"
    process = start(path, out)
    run = out / "runs" / "a" / "seed-0"
    wait_for_step(run, 3, process)
    os.killpg(process.pid, signal.SIGTERM)  # as `timeout` and a closed terminal do: the whole group
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert errors.splitlines()[-1] == (
        "megaclass: stopped with 0 of 2 runs done; the same command goes on from there, and with --report-only it "
        "shows what there is"
    )
    wait_until_free(run, seconds=0)  # it has waited for its runs
    assert json.loads((run / "summary.json").read_text())["status"] == "preempted"
    assert not (out / "runs" / "a" / "seed-1").exists()
    assert not (out / "table.json").exists()

    assert main(["study", str(path), "--out", str(out), "--report-only"]) == 1
    assert "- a, seed 0: exit code 75: preempted and saved" in capsys.readouterr().out
    assert main(["study", str(path), "--out", str(out), "--jobs", "2"]) == 0
    assert "missing" not in capsys.readouterr().out
    assert attempts(out) == {"a/seed-0": 2, "a/seed-1": 1}
    lines = read_lines(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 101))  # none twice: all were saved
    assert json.loads((run / "summary.json").read_text())["samples"]["replayed"] == 0
