"""Decoding untrusted images within limits, and encoding them for the shards.

Separate because folders, strips and verification all decode files nobody has looked at: the limit on pixels and the set
of accepted formats must be the same for all of them. A failure is an `UnreadableImage` without a file name; the caller
knows the name and decides whether it stops or skips.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 50_000_000
MAX_FILE_BYTES = 256 * 2**20
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "PPM")
ImageMode = Literal["L", "RGB"]
Encoding = Literal["png", "jpg"]

_EXTENSION = {"PNG": "png", "JPEG": "jpg"}
_ORIENTATION_TAG = 0x0112
# What loses nothing but depth or palette when it becomes grey; all else becomes RGB.
_GREY_MODES = {"1", "L", "LA", "La", "I", "F", "I;16", "I;16B", "I;16L", "I;16N"}


class UnreadableImage(ValueError):
    """An image that cannot be used; the message says why, without the file's name."""


@dataclass(frozen=True)
class EncodedImage:
    """One image as it is stored: its bytes, its extension (`png` or `jpg`) and its mode (`L` or `RGB`)."""

    data: bytes
    extension: str
    mode: str


# The samples with the given numbers ([n] int64), encoded, in this order; None is one that is left out.
Images = Callable[[np.ndarray], Iterator[EncodedImage | None]]


def one_by_one(load: Callable[[int], EncodedImage | None]) -> Images:
    """Images that are at hand, or nearly so: made in this process, each when it is asked for."""
    return lambda numbers: map(load, numbers.tolist())


def decode(data: bytes, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """The decoded image, in whatever mode the file has.

    Raises:
        UnreadableImage: not of `formats`, more than `MAX_PIXELS` (found out before decoding), or damaged.
    """
    # Pillow reports damage by many kinds of exception, warnings included: none may get past this function.
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=formats)
            width, height = image.size
            if width * height > MAX_PIXELS or width * height == 0:
                raise UnreadableImage(f"{width} x {height} pixels; allowed are 1 to {MAX_PIXELS:,}")
            image.load()
    except UnreadableImage:
        raise
    except UnidentifiedImageError:
        raise UnreadableImage(f"not a {', '.join(formats)} image") from None
    except Exception as error:
        raise UnreadableImage(str(error) or type(error).__name__) from None
    return image


def to_mode(image: Image.Image, mode: str | None = None) -> Image.Image:
    """The image as 8-bit `L` or `RGB`; with `mode=None`, grey stays grey and everything else becomes RGB.

    A palette of greys alone is grey. Sixteen-bit grey keeps its upper eight bits; transparency is put on white.
    """
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        divisor = 257.0 if image.mode.startswith("I") else 1.0
        image = Image.fromarray(np.clip(values / divisor, 0, 255).astype(np.uint8))
        grey = True
    else:
        grey = image.mode in _GREY_MODES or (image.mode == "P" and _is_grey_palette(image))
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), layer)
    return image.convert(mode or ("L" if grey else "RGB"))


def _is_grey_palette(image: Image.Image) -> bool:
    colours = np.array(image.getpalette("RGB") or [], dtype=np.uint8).reshape(-1, 3)
    return bool(len(colours)) and bool((colours == colours[:, :1]).all())


def resize(image: Image.Image, image_size: int) -> Image.Image:
    """`image` as `image_size` x `image_size` pixels, aspect ratio not kept; averages areas when it shrinks."""
    if image.size == (image_size, image_size):
        return image
    shrinks = image.width >= image_size and image.height >= image_size
    return image.resize((image_size, image_size), Image.Resampling.BOX if shrinks else Image.Resampling.BILINEAR)


def encode(image: Image.Image, encoding: Encoding = "png") -> EncodedImage:
    """An `L` or `RGB` image as PNG, or as JPEG of quality 95."""
    assert image.mode in ("L", "RGB"), image.mode
    stream = io.BytesIO()
    if encoding == "png":
        image.save(stream, format="PNG")
    else:
        image.save(stream, format="JPEG", quality=95)
    return EncodedImage(stream.getvalue(), encoding, image.mode)


def encode_array(pixels: np.ndarray) -> EncodedImage:
    """A grey array [height, width] uint8 as PNG."""
    return encode(Image.fromarray(np.ascontiguousarray(pixels)))


def store(data: bytes, image_size: int | None, mode: ImageMode | None, encoding: Encoding) -> EncodedImage:
    """The image file `data` as it goes into a shard.

    The bytes are kept as they are when the file is an 8-bit L or RGB, PNG or JPEG image of the wanted mode and size
    that needs no turning; else it is converted, turned upright, resized and encoded again. It is decoded in any case,
    so that no damaged image gets into a shard.

    Raises:
        UnreadableImage: see `decode`.
    """
    image = decode(data)
    # `getexif` parses bytes of the file: damage there is damage of the image.
    try:
        is_turned = image.getexif().get(_ORIENTATION_TAG, 1) != 1
        has_alpha = "transparency" in image.info
        is_stored_mode = image.mode == mode if mode else image.mode in ("L", "RGB")
        is_sized = image_size is None or image.size == (image_size, image_size)
        if image.format in _EXTENSION and is_stored_mode and is_sized and not is_turned and not has_alpha:
            return EncodedImage(data, _EXTENSION[image.format], image.mode)
        upright = ImageOps.exif_transpose(image) if is_turned else image
        plain = to_mode(upright, mode)
    except Exception as error:
        raise UnreadableImage(str(error) or type(error).__name__) from None
    return encode(plain if image_size is None else resize(plain, image_size), encoding)
