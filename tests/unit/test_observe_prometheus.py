from __future__ import annotations

import math
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import fields, replace
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families

from megaclass.classifier import Monitors
from megaclass.observe.metrics import Snapshot
from megaclass.observe.prometheus import Exporter

MONITORS = {
    "negative_cosine_mean": -0.0625,
    "negative_cosine_max": 0.5,
    "end_point": 0.75,
    "past_end_point": 0.125,
    "rows_touched": 11.0,
}
SNAPSHOT = Snapshot(3.0, 1.0, 2.0, 0.25, 1.5, MONITORS, 35, 70.0, 0.5, 0.05, 0.1, 0.02, 12.0)


@pytest.fixture
def exporter() -> Iterator[Exporter]:
    exporter = Exporter("127.0.0.1", 0, rank=3, world_size=4, run='odd "name"\\')
    for _ in range(3):
        exporter.observe_step(samples=5, step_seconds=0.5, data_wait_seconds=0.25)
    exporter.observe_snapshot(7, SNAPSHOT, {"backbone": 0.1, "classes": 0.4})
    exporter.count_skipped_sample("truncated")
    exporter.count_skipped_step()
    exporter.observe_checkpoint(2.0)
    exporter.observe_gpu_memory(1024)
    yield exporter
    exporter.close()


def scrape(exporter: Exporter) -> str:
    with urlopen(f"http://127.0.0.1:{exporter.port}/metrics", timeout=5) as answer:
        return str(answer.read().decode())


def test_a_scrape_gives_every_metric_with_rank_and_run(exporter: Exporter) -> None:
    found = {}
    for family in text_string_to_metric_families(scrape(exporter)):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("rank") == "3"
            assert labels.pop("run") == 'odd "name"\\'
            found[(sample.name, *sorted(labels.items()))] = sample.value
    expected = {
        ("megaclass_samples_total",): 15,
        ("megaclass_steps_total",): 3,
        ("megaclass_step_seconds_sum",): 1.5,
        ("megaclass_step_seconds_count",): 3,
        ("megaclass_data_wait_seconds_sum",): 0.75,
        ("megaclass_checkpoint_seconds_count",): 1,
        ("megaclass_skipped_steps_total",): 1,
        ("megaclass_samples_skipped_total", ("reason", "truncated")): 1,
        ("megaclass_loss", ("term", "total")): 3,
        ("megaclass_loss", ("term", "intra")): 1,
        ("megaclass_loss", ("term", "inter")): 2,
        ("megaclass_positive_cosine_mean",): 0.25,
        ("megaclass_negative_cosine_mean",): -0.0625,
        ("megaclass_negative_cosine_max",): 0.5,
        ("megaclass_end_point_cosine",): 0.75,
        ("megaclass_past_end_point_ratio",): 0.125,
        ("megaclass_rows_touched",): 11,
        ("megaclass_learning_rate", ("group", "backbone")): 0.1,
        ("megaclass_learning_rate", ("group", "classes")): 0.4,
        ("megaclass_world_size",): 4,
        ("megaclass_step",): 7,
        ("megaclass_gpu_memory_peak_bytes",): 1024,
    }
    assert {key: found.get(key) for key in expected} == expected


def test_a_monitor_that_is_no_number_is_shown_as_nan(exporter: Exporter) -> None:
    # A batch without negatives has no negative cosine; the value of an earlier step would be a lie.
    exporter.observe_snapshot(8, replace(SNAPSHOT, monitors={**MONITORS, "negative_cosine_max": math.nan}), {})
    (line,) = re.findall(r"^megaclass_negative_cosine_max{.*} (\S+)$", scrape(exporter), re.MULTILINE)
    assert line == "NaN"


def test_every_monitor_of_the_classifier_has_a_gauge() -> None:
    assert {row.name for row in fields(Monitors)} == set(MONITORS)


def test_a_snapshot_without_monitors_leaves_the_gauges_as_they_are(exporter: Exporter) -> None:
    exporter.observe_snapshot(8, replace(SNAPSHOT, monitors={}), {})
    (line,) = re.findall(r"^megaclass_rows_touched{.*} (\S+)$", scrape(exporter), re.MULTILINE)
    assert line == "11.0"


def test_promtool_has_nothing_to_say(exporter: Exporter) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed")
    check = subprocess.run([promtool, "check", "metrics"], input=scrape(exporter), capture_output=True, text=True)
    assert (check.returncode, check.stdout + check.stderr) == (0, "")


def test_close_frees_the_port(exporter: Exporter) -> None:
    port = exporter.port
    exporter.close()
    exporter.close()
    assert exporter.port is None
    with pytest.raises(URLError):
        urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5)
    again = Exporter("127.0.0.1", port or 0, rank=0, world_size=1, run="second")
    assert again.port == port
    again.close()


def test_ranks_of_a_node_take_neighbouring_ports_and_share_no_state() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        base = probe.getsockname()[1] - 1
    second = Exporter("127.0.0.1", base, rank=5, world_size=8, run="a", local_rank=1)
    try:
        assert second.port == base + 1
        assert 'rank="3"' not in scrape(second)
    finally:
        second.close()


@pytest.mark.parametrize(("port", "local_rank"), [(None, 0), (65535, 1)])
def test_a_port_that_cannot_be_had_is_a_warning_not_an_error(
    port: int | None, local_rank: int, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        wanted = port or taken.getsockname()[1]
        exporter = Exporter("127.0.0.1", wanted, rank=1, world_size=2, run="a", local_rank=local_rank)
        exporter.observe_step(samples=5, step_seconds=0.5, data_wait_seconds=0.0)  # goes on as before
        assert exporter.port is None
        exporter.close()
    assert f"metrics port {wanted + local_rank} on 127.0.0.1 cannot be used" in caplog.text
    assert "--observe.metrics-port" in caplog.text


def test_idle_connections_do_not_hold_up_the_trainer_or_a_scrape(exporter: Exporter) -> None:
    idle = [socket.create_connection(("127.0.0.1", exporter.port or 0)) for _ in range(10)]
    try:
        exporter.observe_step(samples=5, step_seconds=0.5, data_wait_seconds=0.0)
        assert "megaclass_samples_total" in scrape(exporter)
    finally:
        for connection in idle:
            connection.close()
