"""Reading lists of image names and labels: text with commas or tabs, and Parquet.

Separate from `import_list`, which gives them their meaning. Every kind of list gives the same entries; labels are text
from here on, whatever they were in the list.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from datetime import date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

from megaclass.errors import ConfigError, DataError

_DELIMITERS = {".csv": ",", ".tsv": "\t", ".txt": "\t"}
_PARQUET = ".parquet"
_ROWS_AT_A_TIME = 65_536


class Entry(NamedTuple):
    """One line of a list: where it stands (`line 7` or `row 7`), the image's name and its label."""

    place: str
    name: str
    label: str


def read_list(path: Path, columns: Sequence[str] | None = None) -> list[Entry]:
    """The entries of a list, in its order.

    Args:
        path: `.csv` (commas), `.tsv` or `.txt` (tabs), UTF-8, quoted as spreadsheets do; or `.parquet`.
        columns: names of the columns of image and label; in a text they stand in the first line. None: the first two
            columns are meant, and a text has no such line.

    Raises:
        ConfigError: the ending is of no list, a column does not exist, or a package is missing.
        DataError: it cannot be read, is empty, or a line lacks a column, is empty there, or names an image again.
    """
    if path.suffix not in (*_DELIMITERS, _PARQUET):
        raise ConfigError(f"{path}: the ending says what a list is; allowed are {', '.join((*_DELIMITERS, _PARQUET))}")
    rows = _parquet_rows(path, columns) if path.suffix == _PARQUET else _text_rows(path, columns)
    entries: list[Entry] = []
    seen: dict[str, str] = {}
    for place, cells, row in rows:
        if not all(cells):
            raise DataError(f"{path}: {place} is {row}; an image and a label are needed")
        if cells[0] in seen:
            raise DataError(f"{path}: {place} names {cells[0]!r} again, after {seen[cells[0]]}; an image has one label")
        seen[cells[0]] = place
        entries.append(Entry(place, cells[0], cells[1]))
    if not entries:
        raise DataError(f"{path} names no image")
    return entries


def _text_rows(path: Path, columns: Sequence[str] | None) -> Iterator[tuple[str, list[str], object]]:
    places = (0, 1)
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            rows = csv.reader(stream, delimiter=_DELIMITERS[path.suffix], strict=True)
            if columns is not None:
                found = [cell.strip() for cell in next(rows, [])]
                image, label = (_position(path, found, column, "its first line") for column in columns)
                places = (image, label)
            for row in rows:
                if row:
                    cells = [row[place].strip() if place < len(row) else "" for place in places]
                    yield f"line {rows.line_num}", cells, row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as a list: {error}") from None


def _parquet_rows(path: Path, columns: Sequence[str] | None) -> Iterator[tuple[str, list[str], object]]:
    """The rows, read piece by piece; only the two columns are read."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ConfigError(
            f"{path}: a Parquet list needs pyarrow ({error}); install it with: pip install 'megaclass[parquet]'"
        ) from None
    try:
        with ParquetFile(path) as file:
            found = list(file.schema_arrow.names)
            if columns is None:
                columns = found[:2]
            if len(columns) < 2:
                raise DataError(f"{path} has one column, {', '.join(found)}; an image and a label are needed")
            image, label = (found[_position(path, found, column, "it")] for column in columns)
            number = 0
            for batch in file.iter_batches(_ROWS_AT_A_TIME, columns=[image, label]):
                for name, value in zip(batch.column(image).to_pylist(), batch.column(label).to_pylist(), strict=True):
                    number += 1
                    place = f"row {number}"
                    if name is not None and not isinstance(name, str):
                        raise DataError(
                            f"{path}: {place} has an image of type {type(name).__name__} in column {image!r}; names of "
                            "files are needed: give --columns IMAGE LABEL"
                        )
                    yield place, [(name or "").strip(), _text(path, place, value)], [name, value]
    except (OSError, ArrowException) as error:
        raise DataError(f"{path} cannot be read as a list: {str(error).splitlines()[0]}") from None


def _text(path: Path, place: str, value: Any) -> str:
    """A label of any type as text; one that is missing is empty."""
    if value is None or value != value:  # not a number, as pandas writes what is missing
        return ""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, (bool, int, float, Decimal)):
        return str(value)
    if isinstance(value, (datetime, date, time)):
        return value.isoformat()
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8").strip()
        except UnicodeDecodeError:
            raise DataError(f"{path}: {place} has a label of bytes that are no UTF-8: {value[:20]!r}") from None
    raise DataError(
        f"{path}: {place} has a label of type {type(value).__name__}; text, numbers, dates and true or false can be "
        "labels"
    )


def _position(path: Path, found: list[str], column: str, where: str) -> int:
    if column not in found:
        raise ConfigError(f"{path} has no column {column!r}; {where} has {', '.join(found) or 'nothing'}")
    return found.index(column)
