"""Which characters become classes: the set, the reserved, those of enough faces; and one face of a collection."""

from __future__ import annotations

import hashlib
import unicodedata
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from fontTools.ttLib import TTCollection, TTFont

from megaclass.cli import main
from megaclass.data.manifest import load_class_names, load_manifest
from megaclass.errors import ConfigError, DataError
from megaclass.prepare.characters import TOO_FEW_FACES, Reserve, reasons_against
from megaclass.prepare.faces import Face, find_faces
from megaclass.prepare.glyphs import draw_glyphs

FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
HAN = "CJK UNIFIED IDEOGRAPH"


def against(*texts: str, min_faces: int = 1, **options: object) -> dict[str, str]:
    maps = [frozenset(map(ord, text)) for text in texts]
    return {chr(code): reason for code, reason in reasons_against(maps, min_faces, **options).items()}  # type: ignore[arg-type]


def test_han_are_the_unified_ideographs_and_nothing_else() -> None:
    every = [code for code in range(0x110000) if unicodedata.name(chr(code), "").startswith(HAN)]
    assert len(every) > 90_000
    others = "A字あ한\u3007⺀⼀\uf900\ufa0e\U0002f800\u3000Ж"
    maps = [frozenset(every), frozenset(map(ord, others))]
    reasons = reasons_against(maps, 1, "han")
    assert set(reasons) == {ord(character) for character in others} - {ord("字")}
    assert {reasons[ord(character)] for character in "Aあ한\u3007⺀⼀\uf900\ufa0eЖ"} == {
        "of characters that are not Han"
    }
    assert not set(every) & set(reasons_against(maps, 1).keys())


def test_edges_of_the_han_blocks() -> None:
    inside = (0x3400, 0x4DBF, 0x4E00, 0x9FFF, 0x20000, 0x2F7FF, 0x30000, 0x3FFFF)
    outside = (0x33FF, 0x4DC0, 0x4DFF, 0xA000, 0x1FFFF, 0x2F800, 0x2FFFF, 0x40000)
    reasons = reasons_against([frozenset(inside + outside)], 1, "han")
    assert sorted(reasons) == list(outside)


def test_what_cannot_stand_alone_is_left_out_of_every_set() -> None:
    odd = "\x07\u200b\ue000 \u2028\u0301\u20dd"
    assert set(against(odd + "A").values()) == {"left out by category"}
    assert set(against(odd + "A")) == set(odd)


def test_a_character_needs_its_faces() -> None:
    assert against("AB", "BC", "BC", min_faces=2) == {"A": TOO_FEW_FACES}
    assert against("AB", "BC", "BC", min_faces=3) == {"A": TOO_FEW_FACES, "C": TOO_FEW_FACES}
    assert against() == {}


def test_reserved_are_the_characters_whose_hash_falls_in_the_buckets() -> None:
    """The rule as docs/data.md gives it, computed apart."""
    reserve = Reserve.parse("hanglyph-v1:64")
    codes = [0x41, *range(0x4E00, 0x5E00), 0x20000, 0x10FFFF]
    for code in codes:
        digest = hashlib.sha256(b"hanglyph-v1:" + format(code, "05X").encode()).digest()
        assert reserve.holds(code) == (digest[0] < 64)
    held = sum(map(reserve.holds, range(0x4E00, 0x5E00)))
    # 1,024 +- 28.
    assert 900 < held < 1150
    assert [
        sum(Reserve("k", 255).holds(code) for code in codes),
        sum(Reserve("k", 1).holds(code) for code in codes),
    ] == [
        sum(hashlib.sha256(f"k:{code:05X}".encode()).digest()[0] != 255 for code in codes),
        sum(hashlib.sha256(f"k:{code:05X}".encode()).digest()[0] == 0 for code in codes),
    ]


def test_reserved_characters_are_counted_as_such_before_missing_faces() -> None:
    reserve = Reserve("hanglyph-v1", 64)
    text = "".join(map(chr, range(0x4E00, 0x4E40)))
    reasons = against(text, "A", min_faces=2, reserve=reserve)
    for character in text:
        expected = "of reserved characters" if reserve.holds(ord(character)) else TOO_FEW_FACES
        assert reasons[character] == expected
    assert len(set(reasons.values())) == 2


@pytest.mark.parametrize(
    "text", ["hanglyph-v1", "hanglyph-v1:", ":64", "k:0", "k:256", "k:-1", "k:1.5", "k:9999", "", "k:64 "]
)
def test_a_reserve_that_is_no_reserve_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Reserve.parse(text)
    assert str(caught.value) == (
        f"reserve is {text!r}; give KEY:BUCKETS with 1 to 255 of 256 buckets, as hanglyph-v1:64"
    )


def test_a_key_may_hold_colons() -> None:
    assert Reserve.parse("a:b:7") == Reserve("a:b", 7)


@pytest.fixture(scope="module")
def faces() -> list[Face]:
    """Five of the shipped faces, of a few characters each."""
    text = {ord(character) for character in "abcdefghABCDEFGH0123456789"}
    return [replace(face, code_points=face.code_points & text) for face in find_faces()[0][:5]]


def test_a_reserved_character_is_drawn_nowhere(faces: list[Face]) -> None:
    reserve = Reserve("k", 100)
    whole = draw_glyphs(faces, 24, 3, 2)
    part = draw_glyphs(faces, 24, 3, 2, reserve=reserve)
    held = {code for code in set(whole.classes.tolist()) if reserve.holds(code)}
    assert 3 < len(held) < len(set(whole.classes.tolist())) - 3
    assert set(part.classes.tolist()) == set(whole.classes.tolist()) - held
    claimed = sum(len({code for code in face.code_points if reserve.holds(code)}) for face in faces)
    assert part.counts["pictures of reserved characters"] == claimed
    dropped = sum(count for reason, count in part.counts.items() if reason.startswith("pictures"))
    assert dropped + len(part.rasters) == sum(len(face.code_points) for face in faces)


def test_no_han_in_faces_without_any(faces: list[Face]) -> None:
    glyphs = draw_glyphs(faces, 24, 1, 1, characters="han")
    assert len(glyphs.classes) == 0
    assert glyphs.counts["pictures of characters that are not Han"] == sum(len(face.code_points) for face in faces)


@pytest.fixture
def collection(tmp_path: Path) -> Path:
    """A collection of three faces."""
    made = TTCollection()
    made.fonts = [TTFont(FONTS / f"DejaVu{name}.ttf") for name in ("SansDisplay", "SerifDisplay", "SansDisplay")]
    made.save(tmp_path / "three.ttc")
    return tmp_path / "three.ttc"


def test_one_face_of_a_collection_is_named_by_its_number(collection: Path) -> None:
    assert [face.number for face in find_faces([collection])[0]] == [0, 1, 2]
    found, passed_over = find_faces([Path(f"{collection}#1"), Path(f"{collection}#0"), FONTS / "cmr10.ttf"])
    assert [(face.path.name, face.number) for face in found] == [("three.ttc", 1), ("three.ttc", 0), ("cmr10.ttf", 0)]
    assert found[0].name.startswith("DejaVu Serif")
    assert passed_over == []
    assert find_faces([Path(f"{FONTS / 'cmr10.ttf'}#0")])[0][0].number == 0


def test_a_file_whose_name_has_the_mark_is_that_file(tmp_path: Path, collection: Path) -> None:
    named = collection.rename(tmp_path / "three.ttc#1.ttc")
    assert len(find_faces([named])[0]) == 3
    assert [face.number for face in find_faces([Path(f"{named}#2")])[0]] == [2]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("three.ttc#3", r"font .*three\.ttc has no face 3; it has 3, counted from 0"),
        (
            "three.ttc#x",
            r"font .*three\.ttc#x names no face of a collection; give its number after the #, as FILE\.ttc",
        ),
        ("three.ttc#-1", "names no face of a collection"),
        ("three.ttc#", "names no face of a collection"),
        ("none.ttc#0", r"font .*none\.ttc does not exist"),
        ("#0", "names no face of a collection"),
    ],
)
def test_a_face_that_is_not_there_is_refused(collection: Path, name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        find_faces([collection.parent / name])


def test_the_command_takes_a_face_a_set_and_a_reserve(
    tmp_path: Path, collection: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fonts = [f"{collection}#1", str(FONTS / "cmr10.ttf"), str(FONTS / "cmtt10.ttf")]
    command = ["data", "glyphs", "--fonts", *fonts, "--min-faces", "2", "--out", str(tmp_path / "out")]
    assert main([*command, "--reserve", "k:100"]) == 0
    assert "pictures of reserved characters" in capsys.readouterr().out
    manifest = load_manifest(tmp_path / "out")
    assert len(manifest.splits["train"].sources) == 3
    names = [name for split in manifest.splits.values() for name in load_class_names(tmp_path / "out", split).names]
    assert len(names) > 20
    assert not any(Reserve("k", 100).holds(int(name[2:], 16)) for name in names)
    assert main([*command[:-1], str(tmp_path / "han"), "--characters", "han"]) == 3
    assert "no character is drawn in 2 of the 3 faces" in capsys.readouterr().err
    assert main([*command, "--reserve", "k"]) == 2
    assert "reserve is 'k'; give KEY:BUCKETS" in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--characters", "han"], ["--reserve", "k:9"]])
def test_strips_hold_pictures_and_no_choice(
    tmp_path: Path, option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "glyphs", "--strips", "s.zip", "--out", str(tmp_path / "out"), *option]) == 2
    assert capsys.readouterr().err == (
        f"megaclass: {option[0]} means nothing with --strips, which hold the pictures; leave it out\n"
    )


def test_what_is_drawn_of_a_face_of_a_collection_is_that_face(collection: Path) -> None:
    (face,), (alone,) = (find_faces([Path(name)])[0] for name in (f"{collection}#1", FONTS / "DejaVuSerifDisplay.ttf"))
    assert face.code_points == alone.code_points
    first, second = (draw_glyphs([one], 24, 1, 1) for one in (face, alone))
    assert len(first.rasters) >= 1
    assert np.array_equal(first.rasters, second.rasters)
