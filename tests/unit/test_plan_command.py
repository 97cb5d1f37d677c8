"""`megaclass plan` and `megaclass bench machine` from the command line, and the model beside measured steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megaclass.bench import cases, model
from megaclass.cli import main

CONFIG = """
dataset: {reader: synthetic, image_size: 16, channels: 1, synthetic: {num_classes: 500, samples_per_class: 2}}
backbone: {name: tiny, dim: 16, batch_norm: local}
classifier: {preset: d-softmax-k, sampling_rate: 0.5}
train: {steps: 10, global_batch_size: 16}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text(CONFIG)
    return file


def test_a_table_over_world_sizes(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--gpu", "h100", "--world-sizes", "2", "16", "--batch-per-rank", "8"]
    picture = tmp_path / "scaling.svg"
    assert main(["plan", str(config), *options, "--json", "--plot", str(picture)]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["ranks"], row["global_batch_size"]) for row in rows] == [(2, 16), (16, 128)]
    assert rows[0]["samples_per_second"] < rows[1]["samples_per_second"] < 8 * rows[0]["samples_per_second"]
    assert "never measured" in picture.read_text()
    cluster = [
        "--gpus-per-node",
        "4",
        "--network-gbit",
        "100",
        "--mtbf-hours",
        "1000",
        "--world-size",
        "16",
        "--batch-per-rank",
        "8",
    ]
    assert main(["plan", str(config), "--gpu", "h100", *cluster]) == 0
    shown = capsys.readouterr().out
    assert "a failure every 62.5 h" in shown
    assert "modelled step" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--world-sizes", "8", "--mtbf-hours", "9"], "--world-sizes, --mtbf-hours: for GPUs; give --gpu h200"),
        (["--gpu", "h100", "--calibrate"], "--calibrate is about a measured CPU, not h100"),
        (["--calibrate", "--machine", "m.json"], "--calibrate measures what --machine FILE has"),
        (["--machine", "m.json"], "m.json: not a profile of a machine"),
        (["--gpu", "h100", "--plot", "scaling.txt"], "the ending must be one of .svg"),
    ],
)
def test_mistakes(config: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(config), *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.distributed
def test_a_measured_machine(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile = tmp_path / "machine.json"
    assert main(["bench", "machine", str(config), "--nproc", "2", "--out", str(profile)]) == 0
    assert main(["plan", str(config), "--world-size", "2", "--machine", str(profile)]) == 0
    shown = capsys.readouterr().out
    assert "operators with 2 ranks at once" in shown
    assert "operators' time by its source: 100% measured" in shown
    assert (
        main(["plan", str(config), "--world-size", "2", "--machine", str(profile), "--backbone.dim", "32", "--json"])
        == 0
    )
    modelled = json.loads(capsys.readouterr().out)["modelled"]
    assert 0 < modelled["sources"]["scaled"] < 1
    assert modelled["wall_seconds"] >= modelled["cpu_seconds"] > 0
    assert main(["plan", str(config), "--machine", str(profile)]) == 0, "one rank sends nothing"
    assert main(["plan", str(config), "--world-size", "4", "--machine", str(profile)]) == 2


@pytest.mark.slow
def test_modelled_and_measured_processor_time_are_close() -> None:
    """Within a third in a suite that runs beside anything: the floor of the plan is off by a factor of four."""
    (case,) = cases.cases([1], ["all of 5,000"])
    report = model.compare(case, blocks=3, steps=3)
    assert report["modelled_cpu_ms"] == pytest.approx(report["measured_cpu_ms"], rel=1 / 3), model.line(report)
    assert model.plain(report)["error"] == model.error(report)
    assert "within 15 %" in model.summary([report])
