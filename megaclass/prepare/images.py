"""Importing images: a folder or zip with one folder per class.

The folder names down to `class_depth` make the class, the levels above the last its group: with depth 2,
`Greek/character01/0394_03.png` is a sample of class "Greek/character01" in group "Greek". Folders deeper than that only
sort files. A folder around everything (as zips often have) is taken off first.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Unpack

import numpy as np

from megaclass.errors import ConfigError, DataError
from megaclass.prepare.files import ImageFiles, open_root
from megaclass.prepare.options import ImportOptions, storing_of
from megaclass.prepare.plans import Samples, write_dataset
from megaclass.prepare.report import PreparationReport
from megaclass.prepare.split import choose_unseen
from megaclass.prepare.turns import as_they_are, with_quarter_turns
from megaclass.prepare.writer import check_output

_UNREADABLE = "images left out as unreadable"


def import_images(
    root: Path,
    out: Path,
    *,
    class_depth: int = 1,
    source_pattern: str | None = None,
    quarter_turns: bool = False,
    unseen_groups: str | list[str] | None = None,
    **options: Unpack[ImportOptions],
) -> PreparationReport:
    """Write a data set from a folder or zip of images, one folder per class.

    Args:
        root: the folder or .zip; its name is that of the data set where none is given.
        out: folder of the data set.
        class_depth: number of folder levels that make the class name.
        source_pattern: regular expression with one group, searched in the file name; the group is the sample's source
            (who or what made it), e.g. `_(\\d+)\\.png$`.
        quarter_turns: add each class that is trained on, turned by 90, 180 and 270 degrees, as three more classes.
        unseen_groups: "last:5" for the last five groups in sorted order, or group names separated by commas.
        options: see `ImportOptions`.

    Counts of the report: images left out as unreadable, files that are no images, samples without a source.

    Raises:
        ConfigError: an option or the output folder cannot be used.
        DataError: the root or an image in it cannot be used; the message names the file.

    Cost: images are read as they are written; memory is one name per file.
    """
    if class_depth < 1:
        raise ConfigError(f"class-depth is {class_depth}; it must be at least 1")
    storing = storing_of(options, "png")
    check_output(out, options.get("overwrite", False))
    with open_root(root) as files:
        layout = _layout(files, class_depth)
        source_names, sources = _sources(files, source_pattern)
        unseen = choose_unseen(
            layout.names,
            layout.groups,
            unseen_fraction=options.get("unseen_fraction"),
            unseen_classes=options.get("unseen_classes"),
            unseen_groups=unseen_groups,
        )
        made = as_they_are(layout.names, layout.classes)
        if quarter_turns:
            made = with_quarter_turns(layout.names, layout.classes, unseen)
        places = made.samples
        report = write_dataset(
            out,
            Samples(
                made.names,
                None if layout.groups is None else [layout.groups[number] for number in made.originals.tolist()],
                source_names,
                made.classes,
                sources[places],
                storing.images(
                    files.reader,
                    lambda number: files.names[places[number]],
                    lambda number: f"{files.root}: image {files.names[places[number]]}",
                    made.turns,
                ),
            ),
            unseen[made.originals],
            name=Path(root).stem,
            description=f"{len(made.names)} classes from a folder per class",
            conditions={**storing.conditions, "inputs": files.state(), "quarter_turns": quarter_turns},
            options=options,
            may_leave_out=storing.on_bad == "skip",
        )
    ignored = {
        "files ignored (no image by extension, or hidden)": files.num_ignored,
        "samples without a source": int((sources < 0).sum()) if source_pattern else 0,
        "empty folders ignored": len(files.empty_folders),
    }
    return _accounted(report, places, ignored, files, layout)


@dataclass(frozen=True)
class _Layout:
    names: list[str]
    groups: list[str] | None
    classes: np.ndarray


def _layout(files: ImageFiles, class_depth: int) -> _Layout:
    folders = [PurePosixPath(file_name).parent.parts for file_name in files.names]
    top = 0
    while all(len(parts) > class_depth + top for parts in folders) and len({parts[top] for parts in folders}) == 1:
        top += 1
    for file_name, parts in zip(files.names, folders, strict=True):
        if len(parts) - top < class_depth:
            raise DataError(
                f"{files.root}: {file_name} lies {len(parts) - top} folders deep but a class-depth of {class_depth} "
                "needs that many; move it into a class folder or change --class-depth"
            )
    keys = [parts[top : top + class_depth] for parts in folders]
    order = sorted({"/".join(key): key for key in keys}.items())
    number_of = {key: number for number, (_, key) in enumerate(order)}
    return _Layout(
        names=[class_name for class_name, _ in order],
        groups=["/".join(key[:-1]) for _, key in order] if class_depth > 1 else None,
        classes=np.array([number_of[key] for key in keys], dtype=np.int64),
    )


def _sources(files: ImageFiles, source_pattern: str | None) -> tuple[list[str], np.ndarray]:
    if source_pattern is None:
        return [], np.full(len(files.names), -1, dtype=np.int32)
    try:
        pattern = re.compile(source_pattern)
    except re.error as error:
        raise ConfigError(f"source-pattern {source_pattern!r} is no regular expression: {error}") from None
    if pattern.groups != 1:
        raise ConfigError(f"source-pattern {source_pattern!r} has {pattern.groups} groups; it must have exactly one")
    matches = [pattern.search(PurePosixPath(file_name).name) for file_name in files.names]
    found = [match.group(1) if match else None for match in matches]
    source_names = sorted({source for source in found if source is not None})
    if not source_names:
        raise ConfigError(
            f"source-pattern {source_pattern!r} fits no file name, e.g. not {PurePosixPath(files.names[0]).name!r}"
        )
    number_of = {source: number for number, source in enumerate(source_names)}
    return source_names, np.array([-1 if source is None else number_of[source] for source in found], dtype=np.int32)


def _accounted(
    report: PreparationReport, places: np.ndarray, ignored: dict[str, int], files: ImageFiles, layout: _Layout
) -> PreparationReport:
    """The report with its counts; `places` [n] are those of the samples among the files."""
    gone = report.all_left_out
    counted = report.accounted(len(places), {_UNREADABLE: len(gone)}, ignored)
    return replace(counted, warnings=counted.warnings + _warnings(files, layout, sorted(set(places[gone].tolist()))))


def _warnings(files: ImageFiles, layout: _Layout, skipped: list[int]) -> list[str]:
    warnings = []
    if files.empty_folders:
        warnings.append(f"folder {files.empty_folders[0]} holds no image and makes no class")
    if skipped:
        left = np.bincount(layout.classes, minlength=len(layout.names))
        left -= np.bincount(layout.classes[skipped], minlength=len(layout.names))
        empty = np.flatnonzero(left == 0)
        first = files.names[min(skipped)]
        warnings.append(f"{len(skipped)} unreadable images left out, the first is {first}")
        if len(empty):
            warnings.append(
                f"{len(empty)} classes have no readable image but keep their label, e.g. {layout.names[empty[0]]}"
            )
    return warnings
