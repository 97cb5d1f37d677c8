"""The backbone in parts (`train.strategy: fsdp`): the numbers of a whole one, on any number of ranks and restarts."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from megaclass import backbones, checkpoint, config
from megaclass.backbones import vit
from megaclass.data.batch import Batch
from megaclass.errors import ConfigError
from megaclass.observe.journal import read_metrics
from megaclass.parallel.process import World
from megaclass.train import build, loop
from megaclass.train.trained import judge_run
from tests.support.interrupted import assert_same_to_the_bit, digest, killed_and_continued, train_until
from tests.support.spawn import spawn
from tests.support.training import sample_ids, small_config, small_dataset, train

STEPS = 20
# Every rate of SGD shows a gradient that is too large; AdamW hides it, but has moments to keep.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"name": "sgd", "lr": 0.01, "weight_decay": 0.01},
    "adamw": {"name": "adamw", "class_name": "adamw", "lr": 1e-3, "weight_decay": 0.1},
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("data") / "tiny")


def content_of(dataset: Path, run_dir: Path = Path("never-written"), /, **sections: dict[str, Any]) -> dict[str, Any]:
    sections["train"] = {"steps": STEPS, "strategy": "fsdp", **sections.get("train", {})}
    sections["optim"] = {"warmup_steps": 0, "ema_decay": None, **sections.get("optim", {})}
    return small_config(dataset, run_dir, **sections)


def run(world: World, content: dict[str, Any]) -> dict[str, Any]:
    """A run of all its steps on one rank, and how many numbers of the backbone and its optimizer this rank holds."""
    training = build.build(config.validate(content), world)
    results: list[loop.StepResult] = []
    assert loop.fit(training, loop.Hooks(lambda step: False, lambda batches: None, results.append))
    training.reader.close()
    strategy: Any = training.strategy
    held = [one for state in strategy.optimizer.state.values() for one in state.values() if one.ndim]
    with strategy.whole() as module:
        whole = {name: one.clone() for name, one in module.state_dict().items()}
    return {
        "losses": [float(result.output.loss.detach()) for result in results],
        "norms": [float(result.grad_norm) for result in results],
        "saved": {name: one.clone() for name, one in strategy.backbone_state().items()},
        "whole": whole,
        "held": sum(one.numel() for one in held),
        "weight": training.classifier.weight.detach().clone(),
    }


def run_all(world: World, contents: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: run(world, content) for name, content in contents.items()}


def cases(dataset: Path) -> dict[str, dict[str, Any]]:
    """Every case under both strategies; a norm that clips in every step, so that the norm itself is compared."""
    found = {}
    for strategy in ("ddp", "fsdp"):
        for name, optim in OPTIMIZERS.items():
            for accumulation in (1, 2):
                train = {"strategy": strategy, "accumulation_steps": accumulation}
                found[f"{strategy}/{name}/{accumulation}"] = content_of(dataset, train=train, optim=optim)
        more: dict[str, dict[str, dict[str, Any]]] = {
            "clipped": {"optim": {**OPTIMIZERS["sgd"], "clip_norm": 0.05}},
            "kept": {} if strategy == "ddp" else {"train": {"fsdp_reshard": False}},
            "recomputed": {"train": {"activation_checkpointing": True}},
            "bfloat16": {"train": {"precision": "bfloat16"}},
            "float16": {"train": {"precision": "float16", "loss_scale": 1024.0}},
            "local": {"backbone": {"batch_norm": "local"}},
        }
        for name, sections in more.items():
            sections = {**sections, "train": {"strategy": strategy, "steps": 8, **sections.get("train", {})}}
            found[f"{strategy}/{name}/1"] = content_of(dataset, **{"optim": OPTIMIZERS["sgd"], **sections})
    return found


@pytest.fixture(scope="module")
def runs(dataset: Path) -> list[dict[str, dict[str, Any]]]:
    return spawn(run_all, 2, cases(dataset), seconds=280)


def difference(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) / abs(a) for a, b in zip(one, other, strict=True))


@pytest.mark.distributed
@pytest.mark.parametrize(
    "case",
    [
        "sgd/1",
        "sgd/2",
        "adamw/1",
        "adamw/2",
        "clipped/1",
        "kept/1",
        "recomputed/1",
        "local/1",
        "bfloat16/1",
        "float16/1",
    ],
)
def test_the_losses_are_those_of_the_whole_backbone(runs: list[dict[str, dict[str, Any]]], case: str) -> None:
    # Autocast rounds to eight or eleven bits, and what differs in the last digit of a parameter then differs in those.
    bound = {"bfloat16/1": 2e-3, "float16/1": 2e-4}.get(case, 1e-6)
    for rank in runs:
        whole, parts = rank[f"ddp/{case}"], rank[f"fsdp/{case}"]
        assert difference(whole["losses"], parts["losses"]) < bound
        assert difference(whole["norms"], parts["norms"]) < 20 * bound
        assert parts["losses"] == runs[0][f"fsdp/{case}"]["losses"]
        assert float((whole["weight"] - parts["weight"]).abs().max()) < 20 * bound
    if case == "clipped/1":
        assert min(whole["norms"]) > 0.05
    else:
        assert whole["losses"][-1] < whole["losses"][0]


@pytest.mark.distributed
def test_every_rank_holds_a_part_and_sees_the_whole(runs: list[dict[str, dict[str, Any]]]) -> None:
    for name in OPTIMIZERS:
        whole, parts = runs[0][f"ddp/{name}/1"], [rank[f"fsdp/{name}/1"] for rank in runs]
        assert sum(rank["held"] for rank in parts) == whole["held"]
        assert max(rank["held"] for rank in parts) < 0.6 * whole["held"]
        # Rank 0 saves all; every rank evaluates the same network.
        assert parts[0]["saved"].keys() == parts[0]["whole"].keys() == whole["saved"].keys()
        for rank in parts:
            for key, tensor in parts[0]["saved"].items():
                assert torch.equal(rank["whole"][key], tensor), key
                torch.testing.assert_close(tensor, whole["saved"][key], rtol=1e-4, atol=1e-5)


def _poisoned(world: World, content: dict[str, Any]) -> list[bool]:
    """Whether a step with a NaN in the images of rank 1 left everything as it was."""
    training = build.build(config.validate(content), world)
    batches = iter(training.reader)

    def poisoned() -> Any:
        for batch in batches:
            images = batch.images.clone()
            if world.rank == 1:
                images[0, 0, 0, 0] = torch.nan
            yield Batch(images, batch.labels, batch.ids, batch.position)

    def everything() -> list[torch.Tensor]:
        strategy: Any = training.strategy
        parts = [*strategy._parts.values(), *strategy.backbone.buffers(), training.classifier.weight]
        states = [one for state in strategy.optimizer.state.values() for one in state.values()]
        return [one.detach().clone() for one in (*parts, *states)]

    assert loop.train_step(training, batches, lambda _: None).is_taken
    before = everything()
    assert not loop.train_step(training, poisoned(), lambda _: None).is_taken
    same = [torch.equal(one, other) for one, other in zip(before, everything(), strict=True)]
    assert loop.train_step(training, batches, lambda _: None).is_taken
    training.reader.close()
    return same


@pytest.mark.distributed
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_that_is_not_finite_moves_no_part(dataset: Path, accumulation: int) -> None:
    content = content_of(dataset, train={"accumulation_steps": accumulation}, optim=OPTIMIZERS["adamw"])
    for same in spawn(_poisoned, 2, content):
        assert all(same)


def newest(run_dir: Path) -> Path:
    path = checkpoint.find_latest(run_dir / "checkpoints")
    assert path is not None
    return path


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [pytest.param("sgd", marks=pytest.mark.full), "adamw"])
def test_a_checkpoint_of_two_ranks_goes_on_at_three_and_one_and_whole(
    dataset: Path, tmp_path: Path, optimizer: str
) -> None:
    """2 ranks, then 3, then 1, then 2 under DDP, then 2 again: as if nothing had happened."""
    straight, moved = tmp_path / "straight", tmp_path / "moved"
    optim = {**OPTIMIZERS[optimizer], "ema_decay": 0.9}
    expected = train(content_of(dataset, straight, optim=optim), 2)
    for world_size, last, strategy in (
        (2, 4, "fsdp"),
        (3, 8, "fsdp"),
        (1, 12, "fsdp"),
        (2, 16, "ddp"),
        (2, 20, "fsdp"),
    ):
        spawn(train_until, world_size, content_of(dataset, moved, optim=optim, train={"strategy": strategy}), last)
    actual = read_metrics(moved)
    assert [line["world_size"] for line in actual] == [2] * 4 + [3] * 4 + [1] * 4 + [2] * 8
    for one, two in zip(expected, actual, strict=True):
        assert abs(one["loss"] - two["loss"]) <= 1e-5 * abs(one["loss"]), one["step"]
    assert sample_ids(moved) == sample_ids(straight)
    final = [json.loads((folder / "summary.json").read_text())["evaluation"]["trained"] for folder in (straight, moved)]
    assert final[0]["retrieval"]["recall_at_1"] == pytest.approx(final[1]["retrieval"]["recall_at_1"], abs=0.1)
    # What was judged in parts, by gathering the average, is what the checkpoint holds.
    judged = judge_run(
        moved, data=None, split=None, protocols=None, gallery_source=None, checkpoint=None, batch_size=256,
        baselines=False, device="cpu",
    )  # fmt: skip
    assert judged["trained"]["retrieval"] == pytest.approx(final[1]["retrieval"], abs=1e-6)
    saved = [checkpoint.load_replicated(newest(folder)).replicated for folder in (straight, moved)]
    assert saved[0].keys() == saved[1].keys()
    assert {name.split("/")[0] for name in saved[0]} == {"backbone", "optimizer", "average"}
    for name, tensor in saved[0].items():
        gap = (saved[1][name].double() - tensor.double()).norm()
        assert float(gap) <= 1e-3 * float(tensor.double().norm()) + 1e-9, name


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_stopped_and_continued_equals_uninterrupted_to_the_bit(dataset: Path, tmp_path: Path, optimizer: str) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    sections: dict[str, Any] = {
        "optim": {**OPTIMIZERS[optimizer], "ema_decay": 0.9}, "train": {"accumulation_steps": 2, "steps": 10},
    }  # fmt: skip
    expected = train(content_of(dataset, straight, **sections), 2)
    for last in (4, 10):
        spawn(train_until, 2, content_of(dataset, broken, **sections), last)
    actual = read_metrics(broken)
    assert [line["loss_hex"] for line in actual] == [line["loss_hex"] for line in expected]
    assert [line["attempt"] for line in actual] == [1] * 4 + [2] * 6
    assert digest(broken) == digest(straight)


@pytest.mark.full
@pytest.mark.distributed
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_killed_and_continued_equals_uninterrupted_to_the_bit(dataset: Path, tmp_path: Path, optimizer: str) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    optim = {**OPTIMIZERS[optimizer], "ema_decay": 0.9}
    sections: dict[str, Any] = {"optim": optim, "train": {"checkpoint_every": 6, "steps": 31}}
    train(content_of(dataset, straight, **sections), 2)
    killed_and_continued(content_of(dataset, broken, **sections), 2, 8)
    assert_same_to_the_bit(straight, broken)


def _assert_independent(dataset: Path, sizes: tuple[int, ...], steps: int, sections: dict[str, Any]) -> None:
    sections = {**sections, "train": {"steps": steps, **sections.get("train", {})}}
    found = {size: spawn(run, size, content_of(dataset, **sections), seconds=250)[0]["losses"] for size in sizes}
    for size in sizes[1:]:
        assert difference(found[sizes[0]], found[size]) < 1e-5, size


@pytest.mark.distributed
@pytest.mark.slow
def test_20_steps_agree_at_two_and_three_ranks(dataset: Path) -> None:
    """Three ranks cut nothing evenly: parts of some parameters are short, and those of a few are empty."""
    _assert_independent(dataset, (2, 3), 20, {"optim": {"lr": 0.003, "name": "sgd"}})


@pytest.mark.full
@pytest.mark.distributed
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_50_steps_agree_at_every_number_of_ranks(dataset: Path, optimizer: str, accumulation: int) -> None:
    rate = {"sgd": 0.003, "adamw": 1e-4}[optimizer]
    optim = {"lr": rate, "name": optimizer, "class_name": optimizer}
    _assert_independent(dataset, (1, 2, 3, 4), 50, {"optim": optim, "train": {"accumulation_steps": accumulation}})


def _with_a_small_transformer(world: World, contents: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    vit._SHAPES["two-blocks"] = (24, 2, 3)
    backbones.register("two-blocks")(partial(vit._build, "two-blocks"))
    return run_all(world, contents)


@pytest.mark.distributed
def test_a_transformer_gathered_in_bfloat16_learns_alike(dataset: Path) -> None:
    """Half of what travels; autocast rounds the same matrices. Only layer norms and biases are rounded beyond that."""
    low = {"precision": "bfloat16", "steps": 8}
    sections: dict[str, Any] = {"backbone": {"name": "two-blocks", "width": 1.0}, "optim": OPTIMIZERS["sgd"]}
    contents = {
        name: content_of(dataset, **sections, train={**low, "fsdp_gather": name, "accumulation_steps": 2})
        for name in ("float32", "bfloat16")
    }
    for rank in spawn(_with_a_small_transformer, 2, contents):
        one, other = rank["float32"], rank["bfloat16"]
        assert 0 < difference(one["losses"], other["losses"]) < 2e-2
        assert all(tensor.dtype != torch.bfloat16 for tensor in other["whole"].values())


@pytest.mark.distributed
def test_batch_norm_is_not_gathered_in_bfloat16(dataset: Path) -> None:
    content = content_of(dataset, train={"precision": "bfloat16", "fsdp_gather": "bfloat16"})
    with pytest.raises(
        AssertionError, match=r"fsdp_gather bfloat16 is for backbones without batch norm in their blocks"
    ):
        spawn(run, 2, content)


@pytest.mark.full
@pytest.mark.distributed
@pytest.mark.parametrize("backbone", ["vit-tiny", "iresnet18", "mobilefacenet"])
def test_every_backbone_can_be_cut(dataset: Path, backbone: str) -> None:
    content = content_of(
        dataset, backbone={"name": backbone, "width": 1.0}, dataset={"image_size": 32}, optim=OPTIMIZERS["sgd"],
        train={"steps": 4},
    )  # fmt: skip
    whole = {**content, "train": {**content["train"], "strategy": "ddp"}}
    for rank in spawn(run_all, 2, {"parts": content, "whole": whole}, seconds=280):
        assert difference(rank["whole"]["losses"], rank["parts"]["losses"]) < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"train": {"channels_last": True}},
            "train.strategy fsdp cuts parameters along their first dimension, row-major; leave out "
            "train.channels_last, or use strategy ddp",
        ),
        (
            {"train": {"compile": True}},
            "train.strategy fsdp gathers parameters between the blocks, and train.compile makes one program of them; "
            "leave one of the two out",
        ),
        (
            {"train": {"fsdp_gather": "bfloat16"}},
            "train.fsdp_gather bfloat16 is what blocks then compute with, and train.precision is float32; use "
            "precision bfloat16, or leave it out",
        ),
        (
            {"train": {"strategy": "ddp", "fsdp_reshard": False}},
            "train.fsdp_reshard is for train.strategy fsdp, and that is ddp; leave it out",
        ),
    ],
)
def test_what_a_cut_backbone_cannot_do_is_refused(dataset: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        config.validate(content_of(dataset, **options))
    assert str(error.value) == message
