"""What a preparation did and what a verification found, for people and for programs.

Separate because every source of data sets returns the same report, and the command line prints both.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from megaclass.data.manifest import Manifest


@dataclass(frozen=True)
class PreparationReport:
    """What was written and what was left out on the way.

    Attributes:
        folder: the data set's folder.
        manifest: the content of its `dataset.json`.
        counts: what was dropped, merged or converted, by reason, e.g. `{"characters merged into a look-alike": 52}`;
            every source documents its own reasons.
        warnings: what the user should know though the data set is complete; one line each.
    """

    folder: Path
    manifest: Manifest
    counts: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

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
        lines += [f"  {reason}: {count:,}" for reason, count in self.counts.items() if count]
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
