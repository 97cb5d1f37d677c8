"""What one step sends: which collectives, in which order, and how many numbers."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megaclass.parallel import collectives
from megaclass.parallel.process import World
from megaclass.parallel.shard import ClassShard
from tests.support.cases import DIM, Case
from tests.support.spawn import spawn

WORLD_SIZE = 2
BATCH = 5
GLOBAL = WORLD_SIZE * BATCH


def _record(world: World, preset: str) -> list[tuple[str, int]]:
    """Names and sizes (elements of the local tensor that is sent) of all collectives of one forward and backward."""
    sent: list[tuple[str, int]] = []

    def watch(name: str, original: Any, argument: int) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            sent.append((name, args[argument].numel()))
            return original(*args, **kwargs)

        return call

    case = Case(preset, 13, BATCH, "any")
    classifier = case.build(ClassShard(13, world.rank, world.size), world.group, grad_divisor=world.size)
    embeddings, labels, _ = case.inputs(world.size)
    mine = slice(world.rank * BATCH, (world.rank + 1) * BATCH)
    raw = embeddings[mine].clone().requires_grad_()
    with ExitStack() as stack:
        for where, function, name, argument in (
            (collectives, "_all_gather_single", "all-gather", 1),
            (collectives, "_reduce_scatter_single", "reduce-scatter", 1),
            (dist, "all_reduce", "all-reduce", 0),
            *((dist, other, other, 0) for other in ("all_gather", "broadcast", "reduce", "all_to_all_single")),
        ):
            stack.enter_context(mock.patch.object(where, function, watch(name, getattr(where, function), argument)))
        classifier(raw, labels[mine], draw_id=0).loss.backward()
    return sent


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("preset", "reduced"),
    [
        ("d-softmax", GLOBAL + 2),
        ("d-softmax-k", GLOBAL + 2),
        ("d-softmax-b", 3 + 2),  # 0.3 of ten samples have an inter term
        ("softmax", 2 * GLOBAL + 2),
        ("partial-fc", 2 * GLOBAL + 2),
    ],
)
def test_one_all_gather_pair_one_all_reduce_one_reduce_scatter(preset: str, reduced: int) -> None:
    for sent in spawn(_record, WORLD_SIZE, preset):
        assert sent == [
            ("all-gather", BATCH * DIM),
            ("all-gather", BATCH),
            ("all-reduce", reduced),
            ("reduce-scatter", GLOBAL * DIM),
        ]


def _stock_all_reduce(world: World) -> tuple[torch.Tensor, torch.Tensor]:
    from torch.distributed.nn.functional import all_reduce

    ours = torch.ones(3, dtype=torch.float64, requires_grad=True)
    collectives.sum_over_shards(ours, world.group).sum().backward()
    stock = torch.ones(3, dtype=torch.float64, requires_grad=True)
    all_reduce(stock, group=world.group).sum().backward()
    return ours.grad, stock.grad


@pytest.mark.distributed
def test_sum_over_shards_counts_the_loss_once() -> None:
    """The stock differentiable all-reduce sums in backward too: exactly W times too large."""
    for ours, stock in spawn(_stock_all_reduce, 3):
        assert ours.tolist() == [1.0] * 3
        assert stock.tolist() == [3.0] * 3


def _gather_uneven(world: World) -> torch.Tensor:
    return collectives.gather_uneven(torch.full((world.rank * 2, 3), float(world.rank)), world.group)


@pytest.mark.distributed
def test_uneven_rows_are_gathered_in_the_order_of_ranks() -> None:
    expected = torch.cat([torch.full((rank * 2, 3), float(rank)) for rank in range(3)])
    for gathered in spawn(_gather_uneven, 3):
        assert torch.equal(gathered, expected)
