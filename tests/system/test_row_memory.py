"""Class rows in the host's memory, in the steps of the real trainer: the numbers of rows on the device, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megaclass import config
from megaclass.errors import ConfigError
from megaclass.parallel.process import World
from megaclass.train import build
from tests.support.spawn import spawn
from tests.support.training import fit_all, small_config, small_dataset
from tests.system.test_resume_loss import STEPS, STOP, content_for, part

LOSSES: dict[str, dict[str, Any]] = {
    "random rows": {"preset": "d-softmax-k", "batch_positives": False, "sampling_rate": 0.2},
    "batch positives": {"preset": "d-softmax-k", "sampling_rate": 0.2},
    "a quota": {"preset": "partial-fc", "sampling_rate": 0.6},
    "positives": {"preset": "arcface", "sampler": "positives"},
    "sub-centres": {"preset": "partial-fc", "sub_centres": 2, "sampling_rate": 0.3},
    "margins by class": {"preset": "d-softmax-k", "sampling_rate": 0.2, "count_weight_power": 0.5},
    "learned bias": {"preset": "sphereface2", "sampler": "classes", "correction": "inverse-rate", "sampling_rate": 0.3},
    "a moving rate": {
        "preset": "d-softmax-k",
        "schedule": {"sampling_rate": {"shape": "linear", "points": [[0, 0.1], [1, 0.5]]}},
    },
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"class_name": "sgd", "row_momentum_dtype": "bfloat16"},
    "adamw": {"class_name": "adamw", "class_lr": 0.01},
    "adagrad": {"class_name": "adagrad", "class_lr": 0.01},
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("data") / "tiny")


def content_of(dataset: Path, loss: str, optimizer: str, memory: str, accumulation: int, update: str) -> dict[str, Any]:
    options = {"lr": 0.1, "warmup_steps": 0, "ema_decay": None, "clip_norm": None, "row_update": update}
    low = "bfloat16" if loss in ("batch positives", "sub-centres") else "float32"
    return small_config(
        dataset, Path("never-written"), train={"steps": 6, "accumulation_steps": accumulation},
        optim=options | OPTIMIZERS[optimizer],
        classifier={"scale": 16, "row_dtype": low, "sampling_rate": None, "row_memory": memory, **LOSSES[loss]},
    )  # fmt: skip


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2])
def test_losses_and_rows_are_those_of_rows_on_the_device(dataset: Path, world_size: int) -> None:
    contents = {
        (loss, optimizer, accumulation, update, memory): content_of(
            dataset, loss, optimizer, memory, accumulation, update
        )
        for loss in LOSSES
        for optimizer in OPTIMIZERS
        for accumulation, update in ((1, "deferred"), (1, "fused"), (3, "deferred"))
        for memory in ("device", "host")
        if loss == "batch positives" or (optimizer == "sgd" and (accumulation == 3 or loss == "sub-centres"))
    }
    for rank in spawn(fit_all, world_size, contents, seconds=280):
        for *case, memory in contents:
            if memory == "device":
                there, here = rank[*case, "device"], rank[*case, "host"]
                assert there["losses"] == here["losses"], case
                assert torch.equal(there["weight"], here["weight"]), case


def two_parts(world: World, contents: dict[str, dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Whole runs on the device and on the host, and one that goes over from the host to the device after a stop."""
    found = {name: part(world, content, folder / name, 0, STEPS) for name, content in contents.items()}
    before = part(world, contents["host"], folder / "cut", 0, STOP)
    after = part(world, contents["device"], folder / "cut", STOP, STEPS)
    found["cut"] = {"losses": before["losses"] + after["losses"], "tensors": after["tensors"]}
    return found


@pytest.mark.distributed
def test_checkpoints_do_not_know_where_rows_were(dataset: Path, tmp_path: Path) -> None:
    """Losses and every tensor saved are equal to the bit, momentum of the rows included."""
    contents = {}
    for memory in ("device", "host"):
        classifier = {"preset": "d-softmax-k", "sampling_rate": 0.2, "row_memory": memory}
        contents[memory] = content_for(dataset, classifier)
    for rank in spawn(two_parts, 2, contents, tmp_path, seconds=200):
        for name in ("host", "cut"):
            assert rank[name]["losses"] == rank["device"]["losses"]
            assert rank[name]["tensors"].keys() == rank["device"]["tensors"].keys()
            for key, tensor in rank["device"]["tensors"].items():
                assert torch.equal(rank[name]["tensors"][key], tensor), key


@pytest.mark.parametrize(
    ("preset", "reason"), [("d-softmax", "needs all rows in every step"), ("arcface", "needs all")]
)
def test_losses_over_all_rows_are_refused(dataset: Path, preset: str, reason: str) -> None:
    content = small_config(
        dataset, Path("never-written"), classifier={"preset": preset, "row_memory": "host", "sampling_rate": None}
    )
    with pytest.raises(
        ConfigError, match=f"row_memory host: the sampler 'all' {reason}.*classes, partial-fc, positives"
    ):
        build.build(config.validate(content), World(0, 1, 0, torch.device("cpu"), None, None))


def test_the_other_refusals(dataset: Path) -> None:
    for classifier, reason in (
        ({"preset": "d-softmax-b", "sampling_rate": 0.2}, "'batch' needs all rows in every step"),
        ({"preset": "d-softmax-k", "sampler": "hard", "sampling_rate": 0.2}, "'hard' searches all rows for neighbours"),
    ):
        content = small_config(dataset, Path("never-written"), classifier={**classifier, "row_memory": "host"})
        with pytest.raises(ConfigError, match=reason):
            build.build(config.validate(content), World(0, 1, 0, torch.device("cpu"), None, None))
    content = small_config(dataset, Path("x"), classifier={"row_memory": "host"}, optim={"untouched_rows": "dense"})
    with pytest.raises(ConfigError, match="row_memory host brings only rows that have a gradient"):
        config.validate(content)
