"""The machine-readable records of a run directory: metrics.jsonl, samples/, evaluations.jsonl and summary.json.

Separate from the log because programs read these files; their fields are fixed. Lines are flushed when written, so
that a killed process loses at most the line it was writing, and readers leave out a line that was cut short. An
*attempt* is one start of the trainer in this run directory, counted from 1; attempts.jsonl has a line for each.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import torch

from megaclass.observe.metrics import Snapshot
from megaclass.parallel.process import World

SUMMARY_FORMAT = 1


class Journal:
    """Writes the records of one attempt; rank 0 those of the run, every rank its own sample ids.

    Args:
        run_dir: run directory; made if missing.
        attempt: `next_attempt` as rank 0 saw it, same on every rank.
        world: this process among all.
        facts: more about this start, for its line in attempts.jsonl.
    """

    def __init__(self, run_dir: Path, attempt: int, world: World, facts: Mapping[str, Any] | None = None) -> None:
        self._run_dir = Path(run_dir)
        self._attempt = attempt
        self._world = world
        self._files: dict[str, TextIO] = {}
        self._run_dir.mkdir(parents=True, exist_ok=True)
        if world.is_main:
            on_gpu = world.device.type == "cuda"
            device = torch.cuda.get_device_name(world.device) if on_gpu else str(world.device)
            start = {"attempt": attempt, "world_size": world.size, "device": device, "time": time.time()}
            self._append("attempts.jsonl", start | dict(facts or {}))

    def write_metrics(
        self,
        snapshot: Snapshot,
        *,
        step: int,
        epoch: int | float,
        position: int,
        lr: float,
        **more: float | int | None,
    ) -> None:
        """Append one line to metrics.jsonl; on other ranks than 0 nothing happens.

        `loss_hex` is the float32 loss to the last bit; `loss` keeps what the run computed. Numbers that are not finite
        become null, which JSON has, and stay visible in `loss_hex`. `more` adds fields, `class_lr` for one.
        """
        if not self._world.is_main:
            return
        line = {
            "attempt": self._attempt,
            "step": step,
            "epoch": epoch,
            "position": position,
            "loss": snapshot.loss,
            "loss_hex": _float32(snapshot.loss).hex(),
            "intra": snapshot.intra,
            "inter": snapshot.inter,
            "positive_cosine": snapshot.positive_cosine,
            "lr": lr,
            "grad_norm": snapshot.grad_norm,
            **snapshot.monitors,
            "head_cpu_seconds": snapshot.head_cpu_seconds,
            "samples": snapshot.samples,
            "samples_per_second": snapshot.samples_per_second,
            "data_wait_seconds": snapshot.data_wait_seconds,
            "data_wait_share": snapshot.data_wait_share,
            "step_seconds": snapshot.step_seconds,
            "world_size": self._world.size,
            "time": time.time(),
        }
        self._append("metrics.jsonl", line | more)

    def write_samples(self, *, step: int, epoch: int | float, position: int, ids: Sequence[int]) -> None:
        """Append the ids of this rank's batch to samples/; call it before the step is taken."""
        line = {"attempt": self._attempt, "step": step, "epoch": epoch, "position": position, "ids": list(ids)}
        self._append(f"samples/attempt-{self._attempt}-rank-{self._world.rank}.jsonl", line)

    def write_evaluation(self, step: int, evaluation: Mapping[str, Any]) -> None:
        """Append one evaluation made during training to evaluations.jsonl; on other ranks than 0 nothing happens."""
        if self._world.is_main:
            self._append("evaluations.jsonl", {"attempt": self._attempt, "step": step, "evaluation": dict(evaluation)})

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Replace summary.json in one move, adding `format`; on other ranks than 0 nothing happens."""
        if not self._world.is_main:
            return
        target = self._run_dir / "summary.json"
        beside = self._run_dir / ".summary.json.tmp"
        with beside.open("w", encoding="utf-8") as file:
            file.write(json.dumps(_finite({"format": SUMMARY_FORMAT, **summary}), indent=2, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        beside.replace(target)

    def close(self) -> None:
        """Close all files; more can still be written afterwards."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _append(self, name: str, line: Mapping[str, Any]) -> None:
        if name not in self._files:
            path = self._run_dir / name
            path.parent.mkdir(parents=True, exist_ok=True)
            self._files[name] = path.open("a", encoding="utf-8")
            if not _ends_a_line(path):
                # An earlier attempt died while writing; without this its rest would spoil our first line too.
                self._files[name].write("\n")
        self._files[name].write(json.dumps(_finite(line), allow_nan=False) + "\n")
        self._files[name].flush()


def append_line(path: Path, line: str) -> None:
    """Append a line to a file that is seldom written to, after whatever an earlier process left unfinished in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{'' if _ends_a_line(path) else chr(10)}{line}\n")


def next_attempt(run_dir: Path) -> int:
    """The number of the attempt that starts now: one more than any the run directory knows; 1 in a new one.

    Call it on rank 0 and share the answer: ranks that looked for themselves could see different files.
    """
    highest = max((line["attempt"] for line in read_lines(Path(run_dir) / "attempts.jsonl")), default=0)
    highest = max([highest, *(line["attempt"] for line in read_lines(Path(run_dir) / "metrics.jsonl"))])
    for path in (Path(run_dir) / "samples").glob("attempt-*-rank-*.jsonl"):
        match = re.fullmatch(r"attempt-(\d+)-rank-\d+\.jsonl", path.name)
        highest = max(highest, int(match[1])) if match else highest
    return highest + 1


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that stand, by step: of several for one step that of the highest attempt."""
    return _standing(read_lines(Path(run_dir) / "metrics.jsonl"))


def read_evaluations(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of evaluations.jsonl that stand, by step, as for `read_metrics`."""
    return _standing(read_lines(Path(run_dir) / "evaluations.jsonl"))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, in file order; none if there is no file.

    Lines that were cut short, and anything that is not an object with whole `attempt` and `step` numbers (where it has
    them), are left out. A missing `attempt` counts as 1.
    """
    if not path.exists():
        return []
    lines = []
    for text in path.read_bytes().split(b"\n"):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):  # also bytes that are no UTF-8
            continue
        if isinstance(line, dict) and _is_whole(line.setdefault("attempt", 1)) and _is_whole(line.get("step", 0)):
            lines.append(line)
    return lines


def replayed_steps(
    attempts: Sequence[Mapping[str, Any]], metrics: Sequence[Mapping[str, Any]], attempt: int, start_step: int
) -> int:
    """Logged steps that were lost and had to be taken again, over all attempts of a run.

    Args:
        attempts: lines of attempts.jsonl, each with `attempt` and `start_step`.
        metrics: all lines of metrics.jsonl.
        attempt: the attempt that begins now.
        start_step: the step it begins at.
    """
    last: dict[int, int] = {}
    for line in metrics:
        last[line["attempt"]] = max(last.get(line["attempt"], 0), line.get("step", 0))
    starts = {line["attempt"]: line.get("start_step", 0) for line in attempts} | {attempt: start_step}
    numbers = sorted(starts)
    return sum(max(0, last.get(one, 0) - starts[after]) for one, after in pairwise(numbers))


def _standing(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    kept: dict[int, dict[str, Any]] = {}
    for line in lines:
        if "step" in line and line["attempt"] >= kept.get(line["step"], line)["attempt"]:
            kept[line["step"]] = line
    return [kept[step] for step in sorted(kept)]


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _ends_a_line(path: Path) -> bool:
    """Whether a file is empty or ends with a newline."""
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return True
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _float32(value: float) -> float:
    """The nearest float32, as a Python float."""
    return torch.tensor(value, dtype=torch.float32).item()


def _finite(value: Any) -> Any:
    """The same structure with null for every number that JSON cannot hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
