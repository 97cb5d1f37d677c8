"""Records some steps of a run with the torch profiler: a trace of every rank, and the summary of all.

Separate because it runs beside training and must never cost the run: what cannot be written is a warning.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from rich.console import Console
from torch.profiler import ProfilerActivity, profile

from megaclass.config import Run
from megaclass.errors import DataError
from megaclass.observe import profile as files
from megaclass.observe.timeline import read, summarise
from megaclass.parallel.agreement import Agreement
from megaclass.parallel.process import World

_log = logging.getLogger(__name__)
_SECONDS_TO_WRITE = 600.0


class Recorder:
    """Counts the steps of this start and records those that `run.profile` and `run.profile_after` say.

    Args:
        options: the run's.
        world: all of whose ranks record the same steps.
        step: steps taken when this start begins.
        num_steps: of the whole run; with fewer steps left than wanted nothing is recorded, and a warning says so.

    Cost: none but in the recorded steps, which are slower by what the profiler notes of every operator, and the time
    afterwards that it takes to write: a megabyte or so for each step and rank.
    """

    def __init__(self, options: Run, world: World, step: int, num_steps: int) -> None:
        self._run_dir = options.dir
        self._world = world
        self._first = step + options.profile_after
        self._last = self._first + (options.profile or 0)
        self._profiler: Any = None
        self.is_on = options.profile is not None and self._last <= num_steps
        if options.profile is not None and not self.is_on and world.is_main:
            _log.warning(
                "no step is profiled: run.profile_after %d and run.profile %d are more than the %d steps left",
                options.profile_after, options.profile, num_steps - step,
            )  # fmt: skip
        self.record(step)

    def is_due(self, step: int) -> bool:
        """Whether `record` has something to write after `step` steps, which takes long."""
        return self.is_on and step == self._last

    def record(self, step: int) -> None:
        """Called after every step: begins before the first step to be recorded, and writes after the last."""
        if not self.is_on or not self._first - 1 <= step <= self._last:
            return
        if step == self._first - 1:
            # Its messages about itself would stand between the run's own lines.
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")
            is_cuda = self._world.device.type == "cuda"
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
            self._profiler = profile(activities=activities)
            # A step early, because the first kernels under a profiler are slow.
            self._profiler.prepare_trace()
        if step == self._first:
            self._profiler.start_trace()
        if step == self._last:
            if self._world.device.type == "cuda":
                torch.cuda.synchronize()
            self._profiler.stop_trace()
            self._write()
            self._profiler = None
            self.is_on = False

    def close(self) -> None:
        """Stop recording, if the run ends in the middle of it; nothing is written then."""
        if self._profiler is not None and torch.autograd.profiler._is_profiler_enabled:
            self._profiler.stop_trace()
        self._profiler = None

    def _write(self) -> None:
        """This rank's trace; then, on rank 0, once all have told what theirs says, the summary."""
        rank, agreement = self._world.rank, Agreement(self._world, "profile")
        path = files.trace_path(self._run_dir, rank)
        told: dict[str, Any] = {}
        try:
            path.parent.mkdir(exist_ok=True)
            self._profiler.export_chrome_trace(str(path))
            told["timeline"] = files.to_json(summarise(read(path), rank))
        except (OSError, RuntimeError, DataError) as error:
            told["fault"] = f"the trace of rank {rank} could not be written: {error}"
        if not self._world.is_main:
            agreement.tell(f"written/{rank}", told)
            return
        each = [told, *agreement.collect("written", _SECONDS_TO_WRITE)]
        faults = [one["fault"] for one in each if "fault" in one]
        timelines = [files.from_json(one["timeline"]) for one in each if "timeline" in one]
        try:
            for other, stale in files.trace_paths(self._run_dir).items():
                if other >= self._world.size:
                    stale.unlink()
            if timelines:
                files.write_summary(self._run_dir, timelines)
                Console().print(files.tables(timelines))
                _log.info("profile of %d steps in %s", self._last - self._first, path.parent)
        except OSError as error:
            faults.append(f"profile/summary.json could not be written: {error}")
        for one in faults:
            _log.warning("%s", one)
