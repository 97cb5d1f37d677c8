"""Image files → uint8 arrays of one size and channel count.

Separate because image bytes are untrusted: the header is judged before anything is decoded, and every way an image
can be wrong becomes a `BadSample` with a reason. What is converted keeps its meaning: palette, one-bit, colour ↔ grey,
opaque alpha. What would need a guess is refused: CMYK, 16 bits, real transparency, animation.
"""

from __future__ import annotations

import io
import struct
from typing import NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from megaclass.data.bad_samples import BadSample

MAX_PIXELS = 50_000_000
_PNG_START = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"
_PNG_SIZE = struct.Struct(">IIBB")
_PNG_GREY, _PNG_RGB, _PNG_PALETTE = 0, 2, 3
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
_JPEG_END = b"\xff\xd9"


class Header(NamedTuple):
    """What an image file says of itself before it is decoded.

    Attributes:
        width, height: in pixels.
        is_plain: the file is whole as far as its ends show, and of a kind that every decoder understands alike: 8 bits
            a channel, without transparency, JPEG in grey or YCbCr.
        is_subsampled: a JPEG whose colour has fewer pixels than its brightness; decoders differ in how they spread it.
    """

    width: int
    height: int
    is_plain: bool
    is_subsampled: bool = False


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
    image = _decode_png(data, channels) if extension == "png" else _decode_jpeg(data, channels, target)
    if image is target:
        return
    if image.shape[:2] != (height, width):
        image = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
    target[...] = image.reshape(target.shape)


def decode_pixels(data: bytes, extension: str, channels: int) -> NDArray[np.uint8]:
    """The image in its own size, uint8 [height, width] for one channel, else [height, width, 3].

    Raises:
        BadSample: as `decode_image`.
    """
    return _decode_png(data, channels) if extension == "png" else _decode_jpeg(data, channels)


def judge_header(data: bytes, extension: str) -> Header:
    """Judge an image file by its header, for whoever decodes it; a sound header does not mean a sound image.

    Raises:
        BadSample: as `decode_image`, for all that the header shows: another kind of file, too many pixels, CMYK, 16
            bits, animation. Transparency is no fault here: only the pixels show whether any is used.
    """
    return _judge_png(data) if extension == "png" else _judge_jpeg(data)


def judge_jpeg_data(data: bytes) -> None:
    """Walk through the compressed data of a JPEG with a sound header, for a decoder that passes over damage.

    Raises:
        BadSample: wherever `decode_image` would, as the same library reads the same bytes to make a thumbnail of them.

    Cost: half to two thirds of decoding.
    """
    try:
        simplejpeg.decode_jpeg(data, colorspace="GRAY", fastdct=True, min_height=1, min_width=1, min_factor=8)
    except ValueError as error:
        raise BadSample("bad-image", f"JPEG does not decode: {_line(error)}") from None


def _judge_jpeg(data: bytes) -> Header:
    try:
        height, width, colorspace, subsampling = simplejpeg.decode_jpeg_header(data)
    except ValueError as error:
        raise BadSample("bad-image", f"JPEG does not decode: {_line(error)}") from None
    _check_size(width, height)
    if colorspace not in ("YCbCr", "RGB", "Gray"):
        raise BadSample("unsupported-image", f"JPEG in {colorspace}; only grey and RGB have one meaning")
    is_plain = colorspace != "RGB" and data.endswith(_JPEG_END)
    return Header(width, height, is_plain, subsampling not in ("444", "Gray"))


def _judge_png(data: bytes) -> Header:
    if not data.startswith(_PNG_START) or len(data) < len(_PNG_START) + _PNG_SIZE.size:
        raise BadSample("bad-image", f"not a PNG file: starts with {data[:8]!r}")
    width, height, bit_depth, kind = _PNG_SIZE.unpack_from(data, len(_PNG_START))
    _check_size(width, height)
    if bit_depth == 16:
        # Pillow would cut colour to 8 bits and leave grey at 16: two meanings, so none.
        raise BadSample("unsupported-image", "PNG with 16 bits per channel; convert it to 8")
    pixels_start = data.find(b"IDAT")
    if data.find(b"acTL", 0, pixels_start) >= 0:
        raise BadSample("unsupported-image", "animated PNG")
    is_plain = bit_depth == 8 and kind in (_PNG_GREY, _PNG_RGB, _PNG_PALETTE)
    is_plain = is_plain and data.endswith(_PNG_END) and data.find(b"tRNS", 0, pixels_start) < 0
    return Header(width, height, is_plain)


def _decode_jpeg(data: bytes, channels: int, target: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
    """`target` itself where the image has its size; else uint8 [height, width] or [height, width, 3]."""
    header = _judge_jpeg(data)
    wanted = "GRAY" if channels == 1 else "RGB"
    try:
        if target is not None and (header.height, header.width) == target.shape[:2]:
            simplejpeg.decode_jpeg(data, wanted, fastdct=True, fastupsample=True, buffer=target)
            return target
        pixels = simplejpeg.decode_jpeg(data, wanted, fastdct=True, fastupsample=True)
    except ValueError as error:
        raise BadSample("bad-image", f"JPEG does not decode: {_line(error)}") from None
    return pixels[:, :, 0] if channels == 1 else pixels


def _decode_png(data: bytes, channels: int) -> NDArray[np.uint8]:
    _judge_png(data)
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
