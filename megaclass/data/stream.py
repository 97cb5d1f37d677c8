"""Reading shards from front to back, shuffled by the webdataset library, for storage that is slow at random access.

Separate because it promises less than the default reader: shards are dealt to ranks and shuffled through a small
buffer, so ranks come to the end of an epoch at different times, and `seek` is exact only to the shard: it starts again
at the beginning of the shard a rank was in, as counted without the buffer, which repeats samples or leaves some out.
A position means the same at the same world size only. What it does promise: every rank always has a full batch, an
uninterrupted rank reads each sample of its shards once in each of its epochs, no shard is read by two ranks in an
epoch, and a shard that does not hold exactly the samples of its manifest ends the run.

Each shard is opened, checked and taken apart by us, and webdataset only shuffles: its reading stops at a broken header
without a word, takes several times as long, splits the list again inside DataLoader workers, and runs commands given as
`pipe:`. Here shards are files of the manifest on a local disk, read in the trainer's process; workers only decode.
Those behind an address are brought to the disk by `folder.py`, the next one while one is read.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice

import numpy as np
import torch
import webdataset
from numpy.typing import NDArray

from megaclass.config import Remote
from megaclass.data.address import Address, Location
from megaclass.data.bad_samples import BadSample
from megaclass.data.batch import Batch
from megaclass.data.counter import Stream, hash_counters
from megaclass.data.decode import decode_into
from megaclass.data.folder import DataFolder, open_folder
from megaclass.data.manifest import ShardInfo, SplitInfo, load_index, load_split
from megaclass.data.members import check_label, check_shard, parse_label, read_samples
from megaclass.data.options import ReaderOptions
from megaclass.data.reader import BatchReader, check_enough_samples
from megaclass.data.samples import check_shard_files
from megaclass.data.transforms import transform
from megaclass.errors import DataError

DEFAULT_WINDOW = 1000


@dataclass(frozen=True)
class RawSample:
    """One sample as it lies in the shard, and the epoch it is read in."""

    sample_id: int
    epoch: int
    shard: str
    key: str
    extension: str
    image: bytes
    label: bytes
    index_label: int

    @property
    def where(self) -> str:
        """Where it lies, in words."""
        return f"shard {self.shard}, key {self.key!r:.120}"


@dataclass(frozen=True)
class RawBatch:
    """One batch before decoding; `position` is the one it starts at."""

    position: int
    samples: list[RawSample]


class ShardStream:
    """The endless sequence of raw samples of one rank.

    Args:
        files: the data set.
        split: its name; `info`: its manifest entry.
        options: the shards of an epoch, in an order drawn from (seed, epoch), are dealt to ranks in turn.
        shuffle: False keeps shards and samples in manifest order.
        window: samples in the buffer, which is filled anew in each epoch; 1 keeps the order within the shards.

    Raises:
        DataError: fewer shards with samples than ranks.
    """

    def __init__(
        self,
        files: DataFolder,
        split: str,
        info: SplitInfo,
        options: ReaderOptions,
        *,
        shuffle: bool,
        window: int = DEFAULT_WINDOW,
    ) -> None:
        self._files, self._split, self._info = files, split, info
        self._rank, self._world_size, self._seed = options.rank, options.world_size, options.seed
        self._shuffle, self._window = shuffle, window
        self._sizes = np.array([shard.num_samples for shard in info.shards], np.int64)
        self._first_ids = np.cumsum(self._sizes) - self._sizes
        self._filled = np.flatnonzero(self._sizes)
        if len(self._filled) < self._world_size:
            raise DataError(
                f"split {split!r} of {files.location} has {len(self._filled)} shards with samples for "
                f"{self._world_size} ranks; use dataset.reader: indexed, or make the data set with more shards"
            )

    def samples(self, num_consumed: int) -> Iterator[RawSample]:
        """Samples from the beginning of the shard in which sample `num_consumed` of this rank's sequence lies."""
        for epoch in count():
            shards = self.shards_of_epoch(epoch)
            ends = np.cumsum(self._sizes[shards])
            left = shards[np.searchsorted(ends, num_consumed, side="right") :].tolist()
            num_consumed = max(0, num_consumed - int(ends[-1]))
            following = [*left[1:], int(self.shards_of_epoch(epoch + 1)[0])]
            source = (
                sample
                for shard, next_shard in zip(left, following, strict=False)
                for sample in self._read(epoch, shard, next_shard)
            )
            if self._shuffle:
                # A buffer of its own for each epoch: one that ran on would mix several epochs of a small data set.
                key = int(hash_counters(self._seed, Stream.SHUFFLE_BUFFER, self._rank, epoch))
                source = webdataset.shuffle(self._window, rng=random.Random(key))(source)
            yield from source

    def shards_of_epoch(self, epoch: int) -> NDArray[np.int64]:
        """The numbers of the shards this rank reads in an epoch, in order."""
        shards = self._filled
        if self._shuffle:
            shards = shards[np.argsort(hash_counters(self._seed, Stream.SHARD_ORDER, epoch, shards))]
        return shards[self._rank :: self._world_size]

    def class_counts(self) -> NDArray[np.int64]:
        """[num_classes] int64, samples of each class in the split, from the index files."""
        counts = np.zeros(self._info.num_classes, np.int64)
        # Each rank begins elsewhere: behind an address those of a node then fetch different ones at the same time.
        for shard in np.roll(self._filled, -(len(self._filled) * self._rank // self._world_size)).tolist():
            with self._files.hold(self._info.shards[shard].index):
                counts += np.bincount(self._index_labels(shard), minlength=len(counts))
        return counts

    def _index_labels(self, shard: int) -> NDArray[np.int64]:
        info = self._info.shards[shard]
        alone = self._info.model_copy(update={"shards": [info], "num_samples": info.num_samples})
        return np.asarray(load_index(self._files.folder, self._split, alone)[0]["label"])

    def _read(self, epoch: int, shard: int, next_shard: int) -> Iterator[RawSample]:
        info, following = self._info.shards[shard], self._info.shards[next_shard]
        with self._files.hold(info.index, info.file):
            self._files.fetch_ahead(following.index, following.file)
            yield from self._read_held(epoch, shard, info)

    def _read_held(self, epoch: int, shard: int, info: ShardInfo) -> Iterator[RawSample]:
        path = self._files.folder / info.file
        check_shard(path, info.num_samples)
        index_labels = self._index_labels(shard).tolist()
        number = 0
        try:
            with path.open("rb") as stream:
                for key, extension, image, label in islice(read_samples(stream), info.num_samples):
                    yield RawSample(
                        sample_id=int(self._first_ids[shard]) + number,
                        epoch=epoch,
                        shard=str(path),
                        key=key,
                        extension=extension,
                        image=image,
                        label=label,
                        index_label=index_labels[number],
                    )
                    number += 1
        # What a file that changed since it was checked raises.
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"shard {path} cannot be read: {' '.join(str(error).split())[:300]}") from None
        if number != info.num_samples:
            raise DataError(
                f"shard {path} gave {number} samples but dataset.json says {info.num_samples}; "
                f"run `megaclass data verify {self._files.location}`"
            )


@dataclass(frozen=True)
class RawBatchDecoder:
    """Raw batch → finished batch; pure, so it may run in a worker.

    Under the skip policy a bad sample is replaced by a good one of the same batch, picked by hash: no other sample is
    at hand.
    """

    num_classes: int
    options: ReaderOptions

    def make(self, raw: RawBatch) -> Batch:
        """Decode, check and augment; `DataError` for a bad sample under `stop`, or a batch with no good one."""
        size, options = len(raw.samples), self.options
        images = np.empty((size, options.image_size, options.image_size, options.channels), np.uint8)
        labels, good, skipped = np.zeros(size, np.int64), [], []
        for place, sample in enumerate(raw.samples):
            try:
                labels[place] = self._decode(sample, images[place])
                good.append(place)
            except BadSample as error:
                located = error.located(sample.where, sample.shard, sample.key)
                if not options.is_skipping:
                    raise located.as_data_error() from None
                skipped.append(located.as_skipped(sample.sample_id))
        if not good:
            raise DataError(
                f"no usable sample in a whole batch; the last was {skipped[-1].detail}; repair the data set"
            )
        source = np.arange(size)
        bad = np.setdiff1d(source, good)
        picks = hash_counters(options.seed, Stream.SUBSTITUTE, raw.position, bad) % np.uint64(len(good))
        source[bad] = np.array(good)[picks.astype(np.int64)]
        images[bad] = images[source[bad]]
        ids = np.array([sample.sample_id for sample in raw.samples])[source]
        epochs = np.array([sample.epoch for sample in raw.samples])[source]
        pixels = transform(images, ids, epochs, options.seed, options.augment)
        end = raw.position + options.micro_batch_size
        # A substitute is taken from the samples at hand: each is one more taken, though none comes from the disk again.
        num_read = len(raw.samples) + len(bad)
        return Batch(pixels, torch.from_numpy(labels[source]), torch.from_numpy(ids), end, tuple(skipped), num_read)

    def _decode(self, sample: RawSample, target: NDArray[np.uint8]) -> int:
        """Decode a sample into `target`; returns its label."""
        label = parse_label(sample.label)
        check_label(label, sample.index_label, self.num_classes)
        decode_into(sample.image, sample.extension, target)
        return label


class StreamReader(BatchReader):
    """Endless full batches from shards read front to back; see the module for what a position means here.

    Args: as for `IndexedReader`; the folder may be an address, fetched as `remote` says; `shuffle_buffer` as `window`
    of `ShardStream`.

    Cost: all index files are read at the start, one at a time, to count the samples of each class.

    Raises:
        DataError: as for `IndexedReader`, and with fewer shards with samples than ranks.
    """

    def __init__(
        self,
        folder: Location,
        split: str,
        options: ReaderOptions,
        *,
        shuffle: bool = True,
        shuffle_buffer: int | None = None,
        remote: Remote | None = None,
    ) -> None:
        files = open_folder(folder, remote or Remote())
        info = load_split(folder, files.manifest, split)
        if not isinstance(folder, Address):
            check_shard_files(folder, info)
        what = f"split {split!r} of {folder}"
        check_enough_samples(info.num_samples, options, what)
        window = shuffle_buffer or DEFAULT_WINDOW
        stream = ShardStream(files, split, info, options, shuffle=shuffle, window=window)
        decoder = RawBatchDecoder(info.num_classes, options)

        def plan(position: int) -> Iterator[RawBatch]:
            samples = stream.samples(position // options.world_size)
            for start in count(position, options.micro_batch_size):
                yield RawBatch(start, list(islice(samples, options.batch_size)))

        super().__init__(
            plan,
            decoder.make,
            options,
            class_counts=stream.class_counts(),
            num_samples=info.num_samples,
            release=files.close,
        )
