"""Font files and the faces in them, and the picture of a character in a face.

Separate from `glyphs` (which characters become classes): only this file touches fonts.

A picture is `image_size` pixels a side. The em is 3/4 of it, so that a normal line (ascent and descent) fits; the
baseline lies on one row for all characters and faces and the advance width is centred, so that place stays part of a
character's look (`,` and `'`, dots of Braille). Ink that would stick out is moved in as little as needed; a character
larger than the picture is drawn smaller, down to half the size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import matplotlib
import numpy as np
from fontTools.ttLib import TTCollection, TTFont  # type: ignore[import-untyped]
from PIL import Image, ImageDraw, ImageFont

from megaclass.errors import DataError

_SUFFIXES = (".ttf", ".otf", ".ttc", ".otc")
# Code points that no font may draw (noncharacters): what is shown for them is the placeholder.
_NONCHARACTERS = (0x10FFFE, 0x0FFFFE, 0x0EFFFE, 0xFFFE, 0xFDD0)
# Of the shipped faces, those with fewer characters than this only complete others.
_MIN_DEFAULT_CHARACTERS = 1000


@dataclass(frozen=True)
class Face:
    """One typeface: its name (different for every face of a run), its file, its number in it and its code points."""

    name: str
    path: Path
    number: int
    code_points: frozenset[int]


def find_faces(fonts: Sequence[Path] | None = None) -> tuple[list[Face], list[str]]:
    """All faces of the given files and folders, and one line for each file in a folder that was passed over.

    Args:
        fonts: .ttf, .otf, .ttc or .otc files, or folders searched to any depth; by default the DejaVu faces that come
            with matplotlib, without those of few characters. `FILE.ttc#2` is face 2 of a collection, counted from 0:
            a collection often holds one design for several countries, which are no different faces.

    Raises:
        DataError: a path does not exist, a file named directly cannot be used, or there is no face at all.
    """
    if fonts is None:
        files = sorted((Path(matplotlib.get_data_path()) / "fonts" / "ttf").glob("DejaVu*.ttf"))
        faces = [face for path in files for face in _faces_of(path)]
        return _named_apart([face for face in faces if len(face.code_points) >= _MIN_DEFAULT_CHARACTERS]), []
    faces, passed_over = [], []
    for font in fonts:
        if Path(font).is_dir():
            for path in sorted(Path(font).rglob("*")):
                if path.suffix.lower() in _SUFFIXES and path.is_file():
                    try:
                        faces += _faces_of(path)
                    except DataError as error:
                        passed_over.append(str(error))
        else:
            path, number = _file_and_number(Path(font))
            faces += _faces_of(path, number)
    if not faces:
        raise DataError(f"no usable font in {', '.join(map(str, fonts))}; give {', '.join(_SUFFIXES)} files or folders")
    return _named_apart(faces), passed_over


def _file_and_number(font: Path) -> tuple[Path, int | None]:
    stem, mark, number = font.name.rpartition("#")
    if not mark or font.exists():
        return font, None
    if not stem or not number.isdecimal():
        raise DataError(f"font {font} names no face of a collection; give its number after the #, as FILE.ttc#2")
    return font.with_name(stem), int(number)


def _faces_of(path: Path, only: int | None = None) -> list[Face]:
    # Damaged fonts make both libraries raise almost anything.
    try:
        faces = []
        with path.open("rb") as stream:
            num_faces = _num_faces(path, stream)
            for number in range(num_faces):
                if only not in (None, number):
                    continue
                stream.seek(0)
                code_points = frozenset(TTFont(stream, fontNumber=number, lazy=True).getBestCmap() or ())
                family, style = ImageFont.truetype(str(path), 16, index=number).getname()
                faces.append(Face(f"{family or path.stem} {style or ''}".strip(), path, number, code_points))
    except FileNotFoundError:
        raise DataError(f"font {path} does not exist; give .ttf, .otf, .ttc or .otc files or folders") from None
    except Exception as error:
        raise DataError(f"font {path} cannot be used: {error or type(error).__name__}; leave it out") from None
    if only is not None and only >= num_faces:
        raise DataError(f"font {path} has no face {only}; it has {num_faces}, counted from 0")
    faces = [face for face in faces if face.code_points]
    if not faces:
        raise DataError(f"font {path} maps no Unicode characters; leave it out")
    return faces


def _num_faces(path: Path, stream: BinaryIO) -> int:
    return len(TTCollection(stream, lazy=True).fonts) if path.suffix.lower() in (".ttc", ".otc") else 1


def _named_apart(faces: list[Face]) -> list[Face]:
    named: dict[str, Face] = {}
    for face in faces:
        name, copy = face.name, 2
        while name in named:
            name, copy = f"{face.name} ({copy})", copy + 1
        named[name] = Face(name, face.path, face.number, face.code_points)
    return list(named.values())


class Pen:
    """Draws characters of one face, centred in their picture as the module says."""

    def __init__(self, face: Face, image_size: int) -> None:
        self._face = face
        self._size = image_size
        self._fonts: dict[int, ImageFont.FreeTypeFont] = {}
        self._em = max(4, round(image_size * 0.75))
        # A line of a usual face reaches from 0.93 em above the baseline to 0.24 em below.
        self._baseline = round(image_size * 0.5 + self._em * 0.345)
        absent = [code for code in _NONCHARACTERS if code not in face.code_points]
        self._placeholder = self._ink(chr(absent[0]), self._em)[0] if absent else None

    def draw(self, character: str) -> np.ndarray | str:
        """The picture [image_size, image_size] uint8, 0 no ink, 255 full; or why there is none.

        The reasons are "blank", "placeholder" and "too large".
        """
        ink, left, top = self._ink(character, self._em)
        if ink is None:
            return "blank"
        if self._placeholder is not None and np.array_equal(ink, self._placeholder):
            return "placeholder"
        em = self._em
        while max(ink.shape) > self._size:
            em = min(em - 1, math.floor(em * self._size / max(ink.shape)))
            if em * 2 < self._em:
                return "too large"
            ink, left, top = self._ink(character, em)
            if ink is None:
                return "blank"
        advance = self._font(em).getlength(character)
        height, width = ink.shape
        column = min(max(round((self._size - advance) / 2) + left, 0), self._size - width)
        row = min(max(self._baseline + top, 0), self._size - height)
        picture = np.zeros((self._size, self._size), dtype=np.uint8)
        picture[row : row + height, column : column + width] = ink
        return picture

    def _font(self, em: int) -> ImageFont.FreeTypeFont:
        if em not in self._fonts:
            # The basic layout draws a code point as its font maps it: no ligatures, no shaping, no optional library.
            self._fonts[em] = ImageFont.truetype(
                str(self._face.path), em, index=self._face.number, layout_engine=ImageFont.Layout.BASIC
            )
        return self._fonts[em]

    def _ink(self, character: str, em: int) -> tuple[np.ndarray | None, int, int]:
        """The ink alone, and where its upper left corner lies from the origin on the baseline (x, y downwards)."""
        font = self._font(em)
        left, top, right, bottom = (round(value) for value in font.getbbox(character, anchor="ls"))
        # Two pixels all round: the box is rounded, and may lie off the ink by one.
        canvas = Image.new("L", (right - left + 4, bottom - top + 4))
        ImageDraw.Draw(canvas).text((2 - left, 2 - top), character, fill=255, font=font, anchor="ls")
        box = canvas.getbbox()
        if box is None:
            return None, 0, 0
        return np.asarray(canvas.crop(box)), box[0] - 2 + left, box[1] - 2 + top
