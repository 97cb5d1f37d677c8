from __future__ import annotations

import io
import resource
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from megaclass.data.bad_samples import REASONS, BadSample
from megaclass.data.decode import decode_image, judge_header, judge_jpeg_data
from tests.support.tiny_dataset import encode, tiny_image

PIXELS = tiny_image(3, 0, 16, 3)
PICTURE = Image.fromarray(PIXELS)


def saved(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def blank_png(side: int) -> bytes:
    """A grey PNG of zeros, compressed piece by piece: about 20 kB for 13,300 pixels a side."""
    packer = zlib.compressobj(9)
    row = bytes(side + 1)
    body = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize("channels", [1, 3])
def test_png_comes_back_exactly(channels: int) -> None:
    image = tiny_image(1, 2, 13, channels)
    assert np.array_equal(decode_image(encode(image), "png", 13, channels), image)


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_comes_back_nearly(channels: int) -> None:
    image = np.repeat(np.repeat(tiny_image(1, 2, 4, channels), 8, 0), 8, 1)
    decoded = decode_image(encode(image, "jpg"), "jpg", 32, channels)
    assert np.abs(decoded.astype(int) - image).mean() < 12


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "RGB"])
def test_modes_that_mean_the_same_in_grey_or_colour(mode: str) -> None:
    picture = PICTURE.convert(mode)
    for channels, target in ((1, "L"), (3, "RGB")):
        expected = np.asarray(picture.convert("RGB").convert(target)).reshape(16, 16, channels)
        decoded = decode_image(saved(picture), "png", 16, channels)
        assert decoded.dtype == np.uint8
        assert np.abs(decoded.astype(int) - expected).max() <= 1


def test_other_sizes_are_resized_with_antialiasing() -> None:
    stripes = np.zeros((64, 64, 1), np.uint8)
    stripes[:, ::2] = 200
    decoded = decode_image(encode(stripes), "png", 16, 1)
    assert decoded.shape == (16, 16, 1)
    assert np.abs(decoded.astype(int) - 100).max() < 15
    assert decode_image(saved(PICTURE.resize((5, 40))), "png", 16, 3).shape == (16, 16, 3)


BAD_IMAGES = [
    (b"", "png", "bad-image", "not a PNG file"),
    (b"", "jpg", "bad-image", "JPEG does not decode"),
    (b"not an image", "png", "bad-image", "not a PNG file: starts with b'not an i'"),
    (saved(PICTURE)[:-60], "png", "bad-image", "PNG does not decode: .*truncated"),
    (saved(PICTURE)[:40], "png", "bad-image", "PNG does not decode"),
    (saved(PICTURE, "JPEG")[:-100], "jpg", "bad-image", "JPEG does not decode: .*[Pp]remature end"),
    (saved(PICTURE, "JPEG"), "png", "bad-image", "not a PNG file"),
    (saved(PICTURE), "jpg", "bad-image", "JPEG does not decode"),
    (saved(PICTURE.convert("CMYK"), "JPEG"), "jpg", "unsupported-image", "JPEG in CMYK"),
    (saved(Image.fromarray(np.full((8, 8), 999, np.uint16))), "png", "unsupported-image", "16 bits per channel"),
    (saved(Image.new("RGBA", (8, 8), (1, 2, 3, 254))), "png", "unsupported-image", "transparent pixels"),
    (saved(Image.new("L", (8, 8), 3), transparency=3), "png", "unsupported-image", "transparent pixels"),
    (
        saved(PICTURE, save_all=True, append_images=[PICTURE.rotate(90)]),
        "png",
        "unsupported-image",
        "animated PNG",
    ),
]


@pytest.mark.parametrize(("data", "extension", "reason", "text"), BAD_IMAGES)
def test_bad_images_have_a_reason(data: bytes, extension: str, reason: str, text: str) -> None:
    with pytest.raises(BadSample) as caught:
        decode_image(data, extension, 16, 3)
    assert caught.value.reason == reason
    caught.match(text)


def test_a_bomb_is_refused_before_it_is_decoded() -> None:
    bomb = blank_png(13_300)
    assert len(bomb) < 200_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BadSample, match="image of 13300 x 13300 pixels, allowed are 50000000"):
        decode_image(bomb, "png", 16, 1)
    jpeg = bytearray(saved(PICTURE, "JPEG"))
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = struct.pack(">HH", 13_300, 13_300)
    with pytest.raises(BadSample, match="image of 13300 x 13300 pixels"):
        decode_image(bytes(jpeg), "jpg", 16, 1)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


def test_damaged_bytes_raise_nothing_but_bad_sample() -> None:
    random = np.random.default_rng(0)
    reasons = set()
    for data, extension in (
        (saved(PICTURE), "png"),
        (saved(PICTURE.convert("P")), "png"),
        (saved(PICTURE, "JPEG"), "jpg"),
    ):
        for _ in range(400):
            changed = bytearray(data)
            for place in random.integers(0, len(data), random.integers(1, 6)):
                changed[place] = random.integers(256)
            if random.random() < 0.2:
                changed = changed[: random.integers(len(changed))]
            try:
                assert decode_image(bytes(changed), extension, 16, 3).shape == (16, 16, 3)
            except BadSample as error:
                reasons.add(error.reason)
    assert "bad-image" in reasons
    assert reasons <= set(REASONS)


def test_a_jpeg_can_be_judged_without_its_pixels() -> None:
    """What a walk through its data finds is what decoding finds, word for word."""
    random = np.random.default_rng(0)
    outcomes = set()
    for options in ({"subsampling": 0}, {"subsampling": 2}, {"progressive": True}):
        data = saved(PICTURE.resize((40, 40)), "JPEG", quality=90, **options)
        for _ in range(300):
            changed = bytearray(data)
            for place in random.integers(0, len(data), random.integers(1, 4)):
                changed[place] = random.integers(256)
            told = []
            for judge in (lambda data: decode_image(data, "jpg", 16, 3), judge_jpeg_data):
                try:
                    judge_header(bytes(changed), "jpg")
                    judge(bytes(changed))
                    told.append("")
                except BadSample as error:
                    told.append(error.detail)
            assert told[0] == told[1]
            outcomes.add(bool(told[0]))
    assert outcomes == {False, True}


def test_headers_say_what_decoders_may_differ_in() -> None:
    assert judge_header(saved(PICTURE), "png") == (16, 16, True, False)
    assert judge_header(saved(PICTURE.resize((5, 40)), "JPEG", subsampling=0), "jpg") == (5, 40, True, False)
    assert judge_header(saved(PICTURE, "JPEG", subsampling=2), "jpg") == (16, 16, True, True)
    assert judge_header(saved(PICTURE.convert("L"), "JPEG"), "jpg") == (16, 16, True, False)
    for data, extension in (
        (saved(PICTURE.convert("RGBA")), "png"),
        (saved(PICTURE.convert("1")), "png"),
        (saved(PICTURE.convert("P"), transparency=0), "png"),
        (saved(PICTURE)[:-12], "png"),
        (saved(PICTURE, "JPEG", keep_rgb=True), "jpg"),
        (saved(PICTURE, "JPEG")[:-2], "jpg"),
    ):
        assert not judge_header(data, extension).is_plain
