"""Exact cosines, counter draws and the order of classes: what the protocols share."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megaclass.errors import NumericError
from megaclass.evaluate.class_order import class_order
from megaclass.evaluate.draws import Draws, Purpose
from megaclass.evaluate.similarity import TILE_COLUMNS, check_unit_length, on_grid, pair_cosines, tiles, unit_length


def _random(n, dim, seed=0):
    return unit_length(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("dim", [1, 7, 512])
def test_cosines_do_not_depend_on_how_they_are_computed(dim):
    x = _random(301, dim)
    whole = on_grid(x) @ on_grid(x).T
    single = torch.stack([on_grid(x[i : i + 1]).flip(1) @ on_grid(x).flip(1).T for i in range(len(x))])[:, 0]
    left, right = np.divmod(np.arange(301 * 301), 301)
    pairs = pair_cosines(x, left, right).reshape(301, 301)
    assert torch.equal(whole, single)
    assert np.array_equal(whole.numpy(), pairs)
    assert torch.equal(whole, whole.T)


def test_cosines_are_close_to_plain_float64():
    x = _random(50, 7)
    assert torch.allclose(on_grid(x) @ on_grid(x).T, x.double() @ x.double().T, rtol=0, atol=1e-7)


def test_tiles_cover_the_gallery_in_order():
    x = _random(TILE_COLUMNS + 13, 3)
    found = list(tiles(x[:5], x))
    assert [(part.start, part.stop) for part, _ in found] == [(0, TILE_COLUMNS), (TILE_COLUMNS, TILE_COLUMNS + 13)]
    assert torch.equal(torch.cat([tile for _, tile in found], dim=1), on_grid(x[:5]) @ on_grid(x).T)


@given(st.integers(-20, 20), st.integers(0, 5))
def test_unit_length_ignores_scale(exponent, seed):
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(unit_length(x), unit_length(x * 2.0**exponent))


def test_unit_length_keeps_zero_and_takes_other_types():
    assert torch.equal(unit_length(torch.zeros(2, 7)), torch.zeros(2, 7))
    for dtype in (torch.float64, torch.bfloat16):
        made = unit_length(torch.randn(5, 7).to(dtype))
        assert made.dtype == torch.float32
        assert torch.allclose(made.norm(dim=1), torch.ones(5), atol=1e-6)
    assert torch.allclose(unit_length(torch.full((1, 4), 1e-300, dtype=torch.float64)), torch.full((1, 4), 0.5))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_embeddings_that_are_not_finite_are_an_error(value):
    x = _random(13, 7)
    x[3, 2] = x[5, 0] = value
    with pytest.raises(
        NumericError, match=r"2 of 13 embeddings are not finite \(the first is sample 3\).*lower optim\.lr"
    ):
        check_unit_length(x)


def test_embeddings_that_are_not_of_unit_length_are_our_mistake():
    with pytest.raises(AssertionError, match="unit length"):
        check_unit_length(_random(13, 7) * 2)


def test_draws_are_fixed_for_good():
    assert Draws(0, Purpose.ONE_SHOT).raw(2).tolist() == [2044045074085387345, 3802144312189316816]
    assert Draws(0, Purpose.FOLDS).permutation(7).tolist() == [5, 3, 2, 4, 1, 0, 6]


def test_draws_of_other_seeds_and_purposes_differ_and_continue():
    streams = {tuple(Draws(seed, purpose).raw(4).tolist()) for seed in (0, 1, 2**63 - 1) for purpose in Purpose}
    assert len(streams) == 9
    parts = Draws(3, Purpose.FOLDS)
    assert np.array_equal(np.concatenate([parts.raw(3), parts.raw(5)]), Draws(3, Purpose.FOLDS).raw(8))


@given(st.integers(0, 300), st.data())
def test_distinct_numbers_are_distinct_and_below_the_total(count, data):
    total = data.draw(st.integers(count, 10**12))
    drawn = Draws(1, Purpose.ROC_PAIRS).distinct(total, count)
    assert len(drawn) == count == len(set(drawn.tolist()))
    assert drawn.dtype == np.int64
    assert not count or (drawn.min() >= 0 and drawn.max() < total)


def test_distinct_numbers_are_spread_evenly():
    drawn = Draws(0, Purpose.FOLDS).distinct(10**9, 20_000)
    counts = np.histogram(drawn, bins=10, range=(0, 10**9))[0]
    assert np.abs(counts - 2000).max() < 5 * np.sqrt(1800)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=40), st.permutations(range(7)))
def test_class_order_ignores_what_classes_are_called(labels, names):
    labels = np.array(labels)
    one, other = class_order(labels), class_order(np.array(names)[labels])
    assert np.array_equal(one.classes, other.classes)
    assert np.array_equal(one.order, other.order)
    assert np.array_equal(one.sizes, other.sizes)
    assert np.array_equal(np.array(names)[one.labels], other.labels)
    assert np.array_equal(one.labels[one.classes], labels)
    assert sorted(one.order.tolist()) == list(range(len(labels)))
    assert one.num_classes == len(set(labels.tolist()))
