"""What the engine is told, and what a file of its settings may not say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megaclass import config
from megaclass.errors import ConfigError
from megaclass.train.deepspeed_settings import settings

BUCKETS = {"reduce_bucket_size": 20_000_000, "allgather_bucket_size": 20_000_000}


def made(file: Any = None, folder: Path | None = None, world_size: int = 2, **train: Any) -> dict[str, Any]:
    if file is not None:
        assert folder is not None
        path = folder / "engine.json"
        path.write_text(file if isinstance(file, str) else json.dumps(file))
        train["deepspeed_config"] = str(path)
    content = {
        "dataset": {"reader": "synthetic"},
        "train": {"steps": 3, "global_batch_size": 24, "accumulation_steps": 2, "strategy": "deepspeed", **train},
    }
    return settings(config.validate(content), world_size)


def refused(file: Any, folder: Path, **train: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        made(file, folder, **train)
    return str(caught.value)


def test_batches_and_types_follow_from_the_run() -> None:
    found = made(world_size=3, zero_stage=2)
    assert found["train_batch_size"] == 24
    assert found["train_micro_batch_size_per_gpu"] == 4
    assert found["gradient_accumulation_steps"] == 2
    assert found["gradient_clipping"] == 0.0
    assert found["zero_optimization"] == {"stage": 2, **BUCKETS}
    assert not found["fp16"]["enabled"]
    assert not found["bf16"]["enabled"]
    assert made()["zero_optimization"] == {"stage": 1, **BUCKETS}
    assert made(zero_stage=0)["zero_optimization"] == {"stage": 0, **BUCKETS}


def test_offload_is_to_host_memory() -> None:
    assert made(zero_stage=2, offload="optimizer")["zero_optimization"] == {
        "stage": 2, "offload_optimizer": {"device": "cpu"}, **BUCKETS,
    }  # fmt: skip
    assert made(zero_stage=3, offload="all")["zero_optimization"] == {
        "stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}, **BUCKETS,
    }  # fmt: skip


def test_a_file_sets_traffic_and_reports(tmp_path: Path) -> None:
    file = {"steps_per_print": 7, "zero_optimization": {"overlap_comm": True, "reduce_bucket_size": 1000}}
    found = made(file, tmp_path, zero_stage=2)
    assert found["steps_per_print"] == 7
    assert found["zero_optimization"] == {"stage": 2, **BUCKETS, "overlap_comm": True, "reduce_bucket_size": 1000}


def test_what_agrees_or_is_left_open_is_taken(tmp_path: Path) -> None:
    file = {
        "train_batch_size": 24, "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": 2,
        "bf16": {"enabled": False}, "optimizer": "auto", "zero_optimization": {"stage": 1},
    }  # fmt: skip
    assert made(file, tmp_path) == made()


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ({"train_batch_size": 25}, "train_batch_size is 25, but it follows from train.global_batch_size (24)"),
        ({"train_micro_batch_size_per_gpu": 24}, "follows from train.global_batch_size, train.accumulation_steps and"),
        ({"gradient_accumulation_steps": 1}, "is 1, but it follows from train.accumulation_steps (2); take it out"),
        ({"gradient_clipping": 1.0}, "gradient_clipping is 1.0, but it follows from optim.clip_norm"),
        ({"optimizer": {"type": "AdamW"}}, 'optimizer is {"type": "AdamW"}, but it follows from optim; take it out'),
        ({"scheduler": {"type": "WarmupLR"}}, "but it follows from optim.schedule"),
        ({"fp16": {"enabled": True}}, 'fp16 is {"enabled": true}, but it follows from train.precision'),
        ({"bf16": {"enabled": False, "immediate_grad_update": True}}, "bf16 is"),
        ({"zero_allow_untested_optimizer": False}, "follows from the strategy, which uses torch's optimizers (true)"),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage is 3, but it follows from train.zero_stage (1)"),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage is true"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "but it follows from train.offload"),
        ({"zero_optimization": {"zero_quantized_weights": True}}, "zero_optimization.zero_quantized_weights is true"),
        ({"tensor_parallel": {"autotp_size": 2}}, "which this trainer does not provide for; it may set comms_logger"),
        ({"zero_optimization": 3}, "zero_optimization is 3"),
        ([1], "holds list; it must be a JSON object"),
        ("{", "is not JSON"),
    ],
)  # fmt: skip
def test_what_says_otherwise_is_refused_with_what_decides(tmp_path: Path, file: Any, words: str) -> None:
    said = refused(file, tmp_path)
    assert words in said
    assert str(tmp_path / "engine.json") in said


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    said = refused({"gradient_clipping": 1.0, "amp": {"enabled": True}, "zero_optimization": {"stage": 2}}, tmp_path)
    assert len(said.splitlines()) == 3


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing.json cannot be read: No such file"):
        made(deepspeed_config=str(tmp_path / "nothing.json"))


@pytest.mark.parametrize(
    ("train", "optim", "words"),
    [
        ({"strategy": "ddp", "zero_stage": 1}, {}, "train.zero_stage is for train.strategy deepspeed, and that is ddp"),
        ({"strategy": "auto", "offload": "all"}, {}, "train.offload is for train.strategy deepspeed, and that is auto"),
        ({"strategy": "ddp", "deepspeed_config": "a.json"}, {}, "train.deepspeed_config is for train.strategy"),
        ({"precision": "float64"}, {}, "keeps its parts in float32"),
        ({"channels_last": True}, {}, "row-major parts; leave out train.channels_last"),
        ({"compile": True}, {}, "leave one of the two out"),
        ({"zero_stage": 0, "offload": "optimizer"}, {}, "needs parts, and train.zero_stage is 0"),
        ({"offload": "all"}, {}, "which only train.zero_stage 3 takes apart, and that is 1; use stage 3"),
        ({"zero_stage": 3}, {"ema_decay": 0.9}, "optim.ema_decay 0.9 keeps a second whole backbone"),
    ],
)  # fmt: skip
def test_impossible_combinations(train: dict[str, Any], optim: dict[str, Any], words: str) -> None:
    content = {
        "dataset": {"reader": "synthetic"}, "optim": optim, "train": {"steps": 3, "strategy": "deepspeed", **train},
    }  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        config.validate(content)
    assert words in str(caught.value)
