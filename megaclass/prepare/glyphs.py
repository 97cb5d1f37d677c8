"""A data set of characters drawn by typefaces: many real classes on any machine, without a download.

A class is a character, its samples are the faces that draw it. In order: choose characters (`characters`); draw them in
every face; drop blanks and placeholders by their pixels; keep characters that enough faces draw; merge look-alikes
(`lookalikes`); drop pictures that two classes share and pictures a class holds twice; keep classes with enough
different pictures left.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Unpack

import numpy as np

from megaclass.errors import ConfigError, DataError
from megaclass.prepare.characters import TOO_FEW_FACES, CharacterSet, Reserve, reasons_against
from megaclass.prepare.digest import parts_sha256
from megaclass.prepare.encode import encode_array, one_by_one
from megaclass.prepare.faces import Face, Pen, find_faces
from megaclass.prepare.lookalikes import TOLERANCE, first_of_each, merge_characters, shared_between_classes
from megaclass.prepare.options import SplitOptions, unseen_tenth
from megaclass.prepare.plans import Samples, write_dataset
from megaclass.prepare.report import PreparationReport
from megaclass.prepare.writer import Progress, check_output


@dataclass(frozen=True)
class Glyphs:
    """Rasters with their class and face.

    Attributes:
        rasters: [num_samples, image_size, image_size] uint8, 0 no ink, 255 full.
        classes: [num_samples] int64, code point of the class.
        faces: [num_samples] int32.
        counts: what was dropped, by reason.
    """

    rasters: np.ndarray
    classes: np.ndarray
    faces: np.ndarray
    counts: dict[str, int]


def make_glyphs(
    out: Path,
    *,
    fonts: Sequence[Path] | None = None,
    image_size: int = 32,
    min_faces: int = 8,
    min_images: int = 2,
    tolerance: float = TOLERANCE,
    characters: CharacterSet = "all",
    reserve: Reserve | None = None,
    **options: Unpack[SplitOptions],
) -> PreparationReport:
    """Write a data set of the characters that the given fonts draw, dark on white.

    Args:
        out: folder of the data set.
        fonts: font files, or folders of them, as for `find_faces`; by default the DejaVu faces that come with
            matplotlib.
        image_size: side of the images in pixels.
        min_faces: faces that must draw a character for it to be a class.
        min_images: different pictures a class must have: faces that inherit a picture from another do not count.
        tolerance: characters whose pictures differ by no more than this share of their squared ink, in most faces, are
            one class; 0 merges equal pictures only.
        characters: `han` takes the unified ideographs alone.
        reserve: characters that appear nowhere in the data set.
        options: see `SplitOptions`; a tenth of the classes is kept unseen where they give no rule. Progress tells of
            the faces drawn first, then of samples written.

    Classes are named by their smallest code point, `U+00041`; groups are not given. Sources are the faces' names.

    Raises:
        ConfigError: an option or the output folder cannot be used.
        DataError: a font cannot be used, or nothing is left.

    Cost: image_size² bytes per face and character in memory; about ten seconds for the default on one core.
        Look-alikes take time with the square of the characters: half a minute in all for
        20,902 Han characters in three faces.
    """
    _check_numbers(image_size, min_faces, min_images, tolerance)
    check_output(out, options.get("overwrite", False))
    faces, passed_over = find_faces(fonts)
    progress = options.get("progress")
    glyphs = draw_glyphs(faces, image_size, min_faces, min_images, tolerance, progress, characters, reserve)
    if not len(glyphs.classes):
        raise DataError(
            f"no character is drawn in {min_faces} of the {len(faces)} faces with {min_images} different pictures; "
            "give more fonts, or smaller --min-faces and --min-images"
        )
    code_points, classes = np.unique(glyphs.classes, return_inverse=True)
    names = [f"U+{code:05X}" if code <= 0xFFFFF else f"U+{code:X}" for code in code_points.tolist()]
    rank = np.argsort(np.argsort(names, kind="stable"))
    names = sorted(names)
    report = write_dataset(
        out,
        Samples(
            names=names,
            groups=None,
            source_names=[face.name for face in faces],
            classes=rank[classes].astype(np.int64),
            sources=glyphs.faces,
            images=one_by_one(lambda number: encode_array(255 - glyphs.rasters[number])),
        ),
        unseen_tenth(names, options),
        name="glyphs",
        description=f"{len(names)} characters drawn by {len(faces)} typefaces",
        conditions={"inputs": parts_sha256([glyphs.rasters])},
        options=options,
    )
    pictures = {reason: count for reason, count in glyphs.counts.items() if reason.startswith("pictures ")}
    others = {reason: count for reason, count in glyphs.counts.items() if reason not in pictures}
    report = report.accounted(sum(len(face.code_points) for face in faces), pictures, others)
    return replace(report, warnings=report.warnings + passed_over)


def _check_numbers(image_size: int, min_faces: int, min_images: int, tolerance: float) -> None:
    if not 8 <= image_size <= 256:
        raise ConfigError(f"image-size is {image_size}; allowed for glyphs is 8 to 256 pixels")
    if min_faces < 1 or min_images < 1:
        raise ConfigError(f"min-faces is {min_faces} and min-images {min_images}; both must be at least 1")
    if not 0 <= tolerance < 1:
        raise ConfigError(f"tolerance is {tolerance}; allowed is 0 up to, not including, 1")


def draw_glyphs(
    faces: Sequence[Face],
    image_size: int,
    min_faces: int,
    min_images: int,
    tolerance: float = TOLERANCE,
    progress: Progress | None = None,
    characters: CharacterSet = "all",
    reserve: Reserve | None = None,
) -> Glyphs:
    """All pictures that remain of the faces' characters, sorted by class and face; see the module for the steps."""
    against = reasons_against([face.code_points for face in faces], min_faces, characters, reserve)
    code_points, face_numbers, rasters, reasons = _draw_all(faces, image_size, against, progress)
    kept = _is_frequent(code_points, min_faces)
    reasons[TOO_FEW_FACES] += int((~kept).sum())
    counts = {f"pictures {reason}": count for reason, count in sorted(reasons.items())}
    code_points, face_numbers, rasters = code_points[kept], face_numbers[kept], rasters[kept]
    names, numbers = np.unique(code_points, return_inverse=True)
    merged = merge_characters(rasters, numbers, face_numbers, len(names), tolerance)
    classes = merged[numbers]
    counts["characters merged into a look-alike"] = int((merged != np.arange(len(names))).sum())

    order = np.lexsort((numbers, face_numbers, classes))
    classes, face_numbers, rasters = classes[order], face_numbers[order], rasters[order]
    pairs = np.stack([classes, face_numbers], axis=1)
    kept = np.concatenate([[True], (pairs[1:] != pairs[:-1]).any(axis=1)])[: len(pairs)]
    counts["pictures of merged characters by the same face"] = int((~kept).sum())
    classes, face_numbers, rasters = classes[kept], face_numbers[kept], rasters[kept]

    shared = shared_between_classes(rasters, classes)
    counts["pictures that two classes share"] = int(shared.sum())
    classes, face_numbers, rasters = classes[~shared], face_numbers[~shared], rasters[~shared]
    kept = first_of_each(rasters, classes)
    counts["pictures a class already has from another face"] = int((~kept).sum())
    classes, face_numbers, rasters = classes[kept], face_numbers[kept], rasters[kept]
    kept = _is_frequent(classes, min_images)
    counts["pictures of classes with fewer than min-images"] = int((~kept).sum())
    counts["classes with fewer than min-images"] = len(np.unique(classes)) - len(np.unique(classes[kept]))
    return Glyphs(rasters[kept], names[classes[kept]], face_numbers[kept].astype(np.int32), counts)


def _draw_all(
    faces: Sequence[Face], image_size: int, against: Mapping[int, str], progress: Progress | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Counter[str]]:
    reasons: Counter[str] = Counter()
    code_points: list[int] = []
    face_numbers: list[int] = []
    pictures: list[np.ndarray] = []
    for number, face in enumerate(faces):
        pen = Pen(face, image_size)
        for code in sorted(face.code_points):
            if code in against:
                reasons[against[code]] += 1
                continue
            picture = pen.draw(chr(code))
            if isinstance(picture, str):
                reasons[picture] += 1
                continue
            code_points.append(code)
            face_numbers.append(number)
            pictures.append(picture)
        if progress is not None:
            progress(number + 1, len(faces))
    rasters = np.stack(pictures) if pictures else np.empty((0, image_size, image_size), dtype=np.uint8)
    return np.array(code_points, dtype=np.int64), np.array(face_numbers, dtype=np.int64), rasters, reasons


def _is_frequent(values: np.ndarray, least: int) -> np.ndarray:
    """Which entries hold a value that occurs at least `least` times: [n] bool."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return counts[inverse] >= least
