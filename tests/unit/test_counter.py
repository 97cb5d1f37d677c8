"""Counter hashes: the same bits on the host and in tensors, even, normal, and apart for different uses."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megaclass import counter

WORDS = st.integers(0, 2**64 - 1)


def as_word(value: torch.Tensor) -> int:
    return int(value) % 2**64


@given(x=WORDS)
def test_host_and_tensor_mix_agree_bit_by_bit(x: int) -> None:
    assert as_word(counter._mix_in_place(torch.tensor([counter.signed(x)]))[0]) == counter.mix(x)


@given(key=WORDS, index=st.integers(0, 2**63 - 1))
def test_host_and_tensor_hash_agree_bit_by_bit(key: int, index: int) -> None:
    found = int(counter.hashed(key, torch.tensor([index]))[0])
    assert found == counter.hashed_on_host(key, index)
    assert 0 <= found < 2**63


def test_mix_is_the_published_splitmix64() -> None:
    """The first outputs of SplitMix64 from seed 1234567, as other implementations list them."""
    gamma, seed = 0x9E3779B97F4A7C15, 1234567
    found = [counter.mix((seed + step * gamma) % 2**64) for step in range(3)]
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@given(x=st.integers(-(2**65), 2**65))
def test_signed_keeps_the_bits(x: int) -> None:
    assert -(2**63) <= counter.signed(x) < 2**63
    assert counter.signed(x) % 2**64 == x % 2**64


def test_a_part_of_the_counters_gives_that_part_of_the_numbers() -> None:
    whole = counter.hashed(7, torch.arange(1003))
    assert torch.equal(counter.hashed(7, torch.arange(400, 733)), whole[400:733])
    assert torch.equal(counter.normal(7, torch.arange(400, 733), torch.float64),
                       counter.normal(7, torch.arange(1003), torch.float64)[400:733])  # fmt: skip


def test_every_bit_is_set_half_of_the_time() -> None:
    number = 20_000
    hashes = counter.hashed(99, torch.arange(number))
    assert len(torch.unique(hashes)) == number
    # Five standard errors of a share of one half: a false alarm in one of 63 bits once in 28,000 keys.
    allowed = 5 * 0.5 / math.sqrt(number)
    for bit in range(63):
        share = float(((hashes >> bit) & 1).double().mean())
        assert abs(share - 0.5) <= allowed, bit


def test_normal_numbers_have_the_moments_of_the_normal_distribution() -> None:
    number = 200_000
    x = counter.normal(5, torch.arange(number), torch.float64)
    # Moment, its true value, the variance of what is averaged: E x^2k is 1, 3, 15, 105 for k = 1 to 4.
    for power, expected, variance in ((1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)):
        # Five standard errors: a chance of 6e-7 for each moment.
        assert abs(float((x**power).mean()) - expected) <= 5 * math.sqrt(variance / number), power
    for border, share in ((-1.0, 0.15865525), (0.0, 0.5), (2.0, 0.97724987)):
        found = float((x < border).double().mean())
        assert abs(found - share) <= 5 * math.sqrt(share * (1 - share) / number), border
    neighbours = float((x[1:] * x[:-1]).mean())
    assert abs(neighbours) <= 5 / math.sqrt(number)


def test_normal_numbers_are_finite_where_the_hash_is_smallest_and_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    extremes = torch.tensor([0, 2**63 - 1])
    monkeypatch.setattr(counter, "hashed", lambda key, counters: extremes)
    x = counter.normal(0, torch.arange(2), torch.float64)
    assert bool(torch.isfinite(x).all())
    assert float(x[0]) == pytest.approx(math.sqrt(2 * 53 * math.log(2)))  # the largest there is, 8.6
    assert float(x[1]) == 0.0


def test_normal_numbers_come_in_the_wanted_type() -> None:
    precise = counter.normal(3, torch.arange(11), torch.float64)
    assert torch.equal(counter.normal(3, torch.arange(11), torch.float32), precise.float())


def test_seeds_streams_and_draws_have_keys_of_their_own() -> None:
    streams = (counter.STREAM_ROWS, counter.STREAM_BATCH, counter.STREAM_MARGIN)
    keys = [counter.stream_key(seed, stream, draw) for seed in range(20) for stream in streams for draw in range(50)]
    assert len(set(keys)) == len(keys)
    assert counter.stream_key(-1, 1, 0) == counter.stream_key(2**64 - 1, 1, 0)


def test_numbers_of_different_streams_are_unrelated() -> None:
    number = 50_000
    first, second = (
        counter.normal(counter.stream_key(0, stream, 4), torch.arange(number), torch.float64)
        for stream in (counter.STREAM_ROWS, counter.STREAM_MARGIN)
    )
    assert not bool((first == second).any())
    assert abs(float((first * second).mean())) <= 5 / math.sqrt(number)
