"""Copying a data set: into shards of another size, or some of its classes and samples.

Samples keep their order, so a data set in other shards has the same sample ids, and a run on it sees the same batches.
"""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

import numpy as np

from megaclass.data.manifest import MANIFEST_NAME, load_class_names, load_manifest, load_pairs
from megaclass.data.samples import StoredSamples
from megaclass.errors import ConfigError, DataError
from megaclass.prepare.digest import file_sha256
from megaclass.prepare.encode import EncodedImage, Images, UnreadableImage, one_by_one, store
from megaclass.prepare.options import WriteOptions
from megaclass.prepare.plans import write_plans
from megaclass.prepare.report import PreparationReport
from megaclass.prepare.writer import SplitPlan, check_output, writing_order


def copy_dataset(
    folder: Path,
    out: Path,
    *,
    num_classes: int | None = None,
    samples_per_class: int | None = None,
    **options: Unpack[WriteOptions],
) -> PreparationReport:
    """Write the data set in `folder` anew; of the split `train` all of it or a part, of other splits all.

    Args:
        folder: a data set.
        out: folder of the copy.
        num_classes: classes of `train`; the same ones that `dataset.num_classes` trains on.
        samples_per_class: the first so many samples of each class of `train`.
        options: see `WriteOptions`.

    Raises:
        ConfigError: an option or the output folder cannot be used, or it is `folder` itself.
        DataError: the data set or a sample in it cannot be used; every image is decoded on the way.
    """
    if samples_per_class is not None and samples_per_class < 1:
        raise ConfigError(f"samples-per-class is {samples_per_class}; it must be at least 1")
    manifest = load_manifest(folder)
    if Path(out).resolve() == Path(folder).resolve():
        raise ConfigError(f"--out {out} is the data set itself; give another folder")
    if "train" not in manifest.splits and (num_classes or samples_per_class):
        raise ConfigError(f"data set {folder} has no split 'train' to take a part of")
    check_output(out, options.get("overwrite", False))
    opened: list[StoredSamples] = []
    plans: dict[str, SplitPlan] = {}
    try:
        for split in manifest.splits:
            is_train = split == "train"
            samples = StoredSamples(
                folder, split, image_size=1, channels=1, num_classes=num_classes if is_train else None
            )
            opened.append(samples)
            plans[split] = _plan(folder, split, samples, samples_per_class if is_train else None)
        report = write_plans(
            out,
            plans,
            name=manifest.name,
            description=manifest.description,
            conditions={"inputs": file_sha256(Path(folder) / MANIFEST_NAME)},
            options=options,
        )
    finally:
        for samples in opened:
            samples.close()
    return report.accounted(report.num_read, {})


def _plan(folder: Path, split: str, samples: StoredSamples, samples_per_class: int | None) -> SplitPlan:
    manifest = load_manifest(folder)
    names = load_class_names(folder, manifest.splits[split])
    kept = np.arange(samples.num_samples)
    if samples_per_class is not None:
        kept = kept[_place_in_class(samples.labels) < samples_per_class]
    pairs = load_pairs(folder, manifest.splits[split])
    if pairs is not None and len(kept) < manifest.splits[split].num_samples:
        raise ConfigError(f"split {split!r} of {folder} has given pairs, of which no part can be taken; copy it whole")
    # The writer takes samples in an order of its own; seen through its inverse, that is the order they have.
    chosen = np.empty_like(kept)
    order = writing_order(len(kept))
    chosen[order] = kept
    if pairs is not None:
        pairs["left"], pairs["right"] = order[pairs["left"]], order[pairs["right"]]
    return SplitPlan(
        names=[names.names[number] for number in samples.classes.tolist()],
        groups=None if names.groups is None else [names.groups[number] for number in samples.classes.tolist()],
        source_names=manifest.splits[split].sources,
        labels=samples.labels[chosen],
        sources=samples.sources[chosen],
        images=_images(samples, chosen),
        pairs=pairs,
    )


def _place_in_class(labels: np.ndarray) -> np.ndarray:
    """How many samples of its class come before each sample, [num_samples]."""
    order = np.argsort(labels, kind="stable")
    ordered = labels[order]
    first = np.searchsorted(ordered, ordered)
    places = np.empty_like(order)
    places[order] = np.arange(len(labels)) - first
    return places


def _images(samples: StoredSamples, chosen: np.ndarray) -> Images:
    def load(number: int) -> EncodedImage:
        members, where = samples.stored(int(chosen[number]))
        try:
            return store(members.image, None, None, "png")
        except UnreadableImage as error:
            raise DataError(f"{where}: the image cannot be read: {error}; make the data set again") from None

    return one_by_one(load)
