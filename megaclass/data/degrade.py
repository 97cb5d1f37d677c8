"""Colour, blur, low resolution and JPEG compression of one eight-bit image.

Separate because these are done to a stored image as a camera or the web would have done them, before any geometry: each
gives whole numbers from 0 to 255 again. They work on one image at a time, so no image can depend on its batch.
"""

from __future__ import annotations

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from megaclass.data.changes import NUM_KERNELS, Changes

_KERNELS = (
    Image.Resampling.NEAREST,
    Image.Resampling.BILINEAR,
    Image.Resampling.BOX,
    Image.Resampling.BICUBIC,
    Image.Resampling.LANCZOS,
)
assert len(_KERNELS) == NUM_KERNELS
_LUMINANCE = (0.299, 0.587, 0.114)
# Luminance and two axes of colour, across which the hue turns (Rec. 601 and the axes I and Q of NTSC).
_TO_YIQ = np.array([_LUMINANCE, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112)])
_TO_RGB = np.linalg.inv(_TO_YIQ)
_MEDIUM_GREY = 127.5


def degraded_places(changes: Changes) -> list[int]:
    """Which samples of the batch `degrade` changes."""
    is_changed = changes.is_coloured | (changes.blur_sigma > 0) | (changes.low_side > 0) | (changes.jpeg_quality > 0)
    return [int(place) for place in np.flatnonzero(is_changed)]


def degrade(image: NDArray[np.uint8], changes: Changes, place: int) -> NDArray[np.uint8]:
    """The image as sample `place` of the batch is to look: colour, then blur, low resolution, compression.

    Args:
        image: [size, size, channels] uint8, one channel or three.
        changes: of the batch.
        place: of the image in it.

    Returns:
        [size, size, channels] uint8.

    Source: shrinking and enlarging with kernels drawn at random after Kim, Jain, Liu, *AdaFace*, CVPR 2022 (low
        resolution augmentation of the published code).
    """
    side, channels = image.shape[1], image.shape[2]
    picture = Image.fromarray(image[:, :, 0] if channels == 1 else image)
    if changes.is_coloured[place]:
        picture = _recoloured(picture, changes, place)
    if changes.blur_sigma[place] > 0:
        picture = picture.filter(ImageFilter.GaussianBlur(float(changes.blur_sigma[place])))
    low_side = int(changes.low_side[place])
    if low_side:
        down, up = (_KERNELS[kernel] for kernel in changes.low_kernels[place].tolist())
        picture = picture.resize((low_side, low_side), down).resize((side, side), up)
    result = np.asarray(picture).reshape(image.shape)
    quality = int(changes.jpeg_quality[place])
    return recompressed(result, quality) if quality else result


def recompressed(image: NDArray[np.uint8], quality: int) -> NDArray[np.uint8]:
    """[height, width, channels] uint8 through a JPEG file of this quality, colours at half resolution as on the web."""
    kind, sampling = ("GRAY", "Gray") if image.shape[2] == 1 else ("RGB", "420")
    data = simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality, kind, sampling)
    return np.asarray(simplejpeg.decode_jpeg(data, kind, fastdct=True, fastupsample=True))


def _recoloured(picture: Image.Image, changes: Changes, place: int) -> Image.Image:
    matrix, offset = colour_map(
        *(float(part[place]) for part in (changes.brightness, changes.contrast, changes.saturation, changes.hue))
    )
    if picture.mode == "L":
        # A grey image has equal channels, and the map keeps it grey.
        factor = float(matrix[0].sum())
        return picture.point([min(255, max(0, int(np.rint(factor * value + offset)))) for value in range(256)])
    return picture.convert("RGB", tuple(number for row in matrix.tolist() for number in (*row, offset)))


def colour_map(brightness: float, contrast: float, saturation: float, hue: float) -> tuple[NDArray[np.float64], float]:
    """[3, 3] and an offset: RGB from 0 to 255 → RGB, to be rounded and cut off once.

    Saturation is the factor of the distance from grey of the same luminance, hue a turn around the grey axis (1 is a
    whole one), contrast the factor of the distance from medium grey, brightness that of everything; in this order.
    """
    angle = 2.0 * np.pi * hue
    turn = saturation * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    yiq = np.eye(3)
    yiq[1:, 1:] = turn
    return brightness * contrast * (_TO_RGB @ yiq @ _TO_YIQ), brightness * (1.0 - contrast) * _MEDIUM_GREY
