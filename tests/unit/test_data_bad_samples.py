from __future__ import annotations

import pytest

from megaclass.data.bad_samples import BadSample, SkipBudget
from megaclass.data.batch import SkippedSample
from megaclass.errors import DataError

ONE = [SkippedSample(3, "bad-image", "shard a.tar, byte 0: broken")]


def test_one_bad_sample_in_the_first_batch_is_judged_as_one_of_an_epoch() -> None:
    budget = SkipBudget(0.001, 2000, 1)
    budget.count(32, ONE)
    budget.count(32, ONE)
    with pytest.raises(DataError, match=r"3 of the 99 samples this rank read had to be skipped, allowed are 2"):
        budget.count(32, ONE)


def test_the_share_counts_in_the_long_run() -> None:
    budget = SkipBudget(0.01, 1000, 1)
    for _ in range(50):
        budget.count(100, ONE)
    five = ONE * 5
    with pytest.raises(DataError, match=r"allowed are 51 .*a\.tar, byte 0: broken \(bad-image\); repair the data set"):
        budget.count(100, five)


@pytest.mark.parametrize(("share", "num_samples"), [(0.0, 10**6), (0.001, 500)])
def test_a_share_below_one_sample_allows_none(share: float, num_samples: int) -> None:
    with pytest.raises(DataError, match=f"allowed are 0 .dataset.bad_sample_budget {share:g}."):
        SkipBudget(share, num_samples, 1).count(10, ONE)


def test_good_batches_never_raise_and_a_restart_forgets() -> None:
    budget = SkipBudget(0.001, 1000, 1)
    budget.count(10, ONE)
    budget.restart()
    budget.count(10, ONE)
    budget.count(10, [])
    SkipBudget(0.0, 10, 1).count(10, [])


def test_ranks_are_allowed_the_play_of_chance() -> None:
    """Two bad samples in 2000 are within 0.1 %, also when both fall to the same of two ranks."""
    budget = SkipBudget(0.001, 2000, 2)
    budget.count(32, ONE)
    budget.count(32, ONE)
    with pytest.raises(DataError, match="6 of the 102 samples this rank read had to be skipped, allowed are 5"):
        budget.count(32, ONE * 4)


def test_a_bad_sample_as_an_error_of_the_users() -> None:
    error = BadSample("bad-label", "label 7").located("shard x.tar, byte 5").as_data_error()
    assert str(error) == (
        "shard x.tar, byte 5: label 7 (bad-label); repair the data set, or set dataset.on_bad_sample: skip to go on "
        "without such samples"
    )
