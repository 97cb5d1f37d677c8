"""Writing a data set folder: tar shards through webdataset, their indexes, class names and, last, the manifest.

The only file of `prepare` that knows the format on disk (`megaclass.data.manifest`). Two runs over the same samples
write the same bytes: members have time 0 and no owner, keys are the zero-padded position in the split, and the order of
samples is a fixed permutation of their number. While a folder is being written it holds a marker (`unfinished`) and no
`dataset.json`; the manifest appears by a rename when everything else is on disk. Shards that an interrupted run has
completed are kept by the next one under the same conditions.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
from webdataset.writer import TarWriter

from megaclass.data.manifest import (
    FORMAT,
    INDEX_DTYPE,
    MANIFEST_NAME,
    PAIR_DTYPE,
    ClassNames,
    Manifest,
    ShardInfo,
    SplitInfo,
    load_index,
)
from megaclass.errors import ConfigError, DataError
from megaclass.prepare.digest import file_sha256, parts_sha256
from megaclass.prepare.encode import EncodedImage, Images
from megaclass.prepare.unfinished import MARKER, Complete, Conditions, Unfinished

SAMPLES_PER_SHARD = 10_000
Progress = Callable[[int, int], None]

_BLOCK = 512
SPLIT_NAME = re.compile(r"[A-Za-z0-9_-]+")
_OURS = re.compile(
    SPLIT_NAME.pattern + r"(-\d{6}\.tar|-\d{6}\.index\.npy|\.classes\.json|\.pairs\.npy)|dataset\.json(\.partial)?"
)


@dataclass(frozen=True)
class SplitPlan:
    """What a split will hold, decided before anything is written.

    Attributes:
        names: one name per class, all different; a class's label is its position here.
        groups: the super-class of each class, or None.
        source_names: who or what made samples.
        labels: [num_samples] int64.
        sources: [num_samples] int32, positions in `source_names`, -1 if unknown.
        images: gives samples encoded, or None for one to be left out; asked once for those to write, in their order.
        pairs: [num_pairs] of `PAIR_DTYPE`, with the numbers that samples have here; no sample may be left out then.
    """

    names: Sequence[str]
    groups: Sequence[str] | None
    source_names: Sequence[str]
    labels: np.ndarray
    sources: np.ndarray
    images: Images
    pairs: np.ndarray | None = None

    def digest(self) -> str:
        """A digest of everything but the images."""
        texts = json.dumps([list(self.names), self.groups and list(self.groups), list(self.source_names)])
        arrays = [self.labels, self.sources] + ([] if self.pairs is None else [self.pairs])
        return parts_sha256([texts, *arrays])


def writing_order(num_samples: int) -> np.ndarray:
    """A fixed permutation of range(num_samples), int64: sorted by the splitmix64 hash of the number.

    So a reader that streams shards does not meet the samples class by class. The same on every machine and for every
    version of numpy, which its own generators do not promise.
    """
    z = np.arange(1, num_samples + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(z ^ (z >> np.uint64(31)), kind="stable").astype(np.int64)


class DatasetWriter:
    """Writes one data set folder; use it as a context, call `write_split` per split and `finish` at the end.

    Without `finish` the folder stays unfinished: it has no manifest, and the next run continues it if its conditions
    are the same, and else clears it away where it may.

    Attributes:
        left_out: by split, the numbers of the samples that were left out, [n] int64.
        num_continued: shards that an interrupted run had completed.
        warnings: lines for the user.

    Args:
        folder: made if it does not exist; must be empty, unfinished, or a data set that `overwrite` allows to replace.
        name: of the data set, for people.
        description: one or two sentences on where it comes from.
        samples_per_shard: the last shard of a split may hold fewer.
        overwrite: replace the data set in `folder`, or an unfinished one of other conditions.
        conditions: plain JSON values that decide every byte, beside name, description and samples per shard: options,
            and digests of plans and inputs. None: nothing is known of the inputs, so always begin anew.
        may_leave_out: whether `images` may leave samples out.

    Raises:
        ConfigError: the folder holds a data set, an unfinished one of other conditions, or foreign files, is being
            written by somebody else or cannot be written, or `samples_per_shard` < 1.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        description: str = "",
        samples_per_shard: int = SAMPLES_PER_SHARD,
        overwrite: bool = False,
        *,
        conditions: Conditions | None = None,
        may_leave_out: bool = True,
    ) -> None:
        if samples_per_shard < 1:
            raise ConfigError(f"samples-per-shard is {samples_per_shard}; it must be at least 1")
        check_output(folder, overwrite)
        self._folder = Path(folder)
        self._name = name
        self._description = description
        self._samples_per_shard = samples_per_shard
        self._splits: dict[str, SplitInfo] = {}
        self._modes: set[str] = set()
        self.left_out: dict[str, np.ndarray] = {}
        if conditions is not None:
            own = {"name": name, "description": description, "samples_per_shard": samples_per_shard}
            conditions = {**conditions, **own}
        try:
            self._unfinished = self._claim(conditions, may_leave_out, overwrite)
        except OSError as error:
            raise ConfigError(f"folder {folder} cannot be written: {error.strerror}; choose another") from None
        self.num_continued = len(self._unfinished.complete)
        self.warnings = [] if self._unfinished.warning is None else [self._unfinished.warning]

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._unfinished.release()
        if isinstance(error, OSError) and not isinstance(error, ValueError):
            raise DataError(f"writing {self._folder} failed: {error}; free space or choose another folder") from None

    def _claim(self, conditions: Conditions | None, may_leave_out: bool, overwrite: bool) -> Unfinished:
        self._folder.mkdir(parents=True, exist_ok=True)
        manifest = self._folder / MANIFEST_NAME
        # The marker first, then the manifest: at any moment the folder is a data set or known as unfinished.
        unfinished = Unfinished(
            self._folder, conditions, may_leave_out=may_leave_out, is_fresh=manifest.exists(), overwrite=overwrite
        )
        try:
            manifest.unlink(missing_ok=True)
            kept = {name for line in unfinished.complete for name in (line.shard.file, line.shard.index)}
            for path in self._folder.iterdir():
                if _OURS.fullmatch(path.name) and path.name not in kept:
                    path.unlink()
        except BaseException:
            unfinished.release()
            raise
        return unfinished

    def write_split(self, split: str, plan: SplitPlan, progress: Progress | None = None) -> SplitInfo:
        """Write all shards, indexes and class names of one split; returns its entry of the manifest.

        `progress(done, total)` is called now and then and at the end. Cost: memory of one index record per sample.
        """
        assert SPLIT_NAME.fullmatch(split), split
        assert split not in self._splits, split
        assert len(plan.labels) == len(plan.sources)
        content = ClassNames(names=list(plan.names), groups=None if plan.groups is None else list(plan.groups))
        classes = self._folder / f"{split}.classes.json"
        classes.write_text(content.model_dump_json(indent=1), encoding="utf-8")
        shards = self._write_shards(split, plan, progress)
        info = SplitInfo(
            num_classes=len(plan.names),
            num_samples=sum(shard.num_samples for shard in shards),
            classes=classes.name,
            classes_sha256=file_sha256(classes),
            sources=list(plan.source_names),
            shards=shards,
            **self._write_pairs(split, plan),
        )
        self._splits[split] = info
        return info

    def _write_pairs(self, split: str, plan: SplitPlan) -> dict[str, str]:
        if plan.pairs is None:
            return {}
        sample_ids = np.empty(len(plan.labels), dtype=np.int64)
        sample_ids[writing_order(len(plan.labels))] = np.arange(len(plan.labels))
        pairs = np.empty(len(plan.pairs), dtype=PAIR_DTYPE)
        pairs["is_same"] = plan.pairs["is_same"]
        for side in ("left", "right"):
            pairs[side] = sample_ids[plan.pairs[side]]
        path = self._folder / f"{split}.pairs.npy"
        save_array(path, pairs)
        return {"pairs": path.name, "pairs_sha256": file_sha256(path)}

    def _write_shards(self, split: str, plan: SplitPlan, progress: Progress | None) -> list[ShardInfo]:
        earlier = [line for line in self._unfinished.complete if line.split == split]
        self._modes.update(mode for line in earlier for mode in line.modes)
        shards = [line.shard for line in earlier]
        left_out = [number for line in earlier for number in line.left_out]
        done = earlier[-1].done if earlier else 0
        num_written = sum(shard.num_samples for shard in shards)
        order = writing_order(len(plan.labels))
        shard: _Shard | None = None
        num_noted = len(left_out)

        def complete(shard: _Shard) -> None:
            nonlocal num_noted
            shards.append(shard.close())
            new = left_out[num_noted:]
            self._unfinished.add(
                Complete(split=split, done=done, left_out=new, modes=sorted(shard.modes), shard=shards[-1])
            )
            num_noted = len(left_out)
            self._modes |= shard.modes

        try:
            with contextlib.closing(_generator(plan.images(order[done:]))) as images:
                for number, image in zip(order[done:].tolist(), images, strict=True):
                    done += 1
                    if image is None:
                        left_out.append(number)
                    else:
                        shard = shard or _Shard(self._folder, f"{split}-{len(shards):06d}")
                        shard.add(f"{num_written:09d}", image, int(plan.labels[number]), int(plan.sources[number]))
                        num_written += 1
                        if shard.num_samples == self._samples_per_shard:
                            complete(shard)
                            shard = None
                    if progress is not None and (done % 256 == 0 or done == len(order)):
                        progress(done, len(order))
            if shard is not None:
                complete(shard)
        except BaseException:
            if shard is not None:
                shard.abandon()
            raise
        assert plan.pairs is None or not left_out, "pairs of samples that were left out"
        self.left_out[split] = np.array(left_out, dtype=np.int64)
        return shards

    def finish(self) -> Manifest:
        """Write `dataset.json`, which makes the folder a data set. Its image mode is RGB if any image is, else L.

        Raises:
            DataError: an index on the disk does not hold what was written.
        """
        for split, info in self._splits.items():
            load_index(self._folder, split, info)
        manifest = Manifest(
            format=FORMAT,
            name=self._name,
            description=self._description,
            image_mode="RGB" if "RGB" in self._modes else "L",
            splits=self._splits,
        )
        partial = self._folder / f"{MANIFEST_NAME}.partial"
        with partial.open("w", encoding="utf-8") as stream:
            # What a split does not have is not written, so that older versions read what they can.
            json.dump(manifest.model_dump(exclude_none=True), stream, indent=1, ensure_ascii=False)
            stream.write("\n")
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, self._folder / MANIFEST_NAME)
        self._unfinished.remove()
        return manifest


def _generator(images: Iterator[EncodedImage | None]) -> Generator[EncodedImage | None, None, None]:
    """An iterator that can be closed, and closes its own source with it."""
    yield from images


class _Shard:
    """One tar shard being written, and the index records of its samples."""

    def __init__(self, folder: Path, stem: str) -> None:
        self._tar_path = folder / f"{stem}.tar"
        self._index_path = folder / f"{stem}.index.npy"
        self._stream = self._tar_path.open("wb")
        self._tar = TarWriter(self._stream, user="", group="", mode=0o444, mtime=0, encoder=False, compress=False)
        self.modes: set[str] = set()
        self._records: list[tuple[int, int, int, int]] = []
        self._offset = 0

    @property
    def num_samples(self) -> int:
        return len(self._records)

    def add(self, key: str, image: EncodedImage, label: int, source: int) -> None:
        # Two calls, because one would sort the members by extension: `label` would come before `png`.
        members = ((image.extension, image.data), ("label", label.to_bytes(8, "little", signed=True)))
        length = 0
        for extension, data in members:
            self._tar.write({"__key__": key, extension: data})
            length += _BLOCK + -(-len(data) // _BLOCK) * _BLOCK
        self._records.append((self._offset, length, source, label))
        self._offset += length
        self.modes.add(image.mode)

    def abandon(self) -> None:
        """Close the files without an index: the shard is unfinished."""
        with contextlib.suppress(OSError, ValueError):
            self._tar.close()
        with contextlib.suppress(OSError):
            self._stream.close()

    def close(self) -> ShardInfo:
        self._tar.close()
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        save_array(self._index_path, np.array(self._records, dtype=INDEX_DTYPE))
        return ShardInfo(
            file=self._tar_path.name,
            index=self._index_path.name,
            num_samples=len(self._records),
            num_bytes=self._tar_path.stat().st_size,
            sha256=file_sha256(self._tar_path),
            index_sha256=file_sha256(self._index_path),
        )


def shifted(progress: Progress | None, before: int, total: int) -> Progress | None:
    """Progress of a part, told as that of the whole: `before` samples come before it, of `total`."""
    return None if progress is None else lambda done, _: progress(before + done, total)


def check_output(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that must not be written to; sources call it before their long work.

    Raises:
        ConfigError: `folder` is a file, holds a data set and `overwrite` is not given, or holds foreign files.
    """
    folder = Path(folder)
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder; give an empty or new folder to write the data set to")
    if (folder / MANIFEST_NAME).exists():
        if not overwrite:
            raise ConfigError(
                f"{folder} already holds a data set; give another folder, or --overwrite to replace the data set"
            )
    elif not (folder / MARKER).exists():
        foreign = sorted(path.name for path in folder.iterdir())
        if foreign:
            raise ConfigError(
                f"{folder} holds other files ({', '.join(foreign[:3])}{', ...' if len(foreign) > 3 else ''}); "
                "give an empty or new folder to write the data set to"
            )


def save_array(path: Path, array: np.ndarray) -> None:
    """Write an array as `.npy` and wait until it is on the disk."""
    with path.open("wb") as stream:
        np.save(stream, array, allow_pickle=False)
        stream.flush()
        os.fsync(stream.fileno())
