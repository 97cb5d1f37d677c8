"""Two nodes on one machine: network namespaces with addresses of their own, joined by a virtual cable.

Each has a second network that leads nowhere, and the default route points there, as on a machine whose first network is
the office's. Processes and files are shared, as on a cluster with a common file system.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent.parent
_MARK = "MEGACLASS_TEST_NODE"
_ETC = Path("/etc/netns")
_HOSTS = "10.91.0.1 node1\n10.91.0.2 node2\n"


def why_not() -> str | None:
    """Why there can be no namespaces here; None where there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"mc{os.getpid()}t"
    try:
        done = _ip("netns", "add", name, check=False)
        if done.returncode == 0:
            done = _ip("-n", name, "link", "add", "t0", "type", "veth", "peer", "name", "t1", check=False)
            _ip("netns", "del", name)
    except FileNotFoundError:
        return "the command ip is not installed (Debian: iproute2)"
    return f"network namespaces are not permitted here: {done.stderr.strip()}" if done.returncode else None


@dataclass
class Node:
    """One of the two: its namespace, its number (1 or 2), and the launcher that runs on it."""

    number: int
    namespace: str
    launcher: subprocess.Popen[bytes] | None = None
    logs: list[Path] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"node{self.number}"

    def command(self, *command: str, **environment: str) -> subprocess.Popen[bytes]:
        """Start a command on this node in a session of its own; its output goes to the last of `logs`."""
        unset = ("MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
        kept = {name: value for name, value in os.environ.items() if name not in unset}
        with self.logs[-1].open("wb") as log:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, *command], stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True, cwd=ROOT,
                env=kept | {"OMP_NUM_THREADS": "1", _MARK: self.namespace} | environment,
            )  # fmt: skip

    def processes(self, word: str = "") -> list[int]:
        """Ids of the processes that run on this node and have `word` on their command line."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                is_ours = f"{_MARK}={self.namespace}".encode() in (folder / "environ").read_bytes().split(b"\0")
                is_zombie = (folder / "stat").read_text().rsplit(")", 1)[1].split()[0] in "ZX"
                if is_ours and not is_zombie and word in (folder / "cmdline").read_text().replace("\0", " "):
                    found.append(int(folder.name))
        return sorted(found)

    def workers(self) -> list[int]:
        """Ids of the ranks on this node."""
        return self.processes("python -u -m megaclass train") + self.processes("python3.11 -u -m megaclass train")

    def kill(self, ids: list[int]) -> None:
        for number in ids:
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)

    def fail(self) -> None:
        """What a node that loses its power does: everything on it ends at once."""
        while ids := self.processes():
            self.kill(ids)
        if self.launcher is not None:
            self.launcher.wait(10)

    def log(self) -> str:
        """All output so far."""
        return "".join(path.read_text(errors="replace") for path in self.logs)


@dataclass
class Nodes:
    """Both nodes and a folder both see."""

    folder: Path
    both: tuple[Node, Node]

    def launch(
        self, node: Node, content: dict, *options: str, ranks: int = 1, plain: bool = False, **environment: str
    ) -> None:
        """Start `launch/torchrun.sh`, or torchrun itself, on a node; the first is where ranks meet."""
        run_dir = Path(content["run"]["dir"])
        path = run_dir.parent / f"{run_dir.name}.yaml"
        path.write_text(yaml.safe_dump(content))
        node.logs.append(self.folder / f"{run_dir.name}-node{node.number}-{len(node.logs)}.log")
        arguments = [*options, "--nproc-per-node", str(ranks), "-m", "megaclass", "train", str(path)]
        own = {"MASTER_ADDR": self.both[0].name} | environment
        launcher = ["launch/torchrun.sh"]
        if plain:
            place = f"{'localhost' if node.number == 1 else 'node1'}:29500"
            launcher = [f"{Path(sys.executable).parent}/torchrun", "--rdzv-backend=c10d", f"--rdzv-endpoint={place}"]
            launcher += ["--local-addr", node.name, "--max-restarts", "3"]
        node.launcher = node.command(*launcher, *arguments, **own)

    def launch_both(self, content: dict, *options: str, ranks: int = 1, **environment: str) -> None:
        for node in self.both:
            self.launch(node, content, *(options or ("--nnodes", "2")), ranks=ranks, **environment)

    def codes(self, seconds: float = 150.0) -> list[int]:
        """Exit codes of both launchers, once they have ended."""
        deadline = time.monotonic() + seconds
        for node in self.both:
            assert node.launcher is not None
            try:
                node.launcher.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"node {node.number} did not end\n{self.log()}") from None
        return [node.launcher.returncode for node in self.both if node.launcher is not None]

    def wait_for(self, condition: Callable[[], object], what: str, seconds: float = 120.0) -> float:
        """Seconds until the condition held."""
        start = time.monotonic()
        while not condition():
            assert time.monotonic() < start + seconds, f"{what}: waited in vain\n{self.log()}"
            time.sleep(0.02)
        return time.monotonic() - start

    def log(self) -> str:
        return "\n".join(f"--- node {node.number}\n{node.log()[-6000:]}" for node in self.both)


def two_nodes(folder: Path) -> Iterator[Nodes]:
    """Both nodes for the length of a fixture; afterwards nothing of them is left."""
    both = (Node(1, f"mc{os.getpid()}n1"), Node(2, f"mc{os.getpid()}n2"))
    try:
        for node in both:
            _ip("netns", "add", node.namespace)
            files = _ETC / node.namespace  # `ip netns exec` lays them over those of /etc
            files.mkdir(parents=True)
            (files / "hosts").write_text(f"127.0.0.1 localhost {socket.gethostname()}\n{_HOSTS}")
            (files / "resolv.conf").write_text("")  # nobody is asked: the real server cannot be reached from here
        names = [node.namespace for node in both]
        _ip("link", "add", "fabric0", "netns", names[0], "type", "veth", "peer", "name", "fabric0", "netns", names[1])
        for node in both:
            inside = ("-n", node.namespace)
            _ip(*inside, "link", "set", "lo", "up")
            _ip(*inside, "address", "add", f"10.91.0.{node.number}/24", "dev", "fabric0")
            _ip(*inside, "link", "set", "fabric0", "up")
            _ip(*inside, "link", "add", "office0", "type", "veth", "peer", "name", "office1")
            _ip(*inside, "address", "add", f"10.92.{node.number}.1/24", "dev", "office0")
            for name in ("office0", "office1"):
                _ip(*inside, "link", "set", name, "up")
            _ip(*inside, "route", "add", "default", "via", f"10.92.{node.number}.254")
        yield Nodes(folder, both)
    finally:
        for node in both:
            node.fail()
            _ip("netns", "del", node.namespace, check=False)
            shutil.rmtree(_ETC / node.namespace, ignore_errors=True)


def _ip(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    assert not check or done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"
    return done
