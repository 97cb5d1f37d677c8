"""What a preparation did and what a verification found, for people and for programs.

Separate because every source of data sets returns the same report, and the command line prints both.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

import numpy as np

from megaclass.data.manifest import Manifest


@dataclass(frozen=True)
class PreparationReport:
    """What was written and what was left out on the way.

    Attributes:
        folder: the data set's folder.
        manifest: the content of its `dataset.json`.
        counts: what was dropped, merged or converted, by reason, e.g. `{"characters merged into a look-alike": 52}`;
            every source documents its own reasons.
        num_read: samples that the source has; each is stored, or left out and counted under its reason.
        num_continued: shards that an interrupted run had completed and this one kept.
        left_out: by split, the numbers that samples which were left out have in the source, [n] int64.
        warnings: what the user should know though the data set is complete; one line each.
    """

    folder: Path
    manifest: Manifest
    counts: dict[str, int] = field(default_factory=dict)
    num_read: int = 0
    num_continued: int = 0
    left_out: dict[str, np.ndarray] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def num_stored(self) -> int:
        """Samples in the data set, as its indexes on the disk were found to hold."""
        return sum(split.num_samples for split in self.manifest.splits.values())

    @property
    def all_left_out(self) -> list[int]:
        """The numbers of the samples that were left out, of all splits, sorted."""
        return sorted(number for numbers in self.left_out.values() for number in numbers.tolist())

    def accounted(self, num_read: int, left_out: dict[str, int], told: dict[str, int] | None = None) -> Self:
        """The report with its counts, which must add up.

        Args:
            num_read: what the source has, counted there.
            left_out: how many of these were not stored, by reason; no reason twice.
            told: other counts for the user.
        """
        num_gone = sum(left_out.values())
        assert num_read == self.num_stored + num_gone, (num_read, self.num_stored, left_out)
        return replace(self, num_read=num_read, counts={**left_out, **(told or {})})

    def as_dict(self) -> dict[str, object]:
        """The report as plain JSON values."""
        splits = {
            name: {"num_classes": split.num_classes, "num_samples": split.num_samples, "num_shards": len(split.shards)}
            for name, split in self.manifest.splits.items()
        }
        return {
            "folder": str(self.folder),
            "name": self.manifest.name,
            "image_mode": self.manifest.image_mode,
            "splits": splits,
            "num_read": self.num_read,
            "num_stored": self.num_stored,
            "num_continued_shards": self.num_continued,
            "counts": dict(self.counts),
            "warnings": list(self.warnings),
        }

    def text(self) -> str:
        """The report as lines for people, without a final newline."""
        lines = [f"data set {self.manifest.name!r} written to {self.folder} (images {self.manifest.image_mode})"]
        for name, split in self.manifest.splits.items():
            lines.append(
                f"  {name}: {split.num_classes:,} classes, {split.num_samples:,} samples, "
                f"{len(split.sources):,} sources, {len(split.shards):,} shards"
            )
        if self.num_continued:
            lines.append(f"  continued: {self.num_continued:,} shards were complete")
        lines += [f"  {reason}: {count:,}" for reason, count in self.counts.items() if count]
        num_shards = sum(len(split.shards) for split in self.manifest.splits.values())
        lines.append(
            f"  counted: {self.num_read:,} read, {self.num_stored:,} stored, {self.num_read - self.num_stored:,} left "
            f"out; the indexes of {num_shards:,} shards hold {self.num_stored:,}"
        )
        lines += [f"  warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)


@dataclass(frozen=True)
class VerificationReport:
    """What a verification found.

    Attributes:
        folder: the data set.
        faults: one line each; empty if the data set is sound.
        warnings: what is allowed but perhaps not meant, such as classes without samples.
        splits: per split `{"num_classes", "num_samples", "num_shards", "num_classes_without_samples"}`, as found in the
            shards and not as the manifest says.
    """

    folder: Path
    faults: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    splits: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether there is no fault."""
        return not self.faults

    def as_dict(self) -> dict[str, object]:
        """The report as plain JSON values."""
        return {
            "folder": str(self.folder),
            "ok": self.ok,
            "faults": list(self.faults),
            "warnings": list(self.warnings),
            "splits": {name: dict(counts) for name, counts in self.splits.items()},
        }

    def text(self) -> str:
        """The report as lines for people, without a final newline."""
        lines = [f"{self.folder}: {'sound' if self.ok else f'{len(self.faults)} faults'}"]
        for name, counts in self.splits.items():
            lines.append(
                f"  {name}: {counts['num_classes']:,} classes, {counts['num_samples']:,} samples, "
                f"{counts['num_shards']:,} shards"
            )
        lines += [f"  warning: {warning}" for warning in self.warnings]
        lines += [f"  fault: {fault}" for fault in self.faults]
        return "\n".join(lines)
