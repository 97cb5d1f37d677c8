"""Training does not depend on the number of ranks: losses within rounding, the same samples, for every preset."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from megaclass.observe.journal import read_metrics
from tests.support.cases import ALL_PRESETS
from tests.support.spawn import spawn
from tests.support.training import sample_ids, small_config, small_dataset, train, train_all


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("data") / "tiny")


def classifier_options(preset: str) -> dict[str, object]:
    sampled = preset in ("partial-fc", "d-softmax-b", "d-softmax-k")
    return {"preset": preset, "scale": 16, "sampling_rate": 0.3 if sampled else None}


@pytest.fixture(scope="module")
def runs(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every preset in both precisions at world sizes 1, 2 and 3, in folders PRESET-PRECISION-WORLD."""
    folder = tmp_path_factory.mktemp("runs")
    for world_size in (1, 2, 3):
        contents = []
        for preset, precision in itertools.product(ALL_PRESETS, ("float64", "float32")):
            content = small_config(
                dataset, folder / f"{preset}-{precision}-{world_size}", train={"precision": precision},
                optim={"ema_decay": None}, evaluate={"protocols": []},
            )  # fmt: skip
            content["classifier"] = classifier_options(preset)
            contents.append(content)
        for codes in spawn(train_all, world_size, contents, seconds=250):
            assert codes == [0] * len(contents)
    return folder


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(("precision", "relative"), [("float64", 1e-9), ("float32", 1e-5)])
@pytest.mark.parametrize("preset", ALL_PRESETS)
def test_losses_of_50_steps_agree(runs: Path, preset: str, precision: str, relative: float) -> None:
    folders = {world_size: runs / f"{preset}-{precision}-{world_size}" for world_size in (1, 2, 3)}
    losses = {size: [line["loss"] for line in read_metrics(folder)] for size, folder in folders.items()}
    ids = {size: sample_ids(folder) for size, folder in folders.items()}
    assert len(losses[1]) == len(ids[1]) == 50
    assert sum(losses[1][-10:]) < 0.8 * sum(losses[1][:10])
    for size in (2, 3):
        assert ids[size] == ids[1]
        for step, (one, other) in enumerate(zip(losses[1], losses[size], strict=True), 1):
            assert abs(one - other) <= relative * abs(one), (size, step)


@pytest.mark.distributed
def test_micro_batches_of_one_rank_equal_the_batches_of_several(dataset: Path, tmp_path: Path) -> None:
    """With local batch norm two micro-batches see what two ranks see, so the losses must be the same."""
    for parts in (2, 3):
        losses, ids = [], []
        for world_size, accumulation_steps in ((parts, 1), (1, parts)):
            run_dir = tmp_path / f"{world_size}-ranks-{accumulation_steps}-parts"
            content = small_config(
                dataset, run_dir, backbone={"batch_norm": "local"}, optim={"ema_decay": None},
                train={"accumulation_steps": accumulation_steps, "steps": 10, "precision": "float64"},
                evaluate={"protocols": []},
            )  # fmt: skip
            content["classifier"] = classifier_options("cosface")
            losses.append([line["loss"] for line in train(content, world_size)])
            ids.append(sample_ids(run_dir))
        assert ids[0] == ids[1]
        for one, other in zip(*losses, strict=True):
            assert abs(one - other) <= 1e-9 * one
