from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megaclass.config import Augment
from megaclass.data.transforms import normalise, transform

EVERYTHING = Augment(flip=0.5, shift=0.2, scale=0.3, rotation=20, shear=10, erase=0.5)
SIZE = 17
IMAGES = np.random.default_rng(0).integers(0, 256, (40, SIZE, SIZE, 3), np.uint8)
IDS = np.arange(40) * 7 + 1_000_000_007
EPOCHS = np.arange(40) // 20


def changed(augment: Augment, images: np.ndarray = IMAGES, seed: int = 3) -> torch.Tensor:
    return transform(images, IDS[: len(images)], EPOCHS[: len(images)], seed, augment)


def test_no_augmentation_is_plain_normalisation() -> None:
    plain = changed(Augment())
    assert plain.dtype == torch.float32
    assert plain.shape == (40, 3, SIZE, SIZE)
    assert plain.is_contiguous()
    expected = IMAGES.transpose(0, 3, 1, 2).astype(np.float64) / 127.5 - 1
    assert np.abs(plain.numpy() - expected).max() < 1e-6
    assert normalise(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 39), min_size=1, max_size=11))
def test_an_image_comes_out_the_same_in_any_batch(places: list[int]) -> None:
    whole = changed(EVERYTHING)
    part = transform(IMAGES[places], IDS[places], EPOCHS[places], 3, EVERYTHING)
    assert torch.equal(part, whole[places])


def test_seed_epoch_and_sample_matter() -> None:
    same = np.repeat(IMAGES[:1], 2, 0)
    augment = Augment(shift=0.3)

    def pair(ids: list[int], epochs: list[int]) -> torch.Tensor:
        return transform(same, np.array(ids), np.array(epochs), 3, augment)

    assert torch.equal(*pair([5, 5], [1, 1]))
    assert not torch.equal(*pair([5, 6], [1, 1]))
    assert not torch.equal(*pair([5, 5], [1, 2]))
    assert not torch.equal(changed(augment), changed(augment, seed=4))


@pytest.mark.parametrize("augment", [EVERYTHING, Augment(shift=0.5, scale=0.9, rotation=180, shear=60)])
def test_values_stay_in_range(augment: Augment) -> None:
    result = changed(augment)
    assert result.isfinite().all()
    assert result.abs().max() <= 1 + 1e-6
    assert result.is_contiguous()


def test_flip_is_exact_and_as_often_as_asked() -> None:
    plain, flipped = changed(Augment()), changed(Augment(flip=1.0))
    assert torch.equal(flipped, plain.flip(-1))
    images = np.random.default_rng(1).integers(0, 256, (2000, 8, 8, 1), np.uint8)
    some = transform(images, np.arange(2000), np.zeros(2000, int), 0, Augment(flip=0.25))
    num_flipped = (some != normalise(torch.from_numpy(images).permute(0, 3, 1, 2))).flatten(1).any(1).sum()
    assert 400 < num_flipped < 600


def test_a_vanishing_change_is_the_identity() -> None:
    assert torch.allclose(changed(Augment(rotation=1e-9)), changed(Augment()), atol=1e-4)


def test_shift_moves_within_its_bounds_and_repeats_the_border() -> None:
    images = np.zeros((300, 20, 20, 1), np.uint8)
    images[:, :, 10:] = 255
    result = transform(images, np.arange(300), np.zeros(300, int), 0, Augment(shift=0.25))
    # The edge lies where the mean brightness says: 10 of 20 columns, moved by up to 5 either way.
    columns = (result + 1).mean((1, 2, 3)) * 10
    assert columns.min() >= 5 - 1e-3
    assert columns.max() <= 15 + 1e-3
    assert columns.std() > 2
    assert (result[:, :, :, 0] + 1).abs().max() < 1e-6
    assert (result[:, :, :, -1] - 1).abs().max() < 1e-6


def test_rotation_keeps_a_disc_and_turns_a_bar() -> None:
    grid = np.arange(33) - 16
    disc = ((grid[:, None] ** 2 + grid[None, :] ** 2) < 100).astype(np.uint8)[None, :, :, None] * 255
    plain = transform(disc, np.array([1]), np.array([0]), 0, Augment())
    turned = transform(disc, np.array([1]), np.array([0]), 0, Augment(rotation=180))
    assert (plain - turned).abs().mean() < 0.05
    bar = np.zeros((200, 33, 33, 1), np.uint8)
    bar[:, 4:29, 15:18] = 255
    bars = (transform(bar, np.arange(200), np.zeros(200, int), 0, Augment(rotation=90)) + 1) / 2
    weights = bars / bars.sum((1, 2, 3), keepdim=True)
    offsets = torch.from_numpy(grid).float()
    spread_across = (weights * offsets**2).sum((1, 2, 3))
    spread_down = (weights * offsets[:, None] ** 2).sum((1, 2, 3))
    # The length of the bar stays; its direction takes every angle.
    assert ((spread_across + spread_down) / (25**2 / 12 + 9 / 12) - 1).abs().max() < 0.1
    assert spread_across.min() < 3
    assert spread_across.max() > 45


def test_scale_grows_and_shrinks_alike() -> None:
    square = np.zeros((400, 32, 32, 1), np.uint8)
    square[:, 12:20, 12:20] = 255
    result = transform(square, np.arange(400), np.zeros(400, int), 0, Augment(scale=0.5))
    sides = ((result + 1) / 2).sum((1, 2, 3)).sqrt()
    assert sides.min() > 8 / 1.5 - 0.3
    assert sides.max() < 8 * 1.5 + 0.3
    assert 0.4 < (sides > 8).float().mean() < 0.6


def test_erasing_covers_one_rectangle_of_medium_grey() -> None:
    images = np.full((500, 24, 24, 2), 255, np.uint8)
    result = transform(images, np.arange(500), np.zeros(500, int), 0, Augment(erase=0.4))
    erased = result == 0
    assert torch.equal(erased[:, 0], erased[:, 1])
    has = erased.flatten(1).any(1)
    assert 150 < has.sum() < 250
    for mask in erased[has][:, 0]:
        rows, columns = mask.any(1), mask.any(0)
        assert torch.equal(mask, rows[:, None] & columns[None, :])
        for line in (rows, columns):
            assert 3 <= line.sum() <= 12
            assert (line[1:] != line[:-1]).sum() <= 2
