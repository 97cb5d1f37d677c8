"""Embeddings that are gathered in slices: the same loss, one all-gather a slice, and a slice is what a rank is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megaclass import config
from megaclass.errors import ConfigError
from megaclass.parallel.process import World
from megaclass.plan import find, forecast
from megaclass.train import build
from tests.distributed.test_oracle import compare, run_case
from tests.distributed.test_traffic import BATCH, WORLD_SIZE, _record
from tests.support.cases import DIM, Case
from tests.support.spawn import spawn
from tests.support.training import fit_all, small_config, small_dataset

# Entangled and dissected, drawn rows, lengths of embeddings, a running state, a bias, sub-centres.
CASES = [
    Case("d-softmax", 13, BATCH, "any", monitor=True),
    Case("d-softmax-k", 13, BATCH, "first"),
    Case("partial-fc", 1003, BATCH, "any"),
    Case("adaface", 13, BATCH, "any"),
    Case("curricularface", 13, BATCH, "any"),
    Case("sphereface2", 13, BATCH, "any"),
    Case("arcface", 3, BATCH, "any", rows_per_class=2),
    Case("d-softmax-b", 13, BATCH, "any"),
]


def _in_slices(world: World, num_slices: int) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    return [(run_case(world, case), run_case(world, case, num_slices)) for case in CASES]


@pytest.mark.distributed
@pytest.mark.parametrize(("world_size", "num_slices"), [(1, 3), (2, 3), (3, 5), (4, 2)])
def test_the_loss_and_all_gradients_are_those_of_the_whole_batch(world_size: int, num_slices: int) -> None:
    """Five samples in three slices of 2, 2 and 1, in five of one, in two of 3 and 2; to the bit, and as the oracle."""
    ranks = spawn(_in_slices, world_size, num_slices)
    for place, case in enumerate(CASES):
        compare(case, [rank[place][1] for rank in ranks])
        for rank in ranks:
            whole, sliced = rank[place]
            for name, value in whole.items():
                is_same = value is None or torch.equal(sliced[name].nan_to_num(), value.nan_to_num())
                assert is_same, (name, case)


@pytest.mark.distributed
@pytest.mark.parametrize("preset", ["d-softmax", "partial-fc"])
def test_each_slice_takes_one_all_gather_and_nothing_else_changes(preset: str) -> None:
    case = Case(preset, 13, BATCH, "any")
    whole, sliced = (spawn(_record, WORLD_SIZE, case, num_slices) for num_slices in (1, 3))
    for before, after in zip(whole, sliced, strict=True):
        place = before.index(("all-gather", BATCH * DIM))
        slices = [("all-gather", size * DIM) for size in (2, 2, 1)]
        assert after == [*before[:place], *slices, *before[place + 1 :]]


def _settings(**sections: dict[str, Any]) -> config.Config:
    content: dict[str, Any] = {
        "dataset": {"reader": "synthetic", "synthetic": {"num_classes": 1000}},
        "backbone": {"name": "tiny", "dim": DIM, "batch_norm": "local"},
        "train": {"steps": 1, "global_batch_size": 60, "gather_slices": 5},
    }
    for name, options in sections.items():
        content[name] = {**content.get(name, {}), **options}
    return config.validate(content)


def test_the_planner_counts_the_slices() -> None:
    sliced, whole = (
        forecast(_settings(train={"gather_slices": number, "accumulation_steps": 2}), 1000, 2, find("cpu")).collectives
        for number in (5, 1)
    )
    assert [one.count for one in sliced if one.what == "embeddings"] == [10]
    assert [(one.name, one.what, one.sent_bytes) for one in sliced] == [
        (one.name, one.what, one.sent_bytes) for one in whole
    ]
    assert sum(one.count for one in sliced) == sum(one.count for one in whole) + 8


def test_what_slices_cannot_do_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train\.gather_slices 5 .*batch_norm sync needs the whole batch at once"):
        _settings(backbone={"batch_norm": "sync"})
    with pytest.raises(ConfigError, match=r"train\.gather_slices 5 calls .* train\.strategy fsdp is made for one call"):
        _settings(train={"strategy": "fsdp"})
    with pytest.raises(ConfigError, match=r"train\.gather_slices 5: the sampler 'batch' \(d-softmax-b\) sends most"):
        forecast(_settings(classifier={"preset": "d-softmax-b", "sampling_rate": 0.5}), 1000, 2, find("cpu"))
    with pytest.raises(ConfigError, match=r"7 ranks x 1 accumulation steps x 5 slices = 35; use 35 or 70"):
        build.check_batch(_settings(), 7)
    with pytest.raises(ConfigError, match=r"leaves batch norm \(local\) one sample .* and 30 slices; at least 2"):
        build.check_batch(_settings(train={"gather_slices": 30}), 2)


# Ranks, slices, micro-batches; runs of one line are the same.
CUTS = (
    {"1 x 6": (1, 6, 1), "2 x 3": (2, 3, 1), "3 x 2": (3, 2, 1)},
    {"1 x 4": (1, 4, 1), "2 x 2": (2, 2, 1), "4 x 1": (4, 1, 1)},
    {"1 x 2, twice": (1, 2, 2), "2 x 1, twice": (2, 1, 2)},
)


@pytest.mark.distributed
def test_with_local_batch_norm_a_slice_is_what_a_rank_is(tmp_path: Path) -> None:
    """W ranks of N slices train as V ranks of M slices do where W N = V M: the same samples meet in the batch norm."""
    data = small_dataset(tmp_path / "data")
    runs: dict[int, dict[str, Any]] = {}
    for name, (world_size, num_slices, num_micro) in {name: cut for line in CUTS for name, cut in line.items()}.items():
        runs.setdefault(world_size, {})[name] = small_config(
            data, Path("never-written"), backbone={"batch_norm": "local"}, optim={"lr": 0.1, "ema_decay": None},
            train={
                "steps": 12, "precision": "float64", "gather_slices": num_slices, "accumulation_steps": num_micro
            },
        )  # fmt: skip
    fitted = {name: one for size, each in runs.items() for name, one in spawn(fit_all, size, each)[0].items()}
    for same in CUTS:
        first, *others = (torch.tensor(fitted[name]["losses"], dtype=torch.float64) for name in same)
        assert first[-1] < first[0]
        for other in others:
            assert float(((other - first) / first).abs().max()) <= 1e-9
    assert (
        abs(fitted["1 x 6"]["losses"][0] / fitted["1 x 4"]["losses"][0] - 1) > 1e-6
    )  # smaller slices are another norm
