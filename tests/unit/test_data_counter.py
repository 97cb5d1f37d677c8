from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megaclass.data.counter import Stream, hash_counters, uniform

KNOWN = [18347558409792611138, 9566222180582495556, 4742448774969610845]


@given(st.integers(0, 2**63 - 1), st.lists(st.integers(0, 2**62), min_size=1, max_size=9))
def test_a_number_depends_on_its_counters_and_not_on_its_neighbours(seed: int, counters: list[int]) -> None:
    together = hash_counters(seed, Stream.AUGMENT, np.array(counters), 3)
    alone = [int(hash_counters(seed, Stream.AUGMENT, counter, 3)) for counter in counters]
    assert together.tolist() == alone


def test_known_values_never_change() -> None:
    """Changing these changes what every seed means, and breaks the resumption of runs."""
    values = hash_counters(7, Stream.ORDER, np.arange(3), 11).tolist()
    assert values == KNOWN


def test_seed_stream_and_the_order_of_counters_matter() -> None:
    base = hash_counters(1, Stream.ORDER, 2, 3)
    assert len({int(base), int(hash_counters(2, Stream.ORDER, 2, 3)), int(hash_counters(1, Stream.NOISE, 2, 3))}) == 3
    assert hash_counters(1, Stream.ORDER, 3, 2) != base
    assert hash_counters(1, Stream.ORDER, 2) != hash_counters(1, Stream.ORDER, 2, 0)


def test_counters_are_broadcast() -> None:
    assert hash_counters(0, Stream.NOISE, np.arange(5)[:, None], np.arange(7)).shape == (5, 7)


def test_uniform_is_even_and_below_one() -> None:
    numbers = uniform(hash_counters(3, Stream.NOISE, np.arange(100_000)))
    counts = np.bincount((numbers * 100).astype(int), minlength=100)
    # 99 degrees of freedom: 99 +- 14.
    assert 50 < ((counts - 1000) ** 2 / 1000).sum() < 160
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.015
    assert uniform(np.array([2**64 - 1], np.uint64))[0] < 1


def test_one_flipped_bit_of_a_counter_flips_half_of_the_result() -> None:
    counters = np.arange(500, dtype=np.uint64)
    for bit in range(0, 63, 9):
        changed = hash_counters(0, Stream.ORDER, counters) ^ hash_counters(
            0, Stream.ORDER, counters ^ np.uint64(1 << bit)
        )
        assert abs(np.unpackbits(changed.view(np.uint8)).mean() - 0.5) < 0.02
