"""How class rows are stored and updated, in the steps of the real trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megaclass import config
from megaclass.data.batch import Batch
from megaclass.errors import ConfigError, NumericError
from megaclass.parallel.process import World
from megaclass.train import build, loop
from tests.support.spawn import spawn
from tests.support.training import fit_all, small_config, small_dataset

STEPS = 6
LOSSES: dict[str, dict[str, Any]] = {
    "random rows": {"preset": "d-softmax-k", "batch_positives": False, "sampling_rate": 0.2},
    "batch positives": {"preset": "d-softmax-k", "sampling_rate": 0.2},
    "all rows": {"preset": "d-softmax", "sampling_rate": None},
    "part of the batch": {"preset": "d-softmax-b", "sampling_rate": 0.2},
    "sub-centres": {"preset": "partial-fc", "sub_centres": 2, "sampling_rate": 0.3},
    "learned bias": {"preset": "sphereface2", "sampler": "classes", "correction": "inverse-rate", "sampling_rate": 0.3},
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"class_name": "sgd"},
    "sgd, low momentum": {"class_name": "sgd", "row_momentum_dtype": "bfloat16"},
    "adamw": {"class_name": "adamw", "class_lr": 0.01},
    "adagrad": {"class_name": "adagrad", "class_lr": 0.01},
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("data") / "tiny")


def content_of(dataset: Path, loss: str, optimizer: str, row_dtype: str, **optim: Any) -> dict[str, Any]:
    options = {"lr": 0.1, "warmup_steps": 0, "ema_decay": None, "clip_norm": None, **OPTIMIZERS[optimizer], **optim}
    return small_config(
        dataset, Path("never-written"), train={"steps": STEPS}, optim=options,
        classifier={"scale": 16, "row_dtype": row_dtype, **LOSSES[loss]},
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(dataset: Path) -> dict[int, list[dict[str, dict[str, Any]]]]:
    """World size -> rank -> name -> what the run gave."""
    contents = {
        f"{loss}/{optimizer}/{row_dtype}/{update}": content_of(dataset, loss, optimizer, row_dtype, row_update=update)
        for loss in LOSSES
        for optimizer in OPTIMIZERS
        for row_dtype in ("float32", "bfloat16")
        for update in ("deferred", "fused")
        if loss == "batch positives" or optimizer == "sgd"
    }
    contents["dense"] = content_of(dataset, "batch positives", "sgd", "float32", untouched_rows="dense")
    return {world_size: spawn(fit_all, world_size, contents, seconds=250) for world_size in (1, 2, 3)}


def whole(ranks: list[dict[str, dict[str, Any]]], name: str) -> Tensor:
    return torch.cat([rank[name]["weight"] for rank in ranks])


@pytest.mark.distributed
def test_rows_written_in_the_backward_pass_are_those_written_after_it(
    runs: dict[int, list[dict[str, dict[str, Any]]]],
) -> None:
    """To the bit, for every loss, optimizer and type, at every world size."""
    names = [name for name in runs[1][0] if name.endswith("/deferred")]
    assert len(names) == 18
    for ranks in runs.values():
        for name in names:
            fused = name.replace("deferred", "fused")
            assert ranks[0][name]["losses"] == ranks[0][fused]["losses"], name
            assert torch.equal(whole(ranks, name), whole(ranks, fused)), name


@pytest.mark.distributed
def test_world_sizes_agree(runs: dict[int, list[dict[str, dict[str, Any]]]]) -> None:
    """Within rounding: that of float32, and that of bfloat16 for rows stored so."""
    for name, one in runs[1][0].items():
        is_low = "/bfloat16/" in name
        assert one["weight"].dtype == (torch.bfloat16 if is_low else torch.float32)
        for size in (2, 3):
            other, weight = runs[size][0][name], whole(runs[size], name).float()
            # An embedding that differs by 1e-7 may be rounded to another bfloat16: measured up to 6e-4.
            for first, second in zip(one["losses"], other["losses"], strict=True):
                assert abs(first - second) <= (1e-3 if is_low else 1e-5) * abs(first), (name, size)
            if is_low:
                apart = float((weight - one["weight"].float()).norm() / one["weight"].float().norm())
                assert apart < 2**-8, (name, size)
            else:
                # A momentum that is rounded the other way differs by 2^-8 of itself, and its row by a tenth of that.
                bound = 1e-3 if "low momentum" in name else 1e-4
                assert float((weight - one["weight"]).abs().max()) < bound * float(one["weight"].abs().max()), name


@pytest.mark.distributed
def test_bfloat16_rows_learn_like_float32_ones(runs: dict[int, list[dict[str, dict[str, Any]]]]) -> None:
    for loss in LOSSES:
        exact, low = (runs[1][0][f"{loss}/sgd/{dtype}/fused"]["losses"] for dtype in ("float32", "bfloat16"))
        assert low[-1] < low[0]
        assert exact != low
        for first, second in zip(exact, low, strict=True):
            assert abs(first - second) < 0.03 * abs(first)


@pytest.mark.distributed
def test_dense_rows_go_on_moving(runs: dict[int, list[dict[str, dict[str, Any]]]]) -> None:
    assert not torch.equal(runs[1][0]["dense"]["weight"], runs[1][0]["batch positives/sgd/float32/deferred"]["weight"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"optim": {"row_update": "fused", "clip_norm": 5.0}},
            "optim.row_update fused writes class rows before their norm is known, so optim.clip_norm 5.0 cannot hold "
            "for them; use optim.clip_norm null or optim.row_update deferred",
        ),
        (
            {"optim": {"row_update": "fused", "clip_norm": None}, "train": {"accumulation_steps": 2}},
            "optim.row_update fused writes class rows after every micro-batch, and train.accumulation_steps is 2; "
            "use 1 or optim.row_update deferred",
        ),
        (
            {"optim": {"row_update": "fused", "clip_norm": None, "untouched_rows": "dense"}},
            "optim.row_update fused sees only rows that have a gradient; use optim.untouched_rows lazy or "
            "optim.row_update deferred",
        ),
        (
            {"optim": {"class_name": "adamw", "row_momentum_dtype": "bfloat16"}},
            "optim.row_momentum_dtype bfloat16 is for optim.class_name sgd with momentum; leave it out",
        ),
        (
            {"train": {"precision": "float64"}, "classifier": {"row_dtype": "bfloat16"}},
            "train.precision float64 keeps class rows and momentum in float64; take bfloat16 out",
        ),
    ],
)
def test_what_cannot_be_right_is_refused(dataset: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        config.validate(small_config(dataset, Path("never-written"), **options))
    assert str(error.value) == message


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_fused_step_that_is_not_finite(dataset: Path, where: str) -> None:
    """Seen in the loss, nothing moves; seen in the backbone's gradient alone, the rows have moved and the run ends."""
    content = content_of(dataset, "batch positives", "sgd", "float32", row_update="fused")
    training = build.build(config.validate(content), World(0, 1, 0, torch.device("cpu"), None, None))
    batches = iter(training.reader)

    def poisoned() -> Any:
        for batch in batches:
            yield Batch(batch.images * torch.nan, batch.labels, batch.ids, batch.position)

    before = training.classifier.weight.detach().clone()
    if where == "forward":
        assert not loop.train_step(training, poisoned(), lambda _: None).is_taken
        assert torch.equal(before, training.classifier.weight)
    else:
        parameter = next(iter(training.strategy.backbone.parameters()))
        parameter.register_hook(lambda gradient: gradient * torch.nan)
        with pytest.raises(NumericError, match="gradient is not finite although the loss is, and with"):
            loop.train_step(training, batches, lambda _: None)
    training.reader.close()
