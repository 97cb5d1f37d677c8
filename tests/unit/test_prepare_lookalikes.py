"""Which rasters count as one picture, and which characters are merged for it."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megaclass.prepare.lookalikes import (
    TOLERANCE,
    alike_pairs,
    first_of_each,
    ink_boxes,
    merge_characters,
    shared_between_classes,
    to_corner,
)

SIZE = 16


def bar(row: int = 2, column: int = 3, height: int = 10, width: int = 6) -> np.ndarray:
    raster = np.zeros((SIZE, SIZE), dtype=np.uint8)
    raster[row : row + height, column : column + width] = 255
    return raster


def scribbles(count: int, seed: int = 0) -> np.ndarray:
    rasters = np.random.default_rng(seed).integers(0, 256, (count, SIZE, SIZE)).astype(np.uint8)
    rasters[:, :2] = 0
    return rasters


def slow_pairs(rasters: np.ndarray, tolerance: float) -> set[tuple[int, int]]:
    found = set()
    values, corners, boxes = rasters.astype(np.float64), to_corner(rasters).astype(np.float64), ink_boxes(rasters)
    for i in range(len(rasters)):
        for j in range(i + 1, len(rasters)):
            limit = (tolerance + 1e-5) * max((values[i] ** 2).sum(), (values[j] ** 2).sum())
            is_near = (np.abs(boxes[i, :2] - boxes[j, :2]) <= 1).all()
            if ((values[i] - values[j]) ** 2).sum() <= limit or (
                is_near and ((corners[i] - corners[j]) ** 2).sum() <= limit
            ):
                found.add((i, j))
    return found


def test_boxes_and_corners() -> None:
    rasters = np.stack([bar(), bar(0, 0, 1, 1), bar(0, 0, SIZE, SIZE)])
    assert ink_boxes(rasters).tolist() == [[2, 3, 12, 9], [0, 0, 1, 1], [0, 0, SIZE, SIZE]]
    assert np.array_equal(to_corner(rasters)[0], bar(0, 0))


def test_alike_is_equal_a_few_grey_levels_or_one_pixel_moved() -> None:
    fainter = bar().copy()
    fainter[2, 3] = 150
    rasters = np.stack([bar(), fainter, bar(3, 3), bar(6, 3), bar(2, 3, 9), bar(2, 3, 10, 7)])
    assert {tuple(pair) for pair in alike_pairs(rasters).tolist()} == {(0, 1), (0, 2), (1, 2)}


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([0.0, 0.02, 0.2, 0.6]))
def test_pairs_equal_those_found_one_by_one(seed: int, tolerance: float) -> None:
    base = scribbles(6, seed)
    rng = np.random.default_rng(seed)
    near = np.clip(base[rng.integers(0, 6, 17)] + rng.normal(0, 30, (17, SIZE, SIZE)) * rng.random((17, 1, 1)), 0, 255)
    rasters = np.concatenate([base, near.astype(np.uint8), np.roll(base, 1, axis=1)])
    assert {tuple(pair) for pair in alike_pairs(rasters, tolerance).tolist()} == slow_pairs(rasters, tolerance)


def test_more_rasters_than_one_chunk() -> None:
    rasters = np.concatenate([scribbles(300), scribbles(300)])
    assert {tuple(pair) for pair in alike_pairs(rasters).tolist()} == {(i, i + 300) for i in range(300)}


def merge(pictures: dict[tuple[int, int], np.ndarray], num_characters: int) -> list[int]:
    keys = list(pictures)
    rasters = np.stack([pictures[key] for key in keys])
    characters, faces = np.array(keys).T
    return merge_characters(rasters, characters, faces, num_characters, TOLERANCE).tolist()


def test_characters_are_merged_if_alike_in_most_shared_faces() -> None:
    a, b, c, d, e = scribbles(5)
    # 0 and 1 are alike in both faces they share; 2 is like 0 in one of three, 3 in two of three.
    pictures = {(0, 0): a, (0, 1): b, (0, 2): c, (1, 1): b, (1, 2): c}
    pictures |= {(2, 0): a, (2, 1): d, (2, 2): d, (3, 0): a, (3, 1): b, (3, 2): e}
    assert merge(pictures, 4) == [0, 0, 2, 0]


def test_half_of_the_faces_are_not_most() -> None:
    a, b, c, _ = scribbles(4)
    assert merge({(0, 0): a, (0, 1): b, (1, 0): a, (1, 1): c}, 2) == [0, 1]


def test_characters_that_share_no_face_stay_apart() -> None:
    a = scribbles(1)[0]
    assert merge({(0, 0): a, (1, 1): a}, 2) == [0, 1]
    assert merge({(2, 0): a}, 3) == [0, 1, 2]


def test_merging_passes_on() -> None:
    a, b, c, d = scribbles(4)
    assert merge({(0, 0): a, (1, 0): a, (1, 1): b, (2, 1): b, (2, 2): c, (3, 2): d}, 4) == [0, 0, 0, 3]


def test_no_raster_at_all() -> None:
    nothing, empty = np.empty((0, SIZE, SIZE), np.uint8), np.empty(0, np.int64)
    assert merge_characters(nothing, empty, empty, 0).tolist() == []
    assert first_of_each(nothing, empty).tolist() == []


def test_doubles_within_a_class_and_pictures_of_two_classes() -> None:
    a, b = bar(), bar(1, 1, 3, 3)
    rasters = np.stack([a, bar(5, 4), b, a, b])
    classes = np.array([7, 7, 7, 8, 8])
    assert first_of_each(rasters, classes).tolist() == [True, False, True, True, True]
    assert shared_between_classes(rasters, classes).tolist() == [True, False, True, True, True]
