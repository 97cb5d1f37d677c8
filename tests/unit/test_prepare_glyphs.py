"""Rendering: faces, placement, what is dropped, and a small data set from the shipped fonts."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from megaclass.data.manifest import load_class_names, load_index, load_manifest
from megaclass.errors import ConfigError, DataError
from megaclass.prepare import glyphs as glyphs_module
from megaclass.prepare.faces import Face, Pen, find_faces
from megaclass.prepare.glyphs import draw_glyphs, make_glyphs
from megaclass.prepare.verify import verify

FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
# Latin, Greek and Cyrillic A; B; i and dotless i; blank, combining, private; box drawing, one picture in all faces.
TEXT = "A\u0391\u0410Bi\u0131Ж,'\u2019| \u00a0\u0301\uf6c5\u2502"


@pytest.fixture(scope="module")
def faces() -> list[Face]:
    return find_faces()[0]


def few(faces: list[Face], text: str = TEXT) -> list[Face]:
    return [replace(face, code_points=face.code_points & {ord(character) for character in text}) for face in faces]


def test_the_shipped_faces(faces: list[Face]) -> None:
    assert len(faces) == 12
    assert {face.name.split()[0] for face in faces} == {"DejaVu"}
    assert not any("Display" in face.name for face in faces)
    assert len({face.name for face in faces}) == 12
    assert min(len(face.code_points) for face in faces) > 2000


def test_a_letter_stands_on_the_baseline_and_fits(faces: list[Face]) -> None:
    for size in (32, 48, 21):
        bottoms = set()
        for face in faces:
            for character in "AHEkЖ":
                picture = Pen(face, size).draw(character)
                assert isinstance(picture, np.ndarray)
                assert (picture.shape, picture.dtype) == ((size, size), np.uint8)
                assert picture.max() > 200
                bottoms.add(int(np.flatnonzero(picture.any(axis=1))[-1]))
        assert max(bottoms) - min(bottoms) <= 1


def test_place_tells_a_comma_from_an_apostrophe(faces: list[Face]) -> None:
    pen = Pen(faces[0], 32)
    rows = {character: np.flatnonzero(pen.draw(character).any(axis=1)).mean() for character in ",\u2019"}  # type: ignore[union-attr]
    assert rows[","] > rows["\u2019"] + 10


def test_blank_and_placeholder_are_seen_by_their_pixels(faces: list[Face]) -> None:
    pen = Pen(faces[0], 32)
    assert pen.draw(" ") == "blank"
    assert pen.draw("\U00013000") == "placeholder"
    assert pen.draw("\uffff") == "placeholder"


def test_large_characters_are_drawn_smaller_and_high_ones_moved_in(faces: list[Face]) -> None:
    sans = next(face for face in faces if face.name == "DejaVu Sans Book" or face.name == "DejaVu Sans")
    for character in "\u01fa\u2a0c\ua728":
        picture = Pen(sans, 32).draw(character)
        assert isinstance(picture, np.ndarray)
        assert picture.any()
    assert Pen(sans, 8).draw("\ufdfa") in ("too large", "placeholder")


def test_characters_become_classes(faces: list[Face]) -> None:
    glyphs = draw_glyphs(few(faces), 32, min_faces=8, min_images=4)
    classes = {chr(code) for code in np.unique(glyphs.classes)}
    assert {"A", "B", "i", "\u0131", "Ж", ","} <= classes
    assert not classes & set("\u0391\u0410 \u00a0\u0301\uf6c5\u2502")
    assert glyphs.counts["characters merged into a look-alike"] >= 2
    assert glyphs.counts["pictures left out by category"] > 0
    assert glyphs.counts["classes with fewer than min-images"] == 1
    assert glyphs.counts["pictures a class already has from another face"] > 0
    pairs = list(zip(glyphs.classes.tolist(), glyphs.faces.tolist(), strict=True))
    assert pairs == sorted(set(pairs))
    assert len({raster.tobytes() for raster in glyphs.rasters}) == len(glyphs.rasters)
    assert sum(code == ord("A") for code, _ in pairs) == 12


def test_counts_add_up(faces: list[Face]) -> None:
    some = few(faces)
    glyphs = draw_glyphs(some, 32, min_faces=8, min_images=4)
    dropped = sum(count for reason, count in glyphs.counts.items() if reason.startswith("pictures"))
    assert dropped + len(glyphs.rasters) == sum(len(face.code_points) for face in some)


def test_min_faces_and_tolerance(faces: list[Face]) -> None:
    assert len(draw_glyphs(few(faces[:5]), 32, min_faces=6, min_images=1).rasters) == 0
    text = "\u012c\u01cf"  # I with breve, I with caron: a pixel or two apart
    assert len(np.unique(draw_glyphs(few(faces, text), 32, 8, 4, tolerance=0.0).classes)) == 2
    assert len(np.unique(draw_glyphs(few(faces, text), 32, 8, 4, tolerance=0.1).classes)) == 1


def test_a_small_set_from_the_shipped_fonts(faces: list[Face], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = TEXT + "abcdefghjklmnopqrstuvwxyzCDEFGHJKLMNPQRSTUVWXYZ0123456789"
    monkeypatch.setattr(glyphs_module, "find_faces", lambda fonts: (few(faces, text), []))
    calls: list[tuple[int, int]] = []
    for folder in ("a", "b"):
        report = make_glyphs(tmp_path / folder, image_size=24, progress=lambda *call: calls.append(call))
    manifest = load_manifest(tmp_path / "a")
    assert manifest.image_mode == "L"
    assert set(manifest.splits) == {"train", "unseen"}
    assert manifest.splits["train"].sources == [face.name for face in faces]
    assert report.counts["pictures left out by category"] > 0
    assert (12, 12) in calls
    assert verify(tmp_path / "a").ok
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    names = load_class_names(tmp_path / "a", manifest.splits["train"]).names
    assert names == sorted(names)
    assert all(name.startswith("U+0") and len(name) == 7 for name in names)
    records, _ = load_index(tmp_path / "a", "train", manifest.splits["train"])
    record = records[0]
    data = (tmp_path / "a" / "train-000000.tar").read_bytes()[int(record["offset"]) :]
    pixels = np.asarray(Image.open(io.BytesIO(data[512 : 512 + int(data[124:135], 8)])))
    drawn = Pen(faces[record["source"]], 24).draw(chr(int(names[record["label"]][2:], 16)))
    assert np.array_equal(pixels, 255 - drawn)  # type: ignore[operator]


def test_fonts_may_be_files_folders_and_doubled(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    data = (FONTS / "DejaVuSansDisplay.ttf").read_bytes()
    (tmp_path / "sub" / "one.ttf").write_bytes(data)
    (tmp_path / "two.TTF").write_bytes(data)
    (tmp_path / "broken.otf").write_bytes(data[:100])
    (tmp_path / "readme.txt").write_bytes(b"")
    found, passed_over = find_faces([tmp_path])
    assert [face.name for face in found] == ["DejaVu Sans Display", "DejaVu Sans Display (2)"] or len(found) == 2
    assert len({face.name for face in found}) == 2
    assert len(passed_over) == 1
    assert "broken.otf cannot be used" in passed_over[0]
    assert len(find_faces([FONTS / "DejaVuSansDisplay.ttf"])[0]) == 1


def test_font_collections(tmp_path: Path) -> None:
    from fontTools.ttLib import TTCollection, TTFont

    collection = TTCollection()
    collection.fonts = [TTFont(FONTS / name) for name in ("DejaVuSansDisplay.ttf", "DejaVuSerifDisplay.ttf")]
    collection.save(tmp_path / "both.ttc")
    found, _ = find_faces([tmp_path / "both.ttc"])
    assert [(face.number, face.name.split()[1]) for face in found] == [(0, "Sans"), (1, "Serif")]
    character = chr(min(found[1].code_points - {32}))
    assert isinstance(Pen(found[1], 32).draw(character), (np.ndarray, str))


def test_fonts_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    with pytest.raises(DataError, match=r"broken\.ttf cannot be used"):
        find_faces([tmp_path / "broken.ttf"])
    with pytest.raises(DataError, match=r"none\.ttf does not exist"):
        find_faces([tmp_path / "none.ttf"])
    with pytest.raises(DataError, match="no usable font in"):
        find_faces([tmp_path])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 4}, "image-size is 4; allowed for glyphs is 8 to 256"),
        ({"min_faces": 0}, "min-faces is 0"),
        ({"min_images": 0}, "min-images 0"),
        ({"tolerance": 1.0}, "tolerance is 1.0"),
    ],
)
def test_options_are_checked(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_glyphs(tmp_path / "out", **options)  # type: ignore[arg-type]


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no character is drawn in 8 of the 1 faces"):
        make_glyphs(tmp_path / "out", fonts=[FONTS / "DejaVuSansDisplay.ttf"])
    assert not (tmp_path / "out").exists()
