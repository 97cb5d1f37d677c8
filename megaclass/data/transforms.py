"""Augmentation and normalisation of a batch: uint8 images in, float32 in [-1, 1] out.

Separate because this is the only place that changes what an image shows. Every random number is a pure function of
(seed, epoch, sample id): an image comes out the same to the bit in whatever batch, on whatever rank and in whatever
worker it is read. That is also why the sampling grid is built from plain element-wise operations instead of
`affine_grid`, whose matrix product may round differently with the batch size.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import grid_sample

from megaclass.config import Augment
from megaclass.data.counter import Stream, hash_counters, uniform

# Numbers drawn for a sample, in this order; the order is part of what a seed means.
_FLIP, _SHIFT_X, _SHIFT_Y, _SCALE, _ROTATION, _SHEAR = range(6)
_ERASE, _ERASE_WIDTH, _ERASE_HEIGHT, _ERASE_X, _ERASE_Y = range(6, 11)
_NUM_DRAWS = 11
# Sides of an erased rectangle as shares of the image side.
_ERASE_SIDES = (0.125, 0.5)


def transform(
    images: NDArray[np.uint8], sample_ids: NDArray[np.int64], epochs: NDArray[np.int64], seed: int, augment: Augment
) -> Tensor:
    """Flip, resample once with shift, scale, rotation and shear, erase, and normalise a batch.

    Args:
        images: [batch, size, size, channels] uint8.
        sample_ids: [batch] ids in the split.
        epochs: [batch]; with the ids and the seed all that the random numbers depend on.
        seed: of the run.
        augment: how strong each change is; all zero gives plain normalisation.

    Returns:
        [batch, channels, size, size] float32 in [-1, 1]; bilinear, with the border repeated outside the image. Erased
        rectangles are 0, a medium grey.

    Source: erasing after Zhong, Zheng, Kang, Li, Yang, *Random erasing data augmentation*, AAAI 2020, with sides drawn
        independently between 1/8 and 1/2 of the image side.
    """
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    if augment == Augment():
        return normalise(pixels)
    draws = draw_numbers(sample_ids, epochs, seed)
    if augment.flip:
        mirrored = torch.from_numpy(flipped(draws, augment))
        pixels = torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)
    result = normalise(pixels)
    if augment.shift or augment.scale or augment.rotation or augment.shear:
        grid = _sampling_grid(draws, augment, result.shape[-1])
        result = grid_sample(result, grid, mode="bilinear", padding_mode="border", align_corners=False)
    if augment.erase:
        result = result.masked_fill(_erased(draws, augment.erase, result.shape[-1])[:, None], 0.0)
    return result


def normalise(pixels: Tensor) -> Tensor:
    """uint8 [...] as contiguous float32 in [-1, 1]: x / 127.5 - 1."""
    return pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1.0)


def draw_numbers(sample_ids: NDArray[np.int64], epochs: NDArray[np.int64], seed: int) -> NDArray[np.float64]:
    """[batch, draws] in [0, 1): the random numbers of each sample."""
    counters = (np.asarray(epochs)[:, None], np.asarray(sample_ids)[:, None], np.arange(_NUM_DRAWS))
    return uniform(hash_counters(seed, Stream.AUGMENT, *counters))


def flipped(draws: NDArray[np.float64], augment: Augment) -> NDArray[np.bool_]:
    """[batch]: which images are mirrored."""
    return draws[:, _FLIP] < augment.flip


def affine_rows(draws: NDArray[np.float64], augment: Augment) -> NDArray[np.float32]:
    """[batch, 2, 3]: the place in the input, x then y, as (by x, by y, offset) of a place in the output.

    Both in [-1, 1] from edge to edge. Output coordinates are divided by the scale, sheared, rotated and shifted.
    """
    signed = 2.0 * draws - 1.0
    # The exponent is drawn evenly, so that growing and shrinking are equally likely.
    shrink = np.exp(-signed[:, _SCALE] * np.log1p(augment.scale))
    angle = np.deg2rad(augment.rotation * signed[:, _ROTATION])
    slant = np.tan(np.deg2rad(augment.shear * signed[:, _SHEAR]))
    cosine, sine = np.cos(angle) * shrink, np.sin(angle) * shrink
    # Rotation times shear [[1, slant], [0, 1]]; a shift of the whole side is 2 in these coordinates.
    x_row = (cosine, cosine * slant - sine, 2.0 * augment.shift * signed[:, _SHIFT_X])
    y_row = (sine, sine * slant + cosine, 2.0 * augment.shift * signed[:, _SHIFT_Y])
    return np.stack([np.stack(x_row, -1), np.stack(y_row, -1)], 1).astype(np.float32)


def _sampling_grid(draws: NDArray[np.float64], augment: Augment, size: int) -> Tensor:
    """[batch, size, size, 2]: where each output pixel is read, in [-1, 1] coordinates of the input."""
    rows = torch.from_numpy(affine_rows(draws, augment))
    centres = (torch.arange(size, dtype=torch.float32) * 2 + 1) / size - 1
    across, down = centres[None, None, :], centres[None, :, None]
    grid = torch.empty(len(draws), size, size, 2)
    for axis in range(2):
        by_x, by_y, offset = rows[:, axis, :, None, None].unbind(1)
        torch.add(across * by_x, down * by_y + offset, out=grid[..., axis])
    return grid


def erased_rectangles(draws: NDArray[np.float64], probability: float, size: int) -> NDArray[np.int64]:
    """[batch, 4]: first row, first column, height and width of what is erased; height 0 where nothing is."""
    shortest, longest = _ERASE_SIDES

    def place(side: int, start: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        length = np.maximum(1, np.round(size * (shortest + (longest - shortest) * draws[:, side]))).astype(np.int64)
        return np.floor(draws[:, start] * (size - length + 1)).astype(np.int64), length

    (column, width), (row, height) = place(_ERASE_WIDTH, _ERASE_X), place(_ERASE_HEIGHT, _ERASE_Y)
    return np.stack([row, column, np.where(draws[:, _ERASE] < probability, height, 0), width], -1)


def _erased(draws: NDArray[np.float64], probability: float, size: int) -> Tensor:
    """[batch, size, size] bool: the rectangle of each image that is erased."""
    pixels = np.arange(size)
    row, column, height, width = (part[:, None] for part in erased_rectangles(draws, probability, size).T)
    rows = (pixels >= row) & (pixels < row + height)
    columns = (pixels >= column) & (pixels < column + width)
    return torch.from_numpy(rows[:, :, None] & columns[:, None, :])
