"""What a profiler's trace of one rank says: seconds of every part of a step, and the share of communication hidden.

Pure but for `read`. The definitions, in which a *set* is a set of moments within the profiled steps:

- **communication**: the set of moments at which at least one collective runs. On a GPU that is an NCCL kernel on its
  stream, on a CPU the thread of gloo's that carries the collective out. Waiting for a rank that comes late is part of
  it, as it is part of the step; a collective that waits for one of gloo's threads does not run yet.
- **compute**: the set of moments at which this rank calculates. On a GPU a kernel, copy or fill that is not NCCL's, on
  any stream; on a CPU an operator (`aten::...`) of the thread that takes the steps. What the interpreter does between
  two operators counts as neither.
- **hidden**: what is in both sets. The *share of communication hidden* is its length over that of the communication.

A collective is of the kind of the part that started it, so a kind may be hidden behind a later part. Those that
the backbone's backward pass starts itself are the reduction of its gradients.
"""

from __future__ import annotations

import gzip
import json
from bisect import bisect_left
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megaclass.errors import DataError
from megaclass.marks import PARTS, PREFIX, STEP
from megaclass.observe.intervals import Interval, Segment, innermost, intersection, length, name_at, union

# Collectives that no part of ours starts: those of whatever replicates the backbone.
KINDS = {"backbone backward": "gradient reduction", "backbone forward": "backbone parameters"}
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCHES = ("cuda_runtime", "cuda_driver")


@dataclass(frozen=True)
class Communication:
    """Seconds a step of the collectives of one kind, or of all, and of what of it is hidden."""

    seconds: float
    hidden_seconds: float

    @property
    def hidden_share(self) -> float | None:
        """From 0 to 1; None without communication."""
        return self.hidden_seconds / self.seconds if self.seconds else None


@dataclass(frozen=True)
class Timeline:
    """One rank's profiled steps; all seconds are means over them.

    Attributes:
        rank: whose.
        num_steps: profiled.
        step_seconds: of a whole step.
        compute_seconds: in which the rank calculates.
        host_seconds: by part, of the processes' own time, that of the parts inside of a part left out.
        device_seconds: by part, in which kernels that it started run; empty on a CPU.
        communication: all of it.
        kinds: by kind; kinds may run at the same time.
    """

    rank: int
    num_steps: int
    step_seconds: float
    compute_seconds: float
    host_seconds: dict[str, float]
    device_seconds: dict[str, float]
    communication: Communication
    kinds: dict[str, Communication] = field(default_factory=dict)


def read(path: Path) -> dict[str, Any]:
    """The trace of a file that the torch profiler has written, JSON or compressed JSON.

    Raises:
        DataError: it cannot be read, or is no trace.
    """
    try:
        raw = path.read_bytes()
        content = json.loads(gzip.decompress(raw) if path.suffix == ".gz" else raw)
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"trace {path} cannot be read: {error}; profile the run again with run.profile") from None
    if not isinstance(content, dict) or not isinstance(content.get("traceEvents"), list):
        raise DataError(f"trace {path} has no list traceEvents; give a trace that run.profile has written")
    return content


def summarise(trace: dict[str, Any], rank: int) -> Timeline:
    """The timeline of a trace with the marks of `megaclass.marks`.

    Raises:
        DataError: it holds no step.
    """
    events = [_Event.of(event) for event in trace["traceEvents"] if event.get("ph") == "X"]
    marks = [event for event in events if event.category == "user_annotation" and event.name.startswith(PREFIX)]
    steps = [event for event in marks if event.name == PREFIX + STEP]
    if not steps:
        raise DataError(f"the trace of rank {rank} holds no step; profile the run again with run.profile")
    window, num_steps = union(event.span for event in steps), len(steps)
    parts = innermost(Segment(*event.span, event.name.removeprefix(PREFIX)) for event in marks if event not in steps)
    kernels = [event for event in events if event.category in _ON_DEVICE]
    launched = _launch_moments(events)
    if kernels:
        sent = [(event, launched.get(event.correlation)) for event in kernels if event.is_nccl]
        compute = union(event.span for event in kernels if not event.is_nccl)
    else:
        sent = _of_gloo(events)
        threads = {event.thread for event in steps}
        is_own = [event for event in events if event.category == "cpu_op" and event.thread in threads]
        compute = union(event.span for event in is_own if event.name.startswith("aten::"))
    compute = intersection(compute, window)
    by_kind: dict[str, list[Interval]] = {}
    for event, moment in sent:
        starter = None if moment is None else name_at(parts, moment)
        by_kind.setdefault(KINDS.get(starter or "", starter or "other"), []).append(event.span)
    on_device: dict[str, list[Interval]] = {}
    for event in kernels:
        starter = name_at(parts, launched.get(event.correlation, -1.0))
        on_device.setdefault(starter or "other", []).append(event.span)

    def seconds(intervals: list[Interval]) -> float:
        return length(intersection(union(intervals), window)) / num_steps / 1e6

    def communication(intervals: list[Interval]) -> Communication:
        return Communication(seconds(intervals), seconds(intersection(union(intervals), compute)))

    return Timeline(
        rank=rank,
        num_steps=num_steps,
        step_seconds=length(window) / num_steps / 1e6,
        compute_seconds=seconds(compute),
        host_seconds={
            name: seconds([(one.start, one.stop) for one in parts if one.name == name])
            for name in PARTS
            if any(one.name == name for one in parts)
        },
        device_seconds={name: seconds(on_device[name]) for name in (*PARTS, "other") if name in on_device},
        communication=communication([span for spans in by_kind.values() for span in spans]),
        kinds={name: communication(spans) for name, spans in by_kind.items()},
    )


@dataclass(frozen=True)
class _Event:
    """One event of a trace; times in microseconds."""

    name: str
    category: str
    thread: tuple[Any, Any]
    span: Interval
    correlation: int

    @staticmethod
    def of(event: dict[str, Any]) -> _Event:
        start = float(event["ts"])
        return _Event(
            str(event.get("name", "")),
            str(event.get("cat", "")),
            (event.get("pid"), event.get("tid")),
            (start, start + float(event.get("dur", 0.0))),
            int((event.get("args") or {}).get("correlation", -1)),
        )

    @property
    def is_nccl(self) -> bool:
        return self.category == "kernel" and self.name.lower().startswith("nccl")


def _launch_moments(events: list[_Event]) -> dict[int, float]:
    """When the host started each kernel, by the number that joins the two."""
    return {event.correlation: event.span[0] for event in events if event.category in _LAUNCHES}


def _of_gloo(events: list[_Event]) -> list[tuple[_Event, float | None]]:
    """The collectives of gloo, each with the moment at which it was handed over.

    Its threads take them in the order they are handed over, which is how the two are joined. Where their numbers
    differ (a collective across the edge of the trace) the last one handed over before it began is taken.
    """
    running = sorted((event for event in events if event.name.startswith("gloo:")), key=lambda event: event.span)
    handed = sorted(event.span[0] for event in events if event.category == "cpu_op" and event.name.startswith("c10d::"))
    if len(running) == len(handed):
        return list(zip(running, handed, strict=True))
    places = [bisect_left(handed, event.span[0]) - 1 for event in running]
    return [(event, handed[place] if place >= 0 else None) for event, place in zip(running, places, strict=True)]
