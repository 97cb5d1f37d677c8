"""`NeighbourGraph`: the nearest classes of this rank's classes, renewed at fixed steps while training goes on.

Class weights move slowly, so neighbours found some steps ago still serve; every `rebuild_every` steps the directions of
all class weights are gathered and a thread searches them. Its result comes into use `lag` steps after the snapshot, not
when it happens to be ready, and every rank waits for its own at that step: which neighbours a step sees depends on the
step alone, in a run that is killed and resumed as in one that is not. The graph stores neighbours; which of them become
negatives of a batch is the sampler's business.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import get_args

import torch
from torch import Tensor

from megaclass.errors import CheckpointError, ConfigError
from megaclass.neighbours.search import Ids, Method, Stopped, directions, load_faiss, search
from megaclass.parallel.collectives import Group, all_gather_batch, group_size, sum_over_ranks
from megaclass.parallel.shard import ClassShard

# Classes of each rank that one all-gather carries: 8 ranks with dimension 512 then hold 64 MiB of them at a time.
_GATHERED = 8192
# How long the end of the process, or of the graph, waits for the thread to notice that it is to stop.
_SECONDS_TO_STOP = 10.0
_NONE = -1


class NeighbourGraph:
    """The `num_neighbours` nearest classes of each of this rank's classes, by cosine of their class weights.

    Args:
        shard: which global classes are this rank's.
        num_neighbours: neighbours kept per class, k; at least 1.
        rebuild_every: steps from one snapshot of the class weights to the next; at least 1.
        lag: steps from a snapshot to the first step that sees its neighbours; at most `rebuild_every`, and 0 searches
            while the training waits. The first search always does: there is nothing to go on with.
        search: `exact`: the same at any world size. `hnsw`: an approximate index; worth it beyond some hundred
            thousand classes.
        group: the ranks that hold the other shards; None for one process.
        rows_per_class: adjacent rows of the class weights that belong to one class; their mean direction counts.
        threads: threads of the search; keep them below the cores that the training leaves free.
        device: where `neighbours` and `upcoming` lie.

    Attributes:
        neighbours: [this rank's classes, k] int64 global classes, most similar first, the class itself left out, -1
            where fewer exist and before the first search. A class whose weight is zero or not finite has none and is
            nobody's.
        upcoming: of the same shape: found, not yet in use; -1 while there is nothing.
        counts_from: the step that sees the neighbours now searched for, or in `upcoming`; -1 if there are none.

    Raises:
        ConfigError: a number or `search` is outside what is allowed, or faiss (extra `ann`) is missing.

    Cost: per rank C * dim float16 on the host during a search (1M classes of 512: 1.0 GB, and as much again if some
    class has no direction), for `hnsw` also C * (4 dim + 260) bytes for the index (2.3 GB); ranks on one node hold
    theirs each. `exact` needs 2 * (C / W) * C * dim operations, that is about 6 hours of one core for the 1M
    classes on one rank; an `hnsw` index is built by every rank on its own and by one thread. The two tensors take
    16 k bytes per class of this rank.
    """

    def __init__(
        self,
        shard: ClassShard,
        num_neighbours: int,
        *,
        rebuild_every: int,
        lag: int,
        search: Method = "exact",
        group: Group = None,
        rows_per_class: int = 1,
        threads: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        assert shard.count == group_size(group), (shard, group_size(group))
        for name, value in (("num_neighbours", num_neighbours), ("rebuild_every", rebuild_every), ("threads", threads)):
            if value < 1:
                raise ConfigError(f"{name} {value} of the neighbour graph must be at least 1")
        if not 0 <= lag <= rebuild_every:
            raise ConfigError(
                f"lag {lag} of the neighbour graph is outside [0, {rebuild_every}]: "
                "a search must be in use before the next begins; lower it or raise rebuild_every"
            )
        if search not in get_args(Method):
            raise ConfigError(f"search {search!r} of the neighbour graph is unknown; choose from {get_args(Method)}")
        load_faiss()  # in this thread and before anything is sent: a rank without it must not leave the others waiting
        self.shard = shard
        self.num_neighbours = num_neighbours
        self.rebuild_every = rebuild_every
        self.lag = lag
        self.neighbours = torch.full((shard.stop - shard.start, num_neighbours), _NONE, device=device)
        self.upcoming = torch.full_like(self.neighbours, _NONE)
        self.counts_from = _NONE
        self._method: Method = search
        self._group = group
        self._rows_per_class = rows_per_class
        self._threads = threads
        self._has_neighbours = False
        self._search: _Search | None = None

    def advance(self, weight: Tensor, step: int) -> None:
        """Do what is due before step `step`: take what was found into use, or begin a search.

        To be called once before every step, on every rank. Calling it again for the same step changes nothing, so a
        state saved before or after the call resumes alike.

        Args:
            weight: [shard.num_rows * rows_per_class, dim], this rank's class weights.
            step: steps taken so far; the same on every rank.

        Raises:
            RuntimeError: the search failed on this rank; at the step its result was to be used, with the cause.

        Cost: nothing in most steps. At a snapshot one all-gather of C * dim float16, in pieces, and its copy to the
        host; at the step that begins to use it, what is left of the search, here and on the slowest rank.
        """
        if self.counts_from != _NONE and step >= self.counts_from:
            self._use()
        is_first = step == 0 or not self._has_neighbours
        if is_first or (step % self.rebuild_every == 0 and self.counts_from == _NONE):
            self._begin(weight, step)
            if is_first or self.lag == 0:
                self._use()

    def near(self, labels: Tensor) -> Tensor:
        """The neighbours [G, k] int64 of each label's class, -1 where there are none; the same on every rank.

        Args:
            labels: [G] int64 global classes, the same on every rank.

        Cost: one all-reduce of G * k int64. Nothing is read back from a GPU.
        """
        row = self.shard.to_row(labels)
        found = labels.new_zeros(len(labels), self.num_neighbours)
        if len(self.neighbours):
            # Zero is what the ranks that do not own a class add to the sum, so "none" is zero and class c is c + 1.
            found = torch.where((row >= 0)[:, None], self.neighbours.index_select(0, row.clamp_min(0)) + 1, 0)
        return sum_over_ranks(found, self._group) - 1

    def state(self) -> dict[str, Tensor]:
        """The tensors `neighbours` and `upcoming`, one row per class of this rank, for a checkpoint.

        They are the live ones. `counts_from`, the same on every rank, belongs to them. Waits for a search under way.
        """
        self._finish()
        return {"neighbours": self.neighbours, "upcoming": self.upcoming}

    def load_state(self, tensors: dict[str, Tensor], counts_from: int) -> None:
        """Go on from a saved `state` and its `counts_from`; a search under way is given up.

        Args:
            tensors: this rank's rows, at any world size.
            counts_from: as it was saved with them.

        Raises:
            CheckpointError: the tensors are not those of this graph.
        """
        for name, own in (("neighbours", self.neighbours), ("upcoming", self.upcoming)):
            if name not in tensors or tensors[name].shape != own.shape:
                found = list(tensors[name].shape) if name in tensors else "absent"
                raise CheckpointError(
                    f"the checkpoint's {name} is {found} and {list(own.shape)} here; keep the number of neighbours"
                )
        self._search = None
        self.neighbours.copy_(tensors["neighbours"])
        self.upcoming.copy_(tensors["upcoming"])
        self.counts_from, self._has_neighbours = counts_from, True

    def _begin(self, weight: Tensor, step: int) -> None:
        """Take the snapshot and start the thread that searches it."""
        everything = _gather(directions(weight, self._rows_per_class), self.shard, self._group).numpy()
        shard, k, method, threads = self.shard, self.num_neighbours, self._method, self._threads

        def work(is_stopped: Callable[[], bool]) -> Ids:
            return search(everything, shard.start, shard.stop, k, method=method, threads=threads, is_stopped=is_stopped)

        self.counts_from = step + self.lag
        self._search = _Search(work)

    def _use(self) -> None:
        """Replace the neighbours by those searched for last."""
        self._finish()
        self.neighbours.copy_(self.upcoming)
        self.upcoming.fill_(_NONE)
        self.counts_from, self._has_neighbours = _NONE, True

    def _finish(self) -> None:
        """Wait for the search under way, if there is one, and put its result into `upcoming`."""
        if self._search is not None:
            try:
                self.upcoming.copy_(torch.from_numpy(self._search.wait()))
            except Exception as error:
                raise RuntimeError(
                    f"the search for the neighbours of classes {self.shard.start} to {self.shard.stop - 1}, "
                    f"to be used from step {self.counts_from}, failed: {type(error).__name__}: {error}"
                ) from error
            self._search = None


class _Search:
    """A search in a thread of its own, which stops soon after this object, or the process, has gone."""

    def __init__(self, work: Callable[[Callable[[], bool]], Ids]) -> None:
        outcome: list[Ids | Exception] = []
        stop = threading.Event()

        def run() -> None:
            try:
                outcome.append(work(stop.is_set))
            except Stopped:
                pass
            except Exception as error:
                outcome.append(error)

        self._outcome = outcome
        self._thread = threading.Thread(target=run, name="neighbours", daemon=True)
        # A daemon thread alone would not do: one that returns from faiss into an interpreter that has gone aborts the
        # process. This runs before that, and when nobody waits for the result any more.
        weakref.finalize(self, _end, stop, self._thread)
        self._thread.start()

    def wait(self) -> Ids:
        """What the search gave; raises what it raised."""
        self._thread.join()
        result = self._outcome[0]
        if isinstance(result, Exception):
            raise result
        return result


def _end(stop: threading.Event, thread: threading.Thread) -> None:
    stop.set()
    if thread is not threading.current_thread():
        thread.join(_SECONDS_TO_STOP)


def _gather(own: Tensor, shard: ClassShard, group: Group) -> Tensor:
    """All classes' directions [num_classes, dim] on the host, from this rank's; sent in pieces of equal size."""
    world_size = group_size(group)
    out = torch.empty(shard.num_classes, own.shape[1], dtype=own.dtype)
    shards = [ClassShard(shard.num_classes, index, world_size) for index in range(world_size)]
    longest = shards[0].stop - shards[0].start
    for first in range(0, longest, _GATHERED):
        size = min(_GATHERED, longest - first)
        piece = own[first : first + size]
        if len(piece) < size:
            piece = torch.cat([piece, piece.new_zeros(size - len(piece), own.shape[1])])
        for source, rows in zip(shards, all_gather_batch(piece, group).split(size), strict=True):
            start = source.start + first
            count = max(0, min(size, source.stop - start))
            out[start : start + count].copy_(rows[:count])
    return out
