"""The container files: linted, and consistent with the project and each other. `tests/docker` reads and runs them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from megaclass.config import option_table
from megaclass.observe.prometheus import _TABLE as METRICS

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


def test_base_images_are_pinned_by_digest_in_one_place() -> None:
    bases = [line for line in instructions() if line.startswith("ARG ") and "_BASE=" in line]
    assert len(bases) == 2
    assert all(re.fullmatch(r"ARG \w+=[\w./-]+:[\w.-]+@sha256:[0-9a-f]{64}", base) for base in bases)
    stages = {line.split()[-1] for line in instructions() if line.startswith("FROM ")}
    sources = [line.split()[1] for line in instructions() if line.startswith("FROM ")]
    assert {source for source in sources if source not in stages} == {"${CPU_BASE}", "${GPU_BASE}"}


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_targets_run_as_a_user_and_say_how_they_are(target: str) -> None:
    lines = stage(target)
    assert [line for line in lines if line.startswith("USER ")] == ["USER 10001:10001"]
    assert any(line.startswith("HEALTHCHECK ") for line in lines)
    assert not any("apt-get" in line for line in lines)
    assert lines[-1].startswith("CMD [")


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_torch_is_installed_first_alone_and_constrained(target: str) -> None:
    installs = [line.split("pip install --no-cache-dir ")[1] for line in stage(target) if "pip install" in line]
    constrained = "--constraint /opt/megaclass/constraints.txt "
    assert installs == [
        f"{constrained}torch",
        f"{constrained}--requirement /build/requirements.txt",
        "--no-deps --no-index /build/*.whl",
    ]


def test_both_targets_differ_only_in_two_variables() -> None:
    for left, right in zip(stage("cpu")[1:], stage("gpu")[1:], strict=True):
        more = " NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility"
        assert left == right or (left.startswith("ENV ") and left + more == right)


def test_requirements_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    command = [sys.executable, ROOT / "docker" / "requirements.py", ROOT / "pyproject.toml"]
    plain = subprocess.run([*command, ""], capture_output=True, text=True, check=True).stdout.splitlines()
    assert plain == project["dependencies"]
    more = subprocess.run([*command, "s3,dali"], capture_output=True, text=True, check=True).stdout.splitlines()
    assert more == [*plain, *project["optional-dependencies"]["s3"], *project["optional-dependencies"]["dali"]]
    wrong = subprocess.run([*command, "s3,cuda"], capture_output=True, text=True)
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("EXTRAS cuda unknown; allowed are ")


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


def images_of(compose: dict[str, Any]) -> list[str]:
    return [service["image"] for service in compose["services"].values() if "build" not in service]


def test_compose_opens_nothing_and_holds_no_secret() -> None:
    text = (ROOT / "docker" / "compose.yaml").read_text()
    compose = yaml.safe_load(text)
    assert all(re.fullmatch(r"[\w./-]+:[\w.-]+@sha256:[0-9a-f]{64}", image) for image in images_of(compose))
    for service in compose["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert not service.get("privileged")
    assert not re.search("password|secret|token", re.sub("#.*", "", text), re.IGNORECASE)
    grafana = compose["services"]["grafana"]["environment"]
    assert grafana["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"
    assert grafana["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] == "true"
    for service in compose["services"].values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert (
                source in compose["volumes"] or source in ("../data", "../runs") or (ROOT / "docker" / source).exists()
            )


def test_grafana_finds_its_source_and_its_dashboard() -> None:
    grafana = ROOT / "docker" / "grafana"
    compose = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]
    (source,) = yaml.safe_load((grafana / "provisioning" / "datasources" / "prometheus.yaml").read_text())[
        "datasources"
    ]
    host, port = re.fullmatch(r"http://(\w+):(\d+)", source["url"]).groups()  # type: ignore[union-attr]
    assert host in compose
    assert compose[host]["ports"] == [f"127.0.0.1:9090:{port}"]
    (provider,) = yaml.safe_load((grafana / "provisioning" / "dashboards" / "megaclass.yaml").read_text())["providers"]
    mounted = dict(volume.split(":")[:2] for volume in compose["grafana"]["volumes"])
    assert mounted["./grafana/dashboards"] == provider["options"]["path"]
    assert compose["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"].startswith(
        provider["options"]["path"]
    )
    dashboard = json.loads((grafana / "dashboards" / "megaclass.json").read_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    for thing in (*panels, *dashboard["templating"]["list"], *(t for panel in panels for t in panel["targets"])):
        assert thing["datasource"] == {"type": "prometheus", "uid": source["uid"]}
    places = [panel["gridPos"] for panel in panels]
    cells = [(x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])]
    assert len(set(cells)) == len(cells)  # no panel lies on another
    assert max(x for x, _ in cells) < 24


def test_dashboard_and_rules_ask_for_what_there_is() -> None:
    rules = yaml.safe_load((ROOT / "docker" / "rules.yml").read_text())["groups"]
    recorded = {rule["record"] for group in rules for rule in group["rules"] if "record" in rule}
    dashboard = json.loads((ROOT / "docker" / "grafana" / "dashboards" / "megaclass.json").read_text())
    asked = [rule["expr"] for group in rules for rule in group["rules"]]
    asked += [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked.append(dashboard["templating"]["list"][0]["query"]["query"])
    exported = {name + end for name in METRICS for end in ("", "_sum", "_count", "_bucket")}
    names = set(re.findall(r"\b(?:run:)?megaclass_\w+(?::\w+)?", " ".join(asked)))
    assert names <= exported | recorded
    assert recorded <= names
