"""The class layer on a CUDA device against the dense float64 oracle, and its collectives on NCCL and on gloo."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megaclass import host_rows
from megaclass.bench.case import Case as BenchCase
from megaclass.bench.case import batch as bench_batch
from megaclass.bench.heads import Ours
from megaclass.parallel import collectives, exchange
from megaclass.parallel.process import World
from tests.distributed.test_oracle import compare, run_case
from tests.support.cases import Case, all_cases
from tests.support.spawn import spawn
from tests.support.training import fit, small_config, small_dataset

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here"),
]
PRESETS = ("d-softmax", "d-softmax-k", "d-softmax-b", "partial-fc", "arcface", "adaface", "sphereface2")


def _alone() -> World:
    return World(0, 1, 0, torch.device("cuda", 0), None, None)


def test_every_loss_on_cuda_equals_the_dense_oracle() -> None:
    for case in all_cases():
        compare(case, [run_case(_alone(), case)])


class _NotShort(int):
    """One, which no shortcut takes for one: what is sent to nobody goes through NCCL all the same."""

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = int.__hash__


@pytest.fixture
def nccl(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", rank=0, world_size=1, store=dist.HashStore(), device_id=torch.device("cuda", 0))
    for module in (collectives, exchange):
        monkeypatch.setattr(module, "group_size", lambda _: _NotShort(1))
    yield replace(_alone(), group=dist.group.WORLD)
    dist.destroy_process_group()


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_through_nccl(preset: str, dtype: torch.dtype, nccl: World) -> None:
    case = Case(preset, 1003, 5, "any", dtype=dtype, monitor=True)
    compare(case, [run_case(nccl, case)])


def _on_one_gpu(world: World, cases: list[Case]) -> list[dict[str, Any]]:
    return [run_case(replace(world, device=torch.device("cuda", 0)), case) for case in cases]


@pytest.mark.distributed
def test_two_gloo_ranks_share_a_gpu() -> None:
    """What NCCL refuses, two ranks on one device: gloo takes the tensors through the host."""
    cases = [Case(preset, 1003, 5, "any", monitor=True) for preset in PRESETS]
    for case, *parts in zip(cases, *spawn(_on_one_gpu, 2, cases, seconds=280), strict=True):
        compare(case, parts)


def _steps(memory: str, update: str, optimizer: str, row_dtype: str) -> tuple[list[float], torch.Tensor]:
    """Twelve steps of a class layer with its row optimizer: losses and final rows."""
    made = BenchCase(
        num_classes=5003, dim=48, batch_size=37, sampling_rate=0.2, preset="d-softmax-k", optimizer=optimizer,
        row_dtype=row_dtype, row_update=update, row_memory=memory,
    )  # fmt: skip
    head = Ours(made, _alone())
    losses = [float(head.step(*bench_batch(made, _alone(), number)).double().sum()) for number in range(12)]
    if head.classifier.host_rows is not None:
        assert not head.classifier.weight.is_cuda
        head.classifier.host_rows.close()
    return losses, head.classifier.weight.detach().cpu()


@pytest.mark.parametrize("update", ["deferred", "fused"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "adagrad"])
@pytest.mark.parametrize("row_dtype", ["float32", "bfloat16"])
def test_rows_on_the_host_are_those_on_the_device(
    update: str, optimizer: str, row_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, through buffers so small that every copy takes several pieces."""
    monkeypatch.setattr(host_rows, "_STAGE_BYTES", 10_000)
    # Sums of gradients that meet in one row are in no fixed order on CUDA otherwise.
    torch.use_deterministic_algorithms(True)
    try:
        there, here = (_steps(memory, update, optimizer, row_dtype) for memory in ("device", "host"))
    finally:
        torch.use_deterministic_algorithms(False)
    assert there[0] == here[0]
    assert torch.equal(there[1], here[1])


@pytest.mark.parametrize("update", ["deferred", "fused"])
@pytest.mark.parametrize("preset", ["d-softmax", "d-softmax-k", "partial-fc"])
def test_rows_on_a_stream_of_their_own_change_no_number(update: str, preset: str, tmp_path: Path) -> None:
    """Twenty steps of the trainer with a backbone beside it, to the bit."""
    data = small_dataset(tmp_path / "data")
    optim = {"row_update": update, "ema_decay": None, "lr": 0.05, **({"clip_norm": None} if update == "fused" else {})}
    rate = {} if preset == "d-softmax" else {"sampling_rate": 0.5}
    torch.use_deterministic_algorithms(True)
    try:
        alone, beside = (
            fit(
                _alone(),
                small_config(
                    data, tmp_path, optim=optim, classifier={"preset": preset, "sampling_rate": None, **rate},
                    train={"steps": 20, "row_stream": is_beside},
                ),
            )
            for is_beside in (False, True)
        )  # fmt: skip
    finally:
        torch.use_deterministic_algorithms(False)
    assert beside["losses"] == alone["losses"]
    assert torch.equal(beside["weight"], alone["weight"])
