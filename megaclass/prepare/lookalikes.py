"""Which pictures are the same to the eye, and which characters are therefore one class.

Separate from the rendering because it is pure numpy on rasters. Two rasters are *alike* if their squared difference is
at most `TOLERANCE` of the larger one's squared ink, compared as placed or with their ink boxes laid over each other
(where the boxes lie at most one pixel apart: hinting moves a stroke by that much). At 32 pixels 2 % of a capital letter
is one or two pixels: `A` of Latin, Greek and Cyrillic is one picture, `I` with and without a dot is not. At 5 % visibly
different accents would become one.

Cost: for each face a product of the rasters with those of nearly the same ink; some seconds for 3,000 x 12 rasters.
"""

from __future__ import annotations

import numpy as np

TOLERANCE = 0.02
_CHUNK = 256


def ink_boxes(rasters: np.ndarray) -> np.ndarray:
    """First row, first column, last row + 1, last column + 1 that hold ink: [n, 4] int64.

    Args:
        rasters: [n, height, width] uint8, 0 is no ink; every raster has some.
    """
    rows, columns = np.asarray(rasters.any(axis=2)), np.asarray(rasters.any(axis=1))
    height, width = rasters.shape[1:]
    return np.stack(
        [
            rows.argmax(1),
            columns.argmax(1),
            height - rows[:, ::-1].argmax(1),
            width - columns[:, ::-1].argmax(1),
        ],
        axis=1,
    )


def to_corner(rasters: np.ndarray) -> np.ndarray:
    """The rasters with their ink boxes moved to the upper left corner: what they are apart from their place."""
    height, width = rasters.shape[1:]
    boxes = ink_boxes(rasters)
    rows = (np.arange(height) + boxes[:, :1]) % height
    columns = (np.arange(width) + boxes[:, 1:2]) % width
    return rasters[np.arange(len(rasters))[:, None, None], rows[:, :, None], columns[:, None, :]]


def alike_pairs(rasters: np.ndarray, tolerance: float = TOLERANCE) -> np.ndarray:
    """All pairs i < j of alike rasters: [num_pairs, 2] int64.

    Args:
        rasters: [n, height, width] uint8, 0 is no ink.
        tolerance: largest squared difference, relative to the larger squared ink.
    """
    if len(rasters) < 2:
        return np.empty((0, 2), dtype=np.int64)
    boxes = ink_boxes(rasters)
    norms = (rasters.reshape(len(rasters), -1).astype(np.float32) ** 2).sum(1)
    order = np.argsort(norms, kind="stable")
    norms = norms[order]
    # For float32 products: equal rasters must be alike at tolerance 0.
    slack = np.float32(tolerance + 1e-5)
    # |‖a‖ − ‖b‖| ≤ ‖a − b‖, so only rasters of nearly the same ink can be alike: sorted by ink they form a band.
    first = np.searchsorted(norms, norms * (1 - np.sqrt(slack)) ** 2)
    placed = rasters[order].reshape(len(rasters), -1).astype(np.float32)
    cornered = to_corner(rasters[order]).reshape(len(rasters), -1).astype(np.float32)
    corners = boxes[order, :2]
    found: list[np.ndarray] = []
    for start in range(0, len(rasters), _CHUNK):
        end = min(start + _CHUNK, len(rasters))
        low = int(first[start])
        limits = (norms[None, low:end] + (1 - slack) * norms[start:end, None]) / 2
        rows, columns = np.nonzero(placed[start:end] @ placed[low:end].T >= limits)
        pairs = [np.stack([rows + start, columns + low], axis=1)]
        rows, columns = np.nonzero(cornered[start:end] @ cornered[low:end].T >= limits)
        moved = np.stack([rows + start, columns + low], axis=1)
        pairs.append(moved[(np.abs(corners[moved[:, 0]] - corners[moved[:, 1]]) <= 1).all(axis=1)])
        both = np.unique(np.concatenate(pairs), axis=0)
        # Below the diagonal the row has the larger ink, which is what `limits` takes for granted.
        found.append(order[both[both[:, 1] < both[:, 0]]])
    return np.sort(np.concatenate(found), axis=1)


def merge_characters(
    rasters: np.ndarray, characters: np.ndarray, faces: np.ndarray, num_characters: int, tolerance: float = TOLERANCE
) -> np.ndarray:
    """The class of each character: [num_characters] int64, the smallest character number of those merged with it.

    Two characters are merged if they are alike in more than half of the faces that draw both; so are, then, the
    characters merged with them.

    Args:
        rasters: [n, height, width] uint8, 0 is no ink.
        characters: [n] number of the character of each raster.
        faces: [n] number of the face of each raster; at most one raster per character and face.
        num_characters: characters are numbered from 0 to that, without it.
        tolerance: see `alike_pairs`.
    """
    has = np.zeros((num_characters, int(faces.max(initial=-1)) + 1), dtype=bool)
    has[characters, faces] = True
    keys = []
    for face in np.unique(faces):
        members = np.flatnonzero(faces == face)
        pairs = np.sort(characters[members[alike_pairs(rasters[members], tolerance)]], axis=1)
        keys.append(pairs[:, 0] * num_characters + pairs[:, 1])
    pair_keys, counts = np.unique(np.concatenate(keys or [np.empty(0, np.int64)]), return_counts=True)
    left, right = np.divmod(pair_keys, num_characters)
    shared = (has[left] & has[right]).sum(axis=1)
    parent = list(range(num_characters))

    def root(number: int) -> int:
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    for a, b in zip(left[2 * counts > shared].tolist(), right[2 * counts > shared].tolist(), strict=True):
        low, high = sorted((root(a), root(b)))
        parent[high] = low
    return np.array([root(number) for number in range(num_characters)], dtype=np.int64)


def first_of_each(rasters: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Which rasters to keep so that no class holds a picture twice, wherever placed: [n] bool; the first stays."""
    cornered = to_corner(rasters) if len(rasters) else rasters
    seen: set[tuple[int, bytes]] = set()
    kept = np.zeros(len(rasters), dtype=bool)
    for number, (class_number, raster) in enumerate(zip(classes.tolist(), cornered, strict=True)):
        key = (class_number, raster.tobytes())
        kept[number] = key not in seen
        seen.add(key)
    return kept


def shared_between_classes(rasters: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Which rasters are, pixel for pixel and in the same place, in more than one class: [n] bool."""
    owner: dict[bytes, int] = {}
    shared: set[bytes] = set()
    for class_number, raster in zip(classes.tolist(), rasters, strict=True):
        key = raster.tobytes()
        if owner.setdefault(key, class_number) != class_number:
            shared.add(key)
    return np.array([raster.tobytes() in shared for raster in rasters], dtype=bool)
