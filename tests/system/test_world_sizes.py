"""Training does not depend on the number of ranks: losses within rounding, the same samples, for every preset."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.cases import ALL_PRESETS
from tests.support.training import sample_ids, small_config, small_dataset, train


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("data") / "tiny")


def classifier_options(preset: str) -> dict[str, object]:
    sampled = preset in ("partial-fc", "d-softmax-b", "d-softmax-k")
    return {"preset": preset, "scale": 16, "sampling_rate": 0.3 if sampled else None}


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(("precision", "relative"), [("float64", 1e-9), ("float32", 1e-5)])
@pytest.mark.parametrize("preset", ALL_PRESETS)
def test_losses_of_50_steps_agree(dataset: Path, tmp_path: Path, preset: str, precision: str, relative: float) -> None:
    runs = {}
    for world_size in (1, 2, 3):
        content = small_config(
            dataset, tmp_path / f"world-{world_size}", train={"precision": precision}, optim={"ema_decay": None},
            evaluate={"protocols": []},
        )  # fmt: skip
        content["classifier"] = classifier_options(preset)
        runs[world_size] = train(content, world_size), sample_ids(tmp_path / f"world-{world_size}")
    lines, ids = runs[1]
    assert len(lines) == len(ids) == 50
    assert lines[-1]["loss"] < lines[0]["loss"]
    for world_size in (2, 3):
        other, other_ids = runs[world_size]
        assert other_ids == ids
        for one, two in zip(lines, other, strict=True):
            assert abs(one["loss"] - two["loss"]) <= relative * abs(one["loss"]), (world_size, one["step"])


@pytest.mark.distributed
def test_accumulation_is_the_mean_over_the_global_batch(dataset: Path, tmp_path: Path) -> None:
    """Full softmax on a backbone without batch statistics: cutting the batch changes nothing but rounding."""
    runs = {}
    for steps in (1, 2, 3):
        run_dir = tmp_path / f"accumulate-{steps}"
        content = small_config(
            dataset, run_dir, train={"accumulation_steps": steps, "steps": 10, "precision": "float64"},
            backbone={"name": "vit-tiny"}, optim={"ema_decay": None}, evaluate={"protocols": []},
        )  # fmt: skip
        content["classifier"] = classifier_options("softmax")
        losses = [line["loss"] for line in train(content, world_size=2)]
        runs[steps] = losses, {step: sorted(ids) for step, ids in sample_ids(run_dir).items()}
    for steps in (2, 3):
        assert runs[steps][1] == runs[1][1]
        for one, other in zip(runs[1][0], runs[steps][0], strict=True):
            assert abs(one - other) <= 1e-9 * one
