"""The one reader: calls a batch maker for a plan of items, in this process or in workers, in the plan's order.

Separate because the readers differ only in what they plan and how they make a batch from it; workers, errors, pinned
memory, the position and the skip budget are the same for all. Since every batch is made from its item alone, the
number of workers changes no number.

Processes: torch's DataLoader over the plan. Items go out and finished batches come back through its queues, at most
two per worker ahead. Workers are forked and touch neither CUDA nor the network; they end with `close`, and by
themselves within seconds when the trainer is killed.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from megaclass.data.bad_samples import SkipBudget
from megaclass.data.batch import Batch
from megaclass.errors import DataError, UserError

_BATCHES_AHEAD = 2


class BatchReader:
    """Endless full batches of one rank; implements `Reader`.

    Args:
        plan: position → endless items, one per batch from there on; runs in the trainer's process.
        make: item → batch; a pure function that may run in a worker; raises `UserError` for bad data.
        class_counts: [num_classes] int64, samples of each class; labels are in [0, num_classes).
        num_samples: of an epoch, over all ranks.
        workers: decoding processes; 0 makes the batches in the trainer's process when they are asked for.
        budget: what may be skipped.
        release: closes what `make` opened in this process.
    """

    def __init__(
        self,
        plan: Callable[[int], Iterator[Any]],
        make: Callable[[Any], Batch],
        *,
        class_counts: NDArray[np.int64],
        num_samples: int,
        workers: int,
        budget: SkipBudget,
        release: Callable[[], None] = lambda: None,
    ) -> None:
        self.num_classes = len(class_counts)
        self.class_counts = class_counts
        self.num_samples = num_samples
        self._plan = plan
        self._make = make
        self._workers = workers
        self._budget = budget
        self._release = release
        self._position = 0
        self._running: Generator[Batch, None, None] | None = None

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
        """End the workers and close the shards; the reader can be iterated again."""
        if self._running is not None:
            self._running.close()
            self._running = None
        self._release()

    def _batches(self, position: int) -> Generator[Batch, None, None]:
        self._budget.restart()
        loader = DataLoader(
            _Calls(self._make),
            sampler=self._plan(position),
            batch_size=None,
            num_workers=self._workers,
            collate_fn=_as_is,
            worker_init_fn=_obey_the_trainer_only,
            multiprocessing_context="fork" if self._workers else None,
            prefetch_factor=_BATCHES_AHEAD if self._workers else None,
            pin_memory=torch.cuda.is_available(),
            # Without one of its own, the loader would draw a number from the global generator.
            generator=torch.Generator(),
        )
        results: Any = iter(loader)
        try:
            while True:
                result = next(results)
                if isinstance(result, UserError):
                    raise result
                tensors, position, skipped, num_read = result
                images, labels, ids = tensors
                self._budget.count(len(ids), skipped)
                yield Batch(images, labels, ids, position, tuple(skipped), num_read)
        finally:
            # Left alone, the loader ends its workers when its iterator is collected: late, if an exception refers to
            # it, and then perhaps in a copy of it in the workers of another reader. It has no public way to end them.
            if self._workers:
                results._shutdown_workers()


class _Calls(Dataset[Any]):
    """`make` as a data set: an item is its own index."""

    def __init__(self, make: Callable[[Any], Batch]) -> None:
        self._make = make

    def __getitem__(self, item: Any) -> Any:
        # Errors of the user's travel as values: the loader would wrap them in the text of a traceback.
        try:
            batch = self._make(item)
        except UserError as error:
            return error
        images = batch.images if get_worker_info() is None else _shared(batch.images)
        return (images, batch.labels, batch.ids), batch.position, batch.skipped, batch.num_read


def _shared(tensor: Tensor) -> Tensor:
    """A copy in memory that processes share, of the same layout; half the time of `share_memory_` on a large tensor."""
    assert tensor.untyped_storage().nbytes() == tensor.nbytes, "a view would take its holes along"
    storage = torch.UntypedStorage._new_shared(tensor.nbytes)
    shared = torch.empty(0, dtype=tensor.dtype).set_(storage, 0, tensor.shape, tensor.stride())
    return shared.copy_(tensor)


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


def check_enough_samples(
    num_samples: int, batch_size: int, world_size: int, accumulation_steps: int, what: str
) -> None:
    """`DataError` if an epoch is smaller than a global batch, in which a sample would then stand twice."""
    global_batch_size = batch_size * world_size * accumulation_steps
    if num_samples < global_batch_size:
        raise DataError(
            f"{what} has {num_samples} samples, fewer than train.global_batch_size {global_batch_size}; lower the "
            "batch size or add samples"
        )
