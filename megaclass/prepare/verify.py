"""Checking a data set folder against its manifest, all faults at once.

Every file is read again as untrusted data; nothing here relies on what the readers check. Per split: class names, then
per shard the file's size and hash, its index, its members and each sample (label, index record, image).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megaclass.data.bad_samples import BadSample
from megaclass.data.decode import decode_image
from megaclass.data.manifest import (
    INDEX_DTYPE,
    Manifest,
    ShardInfo,
    SplitInfo,
    load_class_names,
    load_manifest,
    load_pairs,
)
from megaclass.data.records import read_records
from megaclass.errors import DataError
from megaclass.prepare.digest import file_sha256
from megaclass.prepare.encode import MAX_FILE_BYTES, UnreadableImage, decode
from megaclass.prepare.report import VerificationReport
from megaclass.prepare.tar_members import Member, walk
from megaclass.prepare.writer import Progress

# Of one kind of fault in one file so many are listed one by one, the rest as a number.
_LISTED = 20
_LABEL_BYTES = 8


class _Faults:
    """Collects faults of one file, at most `_LISTED` of a kind."""

    def __init__(self, report: VerificationReport, where: str) -> None:
        self._report = report
        self._where = where
        self._num_of_kind: Counter[str] = Counter()

    def add(self, kind: str, detail: str = "") -> None:
        self._num_of_kind[kind] += 1
        if self._num_of_kind[kind] <= _LISTED:
            self._report.faults.append(f"{self._where}: {kind}{': ' if detail else ''}{detail}")

    def close(self) -> None:
        for kind, count in self._num_of_kind.items():
            if count > _LISTED:
                self._report.faults.append(f"{self._where}: {kind}: {count - _LISTED} more like these")


def verify(folder: Path, progress: Progress | None = None) -> VerificationReport:
    """Everything that is wrong with the data set in `folder`; never raises for what the folder holds.

    `progress` is called with (samples checked, samples in all). Cost: every byte is read twice (hash and walk)
    and every image is decoded, about 5,000 small images a second on one core; memory is one image and one shard's list
    of members.
    """
    report = VerificationReport(Path(folder))
    try:
        manifest = load_manifest(Path(folder))
    except DataError as error:
        report.faults.append(str(error))
        return report
    _check_files(report, manifest)
    total = sum(split.num_samples for split in manifest.splits.values())
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        if progress is not None and done % 256 == 0:
            progress(min(done, total), total)

    for name, split in manifest.splits.items():
        _check_split(report, manifest, name, split, advance)
    if progress is not None:
        progress(total, total)
    return report


def _check_files(report: VerificationReport, manifest: Manifest) -> None:
    listed: Counter[str] = Counter()
    for split in manifest.splits.values():
        listed[split.classes] += 1
        if split.pairs is not None:
            listed[split.pairs] += 1
        for shard in split.shards:
            listed.update((shard.file, shard.index))
    for name, count in listed.items():
        if count > 1:
            report.faults.append(f"dataset.json: {name} is listed {count} times")
    for path in sorted(report.folder.iterdir()):
        if path.name.endswith((".tar", ".index.npy", ".classes.json", ".pairs.npy")) and path.name not in listed:
            report.faults.append(f"{path.name}: extra file that dataset.json does not list")


def _check_split(
    report: VerificationReport, manifest: Manifest, name: str, split: SplitInfo, advance: Callable[[], None]
) -> None:
    _check_class_names(report, split)
    _check_pairs(report, name, split)
    seen: Counter[int] = Counter()
    keys: set[str] = set()
    num_shards = 0
    for shard in split.shards:
        num_shards += _Checker(report, manifest, split, shard, seen, keys).run(advance)
    num_samples = sum(seen.values())
    if sum(shard.num_samples for shard in split.shards) != split.num_samples:
        report.faults.append(
            f"dataset.json: split {name} has {split.num_samples} samples but its shards add up to "
            f"{sum(shard.num_samples for shard in split.shards)}"
        )
    num_empty = split.num_classes - sum(0 <= label < split.num_classes for label in seen)
    if num_empty:
        first = next(label for label in range(split.num_classes) if label not in seen)
        report.warnings.append(f"split {name}: {num_empty} classes without samples, the first is {first}")
    report.splits[name] = {
        "num_classes": split.num_classes,
        "num_samples": num_samples,
        "num_shards": num_shards,
        "num_classes_without_samples": num_empty,
    }


def _check_class_names(report: VerificationReport, split: SplitInfo) -> None:
    path = report.folder / split.classes
    try:
        if not path.is_file():
            report.faults.append(f"{split.classes}: missing")
            return
        if file_sha256(path) != split.classes_sha256:
            report.faults.append(f"{split.classes}: SHA-256 differs from dataset.json")
        names = load_class_names(report.folder, split).names
        if len(set(names)) < len(names):
            report.faults.append(f"{split.classes}: {len(names) - len(set(names))} class names are there twice")
    except OSError as error:
        report.faults.append(f"{split.classes}: cannot be read: {error.strerror}")
    except DataError as error:
        report.faults.append(str(error))


def _check_pairs(report: VerificationReport, name: str, split: SplitInfo) -> None:
    if (split.pairs is None) != (split.pairs_sha256 is None):
        report.faults.append(f"dataset.json: split {name} has pairs without their SHA-256, or the other way round")
    if split.pairs is None:
        return
    try:
        load_pairs(report.folder, split)
        if file_sha256(report.folder / split.pairs) != split.pairs_sha256:
            report.faults.append(f"{split.pairs}: SHA-256 differs from dataset.json")
    except OSError as error:
        report.faults.append(f"{split.pairs}: cannot be read: {error.strerror}")
    except DataError as error:
        report.faults.append(str(error))


class _Checker:
    """Checks one shard with its index; counts labels in `seen` and keys of the split in `keys`."""

    def __init__(
        self,
        report: VerificationReport,
        manifest: Manifest,
        split: SplitInfo,
        shard: ShardInfo,
        seen: Counter[int],
        keys: set[str],
    ) -> None:
        self._folder = report.folder
        self._mode = manifest.image_mode
        self._split = split
        self._shard = shard
        self._seen = seen
        self._keys = keys
        self._faults = _Faults(report, shard.file)
        self._index_faults = _Faults(report, shard.index)

    def run(self, advance: Callable[[], None]) -> int:
        """1 if the shard's file could be read at all, else 0."""
        records = self._load_index()
        path = self._folder / self._shard.file
        num_found = 0
        try:
            if not path.is_file():
                self._faults.add("missing")
                return 0
            self._check_hash(path)
            with path.open("rb") as stream:
                for sample in self._samples(stream):
                    self._check_sample(stream, sample, records, num_found)
                    num_found += 1
                    advance()
            if num_found != self._shard.num_samples:
                self._faults.add(f"holds {num_found} samples but dataset.json says {self._shard.num_samples}")
            if records is not None and num_found != len(records):
                self._faults.add(f"holds {num_found} samples but its index lists {len(records)}")
        except OSError as error:
            self._faults.add(f"cannot be read: {error.strerror}")
        finally:
            self._faults.close()
            self._index_faults.close()
        return 1

    def _check_hash(self, path: Path) -> None:
        num_bytes = path.stat().st_size
        if num_bytes != self._shard.num_bytes:
            self._faults.add(f"has {num_bytes} bytes but dataset.json says {self._shard.num_bytes}")
        elif file_sha256(path) != self._shard.sha256:
            self._faults.add("SHA-256 differs from dataset.json")

    def _load_index(self) -> np.ndarray | None:
        path = self._folder / self._shard.index
        try:
            if not path.is_file():
                self._index_faults.add("missing")
                return None
            if file_sha256(path) != self._shard.index_sha256:
                self._index_faults.add("SHA-256 differs from dataset.json")
            records = read_records(path, INDEX_DTYPE)
        except OSError as error:
            self._index_faults.add(f"cannot be read: {error.strerror}")
            return None
        except DataError as error:
            self._index_faults.add(f"cannot be read: {error}")
            return None
        if len(records) != self._shard.num_samples:
            self._index_faults.add(f"lists {len(records)} samples but dataset.json says {self._shard.num_samples}")
        return records

    def _samples(self, stream: BinaryIO) -> list[tuple[str, list[Member]]]:
        """Members grouped by key, neighbours only: a key that comes back is a fault of its own."""
        samples: list[tuple[str, list[Member]]] = []
        for member in walk(stream, self._faults.add):
            key = member.name.partition(".")[0]
            if samples and samples[-1][0] == key:
                samples[-1][1].append(member)
            else:
                samples.append((key, [member]))
        return samples

    def _check_sample(
        self, stream: BinaryIO, sample: tuple[str, list[Member]], records: np.ndarray | None, number: int
    ) -> None:
        key, members = sample
        if key in self._keys:
            self._faults.add("duplicate key", f"{key}")
        self._keys.add(key)
        extensions = [member.name.partition(".")[2] for member in members]
        if len(extensions) != 2 or extensions[0] not in ("png", "jpg") or extensions[1] != "label":
            self._faults.add("sample is not KEY.png or KEY.jpg, then KEY.label", f"{key} has {', '.join(extensions)}")
        label = self._read_label(stream, key, members)
        if records is not None and number < len(records):
            self._check_record(key, members, records[number], label)
        for member, extension in zip(members, extensions, strict=True):
            if extension in ("png", "jpg"):
                self._check_image(stream, member, extension)

    def _read_label(self, stream: BinaryIO, key: str, members: list[Member]) -> int | None:
        member = next((member for member in members if member.name == f"{key}.label"), None)
        if member is None:
            self._faults.add("label missing", f"sample {key}")
            self._seen[-1] += 1
            return None
        if member.size != _LABEL_BYTES:
            self._faults.add(f"label is not {_LABEL_BYTES} bytes", f"sample {key} has {member.size}")
            self._seen[-1] += 1
            return None
        stream.seek(member.data_start)
        label = int.from_bytes(stream.read(_LABEL_BYTES), "little", signed=True)
        self._seen[label] += 1
        if not 0 <= label < self._split.num_classes:
            self._faults.add(f"label outside [0, {self._split.num_classes})", f"sample {key} has {label}")
        return label

    def _check_record(self, key: str, members: list[Member], record: np.void, label: int | None) -> None:
        start, end = members[0].start, members[-1].end
        offset, length, source, indexed = (int(record[name]) for name in ("offset", "length", "source", "label"))
        if (offset, offset + length) != (start, end):
            self._index_faults.add(
                "byte range is not where the sample is",
                f"sample {key} is at {start} to {end}, the index says {offset} to {offset + length}",
            )
        if label is not None and indexed != label:
            self._index_faults.add("label differs from the tar's", f"sample {key} has {label}, the index {indexed}")
        if not -1 <= source < len(self._split.sources):
            self._index_faults.add(
                f"source outside [-1, {len(self._split.sources)})", f"sample {key} has source {source}"
            )

    def _check_image(self, stream: BinaryIO, member: Member, extension: str) -> None:
        if member.size > MAX_FILE_BYTES:
            self._faults.add("image too large", f"{member.name} has {member.size:,} bytes")
            return
        stream.seek(member.data_start)
        data = stream.read(member.size)
        try:
            image = decode(data, ("PNG",) if extension == "png" else ("JPEG",))
        except UnreadableImage as error:
            self._faults.add("unreadable image", f"{member.name}: {error}")
            return
        try:
            # Stricter in some things: animation, and damage that one JPEG library passes over and another does not.
            decode_image(data, extension, image.width, 3 if self._mode == "RGB" else 1)
        except BadSample as error:
            self._faults.add("the readers refuse an image", f"{member.name}: {error.detail}")
            return
        if image.mode != self._mode and not (image.mode == "L" and self._mode == "RGB"):
            self._faults.add(f"image mode does not fit {self._mode}", f"{member.name} is {image.mode}")
