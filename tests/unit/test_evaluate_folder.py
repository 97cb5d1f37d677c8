"""Embedding a folder of images: the file's content, and what bad input gets."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from megaclass.errors import ConfigError, DataError, NumericError
from megaclass.evaluate.embed import embed_images
from megaclass.evaluate.folder import embed_folder, list_images, read_image

CPU = torch.device("cpu")
SIZE = 9


class Flat(nn.Module):
    """The pixels themselves as embeddings, and a count of the images of each call."""

    def __init__(self):
        super().__init__()
        self.batches = []

    def forward(self, images):
        self.batches.append(len(images))
        return images.flatten(1)


@pytest.fixture
def images(tmp_path):
    """Eight pictures in subfolders, in several formats, and a file that is none."""
    folder = tmp_path / "images"
    (folder / "b" / "deep").mkdir(parents=True)
    names = ["b.png", "b/2.PNG", "b/10.jpg", "a.jpeg", "é.bmp", "b/deep/x.webp", "y.tif", "z.gif"]
    for number, name in enumerate(names):
        pixels = np.random.default_rng(number).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name, **({"lossless": True} if name.endswith("webp") else {}))
    (folder / "README.md").write_text("not an image")
    (folder / "folder.png").mkdir()
    return folder


def _run(folder, output, backbone=None, batch_size=3, channels=3):
    return embed_folder(backbone or Flat(), folder, output, SIZE, channels, batch_size, CPU)


def test_the_file_has_names_and_unit_length_embeddings(images, tmp_path):
    output = tmp_path / "out.npz"
    backbone = Flat()
    assert _run(images, output, backbone) == 8
    with np.load(output, allow_pickle=False) as content:
        assert set(content.files) == {"names", "embeddings"}
        names, embeddings = content["names"], content["embeddings"]
    assert names.dtype.kind == "U"
    expected = ["a.jpeg", "b.png", "b/10.jpg", "b/2.PNG", "b/deep/x.webp", "y.tif", "z.gif", "é.bmp"]
    assert names.tolist() == expected == list_images(images)
    assert embeddings.dtype == np.float32
    assert embeddings.shape == (8, 3 * SIZE * SIZE)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-6)
    assert backbone.batches == [3, 3, 2]
    assert backbone.training
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "out.npz"]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["b.png", "é.bmp", "b/deep/x.webp", "y.tif"])
def test_pixels_are_those_of_the_image(images, tmp_path, name, channels):
    pixels = np.array(Image.open(images / name).convert("L" if channels == 1 else "RGB"))
    assert np.array_equal(read_image(images, name, SIZE, channels).reshape(pixels.shape), pixels)
    _run(images, tmp_path / "out.npz", channels=channels)
    with np.load(tmp_path / "out.npz") as content:
        got = content["embeddings"][content["names"].tolist().index(name)]
    planes = torch.from_numpy(pixels.reshape(SIZE, SIZE, channels)).permute(2, 0, 1)[None] / 127.5 - 1
    assert torch.allclose(torch.from_numpy(got)[None], embed_images(Flat(), planes, CPU), atol=1e-6)


def test_images_are_resized(images):
    assert read_image(images, "b.png", 5, 1).shape == (5, 5, 1)


def test_content_decides_the_format_not_the_suffix(images):
    (images / "b.png").write_bytes((images / "b/10.jpg").read_bytes())
    assert np.array_equal(read_image(images, "b.png", SIZE, 3), read_image(images, "b/10.jpg", SIZE, 3))


def _bomb():
    """A PNG header that promises 13,300 pixels a side."""
    header = struct.pack(">IIBBBBB", 13300, 13300, 8, 0, 0, 0, 0)
    chunk = b"IHDR" + header
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


def _saved(picture, kind, **options):
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


GREY = Image.new("L", (9, 9), 3)
BAD = {
    "empty.png": (b"", "not an image in a known format"),
    "text.jpg": (b"hello", "not an image in a known format"),
    "short.png": (
        _saved(Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 9), np.uint8)), "PNG")[:70],
        "PNG",
    ),
    "short.jpg": (_saved(GREY, "JPEG")[:300], "JPEG does not decode"),
    "bomb.png": (_bomb(), "13300 x 13300 pixels, allowed are 50000000"),
    "bomb.bmp": (_saved(Image.new("1", (8000, 8000)), "BMP"), "8000 x 8000 pixels, allowed are 50000000"),
    "moves.gif": (
        _saved(GREY, "GIF", save_all=True, append_images=[Image.new("L", (9, 9), 200)]),
        "more than one picture",
    ),
    "ink.tif": (_saved(Image.new("CMYK", (9, 9)), "TIFF"), "CMYK"),
}


@pytest.mark.parametrize("name", BAD)
def test_an_image_that_cannot_be_used_is_named_and_nothing_is_written(images, tmp_path, name):
    data, reason = BAD[name]
    (images / "b" / name).write_bytes(data)
    with pytest.raises(DataError) as caught:
        _run(images, tmp_path / "out.npz")
    assert f"image {images / 'b' / name} cannot be used: " in str(caught.value)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 3
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_a_failed_run_leaves_the_earlier_file_alone(images, tmp_path):
    output = tmp_path / "out.npz"
    output.write_bytes(b"earlier")
    (images / "b.png").write_bytes(b"")
    with pytest.raises(DataError):
        _run(images, output)
    assert output.read_bytes() == b"earlier"


def test_the_earlier_file_is_replaced_and_not_written_into(images, tmp_path):
    output = tmp_path / "out.npz"
    output.write_bytes(b"earlier")
    (tmp_path / "same").hardlink_to(output)
    _run(images, output)
    assert (tmp_path / "same").read_bytes() == b"earlier"
    with np.load(output) as content:
        assert len(content["names"]) == 8


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(DataError, match="nowhere is not a folder; give the folder that holds the images"):
        _run(tmp_path / "nowhere", tmp_path / "out.npz")
    with pytest.raises(DataError, match=r"holds no images; looked for files ending in \.png, \.jpg"):
        _run(tmp_path, tmp_path / "out.npz")


def test_an_output_that_cannot_be_written_is_found_before_the_work(images, tmp_path):
    backbone = Flat()
    for output in (tmp_path / "no" / "out.npz", tmp_path):
        with pytest.raises(ConfigError, match="cannot be written: give a file in an existing folder"):
            _run(images, output, backbone)
    assert backbone.batches == []


def test_embeddings_that_are_not_finite_are_an_error(images, tmp_path):
    class Broken(nn.Module):
        def forward(self, images):
            return images.flatten(1) * float("nan")

    with pytest.raises(NumericError, match="8 of 8 embeddings are not finite"):
        _run(images, tmp_path / "out.npz", Broken())
    assert not (tmp_path / "out.npz").exists()
