"""Images that are damaged, hostile, or of a kind that has no place in a data set; beside `mutations`."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image


def _saved(picture: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width: int, height: int, depth: int = 8, colour: int = 0, data: bytes = b"", *more: bytes) -> bytes:
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + png_chunk(b"IDAT", data) + png_chunk(b"IEND", b"")


def _special_images() -> list[tuple[str, str, bytes]]:
    grey = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    rows = zlib.compress(bytes(9 * 8))
    bomb = zlib.compress(bytes(30_000_000), 9)
    jpeg = _saved(grey, "JPEG")
    sof = jpeg.index(b"\xff\xc0") + 5
    frames = [grey, grey.rotate(90)]
    return [
        ("CMYK", "jpg", _saved(grey.convert("CMYK"), "JPEG")),
        ("progressive", "jpg", _saved(grey, "JPEG", progressive=True)),
        ("65,535 pixels a side", "jpg", jpeg[:sof] + b"\xff\xff\xff\xff" + jpeg[sof + 4 :]),
        ("no pixels", "jpg", jpeg[:sof] + b"\0\0\0\0" + jpeg[sof + 4 :]),
        ("7,000 pixels a side in the header", "jpg", jpeg[:sof] + struct.pack(">HH", 7000, 7000) + jpeg[sof + 4 :]),
        ("no end mark", "jpg", jpeg[:-2]),
        ("a mark alone", "jpg", b"\xff\xd8\xff"),
        ("arithmetic coding", "jpg", jpeg.replace(b"\xff\xc0", b"\xff\xc9", 1)),
        ("lossless", "jpg", jpeg.replace(b"\xff\xc0", b"\xff\xc3", 1)),
        ("16 bits", "png", _saved(Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 999), "PNG")),
        ("colour", "png", _saved(grey.convert("RGB"), "PNG")),
        ("palette", "png", _saved(grey.convert("P"), "PNG")),
        ("one bit", "png", _saved(grey.convert("1"), "PNG")),
        ("transparent", "png", _saved(Image.new("RGBA", (8, 8), (1, 2, 3, 4)), "PNG")),
        ("opaque alpha", "png", _saved(Image.new("RGBA", (8, 8), (1, 2, 3, 255)), "PNG")),
        ("animated", "png", _saved(frames[0], "PNG", save_all=True, append_images=frames[1:])),
        ("20,000 pixels a side", "png", png_of(20000, 20000)),
        ("2**31 pixels a side", "png", png_of(2**31 - 1, 2**31 - 1)),
        ("2**32 - 1 pixels a side", "png", png_of(2**32 - 1, 2**32 - 1)),
        ("50 million pixels in one row", "png", png_of(50_000_000, 1, 8, 0, rows)),
        ("no pixels", "png", png_of(0, 8, 8, 0, rows)),
        ("colour type 7", "png", png_of(8, 8, 8, 7, rows)),
        ("bit depth 3", "png", png_of(8, 8, 3, 0, rows)),
        ("data of 30 MB for 64 pixels", "png", png_of(8, 8, 8, 0, bomb)),
        ("text of 30 MB", "png", png_of(8, 8, 8, 0, rows, png_chunk(b"zTXt", b"x\0\0" + bomb))),
        ("many texts", "png", png_of(8, 8, 8, 0, rows, *[png_chunk(b"tEXt", b"k%d\0v" % n) for n in range(5000)])),
        ("profile of 30 MB", "png", png_of(8, 8, 8, 0, rows, png_chunk(b"iCCP", b"x\0\0" + bomb))),
        ("palette of no colours", "png", png_of(8, 8, 8, 3, rows, png_chunk(b"PLTE", b""))),
        ("chunk of 2**31 bytes", "png", png_of(8, 8)[:33] + b"\xff\xff\xff\xffIDAT"),
        ("broken gamma", "png", png_of(8, 8, 8, 0, rows, png_chunk(b"gAMA", b""), png_chunk(b"tRNS", b""))),
        ("broken Exif", "png", png_of(8, 8, 8, 0, rows, png_chunk(b"eXIf", b"II*\0\xff\xff\xff\xff"))),
        ("GIF", "png", _saved(grey, "GIF")),
        ("WebP", "jpg", _saved(grey.convert("RGB"), "WEBP")),
        ("TIFF", "png", _saved(grey, "TIFF")),
        ("EPS", "png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(%pipe%touch canary) (w) file\n"),
        ("JPEG", "png", jpeg),
        ("PNG", "jpg", _saved(grey, "PNG")),
        ("none", "png", b""),
        ("none", "jpg", b""),
    ]  # fmt: skip


SPECIAL_IMAGES = _special_images()
