"""Worker processes: same batches, same errors, no process left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import deque
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megaclass.data.batch import Batch
from megaclass.data.options import ReaderOptions
from megaclass.data.reader import BatchReader
from megaclass.errors import DataError
from tests.support.tiny_dataset import write_tiny_dataset
from tests.unit.test_data_indexed import AUGMENT, SIZE, break_image, open_indexed, read

# From Python 3.12 on; the workers neither use CUDA nor wait for a thread of the parent.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*fork:DeprecationWarning", "ignore:This DataLoader will create:UserWarning"
)


def numbered(make: Any = None, workers: int = 2) -> BatchReader:
    """A reader whose batches hold their own position and the process that made them."""

    def batch(position: int) -> Batch:
        if make is not None:
            make(position)
        ids = torch.tensor([position, os.getpid()])
        return Batch(torch.full((2, 1, 8, 8), float(position)), ids, ids, position + 2)

    return BatchReader(
        lambda position: count(position, 2),
        batch,
        two_images(8, 1, workers),
        class_counts=np.array([100]),
        num_samples=100,
    )


def two_images(image_size: int, channels: int, workers: int) -> ReaderOptions:
    return ReaderOptions(
        batch_size=2, rank=0, world_size=1, seed=0, image_size=image_size, channels=channels, workers=workers,
        bad_sample_budget=0,
    )  # fmt: skip


def test_workers_change_no_number(tmp_path: Path) -> None:
    folder = write_tiny_dataset(tmp_path, 15, 4, SIZE, 3)
    break_image(folder)
    options: dict[str, Any] = {"augment": AUGMENT, "on_bad_sample": "skip", "bad_sample_budget": 0.5}
    alone = read(open_indexed(folder, 7, **options), 12, 14)
    reader = open_indexed(folder, 7, workers=2, **options)
    together = read(reader, 12, 14)
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.ids, other.ids)
        assert (one.position, one.skipped) == (other.position, other.skipped)
    # Started again by another seek.
    assert torch.equal(read(reader, 1, 21)[0].ids, alone[1].ids)
    assert not multiprocessing.active_children()


def test_batches_come_from_the_workers_in_order_and_few_are_made_ahead() -> None:
    reader = numbered()
    reader.seek(10)
    iterator = iter(reader)
    batches = [next(iterator) for _ in range(6)]
    assert [int(batch.ids[0]) for batch in batches] == [10, 12, 14, 16, 18, 20]
    workers = {int(batch.ids[1]) for batch in batches}
    assert len(workers) == 2
    assert os.getpid() not in workers
    # The position is that of the batch given out, whatever is ready behind it.
    assert batches[-1].position == 22
    reader.close()
    assert not multiprocessing.active_children()


def test_a_data_error_in_a_worker_is_the_same_error_here(tmp_path: Path) -> None:
    folder = write_tiny_dataset(tmp_path, 15, 4, SIZE, 3)
    break_image(folder)
    messages = []
    for workers in (0, 2):
        with pytest.raises(DataError, match=r"train-000001\.tar, byte \d+, key 'k3': PNG does not decode") as caught:
            read(open_indexed(folder, 7, workers=workers), 10)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert "\n" not in messages[0]
    assert not multiprocessing.active_children()


def test_another_error_in_a_worker_keeps_its_traceback() -> None:
    def fail(position: int) -> None:
        if position == 8:
            raise AssertionError("ours")

    reader = numbered(fail)
    with pytest.raises(AssertionError, match=r"(?s)Traceback.*in fail.*ours"):
        deque(reader, maxlen=0)
    # Although the error still refers to the loader.
    assert not multiprocessing.active_children()


def test_a_worker_that_is_killed_ends_the_iteration() -> None:
    reader = numbered(lambda position: time.sleep(0.05))
    iterator = iter(reader)
    worker = int(next(iterator).ids[1])
    started = time.monotonic()

    def kill_and_go_on() -> None:
        # The loader may raise anywhere from here on: it is told of the death by a signal.
        os.kill(worker, signal.SIGKILL)
        deque(iterator, maxlen=0)

    with pytest.raises(RuntimeError, match="DataLoader worker"):
        kill_and_go_on()
    assert time.monotonic() - started < 20
    reader.close()


def test_workers_outlive_the_signals_of_a_scheduler() -> None:
    reader = numbered()
    iterator = iter(reader)
    workers = {int(next(iterator).ids[1]) for _ in range(2)}
    # From another process than the trainer, as a scheduler would.
    others = [f"kill -{number} {worker}" for number in ("TERM", "INT", "USR1", "HUP") for worker in workers]
    subprocess.run(["sh", "-c", "; ".join(others)], check=True)
    assert {int(next(iterator).ids[1]) for _ in range(20)} == workers
    reader.close()
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("pause", [0.0, 0.002])
def test_images_are_never_those_of_a_later_batch(workers: int, pause: float) -> None:
    """Slots are used again and again; whoever is the slower one, trainer or workers, nothing is written over."""

    def late(position: int) -> None:
        if pause and position % 3 == 0:
            time.sleep(pause)

    reader = numbered(late, workers)
    held = []
    for number, batch in enumerate(reader):
        if number % 5 == 0 and not pause:
            time.sleep(0.005)
        assert batch.images.eq(batch.position - 2).all()
        held.append(batch)
        if number == 60:
            break
    reader.close()
    for batch in held:
        assert batch.images.eq(batch.position - 2).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_layout_and_type_of_images_survive_the_way(workers: int) -> None:
    made: list[torch.Tensor] = [
        torch.arange(2 * 5 * 5 * 3, dtype=torch.uint8).view(2, 5, 5, 3).permute(0, 3, 1, 2),
        torch.randn(2, 3, 5, 5),
    ]
    ids = torch.arange(2)
    reader = BatchReader(
        lambda position: count(position, 2), lambda position: Batch(made[position // 2 % 2], ids, ids, position + 2),
        two_images(5, 3, workers), class_counts=np.array([100]), num_samples=100,
    )  # fmt: skip
    for batch, _ in zip(reader, range(9), strict=False):
        expected = made[(batch.position - 2) // 2 % 2]
        assert batch.images.dtype == expected.dtype
        assert batch.images.stride() == expected.stride()
        assert torch.equal(batch.images, expected)
    reader.close()


TRAINER = """
import sys
from tests.unit.test_data_reader import numbered
iterator = iter(numbered(workers=1))
print(int(next(iterator).ids[1]), flush=True)
sys.stdin.read()
raise RuntimeError("the trainer's own failure")
"""


@pytest.mark.slow
@pytest.mark.parametrize("is_killed", [True, False], ids=["killed", "fails"])
def test_workers_end_with_a_trainer_that_does_not_close(is_killed: bool) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", TRAINER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as trainer:
        assert trainer.stdout is not None
        worker = int(trainer.stdout.readline())
        if is_killed:
            trainer.kill()
        _, faults = trainer.communicate(timeout=30)
    assert is_killed or faults.splitlines()[-1] == "RuntimeError: the trainer's own failure"
    deadline = time.monotonic() + 30
    while _is_running(worker):
        assert time.monotonic() < deadline, "the worker outlives its trainer"
        time.sleep(0.2)


def _is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
