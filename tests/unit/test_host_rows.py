"""Rows on the host against one plain table: whatever the order of calls, a step sees what the last one wrote."""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megaclass import host_rows
from megaclass.host_rows import HostRows
from megaclass.kernels.row_gradient import RowGradient
from megaclass.parallel.shard import ClassShard
from megaclass.sampling.samplers import AllRows, BatchSample, ClassSample, HardSample, PartialFC, PositivesOnly

CPU = torch.device("cpu")
CLASSES = st.lists(st.integers(0, 12), max_size=13, unique=True).map(lambda found: torch.tensor(sorted(found)).long())


def tables(rows_per_class: int) -> dict[str, Tensor]:
    rows = 13 * rows_per_class
    return {"weight": torch.arange(rows * 3.0).view(rows, 3), "num_steps": torch.arange(rows)}


class Slow(host_rows._Copies):
    """Copies that arrive late, so that a step which does not wait for them sees old rows."""

    def read(self, tensors: dict[str, Tensor], classes: Tensor) -> host_rows.Part:
        part = super().read(tensors, classes)
        time.sleep(0.002)
        return part

    def write(self, tensors: dict[str, Tensor], part: host_rows.Part) -> None:
        time.sleep(0.002)
        super().write(tensors, part)


def slowed(rows: HostRows) -> HostRows:
    rows._copies = Slow(CPU)
    return rows


@settings(deadline=None, max_examples=60)
@given(
    steps=st.lists(
        st.tuples(st.lists(st.tuples(CLASSES, CLASSES), min_size=1, max_size=3), st.booleans()), min_size=1, max_size=7
    ),
    rows_per_class=st.integers(1, 2),
)
def test_a_step_sees_what_was_written_before(
    steps: list[tuple[list[tuple[Tensor, Tensor]], bool]], rows_per_class: int
) -> None:
    """Steps of several passes, each with what it needs and what is read ahead; taken or not."""
    held = tables(rows_per_class)
    expected = {
        name: table.clone().view(13, rows_per_class, *table.shape[1:]) for name, table in tables(rows_per_class).items()
    }
    rows = slowed(HostRows(held, rows_per_class, CPU))
    for number, (passes, is_taken) in enumerate(steps):
        seen: set[int] = set()
        for needed, ahead in passes:
            part = rows.load(needed)
            seen |= set(needed.tolist())
            assert part.classes.tolist() == sorted(seen)
            for name, entry in part.entries.items():
                assert torch.equal(entry, expected[name][part.classes]), (number, name)
            rows.read_ahead(ahead)
        if is_taken:
            for name, entry in part.entries.items():
                entry.add_(number + 1)
                expected[name][part.classes] += number + 1
            rows.write_back()
        else:
            rows.forget()
    rows.flush()
    for name, table in held.items():
        assert torch.equal(table.view_as(expected[name]), expected[name])
    rows.close()


def test_what_was_read_ahead_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[list[int]] = []
    original = host_rows._Copies.read

    def counted(self: Any, tensors: dict[str, Tensor], classes: Tensor) -> host_rows.Part:
        read.append(classes.tolist())
        return original(self, tensors, classes)

    monkeypatch.setattr(host_rows._Copies, "read", counted)
    rows = HostRows(tables(1), 1, CPU)
    rows.load(torch.tensor([1, 2, 3]))
    rows.read_ahead(torch.tensor([3, 4, 5]))
    rows.write_back()
    # 3 and 4 were read ahead, 2 was in the last step; 7 comes as a surprise.
    rows.load(torch.tensor([2, 3, 4, 7]))
    assert read == [[1, 2, 3], [3, 4, 5], [7]]
    rows.close()


def test_places_and_numbers() -> None:
    rows = HostRows(tables(2), 2, CPU)
    rows.load(torch.tensor([2, 5, 9]))
    assert rows.places(torch.tensor([9, -1, 2])).tolist() == [2, -1, 0]
    assert rows.numbers.tolist() == [4, 5, 10, 11, 18, 19]
    gradient = rows.in_shard(RowGradient(torch.tensor([1, 4]), torch.ones(2, 3)))
    assert gradient.rows is not None
    assert gradient.rows.tolist() == [5, 18]
    with pytest.raises(AssertionError, match="not loaded"):
        rows.places(torch.tensor([3]))
    rows.close()


def test_a_shard_without_rows() -> None:
    rows = HostRows({"weight": torch.empty(0, 3)}, 1, CPU)
    nothing = torch.empty(0, dtype=torch.int64)
    for _ in range(2):
        assert rows.load(nothing).entries["weight"].shape == (0, 1, 3)
        rows.read_ahead(nothing)
        rows.write_back()
    rows.close()


def test_a_failed_copy_ends_the_run_at_the_next_step() -> None:
    class Broken(host_rows._Copies):
        def write(self, tensors: dict[str, Tensor], part: host_rows.Part) -> None:
            raise RuntimeError("the link is gone")

    rows = HostRows(tables(1), 1, CPU)
    rows._copies = Broken(CPU)
    rows.load(torch.tensor([1]))
    rows.write_back()
    with pytest.raises(RuntimeError, match="the link is gone"):
        rows.load(torch.tensor([2]))
    rows.close()


@pytest.mark.parametrize("picks", ["stratified", "uniform"])
def test_the_forecast_of_a_draw_is_part_of_it(picks: str) -> None:
    labels = torch.tensor([3, 50, 97, 3])
    for index in range(3):
        shard = ClassShard(101, index, 3)
        for sampler in (
            ClassSample(5, picks=picks),
            ClassSample(5, batch_positives=True, picks=picks),
            PartialFC(5, picks=picks),
            PositivesOnly(),
        ):
            forecast = sampler.drawn(shard, 8, 0.3)
            rows = sampler.draw(labels, shard, 8, 0.3).rows
            assert rows is not None
            assert bool(torch.isin(forecast, rows).all()), sampler
            if isinstance(sampler, ClassSample):
                assert len(forecast) > 5
    assert len(AllRows().drawn(shard, 8, 0.3)) == len(BatchSample(5).drawn(shard, 8, 0.3)) == 0


def test_the_forecast_of_hard_negatives_is_their_random_part() -> None:
    class Near:
        def near(self, labels: Tensor) -> Tensor:
            return (labels[:, None] + 1).clamp_max(100)

    sampler = HardSample(Near(), 5)
    shard = ClassShard(101, 0, 1)
    rows = sampler.draw(torch.tensor([3, 50]), shard, 8, 0.3).rows
    assert rows is not None
    assert bool(torch.isin(sampler.drawn(shard, 8, 0.3), rows).all())


class _Event:
    """Counts how a buffer is used: it must not be filled again before somebody waited for its last use."""

    def __init__(self) -> None:
        self.is_open = False

    def record(self, stream: Any) -> None:
        assert not self.is_open
        self.is_open = True

    def synchronize(self) -> None:
        self.is_open = False


class _Stream:
    def wait_event(self, event: Any) -> None:
        assert event is not None


@pytest.fixture
def staged(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of the copies on CUDA, with pieces of two entries, on the CPU."""
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    monkeypatch.setattr(host_rows, "_pinned", lambda shape, dtype: torch.empty(shape, dtype=dtype))
    monkeypatch.setattr(host_rows, "_STAGE_BYTES", 2 * 3 * 4)


@pytest.mark.usefixtures("staged")
@pytest.mark.parametrize("count", [0, 1, 2, 5, 9])
def test_copies_through_buffers_move_every_piece(count: int) -> None:
    copies = host_rows._Copies(CPU)
    copies._stream = _Stream()  # type: ignore[assignment]
    held = {"weight": torch.arange(39.0).view(13, 1, 3), "square_sum": torch.arange(13.0).view(13, 1)}
    classes = torch.tensor([0, 2, 3, 5, 6, 7, 9, 11, 12])[:count]
    for number in range(2):
        before = {name: table.clone() for name, table in held.items()}
        part = copies.read(held, classes)
        for name, entry in part.entries.items():
            assert torch.equal(entry, before[name][classes])
            entry.add_(100 * (number + 1))
        copies.write(held, host_rows.Part(classes, part.entries, arrived=_Event()))
        for name, table in held.items():
            before[name][classes] += 100 * (number + 1)
            assert torch.equal(table, before[name])
