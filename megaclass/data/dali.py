"""The default reader's samples in the default reader's order, decoded and augmented by NVIDIA DALI.

Separate from `indexed.py` because here threads read and DALI decodes, in the trainer's process and on its GPU where
there is one, instead of forked workers. What is read, the order, positions, labels, random numbers, bad samples and
substitutes are the same; pixels are equal within the tolerance that docs/data.md states.

Threads: `dataset.workers` of DALI's decode, and as many of ours, up to eight, read and judge files, each a batch at a
time. At most one batch more than these are read ahead, and two are under way in DALI. A batch's position travels with
it, so what was read ahead is never part of the state. No process is forked: a fork would copy DALI's locks without the
threads that release them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue

import torch

from megaclass.data.bad_samples import SkipBudget
from megaclass.data.batch import Batch
from megaclass.data.dali_input import DaliInput, InputMaker
from megaclass.data.dali_pipeline import BATCHES_AHEAD, DaliPipeline, Form, check_installed
from megaclass.data.label_noise import with_label_noise
from megaclass.data.open_batches import open_batches
from megaclass.data.open_order import OrderOptions
from megaclass.data.options import ReaderOptions
from megaclass.data.reader import PositionedReader
from megaclass.data.samples import StoredSamples

_MAX_READING_THREADS = 8
_CPU = torch.device("cpu")


class DaliReader(PositionedReader):
    """Batches of a split through DALI; implements `Reader` with the order and promises of `IndexedReader`.

    A batch with a bad sample, and one that DALI rejects, is made by the default reader's code: it names the sample, or
    replaces it by the same substitute.

    Args:
        options: what every reader is told; `workers` are threads that decode, and 0 is as 1.
        device: where the images of a batch lie; on a CUDA device it also decodes and augments them.
        others: as for `IndexedReader`.

    Raises:
        ConfigError: DALI is not installed or cannot run on the device; and as for `IndexedReader`.
        DataError: as for `IndexedReader`.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        options: ReaderOptions,
        *,
        order: OrderOptions | None = None,
        num_classes: int | None = None,
        label_noise: float = 0.0,
        device: torch.device = _CPU,
    ) -> None:
        check_installed()
        samples = StoredSamples(
            folder, split, image_size=options.image_size, channels=options.channels, num_classes=num_classes
        )
        # One order for all threads: it may hold numbers of every sample.
        batches = open_batches(
            samples,
            options,
            num_classes=samples.num_classes,
            shard_sizes=samples.shard_sizes,
            true_labels=lambda: samples.labels,
            label_noise=label_noise,
            order=order,
            what=f"split {split!r} of {folder}",
        )
        super().__init__(samples.class_counts, samples.num_samples)
        self._device = device
        self._num_decoding = max(1, options.workers)
        num_reading = min(self._num_decoding, _MAX_READING_THREADS)
        self._plan = batches.plan
        self._makers = []
        for _ in range(num_reading):
            own = samples.twin(num_reading)
            ordered = replace(batches, samples=with_label_noise(own, own.num_classes, label_noise, options.seed))
            self._makers.append(InputMaker(own, ordered, device.type == "cuda"))
        self._budget = SkipBudget(options.bad_sample_budget, samples.num_samples, options.world_size)

    def _release(self) -> None:
        for maker in self._makers:
            maker.samples.close()

    def _batches(self, position: int) -> Generator[Batch, None, None]:
        self._budget.restart()
        decoding = _Decoding(self._makers, self._device, self._num_decoding)
        try:
            for start in self._plan(position):
                while decoding.is_full:
                    batch = decoding.next_batch()
                    self._budget.count(len(batch.ids), batch.skipped)
                    yield batch
                decoding.ask(start)
        finally:
            decoding.close()


@dataclass(frozen=True)
class _UnderWay:
    """A batch that was read: in a pipeline, or (None) finished or failed without one."""

    made: Future[DaliInput | Batch]
    pipeline: DaliPipeline | None


class _Decoding:
    """The batches of one iteration, between their positions and the trainer, in order."""

    def __init__(self, makers: list[InputMaker], device: torch.device, num_threads: int) -> None:
        self._device, self._num_threads = device, num_threads
        self._free: SimpleQueue[InputMaker] = SimpleQueue()
        for maker in makers:
            self._free.put(maker)
        self._threads = ThreadPoolExecutor(len(makers), thread_name_prefix="dali-reading")
        self._max_reading = len(makers) + 1
        self._reading: deque[Future[DaliInput | Batch]] = deque()
        self._under_way: deque[_UnderWay] = deque()
        self._pipelines: dict[Form, DaliPipeline] = {}

    @property
    def is_full(self) -> bool:
        """Whether enough is asked for: a batch has to be taken before the next `ask`."""
        return len(self._reading) >= self._max_reading

    def ask(self, position: int) -> None:
        """Let the batch at a position be read."""
        assert not self.is_full
        self._reading.append(self._threads.submit(self._read, position))

    def next_batch(self) -> Batch:
        """The batch asked for first; `DataError` for a bad sample in it."""
        self._start()
        first = self._under_way.popleft()
        made = first.made.result()
        if isinstance(made, Batch):
            batch = made.to(self._device)
        else:
            assert first.pipeline is not None
            try:
                images = first.pipeline.take()
            except RuntimeError:
                batch = self._rejected(made)
            else:
                batch = self._finished(made, images)
        self._start(is_waiting=False)
        return batch

    def close(self) -> None:
        """End the threads and the pipelines."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._close_pipelines()

    def _read(self, position: int) -> DaliInput | Batch:
        with self._maker() as maker:
            return maker.make(position)

    @contextmanager
    def _maker(self) -> Iterator[InputMaker]:
        maker = self._free.get()
        try:
            yield maker
        finally:
            self._free.put(maker)

    def _start(self, is_waiting: bool = True) -> None:
        """Hand what has been read to DALI, as far as it takes it; wait for the first if nothing is under way."""
        while self._reading and len(self._under_way) < BATCHES_AHEAD:
            is_needed = is_waiting and not self._under_way
            if not is_needed and not self._reading[0].done():
                return
            made = self._reading.popleft()
            # An error is raised when its turn comes.
            self._under_way.append(_UnderWay(made, None if made.exception() else self._fed(made.result())))

    def _fed(self, made: DaliInput | Batch) -> DaliPipeline | None:
        if isinstance(made, Batch):
            return None
        if made.form not in self._pipelines:
            self._pipelines[made.form] = DaliPipeline(made.form, self._device, self._num_threads)
        self._pipelines[made.form].feed(made.feeds)
        return self._pipelines[made.form]

    def _finished(self, made: DaliInput, images: torch.Tensor) -> Batch:
        labels = torch.from_numpy(made.labels)
        if self._device.type == "cuda":
            labels = labels.pin_memory().to(self._device, non_blocking=True)
        return Batch(images, labels, torch.from_numpy(made.ids), made.end, (), len(made.ids))

    def _rejected(self, made: DaliInput) -> Batch:
        """A batch that DALI did not decode, by the default reader's code; what else is under way is fed again.

        Where that finds no fault with any sample, its decoders do the decoding and DALI the rest. If DALI fails even
        then, no sample is to blame, and its error goes on.
        """
        self._close_pipelines()
        with self._maker() as maker:
            batch = maker.ordered.make(made.position)
            if batch.skipped:
                batch = batch.to(self._device)
            else:
                decoded = maker.make_decoded(made.position)
        if not batch.skipped:
            pipeline = self._fed(decoded)
            assert pipeline is not None
            batch = self._finished(decoded, pipeline.take())
        self._under_way = deque(
            _UnderWay(other.made, other.pipeline and self._fed(other.made.result())) for other in self._under_way
        )
        return batch

    def _close_pipelines(self) -> None:
        for pipeline in self._pipelines.values():
            pipeline.close()
        self._pipelines.clear()
