"""Importing images by a list of file names and labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

import numpy as np

from megaclass.errors import DataError
from megaclass.prepare.digest import parts_sha256
from megaclass.prepare.files import ImageFiles, open_root
from megaclass.prepare.lists import Entry, read_list
from megaclass.prepare.options import ImportOptions, storing_of
from megaclass.prepare.plans import Samples, write_dataset
from megaclass.prepare.report import PreparationReport
from megaclass.prepare.split import choose_unseen
from megaclass.prepare.writer import check_output


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
            lambda number: f"{files.root}: image {entries[number].name} ({entries[number].place} of {path})",
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
            f"{missing[0].name!r} on {missing[0].place}; names are relative to that folder, with / between the "
            "parts: give another --root, or correct the list (--columns IMAGE LABEL where its first line has names)"
        )
    return [number_of[entry.name] for entry in entries]
