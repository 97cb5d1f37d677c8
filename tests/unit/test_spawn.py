"""The helper that starts ranks must report failures, or every distributed test would be worthless."""

from __future__ import annotations

import os
import time

import pytest
import torch

from tests.support.spawn import spawn

pytestmark = pytest.mark.distributed


def _rank_and_sum(world, values):
    import torch.distributed as dist

    total = values + world.rank
    dist.all_reduce(total, group=world.group)
    return world.rank, total


def _fail_on_rank_one(world):
    import torch.distributed as dist

    if world.rank == 1:
        raise ValueError("this rank is the culprit")
    dist.all_reduce(torch.ones(3), group=world.group)


def _die_on_rank_one(world):
    if world.rank == 1:
        os._exit(7)
    time.sleep(20)


def _sleep(world):
    time.sleep(20)


def test_results_come_in_the_order_of_the_ranks():
    results = spawn(_rank_and_sum, 2, torch.tensor([1.0, 2.0]))
    assert [rank for rank, _ in results] == [0, 1]
    for _, total in results:
        assert total.tolist() == [3.0, 5.0]


def test_the_culprits_traceback_is_shown():
    with pytest.raises(AssertionError, match=r"(?s)rank 1 of 2 failed:.*this rank is the culprit"):
        spawn(_fail_on_rank_one, 2)


def test_a_dead_rank_is_named():
    with pytest.raises(AssertionError, match="rank 1 died with exit code 7"):
        spawn(_die_on_rank_one, 2)


def test_the_time_limit_ends_all_ranks():
    begin = time.monotonic()
    with pytest.raises(AssertionError, match=r"ranks \[0, 1\] of 2 did not finish in time"):
        spawn(_sleep, 2, seconds=1.5)
    assert time.monotonic() - begin < 10
