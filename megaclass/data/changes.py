"""What augmentation does to each image of a batch, as plain numbers: drawn here, applied elsewhere.

Separate from `transforms.py` so that the numbers do not depend on who applies them, and can be looked at without an
image. Every number is a pure function of (seed, visit, sample id): the same in whatever batch, on whatever rank and in
whatever worker. Each has a draw of its own, so switching an option on or off leaves all others as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, auto
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from megaclass.config import Augment
from megaclass.data.counter import Stream, hash_counters, uniform

# Sides of an erased rectangle as shares of the image side.
_ERASE_SIDES = (0.125, 0.5)
_SMALLEST_SIGMA = 0.1
NUM_KERNELS = 5


class Draw(IntEnum):
    """Numbers drawn for a sample, in this order; the order is part of what a seed means: new ones go to the end."""

    FLIP = 0
    SHIFT_X = auto()
    SHIFT_Y = auto()
    SCALE = auto()
    ROTATION = auto()
    SHEAR = auto()
    ERASE = auto()
    ERASE_WIDTH = auto()
    ERASE_HEIGHT = auto()
    ERASE_X = auto()
    ERASE_Y = auto()
    HAS_SHIFT = auto()
    HAS_SCALE = auto()
    HAS_ROTATION = auto()
    HAS_SHEAR = auto()
    CROP = auto()
    CROP_AREA = auto()
    CROP_ASPECT = auto()
    CROP_X = auto()
    CROP_Y = auto()
    COLOUR = auto()
    BRIGHTNESS = auto()
    CONTRAST = auto()
    SATURATION = auto()
    HUE = auto()
    GREY = auto()
    BLUR = auto()
    BLUR_SIGMA = auto()
    LOW_RESOLUTION = auto()
    LOW_RESOLUTION_SCALE = auto()
    LOW_RESOLUTION_DOWN = auto()
    LOW_RESOLUTION_UP = auto()
    JPEG = auto()
    JPEG_QUALITY = auto()


@dataclass(frozen=True)
class Changes:
    """What is done to each image of a batch; every array has one entry per sample.

    Attributes:
        brightness, contrast, saturation: float64 factors; 1 changes nothing, saturation 0 takes the colours away.
        hue: float64, turn of the colour circle as a share of it; 0 changes nothing.
        blur_sigma: float64, pixels; 0 for no blur.
        low_side: int64, side in pixels that an image is shrunk to before it is enlarged again; 0 for neither.
        low_kernels: [batch, 2] int64, the kernels of shrinking and enlarging, in [0, NUM_KERNELS).
        jpeg_quality: int64, 1 to 100; 0 for no compression.
        is_mirrored: bool, left and right exchanged.
        is_resampled: bool, whether `resampling` is more than the identity.
        resampling: [batch, 2, 3] float32, where an output pixel is read: rows x and y of the input, by x and y of the
            output and 1; centres of pixels, in coordinates from -1 to 1 over the image.
        erased: [batch, 4] int64, first row, first column, height and width of the erased rectangle; height 0 for none.
    """

    brightness: NDArray[np.float64]
    contrast: NDArray[np.float64]
    saturation: NDArray[np.float64]
    hue: NDArray[np.float64]
    blur_sigma: NDArray[np.float64]
    low_side: NDArray[np.int64]
    low_kernels: NDArray[np.int64]
    jpeg_quality: NDArray[np.int64]
    is_mirrored: NDArray[np.bool_]
    is_resampled: NDArray[np.bool_]
    resampling: NDArray[np.float32]
    erased: NDArray[np.int64]

    @property
    def is_coloured(self) -> NDArray[np.bool_]:
        """[batch]: whether colour or brightness changes."""
        factors = (self.brightness != 1) | (self.contrast != 1) | (self.saturation != 1)
        return factors | (self.hue != 0)


def draw_changes(
    sample_ids: NDArray[np.int64], visits: NDArray[np.int64], seed: int, augment: Augment, image_size: int
) -> Changes:
    """The changes of a batch.

    Args:
        sample_ids: [batch] ids in the split.
        visits: [batch], what tells the visits of a sample apart, mostly the epoch; with the ids and the seed all that
            the numbers depend on.
        seed: of the run.
        augment: how strong each change is, and how likely.
        image_size: pixels a side.
    """
    number = _num_used(augment)
    counters = (np.asarray(visits)[:, None], np.asarray(sample_ids)[:, None], np.arange(number))
    # Zero for those that nothing depends on: a change of probability 1 happens, one of probability 0 does not.
    draws = np.zeros((len(sample_ids), len(Draw)))
    draws[:, :number] = uniform(hash_counters(seed, Stream.AUGMENT, *counters))
    is_resampled, resampling = _resampling(draws, augment)
    brightness, contrast, saturation, hue = _colour(draws, augment)
    has_blur = draws[:, Draw.BLUR] < augment.blur
    sigma = _between(draws[:, Draw.BLUR_SIGMA], min(_SMALLEST_SIGMA, augment.blur_sigma), augment.blur_sigma)
    low_side, low_kernels = _low_resolution(draws, augment, image_size)
    has_jpeg = draws[:, Draw.JPEG] < augment.jpeg
    # Whole numbers from the lowest quality to 100, all equally likely.
    quality = augment.jpeg_quality + np.floor(draws[:, Draw.JPEG_QUALITY] * (101 - augment.jpeg_quality))
    return Changes(
        brightness=brightness,
        contrast=contrast,
        saturation=saturation,
        hue=hue,
        blur_sigma=np.where(has_blur, sigma, 0.0),
        low_side=low_side,
        low_kernels=low_kernels,
        jpeg_quality=np.where(has_jpeg, quality, 0).astype(np.int64),
        is_mirrored=draws[:, Draw.FLIP] < augment.flip,
        is_resampled=is_resampled,
        resampling=resampling,
        erased=_erased(draws, augment.erase, image_size),
    )


@lru_cache
def _num_used(augment: Augment) -> int:
    """How many numbers are to be drawn: a part of them where only the oldest options are on, to save time."""
    oldest = dict.fromkeys(("flip", "shift", "scale", "rotation", "shear", "erase"), 0.0)
    return Draw.HAS_SHIFT if augment.model_copy(update=oldest) == Augment() else len(Draw)


def _resampling(draws: NDArray[np.float64], augment: Augment) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
    """Which samples are resampled, and [batch, 2, 3] from where.

    The crop is cut from the image; output coordinates are then divided by the scale, sheared, rotated and shifted
    within it.
    """
    signed = 2.0 * draws - 1.0
    is_resampled = np.zeros(len(draws), bool)

    def amount(strength: float, probability: float, chance: Draw, *which: Draw) -> list[NDArray[np.float64]]:
        if not strength:
            return [np.zeros(len(draws)) for _ in which]
        has = draws[:, chance] < probability
        is_resampled[has] = True
        return [np.where(has, signed[:, number], 0.0) for number in which]

    (grown,) = amount(augment.scale, augment.scale_probability, Draw.HAS_SCALE, Draw.SCALE)
    (turned,) = amount(augment.rotation, augment.rotation_probability, Draw.HAS_ROTATION, Draw.ROTATION)
    (slanted,) = amount(augment.shear, augment.shear_probability, Draw.HAS_SHEAR, Draw.SHEAR)
    right, down = amount(augment.shift, augment.shift_probability, Draw.HAS_SHIFT, Draw.SHIFT_X, Draw.SHIFT_Y)
    # The exponent is drawn evenly, so that growing and shrinking are equally likely.
    shrink = np.exp(-grown * np.log1p(augment.scale))
    angle = np.deg2rad(augment.rotation * turned)
    slant = np.tan(np.deg2rad(augment.shear * slanted))
    cosine, sine = np.cos(angle) * shrink, np.sin(angle) * shrink
    width, height, middle_x, middle_y = _crop(draws, augment)
    is_resampled |= draws[:, Draw.CROP] < augment.crop
    # Rotation times shear [[1, slant], [0, 1]]; a shift of the whole side is 2 in these coordinates.
    x_row = (cosine, cosine * slant - sine, 2.0 * augment.shift * right)
    y_row = (sine, sine * slant + cosine, 2.0 * augment.shift * down)
    rows = np.empty((len(draws), 2, 3), np.float32)
    for axis, row, side, middle in ((0, x_row, width, middle_x), (1, y_row, height, middle_y)):
        rows[:, axis, 0], rows[:, axis, 1] = row[0] * side, row[1] * side
        rows[:, axis, 2] = row[2] * side + middle
    return is_resampled, rows


def _crop(draws: NDArray[np.float64], augment: Augment) -> tuple[NDArray[np.float64], ...]:
    """Sides of the rectangle that is cut out as shares of the image's, and its middle in coordinates from -1 to 1.

    The area is even over its range and the logarithm of the aspect ratio over its; where such a rectangle would not
    fit, the ratio is the nearest that does, so that the area stays.
    """
    if not augment.crop:
        whole, nowhere = np.ones(len(draws)), np.zeros(len(draws))
        return whole, whole, nowhere, nowhere
    area = np.log(_between(draws[:, Draw.CROP_AREA], *augment.crop_area))
    aspect = _between(draws[:, Draw.CROP_ASPECT], *np.log(augment.crop_aspect))
    aspect = np.clip(aspect, area, -area)
    has = draws[:, Draw.CROP] < augment.crop
    width = np.where(has, np.minimum(np.exp((area + aspect) / 2), 1.0), 1.0)
    height = np.where(has, np.minimum(np.exp((area - aspect) / 2), 1.0), 1.0)
    signed = 2.0 * draws - 1.0
    return width, height, (1.0 - width) * signed[:, Draw.CROP_X], (1.0 - height) * signed[:, Draw.CROP_Y]


def _colour(draws: NDArray[np.float64], augment: Augment) -> tuple[NDArray[np.float64], ...]:
    """Factors of brightness, contrast and saturation, and the turn of the hue."""
    if not (augment.brightness or augment.contrast or augment.saturation or augment.hue or augment.grey):
        same = np.ones(len(draws))
        return same, same, same, np.zeros(len(draws))
    has = draws[:, Draw.COLOUR] < augment.colour_probability

    def change(strength: float, number: Draw) -> NDArray[np.float64]:
        return np.where(has, strength * (2.0 * draws[:, number] - 1.0), 0.0)

    saturation = 1.0 + change(augment.saturation, Draw.SATURATION)
    return (
        1.0 + change(augment.brightness, Draw.BRIGHTNESS),
        1.0 + change(augment.contrast, Draw.CONTRAST),
        np.where(draws[:, Draw.GREY] < augment.grey, 0.0, saturation),
        change(augment.hue, Draw.HUE),
    )


def _low_resolution(
    draws: NDArray[np.float64], augment: Augment, image_size: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    if not augment.low_resolution:
        return np.zeros(len(draws), np.int64), np.zeros((len(draws), 2), np.int64)
    has = draws[:, Draw.LOW_RESOLUTION] < augment.low_resolution
    share = _between(draws[:, Draw.LOW_RESOLUTION_SCALE], augment.low_resolution_scale, 1.0)
    side = np.maximum(1, np.floor(share * image_size))
    kernels = np.floor(draws[:, [Draw.LOW_RESOLUTION_DOWN, Draw.LOW_RESOLUTION_UP]] * NUM_KERNELS)
    return np.where(has, side, 0).astype(np.int64), kernels.astype(np.int64)


def _erased(draws: NDArray[np.float64], probability: float, image_size: int) -> NDArray[np.int64]:
    if not probability:
        return np.zeros((len(draws), 4), np.int64)
    shortest, longest = _ERASE_SIDES

    def covered(side: Draw, start: Draw) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        share = shortest + (longest - shortest) * draws[:, side]
        length = np.maximum(1, np.round(image_size * share)).astype(np.int64)
        return np.floor(draws[:, start] * (image_size - length + 1)).astype(np.int64), length

    (row, height), (column, width) = covered(Draw.ERASE_HEIGHT, Draw.ERASE_Y), covered(Draw.ERASE_WIDTH, Draw.ERASE_X)
    height = np.where(draws[:, Draw.ERASE] < probability, height, 0)
    return np.stack([row, column, height, width], 1)


def _between(draws: NDArray[np.float64], low: float, high: float) -> NDArray[np.float64]:
    return low + (high - low) * draws
