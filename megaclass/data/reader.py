"""The one reader: calls a batch maker for a plan of items, in this process or in workers, in the plan's order.

Separate because the readers differ only in what they plan and how they make a batch from it; workers, errors, pinned
memory, the position and the skip budget are the same for all. Since every batch is made from its item alone, the
number of workers changes no number.

Processes: torch's DataLoader over the plan. Items go out and answers come back through its queues, at most two per
worker ahead; images come back in memory that is shared with the workers from the beginning (`_Slots`). Workers are
forked and touch neither CUDA nor the network; they end with `close`, and by themselves within seconds when the trainer
is killed.
"""

from __future__ import annotations

import mmap
import os
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from megaclass.data.bad_samples import SkipBudget
from megaclass.data.batch import Batch, SkippedSample
from megaclass.data.options import ReaderOptions
from megaclass.errors import DataError, UserError

_BATCHES_AHEAD = 2
_ALIGNMENT = 64


class PositionedReader(ABC):
    """What every reader has of `Reader`: where it stands, and one iteration at a time from there.

    Args:
        class_counts: [num_classes] int64, samples of each class; labels are in [0, num_classes).
        num_samples: of an epoch, over all ranks.
    """

    def __init__(self, class_counts: NDArray[np.int64], num_samples: int) -> None:
        self.num_classes = len(class_counts)
        self.class_counts = class_counts
        self.num_samples = num_samples
        self._position = 0
        self._running: Generator[Batch, None, None] | None = None

    @abstractmethod
    def _batches(self, position: int) -> Generator[Batch, None, None]:
        """Endless batches from a position; closing the generator ends all processes and threads behind it."""

    @abstractmethod
    def _release(self) -> None:
        """Close what was opened in this process; may be called again."""

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the position last given to `seek`; ends an iteration begun before.

        Raises:
            DataError: a sample cannot be used and the policy is `stop`, or the skip budget is spent.
        """
        self.close()
        self._running = self._batches(self._position)
        return self._running

    def seek(self, position: int) -> None:
        """Let the next `iter` start after `position` samples of the one sequence; ends an iteration begun before."""
        assert position >= 0, position
        self.close()
        self._position = position

    def close(self) -> None:
        """End all processes and threads and close the shards; the reader can be iterated again."""
        if self._running is not None:
            self._running.close()
            self._running = None
        self._release()


class BatchReader(PositionedReader):
    """Endless full batches of one rank; implements `Reader`.

    Args:
        plan: position → endless items, one per batch from there on; runs in the trainer's process.
        make: item → batch; a pure function that may run in a worker; raises `UserError` for bad data.
        options: what every reader is told. Without workers, batches are made when they are asked for.
        class_counts: [num_classes] int64, samples of each class; labels are in [0, num_classes).
        num_samples: of an epoch, over all ranks.
        release: closes what `make` opened in this process.
    """

    def __init__(
        self,
        plan: Callable[[int], Iterator[Any]],
        make: Callable[[Any], Batch],
        options: ReaderOptions,
        *,
        class_counts: NDArray[np.int64],
        num_samples: int,
        release: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(class_counts, num_samples)
        self._plan = plan
        self._make = make
        self._workers = options.workers
        self._batch_numbers = options.batch_size * options.channels * options.image_size**2
        self._budget = SkipBudget(options.bad_sample_budget, num_samples, options.world_size)
        self._free = release

    def _release(self) -> None:
        self._free()

    def _batches(self, position: int) -> Generator[Batch, None, None]:
        self._budget.restart()
        slots = _Slots(self._workers, self._batch_numbers * torch.float32.itemsize)
        loader = DataLoader(
            _Calls(self._make, slots),
            sampler=self._plan(position),
            batch_size=None,
            num_workers=self._workers,
            collate_fn=_as_is,
            worker_init_fn=_obey_the_trainer_only,
            multiprocessing_context="fork" if self._workers else None,
            prefetch_factor=_BATCHES_AHEAD if self._workers else None,
            # Without one of its own, the loader would draw a number from the global generator.
            generator=torch.Generator(),
        )
        results: Any = iter(loader)
        try:
            while True:
                result = next(results)
                if isinstance(result, UserError):
                    raise result
                batch = slots.take(result) if isinstance(result, _InSlot) else _pinned(result)
                self._budget.count(len(batch.ids), batch.skipped)
                yield batch
        finally:
            # Left alone, the loader ends its workers when its iterator is collected: late, if an exception refers to
            # it, and then perhaps in a copy of it in the workers of another reader. It has no public way to end them.
            if self._workers:
                results._shutdown_workers()


class _Calls(Dataset[Any]):
    """`make` as a data set: an item is its own index."""

    def __init__(self, make: Callable[[Any], Batch], slots: _Slots) -> None:
        self._make = make
        self._slots = slots

    def __getitem__(self, item: Any) -> Batch | _InSlot | UserError:
        # Errors of the user's travel as values: the loader would wrap them in the text of a traceback.
        try:
            batch = self._make(item)
        except UserError as error:
            return error
        worker = get_worker_info()
        return batch if worker is None else self._slots.put(batch, worker.id)


@dataclass(frozen=True)
class _InSlot:
    """A batch on its way out of a worker: its images lie in a slot, the rest goes through a queue."""

    slot: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    labels: NDArray[np.int64]
    ids: NDArray[np.int64]
    position: int
    skipped: tuple[SkippedSample, ...]
    num_read: int | None


class _Slots:
    """Memory for images that the trainer shares with its workers; made before they are forked.

    Each worker goes round three slots of its own. It is at most two batches ahead of the trainer, and the trainer asks
    for the next batch when it has copied the last one: so no slot is written to before it has been copied. Memory that
    is used again costs no page faults, which are a third of the time of a small image; and being no file, it knows no
    limit of /dev/shm.

    Args:
        workers: that write.
        batch_bytes: of the images of a batch, at most.
    """

    def __init__(self, workers: int, batch_bytes: int) -> None:
        self._slot_bytes = -(-batch_bytes // _ALIGNMENT) * _ALIGNMENT
        self._num_put = 0
        if workers:
            memory = mmap.mmap(-1, workers * (_BATCHES_AHEAD + 1) * self._slot_bytes)
            self._memory = torch.frombuffer(memory, dtype=torch.uint8)

    def put(self, batch: Batch, worker: int) -> _InSlot:
        """Lay the images of a batch down; in the worker."""
        images, labels, ids = batch.images, batch.labels.numpy(), batch.ids.numpy()
        slot = worker * (_BATCHES_AHEAD + 1) + self._num_put % (_BATCHES_AHEAD + 1)
        self._num_put += 1
        there = _InSlot(
            slot,
            images.shape,
            images.stride(),
            images.dtype,
            labels,
            ids,
            batch.position,
            batch.skipped,
            batch.num_read,
        )
        self._images(there).copy_(images)
        return there

    def take(self, there: _InSlot) -> Batch:
        """The batch with a copy of its images; in the trainer."""
        images = torch.empty_strided(
            there.shape, there.stride, dtype=there.dtype, pin_memory=torch.cuda.is_available()
        ).copy_(self._images(there))
        labels, ids = torch.from_numpy(there.labels), torch.from_numpy(there.ids)
        return Batch(images, labels, ids, there.position, there.skipped, there.num_read)

    def _images(self, there: _InSlot) -> Tensor:
        num_bytes = there.shape.numel() * there.dtype.itemsize
        assert num_bytes <= self._slot_bytes, (num_bytes, self._slot_bytes)
        start = there.slot * self._slot_bytes
        return (
            self._memory[start : start + num_bytes]
            .view(there.dtype)
            .as_strided(there.shape, there.stride, start // there.dtype.itemsize)
        )


def _pinned(batch: Batch) -> Batch:
    """The batch with its images where a GPU copies them from in the background, if there is one."""
    return replace(batch, images=batch.images.pin_memory()) if torch.cuda.is_available() else batch


def _as_is(result: Any) -> Any:
    return result


def _obey_the_trainer_only(worker: int) -> None:
    """Make a worker deaf to signals that are not the trainer's.

    Schedulers signal every process of a job; the trainer then saves and stops, and needs its workers until it has.
    SIGTERM from the trainer itself must still end them: it is how they end when the trainer exits on an error.
    """
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    threading.Thread(target=_end_when_the_trainer_says, daemon=True).start()


def _end_when_the_trainer_says() -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)


def check_enough_samples(num_samples: int, options: ReaderOptions, what: str) -> None:
    """`DataError` if an epoch is smaller than a global batch, in which a sample would then stand twice."""
    global_batch_size = options.micro_batch_size * options.accumulation_steps
    if num_samples < global_batch_size:
        raise DataError(
            f"{what} has {num_samples} samples, fewer than train.global_batch_size {global_batch_size}; lower the "
            "batch size or add samples"
        )
