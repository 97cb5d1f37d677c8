"""Each sampler: which rows it gives and with what weight, at any number of shards, in every step the same way."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from megaclass.objectives.presets import resolve
from megaclass.parallel.shard import ClassShard
from megaclass.sampling import (
    AllRows,
    BatchSample,
    ClassSample,
    Draw,
    HardSample,
    PartialFC,
    PositivesOnly,
    Sampler,
    build,
)

NUM_CLASSES = 103
LABELS = torch.tensor([0, 102, 50, 50, 7])
OWN = {0, 7, 50, 102}
WHOLE = ClassShard(NUM_CLASSES, 0, 1)


@dataclass(frozen=True)
class Neighbours:
    """The two classes after each label, the second missing for class 7."""

    def near(self, labels: Tensor) -> Tensor:
        return torch.stack([(labels + 1) % NUM_CLASSES, torch.where(labels == 7, -1, (labels + 2) % NUM_CLASSES)], 1)


NEAR = {1, 2, 51, 52, 8}  # and those of 102: classes 0 and 1

SAMPLERS: dict[str, Sampler] = {
    "all": AllRows(),
    "classes": ClassSample(3),
    "classes uniform": ClassSample(3, picks="uniform"),
    "classes corrected": ClassSample(3, is_corrected=True),
    "classes with own": ClassSample(3, batch_positives=True),
    "classes with own corrected": ClassSample(3, batch_positives=True, is_corrected=True),
    "partial-fc": PartialFC(3),
    "partial-fc corrected": PartialFC(3, is_corrected=True, picks="uniform"),
    "positives": PositivesOnly(),
    "hard": HardSample(Neighbours(), 3),
    "hard corrected without own": HardSample(Neighbours(), 3, batch_positives=False, is_corrected=True),
    "batch": BatchSample(3),
}
every = pytest.mark.parametrize("name", SAMPLERS)


def rows(draw: Draw) -> list[int]:
    assert draw.rows is not None
    return draw.rows.tolist()


def drawn(rate: float, draw_id: int = 4, picks: str = "stratified") -> set[int]:
    """The classes that are drawn at random, alone."""
    return set(rows(ClassSample(3, picks=picks).draw(LABELS, WHOLE, draw_id, rate)))


@every
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 120])
def test_shards_together_give_the_draw_of_one(name: str, world_size: int) -> None:
    """Rows, weights and batch rows; 120 shards of 103 classes leave many of them empty."""
    expected = SAMPLERS[name].draw(LABELS, WHOLE, 4, 0.1)
    classes, weights = [], []
    for index in range(world_size):
        shard = ClassShard(NUM_CLASSES, index, world_size)
        draw = SAMPLERS[name].draw(LABELS, shard, 4, 0.1)
        if expected.batch_rows is None:
            assert draw.batch_rows is None
        else:
            assert torch.equal(draw.batch_rows, expected.batch_rows)
        if expected.rows is None:
            assert draw.rows is None
            continue
        assert draw.rows.dtype == torch.int64
        assert bool((draw.rows.diff() > 0).all())
        assert all(0 <= row < shard.num_rows for row in draw.rows.tolist())
        classes.append(draw.rows + shard.start)
        weights.append(torch.as_tensor(draw.log_weight, dtype=torch.float64).expand(len(draw.rows)))
    if expected.rows is not None:
        assert torch.equal(torch.cat(classes), expected.rows)
        whole = torch.as_tensor(expected.log_weight, dtype=torch.float64).expand(len(expected.rows))
        assert torch.equal(torch.cat(weights), whole)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in ("all", "positives")])
def test_draws_replay_and_differ_between_draws_and_seeds(name: str) -> None:
    def key(draw: Draw) -> list[int]:
        chosen = draw.rows if draw.batch_rows is None else draw.batch_rows
        return chosen.tolist()

    labels, sampler = torch.arange(NUM_CLASSES), SAMPLERS[name]
    if name.startswith(("partial-fc", "classes with", "hard")):
        labels = LABELS
    first = key(sampler.draw(labels, WHOLE, 4, 0.2))
    assert first == key(sampler.draw(labels, WHOLE, 4, 0.2))
    assert first != key(sampler.draw(labels, WHOLE, 5, 0.2))
    other = type(sampler)(**{**vars(sampler), "seed": 8})
    assert first != key(other.draw(labels, WHOLE, 4, 0.2))


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name.startswith(("classes", "partial-fc", "hard"))])
def test_the_rate_may_change_from_step_to_step(name: str) -> None:
    """A schedule's rate: each step draws as many as its own rate says, and none depends on the step before."""
    sampler = SAMPLERS[name]
    always = {"classes": 0, "partial-fc": len(OWN), "hard": len(NEAR | {0})}[name.split()[0]]
    for step, rate in enumerate((0.05, 0.5, 1.0, 0.2)):
        num_random = max(1, round(rate * NUM_CLASSES))
        draw = sampler.draw(LABELS, WHOLE, step, rate)
        replayed = sampler.draw(LABELS, WHOLE, step, rate)
        assert torch.equal(draw.rows, replayed.rows)
        assert num_random - 4 <= len(draw.rows) <= num_random + always + len(OWN)
        if rate == 1.0 and not name.startswith("partial-fc"):
            assert rows(draw) == list(range(NUM_CLASSES))
        if isinstance(draw.log_weight, Tensor) and rate == 0.5 and name != "partial-fc corrected":
            assert float(draw.log_weight.max()) == pytest.approx(math.log(NUM_CLASSES / num_random))


def test_shards_draw_different_local_rows() -> None:
    """Samplers that seed every rank alike would draw the same local rows everywhere."""
    parts = [set(rows(ClassSample(0).draw(LABELS, ClassShard(4000, index, 4), 0, 0.1))) for index in range(4)]
    for first in range(4):
        for second in range(first):
            assert len(parts[first] & parts[second]) / len(parts[first]) < 0.3  # expected 0.1


def test_all_rows_draws_nothing() -> None:
    assert AllRows().draw(LABELS, WHOLE, 0, 0.1) == Draw(None, None, 0.0)


def test_own_classes_join_a_class_sample_only_if_they_are_to() -> None:
    alone = drawn(0.1)
    assert len(alone) == 10
    assert not alone >= OWN
    draw = ClassSample(3, batch_positives=True).draw(LABELS, WHOLE, 4, 0.1)
    assert rows(draw) == sorted(alone | OWN)
    assert draw.log_weight == 0.0


def test_a_corrected_class_sample_counts_the_inverse_of_its_share() -> None:
    draw = ClassSample(3, is_corrected=True).draw(LABELS, WHOLE, 4, 0.1)
    assert draw.log_weight == pytest.approx(math.log(103 / 10))  # 10 of 103 are drawn, not a tenth
    assert ClassSample(3, is_corrected=True).draw(LABELS, WHOLE, 4, 1.0).log_weight == 0.0


@pytest.mark.parametrize(
    ("sampler", "always", "num_random"),
    [
        (ClassSample(3, batch_positives=True, is_corrected=True), OWN, 31),
        (PartialFC(3, is_corrected=True), OWN, 27),
        (HardSample(Neighbours(), 3, is_corrected=True), OWN | NEAR, 31),
        (HardSample(Neighbours(), 3, batch_positives=False, is_corrected=True), NEAR | {0}, 31),
    ],
)
def test_what_is_always_in_counts_one_and_the_rest_the_inverse_of_its_share(
    sampler: Sampler, always: set[int], num_random: int
) -> None:
    draw = sampler.draw(LABELS, WHOLE, 4, 0.3)
    assert isinstance(draw.log_weight, Tensor)
    assert draw.log_weight.dtype == torch.float64
    assert always < set(rows(draw))
    for row, log_weight in zip(rows(draw), draw.log_weight.tolist(), strict=True):
        expected = 0.0 if row in always else math.log(NUM_CLASSES / num_random)
        assert log_weight == pytest.approx(expected, abs=1e-15), row


def test_partial_fc_fills_its_quota_beside_the_own_classes() -> None:
    """Random ones are drawn from all classes, so those that coincide with the batch's own are missing."""
    for draw_id in range(50):
        found = set(rows(PartialFC(3).draw(LABELS, WHOLE, draw_id, 0.2)))
        assert found >= OWN
        assert 21 - len(OWN) <= len(found) <= 21
    sizes = [len(PartialFC(3).draw(LABELS, WHOLE, draw_id, 0.2).rows) for draw_id in range(50)]
    assert max(sizes) == 21


@pytest.mark.parametrize("is_corrected", [False, True])
def test_own_classes_exceed_the_quota_of_partial_fc(is_corrected: bool) -> None:
    for rate in (0.001, 3 / 103, 4 / 103):
        draw = PartialFC(3, is_corrected=is_corrected).draw(LABELS, WHOLE, 4, rate)
        assert rows(draw) == sorted(OWN)
        assert draw.log_weight == 0.0
    found = set(rows(PartialFC(3).draw(LABELS, WHOLE, 4, 5 / 103)))
    assert found >= OWN
    assert len(found) <= 5


def test_positives_only_gives_the_own_classes_of_each_shard() -> None:
    assert rows(PositivesOnly().draw(LABELS, WHOLE, 0, 0.1)) == sorted(OWN)
    parts = [rows(PositivesOnly().draw(LABELS, ClassShard(NUM_CLASSES, index, 3), 0, 0.1)) for index in range(3)]
    assert parts == [[0, 7], [50 - 35], [102 - 70]]
    assert rows(PositivesOnly().draw(torch.tensor([4, 4]), ClassShard(5, 3, 4), 0, 0.1)) == []


def test_hard_sample_joins_near_classes_random_ones_and_the_own() -> None:
    random = drawn(0.05)
    draw = HardSample(Neighbours(), 3).draw(LABELS, WHOLE, 4, 0.05)
    assert rows(draw) == sorted(random | NEAR | OWN)
    draw = HardSample(Neighbours(), 3, batch_positives=False).draw(LABELS, WHOLE, 4, 0.05)
    assert rows(draw) == sorted(random | NEAR | {0})
    assert not {7, 50, 102} <= set(rows(draw))


def test_batch_positions_are_the_same_on_every_shard_and_know_no_label() -> None:
    draws = [
        BatchSample(0).draw(labels, ClassShard(NUM_CLASSES, index, 3), 9, 0.25)
        for labels in (torch.arange(20), torch.zeros(20, dtype=torch.int64))
        for index in range(3)
    ]
    for draw in draws:
        assert draw.rows is None
        assert draw.log_weight == 0.0
        assert torch.equal(draw.batch_rows, draws[0].batch_rows)
    positions = draws[0].batch_rows.tolist()
    assert len(positions) == 5
    assert positions == sorted(set(positions))
    assert 0 <= positions[0] <= positions[-1] < 20
    assert len(BatchSample(0).draw(LABELS, WHOLE, 0, 0.01).batch_rows) == 1
    assert BatchSample(0).draw(LABELS, WHOLE, 0, 1.0).batch_rows.tolist() == [0, 1, 2, 3, 4]


def test_every_position_of_the_batch_has_its_turn() -> None:
    counts = torch.zeros(7)
    for draw_id in range(2000):
        counts[BatchSample(1).draw(torch.zeros(7, dtype=torch.int64), WHOLE, draw_id, 3 / 7).batch_rows] += 1
    assert float((counts / 2000 - 3 / 7).abs().max()) <= 5 * math.sqrt(3 / 7 * 4 / 7 / 2000)


GRAPH = Neighbours()


@pytest.mark.parametrize(
    ("preset", "options", "expected"),
    [
        ("softmax", {}, AllRows()),
        ("d-softmax-b", {}, BatchSample(5)),
        ("d-softmax-k", {}, ClassSample(5, True)),
        ("d-softmax-k", {"batch_positives": False, "draw": "uniform"}, ClassSample(5, False, False, "uniform")),
        ("sampled-softmax", {}, ClassSample(5, False, True)),
        ("sampled-softmax", {"correction": "none"}, ClassSample(5)),
        ("partial-fc", {}, PartialFC(5)),
        ("partial-fc", {"correction": "inverse-rate"}, PartialFC(5, True)),
        ("cosface", {"sampler": "positives"}, PositivesOnly()),
        ("arcface", {"sampler": "hard"}, HardSample(GRAPH, 5)),
        ("arcface", {"sampler": "hard", "batch_positives": False}, HardSample(GRAPH, 5, False)),
        ("sphereface2", {"sampler": "classes", "sampling_rate": 0.5}, ClassSample(5)),
    ],
)
def test_a_preset_names_its_sampler(preset: str, options: dict[str, object], expected: Sampler) -> None:
    assert build(resolve(preset, **options), 5, GRAPH) == expected


def test_no_sampler_makes_a_tensor_of_all_classes() -> None:
    from tests.support.largest import Largest

    many = 10**7
    makers: list[Callable[[], Sampler]] = [
        lambda: ClassSample(0, batch_positives=True, is_corrected=True), lambda: PartialFC(0), lambda: PositivesOnly(),
        lambda: ClassSample(0, picks="uniform"), lambda: BatchSample(0),
    ]  # fmt: skip
    for make in makers:
        with Largest() as largest:
            make().draw(LABELS, ClassShard(many, 0, 1), 0, 1e-4)
        assert 0 < largest.numel <= 1005
