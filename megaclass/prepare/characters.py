"""Which characters may become classes, before any is drawn.

Separate from `glyphs` (what is drawn and kept) because the choice is a pure function of code points: the set asked for,
the characters reserved for something else, and how many faces claim a character. A face that claims it may still draw a
blank; that is found by the pixels.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from megaclass.errors import ConfigError

CharacterSet = Literal["all", "han"]

# The blocks of unified ideographs; in planes 2 and 3 all but the compatibility ones. Ranges and not the names in
# `unicodedata`, which know more characters with every Python.
_HAN = (range(0x3400, 0x4DC0), range(0x4E00, 0xA000), range(0x20000, 0x2F800), range(0x30000, 0x40000))
# Controls, formats, separators, marks that need a base, and private use, which means another thing in every font.
_LEFT_OUT = frozenset({"Cc", "Cf", "Cs", "Co", "Zs", "Zl", "Zp", "Mn", "Mc", "Me"})
TOO_FEW_FACES = "of characters in fewer than min-faces faces"


@dataclass(frozen=True)
class Reserve:
    """Characters that must not appear in a data set because they are kept for an evaluation made elsewhere.

    The *bucket* of a character is the first byte of SHA-256(key + ":" + its code point as five upper-case hexadecimal
    digits). Those in buckets below `buckets` are reserved: about `buckets` / 256 of all.
    """

    key: str
    buckets: int

    @classmethod
    def parse(cls, text: str) -> Reserve:
        """`KEY:BUCKETS`, such as `hanglyph-v1:64`.

        Raises:
            ConfigError: not of that form, or not 1 to 255 buckets.
        """
        match = re.fullmatch(r"(.+):(\d{1,3})", text)
        if match is None or not 1 <= int(match[2]) <= 255:
            raise ConfigError(f"reserve is {text!r}; give KEY:BUCKETS with 1 to 255 of 256 buckets, as hanglyph-v1:64")
        return cls(match[1], int(match[2]))

    def holds(self, code: int) -> bool:
        """Whether a code point is reserved."""
        return hashlib.sha256(f"{self.key}:{code:05X}".encode()).digest()[0] < self.buckets


def reasons_against(
    maps: Iterable[frozenset[int]], min_faces: int, characters: CharacterSet = "all", reserve: Reserve | None = None
) -> dict[int, str]:
    """Why code points are not drawn, for those that are not.

    Args:
        maps: the code points of each face.
        min_faces: a character that fewer faces claim is not drawn.
        characters: `han` are the unified ideographs alone.
        reserve: see there.
    """
    claims = Counter(code for code_points in maps for code in code_points)
    reasons = {}
    for code, count in claims.items():
        if unicodedata.category(chr(code)) in _LEFT_OUT:
            reasons[code] = "left out by category"
        elif characters == "han" and not any(code in block for block in _HAN):
            reasons[code] = "of characters that are not Han"
        elif reserve is not None and reserve.holds(code):
            reasons[code] = "of reserved characters"
        elif count < min_faces:
            reasons[code] = TOO_FEW_FACES
    return reasons
