"""The running measurements of a training loop, kept on the device until a step is logged.

Separate from where the numbers go (journal, progress line, Prometheus), so that the loop has one object to feed and a
step that is not logged never waits for the device. Durations come from a monotonic clock, so that a wall clock that
jumps cannot make a rate negative.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Snapshot:
    """Plain numbers about the newest step and about the steps since the snapshot before.

    Attributes:
        loss: loss of the newest step, at the precision the run computes it in.
        intra: its intra term; 0 where the loss has none.
        inter: its inter term.
        positive_cosine: mean cosine of the newest global batch to its own classes, before any margin.
        grad_norm: joint gradient norm of the newest step; None where it was not given.
        monitors: more numbers about the newest step by name (see `classifier.Monitors`); empty where none were given.
        samples: samples trained since this process started, over all ranks.
        samples_per_second: over the steps since the snapshot before, data wait included, evaluations not.
        step_seconds: mean duration of those steps.
        data_wait_seconds: time spent waiting for data in those steps, summed.
        data_wait_share: the same as a share of their duration, in [0, 1].
        head_cpu_seconds: mean processor time per step of this rank's class layer and row update; 0 on a GPU.
        eta_seconds: expected time to the last step, at the pace since the process started, everything included.
    """

    loss: float
    intra: float
    inter: float
    positive_cosine: float
    grad_norm: float | None
    monitors: dict[str, float]
    samples: int
    samples_per_second: float
    step_seconds: float
    data_wait_seconds: float
    data_wait_share: float
    head_cpu_seconds: float
    eta_seconds: float


class StepMeter:
    """Takes what every step yields and makes a `Snapshot` of it when asked.

    Args:
        num_steps: steps this process still has to take; the end that the expected time refers to.
        clock: monotonic seconds; given by tests.
    """

    def __init__(self, num_steps: int, clock: Callable[[], float] = time.monotonic) -> None:
        assert num_steps >= 0
        self._num_steps = num_steps
        self._clock = clock
        self._start = clock()
        self._steps = 0
        self._samples = 0
        self._values: list[Tensor] = []
        self._has_grad_norm = False
        self._monitors: list[str] = []
        self._begin_window()

    def add(
        self,
        *,
        loss: Tensor,
        intra: Tensor,
        inter: Tensor,
        positive_cosine: Tensor,
        samples: int,
        data_wait_seconds: float,
        step_seconds: float,
        head_cpu_seconds: float = 0.0,
        grad_norm: Tensor | None = None,
        monitors: Any = None,
    ) -> None:
        """Note one step without reading anything from the device.

        Args:
            loss: scalar, mean over the global batch, same on every rank.
            intra: scalar, its intra term.
            inter: scalar, its inter term.
            positive_cosine: any shape; its mean is reported.
            samples: samples of the step over all ranks.
            data_wait_seconds: how long the step waited for its data.
            step_seconds: duration of the whole step, the wait included.
            head_cpu_seconds: processor time of the class layer and the row update.
            grad_norm: scalar, joint gradient norm before clipping.
            monitors: a dataclass of further scalars, in the steps that have them.
        """
        self._values = [loss, intra, inter, positive_cosine, *([] if grad_norm is None else [grad_norm])]
        self._monitors = [] if monitors is None else [row.name for row in fields(monitors)]
        self._values = [value.detach() for value in [*self._values, *(getattr(monitors, x) for x in self._monitors)]]
        self._has_grad_norm = grad_norm is not None
        self._steps += 1
        self._samples += samples
        self._window_steps += 1
        self._window_samples += samples
        self._window_wait += data_wait_seconds
        self._window_seconds += step_seconds
        self._window_head += head_cpu_seconds

    def snapshot(self) -> Snapshot:
        """The newest step and the steps since the last call as plain numbers; then a new window begins.

        Cost: waits once for the device, to read one packed vector.
        """
        assert self._window_steps > 0, "a snapshot needs a step since the one before"
        # One stacked read instead of many: each read of its own would wait for the device.
        packed = torch.stack([value.to(torch.float64).mean() for value in self._values]).tolist()
        elapsed = max(self._clock() - self._start, 0.0)
        seconds = self._window_seconds
        made = Snapshot(
            loss=packed[0],
            intra=packed[1],
            inter=packed[2],
            positive_cosine=packed[3],
            grad_norm=packed[4] if self._has_grad_norm else None,
            monitors=dict(zip(self._monitors, packed[len(packed) - len(self._monitors) :], strict=True)),
            samples=self._samples,
            samples_per_second=self._window_samples / seconds if seconds > 0 else 0.0,
            step_seconds=seconds / self._window_steps,
            data_wait_seconds=self._window_wait,
            data_wait_share=min(self._window_wait / seconds, 1.0) if seconds > 0 else 0.0,
            head_cpu_seconds=self._window_head / self._window_steps,
            eta_seconds=elapsed / self._steps * max(self._num_steps - self._steps, 0),
        )
        self._begin_window()
        return made

    def _begin_window(self) -> None:
        self._window_steps = 0
        self._window_samples = 0
        self._window_wait = 0.0
        self._window_seconds = 0.0
        self._window_head = 0.0
