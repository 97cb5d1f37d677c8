"""Neighbours over several ranks: the same as on one, also with empty shards, duplicates and rows without direction."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megaclass.neighbours import NeighbourGraph, graph
from megaclass.parallel.process import World
from megaclass.parallel.shard import ClassShard
from tests.support.spawn import spawn

DIM, K, STEPS = 7, 4, 9
CASES = [(13, 1, "exact"), (5, 1, "exact"), (41, 2, "exact"), (41, 1, "hnsw")]


def weights(num_classes: int, rows_per_class: int, step: int) -> Tensor:
    rows = torch.randn(num_classes * rows_per_class, DIM, generator=torch.Generator().manual_seed(step)).round(
        decimals=0
    )
    rows[: 2 * rows_per_class] = rows[-2 * rows_per_class :]
    rows[3 * rows_per_class : 4 * rows_per_class] = 0.0
    return rows


def neighbours(world: World, gathered: int) -> list[dict[str, Any]]:
    """On one rank: what `near` gives at each step, for labels in any order, and this rank's own neighbours."""
    graph._GATHERED = gathered
    results = []
    for num_classes, rows_per_class, method in CASES:
        shard = ClassShard(num_classes, world.rank, world.size)
        mine = slice(shard.start * rows_per_class, shard.stop * rows_per_class)
        labels = torch.arange(num_classes).flip(0)
        built = NeighbourGraph(
            shard, K, rebuild_every=4, lag=2, search=method, group=world.group, rows_per_class=rows_per_class
        )
        near = []
        for step in range(STEPS):
            built.advance(weights(num_classes, rows_per_class, step)[mine], step)
            near.append(built.near(labels))
        results.append({"near": torch.stack(near), "own": built.neighbours.clone()})
    return results


@pytest.fixture(scope="module")
def alone() -> list[dict[str, Any]]:
    return spawn(neighbours, 1, 8192)[0]


@pytest.mark.distributed
@pytest.mark.parametrize(("world_size", "gathered"), [(2, 8192), (3, 3), (4, 1)])
def test_any_number_of_ranks_gives_the_same_neighbours(
    alone: list[dict[str, Any]], world_size: int, gathered: int
) -> None:
    """Gathered in one piece and in pieces of a few classes; 5 classes on 4 ranks leave the last rank without any."""
    ranks = spawn(neighbours, world_size, gathered)
    for number, expected in enumerate(alone):
        for rank in ranks:
            assert torch.equal(rank[number]["near"], expected["near"]), (CASES[number], world_size)
        assert torch.equal(torch.cat([rank[number]["own"] for rank in ranks]), expected["own"])


@pytest.mark.distributed
def test_the_neighbours_change_when_they_are_searched_again(alone: list[dict[str, Any]]) -> None:
    """Steps 0 to 5 see the first search, 6 to 8 the second: what the comparison above compares is not constant."""
    for result in alone:
        near = result["near"]
        assert all(torch.equal(near[step], near[0]) for step in range(6))
        assert all(torch.equal(near[step], near[6]) for step in range(6, 9))
        assert not torch.equal(near[0], near[6])
