"""From a list of samples to the plans of the splits: the step every source shares.

Separate from `split` (which classes are unseen, pure names) and from `writer` (bytes on disk): here samples get their
labels and follow their class into its split.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megaclass.errors import DataError
from megaclass.prepare.encode import EncodedImage
from megaclass.prepare.report import PreparationReport
from megaclass.prepare.writer import DatasetWriter, Progress, SplitPlan, shifted


@dataclass(frozen=True)
class Samples:
    """All samples of a data set to be, before they are split.

    Attributes:
        names: class names, sorted and all different.
        groups: group of each class, or None.
        source_names: who or what made samples.
        classes: [num_samples] int64, positions in `names`.
        sources: [num_samples] int32, positions in `source_names`, -1 if unknown.
        load: gives sample i encoded, or None if it is to be left out.
    """

    names: Sequence[str]
    groups: Sequence[str] | None
    source_names: Sequence[str]
    classes: np.ndarray
    sources: np.ndarray
    load: Callable[[int], EncodedImage | None]


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
            load=_loader(samples.load, chosen),
        )
    return plans


def _loader(load: Callable[[int], EncodedImage | None], chosen: np.ndarray) -> Callable[[int], EncodedImage | None]:
    return lambda number: load(int(chosen[number]))


def write_dataset(
    folder: Path,
    samples: Samples,
    unseen: np.ndarray,
    *,
    name: str,
    description: str,
    samples_per_shard: int,
    overwrite: bool,
    progress: Progress | None,
) -> PreparationReport:
    """Split, write and finish a data set; the report has no counts yet. `progress` counts over all splits.

    Raises:
        ConfigError: the folder cannot be written to.
        DataError: no sample at all was left to write.
    """
    plans = plan_splits(samples, unseen)
    total = sum(len(plan.labels) for plan in plans.values())
    done_before = 0
    warnings = []
    with DatasetWriter(folder, name, description, samples_per_shard, overwrite) as writer:
        for split, plan in plans.items():
            info = writer.write_split(split, plan, shifted(progress, done_before, total))
            done_before += len(plan.labels)
            if not info.num_samples:
                warnings.append(f"split {split!r} has no samples")
        if len(warnings) == len(plans):
            raise DataError(f"no sample was left to write to {folder}; {folder} stays unfinished")
        manifest = writer.finish()
    return PreparationReport(folder=Path(folder), manifest=manifest, warnings=warnings)
