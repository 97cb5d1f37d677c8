"""Importing a RecordIO file of labelled images, as the face-recognition sets are handed round."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from megaclass.errors import DataError
from megaclass.prepare.encode import Encoding, ImageMode
from megaclass.prepare.plans import Samples, write_dataset
from megaclass.prepare.recordio import RecordFile
from megaclass.prepare.report import PreparationReport
from megaclass.prepare.split import choose_unseen
from megaclass.prepare.storing import Storing
from megaclass.prepare.writer import SAMPLES_PER_SHARD, Progress, check_output


def import_records(
    path: Path,
    out: Path,
    *,
    image_size: int | None = None,
    image_mode: ImageMode | None = None,
    encoding: Encoding = "jpg",
    on_bad: Literal["stop", "skip"] = "stop",
    unseen_fraction: float | None = None,
    unseen_classes: int | None = None,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    overwrite: bool = False,
    name: str | None = None,
    progress: Progress | None = None,
) -> PreparationReport:
    """Write a data set from a `.rec` file; what stands beside it (`.idx`, `property`) is checked against it.

    Classes are named by their number in the file, with zeros in front; numbers without an image make no class. Images
    are copied byte for byte unless a size or mode is asked for that they do not have.

    Args:
        path: the `.rec` file.
        out: folder of the data set.
        image_size: side of the stored images in pixels; by default the images as they are.
        image_mode: "L" or "RGB" for all images; by default grey stays grey.
        encoding: of images that must be encoded again: "png", or "jpg" of quality 95.
        on_bad: what an unreadable image does: "stop" names it and stops, "skip" leaves it out and counts it.
        unseen_fraction: share of classes, chosen by hash, kept unseen; by default none.
        unseen_classes: number of classes kept unseen, those of smallest hash.
        samples_per_shard: samples in one tar shard.
        overwrite: replace the data set in `out`.
        name: name of the data set; by default that of the file.
        progress: called with (samples done, samples in all).

    Counts of the report: images left out as unreadable, records without an image.

    Raises:
        ConfigError: an option or the output folder cannot be used.
        DataError: the file or what stands beside it cannot be used, or an image in it, with its place.

    Cost: the file is read twice, first its records alone; memory is sixteen bytes an image.
    """
    storing = Storing(image_size, image_mode, encoding, on_bad)
    check_output(out, overwrite)
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
        load = storing.loader(
            lambda number: file.image(int(layout.offsets[number])),
            lambda number: f"{path}: the image of class {layout.labels[number]} at byte {layout.offsets[number]:,}",
        )
        report = write_dataset(
            out,
            Samples(names, None, [], classes.astype(np.int64), np.full(len(classes), -1, dtype=np.int32), load),
            choose_unseen(names, unseen_fraction=unseen_fraction, unseen_classes=unseen_classes),
            name=name or Path(path).stem,
            description=f"{len(names)} classes from a RecordIO file",
            samples_per_shard=samples_per_shard,
            overwrite=overwrite,
            progress=progress,
        )
    counts = {"images left out as unreadable": len(storing.skipped), "records without an image": layout.num_others}
    warnings = list(report.warnings)
    if told is not None and told != len(names):
        warnings.append(f"the file property tells of {told:,} classes and {len(names):,} have images")
    return replace(report, counts=counts, warnings=warnings)
