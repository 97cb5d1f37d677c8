"""Augmentation of a batch of eight-bit images.

Separate because this is the only place that changes what an image shows. What is done to an image is drawn in
`changes.py`, a pure function of (seed, visit, sample id), and done here in one order:

1. colour and grey, blur, low resolution, JPEG compression (`degrade.py`): what camera and web do to an image; whole
   numbers after each;
2. flip, exactly;
3. crop, scale, shear, rotation and shift: one bilinear resampling;
4. erasing.

An image comes out the same to the bit in whatever batch, on whatever rank and in whatever worker it is read. That is
also why the sampling grid is built from plain element-wise operations instead of `affine_grid`, whose matrix product
may round differently with the batch size.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import grid_sample

from megaclass.config import Augment
from megaclass.data.batch import normalise as normalise
from megaclass.data.changes import Changes, draw_changes
from megaclass.data.degrade import degrade, degraded_places


def transform(
    images: NDArray[np.uint8], sample_ids: NDArray[np.int64], visits: NDArray[np.int64], seed: int, augment: Augment
) -> Tensor:
    """The images of a `Batch`: changed as `augment` says, and normalised only where they are no whole numbers any more.

    Args:
        images: [batch, size, size, channels] uint8, not written to.
        sample_ids: [batch] ids in the split.
        visits: [batch], what tells the visits of a sample apart, mostly the epoch; with the ids and the seed all that
            the random numbers depend on.
        seed: of the run.
        augment: how strong each change is; all zero changes nothing.

    Returns:
        [batch, channels, size, size]. uint8 in the layout of `images` (channels last), or, where `augment` can resample
        or erase, contiguous float32 in [-1, 1]: bilinear, with the border repeated outside the image; erased
        rectangles are 0, a medium grey.

    Source: erasing after Zhong, Zheng, Kang, Li, Yang, *Random erasing data augmentation*, AAAI 2020, with sides drawn
        independently between 1/8 and 1/2 of the image side. Crop after Szegedy et al., *Going deeper with
        convolutions*, CVPR 2015: area and aspect ratio drawn from ranges.
    """
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    if augment == Augment():
        return pixels
    changes = draw_changes(sample_ids, visits, seed, augment, images.shape[1])
    places = degraded_places(changes)
    mirrored = np.flatnonzero(changes.is_mirrored).tolist()
    if places or mirrored:
        images = images.copy()
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    for place in places:
        images[place] = degrade(images[place], changes, place)
    for place in mirrored:
        # A batch of one: only in this layout is torch's flip a fast one.
        pixels[place : place + 1] = pixels[place : place + 1].flip(-1)
    return _resampled_and_erased(pixels, changes) if _is_fractional(augment) else pixels


def _is_fractional(augment: Augment) -> bool:
    """Whether images come out as fractions; by the options alone, so that all batches of a run are of one type."""
    return any((augment.crop, augment.shift, augment.scale, augment.rotation, augment.shear, augment.erase))


def _resampled_and_erased(pixels: Tensor, changes: Changes) -> Tensor:
    result = normalise(pixels)
    places = torch.from_numpy(np.flatnonzero(changes.is_resampled))
    if len(places):
        is_all = len(places) == len(result)
        rows = changes.resampling if is_all else changes.resampling[changes.is_resampled]
        grid = _sampling_grid(rows, result.shape[-1])
        chosen = result if is_all else result[places]
        moved = grid_sample(chosen, grid, mode="bilinear", padding_mode="border", align_corners=False)
        if is_all:
            result = moved
        else:
            result[places] = moved
    for place in np.flatnonzero(changes.erased[:, 2]).tolist():
        row, column, height, width = changes.erased[place].tolist()
        result[place, :, row : row + height, column : column + width] = 0.0
    return result


def _sampling_grid(resampling: NDArray[np.float32], size: int) -> Tensor:
    """[batch, size, size, 2]: where each output pixel is read, in [-1, 1] coordinates of the input; see `Changes`."""
    centres = (torch.arange(size, dtype=torch.float32) * 2 + 1) / size - 1
    across, down = centres[None, None, :], centres[None, :, None]
    grid = torch.empty(len(resampling), size, size, 2)
    rows = torch.from_numpy(resampling)
    for axis in range(2):
        by_x, by_y, offset = (rows[:, axis, column, None, None] for column in range(3))
        torch.add(across * by_x, down * by_y + offset, out=grid[..., axis])
    return grid
