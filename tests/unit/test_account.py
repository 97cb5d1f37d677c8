from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megaclass.data.batch import Batch, SkippedSample
from megaclass.errors import DataError
from megaclass.observe.skipped import MAX_LISTED, SkippedList
from megaclass.parallel.process import World
from megaclass.train.account import SampleAccount, SampleCounts
from tests.support.spawn import spawn

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"), group=None, store=None)


def skip(sample: int, reason: str = "bad-image") -> SkippedSample:
    return SkippedSample(sample, reason, "shard a.tar, byte 0: broken", "a.tar", f"key-{sample}")


def batch(size: int, *skipped: SkippedSample, num_read: int | None = -1) -> Batch:
    read = size + len(skipped) if num_read == -1 else num_read
    return Batch(torch.empty(0), torch.zeros(size), torch.arange(size), 0, skipped, read)


def account(world: World = ALONE, position: int = 0, step: int = 0, **more: Any) -> SampleAccount:
    options = {"num_samples": 100, "budget": 0.1, "extra": {}} | more
    return SampleAccount(world, position=position, step=step, **options)


def test_counts_by_reason_over_steps() -> None:
    books = account()
    books.count([batch(5, skip(1)), batch(5)])
    assert books.settle(1, 10) == SampleCounts(1, 10, 11, {"bad-image": 1})
    books.count([batch(10, skip(2, "bad-tar"), skip(1))], num_unlisted=2)
    assert books.settle(2, 20, is_end_of_epoch=True) == SampleCounts(2, 20, 23, {"bad-image": 2, "bad-tar": 1}, 2, 1)
    # Asked again without a step in between it says the same.
    assert books.settle(2, 20) == books.settled


def test_counts_of_a_checkpoint_go_on() -> None:
    before = account()
    before.count([batch(10, skip(1))], num_unlisted=1)
    counts = before.settle(1, 10, is_end_of_epoch=True)
    extra = json.loads(json.dumps({"skipped": counts.skipped, "samples": counts.to_state(), "best": None}))
    after = account(position=10, step=1, extra=extra)
    assert after.settled == counts
    after.count([batch(10, skip(1))])
    assert after.settle(2, 20) == SampleCounts(2, 20, 22, {"bad-image": 2}, 1, 1)


def test_checkpoints_from_before_reading_was_counted() -> None:
    books = account(position=30, step=3, extra={"skipped": {"bad-image": 2}, "best": None})
    assert books.settle(3, 30) == SampleCounts(3, 30, 32, {"bad-image": 2})


def test_samples_unaccounted_for_end_the_run() -> None:
    books = account()
    books.count([batch(10, skip(1), num_read=12)])
    with pytest.raises(
        AssertionError,
        match=r"step 1: 12 samples read, 10 trained, 1 skipped: read is not trained \+ skipped, samples are una",
    ):
        books.settle(1, 10)
    books = account()
    books.count([batch(9)])
    with pytest.raises(AssertionError, match="9 trained, 0 skipped, but the order stands at 10: trained is not the"):
        books.settle(1, 10)


def test_the_budget_of_the_whole_run() -> None:
    """Ten in a hundred are allowed; an attempt that starts with nine has one left, which no rank alone can know."""
    extra = {"skipped": {"bad-image": 9}, "samples": {"read": 59, "unlisted": 0, "epochs_checked": 0}}
    books = account(position=50, step=5, extra=extra)
    books.count([batch(10, skip(1))])
    assert books.settle(6, 60).num_skipped == 10
    books.count([batch(10, skip(1))])
    with pytest.raises(
        DataError,
        match=r"11 of the 81 samples read up to step 7 had to be skipped, allowed are 10 \(dataset.bad_sample_budget "
        r"0\.1\); skipped/ in the run directory lists them; repair the data set or raise the budget",
    ):
        books.settle(7, 70)


@pytest.mark.parametrize(
    ("position", "expected"), [(96, False), (108, True), (192, False), (204, True), (12, False), (600, True)]
)
def test_ends_of_epochs(position: int, expected: bool) -> None:
    assert account().is_end_of_epoch(position, 12) is expected


def settle_on_rank(world: World) -> SampleCounts:
    books = account(world)
    books.count([batch(4, *[skip(number) for number in range(world.rank)])], num_unlisted=world.rank)
    return books.settle(1, 4 * world.size)


@pytest.mark.distributed
def test_all_ranks_have_the_sum() -> None:
    assert spawn(settle_on_rank, 3) == [SampleCounts(1, 12, 15, {"bad-image": 3}, 3)] * 3


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_bad_sample_is_listed_once_over_all_attempts(tmp_path: Path) -> None:
    first = SkippedList(tmp_path, 1, 2)
    assert first.add(1, []) == 0
    assert not (tmp_path / "skipped").exists()
    assert first.add(3, [skip(7), skip(8)]) == 0
    assert first.add(4, [skip(7)]) == 0
    path = tmp_path / "skipped" / "rank-2.jsonl"
    with path.open("a") as file:
        file.write('{"attempt": 1, "sam')  # killed while writing
    SkippedList(tmp_path, 2, 2).add(5, [skip(8), skip(9, "bad-tar")])
    text = path.read_text().replace('{"attempt": 1, "sam\n', "")
    assert [json.loads(line) for line in text.splitlines()] == [
        {"attempt": 1, "step": 3, "sample": 7, "shard": "a.tar", "key": "key-7", "reason": "bad-image",
         "detail": "shard a.tar, byte 0: broken"},
        {"attempt": 1, "step": 3, "sample": 8, "shard": "a.tar", "key": "key-8", "reason": "bad-image",
         "detail": "shard a.tar, byte 0: broken"},
        {"attempt": 2, "step": 5, "sample": 9, "shard": "a.tar", "key": "key-9", "reason": "bad-tar",
         "detail": "shard a.tar, byte 0: broken"},
    ]  # fmt: skip


def test_the_list_is_bounded_and_the_rest_counted(tmp_path: Path) -> None:
    listing = SkippedList(tmp_path, 1, 0)
    hostile = SkippedSample(0, "bad-tar", "\u2028\n" * 10**5, "s3://me:secret@store/" + "x" * 10**5, None)
    assert listing.add(1, [hostile, *(skip(number) for number in range(1, MAX_LISTED - 1))]) == 0
    assert listing.add(2, [skip(MAX_LISTED - 1), skip(MAX_LISTED), skip(3), skip(MAX_LISTED + 1)]) == 2
    assert SkippedList(tmp_path, 2, 0).add(3, [skip(MAX_LISTED), skip(5)]) == 1
    path = tmp_path / "skipped" / "rank-0.jsonl"
    found = lines(path)
    assert [line["sample"] for line in found] == list(range(MAX_LISTED))
    assert len(found[0]["detail"]) == len(found[0]["shard"]) == 500
    assert "secret" not in found[0]["shard"]
    assert found[0]["key"] is None
    assert path.stat().st_size < MAX_LISTED * 7000
