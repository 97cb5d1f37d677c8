"""The launch scripts: what they resolve to, the exit code they give, and what they leave behind."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
TORCHRUN = LAUNCH / "torchrun.sh"

# Stands in for the trainer: says that it runs, then records the code it was given, waits for a signal, or crashes.
WORKER = """
import json, os, signal, sys, time

folder, what = sys.argv[1:]
rank, restarts = os.environ["RANK"], int(os.environ["TORCHELASTIC_RESTART_COUNT"])

def leave(code):
    with open(os.environ["MEGACLASS_OUTCOME_DIR"] + f"/rank-{rank}.json", "w") as file:
        json.dump({"code": code, "reason": 'say "code": 3', "rank": int(rank), "step": 7}, file, indent=1)
    sys.exit(0)

signals = []
for name in ("SIGTERM", "SIGUSR1"):
    signal.signal(getattr(signal, name), lambda number, _: signals.append(signal.Signals(number).name))
open(f"{folder}/pid-{rank}-{restarts}", "w").write(str(os.getpid()))
while what == "wait" and not signals:
    time.sleep(0.02)
if what == "wait":
    open(f"{folder}/signal-{rank}", "w").write(signals[0])
    leave(75)
if what == "crash once" and rank == "1" and restarts == 0:
    os.kill(os.getpid(), signal.SIGKILL)
if what == "crash" and rank == "1":
    sys.exit(1)
leave(0)
"""


def environment(**more: str) -> dict[str, str]:
    set_here = ("OMP_NUM_THREADS", "MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    kept = {key: value for key, value in os.environ.items() if key not in set_here}
    return kept | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"} | more


def bash(*command: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", *map(str, command)], capture_output=True, text=True, timeout=60, env=environment(**more)
    )


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def wait_until(condition: object, seconds: float = 60.0) -> None:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@pytest.fixture
def started(tmp_path: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Launchers started by a test; whatever is still there afterwards is killed."""
    launchers: list[subprocess.Popen[str]] = []
    yield launchers
    for launcher in launchers:
        if launcher.poll() is None:
            launcher.kill()
        launcher.communicate()
    for path in tmp_path.rglob("pid-*"):
        if is_running(int(path.read_text())):
            os.kill(int(path.read_text()), signal.SIGKILL)


def command_line(folder: Path, what: str, *options: str) -> list[str]:
    (folder / "worker.py").write_text(WORKER)
    return [str(TORCHRUN), *options, "--nproc-per-node", "2", str(folder / "worker.py"), str(folder), what]


def start(started: list[subprocess.Popen[str]], folder: Path, what: str) -> tuple[subprocess.Popen[str], Path]:
    """A launcher of two ranks, and the folder they write to."""
    folder.mkdir()
    pipe = subprocess.PIPE
    own = environment(TMPDIR=str(folder))  # a launcher that is killed cannot tidy up
    launcher = subprocess.Popen(command_line(folder, what), stdout=pipe, stderr=pipe, text=True, env=own)
    started.append(launcher)
    return launcher, folder


def ranks_of(folder: Path) -> list[int]:
    """The process ids of both ranks, as soon as they run."""
    paths = [folder / f"pid-{rank}-0" for rank in (0, 1)]
    wait_until(lambda: all(path.exists() and path.read_text() for path in paths))
    return [int(path.read_text()) for path in paths]


@pytest.mark.parametrize("name", ["torchrun.sh", "supervise.sh", "docker.sh", "slurm.sbatch"])
def test_scripts_are_short_strict_and_parse(name: str) -> None:
    script = LAUNCH / name
    assert bash("-n", script).returncode == 0
    text = script.read_text()
    assert len(text.splitlines()) < 60
    assert "\nset -euo pipefail\n" in text
    assert os.access(script, os.X_OK) == name.endswith(".sh")


# Which recorded codes and which code of torchrun's make which exit code, with a torchrun that only pretends.
@pytest.mark.parametrize(
    ("recorded", "torchrun_code", "expected"),
    [
        ("", 0, 0),
        ("0:0 1:0", 0, 0),
        ("", 1, 6),
        ("", 137, 6),
        ("0:0 1:0", 1, 6),
        ("0:6 1:6", 1, 6),
        ("0:6 1:6", 0, 6),
        ("", 2, 2),
        ("0:75 1:75", 0, 75),
        ("0:75 1:75", 1, 75),
        ("0:75 1:3", 0, 3),
        ("2:4 10:3", 0, 4),
        ("0:0 1:5", 1, 5),
        ("0:23 1:175", 0, 0),
    ],
)
def test_the_exit_code(tmp_path: Path, recorded: str, torchrun_code: int, expected: int) -> None:
    (tmp_path / "launch").mkdir()
    for name in ("torchrun.sh", "supervise.sh"):
        shutil.copy(LAUNCH / name, tmp_path / "launch")
    fake = tmp_path / "torchrun"
    fake.write_text(
        "#!/bin/bash\nfor record in $RECORDED; do\n"
        'echo "{\\"reason\\": \\"\\\\\\"code\\\\\\": 4\\", \\"code\\": ${record#*:}, \\"step\\": 3}"'
        ' > "$MEGACLASS_OUTCOME_DIR/rank-${record%:*}.json"\ndone\nexit "$CODE"\n'
    )
    fake.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    temporary = tmp_path / "with a space"
    temporary.mkdir()
    more = {"PATH": path, "RECORDED": recorded, "CODE": str(torchrun_code), "TMPDIR": str(temporary)}
    done = bash(tmp_path / "launch" / "torchrun.sh", "x.py", **more)
    assert done.returncode == expected, done.stderr
    assert done.stderr == (f"launch/torchrun.sh: exit code {expected}\n" if expected else "")
    assert not list(temporary.iterdir())


FIXED = ["--max-restarts", "1000", "--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]


def resolved(*arguments: str, **more: str) -> tuple[dict[str, str], list[str]]:
    """What a dry run shows: the environment that is set, and the arguments torchrun gets."""
    done = bash(TORCHRUN, "--dry-run", *arguments, **more)
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout)
    place = next(i for i, word in enumerate(words) if word.endswith("/torchrun"))
    return dict(word.split("=", 1) for word in words[:place]), words[place + 1 :]


@pytest.mark.parametrize(
    "arguments",
    ["-m megaclass train --dry-run --master.x 3", "x.py --nnodes 2", "--nnodes 1 x.py", "--nnodes=1:1 x_1.py"],
)
def test_one_node_needs_no_network(arguments: str) -> None:
    environment, given = resolved(*shlex.split(arguments), MASTER_ADDR="nowhere.invalid")
    assert environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert environment["GLOO_SOCKET_IFNAME"] == "lo"
    assert "NCCL_SOCKET_IFNAME" not in environment
    assert given == [*FIXED, "--standalone", "--local-addr", "localhost", *shlex.split(arguments)]


# Another address of loopback stands for another machine: torchrun would not take it for its own.
@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        ("--rdzv-endpoint 127.0.0.3:1 --nnodes 2 x.py --rdzv-id q", "--rdzv-endpoint localhost:1"),
        ("--rdzv_endpoint=127.0.0.3:1 --nnodes=1:4 x.py", "--rdzv_endpoint=localhost:1"),
        ("--nnodes 2 --rdzv-endpoint 127.0.0.3 x.py", "--rdzv-endpoint localhost"),
        ("--master-addr 127.0.0.3 --master-port 1 x.py", "--master-addr 127.0.0.3"),
    ],
)
def test_many_nodes(arguments: str, kept: str) -> None:
    environment, given = resolved(*shlex.split(arguments))
    assert (environment["GLOO_SOCKET_IFNAME"], environment["NCCL_SOCKET_IFNAME"]) == ("lo", "=lo")
    before = [*FIXED, "--rdzv-backend", "c10d", "--local-addr", "127.0.0.1"]
    assert given[: len(before)] == before
    assert kept in " ".join(given[len(before) :])
    assert given[-1] == shlex.split(arguments)[-1]


def test_the_first_node_from_the_environment() -> None:
    _, given = resolved("--nnodes", "1:4", "x.py", MASTER_ADDR="127.0.0.1", MASTER_PORT="7")
    assert given[-5:] == ["--rdzv-endpoint", "localhost:7", "--nnodes", "1:4", "x.py"]
    _, given = resolved("--nnodes", "2", "--rdzv-endpoint", "127.0.0.1:3", "x.py", MASTER_ADDR="nowhere.invalid")
    assert given[-5:] == ["--nnodes", "2", "--rdzv-endpoint", "localhost:3", "x.py"]


def test_the_interface_is_what_the_user_says() -> None:
    own = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "ib0,ib1"}
    environment, _ = resolved("--nnodes", "2", "--rdzv-endpoint", "127.0.0.3:1", "x.py", **own)
    assert {name: environment[name] for name in own} == own


@pytest.mark.parametrize(
    ("arguments", "more", "message"),
    [
        ("--nnodes 2", {}, "--nnodes 2 needs the first node: set MASTER_ADDR, or give --rdzv-endpoint"),
        ("--nnodes 2", {"MASTER_ADDR": "nowhere.invalid"}, "'nowhere.invalid' does not resolve on "),
        ("--rdzv-endpoint 127.0.0.3:1", {"GLOO_SOCKET_IFNAME": "lo9"}, "lo9 is not an interface of this machine"),
    ],
)
def test_networks_that_are_not_there(arguments: str, more: dict[str, str], message: str) -> None:
    done = bash(TORCHRUN, *arguments.split(), "x.py", **more)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("launch/torchrun.sh: ")
    assert message in done.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing() -> None:
    scripts = [*LAUNCH.iterdir(), *Path(__file__).parent.rglob("*.sh")]
    done = subprocess.run(["shellcheck", "--shell=bash", *map(str, scripts)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_threads_are_the_cores_of_a_rank_unless_the_user_says_otherwise() -> None:
    cores = len(os.sched_getaffinity(0))
    for option in ("--nproc-per-node 1", "--nproc_per_node=1", ""):
        assert resolved(*option.split(), "x.py")[0]["OMP_NUM_THREADS"] == str(cores)
    assert resolved("--nproc-per-node", "9999", "x.py")[0]["OMP_NUM_THREADS"] == "1"
    assert resolved("x.py", OMP_NUM_THREADS="7")[0]["OMP_NUM_THREADS"] == "7"


@pytest.mark.distributed
@pytest.mark.parametrize(("what", "options", "expected"), [("crash once", [], 0), ("crash", ["--max-restarts=0"], 6)])
def test_a_dead_rank_is_restarted_or_ends_the_run(tmp_path: Path, what: str, options: list[str], expected: int) -> None:
    done = bash(*command_line(tmp_path, what, *options))
    assert done.returncode == expected, done.stderr
    assert (tmp_path / "pid-1-1").exists() == (what == "crash once")


@pytest.mark.distributed
def test_a_signal_reaches_the_ranks_and_their_code_comes_back(
    tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    names = ("SIGTERM", "SIGUSR1")
    launched = [start(started, tmp_path / name, "wait") for name in names]  # both at once, to save time
    for name, (launcher, folder) in zip(names, launched, strict=True):
        ranks = ranks_of(folder)
        launcher.send_signal(getattr(signal, name))
        assert launcher.wait(60) == 75
        assert [(folder / f"signal-{rank}").read_text() for rank in (0, 1)] == [name, name]
        assert not any(map(is_running, ranks))


@pytest.mark.distributed
def test_no_rank_outlives_torchrun_or_the_launcher(tmp_path: Path, started: list[subprocess.Popen[str]]) -> None:
    launcher, folder = start(started, tmp_path / "torchrun", "wait")
    other, other_folder = start(started, tmp_path / "launcher", "wait")
    ranks, other_ranks = ranks_of(folder), ranks_of(other_folder)
    agent = int(Path(f"/proc/{ranks[0]}/stat").read_text().rsplit(")", 1)[1].split()[1])
    os.kill(agent, signal.SIGKILL)
    other.kill()
    assert launcher.wait(60) == 75  # the ranks were told in time to save
    assert not any(map(is_running, ranks))
    wait_until(lambda: not any(map(is_running, other_ranks)), seconds=30)
    assert (other_folder / "signal-0").read_text() == "SIGTERM"


def test_the_srun_line() -> None:
    job = {"SLURM_JOB_ID": "77", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "h200:8", "SLURM_CPUS_ON_NODE": "64"}
    done = bash(LAUNCH / "slurm.sbatch", "--dry-run", "c.yaml", "--a.b", "x y", MASTER_ADDR="10.0.0.1", **job)
    words = shlex.split(done.stdout)
    assert words[:6] == ["srun", "--nodes", "2", "--ntasks-per-node", "1", "--cpus-per-task"]
    assert words[words.index("launch/torchrun.sh") :] == [
        *("launch/torchrun.sh", "--nnodes", "2", "--nproc-per-node", "8", "--rdzv-backend", "c10d"),
        *("--rdzv-endpoint", "10.0.0.1:20077", "--rdzv-id", "77-0", "-m", "megaclass", "train", "c.yaml"),
        *("--a.b", "x y"),
    ]
    nothing = bash(LAUNCH / "slurm.sbatch", "--dry-run")
    assert nothing.returncode == 2
    assert nothing.stderr == "launch/slurm.sbatch: give a configuration, for example configs/demo.yaml\n"


@pytest.mark.parametrize(
    ("code", "is_signalled", "state", "is_requeued"),
    [
        (0, False, "RUNNING", False),
        (3, True, "RUNNING", False),
        (6, False, "RUNNING", False),
        (6, True, "RUNNING", True),
        (138, True, "RUNNING", True),
        (75, False, "RUNNING", True),
        (75, True, "RUNNING", True),
        (75, True, "SIGNALING", True),
        (75, True, "COMPLETING", False),
    ],
)
def test_a_preempted_job_is_requeued(
    tmp_path: Path, code: int, is_signalled: bool, state: str, is_requeued: bool
) -> None:
    """With commands of Slurm's that only pretend; srun waits for the signal that is passed on to it."""
    wait = f"trap 'touch {tmp_path}/got-usr1; exit {code}' USR1\nkill -USR1 $PPID\nwhile :; do sleep 0.05; done"
    commands = {
        "srun": wait if is_signalled else f"exit {code}",
        "squeue": f"echo {state}",
        "scontrol": f'if [[ $1 == show ]]; then echo n1; echo n2; else echo "$@" > {tmp_path}/requeued; fi',
    }
    for name, text in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    more = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "n[1-2]"}
    done = bash(LAUNCH / "slurm.sbatch", "c.yaml", **more)
    assert done.returncode == code, done.stderr
    assert (tmp_path / "got-usr1").exists() == is_signalled
    requeued = tmp_path / "requeued"
    assert (requeued.read_text() if requeued.exists() else "") == ("requeue 77\n" if is_requeued else "")


def test_a_signal_before_the_step_has_begun_is_passed_on_to_it(tmp_path: Path) -> None:
    """It comes while the nodes are listed; the step that is started after it gets it and ends."""
    commands = {
        "srun": f"trap 'touch {tmp_path}/got-usr1; exit 75' USR1\nwhile :; do sleep 0.05; done",
        "squeue": "echo CANCELLED",
        "scontrol": "kill -USR1 $PPID\necho n1",
    }
    for name, text in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    more = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "n1"}
    script = LAUNCH / "slurm.sbatch"
    done = bash(script, "c.yaml", **more)
    # A step that has not set its own handler yet ends by the signal itself.
    assert done.returncode in (75, 128 + signal.SIGUSR1), done.stderr
    assert (tmp_path / "got-usr1").exists() == (done.returncode == 75)


# Stands in for docker: writes down the words it was called with.
FAKE_DOCKER = '#!/bin/bash\nprintf "%s\\0" "$@" > "$CALLED"\nexit 9\n'


def run_docker(tmp_path: Path, *arguments: str, **more: str) -> list[str]:
    """What `docker` is called with by launch/docker.sh; the host has no GPU, and a home of its own."""
    fake = tmp_path / "docker"
    fake.write_text(FAKE_DOCKER)
    fake.chmod(0o755)
    called = tmp_path / "called"
    own = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLED": str(called), "HOME": str(tmp_path / "home")}
    folders = ["--data", str(tmp_path / "a b"), "--runs", str(tmp_path / "r")]
    done = bash(LAUNCH / "docker.sh", *folders, *arguments, **{"XDG_CACHE_HOME": "", **own, **more})
    assert done.returncode == 9, done.stderr  # docker's own
    return called.read_text().split("\0")[:-1]


def values_of(words: list[str], option: str) -> list[str]:
    return [words[place + 1] for place, word in enumerate(words) if word == option]


def test_the_docker_line(tmp_path: Path) -> None:
    command = ["megaclass", "train", "a 'b' c", "--observe.metrics-port", "9500"]
    words = run_docker(tmp_path, "--image", "mine", "--shm", "2g", "--", *command)
    assert words[0] == "run"
    assert words[-6:] == ["mine", *command]
    assert values_of(words, "--volume") == [
        f"{tmp_path}/a b:/workspace/data",
        f"{tmp_path}/r:/workspace/runs",
        f"{tmp_path}/home/.cache/megaclass:/cache",
    ]
    assert all((tmp_path / name).is_dir() for name in ("a b", "r", "home/.cache/megaclass"))
    assert values_of(words, "--shm-size") == ["2g"]
    assert values_of(words, "--ulimit") == ["memlock=-1", "stack=67108864"]
    assert values_of(words, "--network") == ["host"]
    assert values_of(words, "--user") == [f"{os.getuid()}:{os.getgid()}"]
    assert values_of(words, "--security-opt") == ["no-new-privileges"]
    assert values_of(words, "--stop-timeout") == ["240"]
    assert {"--init", "--rm"} <= set(words)
    assert {"--no-healthcheck", "--gpus", "--tty", "--device", "--privileged"}.isdisjoint(words)
    assert "--no-healthcheck" in run_docker(tmp_path, "megaclass", "--help")


def test_the_docker_line_says_what_dry_run_says(tmp_path: Path) -> None:
    more = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLED": str(tmp_path / "called"), "HOME": str(tmp_path)}
    where = ["--data", str(tmp_path / "d"), "--runs", str(tmp_path / "r"), "--cache", str(tmp_path / "c")]
    shown = bash(LAUNCH / "docker.sh", "--dry-run", *where, "megaclass", "a b", **more)
    assert shown.returncode == 0
    assert not any((tmp_path / name).exists() for name in "drc")
    assert shlex.split(shown.stdout) == ["docker", *run_docker(tmp_path, *where, "megaclass", "a b")]


def test_docker_gives_gpus_and_infiniband_where_the_host_has_them(tmp_path: Path) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/bash\necho 'GPU 0: one'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    (tmp_path / "infiniband").mkdir()
    words = run_docker(tmp_path, "x", INFINIBAND=str(tmp_path / "infiniband"))
    assert words[-2:] == ["megaclass:gpu", "x"]
    assert values_of(words, "--gpus") == ["all"]
    assert values_of(words, "--device") == [str(tmp_path / "infiniband")]
    assert values_of(words, "--cap-add") == ["IPC_LOCK"]
    (tmp_path / "nvidia-smi").write_text("#!/bin/bash\nexit 9\n")  # a driver without a device
    without = run_docker(tmp_path, "x", INFINIBAND=str(tmp_path / "none"))
    assert without[-2:] == ["megaclass:cpu", "x"]
    assert {"--gpus", "--device"}.isdisjoint(without)


def test_docker_sets_the_flight_recorder_and_passes_variables_of_the_host(tmp_path: Path) -> None:
    own = {"NCCL_SOCKET_IFNAME": "ib0", "NCCL_IB_HCA": "a b", "TORCH_FR_BUFFER_SIZE": "50", "MASTERY": "1"}
    given = values_of(run_docker(tmp_path, "x", **own), "--env")
    assert {"NCCL_SOCKET_IFNAME=ib0", "NCCL_IB_HCA=a b", "TORCH_NCCL_DUMP_ON_TIMEOUT=1"} <= set(given)
    assert [line for line in given if line.startswith("TORCH_FR_BUFFER_SIZE=")] == ["TORCH_FR_BUFFER_SIZE=50"]
    assert not any(line.startswith(("MASTERY", "PATH")) for line in given)
    assert "TORCH_FR_BUFFER_SIZE=2000" in values_of(run_docker(tmp_path, "x"), "--env")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "give a command, for example: megaclass --help"),
        ("--gpus 2 x", "unknown option --gpus; allowed are --dry-run, --image, --data, --runs, --cache and --shm"),
        ("--image", "--image has no value; give it as --image VALUE"),
    ],
)
def test_docker_options_that_are_wrong(arguments: str, message: str) -> None:
    done = bash(LAUNCH / "docker.sh", *arguments.split())
    assert (done.returncode, done.stderr) == (2, f"launch/docker.sh: {message}\n")
