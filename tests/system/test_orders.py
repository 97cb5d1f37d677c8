"""Whole runs in the orders that go by class: every sample accounted for, and the same after a crash."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from megaclass.cli import main
from tests.support.spawn import spawn
from tests.support.tiny_dataset import encode, shard_entry, tar_member, tiny_image, write_manifest, write_shard
from tests.support.training import sample_ids, small_config, small_dataset, train
from tests.system.test_accounting import crash_at, samples_of

SIZES = [1 + label * label // 40 for label in range(37)]  # from 1 to 33
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(37), SIZES))
BAD = int(np.flatnonzero(LABELS == 36)[0])
STEPS, GLOBAL_BATCH = 24, 36


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """37 classes of very different size in two shards; one sample cannot be used."""
    folder = small_dataset(tmp_path_factory.mktemp("data") / "unequal")
    samples = []
    for number, label in enumerate(LABELS.tolist()):
        image = encode(tiny_image(label, number, 16, 1)) if number != BAD else b"not an image"
        members = tar_member(f"{number}.png", image) + tar_member(f"{number}.label", np.array(label, "<i8").tobytes())
        samples.append((members, label, 0))
    content = json.loads((folder / "dataset.json").read_text())
    content["splits"]["train"]["num_samples"] = len(samples)
    content["splits"]["train"]["shards"] = []
    for stem, part in (("train-000000", samples[:101]), ("train-000001", samples[101:]), ("train-000002", [])):
        write_shard(folder, stem, part)
        content["splits"]["train"]["shards"].append(shard_entry(folder, stem))
    write_manifest(folder, content)
    return folder


def config_for(dataset: Path, run_dir: Path, order: dict[str, Any]) -> dict[str, Any]:
    training = {"steps": STEPS, "checkpoint_every": 6, "accumulation_steps": 2}
    content = small_config(dataset, run_dir, train=training, evaluate={"protocols": []})
    content["dataset"] |= {"on_bad_sample": "skip", "bad_sample_budget": 0.1, **order}
    return content


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(
    "order", [{"samples_per_class": 3}, {"class_balance": 1.0}, {"class_balance": 0.5, "repeats": 2}], ids=str
)
def test_a_run_in_an_order_by_class(dataset: Path, tmp_path: Path, order: dict[str, Any]) -> None:
    straight, moved = tmp_path / "straight", tmp_path / "moved"
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config_for(dataset, straight, {})))
    options = [[f"--dataset.{name.replace('_', '-')}", str(value)] for name, value in order.items()]
    assert main(["train", str(path), *(word for option in options for word in option)]) == 0

    counts = samples_of(straight)
    assert counts["trained"] == STEPS * GLOBAL_BATCH
    assert counts["skipped"] == {"bad-image": counts["read"] - counts["trained"]}
    assert counts["epochs_checked"] == STEPS * GLOBAL_BATCH // len(LABELS)
    ids = np.concatenate([np.array(step) for step in sample_ids(straight).values()])
    seen = np.bincount(LABELS[ids], minlength=37)
    # A substitute is any sample, so that one at a time a class may have one fewer or more.
    near = counts["skipped"]["bad-image"]
    if order.get("class_balance") != 0.5:
        assert np.abs(seen - len(ids) / 37).max() <= 6 + near
        assert seen.max() / seen.min() < 2 < max(SIZES) / min(SIZES)
    if "samples_per_class" in order:
        wrong = sum((np.bincount(LABELS[batch])[np.unique(LABELS[batch])] != 3).any() for batch in ids.reshape(-1, 18))
        assert wrong <= near

    content = config_for(dataset, moved, order)
    spawn(crash_at, 2, content, 8)  # 6 is saved; the rest is lost
    train(content, 3)
    # Each rank lists its parts of both micro-batches, so only what is in a step can be compared.
    steps, again = sample_ids(straight), sample_ids(moved)
    assert {step: sorted(step_ids) for step, step_ids in again.items()} == {
        step: sorted(step_ids) for step, step_ids in steps.items()
    }
    assert samples_of(moved) == {**counts, "replayed": 2 * GLOBAL_BATCH}
