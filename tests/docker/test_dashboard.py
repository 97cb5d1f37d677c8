"""Every expression of the dashboard and every rule, asked of a real Prometheus that watches a real run on two ranks."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import yaml

from megaclass.observe.prometheus import _TABLE as METRICS
from tests.docker.servers import DOCKER, Prometheus, free_ports, prometheus, trainer, wait_until
from tests.support.tiny_dataset import write_tiny_dataset
from tests.support.training import small_config

DASHBOARD = json.loads((DOCKER / "grafana" / "dashboards" / "megaclass.json").read_text())
# What a run without a GPU has no number for.
NEEDS_A_GPU = {"megaclass_gpu_memory_peak_bytes"}


def expressions() -> Iterator[tuple[str, str]]:
    """Title of the panel, and each of its expressions as Grafana would send it with all runs chosen."""
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"].replace("$run", ".+").replace("$__rate_interval", "10s")


def broken_dataset(folder: Path) -> Path:
    """A small data set of which one image cannot be decoded."""
    write_tiny_dataset(folder, num_classes=37, samples_per_class=5, num_shards=3)
    shard = sorted(folder.rglob("*.tar"))[0]
    content = bytearray(shard.read_bytes())
    start = content.index(b"\x89PNG") + 40
    content[start : start + 40] = bytes(40)
    shard.write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Prometheus, int]]:
    """A Prometheus that has seen a run for a while, and the run's first port; the run goes on."""
    folder = tmp_path_factory.mktemp("watched")
    content = small_config(
        broken_dataset(folder / "data"),
        folder / "watched-run",
        dataset={"on_bad_sample": "skip", "bad_sample_budget": 0.5},
        train={"steps": 1_000_000, "checkpoint_every": 20},
    )
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    port = free_ports(3)
    with trainer(folder / "config.yaml", port, folder), prometheus(port + 2, port, folder) as server:
        log = folder / "trainer.log"
        wait_until(lambda: server.query("megaclass_checkpoint_seconds_count > 1"), log)
        wait_until(lambda: server.query("megaclass_samples_skipped_total"), log)
        wait_until(lambda: server.query("run:megaclass_ranks_up:count == 2"), log)
        wait_until(lambda: server.query("run:megaclass_data_wait:ratio1m"), log)
        yield server, port


def test_every_panel_shows_something(watched: tuple[Prometheus, int]) -> None:
    server, _ = watched
    for title, expression in expressions():
        found = server.query(expression)
        if any(name in expression for name in NEEDS_A_GPU):
            assert found == [], f"{title}: no longer an exception"
        else:
            assert found, f"{title}: no data for {expression}"
            assert all(series["value"][1] not in ("NaN", "+Inf") for series in found), (title, found)


def test_the_numbers_are_those_of_the_run(watched: tuple[Prometheus, int]) -> None:
    server, _ = watched
    (ranks,) = server.query("run:megaclass_ranks_up:count")
    assert ranks["metric"]["run"] == "watched-run"
    assert float(ranks["value"][1]) == 2
    samples, steps = (server.query(f"max(megaclass_{name}_total)")[0]["value"][1] for name in ("samples", "steps"))
    assert abs(float(samples) / float(steps) - 18) < 2  # half of 36; the two were asked one after the other
    (alerts,) = [value for title, value in values(server) if title == "Alerts"]
    assert alerts == [0.0]


def values(server: Prometheus) -> Iterator[tuple[str, list[float]]]:
    for title, expression in expressions():
        yield title, [float(series["value"][1]) for series in server.query(expression)]


def test_every_rule_is_computed(watched: tuple[Prometheus, int]) -> None:
    server, _ = watched
    rules = [rule for group in server.get("rules")["groups"] for rule in group["rules"]]
    assert len(rules) == len(re.findall(r"^ +- (?:record|alert):", (DOCKER / "rules.yml").read_text(), re.MULTILINE))
    for rule in rules:
        assert rule["health"] == "ok", rule
        if rule["type"] == "recording":
            assert server.query(rule["name"]), rule["name"]
        elif rule["name"] not in ("MegaclassSamplesSkipped", "MegaclassWaitsForData"):  # this run has a broken image
            assert rule["state"] == "inactive", rule


def test_every_metric_is_on_the_dashboard() -> None:
    shown = " ".join(
        [expression for _, expression in expressions()]
        + re.findall(r"expr: (?:>-\n +)?(.+)", (DOCKER / "rules.yml").read_text())
    )
    assert {name for name in METRICS if name not in shown} == set()


def test_both_jobs_are_scraped(watched: tuple[Prometheus, int]) -> None:
    server, _ = watched
    health: dict[str, list[Any]] = {}
    for target in server.get("targets")["activeTargets"]:
        health.setdefault(target["labels"]["job"], []).append(target["health"])
    assert health == {"megaclass": ["up", "up"], "prometheus": ["up"]}


def test_promtool_has_nothing_to_say_about_the_metrics_of_a_run(watched: tuple[Prometheus, int]) -> None:
    _, port = watched
    for rank in (0, 1):
        with urlopen(f"http://127.0.0.1:{port + rank}/metrics", timeout=10) as answer:
            scraped = answer.read()
        check = subprocess.run(["promtool", "check", "metrics"], input=scraped, capture_output=True)
        assert (check.returncode, check.stdout + check.stderr) == (0, b"")
