"""Faults inside a run: skipped steps leave nothing behind, evaluations judge what is saved, failures are recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megaclass import config
from megaclass.cli import main
from megaclass.data.batch import Batch
from megaclass.observe.journal import replayed_steps
from megaclass.parallel.process import World
from megaclass.train import build, loop
from tests.support.interrupted import start
from tests.support.spawn import spawn
from tests.support.training import small_config, small_dataset, train


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("data") / "tiny")


def _poisoned_step(world: World, content: dict[str, Any]) -> dict[str, bool]:
    """One good step, then one whose images hold a NaN on rank 1 only; what moved in the second."""
    training = build.build(config.validate(content), world)
    batches = iter(training.reader)

    def everything() -> dict[str, torch.Tensor]:
        tensors = {f"backbone/{name}": value for name, value in training.strategy.backbone.state_dict().items()}
        tensors |= {f"optimizer/{name}": value for name, value in training.strategy.optimizer_state().items()}
        tensors |= {f"rows/{name}": value for name, value in training.row_optimizer.state.items()}
        assert training.average is not None
        tensors |= {f"average/{name}": value for name, value in training.average.state_dict().items()}
        tensors["weight"] = training.classifier.weight.detach()
        return {name: value.clone() for name, value in tensors.items()}

    def poisoned() -> Any:
        for batch in batches:
            images = batch.images.clone()
            if world.rank == 1:
                images[0, 0, 0, 0] = torch.nan
            yield Batch(images, batch.labels, batch.ids, batch.position)

    assert loop.train_step(training, batches, lambda _: None).is_taken
    before = everything()
    assert not loop.train_step(training, poisoned(), lambda _: None).is_taken
    after = everything()
    training.reader.close()
    return {name: torch.equal(before[name], after[name]) for name in before}


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_step_that_is_not_finite_on_one_rank_moves_nothing_anywhere(dataset: Path, tmp_path: Path, name: str) -> None:
    """Not a weight, a moment, a running mean or an average: peers let one rank step and the replicas drift apart."""
    content = small_config(dataset, tmp_path, optim={"name": name, "class_name": name})
    for unchanged in spawn(_poisoned_step, 2, content):
        assert all(unchanged.values()), [key for key, same in unchanged.items() if not same]


def test_too_many_skipped_steps_end_the_run(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = small_config(dataset, tmp_path / "run", train={"non_finite_limit": 3})
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    monkeypatch.setattr(loop, "joint_norm", lambda *_: torch.tensor(torch.nan))
    assert main(["train", str(path)]) == 5
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["exit_code"], summary["step"]) == ("failed", 5, 3)
    assert json.loads((tmp_path / "run" / "outcome.json").read_text())["code"] == 5


@pytest.mark.distributed
def test_evaluation_during_training_judges_what_is_saved(dataset: Path, tmp_path: Path) -> None:
    """Local batch norm with a moving average: each rank has buffers of its own, and rank 0's are the ones saved."""
    run_dir = tmp_path / "run"
    content = small_config(
        dataset, run_dir, backbone={"batch_norm": "local"}, optim={"lr": 0.05, "ema_decay": 0.9},
        train={"steps": 30}, evaluate={"protocols": ["retrieval"]},
    )  # fmt: skip
    train(content, world_size=2)
    reported = json.loads((run_dir / "summary.json").read_text())["evaluation"]["trained"]["retrieval"]
    from megaclass.train.trained import judge_run

    again = judge_run(
        run_dir, data=None, split=None, protocols=None, gallery_source=None, checkpoint=None, batch_size=256,
        baselines=False, device="cpu",
    )  # fmt: skip
    assert again["trained"]["retrieval"] == pytest.approx(reported, abs=1e-6)


def test_what_happens_while_judging_does_not_cost_the_trained_network(dataset: Path, tmp_path: Path) -> None:
    content = small_config(dataset, tmp_path / "run", train={"steps": 6}, evaluate={"protocols": ["one-shot"]})
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    assert main(["train", str(path)]) == 3  # no group has twenty classes
    assert (tmp_path / "run" / "checkpoints" / "step-000000006" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"evaluate": {"protocols": ["verification"], "every": 2}},
            "evaluate.best_metric 'retrieval.recall_at_1' is not",
        ),
        ({"train": {"global_batch_size": 1}}, "leaves batch norm (sync) one sample at a time"),
        ({"train": {"accumulation_steps": 36}, "backbone": {"batch_norm": "local"}}, "leaves batch norm (local) one"),
        ({"train": {"steps": None, "epochs": 1}, "optim": {"warmup_steps": 6}}, "leaves nothing of the 6 steps"),
    ],
)
def test_found_before_training(
    dataset: Path, tmp_path: Path, options: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(small_config(dataset, tmp_path / "run", **options)))
    assert main(["train", str(path)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "options", [{"backbone": {"name": "iresnet5", "width": 1.0}}, {"classifier": {"preset": "arcface", "margin": 3}}]
)
def test_a_dry_run_refuses_what_the_run_refuses(dataset: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    content = small_config(dataset, tmp_path / "run", **options)
    if "classifier" in options:
        content["classifier"] = options["classifier"]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    assert main(["train", str(path), "--dry-run"]) == main(["train", str(path)]) == 2


def test_replayed_steps_are_counted_once() -> None:
    attempts = [{"attempt": 1, "start_step": 0}, {"attempt": 2, "start_step": 8}, {"attempt": 3, "start_step": 8}]
    metrics = [{"attempt": 1, "step": 11}, {"attempt": 2, "step": 20}, {"attempt": 1, "step": 10}]
    # 11 -> 8, 20 -> 8, nothing logged in the third, which saved at 8.
    assert replayed_steps(attempts, metrics, attempt=4, start_step=8) == 3 + 12
    assert replayed_steps([], [], attempt=1, start_step=0) == 0


@pytest.mark.distributed
@pytest.mark.slow
def test_a_fault_of_one_rank_while_starting_ends_both_alike(dataset: Path, tmp_path: Path) -> None:
    """Two ranks on one GPU too few, or on none: a configuration error on all, told once, without a restart."""
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    content = small_config(dataset, tmp_path / "run", train={"device": "cuda"})
    process = start(content, 2)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 2, output
    assert "torch finds no CUDA device here" in output
    assert "Traceback" not in output


def _slow_scoring(world: World) -> tuple[Any, float]:
    """Rank 0 scores for twice as long as a collective may take; then both meet in a collective of that group."""
    import dataclasses
    import time
    from datetime import timedelta

    import torch.distributed as dist

    from megaclass.evaluate.embed import score_on_main
    from megaclass.parallel.collectives import sum_over_ranks

    group = dist.new_group(timeout=timedelta(seconds=2))
    world = dataclasses.replace(world, group=group)

    def score() -> dict[str, float]:
        time.sleep(4)
        return {"share": 0.5}

    return score_on_main(world, "slow", score), float(sum_over_ranks(torch.ones(1), group))


@pytest.mark.distributed
@pytest.mark.slow
def test_scoring_may_outlast_the_limit_of_a_collective() -> None:
    assert spawn(_slow_scoring, 2) == [({"share": 0.5}, 2.0)] * 2


def _shards_of_two_nodes(world: World, content: dict[str, Any]) -> tuple[int, int]:
    """As on two nodes with one process each: every rank is the first of its node."""
    import dataclasses

    two_nodes = dataclasses.replace(world, local_rank=0)
    resolved = config.validate(content)
    reader = build.build_reader(resolved, two_nodes)
    classifier, _ = build.build_classifier(resolved, two_nodes, reader, world.size)
    reader.close()
    return classifier.shard.start, classifier.shard.stop


@pytest.mark.distributed
def test_shards_follow_the_rank_and_not_the_place_within_a_node(dataset: Path, tmp_path: Path) -> None:
    """A peer pairs the local rank with the global world size: the second node repeats the first's classes."""
    assert spawn(_shards_of_two_nodes, 2, small_config(dataset, tmp_path)) == [(0, 19), (19, 37)]
