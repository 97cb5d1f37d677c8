from __future__ import annotations

import colorsys

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st

from megaclass.config import Augment
from megaclass.data.changes import NUM_KERNELS, Changes, draw_changes
from megaclass.data.degrade import colour_map, degrade, degraded_places

COUNT = 400
IDS, EPOCHS = np.arange(COUNT), np.zeros(COUNT, int)
NOISE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
LUMINANCE = np.array([0.299, 0.587, 0.114])


def drawn(size: int = 32, **options: float | tuple[float, float]) -> Changes:
    return draw_changes(IDS, EPOCHS, 5, Augment(**options), size)


def applied(image: np.ndarray, changes: Changes) -> np.ndarray:
    results = [degrade(image, changes, place) for place in range(COUNT)]
    assert all(result.dtype == np.uint8 and result.shape == image.shape for result in results)
    return np.stack(results).astype(float)


def flat(value: float | tuple[float, float, float], channels: int = 3) -> np.ndarray:
    return np.full((32, 32, channels), value, np.uint8)


def test_nothing_asked_for_changes_nothing() -> None:
    changes = drawn()
    assert degraded_places(changes) == []
    assert np.array_equal(degrade(NOISE, changes, 0), NOISE)


@pytest.mark.parametrize("channels", [1, 3])
def test_brightness_multiplies_within_its_strength(channels: int) -> None:
    values = applied(flat(100, channels), drawn(brightness=0.5))[:, 0, 0]
    assert np.ptp(values, axis=1).max() == 0
    assert 50 <= values.min() < 55
    assert 145 < values.max() <= 150
    assert abs(values.mean() - 100) < 5
    assert applied(flat(255, channels), drawn(brightness=1.0)).max() == 255
    assert applied(flat(0, channels), drawn(brightness=1.0)).max() == 0


@pytest.mark.parametrize("channels", [1, 3])
def test_contrast_moves_away_from_medium_grey_or_towards_it(channels: int) -> None:
    low, high = (applied(flat(value, channels), drawn(contrast=0.5))[:, 0, 0, 0] for value in (77.5, 177.5))
    # Both keep their distance from 127.5 to each other, up to rounding of 77.5 and 177.5 down to 77 and 177.
    assert np.abs((low - 127.5) / (127.5 - 77) + (high - 127.5) / (177 - 127.5)).max() < 0.03
    assert 50 < (high - low).min() * 100 / 99.5 + 2 < 60
    assert 140 < (high - low).max() < 152


def test_saturation_keeps_luminance_and_scales_the_distance_from_it() -> None:
    colour = np.array([140, 110, 90])
    values = applied(flat(tuple(colour)), drawn(saturation=0.8))[:, 0, 0]
    luminance = colour @ LUMINANCE
    assert np.abs(values @ LUMINANCE - luminance).max() < 1.5
    factors = (values[:, 0] - values[:, 2]) / 50
    assert 0.18 < factors.min() < 0.3
    assert 1.7 < factors.max() < 1.82


def test_hue_turns_the_colour_circle_and_keeps_luminance() -> None:
    colour = np.array([150, 110, 100])
    values = applied(flat(tuple(colour)), drawn(hue=0.25))[:, 0, 0]
    assert np.abs(values @ LUMINANCE - colour @ LUMINANCE).max() < 1.5
    hues = np.array(
        [(colorsys.rgb_to_hsv(*value)[0] - colorsys.rgb_to_hsv(*colour)[0] + 0.5) % 1 - 0.5 for value in values]
    )
    assert hues.min() < -0.15
    assert hues.max() > 0.15
    assert np.abs(hues).max() < 0.33
    # Towards green for a positive turn of red in this direction or the other, but never both ways at once.
    turns = drawn(hue=0.25).hue
    assert abs(np.corrcoef(turns, hues)[0, 1]) > 0.95


def test_a_whole_turn_is_none() -> None:
    matrix, offset = colour_map(1.0, 1.0, 1.0, 1.0)
    assert np.abs(matrix - np.eye(3)).max() < 1e-12
    assert offset == 0


def test_colour_is_chosen_for_all_four_at_once() -> None:
    changes = drawn(brightness=0.5, contrast=0.5, saturation=0.5, hue=0.5, colour_probability=0.5)
    changed = [getattr(changes, name) != none for name, none in
               (("brightness", 1), ("contrast", 1), ("saturation", 1), ("hue", 0))]  # fmt: skip
    assert all(np.array_equal(changed[0], other) for other in changed[1:])
    # And their sizes have nothing to do with each other.
    places = changed[0]
    assert abs(np.corrcoef(changes.brightness[places], changes.contrast[places])[0, 1]) < 0.3


def test_grey_is_luminance_whatever_else_happens() -> None:
    values = applied(NOISE, drawn(grey=1.0, saturation=1.0, hue=0.5))
    assert np.ptp(values, axis=3).max() == 0
    assert np.abs(values - (NOISE @ LUMINANCE)[None, :, :, None]).max() <= 1


def test_blur_spreads_a_point_and_keeps_its_light() -> None:
    point = flat(0, 1)
    point[16, 16] = 255
    changes = drawn(blur=1.0, blur_sigma=3.0)
    sigmas = changes.blur_sigma
    assert 0.1 <= sigmas.min() < 0.2
    assert 2.9 < sigmas.max() <= 3.0
    # A sheet with an edge, so that rounding to eight bits does not eat the tails.
    edge = flat(0, 1)
    edge[:, 16:] = 255
    slopes = np.diff(applied(edge, changes)[:, 16, :, 0], axis=1) / 255
    offsets = np.arange(31) - 15
    deviations = np.sqrt((slopes * offsets**2).sum(1))
    assert np.abs(slopes.sum(1) - 1).max() < 0.02
    wide = sigmas > 0.7
    assert np.abs(deviations[wide] / sigmas[wide] - 1).max() < 0.15
    assert (applied(point, changes)[wide, 16, 16, 0] < 200).all()


def test_low_resolution_keeps_only_what_a_small_image_holds() -> None:
    changes = drawn(40, low_resolution=1.0, low_resolution_scale=0.25)
    assert set(changes.low_side.tolist()) <= set(range(10, 41))
    assert changes.low_side.min() == 10
    assert changes.low_side.max() >= 38
    for column in changes.low_kernels.T:
        assert np.bincount(column, minlength=NUM_KERNELS).min() > COUNT / NUM_KERNELS / 2
    image = np.random.default_rng(1).integers(0, 256, (40, 40, 3), np.uint8)
    results = applied(image, changes)
    assert np.abs(results.mean((1, 2, 3)) - image.mean()).max() < 25
    # Shrunk and enlarged to the nearest pixel, the image holds no more different values than the small one.
    nearest = (changes.low_kernels == 0).all(1)
    assert nearest.any()
    for place in np.flatnonzero(nearest):
        assert len(np.unique(results[place].reshape(-1, 3), axis=0)) <= changes.low_side[place] ** 2
    smooth = changes.low_kernels[:, 0] == 2
    roughness = np.abs(np.diff(results, axis=2)).mean((1, 2, 3))
    assert np.corrcoef(changes.low_side[smooth], roughness[smooth])[0, 1] > 0.6


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_that_of_a_file_of_this_quality(channels: int) -> None:
    changes = drawn(jpeg=1.0, jpeg_quality=20)
    qualities = changes.jpeg_quality
    assert (qualities.min(), qualities.max()) == (20, 100)
    counts = np.bincount(qualities, minlength=101)[20:]
    assert counts.max() < 5 * COUNT / 81
    image = NOISE[:, :, :channels]
    kind, sampling = ("GRAY", "Gray") if channels == 1 else ("RGB", "420")
    place = int(np.argmin(qualities))
    data = simplejpeg.encode_jpeg(np.ascontiguousarray(image), 20, kind, sampling)
    expected = simplejpeg.decode_jpeg(data, kind, fastdct=True, fastupsample=True)
    assert np.array_equal(degrade(image, changes, place), expected.reshape(32, 32, channels))
    smooth = np.round(np.linspace(0, 255, 32))[:, None, None] * np.ones((1, 32, channels))
    errors = np.abs(applied(smooth.astype(np.uint8), changes) - smooth).mean((1, 2, 3))
    assert np.corrcoef(qualities, errors)[0, 1] < -0.5


@pytest.mark.parametrize("name", ["colour_probability", "grey", "blur", "low_resolution", "jpeg"])
@settings(max_examples=15, deadline=None)
@given(probability=st.floats(0, 1), seed=st.integers(0, 2**63 - 1))
def test_as_many_are_changed_as_asked_for(name: str, probability: float, seed: int) -> None:
    options = {"brightness": 0.5} if name == "colour_probability" else {}
    changes = draw_changes(IDS, EPOCHS, seed, Augment(**options, **{name: probability}), 32)
    deviation = np.sqrt(COUNT * probability * (1 - probability))
    assert abs(len(degraded_places(changes)) - COUNT * probability) <= 6 * deviation + 1


@settings(max_examples=40, deadline=None)
@given(
    strengths=st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.floats(0, 0.5)),
    others=st.tuples(st.floats(0.01, 64), st.floats(0.001, 1), st.integers(1, 100)),
    channels=st.sampled_from([1, 3]),
    size=st.sampled_from([8, 13, 31]),
)
def test_any_strength_gives_an_image(
    strengths: tuple[float, ...], others: tuple[float, float, int], channels: int, size: int
) -> None:
    names = ("brightness", "contrast", "saturation", "hue", "blur_sigma", "low_resolution_scale", "jpeg_quality")
    amounts = dict(zip(names, strengths + others, strict=True))
    augment = Augment(**amounts, blur=1.0, grey=0.5, jpeg=0.9, low_resolution=0.9)
    image = NOISE[:size, :size, :channels]
    changes = draw_changes(IDS[:4], EPOCHS[:4], 1, augment, size)
    for place in range(4):
        result = degrade(image, changes, place)
        assert (result.dtype, result.shape) == (np.uint8, image.shape)
        if channels == 3 and changes.saturation[place] == 0 and not changes.jpeg_quality[place]:
            assert np.ptp(result, axis=2).max() == 0
