"""Importing a RecordIO file of labelled images, as the face-recognition sets are handed round."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Unpack

import numpy as np

from megaclass.errors import DataError
from megaclass.prepare.digest import parts_sha256, state_of
from megaclass.prepare.options import ImportOptions, storing_of
from megaclass.prepare.plans import Samples, write_dataset
from megaclass.prepare.recordio import RecordFile
from megaclass.prepare.report import PreparationReport
from megaclass.prepare.split import choose_unseen
from megaclass.prepare.writer import check_output


def import_records(path: Path, out: Path, **options: Unpack[ImportOptions]) -> PreparationReport:
    """Write a data set from a `.rec` file; what stands beside it (`.idx`, `property`) is checked against it.

    Classes are named by their number in the file, with zeros in front; numbers without an image make no class. Images
    are copied byte for byte unless a size or mode is asked for that they do not have; then they become JPEG.

    Args:
        path: the `.rec` file; its name is that of the data set where none is given.
        out: folder of the data set.
        options: see `ImportOptions`.

    Counts of the report: images left out as unreadable, records without an image.

    Raises:
        ConfigError: an option or the output folder cannot be used.
        DataError: the file or what stands beside it cannot be used, or an image in it, with its place.

    Cost: the file is read twice, first its records alone; memory is sixteen bytes an image.
    """
    storing = storing_of(options, "jpg")
    check_output(out, options.get("overwrite", False))
    with RecordFile(path) as file:
        layout = file.layout()
        numbers, classes = np.unique(layout.labels, return_inverse=True)
        told = file.num_classes_told()
        if told is not None and numbers[-1] >= told:
            raise DataError(
                f"{path} has the label {numbers[-1]} and the file property beside it tells of {told} classes; they do "
                "not belong together: correct or remove property"
            )
        width = len(str(numbers[-1]))
        names = [f"{number:0{width}d}" for number in numbers.tolist()]
        images = storing.images(
            file.image,
            lambda number: int(layout.offsets[number]),
            lambda number: f"{path}: the image of class {layout.labels[number]} at byte {layout.offsets[number]:,}",
        )
        report = write_dataset(
            out,
            Samples(names, None, [], classes.astype(np.int64), np.full(len(classes), -1, dtype=np.int32), images),
            choose_unseen(
                names,
                unseen_fraction=options.get("unseen_fraction"),
                unseen_classes=options.get("unseen_classes"),
            ),
            name=Path(path).stem,
            description=f"{len(names)} classes from a RecordIO file",
            conditions={**storing.conditions, "inputs": parts_sha256([state_of(path), layout.offsets])},
            options=options,
            may_leave_out=storing.on_bad == "skip",
        )
    report = report.accounted(
        len(layout.offsets) + layout.num_others,
        {
            "images left out as unreadable": len(report.all_left_out),
            "records without an image": layout.num_others,
        },
    )
    if told is not None and told != len(names):
        warning = f"the file property tells of {told:,} classes and {len(names):,} have images"
        report = replace(report, warnings=[*report.warnings, warning])
    return report
