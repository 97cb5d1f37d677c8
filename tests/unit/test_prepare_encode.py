"""Decoding within limits, conversion to L or RGB, and when bytes are kept."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from megaclass.prepare.encode import MAX_PIXELS, UnreadableImage, decode, encode, resize, store, to_mode


def file_of(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format=form, **options)
    return stream.getvalue()


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, shape, dtype=np.uint8)


def header_only_png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
@pytest.mark.parametrize("shape", [(9, 7), (9, 7, 3)])
def test_plain_images_keep_their_bytes(form: str, shape: tuple[int, ...]) -> None:
    data = file_of(Image.fromarray(noise(*shape)), form)
    stored = store(data, None, None, "png")
    assert stored.data == data
    assert (stored.extension, stored.mode) == ({"PNG": "png", "JPEG": "jpg"}[form], "L" if len(shape) == 2 else "RGB")
    assert store(data, 9, None, "png").data != data
    assert store(data, None, "L" if len(shape) == 3 else "RGB", "png").data != data


@pytest.mark.parametrize(
    ("image", "mode"),
    [
        (Image.fromarray(noise(9, 7)).convert("1"), "L"),
        (Image.fromarray(noise(9, 7)).convert("P"), "L"),
        (Image.fromarray(noise(9, 7, 3)).quantize(8), "RGB"),
        (Image.fromarray(noise(9, 7, 4), "RGBA"), "RGB"),
        (Image.fromarray(noise(9, 7).astype(np.uint16) * 257), "L"),
        (Image.fromarray(noise(9, 7, 2), "LA"), "L"),
    ],
)
def test_other_modes_become_l_or_rgb(image: Image.Image, mode: str) -> None:
    stored = store(file_of(image), None, None, "png")
    again = decode(stored.data)
    assert (stored.mode, again.mode, again.size) == (mode, mode, (7, 9))
    if image.mode == "1":
        assert np.array_equal(np.asarray(again), np.asarray(image) * 255)
    if image.mode == "I;16":
        assert np.array_equal(np.asarray(again), noise(9, 7))


def test_transparent_becomes_white() -> None:
    pixels = np.zeros((4, 4, 4), dtype=np.uint8)
    pixels[0, 0] = (10, 20, 30, 255)
    result = np.asarray(to_mode(Image.fromarray(pixels, "RGBA")))
    assert result[0, 0].tolist() == [10, 20, 30]
    assert (result[1:] == 255).all()


def test_turned_jpeg_is_turned_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = file_of(Image.fromarray(noise(9, 7)), "JPEG", exif=exif)
    stored = store(data, None, None, "png")
    assert decode(stored.data).size == (9, 7)
    assert stored.extension == "png"


def test_shrinking_averages_areas() -> None:
    pixels = noise(12, 12)
    small = np.asarray(resize(Image.fromarray(pixels), 4)).astype(float)
    assert np.abs(small - pixels.reshape(4, 3, 4, 3).mean(axis=(1, 3))).max() <= 1
    assert resize(Image.fromarray(pixels), 30).size == (30, 30)


def test_jpeg_encoding() -> None:
    stored = encode(Image.fromarray(np.full((8, 8), 90, dtype=np.uint8)), "jpg")
    assert stored.extension == "jpg"
    assert abs(int(np.asarray(decode(stored.data))[0, 0]) - 90) <= 1


def test_too_many_pixels_are_refused_before_decoding() -> None:
    for width, height in ((13_300, 13_300), (60_000, 60_000), (MAX_PIXELS + 1, 1)):
        with pytest.raises(UnreadableImage, match=r"pixels"):
            decode(header_only_png(width, height))


@pytest.mark.parametrize("data", [b"", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_no_image_is_unreadable(data: bytes) -> None:
    with pytest.raises(UnreadableImage):
        decode(data)


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_truncated_is_unreadable(form: str) -> None:
    data = file_of(Image.fromarray(noise(40, 40)), form)
    with pytest.raises(UnreadableImage):
        store(data[: len(data) // 2], None, None, "png")


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["PNG", "JPEG", "BMP", "WEBP", "PPM"]), st.data())
def test_damage_is_unreadable_or_an_image(form: str, draw: st.DataObject) -> None:
    data = bytearray(file_of(Image.fromarray(noise(11, 5, 3)), form))
    for _ in range(4):
        data[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    try:
        stored = store(bytes(data), None, None, "png")
    except UnreadableImage:
        return
    assert stored.mode in ("L", "RGB")
