"""Samples of a split by their id, read from tar shards through the index; and a pass over a split in manifest order.

Separate because training and evaluation both read samples this way, in different orders. A sample costs one read of
its byte range; shards are never scanned, and nothing but the index is kept in memory.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator
from copy import copy
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from megaclass.data.bad_samples import BadSample
from megaclass.data.batch import Batch
from megaclass.data.decode import Header, decode_into, judge_header
from megaclass.data.manifest import SplitInfo, load_index, load_manifest, load_split
from megaclass.data.members import (
    HEADER_BYTES,
    MemberPlaces,
    SampleMembers,
    check_label,
    parse_sample,
    place_members,
)
from megaclass.data.order import first_classes
from megaclass.data.transforms import normalise
from megaclass.errors import ConfigError, DataError

_MAX_OPEN_SHARDS = 128
_COUNTED_TOGETHER = 2**17
# The header of nearly every image lies within.
_IMAGE_FRONT_BYTES = 4096


class StoredSamples:
    """The samples of one split of a data set on disk, or of some of its classes.

    With `num_classes` the other classes do not exist: the labels are places in `first_classes`, and the ids count the
    samples of those classes alone, in manifest order.

    Attributes:
        num_classes: labels are in [0, num_classes).
        num_samples: ids are in [0, num_samples).
        class_counts: [num_classes] int64, samples of each class.
        classes: [num_classes] int64, the label that the data set gives to each class.

    Raises:
        ConfigError: `num_classes` is more than the split has.
        DataError: the manifest or an index is wrong, or a shard is missing or of another size than the manifest says.

    Cost: 28 bytes of memory per sample, one `stat` per shard, and at most 128 open files.
    """

    def __init__(
        self, folder: Path, split: str, *, image_size: int, channels: int, num_classes: int | None = None
    ) -> None:
        info = load_split(folder, load_manifest(folder), split)
        check_shard_files(folder, info)
        if num_classes is not None and not 1 <= num_classes <= info.num_classes:
            raise ConfigError(
                f"dataset.num_classes is {num_classes} but split {split!r} of {folder} has {info.num_classes} classes: "
                "give 1 to that, or none for all"
            )
        self._records, self._shard_numbers = load_index(folder, split, info)
        self._num_stored_classes = info.num_classes
        self.classes = np.arange(info.num_classes)
        # By stored label; -1 is a class that is left out.
        self._new_labels = self.classes
        if num_classes is not None:
            self.classes = first_classes(info.num_classes, num_classes)
            self._new_labels = np.full(info.num_classes, -1)
            self._new_labels[self.classes] = np.arange(num_classes)
            kept = self._new_labels[self._records["label"]] >= 0
            self._records, self._shard_numbers = self._records[kept], self._shard_numbers[kept]
        self.num_classes = num_classes or info.num_classes
        self.num_samples = len(self._records)
        self.class_counts = self._count_classes()
        self._paths = [Path(folder) / shard.file for shard in info.shards]
        self._image_size = image_size
        self._channels = channels
        self._files: OrderedDict[int, int] = OrderedDict()
        self._max_open_shards = _MAX_OPEN_SHARDS

    def twin(self, num_twins: int) -> StoredSamples:
        """The same samples with open files of its own, for one of `num_twins` threads; the index is shared."""
        other = copy(self)
        other._files = OrderedDict()
        other._max_open_shards = max(1, _MAX_OPEN_SHARDS // num_twins)
        return other

    def _count_classes(self) -> NDArray[np.int64]:
        """[num_classes], counted piece by piece: all labels at once would be a copy of eight bytes a sample."""
        counts = np.zeros(self.num_classes, np.int64)
        size = max(_COUNTED_TOGETHER, self.num_classes)
        for start in range(0, self.num_samples, size):
            labels = self._new_labels[self._records["label"][start : start + size]]
            counts += np.bincount(labels, minlength=self.num_classes)
        return counts

    def encoded(self, sample_id: int) -> tuple[SampleMembers, int, str]:
        """A sample before it is decoded: its members, its label in [0, num_classes), and where it lies, in words.

        Raises:
            BadSample: it cannot be read, or the label is not the one of the index.
        """
        sample, where = self._read_members(sample_id)
        try:
            check_label(sample.label, int(self._records[sample_id]["label"]), self._num_stored_classes)
        except BadSample as error:
            raise error.located(where, str(self._paths[int(self._shard_numbers[sample_id])]), sample.key) from None
        return sample, int(self._new_labels[sample.label]), where

    def read(self, sample_ids: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.int64], dict[int, BadSample]]:
        """Read, check and decode samples.

        Returns:
            images [n, image_size, image_size, channels] uint8; labels [n] int64; and what went wrong, by place in
            `sample_ids`. Images and labels of bad samples are zeros.
        """
        images = np.empty((len(sample_ids), self._image_size, self._image_size, self._channels), np.uint8)
        labels = np.zeros(len(sample_ids), np.int64)
        bad = {}
        for place, sample_id in enumerate(sample_ids.tolist()):
            try:
                labels[place] = self._read_one(sample_id, images[place])
            except BadSample as error:
                images[place], bad[place] = 0, error
        return images, labels, bad

    @property
    def labels(self) -> NDArray[np.int64]:
        """[num_samples] int64, the label of each sample."""
        return self._new_labels[self._records["label"]]

    def labels_of(self, sample_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """[n] int64, the labels of these samples by the index."""
        return self._new_labels[self._records["label"][sample_ids]]

    def shards_of(self, sample_ids: NDArray[np.int64]) -> NDArray[np.int32]:
        """[n] int32, the number of the shard that each of these samples lies in."""
        return self._shard_numbers[sample_ids]

    def shard_path(self, shard: int) -> Path:
        """The file of a shard."""
        return self._paths[shard]

    @property
    def shard_sizes(self) -> NDArray[np.int64]:
        """[shards] int64, how many of the samples lie in each shard."""
        # They stand in manifest order; counting them would take a copy of eight bytes a sample.
        return np.diff(np.searchsorted(self._shard_numbers, np.arange(len(self._paths) + 1)))

    @property
    def sources(self) -> NDArray[np.int32]:
        """[num_samples] int32, who or what made each sample; -1 if unknown."""
        return self._records["source"]

    def stored(self, sample_id: int) -> tuple[SampleMembers, str]:
        """The members of a sample as they are in its shard, and where they lie, in words.

        Raises:
            DataError: they cannot be read, or the label is not the one of the index.
        """
        try:
            sample, where = self._read_members(sample_id)
            check_label(sample.label, int(self._records[sample_id]["label"]), self._num_stored_classes)
        except BadSample as error:
            raise error.as_data_error() from None
        return sample, where

    def locate(self, sample_id: int) -> tuple[str, str]:
        """The key of a sample and the file name of the shard it lies in.

        Raises:
            DataError: the sample cannot be read.
        """
        try:
            sample, _ = self._read_members(sample_id)
        except BadSample as error:
            raise error.as_data_error() from None
        return sample.key, self._paths[int(self._shard_numbers[sample_id])].name

    def place(self, sample_id: int) -> tuple[int, MemberPlaces, Header]:
        """Where a sample begins in its shard, where its members lie from there, and what its image says of itself.

        Raises:
            DataError: there is no image with a label there, or none that could be used, as far as headers show.

        Cost: a few kilobytes are read; the whole sample where the header of its image is longer.
        """
        record, shard = self._records[sample_id], int(self._shard_numbers[sample_id])
        offset, length = int(record["offset"]), int(record["length"])
        where = f"shard {self._paths[shard]}, byte {offset}"
        try:
            file = self._file(shard)
            front = os.pread(file, min(length, HEADER_BYTES + _IMAGE_FRONT_BYTES), offset)

            def header_at(start: int) -> bytes:
                if start + HEADER_BYTES <= len(front):
                    return front[start : start + HEADER_BYTES]
                return os.pread(file, HEADER_BYTES, offset + start)

            at = place_members(header_at, length)
            end = at.image_start + at.image_size
            try:
                return offset, at, judge_header(front[at.image_start : end], at.extension)
            except BadSample:
                if end <= len(front):
                    raise
            whole = os.pread(file, at.image_size, offset + at.image_start)
            return offset, at, judge_header(whole, at.extension)
        except OSError as error:
            raise DataError(f"{where}: {error.strerror}") from None
        except BadSample as error:
            raise error.located(where).as_data_error() from None

    def close(self) -> None:
        """Close the shards; the next read opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _read_one(self, sample_id: int, target: NDArray[np.uint8]) -> int:
        """Decode a sample into `target`; returns its label."""
        sample, label, where = self.encoded(sample_id)
        try:
            decode_into(sample.image, sample.extension, target)
        except BadSample as error:
            raise error.located(where, str(self._paths[int(self._shard_numbers[sample_id])]), sample.key) from None
        return label

    def _read_members(self, sample_id: int) -> tuple[SampleMembers, str]:
        """The members of a sample, and where they lie, in words."""
        record, shard = self._records[sample_id], int(self._shard_numbers[sample_id])
        offset, length = int(record["offset"]), int(record["length"])
        where = f"shard {self._paths[shard]}, byte {offset}"
        try:
            block = os.pread(self._file(shard), length, offset)
            if len(block) < length:
                raise BadSample("unreadable", f"only {len(block)} of {length} bytes are there")
            sample = parse_sample(block)
        except OSError as error:
            raise BadSample("unreadable", f"{where}: {error.strerror}", str(self._paths[shard])) from None
        except BadSample as error:
            raise error.located(where, str(self._paths[shard])) from None
        return sample, f"{where}, key {sample.key!r:.120}"

    def _file(self, shard: int) -> int:
        if shard in self._files:
            self._files.move_to_end(shard)
        else:
            if len(self._files) >= self._max_open_shards:
                os.close(self._files.popitem(last=False)[1])
            self._files[shard] = os.open(self._paths[shard], os.O_RDONLY | os.O_CLOEXEC)
        return self._files[shard]


def check_shard_files(folder: Path, info: SplitInfo) -> None:
    """Compare every shard's size with the manifest, without reading it.

    Raises:
        DataError: a shard is missing, or longer or shorter than the manifest says.
    """
    for shard in info.shards:
        path = Path(folder) / shard.file
        try:
            num_bytes = path.stat().st_size
        except OSError as error:
            raise DataError(f"shard {path} cannot be read: {error.strerror}; copy it again") from None
        if num_bytes != shard.num_bytes:
            raise DataError(
                f"shard {path} has {num_bytes} bytes but dataset.json says {shard.num_bytes}: "
                f"{'cut off' if num_bytes < shard.num_bytes else 'changed'}; copy it again, then run "
                f"`megaclass data verify {folder}`"
            )


def iterate_split(
    folder: Path,
    split: str,
    *,
    rank: int,
    world_size: int,
    batch_size: int,
    image_size: int,
    channels: int,
) -> Iterator[Batch]:
    """Every sample of a split exactly once over all ranks, in manifest order, without augmentation.

    Rank r visits ids N*r div W up to N*(r+1) div W: the ranks may have different counts, and the last batch of each may
    be short. `Batch.position` is the id after the batch's last.

    Raises:
        DataError: as `StoredSamples`; also for the first bad sample, whatever the policy: an evaluation with holes
            would not be the one it is called.
    """
    samples = StoredSamples(folder, split, image_size=image_size, channels=channels)
    stop = samples.num_samples * (rank + 1) // world_size
    try:
        for start in range(samples.num_samples * rank // world_size, stop, batch_size):
            ids = np.arange(start, min(start + batch_size, stop), dtype=np.int64)
            images, labels, bad = samples.read(ids)
            for error in bad.values():
                raise error.as_data_error()
            pixels = normalise(torch.from_numpy(images).permute(0, 3, 1, 2))
            yield Batch(pixels, torch.from_numpy(labels), torch.from_numpy(ids), int(ids[-1]) + 1)
    finally:
        samples.close()
