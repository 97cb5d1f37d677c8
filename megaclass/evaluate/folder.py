"""Embeddings of a folder of image files, written as one `.npz`.

Separate from `embed` because there is no data set here: no labels, no ranks, and files in whatever format a user has.
The file's content is a public interface: `names`, the POSIX paths below the folder in sorted order, as fixed-width
unicode, and `embeddings`, float32 [n, dim] of unit length. It loads with `allow_pickle=False`.
"""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import nn

from megaclass.data.bad_samples import BadSample
from megaclass.data.decode import MAX_PIXELS, decode_image
from megaclass.data.transforms import normalise
from megaclass.errors import ConfigError, DataError
from megaclass.evaluate.embed import embed_images, evaluation_mode
from megaclass.evaluate.similarity import check_unit_length

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
OTHER_FORMATS = ("BMP", "GIF", "WEBP", "TIFF")


def embed_folder(
    backbone: nn.Module,
    images_dir: Path,
    output: Path,
    image_size: int,
    channels: int,
    batch_size: int,
    device: torch.device,
) -> int:
    """Write the embeddings of all images below `images_dir` to `output`; returns how many there are.

    Files with the suffix of an image format count as images, whatever their case; others are passed over. Images are
    decoded, resized and normalised as for training. The file appears complete or not at all.

    Args:
        backbone: images [batch, channels, image_size, image_size] in [-1, 1] → embeddings [batch, dim].
        images_dir: the folder; symbolic links to folders are not followed.
        output: the `.npz` to write; an existing one is replaced.
        image_size: pixels a side.
        channels: 1 for grey, 3 for red, green, blue.
        batch_size: images at a time.
        device: of the backbone.

    Raises:
        DataError: no folder, no images in it, or an image that cannot be read, by name.
        ConfigError: the output cannot be written.
        NumericError: an embedding is not finite.
    """
    names = list_images(images_dir)
    output = Path(output)
    # Before the work rather than after it: hours of embedding should not end at a folder that is missing.
    if output.is_dir() or not output.parent.is_dir() or not os.access(output.parent, os.W_OK):
        raise ConfigError(f"--output {output} cannot be written: give a file in an existing folder that is writable")
    parts = []
    with evaluation_mode(backbone):
        for start in range(0, len(names), batch_size):
            chosen = names[start : start + batch_size]
            pixels = np.stack([read_image(images_dir, name, image_size, channels) for name in chosen])
            images = normalise(torch.from_numpy(pixels).permute(0, 3, 1, 2))
            parts.append(embed_images(backbone, images, device))
    embeddings = torch.cat(parts)
    check_unit_length(embeddings)
    _write(output, np.array(names, dtype=np.str_), embeddings.numpy())
    return len(names)


def list_images(images_dir: Path) -> list[str]:
    """POSIX paths, relative to `images_dir`, of all image files below it, sorted by code point.

    Raises:
        DataError: the folder does not exist or holds no image file.
    """
    if not Path(images_dir).is_dir():
        raise DataError(f"--images {images_dir} is not a folder; give the folder that holds the images")
    found = (path for path in Path(images_dir).rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    names = sorted(path.relative_to(images_dir).as_posix() for path in found)
    if not names:
        raise DataError(f"--images {images_dir} holds no images; looked for files ending in {', '.join(SUFFIXES)}")
    return names


def read_image(images_dir: Path, name: str, image_size: int, channels: int) -> np.ndarray:
    """One image as uint8 [image_size, image_size, channels].

    The content decides the format, not the suffix. Formats that data sets do not hold are turned into PNG first, so
    that what is refused and how things are resized stays in one place.

    Raises:
        DataError: the image cannot be read; names it and says why.
    """
    try:
        data = (Path(images_dir) / name).read_bytes()
        if data.startswith(b"\xff\xd8\xff"):
            return decode_image(data, "jpg", image_size, channels)
        if not data.startswith(b"\x89PNG"):
            data = _as_png(data)
        return decode_image(data, "png", image_size, channels)
    except BadSample as bad:
        detail = bad.detail
    except OSError as error:
        detail = error.strerror or type(error).__name__
    raise DataError(f"image {Path(images_dir) / name} cannot be used: {detail}; repair it or take it out")


def _as_png(data: bytes) -> bytes:
    """The image file as a PNG file; `BadSample` for what does not decode, is too large or animated."""
    try:
        with Image.open(io.BytesIO(data), formats=OTHER_FORMATS) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise BadSample(
                    "image-too-large",
                    f"image of {picture.width} x {picture.height} pixels, allowed are {MAX_PIXELS}",
                )
            if getattr(picture, "n_frames", 1) > 1:
                raise BadSample("unsupported-image", "more than one picture in the file")
            stream = io.BytesIO()
            picture.save(stream, "PNG", compress_level=0)
            return stream.getvalue()
    except BadSample:
        raise
    # Pillow's parsers raise nearly anything for a crafted file.
    except Exception as error:
        reason = "not an image in a known format" if isinstance(error, UnidentifiedImageError) else str(error)
        raise BadSample("bad-image", " ".join(reason.split())[:200]) from None


def _write(output: Path, names: np.ndarray, embeddings: np.ndarray) -> None:
    """Write beside, then rename."""
    beside = output.with_name(f".{output.name}.{os.getpid()}.partial")
    try:
        try:
            with beside.open("wb") as file:
                np.savez(file, names=names, embeddings=embeddings)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(output)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--output {output} cannot be written: {error.strerror}; free space or give another"
        ) from None
