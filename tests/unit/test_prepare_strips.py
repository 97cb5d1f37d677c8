"""Importing a zip of tile strips."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megaclass.data.manifest import load_class_names, load_index, load_manifest
from megaclass.errors import ConfigError, DataError
from megaclass.prepare.strips import import_strips
from megaclass.prepare.verify import verify


def strip(number: int, num_tiles: int = 3, side: int = 12, mode: str = "L") -> bytes:
    pixels = np.full((side, num_tiles * side), 255, dtype=np.uint8)
    for tile in range(num_tiles):
        pixels[0, tile * side] = number
        pixels[0, tile * side + 1] = tile
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stream, format="PNG")
    return stream.getvalue()


def make_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


@pytest.fixture
def strips(tmp_path: Path) -> Path:
    files = {f"{number:05X}.png": strip(number, mode="P" if number % 2 else "L") for number in range(13)}
    return make_zip(tmp_path / "strips.zip", files)


def test_tiles_become_samples(strips: Path, tmp_path: Path) -> None:
    names = tmp_path / "faces.json"
    names.write_text(json.dumps({"tile": 12, "faces": ["sans", "serif", "hand"]}))
    report = import_strips(strips, tmp_path / "out", sources=names, unseen_classes=4)
    manifest = load_manifest(tmp_path / "out")
    assert report.manifest == manifest
    assert (manifest.name, manifest.image_mode) == ("strips", "L")
    assert verify(tmp_path / "out").ok
    seen = {}
    for split_name, split in manifest.splits.items():
        assert split.sources == ["sans", "serif", "hand"]
        classes = load_class_names(tmp_path / "out", split)
        assert classes.names == sorted(classes.names)
        records, _ = load_index(tmp_path / "out", split_name, split)
        data = (tmp_path / "out" / split.shards[0].file).read_bytes()
        for record in records:
            start = int(record["offset"])
            size = int(data[start + 124 : start + 135], 8)
            pixels = np.asarray(Image.open(io.BytesIO(data[start + 512 : start + 512 + size])))
            assert pixels.shape == (12, 12)
            assert pixels[0, 0] == int(classes.names[record["label"]], 16)
            assert pixels[0, 1] == record["source"]
            seen[int(pixels[0, 0]), int(pixels[0, 1])] = split_name
    assert len(seen) == 39
    assert sum(split_name == "unseen" for split_name in seen.values()) == 12


def test_size_sources_and_share_have_defaults(strips: Path, tmp_path: Path) -> None:
    report = import_strips(strips, tmp_path / "out", image_size=8, encoding="jpg")
    assert set(report.manifest.splits) <= {"train", "unseen"}
    assert report.manifest.splits["train"].sources == ["tile-00", "tile-01", "tile-02"]
    assert verify(tmp_path / "out").ok


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.png": strip(1), "b.png": strip(1, side=10)}, "b.png has 30 x 10 pixels; all strips must have 36 x 12"),
        ({"a.png": strip(1)[:60]}, "a.png cannot be read"),
        ({"a.png": strip(1), "x/a.png": strip(2)}, "a.png and x/a.png name the same class; rename one"),
        ({"a.txt": b"none"}, "holds no image"),
    ],
)
def test_unusable_strips(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    path = make_zip(tmp_path / "bad.zip", files)
    with pytest.raises(DataError) as caught:
        import_strips(path, tmp_path / "out")
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_strip_that_is_not_a_whole_number_of_squares(tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.new("L", (25, 12)).save(stream, format="PNG")
    with pytest.raises(DataError, match="a whole number of square tiles"):
        import_strips(make_zip(tmp_path / "bad.zip", {"a.png": stream.getvalue()}), tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ('["a", "b"]', "has 2 names but every strip has 3 tiles"),
        ('{"a": ["x"], "b": ["y"]}', "is not a JSON list of names"),
        ("[1, 2, 3]", "is not a JSON list of names"),
    ],
)
def test_unusable_sources(strips: Path, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "faces.json").write_text(text)
    with pytest.raises(DataError, match=message):
        import_strips(strips, tmp_path / "out", sources=tmp_path / "faces.json")


def test_options_are_checked(strips: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="image-size is 4"):
        import_strips(strips, tmp_path / "out", image_size=4)
    with pytest.raises(DataError, match=r"nowhere\.zip does not exist"):
        import_strips(tmp_path / "nowhere.zip", tmp_path / "out")
