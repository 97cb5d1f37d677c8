"""What a loss carries from step to step is in the checkpoint: running state, learned bias, sub-centres, neighbours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megaclass import checkpoint, config
from megaclass.errors import CheckpointError
from megaclass.parallel.process import World
from megaclass.train import build, loop, state
from tests.support.checkpoints import ALONE
from tests.support.spawn import spawn
from tests.support.training import small_config, small_dataset, train

STEPS, STOP = 16, 7
# Neighbours are searched at steps 0, 6 and 12 and seen 3 steps later, so that the stop falls into a search.
LOSSES: dict[str, dict[str, Any]] = {
    "running state, sub-centres": {"preset": "curricularface", "sub_centres": 2},
    "learned bias": {"preset": "sphereface2", "sampler": "classes", "sampling_rate": 0.3},
    "hard negatives, sub-centres": {
        "preset": "d-softmax", "sampler": "hard", "sampling_rate": 0.1, "num_neighbours": 3, "rebuild_every": 6,
        "sub_centres": 2,
    },
    "random margins, norms": {"preset": "elasticface-arc"},
}  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("data") / "tiny")


def content_for(dataset: Path, classifier: dict[str, Any], **optim: Any) -> dict[str, Any]:
    content = small_config(
        dataset, Path("never-written"), train={"steps": STEPS, "precision": "float64"},
        optim={"lr": 0.1, "warmup_steps": 0, "ema_decay": None, **optim},
    )  # fmt: skip
    content["classifier"] = {"scale": 16, **classifier}
    return content


def part(world: World, content: dict[str, Any], folder: Path, first: int, last: int) -> dict[str, Any]:
    """Steps `first` to `last` of a run, from the checkpoint in `folder` and to one there, unless it starts or ends."""
    training = build.build(config.validate(content), world)
    losses: list[float] = []
    try:
        if first:
            path = checkpoint.find_latest(folder)
            assert path is not None
            state.restore(training, checkpoint.load(path, training.classifier.shard))
        assert training.step == first
        hooks = loop.Hooks(
            lambda step: step >= last, lambda batches: None,
            lambda result: losses.append(float(result.output.loss.detach())),
        )  # fmt: skip
        loop.fit(training, hooks)
        assert training.step == last
        if last < STEPS:
            checkpoint.save(folder, state.take(training, 1, {}), training.classifier.shard, world, keep=2)
        snapshot = state.take(training, 1, {})
    finally:
        training.reader.close()
    tensors = {**snapshot.replicated, **snapshot.sharded}
    return {"losses": losses, "tensors": {name: tensor.clone() for name, tensor in tensors.items()}}


def several(world: World, contents: dict[str, dict[str, Any]], folder: Path, first: int, last: int) -> dict[str, Any]:
    return {name: part(world, content, folder / name, first, last) for name, content in contents.items()}


@pytest.fixture(scope="module")
def straight(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    contents = {name: content_for(dataset, options) for name, options in LOSSES.items()}
    return several(ALONE, contents, tmp_path_factory.mktemp("straight"), 0, STEPS)


@pytest.fixture(scope="module")
def stopped(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of all losses, stopped in the middle on one rank."""
    folder = tmp_path_factory.mktemp("stopped")
    several(ALONE, {name: content_for(dataset, options) for name, options in LOSSES.items()}, folder, 0, STOP)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_continued_equals_uninterrupted_to_the_bit(
    dataset: Path, straight: dict[str, dict[str, Any]], stopped: Path, name: str
) -> None:
    continued = part(ALONE, content_for(dataset, LOSSES[name]), stopped / name, STOP, STEPS)
    assert continued["losses"] == straight[name]["losses"][STOP:]
    assert continued["tensors"].keys() == straight[name]["tensors"].keys()
    for key, tensor in straight[name]["tensors"].items():
        assert torch.equal(continued["tensors"][key], tensor), key


@pytest.mark.slow
@pytest.mark.distributed
def test_continued_on_two_ranks_agrees(dataset: Path, straight: dict[str, dict[str, Any]], stopped: Path) -> None:
    contents = {name: content_for(dataset, options) for name, options in LOSSES.items()}
    for rank in spawn(several, 2, contents, stopped, STOP, STEPS, seconds=200):
        for name, expected in straight.items():
            for one, other in zip(expected["losses"][STOP:], rank[name]["losses"], strict=True):
                assert abs(one - other) <= 1e-9 * abs(one), name


def test_the_checkpoint_holds_what_the_loss_carries(stopped: Path) -> None:
    """And it matters: each of these has moved from where a new run begins."""
    found = {}
    for name in LOSSES:
        path = checkpoint.find_latest(stopped / name)
        assert path is not None
        snapshot = checkpoint.load(path, build.ClassShard(37, 0, 1))
        found[name] = {**snapshot.replicated, **snapshot.sharded}
    assert float(found["running state, sub-centres"]["loss/state"]) != 0.0
    assert found["running state, sub-centres"]["class_weight"].shape == (37, 2, 16)
    assert bool(found["learned bias"]["loss/bias_optimizer/momentum"].any())
    hard = found["hard negatives, sub-centres"]
    assert int(hard["loss/neighbours_count_from"]) == 9
    assert bool((hard["neighbours/neighbours"] >= 0).all())
    assert bool((hard["neighbours/upcoming"] >= 0).all())
    assert not torch.equal(hard["neighbours/neighbours"], hard["neighbours/upcoming"])


PLAIN = {"preset": "arcface"}


@pytest.mark.parametrize(
    ("saved", "other", "message"),
    [
        ("running state, sub-centres", {**PLAIN, "sub_centres": 2}, "loss is not this run's: loss/state; start in a"),
        ("random margins, norms", {"preset": "curricularface"}, "loss is not this run's: loss/state; start in a"),
        ("learned bias", PLAIN, "loss is not this run's: loss/bias, loss/bias_optimizer/momentum; start in a new"),
        ("hard negatives, sub-centres", {**PLAIN, "sub_centres": 2}, "loss is not this run's: loss/neighbours_count_"),
        ("random margins, norms", {**PLAIN, "sub_centres": 2}, r"class_weight has shape \[37, 16\] in the checkpoint "),
    ],
)
def test_a_state_of_another_loss_is_refused(
    dataset: Path, stopped: Path, saved: str, other: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        part(ALONE, content_for(dataset, other), stopped / saved, STOP, STEPS)


def test_a_run_of_another_loss_is_refused_with_the_difference(dataset: Path, tmp_path: Path) -> None:
    content = content_for(dataset, {"preset": "curricularface"})
    content["run"]["dir"] = str(tmp_path / "run")
    content["train"]["steps"] = 2
    content["evaluate"] = {"protocols": []}
    train(content)
    content["classifier"]["preset"] = "arcface"
    message = r"was trained with another configuration: classifier\.preset: curricularface -> arcface; give the old"
    with pytest.raises(AssertionError, match=message):
        train(content)
