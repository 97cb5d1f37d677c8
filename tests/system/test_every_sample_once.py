"""Very many samples in shards of unequal size: each id exactly once per epoch, whoever reads, also after a SIGKILL.

100,000 samples in `make test`, a million in `make test-full` (10 passes, about ten minutes, 2 GB of disk).
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from megaclass.prepare.verify import verify
from tests.support.many_samples import GLOBAL_BATCH_SIZE, read_steps, unequal_sizes, write_many

SMALL, MILLION = 100_000, 1_000_000
SIZES = [
    pytest.param(SMALL, marks=[pytest.mark.slow, pytest.mark.timeout(900)]),
    pytest.param(MILLION, marks=[pytest.mark.full, pytest.mark.timeout(7200)]),
]


@pytest.fixture(scope="module", params=SIZES)
def data(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int]]:
    folder = write_many(tmp_path_factory.mktemp("many"), unequal_sizes(request.param, 37))
    yield folder, request.param
    for path in folder.iterdir():
        path.unlink()


def assert_once_per_epoch(ids: np.ndarray, num_samples: int) -> None:
    assert len(ids) >= num_samples
    for start in range(0, len(ids), num_samples):
        epoch = ids[start : start + num_samples]
        counts = np.bincount(epoch, minlength=num_samples)
        assert len(counts) == num_samples
        assert counts.max() == 1
        assert counts.min() == 1 or len(epoch) < num_samples


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_each_id_once_and_in_the_same_order_on_all_worlds_and_workers(data: tuple[Path, int]) -> None:
    folder, num_samples = data
    expected = None
    for world_size in (1, 2, 3, 4):
        for workers in (0, 2):
            ids = np.concatenate(list(read_steps(folder, 0, num_samples, world_size, workers)))
            if expected is None:
                assert_once_per_epoch(ids, num_samples)
                assert not np.array_equal(ids[:num_samples], np.arange(num_samples))
                expected = ids
            assert np.array_equal(ids, expected), (world_size, workers)


def test_killed_and_resumed_at_other_world_sizes(data: tuple[Path, int], tmp_path: Path) -> None:
    """Two epochs in five pieces; every piece but the last ends by SIGKILL, wherever the process is at that moment."""
    folder, num_samples = data
    seed = random.randrange(2**32)
    print("seed of the kills:", seed)
    chance = random.Random(seed)
    kills = sorted(chance.sample(range(GLOBAL_BATCH_SIZE, 2 * num_samples - 20 * GLOBAL_BATCH_SIZE), 4))
    position, pieces = 0, []
    for number, (world_size, workers) in enumerate([(3, 2), (1, 0), (4, 2), (2, 0), (3, 2)]):
        out = tmp_path / f"piece-{number}"
        kill_at = kills[number] if number < len(kills) else None
        run_until(folder, out, position, 2 * num_samples, world_size, workers, kill_at, chance)
        raw = out.read_bytes()
        # A step that was cut off while it was noted does not count as consumed.
        whole = len(raw) // (8 * GLOBAL_BATCH_SIZE) * GLOBAL_BATCH_SIZE
        pieces.append(np.frombuffer(raw, "<i8", whole))
        position += whole
    assert all(len(piece) for piece in pieces[1:])
    ids = np.concatenate(pieces)
    assert_once_per_epoch(ids, num_samples)
    straight = np.concatenate(list(read_steps(folder, 0, 5 * GLOBAL_BATCH_SIZE, 2, 0)))
    assert np.array_equal(ids[: len(straight)], straight)


def run_until(
    folder: Path, out: Path, position: int, stop: int, world_size: int, workers: int, kill_at: int | None,
    chance: random.Random,
) -> None:  # fmt: skip
    arguments = [str(number) for number in (position, stop, world_size, workers)]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.many_samples", str(folder), str(out), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,  # workers that lose their trainer in the middle of a message say so
    )
    if kill_at is None:
        assert process.wait(timeout=3600) == 0
        return
    try:
        wanted = max(kill_at - position, GLOBAL_BATCH_SIZE) * 8
        while not (out.exists() and out.stat().st_size >= wanted):
            assert process.poll() is None, "the reader ended before it was to be killed"
            time.sleep(0.002)
        time.sleep(chance.random() * 0.05)
    finally:
        process.kill()
        assert process.wait(timeout=60) == -signal.SIGKILL


def test_memory_per_sample(data: tuple[Path, int]) -> None:
    """28 bytes a sample are kept, and opening needs little more: the largest shard once again, and sums by class."""
    folder, num_samples = data
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.many_samples", str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    held, peak_opening, peak_reading = map(int, done.stdout.split())
    print(f"{num_samples} samples: {held / num_samples:.1f} bytes each kept, {peak_opening / num_samples:.1f} at most")
    slack = 4 << 20  # pages that the allocator keeps, buffers of one batch
    assert held <= 28 * num_samples + slack
    assert peak_opening <= 40 * num_samples + slack
    assert peak_reading <= 40 * num_samples + slack


def test_what_is_written_quickly_is_a_data_set(tmp_path: Path) -> None:
    folder = write_many(tmp_path / "few", unequal_sizes(500, 7))
    report = verify(folder)
    assert report.faults == []
    assert report.splits["train"]["num_samples"] == 500
