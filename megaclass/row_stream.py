"""`RowStream`: a CUDA stream for the class-row pass, beside the one that everything else of a step runs on.

The class-row pass needs nothing of the backbone's backward pass and gives nothing to it, so the two may run at once:
the row pass fills what the other leaves idle, above all while gradients travel. It sends nothing itself. All
collectives are started by the host in the order of the program, the same on every rank, so one communicator serves for
all of them and no two can cross.

Separate because what keeps memory safe between two streams is all here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class RowStream:
    """The second stream of a device.

    Torch's allocator hands memory that was freed to the stream it came from at once, whatever other streams still do
    with it. So what the row pass reads is held until `join`, after which the first stream does nothing before the
    second is done; and what the row pass makes comes from the second stream, which waits for the first in `beside`.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._held: list[object] = []

    @contextmanager
    def beside(self, *inputs: object) -> Iterator[None]:
        """A block whose work is queued on the second stream, behind what the current one has been given before.

        Args:
            inputs: everything that holds tensors which the block reads.
        """
        self._held.append(inputs)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """Let the current stream wait for all blocks so far; what they made may be used after it."""
        if self._held:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
            self._held.clear()
