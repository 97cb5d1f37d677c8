"""The heart of the tests: every preset equals the dense float64 oracle at world sizes 1 to 4, in odd sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megaclass.parallel.process import World
from megaclass.parallel.shard import ClassShard
from tests.support.cases import Case, all_cases
from tests.support.oracle import dense
from tests.support.spawn import spawn

DRAW_ID = 3


def run_cases(world: World, cases: list[Case]) -> list[dict[str, Any]]:
    """On one rank: forward and backward of every case, through a replicated layer whose gradient DDP would average."""
    results = []
    for case in cases:
        embeddings, labels, _ = case.inputs(world.size)
        mine = slice(world.rank * case.batch_size, (world.rank + 1) * case.batch_size)
        shard = ClassShard(case.num_classes, world.rank, world.size)
        classifier = case.build(shard, world.group, grad_divisor=world.size)
        raw = embeddings[mine].clone().requires_grad_()
        output = classifier(raw, labels[mine], draw_id=DRAW_ID)
        output.loss.backward()
        gradient = classifier.take_row_gradient()
        assert gradient is not None
        assert classifier.take_row_gradient() is None
        rows = torch.arange(shard.num_rows) if gradient.rows is None else gradient.rows
        full = torch.zeros(shard.num_rows, embeddings.shape[1], dtype=case.dtype)
        full[rows] = gradient.values
        results.append(
            {
                "scalars": torch.stack([output.loss.detach(), output.intra, output.inter, output.positive_cosine]),
                # What the wrapper would do next: divide by the number of ranks.
                "embedding": raw.grad / world.size,
                "class": full,
                "rows": rows + shard.start,
            }
        )
    return results


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    relative = 1e-10 if dtype == torch.float64 else 1e-5
    # Relative to the largest entry: an entry that cancels to almost nothing has no digits of its own.
    scale = max(float(expected.abs().max()), 1e-12)
    assert float((actual.double() - expected).abs().max()) <= relative * scale, (actual, expected)


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_preset_equals_the_dense_oracle(world_size: int) -> None:
    cases = all_cases()
    ranks = spawn(run_cases, world_size, cases)
    for number, case in enumerate(cases):
        parts = [rank[number] for rank in ranks]
        embeddings, labels, weight = case.inputs(world_size)
        whole = ClassShard(case.num_classes, 0, 1)
        draw = case.sampler().draw(labels, whole, DRAW_ID)
        settings = case.settings()
        expected = dense(
            case.preset,
            embeddings,
            labels,
            weight,
            scale=settings.scale,
            margin=settings.margin or 0.0,
            end_point=settings.end_point or 0.0,
            negatives=draw.rows,
            batch_rows=draw.batch_rows,
        )
        scalars = torch.stack([expected.loss, expected.intra, expected.inter, expected.positive_cosine])
        for part in parts:
            assert torch.equal(part["scalars"], parts[0]["scalars"]), f"{case}: ranks disagree on the loss"
            close(part["scalars"], scalars, case.dtype)
        close(torch.cat([part["embedding"] for part in parts]), expected.embedding_gradient, case.dtype)
        close(torch.cat([part["class"] for part in parts]), expected.class_gradient, case.dtype)
        # Only drawn rows and the batch's own classes have a gradient at all.
        touched = torch.cat([part["rows"] for part in parts])
        allowed = torch.arange(case.num_classes) if draw.rows is None else torch.cat([draw.rows, labels])
        assert torch.equal(touched, torch.unique(allowed)), case


@pytest.mark.distributed
def test_backbone_gradient_is_that_of_the_global_mean() -> None:
    """Through DDP itself: the factor of the gather and DDP's averaging cancel."""
    case = Case("d-softmax-k", 13, 5, "any")
    ranks = spawn(_ddp_gradient, 3, case)
    embeddings, labels, weight = case.inputs(3)
    draw = case.sampler().draw(labels, ClassShard(13, 0, 1), DRAW_ID)
    layer = nn.Linear(7, 7, bias=False, dtype=torch.float64)
    nn.init.eye_(layer.weight)
    expected = dense("d-softmax-k", embeddings, labels, weight, scale=16.0, end_point=0.9, negatives=draw.rows)
    layer(embeddings).backward(expected.embedding_gradient)
    for gradient in ranks:
        close(gradient, layer.weight.grad, torch.float64)


def _ddp_gradient(world: World, case: Case) -> Tensor:
    layer = nn.Linear(7, 7, bias=False, dtype=torch.float64)
    nn.init.eye_(layer.weight)
    wrapped = nn.parallel.DistributedDataParallel(layer, process_group=world.group)
    embeddings, labels, _ = case.inputs(world.size)
    mine = slice(world.rank * case.batch_size, (world.rank + 1) * case.batch_size)
    classifier = case.build(ClassShard(13, world.rank, world.size), world.group, grad_divisor=world.size)
    classifier(wrapped(embeddings[mine]), labels[mine], draw_id=DRAW_ID).loss.backward()
    return layer.weight.grad
