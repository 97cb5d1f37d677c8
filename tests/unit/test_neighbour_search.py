"""The search for nearest classes: exact to the last tie, whatever the sizes; approximate within a bound; stoppable."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megaclass.neighbours import search as searching
from megaclass.neighbours.search import Half, Ids, Stopped, directions, search


def in_thread(function: Callable[[], Any]) -> Any:
    """A search sets the OpenMP threads of the thread it runs in; that must not be the tests'."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def found(everything: Half, k: int, start: int = 0, stop: int | None = None, method: Any = "exact") -> Ids:
    stop = len(everything) if stop is None else stop
    return in_thread(lambda: search(everything, start, stop, k, method=method, threads=1))


def brute_force(everything: Half, k: int) -> Ids:
    """All similarities in float64, sorted by similarity and then by id."""
    wide = everything.astype(np.float64)
    nearest = np.full((len(wide), k), -1)
    has_direction = wide.any(axis=1)
    for own in np.flatnonzero(has_direction):
        others = [other for other in np.flatnonzero(has_direction) if other != own]
        others.sort(key=lambda other: (-float(np.sum(wide[own] * wide[other])), other))
        nearest[own, : len(others[:k])] = others[:k]
    return nearest


def weights(seed: int, num_classes: int, dim: int) -> Tensor:
    return torch.randn(num_classes, dim, generator=torch.Generator().manual_seed(seed))


@given(
    seed=st.integers(0, 10**6),
    num_classes=st.integers(1, 41),
    dim=st.integers(1, 9),
    k=st.integers(1, 13),
    num_levels=st.sampled_from([0, 1, 2, 5]),
    num_zero=st.integers(0, 4),
    num_nan=st.integers(0, 3),
    data=st.data(),
)
@settings(max_examples=120, deadline=None)
def test_exact_equals_brute_force_with_ties_by_the_lower_id(
    seed: int, num_classes: int, dim: int, k: int, num_levels: int, num_zero: int, num_nan: int, data: st.DataObject
) -> None:
    """Few levels of the entries make many equal similarities; fewer classes than k leave -1."""
    rows = weights(seed, num_classes, dim)
    if num_levels:
        rows = (rows * num_levels).round()
    rows[data.draw(st.lists(st.integers(0, num_classes - 1), max_size=num_zero))] = 0.0
    rows[data.draw(st.lists(st.integers(0, num_classes - 1), max_size=num_nan)), 0] = torch.nan
    everything = directions(rows).numpy()
    expected = brute_force(everything, k)
    start = data.draw(st.integers(0, num_classes))
    stop = data.draw(st.integers(start, num_classes))
    assert np.array_equal(found(everything, k, start, stop), expected[start:stop])


def test_near_duplicates_that_float32_cannot_tell_apart_are_put_in_order() -> None:
    """Many more than are proposed: where rounding could hide a neighbour, the class is compared with all."""
    base = weights(0, 1, 64).expand(203, 64) + 1e-3 * weights(1, 203, 64)
    everything = directions(torch.cat([base, base[:50], weights(2, 50, 64)])).numpy()
    assert np.array_equal(found(everything, 5), brute_force(everything, 5))


def test_blocks_do_not_change_what_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    everything = directions((weights(3, 157, 5) * 2).round()).numpy()
    expected = found(everything, 4)
    for name, size in (("_QUERIES", 7), ("_CHUNK", 11), ("_HELD", 100), ("_COMPARED", 2)):
        monkeypatch.setattr(searching, name, size)
    assert np.array_equal(found(everything, 4), expected)
    assert np.array_equal(expected, brute_force(everything, 4))


def test_a_class_without_a_direction_has_no_neighbours_and_is_nobodys() -> None:
    rows = weights(4, 13, 7)
    rows[2], rows[5, 3], rows[9, 0] = 0.0, torch.nan, torch.inf
    assert not bool(directions(rows)[[2, 5, 9]].any())
    for method in ("exact", "hnsw"):
        nearest = found(directions(rows).numpy(), 4, method=method)
        assert bool((nearest[[2, 5, 9]] == -1).all())
        assert not np.isin(nearest, [2, 5, 9]).any()
        assert not (nearest == np.arange(13)[:, None]).any()


def test_nothing_to_search_gives_nothing() -> None:
    everything = directions(torch.zeros(5, 3)).numpy()
    assert found(everything, 2).tolist() == [[-1, -1]] * 5
    assert found(directions(weights(0, 5, 3)).numpy(), 2, 3, 3).shape == (0, 2)
    assert found(directions(weights(0, 1, 3)).numpy(), 2).tolist() == [[-1, -1]]


@pytest.mark.parametrize("length", [1e-30, 1e-3, 1.0, 1e30])
def test_only_the_direction_counts(length: float) -> None:
    rows = weights(5, 31, 7)
    assert torch.allclose(directions(rows * length).float(), directions(rows).float(), atol=1e-3)
    assert torch.allclose(directions(rows * length).float().norm(dim=1), torch.ones(31), atol=2e-3)


def test_sub_centres_stand_for_their_class_by_their_mean_direction() -> None:
    """Each row counts alike, whatever its length."""
    rows = weights(6, 3 * 5, 7)
    rows[::3] *= 1000.0
    unit = torch.nn.functional.normalize(rows.view(5, 3, 7).double(), dim=2)
    expected = torch.nn.functional.normalize(unit.mean(dim=1), dim=1)
    assert torch.allclose(directions(rows, 3).double(), expected, atol=1e-3)
    rows[3] = torch.nan  # one sub-centre of class 1: the other two still have a direction
    assert bool(directions(rows, 3)[1].any())
    rows[3:6] = 0.0
    assert not bool(directions(rows, 3)[1].any())


def test_hnsw_finds_nearly_all_and_is_always_the_same() -> None:
    centres = weights(7, 60, 24)
    everything = directions(centres.repeat_interleave(50, dim=0) + 0.7 * weights(8, 3000, 24)).numpy()
    k = 10
    exact, approximate = found(everything, k), found(everything, k, method="hnsw")
    hits = sum(len(set(a) & set(b)) for a, b in zip(exact.tolist(), approximate.tolist(), strict=True))
    assert hits / exact.size >= 0.95
    assert not (approximate == np.arange(3000)[:, None]).any()
    # A part of the classes: the index is over all of them all the same.
    assert np.array_equal(found(everything, k, 1003, 1500, method="hnsw"), approximate[1003:1500])


@pytest.mark.parametrize("method", ["exact", "hnsw"])
@pytest.mark.parametrize("asked_before", [0, 2])
def test_a_search_stops_when_it_is_told(method: Any, asked_before: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_QUERIES", "_CHUNK", "_ADDED"):
        monkeypatch.setattr(searching, name, 16)
    asked = 0

    def is_stopped() -> bool:
        nonlocal asked
        asked += 1
        return asked > asked_before

    everything = directions(weights(9, 100, 5)).numpy()
    with pytest.raises(Stopped):
        in_thread(lambda: search(everything, 0, 100, 3, method=method, threads=1, is_stopped=is_stopped))
    assert asked == asked_before + 1


def test_a_search_leaves_the_threads_of_torch_alone() -> None:
    before = torch.get_num_threads(), threading.active_count()
    found(directions(weights(10, 50, 5)).numpy(), 3)
    assert (torch.get_num_threads(), threading.active_count()) == before
