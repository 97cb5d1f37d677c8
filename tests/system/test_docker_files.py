"""The container files: linted, and consistent with the project and with each other."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megaclass.config import option_table

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "docker" / "Dockerfile"


def instructions() -> list[str]:
    """The Dockerfile's instructions, each on one line."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE)
    return [line for line in re.sub(r"\\\n\s*", "", text).splitlines() if line]


def stage(name: str) -> list[str]:
    lines = instructions()
    start = next(index for index, line in enumerate(lines) if line.startswith("FROM ") and line.endswith(f"AS {name}"))
    length = next((i for i, line in enumerate(lines[start + 1 :]) if line.startswith("FROM ")), len(lines))
    return lines[start : start + 1 + length]


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, DOCKERFILE], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_base_images_have_tags_and_no_unverified_digest() -> None:
    bases = [line for line in instructions() if line.startswith("ARG ") and "_BASE=" in line]
    assert len(bases) == 2
    assert all(re.fullmatch(r"ARG \w+=[\w./-]+:[\w.-]+", base) for base in bases)


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_targets_run_as_a_user_and_say_how_they_are(target: str) -> None:
    lines = stage(target)
    assert [line for line in lines if line.startswith("USER ")] == ["USER 10001:10001"]
    assert any(line.startswith("HEALTHCHECK ") for line in lines)
    assert not any("pip install" in line for line in lines)
    assert lines[-1].startswith("CMD [")


@pytest.mark.parametrize("target", ["cpu-build", "gpu-build"])
def test_torch_is_installed_first_alone_and_constrained(target: str) -> None:
    installs = [line for line in stage(target) if "pip install" in line]
    assert installs == [f"RUN pip install --constraint constraints.txt {what}" for what in ("torch", ".")]


def test_both_targets_differ_only_where_they_must() -> None:
    for left, right in zip(stage("cpu-build")[1:], stage("gpu-build")[1:], strict=True):
        assert left == right
    for left, right in zip(stage("cpu")[1:], stage("gpu")[1:], strict=True):
        assert left == right or left.startswith("ENV ") or "cpu-build" in left


def test_what_is_copied_exists_and_is_sent() -> None:
    sent = {line[1:] for line in (DOCKERFILE.parent / "Dockerfile.dockerignore").read_text().splitlines()}
    for line in instructions():
        if line.startswith("COPY ") and "--from" not in line:
            for source in line.split()[1:-1]:
                assert (ROOT / source).exists()
                assert source in sent


def test_compose_agrees_with_dockerfile_options_and_prometheus() -> None:
    compose = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
    options = {name.replace("_", "-") for name, _, _ in option_table()}
    for name, target in (("trainer", "cpu"), ("trainer-gpu", "gpu")):
        service = compose["services"][name]
        assert service["build"]["target"] == target
        assert stage(target)
        assert service["shm_size"]
        assert service["restart"]
        command = service["command"]
        assert (ROOT / command[0]).exists()
        given = [word[2:] for word in command if word.startswith("--") and "." in word]
        assert given
        assert set(given) <= options
        port, ranks = int(command[command.index("--observe.metrics-port") + 1]), int(command[2])
        scraped = yaml.safe_load((ROOT / "docker" / "prometheus.yml").read_text())["scrape_configs"][0]
        found = [entry["port"] for entry in scraped["dns_sd_configs"] if name in entry["names"]]
        assert found == [port + rank for rank in range(ranks)]
        assert f"127.0.0.1:{port}/metrics" in DOCKERFILE.read_text()


def test_promtool_accepts_the_prometheus_file() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed")
    command = [promtool, "check", "config", ROOT / "docker" / "prometheus.yml"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
