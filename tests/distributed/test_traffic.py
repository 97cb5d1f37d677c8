"""What one step sends: which collectives, in which order, and how many numbers."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megaclass import config, loss
from megaclass.classifier import ShardedClassifier
from megaclass.objectives import presets
from megaclass.parallel import collectives
from megaclass.parallel.process import World
from megaclass.parallel.shard import ClassShard
from megaclass.plan import find, forecast
from tests.support.cases import DIM, SAMPLINGS, Case
from tests.support.spawn import spawn

WORLD_SIZE = 2
BATCH = 5
GLOBAL = WORLD_SIZE * BATCH


def _record(world: World, case: Case, num_slices: int = 1) -> list[tuple[str, int]]:
    """Names and sizes (elements of the local tensor that is sent) of all collectives of one forward and backward."""
    sent: list[tuple[str, int]] = []

    def watch(name: str, original: Any, argument: int) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            is_maximum = kwargs.get("op") == dist.ReduceOp.MAX
            sent.append((f"{name} of maxima" if is_maximum else name, args[argument].numel()))
            return original(*args, **kwargs)

        return call

    classifier = case.build(ClassShard(13, world.rank, world.size), world.group, grad_divisor=world.size)
    embeddings, labels, _ = case.inputs(world.size)
    mine = slice(world.rank * BATCH, (world.rank + 1) * BATCH)
    raw = embeddings[mine].clone().requires_grad_()
    with ExitStack() as stack:
        for where, function, name, argument in (
            (collectives, "_all_gather_single", "all-gather", 1),
            (collectives, "_reduce_scatter_single", "reduce-scatter", 1),
            (dist, "all_reduce", "all-reduce", 0),
            (dist, "all_to_all_single", "all-to-all", 1),
            *((dist, other, other, 0) for other in ("all_gather", "broadcast", "reduce")),
        ):
            stack.enter_context(mock.patch.object(where, function, watch(name, getattr(where, function), argument)))
        batch = classifier.begin(labels[mine])
        for part in raw.chunk(num_slices):
            batch.add(part)
        classifier.finish(batch, draw_id=0, values=case.values(), monitor=case.monitor).loss.backward()
    return sent


def _case(preset: str, **options: Any) -> Case:
    return Case(preset, 13, BATCH, "any", **options)


DISSECTED, ENTANGLED, PART = GLOBAL + 2, 2 * GLOBAL + 2, 3  # 0.3 of ten samples have an inter term
BALANCED = {"balance": (0.5, 0.25)}


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("case", "reduced"),
    [
        (_case("d-softmax"), [DISSECTED]),
        (_case("softmax"), [ENTANGLED]),
        (_case("partial-fc"), [ENTANGLED]),
        (_case("so-softmax"), [ENTANGLED]),
        (_case("sface"), [DISSECTED]),
        *((_case("d-softmax", sampling=sampling), [DISSECTED]) for sampling in SAMPLINGS if sampling != "batch"),
        (_case("d-softmax", monitor=True), [DISSECTED + WORLD_SIZE + 4]),
        (_case("softmax", monitor=True), [ENTANGLED + WORLD_SIZE + 4]),
        (_case("d-softmax", **BALANCED), [DISSECTED + GLOBAL]),
        (_case("softmax", **BALANCED), [ENTANGLED + GLOBAL]),
        (_case("softmax", rows_per_class=3, negative_filter=0.3), [ENTANGLED]),
        (_case("curricularface"), [2 * GLOBAL, ENTANGLED]),
        (_case("circle", scale=None), [("all-reduce of maxima", GLOBAL), ENTANGLED]),
    ],
)
def test_two_all_gathers_few_all_reduces_one_reduce_scatter(case: Case, reduced: list[Any]) -> None:
    wanted = [("all-reduce", one) if isinstance(one, int) else one for one in reduced]
    for sent in spawn(_record, WORLD_SIZE, case):
        assert sent == [
            ("all-gather", BATCH),
            ("all-gather", BATCH * DIM),
            *wanted,
            ("reduce-scatter", GLOBAL * DIM),
        ]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("case", "reduced"),
    [
        (_case("d-softmax-b"), [("all-reduce", PART + 2)]),
        (
            _case("d-softmax-b", normalisation="batch-norm"),
            [("all-reduce of maxima", PART), ("all-reduce", PART + 2)],
        ),
    ],
)
def test_a_part_of_the_batch_goes_to_all_and_the_rest_to_its_owners(case: Case, reduced: list[tuple[str, int]]) -> None:
    """Three of ten samples are padded to the longer of both ranks' parts."""
    labels = case.inputs(WORLD_SIZE)[1]
    parts = case.draw(labels).batch_rows
    assert parts is not None
    assert len(parts) == PART
    longest = max(int((parts // BATCH == rank).sum()) for rank in range(WORLD_SIZE))
    for rank, sent in enumerate(spawn(_record, WORLD_SIZE, case)):
        num_owned = int((ClassShard(13, rank, WORLD_SIZE).to_row(labels) >= 0).sum())
        assert sent == [
            ("all-gather", BATCH),
            ("all-to-all", BATCH * DIM),
            ("all-gather", longest * DIM),
            *reduced,
            ("reduce-scatter", WORLD_SIZE * longest * DIM),
            ("all-to-all", num_owned * DIM),
        ]


@pytest.mark.distributed
def test_a_large_part_of_the_batch_is_gathered_with_the_rest() -> None:
    """Six of ten samples to everyone and five to their owners would be more than all ten."""
    for sent in spawn(_record, WORLD_SIZE, _case("d-softmax-b", is_later=True)):
        assert sent == [
            ("all-gather", BATCH),
            ("all-gather", BATCH * DIM),
            ("all-reduce", 6 + 2),
            ("reduce-scatter", GLOBAL * DIM),
        ]


@pytest.mark.distributed
@pytest.mark.parametrize("preset", ["sphereface2", "uniface"])
def test_a_learned_bias_takes_one_number_more(preset: str) -> None:
    for sent in spawn(_record, WORLD_SIZE, _case(preset)):
        assert sent == [
            ("all-gather", BATCH),
            ("all-gather", BATCH * DIM),
            ("all-reduce", DISSECTED),
            # Sent first, because it is the longest on its way.
            ("reduce-scatter", GLOBAL * DIM),
            ("all-reduce", 1),
        ]


@pytest.mark.distributed
@pytest.mark.parametrize("preset", ["adaface", "magface"])
def test_lengths_of_embeddings_travel_apart(preset: str) -> None:
    for sent in spawn(_record, WORLD_SIZE, _case(preset)):
        assert sent == [
            ("all-gather", BATCH),
            ("all-gather", BATCH * DIM),
            ("all-gather", BATCH),
            ("all-reduce", ENTANGLED),
            ("reduce-scatter", GLOBAL * DIM),
            ("reduce-scatter", GLOBAL),
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


def _bytes_sent(world: World, dtype: torch.dtype) -> list[tuple[str, int]]:
    """Names and bytes of the two large collectives of one forward and backward."""
    sent: list[tuple[str, int]] = []

    def watch(name: str, original: Any) -> Any:
        def call(out: torch.Tensor, tensor: torch.Tensor, **kwargs: Any) -> Any:
            sent.append((name, tensor.numel() * tensor.element_size()))
            return original(out, tensor, **kwargs)

        return call

    preset = presets.resolve("d-softmax-k", hyper={}, schedule={}, sampling_rate=0.5)
    classifier = ShardedClassifier(
        DIM,
        ClassShard(13, world.rank, world.size),
        loss.build(preset, 13, seed=0),
        seed=0,
        group=world.group,
        dtype=dtype,
    )
    with ExitStack() as stack:
        for name in ("_all_gather_single", "_reduce_scatter_single"):
            stack.enter_context(mock.patch.object(collectives, name, watch(name, getattr(collectives, name))))
        embeddings = torch.randn(BATCH, DIM, requires_grad=True)
        classifier(embeddings, torch.arange(BATCH), draw_id=0).loss.backward()
    return sent


@pytest.mark.distributed
def test_embeddings_travel_as_bfloat16_where_rows_are_and_gradients_never() -> None:
    for dtype, item_bytes in ((torch.float32, 4), (torch.bfloat16, 2)):
        for sent in spawn(_bytes_sent, WORLD_SIZE, dtype):
            assert sent == [
                ("_all_gather_single", BATCH * 8),
                ("_all_gather_single", BATCH * DIM * item_bytes),
                ("_reduce_scatter_single", GLOBAL * DIM * 4),
            ]


@pytest.mark.distributed
@pytest.mark.parametrize("preset", sorted(presets.PRESETS))
def test_the_planner_counts_what_is_sent(preset: str) -> None:
    """Every collective of the class layer, in number and in elements, for every preset; a float64 number is 8 bytes."""
    options: dict[str, Any] = {"preset": preset}
    case = _case(preset, scale=None)
    resolved = case.settings()
    if resolved.sampling_rate is not None:
        options["sampling_rate"] = resolved.sampling_rate
    run = config.validate(
        {
            "dataset": {"reader": "synthetic", "synthetic": {"num_classes": 13}},
            "backbone": {"name": "tiny", "dim": DIM, "batch_norm": "local"},
            "classifier": options,
            "train": {"steps": 1, "global_batch_size": GLOBAL, "precision": "float64"},
        }
    )
    planned = forecast(run, 13, WORLD_SIZE, find("cpu")).collectives[:-2]
    for sent in spawn(_record, WORLD_SIZE, case):
        # A reduce-scatter is counted by what it gives, as an all-gather by what it takes.
        counted = sorted(
            (name.removesuffix(" of maxima"), count // WORLD_SIZE if name == "reduce-scatter" else count)
            for name, count in sent
        )
        wanted = sorted((one.name, one.sent_bytes // 8) for one in planned)
        if preset == "d-softmax-b":
            # What goes to owners depends on the labels, and unequal parts of the batch are padded.
            assert [name for name, _ in counted] == [name for name, _ in wanted]
        else:
            assert counted == wanted
