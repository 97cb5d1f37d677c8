from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from megaclass.errors import ConfigError, NoProgressError, NumericError
from megaclass.parallel.process import World
from megaclass.train.guard import STOP_SIGNALS, FiniteGuard, StopSignal, check_progress, own_run_directory
from megaclass.train.outcome import exit_code_for_process
from tests.support.checkpoints import ALONE, make_worlds, on_threads


def python(script: str, *args: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def test_owner_is_written_and_the_folder_free_again_afterwards(tmp_path: Path) -> None:
    run_dir = tmp_path / "deep" / "run"
    for _ in range(2):
        with own_run_directory(run_dir, ALONE):
            owner = json.loads((run_dir / ".lock").read_text())
            assert list(owner) == ["host", "pid", "since"]
            assert (owner["host"], owner["pid"]) == (socket.gethostname(), os.getpid())


def test_second_owner_is_refused_on_all_its_ranks(tmp_path: Path) -> None:
    def run(world: World) -> None:
        with own_run_directory(tmp_path, world):
            raise AssertionError("both own it")

    with own_run_directory(tmp_path, ALONE):
        (tmp_path / "outcome.json").write_text("mine")
        results = on_threads(make_worlds(3), run)
    since = json.loads((tmp_path / ".lock").read_text())["since"]
    assert {type(result) for result in results} == {ConfigError}
    assert {str(result) for result in results} == {
        f"run directory {tmp_path} is in use by pid {os.getpid()} on host {socket.gethostname()} since {since}; "
        "wait until that run has ended, stop it, or give another run.dir"
    }
    assert (tmp_path / "outcome.json").read_text() == "mine"


def test_ranks_of_one_run_own_together(tmp_path: Path) -> None:
    def run(world: World) -> str:
        with own_run_directory(tmp_path, world):
            return "owned"

    (tmp_path / "outcome.json").write_text("of the start before")
    worlds = make_worlds(3)
    for _ in range(2):
        assert on_threads(worlds, run) == ["owned"] * 3
    assert not (tmp_path / "outcome.json").exists()


def test_unwritable_directory_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    expected = rf"run directory {tmp_path}/file/run cannot be written: Not a directory; give another run\.dir"
    with pytest.raises(ConfigError, match=expected), own_run_directory(tmp_path / "file" / "run", ALONE):
        pass


def test_lock_without_a_name_is_still_a_lock(tmp_path: Path) -> None:
    with own_run_directory(tmp_path, ALONE):
        (tmp_path / ".lock").write_text("{")
        with pytest.raises(ConfigError, match="is in use by another run; wait"), own_run_directory(tmp_path, ALONE):
            pass


def test_two_processes_at_the_same_instant_one_wins_and_death_frees(tmp_path: Path) -> None:
    script = """
        import os, signal, sys, time
        from contextlib import ExitStack
        from pathlib import Path
        from megaclass.errors import ConfigError
        from megaclass.train.guard import own_run_directory
        from types import SimpleNamespace
        ALONE = SimpleNamespace(rank=0, size=1, is_main=True, store=None, publish=lambda *_: None)
        print("ready", flush=True)
        begin, won = float(sys.stdin.readline()), ""
        stack = ExitStack()
        for number in range(50):
            while time.time() < begin + number * 0.02: pass
            try:
                stack.enter_context(own_run_directory(Path(sys.argv[1]) / str(number), ALONE))
                won += "1"
            except ConfigError as error:
                assert "is in use by" in str(error), error
                won += "0"
        print(won, flush=True)
        sys.stdin.readline()
        os.kill(os.getpid(), signal.SIGKILL)
    """
    rivals = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    try:
        for rival in rivals:
            assert rival.stdout is not None
            assert rival.stdout.readline() == "ready\n"
        begin = time.time() + 0.2
        for rival in rivals:
            assert rival.stdin is not None
            rival.stdin.write(f"{begin}\n")
            rival.stdin.flush()
        won = [rival.stdout.readline().strip() for rival in rivals if rival.stdout]
        assert [int(a) + int(b) for a, b in zip(*won, strict=True)] == [1] * 50, won
        for rival in rivals:
            rival.communicate("end\n", timeout=20)
            assert rival.returncode == -signal.SIGKILL
        for number in range(50):
            with own_run_directory(tmp_path / str(number), ALONE):
                pass
    finally:
        for rival in rivals:
            if rival.poll() is None:
                rival.kill()


def test_a_forked_child_does_not_keep_the_lock_of_a_dead_owner(tmp_path: Path) -> None:
    script = """
        import os, signal, sys, time
        from pathlib import Path
        from megaclass.train.guard import own_run_directory
        from types import SimpleNamespace
        ALONE = SimpleNamespace(rank=0, size=1, is_main=True, store=None, publish=lambda *_: None)
        with own_run_directory(Path(sys.argv[1]), ALONE):
            child = os.fork()
            if child == 0:
                os.close(1), os.close(2)
                time.sleep(60)
            print(child, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
    """
    owner = python(script, str(tmp_path))
    child = int(owner.communicate(timeout=60)[0])
    try:
        assert owner.returncode == -signal.SIGKILL
        os.kill(child, 0)
        with own_run_directory(tmp_path, ALONE):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_alone_stops_before_the_next_step(number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in STOP_SIGNALS]
    with StopSignal(ALONE) as stop:
        assert not stop.agreed(0)
        assert stop.name is None
        os.kill(os.getpid(), number)
        assert stop.agreed(1)
        assert stop.name == signal.Signals(number).name
    assert [signal.getsignal(each) for each in STOP_SIGNALS] == before


def test_first_end_after_a_warning_is_no_second_one() -> None:
    with StopSignal(ALONE) as stop:
        for number in (signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert stop.agreed(1)
        assert stop.name == "SIGUSR1"


SECOND = """
    import os, signal, time
    from megaclass.train.guard import StopSignal
    from types import SimpleNamespace
    ALONE = SimpleNamespace(rank=0, size=1, is_main=True, store=None, publish=lambda *_: None)
    with StopSignal(ALONE):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        print("still there", flush=True)
        os.environ.pop("TORCHELASTIC_RUN_ID", None)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
"""


def test_second_signal_ends_at_once_but_not_the_echo_of_an_agent() -> None:
    alone, under_agent = python(SECOND), python(SECOND, TORCHELASTIC_RUN_ID="x")
    out, err = alone.communicate(timeout=60)
    assert (alone.returncode, out) == (128 + signal.SIGTERM, "")
    assert err == "second SIGTERM: ending at once, nothing is saved\n"
    out, err = under_agent.communicate(timeout=60)
    assert (under_agent.returncode, out) == (128 + signal.SIGTERM, "still there\n")


def run_in_lockstep(worlds: list[World], signalled: dict[int, list[int]], lag: int, seed: int) -> list[int]:
    """The steps before which the ranks stop; rank r gets a signal before it asks about each step in `signalled[r]`.

    A rank starts step s only when every rank has joined the collective of step s - lag, as late as a loop may read.
    """
    joined = [-1] * len(worlds)
    changed = threading.Condition()

    def run(world: World) -> int:
        generator = random.Random(seed + world.rank)
        stop = StopSignal(world)
        for step in range(40):
            with changed:
                assert changed.wait_for(lambda step=step: min(joined) >= step - lag, 20)  # type: ignore[misc]
            time.sleep(generator.random() * 0.003)
            if step in signalled.get(world.rank, []):
                stop._handle(signal.SIGUSR1, None)
            if stop.agreed(step):
                with changed:
                    joined[world.rank] = 10**9
                    changed.notify_all()
                return step
            time.sleep(generator.random() * 0.003)
            with changed:
                joined[world.rank] = step
                changed.notify_all()
        return -1

    return on_threads(worlds, run)


@pytest.mark.parametrize("lag", [1, 2])
@pytest.mark.parametrize("seed", range(10))
def test_all_ranks_stop_before_the_same_step(lag: int, seed: int) -> None:
    steps = run_in_lockstep(make_worlds(3), {seed % 3: [3], (seed + 1) % 3: [4], (seed + 2) % 3: [5, 6]}, lag, seed)
    assert len(set(steps)) == 1, steps
    assert steps[0] in (5, 6), steps


def test_ranks_agree_through_a_tcp_store_and_again_in_the_next_block() -> None:
    worlds = make_worlds(2, dist.PrefixStore("megaclass", dist.TCPStore("127.0.0.1", 0, is_master=True)))
    assert run_in_lockstep(worlds, {1: [0]}, 1, 0) == [2, 2]
    assert run_in_lockstep(worlds, {0: [7]}, 1, 0) == [9, 9]
    assert run_in_lockstep(worlds, {}, 1, 0) == [-1, -1]


@pytest.mark.parametrize("told", [[0], [1], [0, 1], []])
def test_a_node_knows_that_another_ones_launcher_was_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: list[int]
) -> None:
    """Two nodes of one rank each; `told` lists those whose launcher was; else the agents stop by themselves."""
    nodes = [tmp_path / "0", tmp_path / "1"]
    for number, folder in enumerate(nodes):
        folder.mkdir()
        if number in told:
            (folder / "told").touch()
    stops = [StopSignal(world) for world in make_worlds(2)]

    def ask(rank: int, step: int) -> bool:
        monkeypatch.setenv("MEGACLASS_OUTCOME_DIR", str(nodes[rank]))
        return stops[rank].agreed(step)

    first = told[0] if told else 0
    assert not ask(1 - first, 1)
    stops[first]._handle(signal.SIGTERM, None)
    assert [ask(first, 1), ask(1 - first, 2), ask(first, 2)] == [False] * 3
    assert ask(0, 3)
    assert ask(1, 3)
    assert [stop.is_by_another_launcher for stop in stops] == [bool(told) and rank not in told for rank in (0, 1)]


def test_finite_guard_counts_only_steps_in_a_row() -> None:
    guard = FiniteGuard(3)
    for step, is_finite in enumerate([False, False, True, False, False]):
        guard.record(step, is_finite)
    assert (guard.num_in_a_row, guard.num_skipped) == (2, 4)
    with pytest.raises(
        NumericError, match=r"step 5: .* in 3 steps in a row \(train\.non_finite_limit 3\); lower optim"
    ):
        guard.record(5, False)


def test_a_run_restarted_without_progress_is_given_up():
    starts = [{"agent_run": "a", "start_step": 8}] * 5
    check_progress(starts[:4], "a", 8)
    check_progress(starts, "a", 16)
    check_progress(starts, "b", 8)
    check_progress(starts, None, 8)  # a person who starts again knows why
    with pytest.raises(
        NoProgressError, match="the last 5 starts all began at step 8 and ended without a new checkpoint"
    ):
        check_progress(starts, "a", 8)
    assert exit_code_for_process(6, under_agent=True, is_permanent=True) == 0
    assert exit_code_for_process(6, under_agent=True) == 6
