"""Stopping and continuing: to the bit at the same world size, within rounding at another, every sample once."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megaclass.checkpoint import find_latest, verify
from megaclass.errors import CheckpointError
from megaclass.observe.journal import read_metrics
from tests.support.interrupted import (
    assert_same_to_the_bit,
    digest,
    killed_and_continued,
    start,
    train_until,
    wait_for_step,
    workers,
)
from tests.support.spawn import spawn
from tests.support.training import sample_ids, small_config, small_dataset, train

STEPS = 31  # six epochs of 185 samples in batches of 36, and six samples more


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("data") / "tiny")


def config_for(dataset: Path, run_dir: Path, **train_options: Any) -> dict[str, Any]:
    return small_config(dataset, run_dir, train={"steps": STEPS, "checkpoint_every": 8, **train_options})


def assert_every_sample_once_per_epoch(run_dir: Path, num_samples: int = 185) -> None:
    ids = [sample for step, used in sorted(sample_ids(run_dir).items()) for sample in used]
    for epoch in range(len(ids) // num_samples):
        assert Counter(ids[epoch * num_samples : (epoch + 1) * num_samples]) == Counter(range(num_samples)), epoch


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "kind"),
    [
        (1, "d-softmax-k"),
        (2, "partial-fc"),
        (2, "bfloat16 rows"),
        pytest.param(2, "d-softmax-k", marks=pytest.mark.full),
        pytest.param(1, "partial-fc", marks=pytest.mark.full),
        pytest.param(1, "bfloat16 rows", marks=pytest.mark.full),
    ],
)
def test_killed_and_continued_equals_uninterrupted_to_the_bit(
    dataset: Path, tmp_path: Path, world_size: int, kind: str
) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    classifier: dict[str, Any] = {"preset": kind, "sampling_rate": 0.3}
    optim = {}
    if kind == "bfloat16 rows":
        classifier = {"preset": "d-softmax-k", "sampling_rate": 0.3, "row_dtype": "bfloat16"}
        optim = {"row_momentum_dtype": "bfloat16", "row_update": "fused", "clip_norm": None}

    def config_of(run_dir: Path) -> dict[str, Any]:
        content = config_for(dataset, run_dir)
        return {**content, "classifier": classifier, "optim": {**content["optim"], **optim}}

    train(config_of(straight), world_size)
    content = config_of(broken)
    if world_size == 1:  # nobody restarts it
        process = start(content, world_size)
        wait_for_step(broken, 11, process)
        os.kill(workers(broken)[-1], signal.SIGKILL)
        process.communicate(timeout=120)
        assert find_latest(broken / "checkpoints").name.startswith(("step-000000008", "step-000000016"))
        train(content, world_size)
    else:
        killed_and_continued(content, world_size, 11)
    assert_same_to_the_bit(straight, broken)
    assert sample_ids(broken) == sample_ids(straight)
    assert_every_sample_once_per_epoch(broken)
    summary = json.loads((broken / "summary.json").read_text())
    assert summary["status"] == "completed"
    assert summary["attempts"] == 2
    assert summary["samples"]["trained"] == STEPS * 36
    assert summary["samples"]["read"] == summary["samples"]["trained"]


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("last", [1, 8])
def test_four_ranks_add_up_after_a_restart_as_they_did_before(dataset: Path, tmp_path: Path, last: int) -> None:
    """Of two numbers the order does not matter; of four it does, and DDP chooses it by its first backward pass."""
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    content = {**config_for(dataset, straight, steps=20), "evaluate": {"protocols": []}}
    expected = train(content, 4)
    content = {**content, "run": {**content["run"], "dir": str(broken)}}
    spawn(train_until, 4, content, last)
    assert [line["loss_hex"] for line in train(content, 4)] == [line["loss_hex"] for line in expected]
    assert digest(broken) == digest(straight)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(("precision", "relative"), [("float64", 1e-9), ("float32", 1e-5)])
def test_continued_at_other_world_sizes(dataset: Path, tmp_path: Path, precision: str, relative: float) -> None:
    straight, moved = tmp_path / "straight", tmp_path / "moved"
    expected = train(config_for(dataset, straight, precision=precision), 1)
    for world_size, last in ((2, 8), (3, 16), (1, 24), (4, STEPS)):
        stop_at(dataset, moved, world_size, last, precision)
    actual = read_metrics(moved)
    assert len(actual) == STEPS
    assert [line["world_size"] for line in actual] == [2] * 8 + [3] * 8 + [1] * 8 + [4] * 7
    for one, two in zip(expected, actual, strict=True):
        assert abs(one["loss"] - two["loss"]) <= relative * abs(one["loss"]), one["step"]
    assert sample_ids(moved) == sample_ids(straight)
    assert_every_sample_once_per_epoch(moved)


@pytest.mark.distributed
@pytest.mark.slow
def test_killed_on_two_ranks_and_continued_on_three(dataset: Path, tmp_path: Path) -> None:
    """A rank dies between checkpoints and nobody restarts it; three ranks take the steps since the last one again."""
    straight, moved = tmp_path / "straight", tmp_path / "moved"
    expected = train(config_for(dataset, straight), 1)
    content = config_for(dataset, moved)
    process = start(content, 2, launcher_options=("--max-restarts", "0"))
    wait_for_step(moved, 12, process)
    os.kill(workers(moved)[-1], signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 6, output
    actual = train(content, 3)
    assert {line["world_size"] for line in actual} == {2, 3}
    for one, two in zip(expected, actual, strict=True):
        assert abs(one["loss"] - two["loss"]) <= 1e-5 * abs(one["loss"]), one["step"]
    assert sample_ids(moved) == sample_ids(straight)
    assert_every_sample_once_per_epoch(moved)
    assert json.loads((moved / "summary.json").read_text())["samples"]["replayed"] > 0


def stop_at(dataset: Path, run_dir: Path, world_size: int, last: int, precision: str) -> None:
    """Run on until step `last`, and stop there as a signal would make it."""
    content = config_for(dataset, run_dir, precision=precision)
    spawn(train_until, world_size, content, last)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_terminated_saves_and_continues(dataset: Path, tmp_path: Path, world_size: int) -> None:
    run_dir = tmp_path / "run"
    content = small_config(dataset, run_dir, train={"steps": 4000, "checkpoint_every": 100_000})
    process = start(content, world_size)
    wait_for_step(run_dir, 5, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    outcome = json.loads((run_dir / "outcome.json").read_text())
    assert outcome["code"] == 75
    path = find_latest(run_dir / "checkpoints")
    assert path is not None
    assert verify(path).step == outcome["step"] >= 5
    assert json.loads((run_dir / "summary.json").read_text())["status"] == "preempted"


def test_changed_configuration_is_refused_with_the_difference(dataset: Path, tmp_path: Path) -> None:
    content = config_for(dataset, tmp_path / "run")
    content["train"]["steps"] = 3
    content["optim"]["warmup_steps"] = 1
    train(content)
    content["optim"]["lr"] = 0.07
    process = start(content, 1)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == CheckpointError.exit_code == 4
    assert "was trained with another configuration: optim.lr: 0.003 -> 0.07; give the old values" in output
    assert "Traceback" not in output


def test_a_finished_run_is_evaluated_again_and_trains_no_further(dataset: Path, tmp_path: Path) -> None:
    content = config_for(dataset, tmp_path / "run")
    content["train"]["steps"] = 9
    first = train(content)
    before = digest(tmp_path / "run")
    assert train(content) == first
    assert digest(tmp_path / "run") == before
