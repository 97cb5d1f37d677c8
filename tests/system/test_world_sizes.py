"""Training does not depend on the number of ranks: losses and class weights within rounding, the same samples.

Every preset for some steps; longer whatever carries something from one step to the next: neighbours, a running state, a
learned bias, schedules; and for 50 steps, on up to four ranks, what rounds in float32. The steps are those of the real
trainer; what is written around them is tested elsewhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megaclass.objectives.presets import PRESETS
from tests.support.spawn import spawn
from tests.support.training import fit_all, sample_ids, small_config, small_dataset, train

SHORT, LONG, LONGEST = 6, 24, 50
# A rate at which the loss falls within a few steps; float64 has digits enough for it (see `small_config`).
FAST = {"lr": 0.1, "warmup_steps": 0}
LONG_RUNS: dict[str, dict[str, Any]] = {
    "hard negatives": {"classifier": {"preset": "cosface", "sampler": "hard", "num_neighbours": 3, "rebuild_every": 8}},
    "running state": {"classifier": {"preset": "curricularface"}},
    "learned bias, sampled": {
        "classifier": {"preset": "sphereface2", "sampler": "classes", "correction": "inverse-rate"}
    },
    "sub-centres, label noise": {
        "classifier": {"preset": "arcface", "sub_centres": 2, "negative_filter": 0.6}, "dataset": {"label_noise": 0.2},
    },
    "norms, class counts": {
        "classifier": {"preset": "adaface", "count_weight_power": 0.5, "count_margin_power": 0.25},
        "dataset": {"label_noise": 0.3},
    },
    "norm penalty": {"classifier": {"preset": "magface"}},
    "schedules": {
        "classifier": {
            "preset": "d-softmax-k", "scale": None, "sampling_rate": None,
            "schedule": {
                "scale": {"shape": "cosine", "points": [[0.0, 8.0], [0.5, 20.0]]},
                "sampling_rate": {"shape": "linear", "points": [[0.0, 0.1], [1.0, 0.9]]},
                "end_point": {"shape": "step", "points": [[0.0, 0.7], [0.4, 0.95]]},
                "learning_rate": {"shape": "linear", "points": [[0.0, 1.0], [1.0, 0.2]]},
            },
        },
    },
}  # fmt: skip
IN_FLOAT32 = ("arcface", "partial-fc", "d-softmax-k")


def classifier_options(options: dict[str, Any]) -> dict[str, Any]:
    """The options with a small scale, and a rate at which 37 classes leave something to draw."""
    preset = PRESETS[options["preset"]]
    is_sampled = options.get("sampler", preset.sampler) not in ("all", "positives")
    scale = {} if "scale" in preset.schedule else {"scale": 16}
    return {**scale, "sampling_rate": 0.3 if is_sampled else None, **options}


def contents(dataset: Path) -> dict[str, dict[str, Any]]:
    """Every run, by name."""
    runs = {}
    for preset in PRESETS:
        runs[preset] = {"classifier": {"preset": preset}, "train": {"steps": SHORT}, "optim": FAST}
    for name, sections in LONG_RUNS.items():
        runs[f"long: {name}"] = {**sections, "train": {"steps": LONG}}
    for preset in IN_FLOAT32:
        runs[f"float32: {preset}"] = {
            "classifier": {"preset": preset}, "train": {"steps": LONGEST, "precision": "float32"}
        }  # fmt: skip
    for sections in runs.values():
        sections["train"] = {"precision": "float64", **sections["train"]}
        sections["optim"] = {"ema_decay": None, **sections.get("optim", {})}
    made = {}
    for name, sections in runs.items():
        content = small_config(dataset, Path("never-written"), **sections)
        content["classifier"] = classifier_options(sections["classifier"])
        made[name] = content
    return made


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="module")
def runs(dataset: Path) -> dict[int, list[dict[str, dict[str, Any]]]]:
    """World size -> rank -> name -> what the run gave."""
    every = contents(dataset)
    in_float32 = {name: content for name, content in every.items() if name.startswith("float32")}
    return {
        world_size: spawn(fit_all, world_size, in_float32 if world_size == 4 else every, seconds=250)
        for world_size in (1, 2, 3, 4)
    }


def assert_agree(runs: dict[int, list[dict[str, Any]]], name: str, num_steps: int, relative: float) -> list[float]:
    """Fail unless all world sizes give the same; the losses on one rank."""
    one = runs[1][0][name]
    assert len(one["losses"]) == len(one["ids"]) == num_steps
    for size in (2, 3, 4):
        if name not in runs[size][0]:
            continue
        ranks = [rank[name] for rank in runs[size]]
        for step in range(num_steps):
            assert [sample for rank in ranks for sample in rank["ids"][step]] == one["ids"][step]
            for rank in ranks:
                assert rank["losses"][step] == ranks[0]["losses"][step]
            difference = abs(ranks[0]["losses"][step] - one["losses"][step])
            assert difference <= relative * abs(one["losses"][step]), (size, step)
        weight = torch.cat([rank["weight"] for rank in ranks])
        assert float((weight - one["weight"]).abs().max()) <= relative * float(one["weight"].abs().max())
    return one["losses"]


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_agrees(runs: dict[int, list[dict[str, Any]]], preset: str) -> None:
    losses = assert_agree(runs, preset, SHORT, 1e-9)
    # The value of SFace says little: its factors are held constant, and a smaller one is not a better one.
    if preset != "sface":
        assert sum(losses[-2:]) < 0.95 * sum(losses[:2])


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("name", LONG_RUNS)
def test_many_steps_agree(runs: dict[int, list[dict[str, Any]]], name: str) -> None:
    losses = assert_agree(runs, f"long: {name}", LONG, 1e-9)
    if name != "schedules":  # losses at two scales cannot be compared
        assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("preset", IN_FLOAT32)
def test_50_steps_agree_in_float32(runs: dict[int, list[dict[str, Any]]], preset: str) -> None:
    assert f"float32: {preset}" in runs[4][0]
    losses = assert_agree(runs, f"float32: {preset}", LONGEST, 1e-5)
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


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
            content["classifier"] = classifier_options({"preset": "cosface"})
            losses.append([line["loss"] for line in train(content, world_size)])
            ids.append(sample_ids(run_dir))
        assert ids[0] == ids[1]
        for one, other in zip(*losses, strict=True):
            assert abs(one - other) <= 1e-9 * one
