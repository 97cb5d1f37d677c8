"""Draws: exact inclusion probabilities, the same set at any partition, replayable, and never a host random number."""

from __future__ import annotations

import collections

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megaclass import sampling
from megaclass.errors import ConfigError
from megaclass.parallel.shard import ClassShard

CPU = torch.device("cpu")


def whole(total: int, picks: int, key: int) -> torch.Tensor:
    return sampling.stratified(total, picks, 0, total, key=key, device=CPU)


@given(total=st.integers(1, 2000), data=st.data(), key=st.integers(0, 2**64 - 1), parts=st.integers(1, 7))
@settings(max_examples=200, deadline=None)
def test_any_partition_yields_the_same_sorted_distinct_picks(
    total: int, data: st.DataObject, key: int, parts: int
) -> None:
    picks = data.draw(st.integers(1, total))
    expected = whole(total, picks, key)
    assert len(expected) == picks
    assert bool((expected.diff() > 0).all())
    assert 0 <= int(expected[0]) <= int(expected[-1]) < total
    shards = [ClassShard(total, index, parts) for index in range(parts)]
    pieces = [sampling.stratified(total, picks, s.start, s.stop, key=key, device=CPU) for s in shards]
    assert torch.equal(torch.cat(pieces), expected)


@pytest.mark.parametrize(("total", "picks"), [(13, 5), (10, 3), (64, 64), (7, 1)])
def test_inclusion_probability_is_exact(total: int, picks: int) -> None:
    draws = 4000
    counts: collections.Counter[int] = collections.Counter()
    for draw in range(draws):
        counts.update(whole(total, picks, sampling.stream_key(0, 1, draw)).tolist())
    probability = picks / total
    # Five standard errors of a share: a chance of about 6e-7 per class to fail without a fault.
    allowed = 5 * (probability * (1 - probability) / draws) ** 0.5 + 1e-12
    for number in range(total):
        assert abs(counts[number] / draws - probability) <= allowed, (number, counts[number])


def test_any_two_classes_can_meet() -> None:
    """Fixed strata would never draw two neighbours together; the moving offset does."""
    seen = set()
    for draw in range(500):
        picks = whole(10, 5, sampling.stream_key(1, 1, draw)).tolist()
        seen.update((a, b) for a in picks for b in picks if a < b)
    assert len(seen) == 45


def test_host_and_device_hash_agree() -> None:
    for value in (0, 1, 12345678901234567890, 2**63, 2**64 - 1):
        tensor = torch.tensor([sampling._signed(value)])
        assert int(sampling._mix_tensor(tensor)[0]) % 2**64 == sampling.mix(value)


def test_draws_replay_and_differ_between_draws_and_seeds() -> None:
    shard = ClassShard(1003, 1, 3)
    labels = torch.tensor([5, 1002])
    sampler = sampling.ClassSample(0.1, seed=7)
    first = sampler.draw(labels, shard, 4).rows
    assert first is not None
    assert torch.equal(first, sampler.draw(labels, shard, 4).rows)
    assert not torch.equal(first, sampler.draw(labels, shard, 5).rows)
    assert not torch.equal(first, sampling.ClassSample(0.1, seed=8).draw(labels, shard, 4).rows)


def test_shards_draw_different_local_rows() -> None:
    """Peers that seed every rank alike draw the same local rows everywhere."""
    labels = torch.zeros(1, dtype=torch.int64)
    sampler = sampling.ClassSample(0.1, seed=0)
    drawn = [set(sampler.draw(labels, ClassShard(4000, index, 4), 0).rows.tolist()) for index in range(4)]
    for first in range(4):
        for second in range(first):
            overlap = len(drawn[first] & drawn[second]) / len(drawn[first])
            assert overlap < 0.3, overlap  # expected 0.1


def test_batch_positives_join_the_quota() -> None:
    labels = torch.tensor([0, 999, 500, 500])
    rows = sampling.ClassSample(0.01, seed=0, batch_positives=True).draw(labels, ClassShard(1000, 0, 1), 0).rows
    alone = sampling.ClassSample(0.01, seed=0).draw(labels, ClassShard(1000, 0, 1), 0).rows
    assert rows.tolist() == sorted({*alone.tolist(), 0, 500, 999})


def test_batch_sample_is_the_same_on_every_shard() -> None:
    labels = torch.arange(20)
    sampler = sampling.BatchSample(0.25, seed=0)
    draws = [sampler.draw(labels, ClassShard(1000, index, 3), 9) for index in range(3)]
    assert all(draw.rows is None for draw in draws)
    assert len(draws[0].batch_rows) == 5
    assert all(torch.equal(draw.batch_rows, draws[0].batch_rows) for draw in draws)


def test_cost_does_not_depend_on_the_number_of_classes() -> None:
    rows = whole(10**12, 1000, 3)
    assert len(rows) == 1000
    assert int(rows[-1]) < 10**12


def test_rate_out_of_range_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"classifier.sampling_rate 0.0 is outside \(0, 1\]"):
        sampling.build("classes", 0.0, 0, False)
