"""Importing strips: a zip with one PNG per class, its samples as square tiles side by side.

Tile i of every strip was made by source i. A class is named by its file name without extension. Separate from `images`
because there one file is one sample.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Unpack

import numpy as np
from PIL import Image

from megaclass.errors import ConfigError, DataError
from megaclass.prepare.encode import (
    EncodedImage,
    Encoding,
    UnreadableImage,
    decode,
    encode,
    one_by_one,
    resize,
    to_mode,
)
from megaclass.prepare.files import ImageFiles, open_zip
from megaclass.prepare.options import SplitOptions, unseen_tenth
from megaclass.prepare.plans import Samples, write_dataset
from megaclass.prepare.report import PreparationReport
from megaclass.prepare.writer import check_output


def import_strips(
    strips: Path,
    out: Path,
    *,
    sources: Path | None = None,
    image_size: int | None = None,
    encoding: Encoding = "png",
    **options: Unpack[SplitOptions],
) -> PreparationReport:
    """Write a data set from a zip of strips.

    Args:
        strips: zip of PNG files, all of the same size, as wide as a whole number of times their height; its name is
            that of the data set where none is given.
        out: folder of the data set.
        sources: JSON file with the names of the tiles' sources: a list, or an object with one list of text in it;
            without it they are called tile-00, tile-01, ...
        image_size: side of the stored images in pixels; by default the tiles as they are.
        encoding: "png", or "jpg" of quality 95.
        options: see `SplitOptions`; a tenth of the classes is kept unseen where they give no rule.

    Raises:
        ConfigError: an option or the output folder cannot be used.
        DataError: the zip, a strip or the list of sources cannot be used; the message names the file.

    Cost: every strip is decoded once and its tiles are held encoded, so memory is about that of the data set.
    """
    check_output(out, options.get("overwrite", False))
    if image_size is not None and not 8 <= image_size <= 4096:
        raise ConfigError(f"image-size is {image_size}; allowed is 8 to 4096 pixels")
    with open_zip(strips) as files:
        class_of = _class_names(files)
        names = sorted(class_of)
        tiles: list[EncodedImage] = []
        size: tuple[int, int] | None = None
        for class_name in names:
            strip = _read_strip(files, class_of[class_name])
            size = size or strip.size
            if strip.size != size or size[0] % size[1]:
                raise DataError(
                    f"{strips}: {files.names[class_of[class_name]]} has {strip.width} x {strip.height} pixels; all "
                    f"strips must have {size[0]} x {size[1]}, a whole number of square tiles"
                )
            tiles += _cut(strip, image_size, encoding)
        inputs = files.state()
    num_tiles = len(tiles) // len(names)
    samples = Samples(
        names=names,
        groups=None,
        source_names=_source_names(sources, num_tiles),
        classes=np.repeat(np.arange(len(names)), num_tiles),
        sources=np.tile(np.arange(num_tiles, dtype=np.int32), len(names)),
        images=one_by_one(tiles.__getitem__),
    )
    return write_dataset(
        out,
        samples,
        unseen_tenth(names, options),
        name=Path(strips).stem,
        description=f"{len(names)} classes of {num_tiles} tiles, cut from strips",
        conditions={"inputs": inputs, "image_size": image_size, "encoding": encoding},
        options=options,
    )


def _class_names(files: ImageFiles) -> dict[str, int]:
    class_of: dict[str, int] = {}
    for number, file_name in enumerate(files.names):
        class_name = PurePosixPath(file_name).stem
        if class_name in class_of:
            raise DataError(
                f"{files.root}: {files.names[class_of[class_name]]} and {file_name} name the same class; rename one"
            )
        class_of[class_name] = number
    return class_of


def _read_strip(files: ImageFiles, number: int) -> Image.Image:
    try:
        return to_mode(decode(files.read(number)))
    except UnreadableImage as error:
        raise DataError(f"{files.root}: {files.names[number]} cannot be read: {error}; replace or remove it") from None


def _cut(strip: Image.Image, image_size: int | None, encoding: Encoding) -> list[EncodedImage]:
    side = strip.height
    tiles = [strip.crop((left, 0, left + side, side)) for left in range(0, strip.width, side)]
    return [encode(tile if image_size is None else resize(tile, image_size), encoding) for tile in tiles]


def _source_names(path: Path | None, num_tiles: int) -> Sequence[str]:
    if path is None:
        return [f"tile-{number:02d}" for number in range(num_tiles)]
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"list of sources {path} cannot be read: {error}; give a JSON list of names") from None
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
        content = lists[0] if len(lists) == 1 else None
    if not isinstance(content, list) or not all(isinstance(entry, str) for entry in content):
        raise DataError(f"list of sources {path} is not a JSON list of names, nor an object that holds one")
    if len(content) != num_tiles:
        raise DataError(f"list of sources {path} has {len(content)} names but every strip has {num_tiles} tiles")
    return content
