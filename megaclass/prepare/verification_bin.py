"""Importing verification sets as `lfw.bin`: pairs of images with a fixed answer, which evaluation compares in order.

Such a file is the pickle of two lists: encoded images, and for each pair whether both images show the same. Images 2i
and 2i + 1 are pair i. It is read by `pickled`, which runs nothing of it. Every file becomes a split of its own, named
after it, with a file of pairs beside its shards. An image that stands in several pairs is stored once. Labels only tell
the images apart: who else is the same is not known.

Source: the files `lfw.bin`, `cfp_fp.bin`, `agedb_30.bin` of InsightFace's data sets, and issue 2142 of its repository
on making ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from megaclass.data.manifest import PAIR_DTYPE
from megaclass.errors import ConfigError, DataError
from megaclass.prepare.digest import parts_sha256, state_of
from megaclass.prepare.encode import ImageMode
from megaclass.prepare.options import WriteOptions
from megaclass.prepare.pickled import PickledArray, read_values
from megaclass.prepare.plans import write_plans
from megaclass.prepare.report import PreparationReport
from megaclass.prepare.storing import Storing
from megaclass.prepare.writer import SPLIT_NAME, SplitPlan, check_output


@dataclass(frozen=True)
class PairFile:
    """What a file of pairs holds.

    Attributes:
        path: the file.
        images: each different image file, in order of appearance.
        first: [len(images)] int64, where in the file each stands first.
        pairs: [num_pairs] of `PAIR_DTYPE`; left and right are places in `images`.
    """

    path: Path
    images: list[bytes]
    first: np.ndarray
    pairs: np.ndarray


def read_pairs(path: Path) -> PairFile:
    """The images and pairs of a file as `lfw.bin`.

    Raises:
        DataError: it is no such file, or holds more than data; see `read_values`.

    Cost: the file in memory, and once more its images.
    """
    values = read_values(path)
    if not isinstance(values, (list, tuple)) or len(values) != 2:
        raise _other(path, f"it holds {_described(values)}")
    images, answers = values
    if isinstance(answers, PickledArray) and answers.content is not None:
        answers = list(answers.content)
    for what, found in (("images", images), ("answers", answers)):
        if not isinstance(found, (list, tuple)):
            raise _other(path, f"in place of the {what} stands {_described(found)}")
    if len(images) != 2 * len(answers) or not images:
        raise _other(path, f"it has {len(images)} images for {len(answers)} pairs; twice as many are needed")
    number_of: dict[bytes, int] = {}
    first: list[int] = []
    numbers: list[int] = []
    for place, image in enumerate(images):
        content = image.content if isinstance(image, PickledArray) else image
        if not isinstance(content, bytes):
            raise _other(path, f"image {place} is {_described(image)} and not bytes")
        if content not in number_of:
            number_of[content] = len(first)
            first.append(place)
        numbers.append(number_of[content])
    pairs = np.empty(len(answers), dtype=PAIR_DTYPE)
    pairs["left"], pairs["right"] = numbers[::2], numbers[1::2]
    for place, answer in enumerate(answers):
        if not isinstance(answer, int) or answer not in (0, 1):
            raise _other(path, f"the answer to pair {place} is {answer!r:.40}; it must be true or false")
        pairs["is_same"][place] = answer
    return PairFile(path, list(number_of), np.array(first, dtype=np.int64), pairs)


def _other(path: Path, why: str) -> DataError:
    return DataError(
        f"{path} is no verification set as lfw.bin: {why}; a list of images and a list of true or false for each two "
        "of them are needed"
    )


def _described(value: Any) -> str:
    size = f" of {len(value)}" if isinstance(value, (list, tuple, bytes, str)) else ""
    return f"a value of type {type(value).__name__}{size}"


def split_names(paths: Sequence[Path]) -> list[str]:
    """The names of the splits that files become: their own, without the ending.

    Raises:
        ConfigError: a name is not one that a split can have, or two files have the same.
    """
    names = [path.stem for path in paths]
    for path, name in zip(paths, names, strict=True):
        if not SPLIT_NAME.fullmatch(name):
            raise ConfigError(
                f"{path}: its name becomes the split's and may hold letters, digits, - and _ alone; rename it"
            )
        if names.count(name) > 1:
            raise ConfigError(f"{path}: two files are called {name}, and a split is named after its file; rename one")
    return names


def import_pairs(
    paths: Sequence[Path],
    out: Path,
    *,
    image_size: int | None = None,
    image_mode: ImageMode | None = None,
    jobs: int = 1,
    **options: Unpack[WriteOptions],
) -> PreparationReport:
    """Write a data set with one split for each file of pairs; an evaluation of a split compares its pairs.

    Args:
        paths: files as `lfw.bin`; each names its split.
        out: folder of the data set.
        image_size: side of the stored images in pixels; by default the images as they are.
        image_mode: "L" or "RGB" for all images; by default grey stays grey.
        jobs: processes that decode and encode.
        options: see `WriteOptions`.

    Counts of the report: images that stand in several pairs and are stored once.

    Raises:
        ConfigError: an option, a name or the output folder cannot be used.
        DataError: a file cannot be used, or an image in it: without it the pairs would be others.

    Cost: memory for all files.
    """
    storing = Storing(
        image_size, image_mode, "jpg", jobs=jobs, advice="without it the pairs would be others: get the file again"
    )
    check_output(out, options.get("overwrite", False))
    splits = split_names(paths)
    files = [read_pairs(path) for path in paths]
    report = write_plans(
        out,
        {split: _plan(file, storing) for split, file in zip(splits, files, strict=True)},
        name=" ".join(splits),
        description=f"verification pairs from {', '.join(path.name for path in paths)}",
        conditions={**storing.conditions, "inputs": parts_sha256(state_of(path) for path in paths)},
        options=options,
    )
    num_read = sum(2 * len(file.pairs) for file in files)
    return report.accounted(num_read, {"images that stand in several pairs, stored once": num_read - report.num_read})


def _plan(file: PairFile, storing: Storing) -> SplitPlan:
    width = len(str(2 * len(file.pairs) - 1))
    return SplitPlan(
        names=[f"{place:0{width}d}" for place in file.first.tolist()],
        groups=None,
        source_names=[],
        labels=np.arange(len(file.images), dtype=np.int64),
        sources=np.full(len(file.images), -1, dtype=np.int32),
        images=storing.images(
            bytes, file.images.__getitem__, lambda number: f"{file.path}: image {file.first[number]}"
        ),
        pairs=file.pairs,
    )
