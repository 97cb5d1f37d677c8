"""The class layer on a CUDA device against the dense float64 oracle, and its collectives on NCCL and on gloo."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megaclass.parallel import collectives, exchange
from megaclass.parallel.process import World
from tests.distributed.test_oracle import compare, run_case
from tests.support.cases import Case, all_cases
from tests.support.spawn import spawn

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
