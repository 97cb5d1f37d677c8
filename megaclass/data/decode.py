"""Image files → uint8 arrays of one size and channel count.

Separate because image bytes are untrusted: the header is judged before anything is decoded, and every way an image
can be wrong becomes a `BadSample` with a reason. What is converted keeps its meaning: palette, one-bit, colour ↔ grey,
opaque alpha. What would need a guess is refused: CMYK, 16 bits, real transparency, animation.
"""

from __future__ import annotations

import io
import struct

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from megaclass.data.bad_samples import BadSample

MAX_PIXELS = 50_000_000
_PNG_START = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"
_PNG_SIZE = struct.Struct(">IIB")


def decode_image(data: bytes, extension: str, image_size: int, channels: int) -> NDArray[np.uint8]:
    """The image as uint8 [image_size, image_size, channels]; arguments and errors as of `decode_into`."""
    image = np.empty((image_size, image_size, channels), np.uint8)
    decode_into(data, extension, image)
    return image


def decode_into(data: bytes, extension: str, target: NDArray[np.uint8]) -> None:
    """Write the image to `target`, resized with antialiasing where its size differs.

    Args:
        data: a PNG or baseline/progressive JPEG file, untrusted.
        extension: `png` or `jpg`; the content must be of that kind.
        target: [image_size, image_size, channels] uint8, contiguous; one channel for luminance, three for RGB. The
            aspect ratio is not kept. A JPEG of this size is decoded straight into it.

    Raises:
        BadSample: `image-too-large` above 50 million pixels, `unsupported-image` for what has no single meaning in 8
            bits of grey or RGB, `bad-image` for anything that does not decode completely. What `target` then holds is
            undefined.
    """
    height, width, channels = target.shape
    image = _decode_png(data, channels) if extension == "png" else _decode_jpeg(data, target)
    if image is target:
        return
    if image.shape[:2] != (height, width):
        image = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
    target[...] = image.reshape(target.shape)


def _decode_jpeg(data: bytes, target: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """`target` itself where the image has its size; else uint8 [height, width] or [height, width, 3]."""
    channels = target.shape[2]
    wanted = "GRAY" if channels == 1 else "RGB"
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        _check_size(width, height)
        if colorspace not in ("YCbCr", "RGB", "Gray"):
            raise BadSample("unsupported-image", f"JPEG in {colorspace}; only grey and RGB have one meaning")
        if (height, width) == target.shape[:2]:
            simplejpeg.decode_jpeg(data, wanted, fastdct=True, fastupsample=True, buffer=target)
            return target
        pixels = simplejpeg.decode_jpeg(data, wanted, fastdct=True, fastupsample=True)
    except ValueError as error:
        raise BadSample("bad-image", f"JPEG does not decode: {_line(error)}") from None
    return pixels[:, :, 0] if channels == 1 else pixels


def _decode_png(data: bytes, channels: int) -> NDArray[np.uint8]:
    """uint8 [height, width] or [height, width, 3]."""
    if not data.startswith(_PNG_START) or len(data) < len(_PNG_START) + _PNG_SIZE.size:
        raise BadSample("bad-image", f"not a PNG file: starts with {data[:8]!r}")
    width, height, bit_depth = _PNG_SIZE.unpack_from(data, len(_PNG_START))
    _check_size(width, height)
    if bit_depth == 16:
        # Pillow would cut colour to 8 bits and leave grey at 16: two meanings, so none.
        raise BadSample("unsupported-image", "PNG with 16 bits per channel; convert it to 8")
    if data.find(b"acTL", 0, data.find(b"IDAT")) >= 0:
        raise BadSample("unsupported-image", "animated PNG")
    try:
        # The class rather than `Image.open`: its search for a format takes a sixth of the time of a small image.
        with PngImagePlugin.PngImageFile(io.BytesIO(data)) as picture:
            picture.load()
            return np.asarray(_without_alpha(picture).convert("L" if channels == 1 else "RGB"))
    except BadSample:
        raise
    # Pillow's parsers raise nearly anything for a crafted file: OSError, SyntaxError, KeyError, struct.error, ...
    except Exception as error:
        raise BadSample("bad-image", f"PNG does not decode: {_line(error)}") from None


def _without_alpha(picture: Image.Image) -> Image.Image:
    """The picture without its alpha channel; refused where it is not opaque: nobody said what is behind it."""
    if picture.mode not in ("LA", "PA", "RGBA") and "transparency" not in picture.info:
        return picture
    full = picture.convert("RGBA")
    if full.getchannel("A").getextrema() != (255, 255):
        raise BadSample("unsupported-image", "PNG with transparent pixels; draw it on a background first")
    return full.convert("RGB")


def _check_size(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise BadSample("bad-image", f"image of {width} x {height} pixels")
    if width * height > MAX_PIXELS:
        raise BadSample("image-too-large", f"image of {width} x {height} pixels, allowed are {MAX_PIXELS}")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
