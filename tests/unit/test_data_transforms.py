from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megaclass.config import Augment
from megaclass.data.batch import Batch, normalise
from megaclass.data.changes import draw_changes
from megaclass.data.transforms import transform as transformed

EVERYTHING = Augment(flip=0.5, shift=0.2, scale=0.3, rotation=20, shear=10, erase=0.5)
EIGHT_BIT = Augment(
    flip=0.5, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, colour_probability=0.5, grey=0.2, blur=0.3,
    low_resolution=0.3, jpeg=0.3,
)  # fmt: skip
HALF_OF_EACH = EIGHT_BIT.model_copy(
    update={"crop": 0.5, "shift": 0.2, "scale": 0.3, "rotation": 20.0, "shear": 10.0, "erase": 0.5}
    | {f"{name}_probability": 0.5 for name in ("shift", "scale", "rotation", "shear")}
)
SIZE = 17
IMAGES = np.random.default_rng(0).integers(0, 256, (40, SIZE, SIZE, 3), np.uint8)
IDS = np.arange(40) * 7 + 1_000_000_007
EPOCHS = np.arange(40) // 20


NUMBERS = [-28.30228, -23.80955, 8.19845, 19.96782, 10.14245]


def transform(images: np.ndarray, ids: np.ndarray, epochs: np.ndarray, seed: int, augment: Augment) -> torch.Tensor:
    """The images as training sees them."""
    before = images.copy()
    result = transformed(images, ids, epochs, seed, augment)
    assert np.array_equal(images, before)
    labels = torch.zeros(len(images), dtype=torch.int64)
    return Batch(result, labels, torch.from_numpy(ids), 0).to(torch.device("cpu")).images


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


@pytest.mark.parametrize("augment", [EVERYTHING, EIGHT_BIT, HALF_OF_EACH], ids=["all", "eight-bit", "half"])
@settings(max_examples=40, deadline=None)
@given(places=st.lists(st.integers(0, 39), min_size=1, max_size=11))
def test_an_image_comes_out_the_same_in_any_batch(augment: Augment, places: list[int]) -> None:
    whole = changed(augment)
    part = transform(IMAGES[places], IDS[places], EPOCHS[places], 3, augment)
    assert torch.equal(part, whole[places])


def test_the_numbers_of_a_seed_stay() -> None:
    """Sums of an image each, as they were before there were more options than those of `EVERYTHING`."""
    small = transform(IMAGES[:5], IDS[:5], EPOCHS[:5], 3, EVERYTHING)
    assert [float(image.double().sum()) for image in small] == pytest.approx(NUMBERS, abs=1e-3)


def test_batches_are_of_eight_bits_unless_they_can_be_resampled_or_erased() -> None:
    for augment in (Augment(), EIGHT_BIT):
        result = transformed(IMAGES, IDS, EPOCHS, 3, augment)
        assert (result.dtype, result.shape) == (torch.uint8, (40, 3, SIZE, SIZE))
    for augment in (EVERYTHING, Augment(crop=1e-9), Augment(erase=1e-9), Augment(shift=0.1, shift_probability=0)):
        result = transformed(IMAGES, IDS, EPOCHS, 3, augment)
        assert result.dtype == torch.float32
        assert result.is_contiguous()


PROBABILITIES = ["flip", "crop", "grey", "blur", "low_resolution", "jpeg", "erase"]
STRENGTHS = {"shift": 0.3, "scale": 0.4, "rotation": 30.0, "shear": 30.0, "brightness": 0.5}


@pytest.mark.parametrize("name", [*PROBABILITIES, *(f"{name}_probability" for name in STRENGTHS)])
def test_every_probability_is_kept(name: str) -> None:
    kind = name.removesuffix("_probability")
    strength = {kind: STRENGTHS[kind]} if kind in STRENGTHS else {}
    name = name.replace("brightness", "colour")
    images = np.random.default_rng(1).integers(0, 256, (1000, 8, 8, 3), np.uint8)
    ids, epochs = np.arange(1000), np.zeros(1000, int)

    def num_changed(probability: float) -> int:
        augment = Augment(**strength | {name: probability})
        plain = normalise(torch.from_numpy(images).permute(0, 3, 1, 2))
        return int((transform(images, ids, epochs, 0, augment) != plain).flatten(1).any(1).sum())

    assert num_changed(0.0) == 0
    # Five standard deviations of 1000 draws with probability 0.3; a few changes are too small to be seen.
    assert 300 - 73 < num_changed(0.3) < 300 + 73
    assert num_changed(1.0) >= 985


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**63 - 1), name=st.sampled_from(["brightness", "grey", "blur", "jpeg", "crop", "rotation"]))
def test_an_option_leaves_the_draws_of_others_as_they_are(seed: int, name: str) -> None:
    """What is erased and which images are flipped does not depend on what else is on."""
    some = Augment(flip=0.5, erase=0.5)
    one = draw_changes(IDS, EPOCHS, seed, some, SIZE)
    other = draw_changes(IDS, EPOCHS, seed, some.model_copy(update={name: 0.5}), SIZE)
    assert np.array_equal(one.is_mirrored, other.is_mirrored)
    assert np.array_equal(one.erased, other.erased)


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


@pytest.mark.parametrize("aspect", [(1.0, 1.0), (0.5, 2.0)])
def test_crop_takes_the_area_and_shape_asked_for(aspect: tuple[float, float]) -> None:
    """The picture is its own coordinates, so that corners of the result tell which rectangle was cut out."""
    size = 64
    ramp = np.round((np.arange(size) + 0.5) / size * 255)
    picture = np.stack(np.broadcast_arrays(ramp[None, :], ramp[:, None], np.zeros(1)), -1).astype(np.uint8)
    count = 400
    images = np.repeat(picture[None], count, 0)
    augment = Augment(crop=1.0, crop_area=(0.3, 0.8), crop_aspect=aspect)
    result = (transform(images, np.arange(count), np.zeros(count, int), 0, augment) + 1) / 2
    # Pixels one from the border: the border itself is repeated where half a pixel lies outside.
    inner = size / (size - 3)
    left, right = result[:, 0, size // 2, 1], result[:, 0, size // 2, -2]
    top, bottom = result[:, 1, 1, size // 2], result[:, 1, -2, size // 2]
    width, height = (right - left) * inner, (bottom - top) * inner
    assert result[:, 0].min() >= 0
    area = width * height
    assert area.min() > 0.28
    assert area.max() < 0.83
    assert 0.5 < area.mean() < 0.6
    assert area.std() > 0.1
    ratio = width / height
    assert ratio.min() > aspect[0] * 0.93
    assert ratio.max() < aspect[1] * 1.07
    assert (ratio > 1).float().mean() > 0.4 if aspect != (1.0, 1.0) else ratio.std() < 0.03
    for start, side in ((left, width), (top, height)):
        free = 1 - side
        share = (start / free)[free > 0.1]
        assert 0.4 < share.mean() < 0.6
        assert share.std() > 0.2


def test_a_crop_of_everything_is_the_image() -> None:
    everything = Augment(crop=1.0, crop_area=(1.0, 1.0), crop_aspect=(0.5, 2.0))
    assert torch.allclose(changed(everything), changed(Augment()), atol=1e-4)


def test_what_is_not_chosen_stays_exactly() -> None:
    augment = Augment(rotation=90, rotation_probability=0.5, crop=0.3)
    is_resampled = draw_changes(IDS, EPOCHS, 3, augment, SIZE).is_resampled
    assert 0 < is_resampled.sum() < 40
    assert torch.equal(changed(augment)[~is_resampled], changed(Augment())[~is_resampled])
