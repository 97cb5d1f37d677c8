"""The line rank 0 shows while training: live in a terminal, one plain line per logged step elsewhere.

Separate from logging because a live line is drawn again and again and must never end in a file.
"""

from __future__ import annotations

import math

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from megaclass.observe.metrics import Snapshot


class ProgressLine:
    """Shows where the run is; on other ranks than 0 it shows nothing.

    Args:
        num_steps: steps of the whole run.
        step: steps already taken by earlier attempts.
        is_main: whether this rank shows anything.
        console: where to; standard output by default.
    """

    def __init__(self, num_steps: int, step: int = 0, is_main: bool = True, console: Console | None = None) -> None:
        self._num_steps = num_steps
        self._console = (console or Console()) if is_main else None
        self._bar: Progress | None = None
        self._task = TaskID(0)
        if self._console is not None and self._console.is_terminal:
            line = TextColumn("{task.completed}/{task.total}  {task.fields[figures]}", markup=False)
            # A narrow terminal has room for the figures alone.
            columns = [BarColumn(bar_width=16), line] if self._console.width >= 130 else [line]
            # Twice a second is plenty, and drawing competes with training for a core.
            self._bar = Progress(*columns, console=self._console, refresh_per_second=2)
            self._task = self._bar.add_task("train", total=num_steps, completed=step, figures="starting")
            self._bar.start()

    def advance(self, step: int) -> None:
        """Move the bar to `step`; reads no values, so it may be called at every step."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def update(self, step: int, snapshot: Snapshot, lr: float) -> None:
        """Show the figures of a logged step."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, figures=figures(snapshot, lr))
        elif self._console is not None:
            width = len(str(self._num_steps))
            print(
                f"step {step:>{width}}/{self._num_steps}  {figures(snapshot, lr)}", file=self._console.file, flush=True
            )

    def close(self) -> None:
        """Leave the last state of the line standing and free the terminal; a second call does nothing."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        self._console = None


def figures(snapshot: Snapshot, lr: float) -> str:
    """The numbers of a step on one line: time left, loss and both terms, positive cosine, speed, data wait, rate."""
    return (
        f"ETA {duration(snapshot.eta_seconds):<7}  "
        f"loss {snapshot.loss:.4f} (intra {snapshot.intra:.4f}, inter {snapshot.inter:.4f})  "
        f"cos {snapshot.positive_cosine:.3f}  {snapshot.samples_per_second:,.0f} samples/s  "
        f"data wait {snapshot.data_wait_share:.0%}  lr {lr:.3g}"
    )


def duration(seconds: float) -> str:
    """A duration for people, in its two largest units: `45s`, `3m 20s`, `2h 05m`, `4d 06h`."""
    if not math.isfinite(seconds) or seconds < 0:
        return "unknown"
    if seconds < 10:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    for size, unit, smaller_size, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size}{unit} {whole % size // smaller_size:02d}{smaller}"
    return f"{whole}s"
