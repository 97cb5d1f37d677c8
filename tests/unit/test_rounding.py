"""Stochastic rounding: right on average, exact where bfloat16 is, and a function of counters alone."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megaclass.optim.rounding import stochastically


def test_the_mean_over_keys_is_the_number_itself() -> None:
    values = torch.randn(11, 37, generator=torch.Generator().manual_seed(0))
    rows, num_keys = torch.arange(11), 2000
    total = torch.zeros(11, 37, dtype=torch.float64)
    for key in range(num_keys):
        total += stochastically(values.clone(), rows, key).double()
    spacing = torch.exp2(values.abs().log2().floor() - 7).double()
    # A rounding has a deviation of at most half the spacing; 407 numbers stay within five standard errors.
    assert float(((total / num_keys - values).abs() / spacing).max()) < 5 * 0.5 / num_keys**0.5


@given(
    values=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=9),
    key=st.integers(0, 2**64 - 1),
    row=st.integers(0, 10**9),
)
@settings(deadline=None)
def test_each_number_goes_to_one_of_its_two_neighbours(values: list[float], key: int, row: int) -> None:
    exact = torch.tensor([values])
    rounded = stochastically(exact.clone(), torch.tensor([row]), key).float()
    is_exact = exact.bfloat16().float() == exact
    assert torch.equal(rounded[is_exact], exact[is_exact])
    toward_zero = (exact.view(torch.int32) & -65536).view(torch.float32)
    away = ((exact.view(torch.int32) & -65536) + 65536).view(torch.float32)
    assert bool(((rounded == toward_zero) | (rounded == away)).all())


def test_bits_depend_on_key_row_and_column_and_on_nothing_else() -> None:
    values = torch.full((6, 10), 1.001)
    whole = stochastically(values.clone(), torch.arange(6), 5)
    part = stochastically(values[:3].clone(), torch.tensor([4, 0, 3]), 5)
    assert torch.equal(part, whole[[4, 0, 3]])
    assert not torch.equal(stochastically(values.clone(), torch.arange(6), 6), whole)
    many = stochastically(torch.full((500, 40), 1.0 + 2**-8), torch.arange(500), 1).float() > 1.0
    for axis in (0, 1):
        assert 0 < many.float().mean(dim=axis).min() < many.float().mean(dim=axis).max() < 1
    # Near ones in a row and in a column round independently of each other.
    for lag in range(1, 9):
        for first, second in ((many[:, :-lag], many[:, lag:]), (many[:-lag], many[lag:])):
            together = float((first & second).float().mean())
            assert abs(together - 0.25) < 5 * (0.25 * 0.75 / first.numel()) ** 0.5, lag
