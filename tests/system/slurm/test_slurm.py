"""The demo under a real Slurm of two nodes on this machine: trained, preempted, cancelled, and with a node lost.

`make test-slurm` runs this file and nothing else does; without Slurm it fails, it does not skip.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from megaclass.observe.journal import read_lines, read_metrics

ROOT = Path(__file__).parents[3]
SETUP = Path(__file__).parent / "setup.sh"
STEPS = 120

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]


@dataclass
class Slurm:
    """A Slurm that runs, and the folder it and its jobs write to."""

    folder: Path
    data: Path
    environment: dict[str, str]
    jobs: dict[str, Path] = field(default_factory=dict)

    def run(self, *command: str | Path) -> str:
        done = subprocess.run(
            [*map(str, command)], capture_output=True, text=True, env=self.environment, cwd=ROOT, timeout=180
        )
        assert done.returncode == 0, f"{' '.join(map(str, command))}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, run_dir: Path, *options: str, steps: int = STEPS, script: str = "launch/slurm.sbatch") -> str:
        """Submit the demo, made smaller, to both nodes; the job's id."""
        demo = [
            *("configs/demo.yaml", "--dataset.path", str(self.data), "--train.steps", str(steps)),
            *("--train.global-batch-size", "64", "--train.checkpoint-every", "25", "--evaluate.baselines", "false"),
            *("--run.log-every", "1", "--run.dir", str(run_dir)),
        ]
        log = self.folder / f"{run_dir.name}.log"
        job = self.run("sbatch", "--parsable", "--nodes=2", f"--output={log}", *options, script, *demo).strip()
        self.jobs[job] = log
        return job

    def job(self, job: str) -> dict[str, str]:
        """What Slurm knows of the job: JobState, Restarts, Reason, ExitCode, ..."""
        shown = self.run("scontrol", "--oneliner", "show", "job", job)
        return dict(re.findall(r"(\w+)=(\S*)", shown))

    def wait(self, job: str, condition: Callable[[], object], what: str, seconds: float = 300.0) -> float:
        """Seconds until the condition held."""
        start = time.monotonic()
        while not condition():
            assert time.monotonic() < start + seconds, f"{what}: waited in vain; {self.job(job)}\n{self.log(job)}"
            time.sleep(0.1)
        return time.monotonic() - start

    def wait_for_end(self, job: str, seconds: float = 400.0) -> dict[str, str]:
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL")
        self.wait(job, lambda: self.job(job)["JobState"] in over, "the end of the job", seconds)
        return self.job(job)

    def wait_for_step(self, job: str, run_dir: Path, step: int) -> float:
        def reached() -> bool:
            lines = read_metrics(run_dir)
            return bool(lines) and lines[-1]["step"] >= step

        return self.wait(job, reached, f"step {step}")

    def log(self, job: str) -> str:
        return self.jobs[job].read_text(errors="replace") if self.jobs[job].exists() else ""

    def processes(self, *words: str) -> list[int]:
        """Processes whose environment or command line has each of the words: SLURM_JOB_ID=7, SLURMD_NODENAME=n2."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                text = "\n".join((folder / name).read_text(errors="replace") for name in ("environ", "cmdline"))
                is_zombie = (folder / "stat").read_text().rsplit(")", 1)[1].split()[0] in "ZX"
                if not is_zombie and all(word in text.replace("\0", "\n").split("\n") for word in words):
                    found.append(int(folder.name))
        return found


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    assert shutil.which("slurmctld"), f"Slurm is not installed; run {SETUP} install"
    # Short and within reach of all: munge insists on it, and a socket's path has a limit.
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "MASTER_", "GLOO", "NCCL"))
    }
    environment = kept | {
        "SLURM_CONF": str(folder / "slurm.conf"),
        "SLURM_TEST_PORT": str(_four_free_ports()),
        "MASTER_ADDR": "127.0.0.1",  # n1 and n2 are not names of this machine
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    slurm = Slurm(folder, folder / "glyphs", environment)
    slurm.run(SETUP, "start", folder)
    try:
        slurm.run(sys.executable, "-m", "megaclass", "data", "glyphs", "--out", slurm.data)
        yield slurm
    finally:
        slurm.run(SETUP, "stop", folder)
    assert not slurm.processes(f"SLURM_CONF={folder}/slurm.conf")
    shutil.rmtree(folder)


def _four_free_ports() -> int:
    for first in range(26817 + os.getpid() % 1000, 32000, 4):
        with suppress(OSError):
            for port in range(first, first + 4):
                with socket.socket() as listener:
                    listener.bind(("127.0.0.1", port))
            return first
    raise AssertionError("no four free ports in a row")


@pytest.fixture(scope="module")
def expected(slurm: Slurm) -> list[str]:
    """Losses of the run nobody disturbs, which is the first test."""
    run_dir = slurm.folder / "undisturbed"
    job = slurm.submit(run_dir)
    shown = slurm.wait_for_end(job)
    log = slurm.log(job)
    assert (shown["JobState"], shown["ExitCode"], shown["NodeList"]) == ("COMPLETED", "0:0", "n[1-2]"), (shown, log)
    assert log.count("launch/torchrun.sh: interface lo, address 127.0.0.1") == 2, log  # once on each node
    lines = read_metrics(run_dir)
    assert {(line["attempt"], line["world_size"]) for line in lines} == {(1, 2)}
    assert len(lines) == STEPS
    return [line["loss_hex"] for line in lines]


def losses(run_dir: Path) -> list[str]:
    return [line["loss_hex"] for line in read_metrics(run_dir)]


def test_the_demo_trains_over_both_nodes(slurm: Slurm, expected: list[str]) -> None:
    summary = json.loads((slurm.folder / "undisturbed" / "summary.json").read_text())
    assert (summary["status"], summary["world_size"], summary["step"]) == ("completed", 2, STEPS)


def test_usr1_saves_and_the_requeued_job_ends_as_if_nothing_had_been(slurm: Slurm, expected: list[str]) -> None:
    run_dir = slurm.folder / "signalled"
    job = slurm.submit(run_dir)
    slurm.wait_for_step(job, run_dir, 30)
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    saved = slurm.wait(job, lambda: slurm.job(job)["Restarts"] == "1", "the requeue")
    assert json.loads((run_dir / "summary.json").read_text())["exit_code"] == 75
    # As on a cluster it waits for the credential of its first start to expire: five seconds here, else two minutes.
    back = slurm.wait(job, lambda: slurm.job(job)["JobState"] == "RUNNING", "the second start")
    shown = slurm.wait_for_end(job)
    log = slurm.log(job)
    assert (shown["JobState"], shown["ExitCode"], shown["Restarts"]) == ("COMPLETED", "0:0", "1"), log
    assert f"launch/slurm.sbatch: preempted; requeueing job {job}" in log
    assert "launch/torchrun.sh: exit code 75" in log
    assert {line["attempt"] for line in read_metrics(run_dir)} == {1, 2}
    assert losses(run_dir) == expected
    print(f"from USR1 to the requeue {saved:.1f} s, to the second start {saved + back:.1f} s")


def test_the_time_limit_comes_as_usr1(slurm: Slurm, expected: list[str]) -> None:
    """A run of more than one time limit: it takes as many starts as it needs, and no step is taken twice."""
    times = [line["time"] for line in read_metrics(slurm.folder / "undisturbed")]
    steps = max(STEPS, round(130 * (len(times) - 1) / (times[-1] - times[0])))  # 130 seconds of training
    run_dir = slurm.folder / "limited"
    # Slurm looks every half minute, and signals up to half a minute early: 90 to 120 seconds after the start.
    job = slurm.submit(run_dir, "--time=3", "--signal=B:USR1@60", steps=steps)
    shown = slurm.wait_for_end(job, 800)
    log = slurm.log(job)
    restarts = int(shown["Restarts"])
    assert (shown["JobState"], shown["ExitCode"]) == ("COMPLETED", "0:0"), log
    assert restarts >= 1
    assert log.count(f"launch/slurm.sbatch: preempted; requeueing job {job}") == restarts
    taken = [line["step"] for line in read_lines(run_dir / "metrics.jsonl") if "loss_hex" in line]
    assert taken == list(range(1, steps + 1))


def test_a_cancelled_job_saves_and_does_not_come_back(slurm: Slurm) -> None:
    run_dir = slurm.folder / "cancelled"
    job = slurm.submit(run_dir)
    slurm.wait_for_step(job, run_dir, 10)
    slurm.run("scancel", job)
    shown = slurm.wait_for_end(job)
    time.sleep(8)  # longer than a requeued job waits
    assert (slurm.job(job)["JobState"], shown["Restarts"]) == ("CANCELLED", "0"), slurm.log(job)
    assert "requeueing" not in slurm.log(job)
    assert json.loads((run_dir / "summary.json").read_text())["status"] == "preempted"
    assert not slurm.processes(f"SLURM_JOB_ID={job}")


def test_a_lost_node_costs_no_step(slurm: Slurm, expected: list[str]) -> None:
    """Everything on n2 dies, its daemon too: Slurm takes the job back, and starts it again once there are two nodes."""
    run_dir = slurm.folder / "lost"
    job = slurm.submit(run_dir)
    slurm.wait_for_step(job, run_dir, 30)
    daemon = int((slurm.folder / "slurmd-n2.pid").read_text())
    ranks = slurm.processes(f"SLURM_JOB_ID={job}", "SLURMD_NODENAME=n2")
    assert ranks
    # What watches over a step is the parent of its first process.
    watching = [number for number in map(_parent, ranks) if "slurmstepd" in _command(number)]
    assert watching
    for number in [daemon, *watching, *ranks]:
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    requeued = slurm.wait(job, lambda: slurm.job(job)["Restarts"] == "1", "the requeue")
    slurm.run(SETUP, "node", slurm.folder, "n2")
    back = slurm.wait(job, lambda: slurm.job(job)["JobState"] == "RUNNING", "the second start")
    shown = slurm.wait_for_end(job)
    assert (shown["JobState"], shown["ExitCode"]) == ("COMPLETED", "0:0"), slurm.log(job)
    assert losses(run_dir) == expected
    print(f"from the loss to the requeue {requeued:.1f} s, to the second start {requeued + back:.1f} s")


def _parent(number: int) -> int:
    return int(Path(f"/proc/{number}/stat").read_text().rsplit(")", 1)[1].split()[1])


def _command(number: int) -> str:
    return Path(f"/proc/{number}/cmdline").read_text()
