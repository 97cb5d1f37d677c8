"""Runs that are started as a user starts them, killed or stopped in their middle, and continued.

Separate because every strategy, reader and launcher is tested this way.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import yaml

from megaclass import config
from megaclass.checkpoint import find_latest, verify
from megaclass.observe.journal import read_metrics
from megaclass.parallel.process import World
from megaclass.train import loop
from megaclass.train.attempt import Attempt
from megaclass.train.guard import own_run_directory

ROOT = Path(__file__).parent.parent.parent


def start(
    content: dict[str, Any], world_size: int, *more: str, launcher_options: tuple[str, ...] = ()
) -> subprocess.Popen[str]:
    """`megaclass train` as a user starts it, alone or under torchrun, in a session of its own."""
    run_dir = Path(content["run"]["dir"])
    path = run_dir.parent / f"{run_dir.name}.yaml"
    path.write_text(yaml.safe_dump(content))
    program = ["-m", "megaclass", "train", str(path), *more]
    command = [sys.executable, *program]
    if world_size > 1:
        launcher = [str(ROOT / "launch" / "torchrun.sh"), *launcher_options]
        command = [*launcher, "--nproc-per-node", str(world_size), *program]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Until the run has logged a step."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        lines = read_metrics(run_dir)
        if lines and lines[-1]["step"] >= step:
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached")


def workers(run_dir: Path) -> list[int]:
    """Process ids of the ranks that train into `run_dir`, in the order of their ranks."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            command = (folder / "cmdline").read_bytes().split(b"\0")
            environment = dict(item.partition(b"=")[::2] for item in (folder / "environ").read_bytes().split(b"\0"))
            is_ours = f"{run_dir}.yaml".encode() in command and b"-m" in command
            # The launcher and the agent have the same words on their command lines, but further back.
            if is_ours and command[command.index(b"-m") + 1] == b"megaclass" and b"torchrun" not in b" ".join(command):
                found[int(environment.get(b"RANK", b"0"))] = int(folder.name)
    return [found[rank] for rank in sorted(found)]


def killed_and_continued(content: dict[str, Any], world_size: int, step: int) -> str:
    """A rank of a run under torchrun is killed after `step`, and the agent starts all of them anew; what they said."""
    run_dir = Path(content["run"]["dir"])
    process = start(content, world_size)
    wait_for_step(run_dir, step, process)
    os.kill(workers(run_dir)[-1], signal.SIGKILL)
    output, _ = process.communicate(timeout=250)
    assert process.returncode == 0, output
    return output


def train_until(world: World, content: dict[str, Any], last: int) -> None:
    """Run on until step `last` inside `spawn`, and stop there as a signal would make it."""
    original = loop.Hooks.__init__

    def hooks(self: Any, should_stop: Any, *rest: Any) -> None:
        original(self, lambda step: step >= last, *rest)

    with own_run_directory(Path(content["run"]["dir"]), world):
        run = Attempt(config.validate(content), world)
        try:
            with mock.patch.object(loop.Hooks, "__init__", hooks):
                run.go()
        finally:
            run.close()


def digest(run_dir: Path) -> str:
    """Of all tensors of the newest checkpoint, which must be sound."""
    path = find_latest(run_dir / "checkpoints")
    assert path is not None
    outcome = verify(path)
    assert outcome.ok, outcome.faults
    return outcome.as_dict()["digest"]


def assert_same_to_the_bit(straight: Path, broken: Path) -> None:
    """The run that was broken off once has the losses and the tensors of the one that was not."""
    expected, actual = read_metrics(straight), read_metrics(broken)
    assert [line["loss_hex"] for line in actual] == [line["loss_hex"] for line in expected]
    assert {line["attempt"] for line in actual} == {1, 2}
    assert digest(broken) == digest(straight)
