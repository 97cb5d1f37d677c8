"""Numbers drawn from a range: the same set at any partition, exact probabilities, all subsets, and what it costs."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2
from torch import Tensor

from megaclass.counter import STREAM_BATCH, STREAM_ROWS, stream_key
from megaclass.parallel.shard import ClassShard
from megaclass.sampling import picks
from megaclass.sampling.picks import number_drawn, stratified, uniform
from tests.support.largest import Largest

CPU = torch.device("cpu")
BOTH = pytest.mark.parametrize("pick", [stratified, uniform])
Pick = Callable[..., Tensor]


def whole(pick: Pick, total: int, num_picks: int, key: int) -> Tensor:
    return pick(total, num_picks, 0, total, key=key, device=CPU)


@BOTH
@given(total=st.integers(1, 6000), data=st.data(), key=st.integers(0, 2**64 - 1))
@settings(max_examples=100, deadline=None)
def test_any_partition_yields_the_same_sorted_distinct_picks(
    pick: Pick, total: int, data: st.DataObject, key: int
) -> None:
    num_picks = data.draw(st.integers(1, total))
    inner = data.draw(st.lists(st.integers(0, total), max_size=6))
    expected = whole(pick, total, num_picks, key)
    assert expected.dtype == torch.int64
    assert len(expected) == num_picks
    assert bool((expected.diff() > 0).all())
    assert 0 <= int(expected[0]) <= int(expected[-1]) < total
    borders = [0, *sorted(inner), total]
    parts = [pick(total, num_picks, a, b, key=key, device=CPU) for a, b in itertools.pairwise(borders)]
    assert torch.equal(torch.cat(parts), expected)


@BOTH
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 17])
def test_any_number_of_shards_yields_the_same_picks(pick: Pick, world_size: int) -> None:
    shards = [ClassShard(13, index, world_size) for index in range(world_size)]
    for draw in range(20):
        parts = [pick(13, 5, s.start, s.stop, key=stream_key(0, 1, draw), device=CPU) for s in shards]
        assert torch.equal(torch.cat(parts), whole(pick, 13, 5, stream_key(0, 1, draw)))


@BOTH
def test_nothing_is_drawn_from_an_empty_range_or_for_no_picks(pick: Pick) -> None:
    for start, stop, num_picks in ((4, 4, 3), (10, 10, 3), (0, 10, 0)):
        assert pick(10, num_picks, start, stop, key=1, device=CPU).tolist() == []


def stratified_outcomes(total: int, num_picks: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """All outcomes of `stratified`, each as likely as the others: every offset with every pick of every stratum."""
    borders = [stratum * total // num_picks for stratum in range(num_picks + 1)]
    choices = [range(end - begin) for begin, end in itertools.pairwise(borders)]
    for offset in range(total):
        monkeypatch.setattr(picks, "mix", lambda key, offset=offset: offset)
        for chosen in itertools.product(*choices):
            # The upper 31 of a hash's 63 bits, times the stratum's size, give the place: the smallest such hash.
            sizes = [end - begin for begin, end in itertools.pairwise(borders)]
            hashes = [-(-(place << 31) // size) << 32 for place, size in zip(chosen, sizes, strict=True)]
            table = torch.tensor(hashes)
            monkeypatch.setattr(picks, "hashed", lambda key, strata, table=table: table[strata])
            monkeypatch.setattr(picks, "hashed_on_host", lambda key, stratum, hashes=hashes: hashes[stratum])
            yield whole(stratified, total, num_picks, 0).tolist()


@pytest.mark.parametrize(("total", "num_picks"), [(7, 3), (5, 2), (6, 4), (4, 1), (3, 3), (8, 3)])
def test_over_all_offsets_every_number_is_picked_equally_often(
    total: int, num_picks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The inclusion probability is exactly num_picks / total, and any two numbers can meet: by counting all cases."""
    outcomes = list(stratified_outcomes(total, num_picks, monkeypatch))
    included = Counter(number for outcome in outcomes for number in outcome)
    assert all(included[number] * total == num_picks * len(outcomes) for number in range(total)), included
    if num_picks > 1:
        together = {pair for outcome in outcomes for pair in combinations(outcome, 2)}
        assert together == set(combinations(range(total), 2))


@given(total=st.integers(1, 2**32 - 2), data=st.data())
@settings(deadline=None)
def test_picks_of_huge_ranges_lie_in_their_strata(total: int, data: st.DataObject) -> None:
    """The strata's bounds are found in float64 and the place in a product of 63 bits: exact up to four billion."""
    num_picks = data.draw(st.integers(1, min(total, 10**6)))
    first = data.draw(st.integers(max(0, num_picks - 5), num_picks - 1))
    found = picks._picks(first, num_picks - 1, total, num_picks, 7, CPU).tolist()
    strata = range(first, num_picks)
    assert found == [picks._pick(stratum, total, num_picks, 7) for stratum in strata]
    assert all(
        j * total // num_picks <= pick < (j + 1) * total // num_picks for j, pick in zip(strata, found, strict=True)
    )


@BOTH
@pytest.mark.parametrize(("total", "num_picks"), [(13, 5), (10, 3), (64, 64), (7, 1), (5, 4), (4999, 1000)])
def test_inclusion_probability_of_real_draws(pick: Pick, total: int, num_picks: int) -> None:
    draws = 3000 if total < 1000 else 200
    drawn = torch.cat([whole(pick, total, num_picks, stream_key(0, STREAM_ROWS, draw)) for draw in range(draws)])
    share = torch.bincount(drawn, minlength=total).double() / draws
    probability = num_picks / total
    # Six standard errors of a share: a false alarm in one of 4,999 numbers once in 100,000 sets of draws.
    allowed = 6 * math.sqrt(probability * (1 - probability) / draws) + 1e-12
    assert float((share - probability).abs().max()) <= allowed


@pytest.mark.parametrize(("total", "num_picks"), [(4, 2), (5, 2), (7, 3), (16, 2)])
def test_uniform_draws_every_subset_alike(total: int, num_picks: int) -> None:
    draws = 8000
    found = Counter(tuple(whole(uniform, total, num_picks, stream_key(3, 1, draw)).tolist()) for draw in range(draws))
    subsets = list(combinations(range(total), num_picks))
    expected = draws / len(subsets)
    distance = sum((found[subset] - expected) ** 2 / expected for subset in subsets)
    # False-alarm rate: one in a million.
    assert distance <= chi2.isf(1e-6, len(subsets) - 1)


def test_stratified_does_not_draw_every_subset_alike() -> None:
    """The test above can fail: of three strata no more than two picks are ever neighbours in a row."""
    found = {tuple(whole(stratified, 7, 3, stream_key(3, 1, draw)).tolist()) for draw in range(1000)}
    assert (0, 1, 2) not in found
    assert (0, 2, 4) in found


@pytest.mark.parametrize("total", [5003, 16384, 1_000_003])
def test_uniform_spreads_over_a_large_range_like_drawing_without_replacement(total: int) -> None:
    """The number of picks in a third of the range has the mean and the variance of the hypergeometric distribution."""
    draws, num_picks, inside = 500, 60, total // 3
    counts = torch.tensor(
        [len(uniform(total, num_picks, 0, inside, key=stream_key(8, 1, draw), device=CPU)) for draw in range(draws)]
    ).double()
    share = inside / total
    mean, variance = num_picks * share, num_picks * share * (1 - share) * (total - num_picks) / (total - 1)
    # Five standard errors each; that of a variance is about sqrt(2 / draws) of it.
    assert abs(float(counts.mean()) - mean) <= 5 * math.sqrt(variance / draws)
    assert abs(float(counts.var()) - variance) <= 5 * variance * math.sqrt(2 / draws)


@pytest.mark.parametrize(("total", "num_picks"), [(13, 5), (5, 2), (3, 1)])
def test_over_all_offsets_a_permutation_picks_evenly(
    total: int, num_picks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What large ranges use, tried where it would be uneven: whatever the permutation, the offset makes up for it."""
    monkeypatch.setattr(picks, "_SORTED", 0)
    real = picks.mix
    for key in range(20):
        included: Counter[int] = Counter()
        for offset in range(total):
            monkeypatch.setattr(
                picks,
                "mix",
                lambda x, offset=offset, key=key: offset if x == key ^ picks._FEISTEL_ROUNDS else real(x),
            )
            included.update(whole(uniform, total, num_picks, key).tolist())
        assert included == Counter(dict.fromkeys(range(total), num_picks))


@BOTH
def test_draws_replay_and_differ_between_draws_seeds_and_streams(pick: Pick) -> None:
    first = whole(pick, 1003, 100, stream_key(7, STREAM_ROWS, 4))
    assert torch.equal(first, whole(pick, 1003, 100, stream_key(7, STREAM_ROWS, 4)))
    others = [stream_key(7, STREAM_ROWS, 5), stream_key(8, STREAM_ROWS, 4), stream_key(7, STREAM_BATCH, 4)]
    drawn = [first, *(whole(pick, 1003, 100, key) for key in others)]
    for one, other in combinations(drawn, 2):
        # Independent draws share about 10; the standard deviation is below 3.
        assert len(set(one.tolist()) & set(other.tolist())) <= 25


@BOTH
@pytest.mark.parametrize("total", [10**6, 10**9])
def test_cost_is_that_of_the_number_drawn(pick: Pick, total: int) -> None:
    with Largest() as largest:
        drawn = whole(pick, total, 1000, 3)
    assert len(drawn) == 1000
    assert largest.numel <= 1000


def test_a_shard_makes_only_its_own_part_of_a_stratified_draw() -> None:
    with Largest() as largest:
        drawn = stratified(10**9, 10_000, 2 * 10**8, 3 * 10**8, key=5, device=CPU)
    assert 999 <= len(drawn) <= 1001
    assert largest.numel <= 1002


def test_number_drawn_is_the_nearest_and_at_least_one() -> None:
    assert [number_drawn(rate, 10) for rate in (1.0, 0.26, 0.24, 0.01, 1e-9)] == [10, 3, 2, 1, 1]
    assert number_drawn(1 / 64, 10_000_000) == 156_250
    assert number_drawn(0.3, 1) == 1
