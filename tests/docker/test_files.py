"""The container files as the tools that will read them see them: compose and promtool."""

from __future__ import annotations

import subprocess
from pathlib import Path

import yaml

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
DOCKER = ROOT / "docker"


def succeed(*command: str | Path, **more: str) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, **more)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout)


def test_compose_accepts_its_files() -> None:
    succeed("docker-compose", "--file", DOCKER / "compose.yaml", "config", "--quiet")
    both = ["docker-compose", "--file", DOCKER / "compose.yaml", "--file", DOCKER / "compose.infiniband.yaml"]
    services = yaml.safe_load(succeed(*both, "--profile", "gpu", "config"))["services"]
    assert set(services) == {"trainer", "trainer-gpu", "prometheus", "grafana"}
    published = [port for service in services.values() for port in service.get("ports", [])]
    assert sorted(published) == ["127.0.0.1:3000:3000/tcp", "127.0.0.1:9090:9090/tcp"]
    gpu = services["trainer-gpu"]
    assert gpu["devices"] == ["/dev/infiniband:/dev/infiniband"]
    assert gpu["ulimits"] == {"memlock": -1}
    assert gpu["build"]["target"] == "gpu"
    assert gpu["environment"] == services["trainer"]["environment"]


def test_promtool_accepts_the_configuration_and_the_rules() -> None:
    succeed("promtool", "check", "config", DOCKER / "prometheus.yml")
    succeed("promtool", "check", "rules", "--lint=all", "--lint-fatal", DOCKER / "rules.yml")


def test_the_rules_make_of_series_what_they_should(tmp_path: Path) -> None:
    cases = tmp_path / "rules_test.yml"
    text = (HERE / "rules_test.yml").read_text()
    assert text.count("[RULES]") == 1
    cases.write_text(text.replace("[RULES]", f"[{DOCKER / 'rules.yml'}]"))
    succeed("promtool", "test", "rules", cases)
    tested = {case["alertname"] for test in yaml.safe_load(text)["tests"] for case in test.get("alert_rule_test", [])}
    rules = [rule for group in yaml.safe_load((DOCKER / "rules.yml").read_text())["groups"] for rule in group["rules"]]
    assert tested == {rule["alert"] for rule in rules if "alert" in rule}
    assert all(f'expr: "{rule["record"]}"' in text for rule in rules if "record" in rule)
