"""Retrieval: are a sample's nearest neighbours among all other samples of its own class?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megaclass.errors import DataError
from megaclass.evaluate.class_order import class_order
from megaclass.evaluate.similarity import TILE_ROWS, on_grid, tiles

CUTS = (1, 5, 10)
# Own-class cosines of one block of queries: more than this many and the block gets fewer queries.
BLOCK_COSINES = 2**20


def retrieval(embeddings: Tensor, labels: np.ndarray) -> dict[str, Any]:
    """Recall at 1, 5 and 10 and mean average precision, each sample searching among all others.

    Recall at k is the share of queries with one of their class among the k nearest. Average precision is the mean,
    over the others of the query's class, of the precision among all that are at least as near. A sample of another
    class that is equally near comes first. Samples alone in their class are searched among but do not search.

    Args:
        embeddings: [n, dim] float32, unit length.
        labels: [n] int64.

    Returns:
        recall_at_1, recall_at_5, recall_at_10, map; num_queries, and num_alone: samples alone in their class.

    Raises:
        DataError: no class has two samples.

    Cost: n² cosines, each then placed among the query's own-class cosines; memory for one tile.
    """
    grouping = class_order(labels)
    # Queries of equally large classes stand together, so that rows of a block have as many positives as each other.
    by_size = grouping.order[np.argsort(grouping.sizes[grouping.classes[grouping.order]], kind="stable")]
    classes = grouping.classes[by_size]
    sizes = grouping.sizes[classes]
    num_alone = int((sizes == 1).sum())
    num_queries = len(labels) - num_alone
    if num_queries == 0:
        raise DataError(
            f"retrieval has no queries: none of the {grouping.num_classes} classes has two samples; "
            "leave retrieval out of evaluate.protocols"
        )
    gallery = embeddings[torch.from_numpy(by_size).to(embeddings.device)]
    numbers = torch.from_numpy(classes).to(embeddings.device)
    is_first = np.concatenate([[True], classes[1:] != classes[:-1]])
    class_start = np.flatnonzero(is_first)[np.cumsum(is_first) - 1]
    hits = np.zeros(len(CUTS), dtype=np.int64)
    precision = 0.0
    for rows in _query_blocks(sizes, num_alone):
        own = slice(int(class_start[rows.start]), int(class_start[rows.stop - 1] + sizes[rows.stop - 1]))
        best_rank, average_precision = _search(gallery, numbers, rows, own, int(sizes[rows.stop - 1]) - 1)
        hits += [int((best_rank <= cut).sum()) for cut in CUTS]
        precision += float(average_precision.sum())
    recalls = {f"recall_at_{cut}": float(hit / num_queries) for cut, hit in zip(CUTS, hits, strict=True)}
    return {**recalls, "map": precision / num_queries, "num_queries": num_queries, "num_alone": num_alone}


def _query_blocks(sizes: np.ndarray, start: int) -> Iterator[slice]:
    """Blocks of queries from `start` on, fewer where classes are large; `sizes` ([n]) rise."""
    while start < len(sizes):
        stop = min(len(sizes), start + TILE_ROWS)
        # The last class of a block is its largest: shorten until that one fits.
        while stop - start > 1 and int(sizes[stop - 1]) * (stop - start) > BLOCK_COSINES:
            stop = start + (stop - start) // 2
        yield slice(start, stop)
        start = stop


def _search(gallery: Tensor, numbers: Tensor, rows: slice, own: slice, num_positives: int) -> tuple[Tensor, Tensor]:
    """Rank of the nearest positive, and average precision, of a block of queries.

    Args:
        gallery: [n, dim] unit length, class after class.
        numbers: [n] class of each.
        rows: the queries.
        own: the range that holds all samples of their classes.
        num_positives: the most that a query of the block has.

    Returns:
        [q] int64 from 1, the worst among ties; [q] float64.
    """
    device = gallery.device
    places = torch.arange(len(gallery), device=device)
    positives = on_grid(gallery[rows]) @ on_grid(gallery[own]).T
    is_positive = numbers[rows, None] == numbers[None, own]
    is_positive &= places[rows, None] != places[None, own]
    counts = is_positive.sum(dim=1, keepdim=True)
    # Sorted upwards; rows with fewer positives are filled with infinity, which no cosine reaches.
    positives = positives.masked_fill_(~is_positive, torch.inf).sort(dim=1).values[:, :num_positives].contiguous()
    width = num_positives + 1
    row_start = torch.arange(len(positives), device=device)[:, None] * width
    histogram = torch.zeros(len(positives) * width, dtype=torch.int64, device=device)
    for columns, cosines in tiles(gallery[rows], gallery):
        overlap = slice(max(columns.start, own.start), min(columns.stop, own.stop))
        if overlap.start < overlap.stop:
            same = numbers[rows, None] == numbers[None, overlap]
            within = slice(overlap.start - columns.start, overlap.stop - columns.start)
            cosines[:, within].masked_fill_(same, -torch.inf)
        # How many positives a sample of another class is at least as near as.
        passed = torch.searchsorted(positives, cosines, right=True)
        histogram += torch.bincount(passed.add_(row_start).view(-1), minlength=len(histogram))
    # negatives[:, i]: samples of other classes at least as near as positive i, so that passed i + 1 or more.
    negatives = histogram.view(-1, width).flip(1).cumsum(dim=1).flip(1)[:, 1:]
    at_least_as_near = (counts - torch.searchsorted(positives, positives, right=False)).double()
    filled = torch.arange(num_positives, device=device)[None, :] < counts
    precisions = at_least_as_near / (at_least_as_near + negatives)
    average_precision = torch.where(filled, precisions, 0.0).sum(dim=1) / counts[:, 0]
    return negatives.gather(1, counts - 1)[:, 0] + 1, average_precision
