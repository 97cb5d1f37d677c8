from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

from megaclass.train.watchdog import Hang, Watchdog


def test_beats_and_pauses_keep_it_quiet() -> None:
    hangs: list[Hang] = []
    with Watchdog(0.4, hangs.append) as watchdog:
        for step in range(12):
            watchdog.beat("forward", step)
            time.sleep(0.05)
        with watchdog.pause("evaluation"), watchdog.pause("scoring"):
            time.sleep(0.7)
    assert hangs == []


def test_silence_is_reported_once_with_phase_and_step() -> None:
    hangs: list[Hang] = []
    with Watchdog(0.2, hangs.append) as watchdog:
        watchdog.beat("backward", 7)
        begin = time.monotonic()
        while not hangs and time.monotonic() < begin + 20:
            time.sleep(0.01)
        assert time.monotonic() - begin >= 0.18
        time.sleep(0.5)
    assert [(hang.phase, hang.step) for hang in hangs] == [("backward", 7)]
    assert 0.2 <= hangs[0].seconds < 0.25


def test_silence_after_a_pause_counts_from_its_end() -> None:
    hangs: list[Hang] = []
    with Watchdog(0.3, hangs.append) as watchdog:
        with watchdog.pause("evaluation"):
            time.sleep(0.5)
        assert hangs == []
        time.sleep(0.8)
    assert [hang.phase for hang in hangs] == ["after evaluation"]


SCRIPT = """
    import sys, threading, time
    from pathlib import Path
    from megaclass.train.watchdog import Watchdog, end_process

    def stuck_in_a_collective():
        print("begin", flush=True)
        threading.Event().wait()

    with Watchdog(float(sys.argv[2]), end_process(Path(sys.argv[1]), 3)) as watchdog:
        watchdog.beat("gather", 41)
        stuck_in_a_collective()
"""


def start(run_dir: Path, seconds: float) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(run_dir), str(seconds)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begin\n"
    return process


def test_a_hung_process_ends_with_stacks_line_and_outcome(tmp_path: Path) -> None:
    err = start(tmp_path, 0.5).communicate(timeout=30)[1]
    assert err.count("\n") == 1
    assert err.startswith("rank 3 on host ")
    assert "since phase 'gather' of step 41 (run.hang_seconds)" in err
    assert "stuck_in_a_collective" in (tmp_path / "stacks-rank-3.txt").read_text()
    outcome = json.loads((tmp_path / "outcome.json").read_text())
    assert (outcome["code"], outcome["rank"], outcome["step"]) == (6, 3, 41)


def test_exit_code_and_time_stopped_from_outside_does_not_count(tmp_path: Path) -> None:
    process = start(tmp_path, 1.0)
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(1.5)
    os.kill(process.pid, signal.SIGCONT)
    time.sleep(0.3)
    assert process.poll() is None
    process.communicate(timeout=30)
    assert process.returncode == 6
