"""The nearest-class graph: which step sees which neighbours, in a run that goes on as in one that is resumed."""

from __future__ import annotations

import gc
import sys
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megaclass.errors import CheckpointError, ConfigError
from megaclass.neighbours import NeighbourGraph, graph
from megaclass.neighbours.search import Stopped, directions
from megaclass.parallel.shard import ClassShard
from tests.unit.test_neighbour_search import brute_force

NUM_CLASSES, DIM, K = 13, 5, 3
SHARD = ClassShard(NUM_CLASSES, 0, 1)


def make(**options: Any) -> NeighbourGraph:
    return NeighbourGraph(SHARD, options.pop("k", K), **{"rebuild_every": 6, "lag": 2, **options})


def weight_at(step: int) -> Tensor:
    """Class weights that have nothing to do with those of another step."""
    return torch.randn(NUM_CLASSES, DIM, generator=torch.Generator().manual_seed(step))


def neighbours_at(step: int) -> Tensor:
    return torch.from_numpy(brute_force(directions(weight_at(step)).numpy(), K))


def snapshot_seen(step: int, rebuild_every: int, lag: int) -> int:
    """The step whose class weights' neighbours step `step` sees; the first search waits."""
    due = (step - lag) // rebuild_every * rebuild_every
    return max(due, 0)


@pytest.mark.parametrize(("rebuild_every", "lag"), [(6, 2), (6, 0), (6, 6), (1, 0), (1, 1), (5, 4)])
def test_each_step_sees_the_neighbours_of_its_own_snapshot(rebuild_every: int, lag: int) -> None:
    built = make(rebuild_every=rebuild_every, lag=lag)
    assert bool((built.neighbours == -1).all())
    for step in range(4 * rebuild_every + 3):
        built.advance(weight_at(step), step)
        expected = neighbours_at(snapshot_seen(step, rebuild_every, lag))
        assert torch.equal(built.neighbours, expected), step


def test_the_first_search_is_waited_for() -> None:
    built = make(rebuild_every=100, lag=50)
    built.advance(weight_at(0), 0)
    assert torch.equal(built.neighbours, neighbours_at(0))
    assert built.counts_from == -1
    assert bool((built.upcoming == -1).all())


def test_counts_from_tells_which_step_sees_what_is_searched_for() -> None:
    built, seen = make(), []
    for step in range(14):
        built.advance(weight_at(step), step)
        seen.append(built.counts_from)
    assert seen == [-1] * 6 + [8, 8] + [-1] * 4 + [14, 14]


def test_calling_twice_for_one_step_changes_nothing() -> None:
    for lag in (0, 2, 6):
        once, twice = make(lag=lag), make(lag=lag)
        for step in range(14):
            once.advance(weight_at(step), step)
            twice.advance(weight_at(step), step)
            twice.advance(weight_at(step), step)
            assert torch.equal(once.neighbours, twice.neighbours)
            assert once.counts_from == twice.counts_from


def test_the_snapshot_is_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training goes on changing the class weights while they are searched."""
    let_go, real = threading.Event(), graph.search

    def slow(*args: Any, **options: Any) -> Any:
        let_go.wait(30)
        return real(*args, **options)

    built = make()
    built.advance(weight_at(0), 0)
    weight = weight_at(6)
    monkeypatch.setattr(graph, "search", slow)
    built.advance(weight, 6)
    weight.fill_(0.0)
    let_go.set()
    built.advance(weight, 8)
    assert torch.equal(built.neighbours, neighbours_at(6))


@pytest.mark.parametrize("lag", [0, 2, 6])
@pytest.mark.parametrize("stop", range(1, 15))
def test_resumed_anywhere_equals_uninterrupted(stop: int, lag: int) -> None:
    """Saved after any step, also between a snapshot and the step that sees its neighbours."""
    straight, first = make(lag=lag), make(lag=lag)
    for step in range(stop):
        first.advance(weight_at(step), step)
        straight.advance(weight_at(step), step)
    saved = {name: tensor.clone() for name, tensor in first.state().items()}
    second = make(lag=lag)
    second.load_state(saved, first.counts_from)
    for step in range(stop, 22):
        for built in (straight, first, second):  # saving must not disturb the one that goes on either
            built.advance(weight_at(step), step)
        assert torch.equal(straight.neighbours, second.neighbours), step
        assert torch.equal(straight.neighbours, first.neighbours), step
        assert straight.counts_from == second.counts_from == first.counts_from


def test_near_gives_the_neighbours_of_each_label() -> None:
    built = make()
    labels = torch.tensor([12, 0, 0, 7])
    assert bool((built.near(labels) == -1).all())
    built.advance(weight_at(0), 0)
    assert torch.equal(built.near(labels), neighbours_at(0)[labels])


def test_more_neighbours_than_classes_leave_some_missing() -> None:
    built = make(k=20)
    built.advance(weight_at(0), 0)
    assert bool((built.neighbours[:, :12] >= 0).all())
    assert bool((built.neighbours[:, 12:] == -1).all())


def test_sub_centres_are_rows_of_one_class() -> None:
    built = make(rows_per_class=2)
    rows = torch.randn(2 * NUM_CLASSES, DIM, generator=torch.Generator().manual_seed(1))
    built.advance(rows, 0)
    assert np.array_equal(built.neighbours.numpy(), brute_force(directions(rows, 2).numpy(), K))


def wait_until_gone(name: str = "neighbours") -> bool:
    deadline = time.monotonic() + 20
    while any(thread.name == name for thread in threading.enumerate()):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@pytest.mark.parametrize("how", ["dropped", "loaded over"])
def test_the_thread_ends_with_whoever_waits_for_it(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A search that would take for ever is told to stop when the graph goes, or goes on from a checkpoint."""

    def endless(*args: Any, is_stopped: Any, **options: Any) -> Any:
        while not is_stopped():
            time.sleep(0.001)
        raise Stopped

    built = make()
    built.advance(weight_at(0), 0)
    saved = {name: tensor.clone() for name, tensor in built.state().items()}
    monkeypatch.setattr(graph, "search", endless)
    built.advance(weight_at(6), 6)
    assert any(thread.name == "neighbours" for thread in threading.enumerate())
    if how == "dropped":
        del built
        gc.collect()
    else:
        built.load_state(saved, -1)
        assert torch.equal(built.neighbours, neighbours_at(0))
    assert wait_until_gone()


def test_a_search_that_fails_says_so_at_the_step_that_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **options: Any) -> Any:
        raise MemoryError("too large")

    built = make()
    built.advance(weight_at(0), 0)
    monkeypatch.setattr(graph, "search", broken)
    built.advance(weight_at(6), 6)
    built.advance(weight_at(7), 7)
    message = "the search for the neighbours of classes 0 to 12, to be used from step 8, failed: MemoryError: too large"
    with pytest.raises(RuntimeError, match=message):
        built.advance(weight_at(8), 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "num_neighbours 0 of the neighbour graph must be at least 1"),
        ({"rebuild_every": 0}, "rebuild_every 0 of the neighbour graph must be at least 1"),
        ({"threads": 0}, "threads 0 of the neighbour graph must be at least 1"),
        (
            {"lag": 7},
            r"lag 7 of the neighbour graph is outside \[0, 6\]: a search must be in use before the next begins",
        ),
        ({"lag": -1}, r"lag -1 of the neighbour graph is outside \[0, 6\]"),
        ({"search": "kd-tree"}, r"search 'kd-tree' of the neighbour graph is unknown; choose from \('exact', 'hnsw'\)"),
    ],
)
def test_ill_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**options)


def test_a_missing_faiss_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ConfigError, match=r"needs faiss .*; install it with: pip install 'megaclass\[ann\]'"):
        make()


def test_a_state_of_another_graph_is_refused() -> None:
    built = make()
    built.advance(weight_at(0), 0)
    with pytest.raises(
        CheckpointError, match=r"neighbours is \[13, 3\] and \[13, 4\] here; keep the number of neighbours"
    ):
        make(k=4).load_state(built.state(), -1)
    with pytest.raises(CheckpointError, match=r"the checkpoint's upcoming is absent and \[13, 3\] here"):
        make().load_state({"neighbours": built.neighbours}, -1)
