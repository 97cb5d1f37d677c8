"""Class rows in the host's memory, and the few of them that the device works on: so the host bounds the class count.

The host holds all rows of this rank and the state of their optimizer. A step works on a `Part`: the entries of the
classes that it needs, copied to the device, updated there and written back. Two copies run beside the step in one
background thread, in the order in which they were asked for:

    reading ahead   the drawn classes of the next pass, known from the counter of draws before their labels are
    writing back    what the last step changed

What was read ahead may be older than the last step's update, so `load` takes every entry from the newest place that has
it: this step's part, the last step's, what was read ahead, and the host for what nobody expected (the batch's own
classes). Reading ahead is queued behind the writing back of all steps before the running one; so once it has arrived,
the host itself is behind by the last step at most, and that step's part is still on the device.

The result is that of rows on the device, to the bit. Separate from the class layer, which sees a matrix of rows and
not where it came from.

On CUDA the copies go through pinned buffers of `_STAGE_BYTES`, two for each direction, on a stream of their own; the
rows themselves need not be pinned, as the processor gathers them. Nothing here is ever of the size of all rows.

Source: double-buffered rows beside a large table on the host as in recommender systems (Mudigere et al., arXiv
    2104.05158); that rows of two steps in a row must be passed on inside the device is ours to say.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megaclass.kernels.interface import rows_of
from megaclass.kernels.row_gradient import RowGradient, found

_STAGE_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Part:
    """The entries of some classes on the device.

    Attributes:
        classes: [k] int64, unique and sorted local classes; on the host.
        entries: by name, [k, rows_per_class, ...] what the host holds of each class.
        arrived: a CUDA event after which the entries can be read; None where they can be at once.
    """

    classes: Tensor
    entries: dict[str, Tensor]
    arrived: Any = None


class HostRows:
    """Entries of all classes of a shard in the host's memory, brought to the device part by part.

    Args:
        tensors: by name, [classes * rows_per_class, ...] on the host; written to in place.
        rows_per_class: sub-centres.
        device: that the parts are on.

    Attributes:
        now: the part that this step works on; None before the first `load` of a step.
    """

    def __init__(self, tensors: dict[str, Tensor], rows_per_class: int, device: torch.device) -> None:
        lengths = {len(tensor) for tensor in tensors.values()}
        assert len(lengths) == 1, lengths
        num_classes = lengths.pop() // rows_per_class
        self._tensors = {
            name: tensor.view(num_classes, rows_per_class, *tensor.shape[1:]) for name, tensor in tensors.items()
        }
        self._rows_per_class = rows_per_class
        self._device = device
        self.now: Part | None = None
        self._numbers = torch.empty(0, dtype=torch.int64, device=device)
        self._last: Part | None = None
        self._ahead: Future[Part] | None = None
        self._written: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="host-rows")
        self._copies = _Copies(device)
        self._missed = _Copies(device)

    def load(self, classes: Tensor) -> Part:
        """The part of this step, from here on with the entries of `classes` [n] int64 (unique, sorted, on the host).

        Waits for what was read ahead. Cost: what was not is read now; every entry of the part is copied once on the
        device.
        """
        ahead, self._ahead = (None, None) if self._ahead is None else (self._ahead.result(), None)
        if ahead is not None:
            self._copies.wait_for(ahead)
        else:
            self._wait_for_writing()
        needed = classes if self.now is None else torch.unique(torch.cat([classes, self.now.classes]))
        places = torch.arange(len(needed))
        entries = {
            name: torch.empty(len(needed), *tensor.shape[1:], dtype=tensor.dtype, device=self._device)
            for name, tensor in self._tensors.items()
        }
        for source in (self.now, self._last, ahead):
            if source is None:
                continue
            position, is_there = found(needed[places], source.classes)
            into, out_of = places[is_there].to(self._device), position[is_there].to(self._device)
            for name, target in entries.items():
                target[into] = source.entries[name][out_of]
            places = places[~is_there]
        if len(places):
            missed = self._missed.read(self._tensors, needed[places])
            self._missed.wait_for(missed)
            into = places.to(self._device)
            for name, target in entries.items():
                target[into] = missed.entries[name]
        self._last, self.now = None, Part(needed, entries)
        self._numbers = rows_of(needed.to(self._device), self._rows_per_class)
        return self.now

    def read_ahead(self, classes: Tensor) -> None:
        """Begin to bring the entries of `classes` [n] (unique, sorted, on the host) for the next `load`."""
        assert self._ahead is None
        self._ahead = self._thread.submit(self._copies.read, self._tensors, classes)

    def write_back(self) -> None:
        """End the step: its part goes back to the host, beside what follows. Raises what an earlier copy met."""
        assert self.now is not None
        self._wait_for_writing()
        self._last, self.now = self.now, None
        changed = Part(self._last.classes, self._last.entries, _event(self._device))
        self._written = self._thread.submit(self._copies.write, self._tensors, changed)

    def forget(self) -> None:
        """End a step that changed nothing."""
        self.now = self._last = None

    def flush(self) -> None:
        """Wait until the host has everything; what was read ahead stays."""
        self._wait_for_writing()

    def close(self) -> None:
        """Wait for the background thread and end it."""
        self._thread.shutdown()

    def places(self, classes: Tensor) -> Tensor:
        """Where local classes [n] on the host stand in this step's part, [n] on the device; -1 stays -1."""
        assert self.now is not None
        position, is_there = found(classes, self.now.classes)
        assert bool((is_there | (classes < 0)).all()), "a class that was not loaded"
        return torch.where(is_there, position, -1).to(self._device)

    def in_shard(self, gradient: RowGradient) -> RowGradient:
        """A gradient of rows of this step's part as one of rows of the shard."""
        assert self.now is not None
        assert gradient.rows is not None
        return RowGradient(self.numbers[gradient.rows], gradient.values)

    @property
    def numbers(self) -> Tensor:
        """Which rows of the shard this step's rows are, [k * rows_per_class] int64 on the device."""
        assert self.now is not None
        return self._numbers

    def _wait_for_writing(self) -> None:
        written, self._written = self._written, None
        if written is not None:
            written.result()


class _Copies:
    """Copies between the host's tensors and parts; on CUDA through two pinned buffers on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._stages: dict[str, list[tuple[Tensor, Any]]] = {}

    @torch.no_grad()
    def read(self, tensors: dict[str, Tensor], classes: Tensor) -> Part:
        """The entries of `classes` on the device; on CUDA under way when this returns."""
        if self._stream is None:
            return Part(classes, {name: tensor[classes] for name, tensor in tensors.items()})
        entries = {}
        with torch.cuda.stream(self._stream):
            for name, tensor in tensors.items():
                target = torch.empty(len(classes), *tensor.shape[1:], dtype=tensor.dtype, device=self._device)
                for start, stop, stage, is_free in self._through(f"read {name}", tensor, len(classes)):
                    is_free.synchronize()
                    torch.index_select(tensor, 0, classes[start:stop], out=stage)
                    target[start:stop].copy_(stage, non_blocking=True)
                    is_free.record(self._stream)
                entries[name] = target
            return Part(classes, entries, _event(self._device))

    @torch.no_grad()
    def write(self, tensors: dict[str, Tensor], part: Part) -> None:
        """Put a part's entries into the host's tensors."""
        if self._stream is not None:
            self._stream.wait_event(part.arrived)
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            for name, tensor in tensors.items():
                source = part.entries[name]
                if self._stream is None:
                    # Indexing and not index_copy_, which takes twice as long on the CPU.
                    tensor[part.classes] = source
                    continue
                # The next piece travels while the processor puts this one in its places.
                waiting: list[tuple[int, int, Tensor, Any]] = []
                for start, stop, stage, has_come in self._through(f"write {name}", tensor, len(part.classes)):
                    stage.copy_(source[start:stop], non_blocking=True)
                    has_come.record(self._stream)
                    waiting.append((start, stop, stage, has_come))
                    if len(waiting) == 2:
                        _put(tensor, part.classes, *waiting.pop(0))
                for piece in waiting:
                    _put(tensor, part.classes, *piece)
                source.record_stream(self._stream)

    def wait_for(self, part: Part) -> None:
        """Let the device's own stream wait for a part that is under way."""
        if part.arrived is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(part.arrived)
            for entry in part.entries.values():
                entry.record_stream(stream)

    def _through(self, what: str, tensor: Tensor, length: int) -> Iterator[tuple[int, int, Tensor, Any]]:
        """Pieces of [length, ...]: start, stop, a pinned buffer of that size, the event of the buffer's last use."""
        rows = max(1, _STAGE_BYTES // max(1, tensor[:1].numel() * tensor.element_size()))
        if what not in self._stages:
            shape = (min(rows, len(tensor)), *tensor.shape[1:])
            self._stages[what] = [(_pinned(shape, tensor.dtype), torch.cuda.Event()) for _ in range(2)]
        for number, start in enumerate(range(0, length, rows)):
            stop = min(start + rows, length)
            stage, event = self._stages[what][number % 2]
            yield start, stop, stage[: stop - start], event


def _pinned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, pin_memory=True)


def _put(tensor: Tensor, classes: Tensor, start: int, stop: int, stage: Tensor, has_come: Any) -> None:
    has_come.synchronize()
    tensor[classes[start:stop]] = stage


def _event(device: torch.device) -> Any:
    """An event at the end of the current stream's work; None on the CPU."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event
