"""`dataset.json`: what a data set holds, and the per-shard index of its samples.

A data set is a folder:

    dataset.json                      this manifest
    train-000000.tar, ...             tar shards; each sample is `KEY.png|jpg` followed by `KEY.label`
    train-000000.index.npy, ...       one record per sample of that shard (`INDEX_DTYPE`), in the shard's order
    train.classes.json                class names, and optionally the group (super-class) of each class

`KEY.label` is the class id as eight bytes, little-endian int64: of fixed width, so that DALI reads the same files. A
*split* is a set of shards with classes of its own, labelled from 0: `train` is trained on, `unseen` holds classes that
are never trained on. A sample's id is its position in the split: shards in manifest order, records in index order.

A split may have pairs that verification is to compare (`PAIR_DTYPE`), in `SPLIT.pairs.npy`. Its labels then only tell
its images apart; who is on them is known of the pairs alone.

The manifest is plain JSON, index and pairs are plain `.npy` without pickled objects: all are read as untrusted files.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megaclass.data.address import Address, Location
from megaclass.data.records import read_records
from megaclass.errors import DataError

FORMAT = 1
MANIFEST_NAME = "dataset.json"
# A plain name below the data set's folder: never a path, never `..`, and of a length that every file system knows.
FILE_NAME = r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,199}$"

# offset/length: the byte range in the tar that holds all members of the sample, headers included.
# source: who or what made the sample (typeface, drawer, camera): an index into the split's `sources`, -1 if unknown.
INDEX_DTYPE = np.dtype([("offset", "<i8"), ("length", "<i4"), ("source", "<i4"), ("label", "<i8")])


# left/right: sample ids of the split; is_same: 1 if both are of one class, else 0. The pairs are in the order of folds.
PAIR_DTYPE = np.dtype([("left", "<i8"), ("right", "<i8"), ("is_same", "u1")])


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ShardInfo(_Model):
    """One tar shard: its file, its index file, how many samples and bytes, and the SHA-256 of each file."""

    file: str = Field(pattern=FILE_NAME)
    index: str = Field(pattern=FILE_NAME)
    num_samples: int = Field(ge=0)
    num_bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    index_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class SplitInfo(_Model):
    """One split: class and sample counts, its shards, the names of its sources, and its pairs where it has any."""

    num_classes: int = Field(ge=0)
    num_samples: int = Field(ge=0)
    classes: str = Field(pattern=FILE_NAME)
    classes_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    sources: list[str] = []
    shards: list[ShardInfo]
    pairs: str | None = Field(None, pattern=FILE_NAME)
    pairs_sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")


class Manifest(_Model):
    """The content of `dataset.json`."""

    format: int
    name: str
    description: str = ""
    image_mode: str = Field(pattern=r"^(L|RGB)$")
    splits: dict[str, SplitInfo]


class ClassNames(_Model):
    """The content of `SPLIT.classes.json`: one name per class, and one group per class or none at all."""

    names: list[str]
    groups: list[str] | None = None


def load_manifest(folder: Path) -> Manifest:
    """Read and check `dataset.json` of the data set in `folder`.

    Raises:
        DataError: the folder or manifest is missing, is not valid, or is of a format this version does not read.
    """
    path = Path(folder) / MANIFEST_NAME
    if not Path(folder).is_dir():
        raise DataError(
            f"data set folder {folder} does not exist; make one with `megaclass data glyphs --out {folder}` "
            f"or `megaclass data images ROOT --out {folder}`"
        )
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise DataError(f"{path} is no file; make the data set again")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{path} is missing: {folder} is not a finished data set; make it with `megaclass data ... --out {folder}`"
        ) from None
    # ValueError: what is no UTF-8 or no JSON, and a number of more digits than Python reads.
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}; make the data set again") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise DataError(f"{path} has format {found!r:.80}; this version reads format {FORMAT}; make the data set again")
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DataError(
            f"{path} is not a valid manifest: {where}: {first['msg']} (value {first.get('input')!r:.80}); "
            "make the data set again"
        ) from None


def load_split(folder: Location, manifest: Manifest, split: str) -> SplitInfo:
    """The entry of one split.

    Raises:
        DataError: there is none, and which there are; its shards do not add up to it, or one is there twice; or its
            class names cannot be as many as its classes.
    """
    if split not in manifest.splits:
        raise DataError(f"data set {folder} has no split {split!r}; it has {', '.join(sorted(manifest.splits))}")
    info = manifest.splits[split]
    num_samples = sum(shard.num_samples for shard in info.shards)
    if num_samples != info.num_samples:
        raise DataError(
            f"split {split!r} of {folder} has {num_samples} samples in its shards but dataset.json says "
            f"{info.num_samples}; run `megaclass data verify {folder}`"
        )
    files = [name for shard in info.shards for name in (shard.file, shard.index)]
    if len(set(files)) < len(files):
        twice = next(name for place, name in enumerate(files) if name in files[:place])
        raise DataError(f"split {split!r} of {folder} lists {twice} twice; make the data set again")
    if not isinstance(folder, Address):  # behind an address the file is not here yet
        _check_num_classes(folder, split, info)
    return info


def _check_num_classes(folder: Path, split: str, info: SplitInfo) -> None:
    """Refuse a number of classes that the file of their names has no room for, before memory is taken for it.

    A name takes three bytes at least. Reading all names of millions of classes would take longer than it is worth.
    """
    path = Path(folder) / info.classes
    try:
        num_bytes = path.stat().st_size
    except OSError as error:
        raise DataError(f"class names file {path} cannot be read: {error.strerror}; make the data set again") from None
    if info.num_classes > num_bytes // 3:
        raise DataError(
            f"split {split!r} of {folder} has {info.num_classes} classes in dataset.json but {path.name} of "
            f"{num_bytes} bytes cannot name as many; run `megaclass data verify {folder}`"
        )


def load_index(folder: Path, split_name: str, split: SplitInfo) -> tuple[np.ndarray, np.ndarray]:
    """All index records of a split, with the number of the shard each lies in.

    Returns:
        records: [num_samples] of `INDEX_DTYPE`; shard_numbers: [num_samples] int32.

    Raises:
        DataError: an index file is missing or malformed, disagrees with the manifest in its count, or holds a label
            outside [0, num_classes) or a source outside [-1, len(sources)).

    Cost: 28 bytes of memory per sample, and while loading that of one shard more.
    """
    parts = []
    for shard in split.shards:
        path = Path(folder) / shard.index
        if not path.is_file():
            raise DataError(f"index file {path} is missing; make the data set again")
        try:
            records = read_records(path, INDEX_DTYPE)
        except (OSError, DataError) as error:
            raise DataError(f"index file {path} cannot be read: {error}; make the data set again") from None
        if len(records) != shard.num_samples:
            raise DataError(
                f"index file {path} lists {len(records)} samples but dataset.json says {shard.num_samples}; "
                f"run `megaclass data verify {folder}`"
            )
        _check_records(path, records, split, shard)
        parts.append(records)
    sizes = [len(part) for part in parts]
    if sum(sizes) != split.num_samples:
        raise DataError(
            f"split {split_name!r} of {folder} has {sum(sizes)} samples in its shards but dataset.json says "
            f"{split.num_samples}; run `megaclass data verify {folder}`"
        )
    records = np.empty(split.num_samples, INDEX_DTYPE)
    # Part by part, each freed at once: a concatenation would hold everything twice.
    for start, size in zip(np.cumsum(sizes) - sizes, sizes, strict=True):
        records[start : start + size] = parts.pop(0)
    return records, np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)


def _check_records(path: Path, records: np.ndarray, split: SplitInfo, shard: ShardInfo) -> None:
    bad = np.flatnonzero((records["label"] < 0) | (records["label"] >= split.num_classes))
    if len(bad):
        raise DataError(
            f"{path}: sample {bad[0]} has label {records['label'][bad[0]]}, allowed is [0, {split.num_classes}); "
            f"{len(bad)} such labels in this shard; fix the labels and make the data set again"
        )
    ends = records["offset"] + records["length"]
    bad = np.flatnonzero((records["offset"] < 0) | (records["length"] <= 0) | (ends > shard.num_bytes))
    if len(bad):
        raise DataError(
            f"{path}: sample {bad[0]} lies at bytes {records['offset'][bad[0]]} to {ends[bad[0]]}, outside "
            f"{shard.file} of {shard.num_bytes} bytes; make the data set again"
        )
    bad = np.flatnonzero((records["source"] < -1) | (records["source"] >= len(split.sources)))
    if len(bad):
        raise DataError(f"{path}: sample {bad[0]} has source {records['source'][bad[0]]}, not among {split.sources}")


def load_pairs(folder: Path, split: SplitInfo) -> np.ndarray | None:
    """The pairs of a split, [num_pairs] of `PAIR_DTYPE`; None if it has none.

    Raises:
        DataError: the file is missing, is not valid, or names a sample that the split does not have.
    """
    if split.pairs is None:
        return None
    path = Path(folder) / split.pairs
    if not path.is_file():
        raise DataError(f"file of pairs {path} is missing; make the data set again")
    try:
        pairs = read_records(path, PAIR_DTYPE)
    except (OSError, DataError) as error:
        raise DataError(f"file of pairs {path} cannot be read: {error}; make the data set again") from None
    ends = np.stack([pairs["left"], pairs["right"]])
    bad = np.flatnonzero(((ends < 0) | (ends >= split.num_samples)).any(axis=0) | (pairs["is_same"] > 1))
    if len(bad):
        raise DataError(
            f"{path}: pair {bad[0]} is {pairs[bad[0]]}; samples are in [0, {split.num_samples}) and is_same is 0 or 1; "
            f"{len(bad)} such pairs"
        )
    return pairs


def load_class_names(folder: Path, split: SplitInfo) -> ClassNames:
    """Class names and groups of a split, checked against its class count."""
    path = Path(folder) / split.classes
    try:
        names = ClassNames.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"class names file {path} is missing; make the data set again") from None
    except (OSError, ValidationError) as error:
        raise DataError(f"class names file {path} cannot be read: {str(error).splitlines()[0]}") from None
    for what, values in (("names", names.names), ("groups", names.groups)):
        if values is not None and len(values) != split.num_classes:
            raise DataError(f"{path} has {len(values)} {what} for {split.num_classes} classes; make the data set again")
    return names
