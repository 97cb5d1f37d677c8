"""The timelines of a run's profiled steps: the traces in RUN/profile/, their summary, and a table for people.

Separate from `timeline`, which knows one trace, and from `train/recorder`, which makes them while training.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table

from megaclass.durable import replace_bytes
from megaclass.errors import DataError
from megaclass.observe.timeline import Communication, Timeline, read, summarise
from megaclass.observe.values import percent

FOLDER = "profile"
FORMAT = 1


def trace_path(run_dir: Path, rank: int) -> Path:
    """Where the trace of a rank lies."""
    return run_dir / FOLDER / f"rank-{rank}.json.gz"


def trace_paths(run_dir: Path) -> dict[int, Path]:
    """The traces that are there, by rank."""
    found = {}
    for path in (run_dir / FOLDER).glob("rank-*.json.gz"):
        matched = re.fullmatch(r"rank-(\d+)\.json\.gz", path.name)
        if matched:
            found[int(matched[1])] = path
    return dict(sorted(found.items()))


def read_timelines(run_dir: Path) -> list[Timeline]:
    """The timelines of all ranks whose traces are there, in their order.

    Raises:
        DataError: there is none, or one cannot be read.
    """
    paths = trace_paths(run_dir)
    if not paths:
        raise DataError(
            f"run directory {run_dir} holds no profile; train it with --run.profile 5, which records five steps"
        )
    return [summarise(read(path), rank) for rank, path in paths.items()]


def to_json(timeline: Timeline) -> dict[str, Any]:
    """A timeline as plain JSON, an entry of `ranks` in summary.json."""
    return asdict(timeline)


def from_json(content: dict[str, Any]) -> Timeline:
    """What `to_json` was given."""
    kinds = {name: Communication(**one) for name, one in content["kinds"].items()}
    return Timeline(**{**content, "communication": Communication(**content["communication"]), "kinds": kinds})


def write_summary(run_dir: Path, timelines: Sequence[Timeline]) -> dict[str, Any]:
    """Write `profile/summary.json` of these ranks; returns its content."""
    content = {
        "format": FORMAT,
        "hidden_share": _together([one.communication for one in timelines]).hidden_share,
        "ranks": [to_json(one) for one in timelines],
    }
    replace_bytes(run_dir / FOLDER / "summary.json", json.dumps(content, indent=1).encode())
    return content


def tables(timelines: Sequence[Timeline]) -> Group:
    """Two tables of means over the ranks: the parts of a step, and its communication."""
    count = len(timelines)

    def mean(values: Sequence[float]) -> str:
        return f"{1e3 * sum(values) / count:.3f}"

    is_device = any(one.device_seconds for one in timelines)
    parts = Table("part", "host ms", *(["device ms"] if is_device else []))
    for column in parts.columns[1:]:
        column.justify = "right"
    names = dict.fromkeys(name for one in timelines for name in (*one.host_seconds, *one.device_seconds))
    for name in names:
        host = mean([one.host_seconds.get(name, 0.0) for one in timelines])
        device = mean([one.device_seconds.get(name, 0.0) for one in timelines])
        parts.add_row(name, host, *([device] if is_device else []))
    parts.add_row("whole step", mean([one.step_seconds for one in timelines]), *([""] if is_device else []))
    sent = Table("communication", "ms", "hidden ms", "hidden")
    for column in sent.columns[1:]:
        column.justify = "right"
    kinds = dict.fromkeys(name for one in timelines for name in one.kinds)
    nothing = Communication(0.0, 0.0)
    rows = [(name, [one.kinds.get(name, nothing) for one in timelines]) for name in kinds]
    for name, each in [*rows, ("all", [one.communication for one in timelines])]:
        total = _together(each)
        hidden = percent(total.hidden_share)
        sent.add_row(name, mean([total.seconds]), mean([total.hidden_seconds]), hidden)
    return Group(parts, sent)


def _together(each: Sequence[Communication]) -> Communication:
    return Communication(sum(one.seconds for one in each), sum(one.hidden_seconds for one in each))
