"""Precision, memory and speed of the backbone: what may change no loss changes none, and float16 steps or skips as one.

Whole steps of the real trainer on one and two ranks, against the plain float32 run.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

from megaclass import backbones, checkpoint, config
from megaclass.backbones import Norm, Sizes
from megaclass.errors import ConfigError
from megaclass.parallel.process import World
from megaclass.train import build, loop, state
from megaclass.train.compiled import check_compiler
from megaclass.train.precision import GROWTH_STEPS, LossScaler, set_tf32
from tests.support.spawn import spawn
from tests.support.training import small_config, small_dataset

STEPS = 8
# A rate at which eight steps move the loss, and at which rounding stays rounding.
FAST = {"lr": 0.02, "warmup_steps": 0}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("data") / "tiny")


def content_of(dataset: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    sections["train"] = {"steps": STEPS, **sections.get("train", {})}
    sections["optim"] = {**FAST, **sections.get("optim", {})}
    return small_config(dataset, Path("never-written"), **sections)


def run(world: World, content: dict[str, Any]) -> dict[str, Any]:
    """A run of all its steps on one rank: losses, scales, the backbone's tensors, and the number of all-reduces."""
    training = build.build(config.validate(content), world)
    results: list[loop.StepResult] = []
    scales: list[float] = []

    def after(result: loop.StepResult) -> None:
        results.append(result)
        scales.append(0.0 if training.scaler is None else training.scaler.scale)

    with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
        assert loop.fit(training, loop.Hooks(lambda step: False, lambda batches: None, after))
    training.reader.close()
    return {
        "losses": [float(result.output.loss.detach()) for result in results],
        "norms": [float(result.grad_norm) for result in results],
        "taken": [result.is_taken for result in results],
        "scales": scales,
        "backbone": {name: one.clone() for name, one in training.strategy.backbone_state().items()},
        "weight": training.classifier.weight.detach().clone(),
        "sums": all_reduce.call_count,
    }


def run_all(world: World, contents: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: run(world, content) for name, content in contents.items()}


RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "channels last": {"train": {"channels_last": True}},
    "recomputed": {"train": {"activation_checkpointing": True}},
    "plain, accumulated": {"train": {"accumulation_steps": 2}},
    "recomputed, accumulated": {"train": {"accumulation_steps": 2, "activation_checkpointing": True}},
    "plain, local": {"backbone": {"batch_norm": "local"}},
    "recomputed, local": {"backbone": {"batch_norm": "local"}, "train": {"activation_checkpointing": True}},
    "float16": {"train": {"precision": "float16", "loss_scale": 1024.0}},
    "float16, recomputed": {"train": {"precision": "float16", "loss_scale": 1024.0, "activation_checkpointing": True}},
    "bfloat16, channels last": {"train": {"precision": "bfloat16", "channels_last": True}},
    "float16, learned bias": {
        "train": {"precision": "float16", "loss_scale": 1024.0},
        "classifier": {"preset": "sphereface2"},
    },
    "plain, learned bias": {"classifier": {"preset": "sphereface2"}},
    "overflow": {"train": {"precision": "float16", "loss_scale": 2.0**30, "non_finite_limit": 100, "steps": 25}},
}


@pytest.fixture(scope="module")
def runs(dataset: Path) -> dict[int, list[dict[str, dict[str, Any]]]]:
    contents = {name: content_of(dataset, **sections) for name, sections in RUNS.items()}
    for content in contents.values():
        if content["classifier"]["preset"] == "sphereface2":
            content["classifier"] |= {"sampling_rate": None}
    return {size: spawn(run_all, size, contents) for size in (1, 2)}


def relative(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) / abs(a) for a, b in zip(one, other, strict=True))


@pytest.mark.distributed
@pytest.mark.parametrize("size", [1, 2])
def test_channels_last_changes_rounding_alone(runs: dict[int, list[dict[str, Any]]], size: int) -> None:
    plain, moved = runs[size][0]["plain"], runs[size][0]["channels last"]
    assert relative(plain["losses"], moved["losses"]) < 1e-5
    assert plain["losses"][-1] < 0.95 * plain["losses"][0]
    assert plain["backbone"].keys() == moved["backbone"].keys()
    kernels = [one for one in moved["backbone"].values() if one.ndim == 4]
    assert kernels
    assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)


@pytest.mark.distributed
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(
    ("plain", "recomputed"),
    [
        ("plain", "recomputed"),
        ("plain, accumulated", "recomputed, accumulated"),
        ("plain, local", "recomputed, local"),
        ("float16", "float16, recomputed"),
    ],
)
def test_recomputing_changes_not_a_bit_and_sends_nothing_more(
    runs: dict[int, list[dict[str, Any]]], size: int, plain: str, recomputed: str
) -> None:
    for rank in runs[size]:
        one, other = rank[plain], rank[recomputed]
        assert one["losses"] == other["losses"]
        for name, tensor in one["backbone"].items():  # running statistics among them: each batch counts once
            assert torch.equal(tensor, other["backbone"][name]), name
        assert torch.equal(one["weight"], other["weight"])
        assert one["sums"] == other["sums"]


@pytest.mark.distributed
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(("exact", "low"), [("plain", "float16"), ("plain, learned bias", "float16, learned bias")])
def test_float16_learns_as_float32_does(runs: dict[int, list[dict[str, Any]]], size: int, exact: str, low: str) -> None:
    one, other = runs[size][0][exact], runs[size][0][low]
    assert one["losses"] != other["losses"]
    assert all(other["taken"])
    # float16 has eleven bits. A gradient that kept the scale would be 1,024 times too large.
    assert relative(one["losses"], other["losses"]) < 5e-3
    assert relative(one["norms"], other["norms"]) < 5e-2
    assert float((one["weight"] - other["weight"]).abs().max()) < 2e-2 * float(one["weight"].abs().max())
    for rank in runs[size]:
        assert rank[low]["losses"] == other["losses"]
        assert rank[low]["scales"] == [1024.0] * STEPS


@pytest.mark.distributed
@pytest.mark.parametrize("size", [1, 2])
def test_bfloat16_goes_with_channels_last(runs: dict[int, list[dict[str, Any]]], size: int) -> None:
    ranks = runs[size]
    assert relative(ranks[0]["plain"]["losses"], ranks[0]["bfloat16, channels last"]["losses"]) < 3e-2


@pytest.mark.distributed
@pytest.mark.parametrize("size", [1, 2])
def test_an_overflow_skips_on_all_ranks_and_halves_the_scale(runs: dict[int, list[dict[str, Any]]], size: int) -> None:
    ranks = [rank["overflow"] for rank in runs[size]]
    first = ranks[0]
    num_skipped = first["taken"].index(True)
    assert 0 < num_skipped < 20
    assert first["taken"] == [False] * num_skipped + [True] * (25 - num_skipped)
    scales = [2.0 ** (30 - min(step + 1, num_skipped)) for step in range(25)]
    for rank in ranks:
        assert (rank["taken"], rank["scales"]) == (first["taken"], scales)
        assert all(torch.equal(one, rank["backbone"][name]) for name, one in first["backbone"].items())
    assert first["losses"][-1] < first["losses"][num_skipped]


def _stops_and_goes_on(world: World, content: dict[str, Any], folder: Path) -> list[Any]:
    """Losses and tensors at the end: straight through, and through a checkpoint on the disk after half of the steps."""
    straight = run(world, content)
    training = build.build(config.validate(content), world)
    batches, losses = iter(training.reader), []

    def step() -> None:
        nonlocal training
        result = loop.train_step(training, batches, lambda _: None)
        training.step += 1
        training.position = result.batches[-1].position
        losses.append(float(result.output.loss.detach()))

    for _ in range(STEPS // 2):
        step()
    shard = training.classifier.shard
    path = checkpoint.save(folder, state.take(training, 1, {}), shard, world, keep=2)
    training.reader.close()
    training = build.build(config.validate(content), world)
    state.restore(training, checkpoint.load(path, shard))
    batches = iter(training.reader)
    for _ in range(STEPS // 2):
        step()
    training.reader.close()
    same = {
        name: torch.equal(one, straight["backbone"][name]) for name, one in training.strategy.backbone_state().items()
    }
    scale = 0.0 if training.scaler is None else training.scaler.scale
    return [straight["losses"] == losses, same, straight["scales"][-1] == scale, straight["taken"]]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("train", "optim"),
    [
        # The scale of 2^15 overflows in some steps before the checkpoint.
        ({"precision": "float16", "loss_scale": 2.0**15, "channels_last": True}, {"name": "sgd"}),
        ({"channels_last": True}, {"name": "adamw"}),
    ],
)
def test_a_run_goes_on_to_the_bit(dataset: Path, tmp_path: Path, train: dict[str, Any], optim: dict[str, Any]) -> None:
    """Kernels and their moments lie channels last in memory, and row-major in the file."""
    content = content_of(dataset, train=train, optim=optim)
    for losses, backbone, scale, taken in spawn(_stops_and_goes_on, 2, content, tmp_path):
        assert losses
        assert all(backbone.values()), backbone
        assert scale
        assert any(taken[: STEPS // 2])
        assert ("precision" in train) == (not all(taken))


def test_the_scale_doubles_after_many_good_steps() -> None:
    scaler = LossScaler(8.0)
    for _ in range(GROWTH_STEPS - 1):
        scaler.record(True)
    scaler.record(False)
    assert (scaler.scale, scaler.num_good) == (4.0, 0)
    for _ in range(GROWTH_STEPS):
        assert scaler.scale == 4.0
        scaler.record(True)
    other = LossScaler(1.0)
    other.load_state(scaler.state())
    assert (other.scale, other.num_good) == (8.0, 0)


def _one_convolution(sizes: Sizes, norm: Norm) -> nn.Module:
    """The least that has everything a compiler sees in a backbone: a tenth of the time to compile `tiny`."""
    return nn.Sequential(
        nn.Conv2d(sizes.channels, 4, 3, stride=4), norm(4, 2), nn.SiLU(), nn.Flatten(),
        nn.Linear(4 * 4 * 4, sizes.dim), norm(sizes.dim, 0, learn_scale=False),
    )  # fmt: skip


def _run_one_convolution(world: World, contents: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    backbones.register("one-convolution")(_one_convolution)
    return run_all(world, contents)


def _assert_compiled_alike(dataset: Path, sections: dict[str, Any], bound: float) -> None:
    contents = {
        name: content_of(dataset, **{**sections, "train": {**sections.get("train", {}), "compile": name == "compiled"}})
        for name in ("plain", "compiled")
    }
    for rank in spawn(_run_one_convolution, 2, contents, seconds=290):
        plain, compiled = rank["plain"], rank["compiled"]
        assert 0 < relative(plain["losses"], compiled["losses"]) < bound
        # Names without a prefix, and nothing in the running statistics of the pass that made the program.
        assert compiled["backbone"].keys() == plain["backbone"].keys()
        for name, tensor in plain["backbone"].items():
            torch.testing.assert_close(compiled["backbone"][name], tensor, rtol=100 * bound, atol=10 * bound)


@pytest.mark.distributed
@pytest.mark.slow
def test_a_compiled_backbone_gives_the_same_under_the_same_names(dataset: Path) -> None:
    check_compiler(torch.device("cpu"))
    backbone = {"name": "one-convolution", "width": 1.0, "batch_norm": "local"}
    _assert_compiled_alike(dataset, {"backbone": backbone}, 1e-5)


@pytest.mark.full
@pytest.mark.distributed
@pytest.mark.parametrize("batch_norm", ["local", "sync"])
@pytest.mark.parametrize("train", [{}, {"precision": "bfloat16"}, {"channels_last": True}, {"accumulation_steps": 2}])
def test_compiled_with_everything_else(dataset: Path, train: dict[str, Any], batch_norm: str) -> None:
    """Synchronised batch norm: the program is cut at every one."""
    sections = {"backbone": {"batch_norm": batch_norm}, "train": train}
    _assert_compiled_alike(dataset, sections, 2e-2 if "precision" in train else 1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"train": {"precision": "float16"}, "optim": {"row_update": "fused", "clip_norm": None}},
            "train.precision float16 multiplies the loss by a scale, and optim.row_update fused writes class rows "
            "before their gradient can be divided by it; use precision bfloat16 or optim.row_update deferred",
        ),
        (
            {"train": {"precision": "bfloat16", "loss_scale": 1024.0}},
            "train.loss_scale 1024 is for train.precision float16, and that is bfloat16; leave it out",
        ),
        (
            {"train": {"precision": "float64", "tf32": True}},
            "train.tf32 is for products of float32, and train.precision float64 has none; leave it out",
        ),
        (
            {"train": {"compile": True, "activation_checkpointing": True}},
            "train.compile sees the whole backbone as one program and decides itself what backward computes again; "
            "leave out train.activation_checkpointing, or train.compile",
        ),
    ],
)
def test_what_cannot_be_had_together_is_refused(dataset: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        config.validate(content_of(dataset, **options))
    assert str(error.value) == message


def test_what_the_machine_lacks_is_refused(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = World(0, 1, 0, torch.device("cpu"), None, None)
    with pytest.raises(ConfigError, match=r"train\.tf32 is for CUDA devices, and this run is on cpu; leave it out"):
        build.build(config.validate(content_of(dataset, train={"tf32": True})), alone)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        ConfigError, match=r"needs a C\+\+ compiler on a CPU, and there is no no-such-compiler; install"
    ):
        build.build(config.validate(content_of(dataset, train={"compile": True})), alone)
    assert shutil.which("no-such-compiler") is None


def test_tf32_is_set_by_one_of_torchs_two_interfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one was written and the other is read, torch raises."""
    cuda, mode = torch.device("cuda", 0), torch.get_float32_matmul_precision()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    try:
        for is_on in (True, False):
            set_tf32(config.Train(tf32=is_on), cuda)
            for matmul, convolution in (
                (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32),
                (
                    torch.backends.cuda.matmul.fp32_precision == "tf32",
                    torch.backends.cudnn.conv.fp32_precision == "tf32",
                ),
            ):
                assert (matmul, convolution) == (is_on, is_on)
    finally:
        torch.set_float32_matmul_precision(mode)
        torch.backends.cudnn.allow_tf32 = True
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "V100")
    with pytest.raises(ConfigError, match=r"compute capability 8\.0 \(Ampere\) or newer, and V100 has 7\.0; leave it"):
        set_tf32(config.Train(tf32=True), cuda)
