"""Writes data sets of very many tiny samples quickly, and reads the ids of every rank in a process that can be killed.

A sample is the same 8 x 8 JPEG with a key and label of its own. Members are copied and numbered as arrays: a million
samples take seconds. As a program it reads with one reader per rank, step by step, and appends every step's ids in rank
order to a file: `python -m tests.support.many_samples FOLDER OUT POSITION STOP WORLD_SIZE WORKERS`.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import simplejpeg

from megaclass.config import Dataset
from megaclass.data.manifest import FORMAT, INDEX_DTYPE
from megaclass.data.open import open_reader
from tests.support.tiny_dataset import shard_entry, tar_member, write_manifest

NUM_CLASSES = 101
GLOBAL_BATCH_SIZE = 1200
SEED = 5
_DIGITS = 9
_SAMPLE_BYTES = 2048  # two headers, two blocks of data


def write_many(folder: Path, sizes: list[int]) -> Path:
    """A data set of one split with shards of the given numbers of samples."""
    folder.mkdir(parents=True, exist_ok=True)
    shards, first = [], 0
    for place, size in enumerate(sizes):
        stem = f"train-{place:06d}"
        numbers = np.arange(first, first + size)
        (folder / f"{stem}.tar").write_bytes(_members(numbers).tobytes() + bytes(1024))
        records = np.zeros(size, INDEX_DTYPE)
        records["offset"] = np.arange(size) * _SAMPLE_BYTES
        records["length"], records["source"], records["label"] = _SAMPLE_BYTES, -1, numbers % NUM_CLASSES
        np.save(folder / f"{stem}.index.npy", records)
        shards.append(shard_entry(folder, stem))
        first += size
    names = folder / "train.classes.json"
    names.write_text('{"names": [' + ", ".join(f'"{number}"' for number in range(NUM_CLASSES)) + "]}")
    split = {
        "num_classes": NUM_CLASSES, "num_samples": first, "classes": names.name, "sources": [], "shards": shards,
        "classes_sha256": hashlib.sha256(names.read_bytes()).hexdigest(),
    }  # fmt: skip
    write_manifest(folder, {"format": FORMAT, "name": "many", "image_mode": "L", "splits": {"train": split}})
    return folder


def unequal_sizes(num_samples: int, num_shards: int) -> list[int]:
    """Sizes that add up to `num_samples`: some shards are empty, some hold one sample, the largest a good part."""
    cuts = np.sort(np.random.default_rng(1).integers(0, num_samples, num_shards - 3) ** 2 // num_samples)
    sizes = np.diff(np.concatenate([[0], cuts, [num_samples - 1, num_samples - 1, num_samples]])).tolist()
    assert sum(sizes) == num_samples
    return sizes


def _members(numbers: np.ndarray) -> np.ndarray:
    """[n, 2048] uint8, the members of samples with these numbers as keys."""
    image = simplejpeg.encode_jpeg(np.full((8, 8, 1), 99, np.uint8), quality=90, colorspace="GRAY")
    zeros = "0" * _DIGITS
    sample = tar_member(f"{zeros}.jpg", image) + tar_member(f"{zeros}.label", bytes(8))
    assert len(sample) == _SAMPLE_BYTES
    members = np.tile(np.frombuffer(sample, np.uint8), (len(numbers), 1))
    digits = numbers[:, None] // 10 ** np.arange(_DIGITS - 1, -1, -1) % 10
    for start in (0, 1024):
        members[:, start : start + _DIGITS] += digits.astype(np.uint8)
        # Digits raise the checksum by what they add; it is six octal digits, a NUL and a space.
        checksum = int(sample[start + 148 : start + 154], 8) + digits.sum(1)
        octal = checksum[:, None] // 8 ** np.arange(5, -1, -1) % 8
        members[:, start + 148 : start + 154] = octal + ord("0")
    members[:, 1536:1544] = (numbers % NUM_CLASSES).astype("<i8").view(np.uint8).reshape(-1, 8)
    return members


def read_steps(folder: Path, position: int, stop: int, world_size: int, workers: int) -> Iterator[np.ndarray]:
    """The ids [GLOBAL_BATCH_SIZE] of every step from `position` to `stop`, over all ranks, in rank order."""
    options = Dataset(path=folder, image_size=8, channels=1, workers=workers)
    readers = [
        open_reader(
            options, batch_size=GLOBAL_BATCH_SIZE // world_size, accumulation_steps=1, rank=rank, world_size=world_size,
            seed=SEED,
        )
        for rank in range(world_size)
    ]  # fmt: skip
    try:
        batches = []
        for reader in readers:
            reader.seek(position)
            batches.append(iter(reader))
        while position < stop:
            position += GLOBAL_BATCH_SIZE
            step = [next(one) for one in batches]
            assert [batch.position for batch in step] == [position] * world_size
            ids = np.concatenate([batch.ids.numpy() for batch in step])
            # Labels are a function of the id here, so an id cannot stand for another sample's image.
            assert np.array_equal(np.concatenate([batch.labels.numpy() for batch in step]), ids % NUM_CLASSES)
            yield ids
    finally:
        for reader in readers:
            reader.close()


def memory() -> tuple[int, int]:
    """Bytes of memory that this process holds, and the most it has held since `forget_peak`."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmRSS"].split()[0]) * 1024, int(status["VmHWM"].split()[0]) * 1024


def forget_peak() -> None:
    """Let the peak of `memory` begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def _measure(folder: Path) -> None:
    """Print what opening a reader takes and keeps, and the peak while some batches are read, in bytes."""
    options = Dataset(path=folder, image_size=8, channels=1)
    sizes = {"batch_size": 100, "accumulation_steps": 1, "rank": 0, "world_size": 1, "seed": SEED}
    small = open_reader(Dataset(reader="synthetic", image_size=8, channels=1), **sizes)
    next(iter(small))  # what is imported and allocated once is not the samples'
    small.close()
    forget_peak()
    before, _ = memory()
    reader = open_reader(options, **sizes)
    held, peak = memory()
    batches = iter(reader)
    for _ in range(20):
        next(batches)
    print(held - before, peak - before, memory()[1] - before)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        _measure(Path(sys.argv[1]))
    else:
        source, out, *numbers = sys.argv[1:]
        handle = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        with suppress(BrokenPipeError):
            for step_ids in read_steps(Path(source), *map(int, numbers)):
                os.write(handle, step_ids.astype("<i8").tobytes())
