"""Identification: which class of a gallery, with one sample of each, does a sample belong to?"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from megaclass.errors import DataError
from megaclass.evaluate.class_order import class_order
from megaclass.evaluate.similarity import TILE_ROWS, blocks, pair_cosines, tiles


def identification(
    embeddings: Tensor, labels: np.ndarray, sources: np.ndarray | None = None, gallery_source: int | None = None
) -> dict[str, Any]:
    """Share of queries whose class is the most similar of the gallery, or among the five most similar.

    The gallery holds one sample per class: the first one by `gallery_source`, or without that the first one of the
    split. All other samples are queries. A class as similar as the query's own comes before it, so that a backbone
    that maps everything to one point is never right.

    Args:
        embeddings: [n, dim] float32, unit length.
        labels: [n] int64.
        sources: [n] int64, needed with `gallery_source`.
        gallery_source: the source whose samples make the gallery.

    Returns:
        rank_1, rank_5; num_gallery, num_queries; and num_without_gallery: samples of classes that have none by
        `gallery_source`, which nothing could be right for and which are left out.

    Raises:
        DataError: fewer than two classes in the gallery, or no queries.

    Cost: queries * gallery cosines; memory for one tile of them.
    """
    grouping = class_order(labels)
    candidates = grouping.order
    if gallery_source is not None:
        assert sources is not None, "a gallery source needs the samples' sources"
        candidates = candidates[sources[candidates] == gallery_source]
    # Candidates are sorted by class and then by place in the split, so unique finds the first of each class.
    classes, first = np.unique(grouping.classes[candidates], return_index=True)
    gallery = candidates[first]
    if len(gallery) < 2:
        raise DataError(
            f"identification needs a gallery of at least 2 classes, found {len(gallery)} among {len(labels)} samples; "
            "check evaluate.gallery_source or leave identification out of evaluate.protocols"
        )
    place_of_class = np.full(grouping.num_classes, -1, dtype=np.int64)
    place_of_class[classes] = np.arange(len(gallery))
    is_query = np.ones(len(labels), dtype=bool)
    is_query[gallery] = False
    has_gallery = place_of_class[grouping.classes] >= 0
    queries = np.flatnonzero(is_query & has_gallery)
    if not len(queries):
        raise DataError(
            f"identification has no queries: none of the {len(gallery)} classes in the gallery has a second sample; "
            "leave identification out of evaluate.protocols"
        )
    ranks = _ranks(embeddings, queries, gallery, gallery[place_of_class[grouping.classes[queries]]])
    return {
        "rank_1": float(np.mean(ranks <= 1)),
        "rank_5": float(np.mean(ranks <= 5)),
        "num_gallery": len(gallery),
        "num_queries": len(queries),
        "num_without_gallery": int((~has_gallery).sum()),
    }


def _ranks(embeddings: Tensor, queries: np.ndarray, gallery: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Rank of each query's own gallery sample, the worst one among ties: [q] int64, from 1."""
    device = embeddings.device
    known = embeddings[torch.from_numpy(gallery).to(device)]
    ranks = np.empty(len(queries), dtype=np.int64)
    for rows in blocks(len(queries), TILE_ROWS):
        own_cosine = torch.from_numpy(pair_cosines(embeddings, queries[rows], own[rows])).to(device)
        rank = torch.zeros(len(own_cosine), dtype=torch.int64, device=device)
        for _, cosines in tiles(embeddings[torch.from_numpy(queries[rows]).to(device)], known):
            # The own sample counts itself: cosines are exact, so it equals `own_cosine` to the bit.
            rank += (cosines >= own_cosine[:, None]).sum(dim=1)
        ranks[rows] = rank.cpu().numpy()
    return ranks
