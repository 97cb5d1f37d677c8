"""The DeepSpeed strategy: the numbers of DDP at every stage, in the same checkpoints, with one decision for all.

SGD shows what Adam hides: it follows the size of a gradient, so a gradient divided once too often shows in the losses.
"""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from megaclass import config
from megaclass.data.batch import Batch
from megaclass.errors import ConfigError
from megaclass.observe.journal import read_metrics
from megaclass.optim.rowwise import RowGradient
from megaclass.parallel.process import World
from megaclass.train import build, loop
from tests.support.interrupted import assert_same_to_the_bit, digest, killed_and_continued, start, train_until
from tests.support.spawn import spawn
from tests.support.training import fit_all, small_config, small_dataset, train, train_all

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    # Importing it here would take seconds of every other test run.
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
]
STAGES = (0, 1, 2, 3)
LIMIT = 0.5  # gradients of these runs are longer in most steps, so that nearly all are clipped


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("data") / "tiny")


def content_of(
    dataset: Path, run_dir: Path = Path("never-written"), *, optimizer: str = "sgd", accumulation: int = 1,
    stage: int | None = None, steps: int = 20, ema: float | None = None, lr: float = 0.01, **train_options: Any,
) -> dict[str, Any]:  # fmt: skip
    """A run under DeepSpeed at `stage`, or under DDP for None."""
    strategy = {} if stage is None else {"strategy": "deepspeed", "zero_stage": stage}
    return small_config(
        dataset, run_dir, optim={"name": optimizer, "clip_norm": LIMIT, "ema_decay": ema, "lr": lr},
        train={"steps": steps, "accumulation_steps": accumulation, **strategy, **train_options},
    )  # fmt: skip


def assert_equal_ddp(runs: dict[str, dict[str, Any]], world_size: int = 2) -> None:
    """Each run's losses, norms, class weights and average are those of the DDP run that its name begins with."""
    ranks = spawn(fit_all, world_size, runs, seconds=280)
    for name in runs:
        reference = name.split(" | ")[0]
        for rank in ranks:
            got, expected = rank[name], rank[reference]
            assert len(got["losses"]) == len(expected["losses"])
            for key in ("losses", "norms"):
                for step, (one, two) in enumerate(zip(expected[key], got[key], strict=True)):
                    # A norm that is not finite is that of a step all have left out: float16 begins with some.
                    is_left_out = not math.isfinite(one) and not math.isfinite(two)
                    assert is_left_out or abs(one - two) <= 1e-6 * abs(one), (name, key, step)
            assert float((got["weight"] - expected["weight"]).abs().max()) <= 1e-6
            for key, value in got["average"].items():
                torch.testing.assert_close(value, expected["average"][key], rtol=1e-5, atol=1e-6)
    for reference in {name.split(" | ")[0] for name in runs}:
        assert sum(norm > LIMIT for norm in ranks[0][reference]["norms"]) > 10
        assert ranks[0][reference]["losses"][-1] < 0.99 * ranks[0][reference]["losses"][0]


# Every stage, with SGD and accumulation or AdamW without.
SOME = [(0, "sgd", 2), (1, "adamw", 1), (2, "sgd", 2), (3, "adamw", 1)]
# The engine's own settings and host memory, which change no number.
SETTINGS = {
    "zero_optimization": {
        "reduce_bucket_size": 500,
        "allgather_bucket_size": 500,
        "stage3_param_persistence_threshold": 0,
        "overlap_comm": True,
    }
}
# Of one stage, every optimizer with and without accumulation.
GRID = [
    pytest.param([(stage, name, micro) for name in ("sgd", "adamw") for micro in (1, 2)], marks=pytest.mark.full)
    for stage in STAGES
]


@pytest.mark.parametrize("grid", [SOME, *GRID], ids=["some", *STAGES])
def test_20_steps_equal_ddp(dataset: Path, tmp_path: Path, grid: list[tuple[int, str, int]]) -> None:
    file = tmp_path / "engine.json"
    file.write_text(json.dumps(SETTINGS))
    runs = {}
    for stage, name, micro in grid:
        options: dict[str, Any] = {"optimizer": name, "accumulation": micro}
        runs[f"{name} {micro}"] = content_of(dataset, ema=0.9, **options)
        ema = 0.9 if stage < 3 else None
        runs[f"{name} {micro} | stage {stage}"] = content_of(dataset, stage=stage, ema=ema, **options)
    for more in ({"offload": "all"}, {"deepspeed_config": str(file)}):
        runs[f"sgd 2 | {more}"] = content_of(dataset, stage=3, accumulation=2, **more)
    assert_equal_ddp(runs)


@pytest.mark.full
def test_offloaded_parts_and_settings_of_a_file_change_no_number(dataset: Path, tmp_path: Path) -> None:
    """At every stage that has them; and in bfloat16, float16 and with activations computed again."""
    file = tmp_path / "engine.json"
    file.write_text(json.dumps(SETTINGS))
    runs = {"ddp": content_of(dataset, accumulation=2)}
    for stage, options in (
        (1, {"offload": "optimizer"}), (2, {"offload": "optimizer"}), (3, {"offload": "optimizer"}),
        (1, {"deepspeed_config": str(file)}), (2, {"deepspeed_config": str(file)}),
        (3, {"deepspeed_config": str(file), "activation_checkpointing": True}),
    ):  # fmt: skip
        runs[f"ddp | {stage} {options}"] = content_of(dataset, stage=stage, accumulation=2, **options)
    for precision in ("bfloat16", "float16"):
        runs[precision] = content_of(dataset, precision=precision)
        for stage in STAGES:
            runs[f"{precision} | {stage}"] = content_of(dataset, stage=stage, precision=precision)
    assert_equal_ddp(runs)


@pytest.mark.full
@pytest.mark.parametrize("stages", [(0, 2), (1, 3)])
def test_50_steps_do_not_depend_on_the_world_size(dataset: Path, stages: tuple[int, ...]) -> None:
    # At this rate rounding does not grow within 50 steps: see `small_config`.
    runs = {f"stage {stage}": content_of(dataset, stage=stage, steps=50, lr=0.003) for stage in stages}
    by_size = {size: spawn(fit_all, size, runs, seconds=280) for size in (1, 2, 3, 4)}
    for name in runs:
        expected = by_size[1][0][name]["losses"]
        assert sum(expected[-10:]) < 0.99 * sum(expected[:10])
        for size, ranks in by_size.items():
            for rank in ranks:
                assert rank[name]["losses"] == ranks[0][name]["losses"]
            for step, loss in enumerate(ranks[0][name]["losses"]):
                assert abs(loss - expected[step]) <= 1e-5 * expected[step], (name, size, step)


def _straight_and_stopped(world: World, contents: list[tuple[dict[str, Any], dict[str, Any]]], last: int) -> None:
    assert train_all(world, [straight for straight, _ in contents]) == [0] * len(contents)
    for _, broken in contents:
        train_until(world, broken, last)


@pytest.mark.parametrize("grid", [[(1, "sgd", 2), (3, "adamw", 1)], *GRID], ids=["some", *STAGES])
def test_stopped_and_continued_equals_uninterrupted_to_the_bit(
    dataset: Path, tmp_path: Path, grid: list[tuple[int, str, int]]
) -> None:
    contents, names = [], []
    for stage, name, micro in grid:
        names.append(f"{stage}-{name}-{micro}")
        # Stages that keep whole parameters keep an average of them too.
        options: dict[str, Any] = {
            "stage": stage, "optimizer": name, "accumulation": micro, "steps": 10, "ema": 0.9 if stage < 3 else None,
        }  # fmt: skip
        folder = tmp_path / names[-1]
        contents.append(tuple(content_of(dataset, folder / kind, **options) for kind in ("straight", "broken")))
    spawn(_straight_and_stopped, 2, contents, 5, seconds=280)
    spawn(train_all, 2, [broken for _, broken in contents], seconds=280)
    for name in names:
        straight, broken = tmp_path / name / "straight", tmp_path / name / "broken"
        expected, actual = read_metrics(straight), read_metrics(broken)
        assert {line["attempt"] for line in actual} == {1, 2}
        assert [line["loss_hex"] for line in actual] == [line["loss_hex"] for line in expected], name
        assert digest(broken) == digest(straight), name
        # The evaluation reads the whole backbone, which stage 3 has to gather.
        assert _evaluation(broken) == _evaluation(straight), name


def _evaluation(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "summary.json").read_text())["evaluation"]["trained"]


@pytest.mark.full
def test_killed_and_continued_equals_uninterrupted_to_the_bit(dataset: Path, tmp_path: Path) -> None:
    """A rank is killed with SIGKILL between two checkpoints, and the agent starts both anew."""
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    options: dict[str, Any] = {"stage": 2, "optimizer": "adamw", "steps": 24, "checkpoint_every": 8}
    train(content_of(dataset, straight, **options), 2)
    output = killed_and_continued(content_of(dataset, broken, **options), 2, 11)
    assert_same_to_the_bit(straight, broken)
    assert "[INFO]" not in output, "DeepSpeed talks"
    assert "[WARNING]" not in output


@pytest.mark.parametrize("optimizer", ["sgd", pytest.param("adamw", marks=pytest.mark.full)])
def test_continued_under_other_strategies_and_world_sizes(dataset: Path, tmp_path: Path, optimizer: str) -> None:
    """One run moves from DDP through the stages and back, over 1, 2 and 3 ranks; its losses are those of DDP alone.

    At last it is alone and without a launcher, where the engine has neither a group nor what a launcher sets.
    """
    straight, moved = tmp_path / "straight", tmp_path / "moved"
    options: dict[str, Any] = {"optimizer": optimizer, "steps": 24, "lr": 0.003}
    expected = train(content_of(dataset, straight, **options), 1)
    for world_size, stage, last in ((2, None, 4), (2, 1, 9), (3, 3, 14), (3, None, 19)):
        spawn(train_until, world_size, content_of(dataset, moved, stage=stage, **options), last, seconds=120)
    process = start(content_of(dataset, moved, stage=2, **options), 1)
    output, _ = process.communicate(timeout=250)
    assert process.returncode == 0, output
    assert "[INFO]" not in output, "DeepSpeed talks"
    actual = read_metrics(moved)
    assert [line["world_size"] for line in actual] == [2] * 9 + [3] * 10 + [1] * 5
    for one, two in zip(expected, actual, strict=True):
        assert abs(one["loss"] - two["loss"]) <= 1e-5 * one["loss"], one["step"]
    for name, value in _evaluation(straight)["retrieval"].items():
        assert _evaluation(moved)["retrieval"][name] == pytest.approx(value, rel=1e-4), name


def _poisoned(world: World, contents: list[dict[str, Any]]) -> list[list[str]]:
    """A good step, one with a NaN on rank 1 (in an image, or in its class rows alone), a good one; what has moved.

    Per run: the tensors that moved in the poisoned step, then those that are not finite after the last one.
    """
    return [_poisoned_run(world, content, where) for content in contents for where in ("image", "rows")]


def _poisoned_run(world: World, content: dict[str, Any], where: str) -> list[str]:
    training = build.build(config.validate(content), world)
    batches = iter(training.reader)
    take = training.classifier.take_row_gradient

    def everything() -> dict[str, torch.Tensor]:
        tensors = {f"backbone/{name}": value for name, value in training.strategy.backbone_state().items()}
        tensors |= {f"optimizer/{name}": value for name, value in training.strategy.optimizer_state().items()}
        tensors |= {f"rows/{name}": value for name, value in training.row_optimizer.state.items()}
        tensors["weight"] = training.classifier.weight.detach()
        return {name: value.clone() for name, value in tensors.items()}

    def poisoned() -> Any:
        for batch in batches:
            images = batch.images.clone()
            if where == "image" and world.rank == 1:
                images[0, 0, 0, 0] = torch.nan
            yield Batch(images, batch.labels, batch.ids, batch.position)

    def poisoned_rows() -> RowGradient | None:
        gradient = take()
        assert gradient is not None
        return RowGradient(gradient.rows, gradient.values * torch.nan) if world.rank == 1 else gradient

    assert loop.train_step(training, batches, lambda _: None).is_taken
    before = everything()
    if where == "rows":
        training.classifier.take_row_gradient = poisoned_rows  # type: ignore[method-assign]
    assert not loop.train_step(training, poisoned(), lambda _: None).is_taken
    after = everything()
    training.classifier.take_row_gradient = take  # type: ignore[method-assign]
    assert loop.train_step(training, batches, lambda _: None).is_taken
    last = everything()
    training.reader.close()
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    still = [name for name in before if name.startswith("optimizer") and torch.equal(last[name], after[name])]
    return moved + still + [name for name, value in last.items() if not value.isfinite().all()]


@pytest.mark.parametrize("stages", [(2, 3), pytest.param((0, 1), marks=pytest.mark.full)])
def test_a_step_that_is_not_finite_on_one_rank_moves_nothing_anywhere(dataset: Path, stages: tuple[int, ...]) -> None:
    """Whether the engine sees it itself (in the backbone) or not (in the class rows); the next step is a good one."""
    contents = [content_of(dataset, stage=stage, optimizer="adamw") for stage in stages]
    contents += [content_of(dataset, stage=stage, offload="optimizer") for stage in stages if stage]
    for faults in spawn(_poisoned, 2, contents, seconds=250):
        assert faults == [[]] * 2 * len(contents)


def _refused(world: World, content: dict[str, Any]) -> str:
    try:
        build.build(config.validate(content), world)
    except ConfigError as error:
        return str(error)
    return ""


def test_what_the_engine_refuses_is_a_reason(dataset: Path, tmp_path: Path) -> None:
    file = tmp_path / "engine.json"
    file.write_text('{"zero_optimization": {"reduce_bucket_size": -1}}')
    (said,) = spawn(_refused, 1, content_of(dataset, stage=1, deepspeed_config=str(file)))
    assert "DeepSpeed refuses its settings" in said
    assert "reduce_bucket_size" in said


def _without_deepspeed(world: World, content: dict[str, Any]) -> str:
    import sys

    sys.modules["deepspeed"] = None  # type: ignore[assignment]
    return _refused(world, content)


def test_without_deepspeed_the_error_says_what_to_install(dataset: Path) -> None:
    (said,) = spawn(_without_deepspeed, 1, content_of(dataset, stage=1))
    assert "train.strategy deepspeed needs DeepSpeed, which cannot be imported" in said
    assert "DS_BUILD_OPS=0 pip install 'megaclass[deepspeed]'" in said
