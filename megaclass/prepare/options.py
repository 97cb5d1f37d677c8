"""The options that all sources of data sets have in common, under one description."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import numpy as np

from megaclass.prepare.encode import Encoding, ImageMode
from megaclass.prepare.split import choose_unseen
from megaclass.prepare.storing import OnBad, Storing
from megaclass.prepare.writer import Progress


class WriteOptions(TypedDict, total=False):
    """What every source of data sets takes beside its own options.

    Attributes:
        samples_per_shard: samples in one tar shard.
        overwrite: replace the data set in the output folder.
        name: name of the data set; every source has a default.
        progress: called with (samples done, samples in all).
    """

    samples_per_shard: int
    overwrite: bool
    name: str | None
    progress: Progress | None


class SplitOptions(WriteOptions, total=False):
    """`WriteOptions`, and which classes are unseen: by one rule or none.

    Attributes:
        unseen_fraction: share of classes, chosen by hash, kept unseen.
        unseen_classes: number of classes kept unseen, those of smallest hash.
    """

    unseen_fraction: float | None
    unseen_classes: int | None


class ImportOptions(SplitOptions, total=False):
    """What every source of files of others takes: of `Storing` beside `SplitOptions`.

    Attributes:
        image_size: side of the stored images in pixels (aspect ratio not kept); by default the images as they are.
        image_mode: "L" or "RGB" for all images; by default grey stays grey.
        encoding: of images that must be encoded again: "png", or "jpg" of quality 95.
        on_bad: what an unreadable image does: "stop" names it and stops, "skip" leaves it out and counts it.
        jobs: processes that read, decode and encode, 1 by default; it changes no byte.
    """

    image_size: int | None
    image_mode: ImageMode | None
    encoding: Encoding
    on_bad: OnBad
    jobs: int


def storing_of(options: ImportOptions, encoding: Encoding) -> Storing:
    """How images are stored by these options, encoded again as `encoding` where they do not say.

    Raises:
        ConfigError: an option is outside its range.
    """
    return Storing(
        options.get("image_size"),
        options.get("image_mode"),
        options.get("encoding", encoding),
        options.get("on_bad", "stop"),
        options.get("jobs", 1),
    )


def unseen_tenth(names: Sequence[str], options: SplitOptions) -> np.ndarray:
    """Which classes are unseen, [num_classes] bool: a tenth by hash where the options give no rule.

    Raises:
        ConfigError: see `choose_unseen`.
    """
    fraction, number = options.get("unseen_fraction"), options.get("unseen_classes")
    if fraction is None and number is None:
        fraction = 0.1
    return choose_unseen(names, unseen_fraction=fraction, unseen_classes=number)
