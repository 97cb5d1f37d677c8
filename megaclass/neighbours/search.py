"""Which classes point in the most similar direction: the search itself, of one rank, without communication.

A direction is stored in float16. That is not only half the memory: the product of two float16 numbers in [-1, 1] is a
multiple of 2^-48, so a float64 sum of products of two unit vectors is EXACT in any order of summation. A similarity is
therefore one and the same number for every library, thread count, block size and division into shards, and ties are
real ties, broken by the lower class id. faiss proposes more candidates than wanted, in float32; the exact similarities
choose among them, and where rounding could have hidden a neighbour the class is compared with all others.

faiss shares the OpenMP library that torch loads. A thread count set there counts for the calling thread alone, so all
of this runs in a thread of its own and torch's thread count in the main thread stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megaclass.errors import ConfigError

Method = Literal["exact", "hnsw"]
Half = NDArray[np.float16]
Ids = NDArray[np.int64]

# Classes compared at a time. A search can be stopped between two blocks, so a block must take well below a second.
_QUERIES, _CHUNK = 1024, 16384
# Classes added to an HNSW index at a time; adding a class costs about a millisecond in a large index.
_ADDED = 512
# Float64 numbers that may be held while candidates are compared: 32 MiB.
_HELD = 1 << 22
# Classes compared with all others at a time; each holds a float64 number per class.
_COMPARED = 16
# Links per class, and candidates kept while linking: what reaches a recall of 0.95 at some hundred thousand classes.
_LINKS, _WIDTH_BUILDING, _WIDTH_SEARCHING = 32, 80, 96


class Stopped(Exception):
    """The search was told to stop; nobody waits for its result."""


def load_faiss() -> ModuleType:
    """The optional package faiss.

    Raises:
        ConfigError: it is not installed; names the extra.
    """
    try:
        import faiss
    except ImportError as error:
        raise ConfigError(
            f"a search for neighbours needs faiss ({error}); install it with: pip install 'megaclass[ann]'"
        ) from error
    return faiss


def directions(weight: Tensor, rows_per_class: int = 1) -> Tensor:
    """Unit vectors of the classes, [rows / rows_per_class, dim] float16, from class weights [rows, dim].

    The rows of one class are adjacent. With several, the class's direction is that of the mean of its rows' directions:
    the largest similarity over all pairs of rows would be the better measure and cost rows_per_class^2 as much. A class
    without a direction (zero or not finite) gets zeros; it has no neighbours and is nobody's.
    """
    rows = weight.detach().float()
    unit = _unit(rows)
    if rows_per_class > 1:
        unit = _unit(unit.view(len(unit) // rows_per_class, rows_per_class, unit.shape[1]).mean(dim=1))
    return unit.half()


def _unit(rows: Tensor) -> Tensor:
    # Scaled by the largest entry first: squares of very small or large entries have no float32.
    scaled = rows / rows.abs().amax(dim=1, keepdim=True)
    unit = scaled / scaled.norm(dim=1, keepdim=True)
    return torch.where(unit.isfinite().all(dim=1, keepdim=True), unit, 0.0)


def search(
    everything: Half,
    start: int,
    stop: int,
    num_neighbours: int,
    *,
    method: Method,
    threads: int,
    is_stopped: Callable[[], bool] = lambda: False,
) -> Ids:
    """The nearest classes of the classes [start, stop), [stop - start, num_neighbours] int64.

    Most similar first, the class itself left out, -1 where fewer exist. `exact` depends on the directions alone. `hnsw`
    misses some; it depends on the directions and on faiss's arithmetic, not on the division into shards, because the
    index is always built over all classes and by one thread (several would link in the order they happen to come).

    Must run in a thread of its own: it sets the calling thread's number of OpenMP threads.

    Args:
        everything: [classes, dim], what `directions` gave for all classes.
        start: first of the classes to find neighbours for.
        stop: the class after the last of them.
        num_neighbours: how many; at least 1.
        method: `exact` or `hnsw`.
        threads: OpenMP threads of the search (not of building an HNSW index).
        is_stopped: asked every fraction of a second.

    Raises:
        Stopped: `is_stopped` said so.

    Cost: exact: 2 * (stop - start) * C * dim operations, and no second copy of the directions. hnsw: about
    C * log(C) for the index, the same on every rank however many there are, and a float32 copy of the directions.
    """
    faiss = load_faiss()
    has_direction = everything.any(axis=1)
    ids = np.flatnonzero(has_direction)
    nearest = np.full((stop - start, num_neighbours), -1, dtype=np.int64)
    first, last = np.searchsorted(ids, [start, stop])
    if first == last:
        return nearest
    among = everything if len(ids) == len(everything) else everything[ids]
    # The class itself, and some beyond the wanted ones, so that the float32 scores need not be right in the last digit.
    width = min(num_neighbours + 1 + max(8, num_neighbours // 4), len(ids))
    faiss.omp_set_num_threads(1)
    index = _hnsw(faiss, among, width, is_stopped) if method == "hnsw" else None
    faiss.omp_set_num_threads(threads)
    for begin in range(first, last, _QUERIES):
        own = np.arange(begin, min(begin + _QUERIES, last))
        if index is None:
            score, found = _scan(faiss, among, own, width, is_stopped)
        else:
            _, found = index.search(among[own].astype(np.float32), width)
        similarity, found = _sorted(among, own, found, num_neighbours)
        if index is None and width < len(ids):
            # No class that was not proposed has a float32 score above the lowest that was. Rounding: each of dim
            # products and sums is off by 2^-24 of at most 1 in total; twice that, to be beyond doubt.
            limit = score.min(axis=1) + len(among[0]) * 2.0**-23
            doubtful = np.flatnonzero(similarity[:, -1] <= limit)
            for some in np.array_split(doubtful, -(-len(doubtful) // _COMPARED)) if len(doubtful) else ():
                found[some] = _compared_with_all(among, own[some], num_neighbours, is_stopped)
        nearest[ids[own] - start] = np.where(found >= 0, ids[found], -1)
        _go_on_unless(is_stopped)
    return nearest


def _scan(
    faiss: ModuleType, among: Half, own: Ids, width: int, is_stopped: Callable[[], bool]
) -> tuple[NDArray[np.float32], Ids]:
    """Candidates [n, width] with the largest float32 products among all, and these products."""
    heap = faiss.ResultHeap(len(own), width, keep_max=True)
    queries = among[own].astype(np.float32)
    for begin in range(0, len(among), _CHUNK):
        chunk = among[begin : begin + _CHUNK].astype(np.float32)
        score, found = faiss.knn(queries, chunk, min(width, len(chunk)), metric=faiss.METRIC_INNER_PRODUCT)
        heap.add_result(score, found + begin)
        _go_on_unless(is_stopped)
    heap.finalize()
    return heap.D, heap.I


def _hnsw(faiss: ModuleType, among: Half, width: int, is_stopped: Callable[[], bool]) -> Any:
    """An HNSW index of all directions."""
    index = faiss.IndexHNSWFlat(among.shape[1], _LINKS, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = _WIDTH_BUILDING
    index.hnsw.efSearch = max(_WIDTH_SEARCHING, 2 * width)
    for begin in range(0, len(among), _ADDED):
        index.add(among[begin : begin + _ADDED].astype(np.float32))
        _go_on_unless(is_stopped)
    return index


def _sorted(among: Half, own: Ids, found: Ids, num_neighbours: int) -> tuple[NDArray[np.float64], Ids]:
    """The best candidates by exact similarity, then by id, and their similarities; -1 and -inf where there is none."""
    n, width = found.shape
    similarity = np.empty((n, width))
    step = max(1, _HELD // (width * among.shape[1]))
    for begin in range(0, n, step):
        rows = slice(begin, begin + step)
        candidates, queries = among[found[rows]].astype(np.float64), among[own[rows]].astype(np.float64)
        similarity[rows] = np.einsum("nwd,nd->nw", candidates, queries)
    similarity[(found == own[:, None]) | (found < 0)] = -np.inf
    best = np.lexsort((found, -similarity))[:, :num_neighbours]
    similarity = np.take_along_axis(similarity, best, axis=1)
    found = np.where(np.isfinite(similarity), np.take_along_axis(found, best, axis=1), -1)
    missing = ((0, 0), (0, num_neighbours - best.shape[1]))
    return np.pad(similarity, missing, constant_values=-np.inf), np.pad(found, missing, constant_values=-1)


def _compared_with_all(among: Half, own: Ids, num_neighbours: int, is_stopped: Callable[[], bool]) -> Ids:
    """The neighbours [n, num_neighbours] of a few classes, from their exact similarities to all others."""
    similarity = np.empty((len(own), len(among)))
    queries = among[own].astype(np.float64)
    for begin in range(0, len(among), _CHUNK):
        similarity[:, begin : begin + _CHUNK] = queries @ among[begin : begin + _CHUNK].astype(np.float64).T
        _go_on_unless(is_stopped)
    similarity[np.arange(len(own)), own] = -np.inf
    found: Ids = np.argsort(-similarity, axis=1, kind="stable")[:, : min(num_neighbours, len(among) - 1)]
    return np.pad(found, ((0, 0), (0, num_neighbours - found.shape[1])), constant_values=-1)


def _go_on_unless(is_stopped: Callable[[], bool]) -> None:
    if is_stopped():
        raise Stopped
