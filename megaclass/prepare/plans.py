"""From a list of samples to the plans of the splits: the step every source shares.

Separate from `split` (which classes are unseen, pure names) and from `writer` (bytes on disk): here samples get their
labels and follow their class into its split.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megaclass.errors import DataError
from megaclass.prepare.encode import Images
from megaclass.prepare.options import WriteOptions
from megaclass.prepare.report import PreparationReport
from megaclass.prepare.unfinished import Conditions
from megaclass.prepare.writer import SAMPLES_PER_SHARD, DatasetWriter, SplitPlan, shifted


@dataclass(frozen=True)
class Samples:
    """All samples of a data set to be, before they are split.

    Attributes:
        names: class names, sorted and all different.
        groups: group of each class, or None.
        source_names: who or what made samples.
        classes: [num_samples] int64, positions in `names`.
        sources: [num_samples] int32, positions in `source_names`, -1 if unknown.
        images: gives samples encoded, or None for one to be left out.
    """

    names: Sequence[str]
    groups: Sequence[str] | None
    source_names: Sequence[str]
    classes: np.ndarray
    sources: np.ndarray
    images: Images


def plan_splits(samples: Samples, unseen: np.ndarray) -> dict[str, SplitPlan]:
    """The plans of `train` and `unseen`; a split without classes is left out. `unseen` is [num_classes] bool."""
    assert list(samples.names) == sorted(set(samples.names))
    plans = {}
    for split, members in (("train", ~unseen), ("unseen", unseen)):
        kept = np.flatnonzero(members).tolist()
        if not kept:
            continue
        label_of = np.full(len(samples.names), -1, dtype=np.int64)
        label_of[kept] = np.arange(len(kept))
        chosen = np.flatnonzero(members[samples.classes])
        plans[split] = SplitPlan(
            names=[samples.names[number] for number in kept],
            groups=None if samples.groups is None else [samples.groups[number] for number in kept],
            source_names=samples.source_names,
            labels=label_of[samples.classes[chosen]],
            sources=samples.sources[chosen].astype(np.int32),
            images=_of_split(samples.images, chosen),
        )
    return plans


def _of_split(images: Images, chosen: np.ndarray) -> Images:
    return lambda numbers: images(chosen[numbers])


def write_dataset(
    folder: Path,
    samples: Samples,
    unseen: np.ndarray,
    *,
    name: str,
    description: str,
    conditions: Conditions | None,
    options: WriteOptions,
    may_leave_out: bool = False,
) -> PreparationReport:
    """Split, write, count and finish a data set; the report has no counts of the source's own yet.

    Args:
        folder: of the data set.
        samples: all of them.
        unseen: [num_classes] bool.
        name: of the data set where the options give none.
        description: of the data set.
        conditions: see `DatasetWriter`; the plans are added here.
        options: of them those that writing needs.
        may_leave_out: whether `samples.images` may leave some out.

    Raises:
        ConfigError: the folder cannot be written to.
        DataError: no sample at all was left to write.
    """
    report = write_plans(
        folder,
        plan_splits(samples, unseen),
        name=name,
        description=description,
        conditions=conditions,
        options=options,
        may_leave_out=may_leave_out,
    )
    of_split = {split: np.flatnonzero(unseen[samples.classes] == (split == "unseen")) for split in report.left_out}
    return replace(report, left_out={split: of_split[split][left] for split, left in report.left_out.items()})


def write_plans(
    folder: Path,
    plans: Mapping[str, SplitPlan],
    *,
    name: str,
    description: str,
    conditions: Conditions | None,
    options: WriteOptions,
    may_leave_out: bool = False,
) -> PreparationReport:
    """Write, count and finish a data set of these splits; see `write_dataset`."""
    total, done = sum(len(plan.labels) for plan in plans.values()), 0
    warnings = []
    if conditions is not None:
        conditions = {**conditions, **{f"plan_of_{split}": plan.digest() for split, plan in plans.items()}}
    with DatasetWriter(
        folder,
        options.get("name") or name,
        description,
        options.get("samples_per_shard", SAMPLES_PER_SHARD),
        options.get("overwrite", False),
        conditions=conditions,
        may_leave_out=may_leave_out,
    ) as writer:
        for split, plan in plans.items():
            info = writer.write_split(split, plan, shifted(options.get("progress"), done, total))
            done += len(plan.labels)
            if not info.num_samples:
                warnings.append(f"split {split!r} has no samples")
        if len(warnings) == len(plans):
            raise DataError(f"no sample was left to write to {folder}; {folder} stays unfinished")
        manifest = writer.finish()
    return PreparationReport(
        folder=Path(folder),
        manifest=manifest,
        num_read=total,
        num_continued=writer.num_continued,
        left_out=writer.left_out,
        warnings=writer.warnings + warnings,
    )
