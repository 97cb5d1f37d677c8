"""Reading RecordIO files (`.rec`, with `.idx` and `property` beside them) without MXNet.

A file is a row of records, each padded to four bytes: magic number, a word of three bits (which part of a record this
is) and twenty-nine (its length), then that many bytes. Where the magic number stands in a record's own bytes at such a
place, the writer cuts the record there and leaves the number out; the parts are put together again with it.

A record of an image begins with a header: a count, a label, two ids; with a count above zero, so many labels follow in
place of the one. Face sets have records without an image besides: number 0, whose first label is one more than the
number of images, and one for each identity.

Source: the RecordIO format of dmlc-core (include/dmlc/recordio.h) and the image header `IRHeader` of MXNet.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from megaclass.errors import DataError

_MAGIC = 0xCED7230A
_WORDS = struct.Struct("<II")
_HEADER = struct.Struct("<IfQQ")
_WHOLE, _FIRST, _MIDDLE, _LAST = range(4)
_LENGTH_BITS = 29
# An image has one label or a few; a count beyond this is no header at all.
_MOST_LABELS = 1 << 16


@dataclass(frozen=True)
class Layout:
    """What is where in a file.

    Attributes:
        offsets: [num_images] int64, where the records of the images begin.
        labels: [num_images] int64, the first label of each.
        num_others: records without an image.
    """

    offsets: np.ndarray
    labels: np.ndarray
    num_others: int


class RecordFile:
    """One `.rec` file, mapped into memory; use it as a context.

    Raises:
        DataError: there is no such file, or it is empty.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with path.open("rb") as stream:
                self._bytes = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read: {error}; give a .rec file") from None

    def __enter__(self) -> RecordFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bytes.close()

    def __reduce__(self) -> tuple[type[RecordFile], tuple[Path]]:
        """Another process maps the file for itself."""
        return RecordFile, (self._path,)

    def image(self, offset: int) -> bytes:
        """The image file in the record at `offset`."""
        payload, _ = self._record(offset)
        return self._unpacked(payload, offset)[1]

    def layout(self) -> Layout:
        """Walk over all records and check them against each other and against the files beside this one.

        Raises:
            DataError: the file is cut off or is no RecordIO file, a label is no class id, or a count does not fit.
        """
        offsets, labels, places = [], [], []
        num_images_told: int | None = None
        for number, (offset, payload) in enumerate(self._records()):
            places.append(offset)
            found, image = self._unpacked(payload, offset)
            if image:
                offsets.append(offset)
                labels.append(self._class_id(found[0], offset))
            elif number == 0 and len(found) > 1:
                num_images_told = int(found[0]) - 1
        if num_images_told not in (None, len(offsets)):
            raise DataError(
                f"{self._path}: its first record tells of {num_images_told:,} images and there are {len(offsets):,}; "
                "the file is not the one that was written: get it again"
            )
        if not offsets:
            raise DataError(f"{self._path} has {len(places):,} records and no image in any; give a .rec file of images")
        self._check_index(places)
        return Layout(np.array(offsets, dtype=np.int64), np.array(labels, dtype=np.int64), len(places) - len(offsets))

    def num_classes_told(self) -> int | None:
        """The first number of the file `property` beside this one; None without such a file.

        Raises:
            DataError: it does not begin with a number.
        """
        path = self._path.with_name("property")
        if not path.is_file():
            return None
        first = path.read_text(encoding="utf-8", errors="replace").partition(",")[0].strip()
        if not first.isdecimal():
            raise DataError(f"{path} begins with {first[:40]!r}; the number of classes is needed there: 93431,112,112")
        return int(first)

    def _records(self) -> Iterator[tuple[int, bytes]]:
        offset = 0
        while offset < len(self._bytes):
            payload, end = self._record(offset)
            yield offset, payload
            offset = end

    def _record(self, offset: int) -> tuple[bytes, int]:
        """The bytes of the record at `offset`, its parts joined, and where the next one begins."""
        parts: list[bytes] = []
        at = offset
        while True:
            kind, data, at = self._part(at)
            if kind not in ((_WHOLE, _FIRST) if not parts else (_MIDDLE, _LAST)):
                raise self._broken(offset, "its parts are not in order")
            parts.append(data)
            if kind in (_WHOLE, _LAST):
                return struct.pack("<I", _MAGIC).join(parts), at

    def _part(self, at: int) -> tuple[int, bytes, int]:
        if at + _WORDS.size > len(self._bytes):
            raise self._broken(at, "the file ends inside it")
        magic, word = _WORDS.unpack_from(self._bytes, at)
        if magic != _MAGIC:
            raise self._broken(at, f"it begins with {magic:#010x} and not {_MAGIC:#010x}")
        begin, length = at + _WORDS.size, word & ((1 << _LENGTH_BITS) - 1)
        if begin + length > len(self._bytes):
            raise self._broken(at, "the file ends inside it")
        return word >> _LENGTH_BITS, self._bytes[begin : begin + length], begin + (length + 3) // 4 * 4

    def _unpacked(self, payload: bytes, offset: int) -> tuple[list[float], bytes]:
        """Labels and image of a record."""
        if len(payload) < _HEADER.size:
            raise self._broken(offset, f"it has {len(payload)} bytes, an image's header has {_HEADER.size}")
        count, label, _, _ = _HEADER.unpack_from(payload)
        if count == 0:
            return [label], payload[_HEADER.size :]
        end = _HEADER.size + 4 * count
        if count > _MOST_LABELS or end > len(payload):
            raise self._broken(offset, f"its header tells of {count} labels")
        return list(struct.unpack_from(f"<{count}f", payload, _HEADER.size)), payload[end:]

    def _class_id(self, label: float, offset: int) -> int:
        if not (label >= 0 and label.is_integer()):
            raise self._broken(offset, f"its label is {label}; class ids are whole numbers from 0")
        return int(label)

    def _check_index(self, places: list[int]) -> None:
        """The index tells of the same records; a file without one is read all the same."""
        path = self._path.with_suffix(".idx")
        if not path.is_file():
            return
        told = []
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            parts = line.split()
            if len(parts) != 2 or not all(part.isdecimal() for part in parts):
                raise DataError(f"{path}: line {number} is {line[:60]!r}; a key and an offset are needed")
            told.append(int(parts[1]))
        if sorted(told) != places:
            raise DataError(
                f"{path} tells of {len(told):,} records and {self._path.name} has {len(places):,}, or at other "
                "places; the two files do not belong together, or one is cut off: get both again"
            )

    def _broken(self, offset: int, why: str) -> DataError:
        return DataError(
            f"{self._path}: the record at byte {offset:,} of {len(self._bytes):,} is broken: {why}; the file is cut "
            "off, damaged or no RecordIO file"
        )
