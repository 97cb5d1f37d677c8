"""The windowed order promises what the full one does, and touches few shards at a time."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaclass.config import Dataset
from megaclass.data.open import open_reader
from megaclass.data.windows import WindowOrder
from tests.support.tiny_dataset import write_tiny_dataset

SHARD_SIZES = st.lists(st.integers(0, 60) | st.integers(900, 1300), min_size=1, max_size=20).filter(any)


@settings(max_examples=100, deadline=None)
@given(SHARD_SIZES, st.integers(0, 2**63 - 1), st.integers(1, 25), st.integers(0, 10**6))
def test_every_epoch_is_a_permutation(sizes: list[int], seed: int, window: int, epoch: int) -> None:
    order = WindowOrder(np.array(sizes), seed, window)
    assert order.num_samples == sum(sizes)
    ids = order.sample_ids(np.arange(sum(sizes)) + epoch * sum(sizes))
    assert np.array_equal(np.sort(ids), np.arange(sum(sizes)))


@settings(max_examples=100, deadline=None)
@given(SHARD_SIZES, st.integers(1, 25), st.data())
def test_a_position_does_not_depend_on_the_others_asked_for(sizes: list[int], window: int, data: st.DataObject) -> None:
    every = WindowOrder(np.array(sizes), 5, window).sample_ids(np.arange(4 * sum(sizes)))
    some = np.array(data.draw(st.lists(st.integers(0, 4 * sum(sizes) - 1), min_size=1)))
    order = WindowOrder(np.array(sizes), 5, window)
    assert np.array_equal(order.sample_ids(some), every[some])
    assert np.array_equal(order.visits(some)[1], some // sum(sizes))


@settings(max_examples=100, deadline=None)
@given(SHARD_SIZES, st.integers(1, 25), st.integers(0, 5))
def test_a_shard_is_read_in_one_window_of_few_shards(sizes: list[int], window: int, epoch: int) -> None:
    ids = WindowOrder(np.array(sizes), 3, window).sample_ids(np.arange(sum(sizes)) + epoch * sum(sizes))
    shards = np.searchsorted(np.cumsum(sizes), ids, side="right")
    seen: set[int] = set()
    start = 0
    while start < len(ids):
        # The smallest piece from here on that holds whole shards is a window, or a part of one.
        members: set[int] = set()
        end = start
        while end == start or sum(sizes[shard] for shard in members) != end - start:
            members.add(int(shards[end]))
            end += 1
        assert len(members) <= window
        assert not members & seen
        seen |= members
        start = end
    assert seen == {shard for shard, size in enumerate(sizes) if size}


def test_windows_hold_about_as_many_shards_each() -> None:
    """Ten shards in windows of at most four: three windows of three or four, never one of a single shard."""
    ids = WindowOrder(np.full(10, 100), 1, 4).sample_ids(np.arange(1000))
    shards = ids // 100
    assert len(set(shards[:300].tolist())) == len(set(shards[300:600].tolist())) == 3
    assert len(set(shards[600:].tolist())) == 4


def test_epochs_and_seeds_differ_in_shards_and_samples() -> None:
    sizes = np.full(20, 50)
    ids = WindowOrder(sizes, 5, 3).sample_ids(np.arange(3000)).reshape(3, 1000)
    other = WindowOrder(sizes, 6, 3).sample_ids(np.arange(1000))
    for one, two in ((ids[0], ids[1]), (ids[1], ids[2]), (ids[0], other), (ids[0], np.arange(1000))):
        assert (one == two).sum() < 10
        assert not np.array_equal(one[:100] // 50, two[:100] // 50)


def test_one_window_is_a_permutation_of_everything() -> None:
    ids = WindowOrder(np.full(20, 500), 2, 20).sample_ids(np.arange(10_000))
    assert abs(np.corrcoef(ids[:-1], ids[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(np.arange(10_000), ids)[0, 1]) < 0.05


def epochs_of(order: WindowOrder, num_epochs: int) -> np.ndarray:
    """Ids [epoch, place]."""
    places = np.arange(order.num_samples)
    return np.stack([order.sample_ids(places + epoch * len(places)) for epoch in range(num_epochs)])


def test_all_orders_of_three_shards_and_of_their_samples_are_equally_likely() -> None:
    """Shards of 2, 1 and 2 samples, one to a window: 3! orders of shards times 2! * 1! * 2! within them."""
    num_epochs = 4800
    ids = epochs_of(WindowOrder(np.array([2, 1, 2]), 9, 1), num_epochs)
    _, counts = np.unique(ids, axis=0, return_counts=True)
    expected = num_epochs / (math.factorial(3) * 4)
    # 23 degrees of freedom: 23 +- 7.
    assert len(counts) == 24
    assert ((counts - expected) ** 2 / expected).sum() < 56


def test_every_sample_is_as_likely_early_as_late() -> None:
    num_epochs = 2000
    ids = epochs_of(WindowOrder(np.array([7, 0, 3, 12, 5]), 4, 2), num_epochs)
    places = np.argsort(ids, axis=1)  # [epoch, sample] -> place
    # In units of the standard error of a mean over independent epochs, all samples at once.
    deviation = (places.mean(0) - 13) / (places.std(0) / math.sqrt(num_epochs))
    # Whatever the size of its shard: windows of two and two shards look the same from both ends.
    assert np.abs(deviation).max() < 4.5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_dataset(tmp_path_factory.mktemp("windows"), 13, 5, 8, num_shards=7)


def read(folder: Path, world_size: int, position: int, num_steps: int, **options: object) -> list[int]:
    """Ids of steps of 12 samples over all ranks, in rank order."""
    dataset = Dataset(path=folder, image_size=8, channels=1, shuffle_window=2, **options)
    ids = []
    for rank in range(world_size):
        reader = open_reader(
            dataset, batch_size=12 // world_size, accumulation_steps=1, rank=rank, world_size=world_size, seed=3
        )
        reader.seek(position)
        batches = iter(reader)
        ids.append([next(batches).ids.tolist() for _ in range(num_steps)])
        reader.close()
    return [sample for step in zip(*ids, strict=True) for part in step for sample in part]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_a_reader_reads_in_windows_at_every_world_size_and_from_everywhere(folder: Path, world_size: int) -> None:
    ids = read(folder, 1, 0, 17)
    assert read(folder, world_size, 0, 17) == ids
    assert read(folder, world_size, 60, 12) == ids[60:]
    for epoch in range(3):
        assert sorted(ids[65 * epoch : 65 * (epoch + 1)]) == list(range(65))
    sizes = [len(part) for part in np.array_split(np.arange(65), 7)]
    shards = np.searchsorted(np.cumsum(sizes), ids, side="right")
    assert all(len(set(shards[start : start + 9].tolist())) <= 4 for start in range(65))


def test_windows_over_a_part_of_the_classes(folder: Path) -> None:
    ids = read(folder, 2, 0, 5, num_classes=4)
    assert sorted(ids[:20]) == sorted(ids[20:40]) == list(range(20))
