"""Importing images by a list of file names and labels."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

import numpy as np

from megaclass.errors import ConfigError, DataError
from megaclass.prepare.digest import parts_sha256
from megaclass.prepare.files import ImageFiles, open_root
from megaclass.prepare.options import ImportOptions, storing_of
from megaclass.prepare.plans import Samples, write_dataset
from megaclass.prepare.report import PreparationReport
from megaclass.prepare.split import choose_unseen
from megaclass.prepare.writer import check_output

_DELIMITERS = {".csv": ",", ".tsv": "\t", ".txt": "\t"}


@dataclass(frozen=True)
class Entry:
    """One line of a list: where it stands, the image's name and its label."""

    line: int
    name: str
    label: str


def read_list(path: Path, columns: Sequence[str] | None = None) -> list[Entry]:
    """The entries of a list, in its order.

    Args:
        path: `.csv` (commas), `.tsv` or `.txt` (tabs), UTF-8, quoted as spreadsheets do.
        columns: names of the columns of image and label in the first line; None: the list has no such line, and the
            first two columns are meant.

    Raises:
        ConfigError: the ending is of no list, or a column does not exist.
        DataError: it cannot be read, is empty, or a line lacks a column, is empty there, or names an image again.
    """
    if path.suffix not in _DELIMITERS:
        raise ConfigError(f"{path}: the ending says what a list is; allowed are {', '.join(_DELIMITERS)}")
    entries: list[Entry] = []
    seen: dict[str, int] = {}
    places = (0, 1)
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            rows = csv.reader(stream, delimiter=_DELIMITERS[path.suffix], strict=True)
            if columns is not None:
                places = _places(path, next(rows, []), columns)
            for row in rows:
                if not row:
                    continue
                cells = [row[place].strip() if place < len(row) else "" for place in places]
                if not all(cells):
                    raise DataError(f"{path}: line {rows.line_num} is {row}; an image and a label are needed")
                if cells[0] in seen:
                    raise DataError(
                        f"{path}: line {rows.line_num} names {cells[0]!r} again, after line {seen[cells[0]]}; an image "
                        "has one label"
                    )
                seen[cells[0]] = rows.line_num
                entries.append(Entry(rows.line_num, cells[0], cells[1]))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as a list: {error}") from None
    if not entries:
        raise DataError(f"{path} names no image")
    return entries


def _places(path: Path, header: list[str], columns: Sequence[str]) -> tuple[int, int]:
    found = [cell.strip() for cell in header]
    for column in columns:
        if column not in found:
            raise ConfigError(f"{path} has no column {column!r}; its first line has {', '.join(found) or 'nothing'}")
    image, label = (found.index(column) for column in columns)
    return image, label


def import_list(
    path: Path,
    root: Path,
    out: Path,
    *,
    columns: Sequence[str] | None = None,
    **options: Unpack[ImportOptions],
) -> PreparationReport:
    """Write a data set from the images that a list names, with the labels it gives them.

    Labels may be anything; they become the names of the classes. Whole numbers get zeros in front, so that the classes
    stand in their order.

    Args:
        path: the list; its name is that of the data set where none is given.
        root: the folder or .zip that the names are relative to.
        out: folder of the data set.
        columns: see `read_list`.
        options: see `ImportOptions`.

    Counts of the report: images left out as unreadable, images of the root that the list does not name.

    Raises:
        ConfigError: an option or the output folder cannot be used.
        DataError: the list, the root or an image cannot be used, or an image of the list is not there.
    """
    storing = storing_of(options, "png")
    check_output(out, options.get("overwrite", False))
    entries = read_list(path, columns)
    names, classes = _classes([entry.label for entry in entries])
    with open_root(root) as files:
        numbers = _numbers(path, entries, files)
        images = storing.images(
            files.reader,
            lambda number: files.names[numbers[number]],
            lambda number: f"{files.root}: image {entries[number].name} (line {entries[number].line} of {path})",
        )
        report = write_dataset(
            out,
            Samples(names, None, [], classes, np.full(len(classes), -1, dtype=np.int32), images),
            choose_unseen(
                names,
                unseen_fraction=options.get("unseen_fraction"),
                unseen_classes=options.get("unseen_classes"),
            ),
            name=path.stem,
            description=f"{len(names)} classes from a list of images",
            conditions={
                **storing.conditions,
                "inputs": files.state(),
                "list": parts_sha256(entry.name for entry in entries),
            },
            options=options,
            may_leave_out=storing.on_bad == "skip",
        )
        unnamed = len(files.names) - len(entries)
    return report.accounted(
        len(entries),
        {"images left out as unreadable": len(report.all_left_out)},
        {"images that the list does not name": unnamed},
    )


def _classes(labels: list[str]) -> tuple[list[str], np.ndarray]:
    """Names of the classes, sorted, and the class of each label."""
    if all(label.isascii() and label.isdecimal() for label in labels):
        width = max(len(str(int(label))) for label in labels)
        labels = [f"{int(label):0{width}d}" for label in labels]
    names = sorted(set(labels))
    number_of = {label: number for number, label in enumerate(names)}
    return names, np.array([number_of[label] for label in labels], dtype=np.int64)


def _numbers(path: Path, entries: list[Entry], files: ImageFiles) -> list[int]:
    """Where each image of the list stands among the files."""
    number_of = {file_name: number for number, file_name in enumerate(files.names)}
    missing = [entry for entry in entries if entry.name not in number_of]
    if missing:
        raise DataError(
            f"{path}: {len(missing)} of {len(entries)} images are not in {files.root}, the first is "
            f"{missing[0].name!r} on line {missing[0].line}; names are relative to that folder, with / between the "
            "parts: give another --root, or correct the list (--columns IMAGE LABEL where its first line has names)"
        )
    return [number_of[entry.name] for entry in entries]
