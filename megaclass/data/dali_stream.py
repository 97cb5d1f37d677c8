"""Shards read, shuffled, decoded and flipped by NVIDIA DALI alone: its throughput mode.

Separate from `dali.py` because it promises less. DALI's webdataset reader knows no positions, so the order is its own:

- The samples of all shards, shards in an order drawn from the seed, make one ring. Rank r of W begins N*r div W samples
  from its beginning and reads on and on, through a buffer of `dataset.shuffle_buffer` samples that gives back one by
  chance and takes in the next. The order of shards stays the same in every epoch.
- In N positions the ranks have read each sample once, but for those in their buffers; one rank reads each sample once
  in every turn of the ring. The numbers come from the seed, so the same command gives the same batches.
- `seek` is exact to the sample as counted without the buffer: it repeats, or leaves out, as many as the buffer holds.

Every sample has its true id: DALI tells the name in its own index of a shard, and that name is ours to give. Labels are
compared with the index. Headers of all images are judged when an iteration begins, so that no giant one and no other
kind of file reaches DALI; damage behind a header is DALI's to find. Threads are DALI's; nothing is forked.
"""

from __future__ import annotations

import tempfile
from collections.abc import Generator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megaclass.data.batch import Batch
from megaclass.data.counter import Stream, hash_counters
from megaclass.data.dali_pipeline import BATCHES_AHEAD, check_installed, decode, new_pipeline, take_batch
from megaclass.data.members import IMAGE_EXTENSIONS
from megaclass.data.options import ReaderOptions
from megaclass.data.reader import PositionedReader, check_enough_samples
from megaclass.data.samples import StoredSamples
from megaclass.errors import ConfigError

DEFAULT_BUFFER = 1000
_CPU = torch.device("cpu")


class DaliStreamReader(PositionedReader):
    """Endless full batches from DALI's own webdataset reader; see the module for their order.

    Args:
        options: what every reader is told, but `on_bad_sample` is `stop`, and of `augment` there is only `flip`, drawn
            by DALI for each sample read. `workers` are threads that decode, and 0 is as 1.
        shuffle_buffer: samples that are mixed; 1 keeps the order within the shards.
        device: where the images of a batch lie; on a CUDA device it also decodes them.
        folder, split: as for `IndexedReader`.

    Raises:
        ConfigError: DALI is not installed or cannot run on the device.
        DataError: as for `IndexedReader`; while iterating, a sample that cannot be decoded, by name.

    Cost: 28 bytes of memory per sample, and about 100 of DALI's. Opening an iteration reads the headers of all samples.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        options: ReaderOptions,
        *,
        shuffle_buffer: int | None = None,
        device: torch.device = _CPU,
    ) -> None:
        assert not options.is_skipping, options
        check_installed()
        self._samples = StoredSamples(folder, split, image_size=options.image_size, channels=options.channels)
        num_samples, what = self._samples.num_samples, f"split {split!r} of {folder}"
        check_enough_samples(num_samples, options, what)
        super().__init__(self._samples.class_counts, num_samples)
        self._folder, self._options = folder, options
        self._buffer = shuffle_buffer or DEFAULT_BUFFER
        self._device = device

    def ring(self, position: int) -> NDArray[np.int64]:
        """[num_samples] ids in the order in which this rank reads them from a position on, before they are mixed."""
        options, sizes = self._options, self._samples.shard_sizes
        shards = np.argsort(hash_counters(options.seed, Stream.SHARD_ORDER, 0, np.arange(len(sizes))), kind="stable")
        first = np.cumsum(sizes) - sizes
        ids = np.concatenate([first[shard] + np.arange(sizes[shard]) for shard in shards])
        begin = self.num_samples * options.rank // options.world_size + position // options.world_size
        return np.roll(ids, -(begin % self.num_samples))

    def _release(self) -> None:
        self._samples.close()

    def _batches(self, position: int) -> Generator[Batch, None, None]:
        step = self._options.micro_batch_size
        pipe = self._started(position, is_decoding=True)
        for start in count(position, step):
            try:
                images, (labels, names) = take_batch(pipe, self._device)
            except RuntimeError as error:
                del pipe  # its threads, before another one reads
                self._blame(position, (start - position) // step, error)
                raise
            pipe.schedule_run()
            yield self._batch(images, labels, _ids(names), start + step)

    def _batch(self, images: torch.Tensor, stored: list[NDArray[Any]], ids: NDArray[np.int64], end: int) -> Batch:
        labels = self._samples.labels_of(ids)
        for place in np.flatnonzero(np.stack(stored).view("<i8")[:, 0] != labels).tolist():
            self._samples.stored(int(ids[place]))  # raises what is wrong, and says where
        on_device = torch.from_numpy(labels)
        if self._device.type == "cuda":
            on_device = on_device.pin_memory().to(self._device, non_blocking=True)
        return Batch(images, on_device, torch.from_numpy(ids), end, (), len(ids))

    def _blame(self, position: int, number: int, error: RuntimeError) -> None:
        """Name the sample that DALI failed at, found by reading up to that batch again without decoding.

        Raises:
            DataError: the default reader's decoder rejects a sample of the batch, too.
        """
        pipe = self._started(position, is_decoding=False)
        for _ in range(number):
            pipe.share_outputs()
            pipe.release_outputs()
            pipe.schedule_run()
        names: Any = pipe.share_outputs()[0]
        ids = _ids([np.array(names.at(place)) for place in range(len(names))])
        for sample in self._samples.read(ids)[2].values():
            raise sample.as_data_error() from error

    def _started(self, position: int, *, is_decoding: bool) -> Any:
        """A pipeline with batches under way."""
        try:
            with tempfile.TemporaryDirectory(prefix="megaclass-dali-") as folder:
                paths, indexes, sizes = _write_indexes(self._samples, self.ring(position), Path(folder))
                # DALI takes twice as long where it resizes, also to the size there is.
                is_resizing = sizes != {(self._options.image_size,) * 2}
                pipeline = self._pipeline(paths, indexes, position, is_decoding, is_resizing)
                pipeline.build()
        except RuntimeError as error:
            raise ConfigError(
                f"DALI cannot read {self._folder} on {self._device}: {' '.join(str(error).split())[-300:]}; use "
                "dataset.reader: indexed"
            ) from error
        for _ in range(BATCHES_AHEAD):
            pipeline.schedule_run()
        return pipeline

    def _pipeline(
        self, paths: list[str], indexes: list[str], position: int, is_decoding: bool, is_resizing: bool
    ) -> Any:
        from nvidia.dali import fn, types

        options = self._options
        drawn = hash_counters(options.seed, Stream.SHUFFLE_BUFFER, options.rank, np.array([position, position + 1]))
        # DALI takes seeds of 31 bits.
        shuffle_seed, flip_seed = (int(number) >> 33 for number in drawn)
        pipe = new_pipeline(options.batch_size, max(1, options.workers), self._device)
        with pipe:
            read: Any = fn.readers.webdataset(
                paths=paths,
                index_paths=indexes,
                ext=[";".join(IMAGE_EXTENSIONS), "label"],
                missing_component_behavior="error",
                random_shuffle=self._buffer > 1,
                initial_fill=self._buffer,
                seed=shuffle_seed,
            )
            encoded, labels = read
            names = fn.get_property(encoded, key="source_info")
            if not is_decoding:
                pipe.set_outputs(names)
                return pipe
            images = decode(encoded, options.channels, self._device)
            if is_resizing:
                images = fn.resize(
                    images, size=[options.image_size] * 2, interp_type=types.INTERP_TRIANGULAR, antialias=True
                )
            flip = options.augment.flip
            mirrored = fn.random.coin_flip(probability=flip, seed=flip_seed) if flip else 0
            planes = fn.crop_mirror_normalize(
                images, mirror=mirrored, mean=[0.0], std=[1.0], dtype=types.UINT8, output_layout="CHW"
            )
            pipe.set_outputs(planes, labels, names)
        return pipe


def _ids(names: list[NDArray[Any]]) -> NDArray[np.int64]:
    """Sample ids from what DALI calls the source of a sample, PATH:OFFSET:NAME, with the id as the name."""
    return np.array([int(bytes(name).rsplit(b":", 1)[1]) for name in names], np.int64)


def _write_indexes(
    samples: StoredSamples, ring: NDArray[np.int64], folder: Path
) -> tuple[list[str], list[str], set[tuple[int, int]]]:
    """DALI's index files for the samples of `ring` in this order: the shards, the index of each, all sizes of images.

    The shard that the ring begins in the middle of stands at both its ends, each time with an index of that part. Sizes
    are (height, width).
    """
    shards, sizes = samples.shards_of(ring), set()
    paths: list[str] = []
    indexes: list[str] = []
    for part in np.split(ring, np.flatnonzero(np.diff(shards)) + 1):
        index = folder / f"{len(indexes)}.idx"
        with index.open("w", encoding="ascii") as file:
            file.write(f"v1.2 {len(part)}\n")
            for sample_id in part.tolist():
                start, at, header = samples.place(sample_id)
                sizes.add((header.height, header.width))
                file.write(f"{at.extension} {start + at.image_start} {at.image_size} {sample_id} ")
                file.write(f"label {start + at.label_start} {at.label_size} {sample_id}\n")
        paths.append(str(samples.shard_path(int(samples.shards_of(part[:1])[0]))))
        indexes.append(str(index))
    return paths, indexes, sizes
