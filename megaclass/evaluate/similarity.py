"""Cosines that are the same to the bit however they are computed.

A float32 matrix product rounds differently for every block shape, thread count and device. Rankings then depend on
it wherever two samples are equally close, and a rule such as "a tie counts against the query" means nothing. Here
the coordinates are rounded to multiples of 2⁻²⁶, which is float32's own step for numbers of at least a quarter.
Products of two are multiples of 2⁻⁵², and sums of them stay below 2 for vectors of unit length: float64 holds all of
them exactly, so that no order of summation can change a cosine.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from megaclass.errors import NumericError

GRID = 2.0**26
TILE_ROWS = 1024
TILE_COLUMNS = 4096


def unit_length(embeddings: Tensor) -> Tensor:
    """Embeddings divided by their length; a zero vector stays zero, and so is similar to nothing.

    Args:
        embeddings: [n, dim], any floating type.

    Returns:
        [n, dim] float32 on the same device.
    """
    wide = embeddings.double() if embeddings.dtype == torch.float64 else embeddings.float()
    # Divided by the largest coordinate first, or the squares of very small and very large ones would be 0 and infinite.
    largest = wide.abs().amax(dim=1, keepdim=True)
    wide = wide / torch.where(largest == 0, 1.0, largest)
    return (wide / torch.where(largest == 0, 1.0, torch.linalg.vector_norm(wide, dim=1, keepdim=True))).float()


def check_unit_length(embeddings: Tensor) -> None:
    """Nothing, if every embedding is finite and of length 1 (or 0).

    Raises:
        NumericError: an embedding is not finite; the message counts them.
    """
    assert embeddings.ndim == 2, f"embeddings must be [n, dim], not {tuple(embeddings.shape)}"
    length = torch.linalg.vector_norm(embeddings, dim=1)
    bad = torch.nonzero(~torch.isfinite(length)).flatten()
    if len(bad):
        raise NumericError(
            f"{len(bad)} of {len(embeddings)} embeddings are not finite (the first is sample {int(bad[0])}): the "
            "backbone has diverged; lower optim.lr or go back to an earlier checkpoint"
        )
    assert bool(torch.all(((length - 1).abs() < 1e-3) | (length == 0))), "embeddings are not of unit length"


def on_grid(embeddings: Tensor) -> Tensor:
    """Embeddings as float64 multiples of 2⁻²⁶: what the other functions here multiply, at most 2⁻²⁷ away."""
    return torch.round(embeddings.double() * GRID) / GRID


def blocks(length: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that cover `range(length)` in order."""
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def tiles(queries: Tensor, gallery: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Cosines of some queries with a gallery, a range of gallery columns at a time.

    Args:
        queries: [q, dim] unit length; at most a few thousand.
        gallery: [g, dim] unit length.

    Yields:
        columns of the gallery, and the cosines [q, columns] float64, which the caller may overwrite.

    Cost: q * g * dim multiplications in float64; memory for one tile and one range of the gallery.
    """
    left = on_grid(queries)
    for columns in blocks(len(gallery), TILE_COLUMNS):
        yield columns, left @ on_grid(gallery[columns]).T


def pair_cosines(embeddings: Tensor, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Cosine of each pair (`left[i]`, `right[i]`) of samples.

    Args:
        embeddings: [n, dim] unit length.
        left: [p] int64 indices of samples.
        right: [p] int64.

    Returns:
        [p] float64. Memory beside it is bounded, whatever p.
    """
    rows = max(1, 2**21 // max(1, embeddings.shape[1]))
    scores = np.empty(len(left), dtype=np.float64)
    for part in blocks(len(left), rows):
        first = on_grid(embeddings[torch.from_numpy(left[part]).to(embeddings.device)])
        second = on_grid(embeddings[torch.from_numpy(right[part]).to(embeddings.device)])
        scores[part] = first.mul_(second).sum(dim=1).cpu().numpy()
    return scores
