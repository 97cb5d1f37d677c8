"""Prometheus and a trainer as real processes on loopback, both ended by their own process ids."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import yaml

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"


def free_ports(number: int) -> int:
    """The first of some neighbouring ports of which none is taken."""
    for first in range(23000, 31000, number):
        try:
            for port in range(first, first + number):
                with socket.socket() as found:
                    found.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise AssertionError("no free ports")


@contextmanager
def running(command: list[str | Path], log: Path, **more: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a group of its own for the length of a `with` block."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=file, start_new_session=True, env={**os.environ, **more}
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(60)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()


@contextmanager
def trainer(config: Path, port: int, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Two ranks that train as `config` says, with metrics on `port` and the one after it."""
    command = [ROOT / "launch" / "torchrun.sh", "--max-restarts", "0", "--nproc-per-node", "2", "-m", "megaclass"]
    more = ["train", config, "--observe.metrics-port", str(port)]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with running([*command, *more], folder / "trainer.log", PATH=path, PYTHONPATH=str(ROOT)) as process:
        yield process


class Prometheus:
    """What a running Prometheus answers.

    Args:
        port: where it listens.
    """

    def __init__(self, port: int) -> None:
        self._address = f"http://127.0.0.1:{port}"

    def get(self, path: str, **parameters: str) -> Any:
        """The data of one call of its API."""
        with urlopen(f"{self._address}/api/v1/{path}?{urlencode(parameters)}", timeout=10) as answer:
            return json.loads(answer.read())["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series an expression gives now."""
        return list(self.get("query", query=expression)["result"])


@contextmanager
def prometheus(port: int, first_rank: int, folder: Path) -> Iterator[Prometheus]:
    """Prometheus with the project's files; only the targets and the pace are changed, as tests are short."""
    content = yaml.safe_load((DOCKER / "prometheus.yml").read_text())
    content["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    for job in content["scrape_configs"]:
        if job["job_name"] == "megaclass":
            found = job.pop("dns_sd_configs")
            targets = [f"127.0.0.1:{first_rank + entry['port'] - found[0]['port']}" for entry in found]
        else:
            targets = [f"127.0.0.1:{port}"]
        job["static_configs"] = [{"targets": targets}]
    shutil.copy(DOCKER / "rules.yml", folder)
    (folder / "prometheus.yml").write_text(yaml.safe_dump(content))
    command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/series"]
    with running([*command, f"--web.listen-address=127.0.0.1:{port}"], folder / "prometheus.log"):
        server = Prometheus(port)
        wait_until(lambda: server.get("targets"), folder / "prometheus.log")
        yield server


def wait_until(condition: Any, log: Path, seconds: float = 120.0) -> None:
    """Ask until the answer is not empty; an answer that does not come counts as empty."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if condition():
                return
        except OSError:
            pass
        assert time.monotonic() < deadline, f"waited in vain; {log.name} ends with\n{log.read_text()[-3000:]}"
        time.sleep(0.5)
