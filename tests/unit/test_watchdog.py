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


GROUP = """
    import os, sys
    from pathlib import Path

    import torch
    from megaclass.parallel import process
    from megaclass.train import watchdog

    if len(sys.argv) > 2:  # a driver that does not answer
        watchdog._SECONDS_TO_DUMP = 0.5
        watchdog.recorded_collectives = lambda: __import__("signal").pause()
    process.record_collectives_in(Path("there"))
    print(os.environ["TORCH_FR_DUMP_TEMP_FILE"], flush=True)
    process.group_of_one(torch.device("cpu"))
    for size in (3, 5):
        process.dist.all_reduce(torch.ones(size))
    watchdog.end_process(Path(sys.argv[1]), 0)(watchdog.Hang("gather", 41, 1.0))
"""


def in_group(*arguments: str | Path) -> tuple[str, int]:
    command = [sys.executable, "-c", textwrap.dedent(GROUP), *map(str, arguments)]
    own = {name: value for name, value in os.environ.items() if not name.startswith("TORCH_")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=own)
    return done.stdout, done.returncode


def test_a_rank_of_a_group_that_hangs_leaves_its_collectives(tmp_path: Path) -> None:
    out, code = in_group(tmp_path)
    assert (out, code) == ("there/nccl-rank-\n", 6)
    entries = json.loads((tmp_path / "collectives-rank-0.json").read_text())["entries"]
    assert [entry["profiling_name"] for entry in entries] == ["gloo:all_reduce"] * 2
    assert [entry["input_sizes"] for entry in entries] == [[[3]], [[5]]]


def test_records_that_cannot_be_had_do_not_keep_the_process(tmp_path: Path) -> None:
    _, code = in_group(tmp_path, "hang")
    assert code == 1  # not 6: nothing of ours ends it any more
    assert json.loads((tmp_path / "outcome.json").read_text())["code"] == 6
    assert not (tmp_path / "collectives-rank-0.json").exists()


def test_exit_code_and_time_stopped_from_outside_does_not_count(tmp_path: Path) -> None:
    process = start(tmp_path, 1.0)
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(1.5)
    os.kill(process.pid, signal.SIGCONT)
    time.sleep(0.3)
    assert process.poll() is None
    process.communicate(timeout=30)
    assert process.returncode == 6
