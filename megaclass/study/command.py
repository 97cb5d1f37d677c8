"""The order of things in `megaclass study`: read, check everything, train what is missing, write table and plots."""

from __future__ import annotations

import fnmatch
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from megaclass.durable import replace_bytes
from megaclass.errors import ConfigError
from megaclass.observe.progress import duration
from megaclass.study.cases import Case, Run, check, check_existing, expand, is_done
from megaclass.study.plots import draw
from megaclass.study.runs import Progress, train_all
from megaclass.study.spec import Metric, Study, read_study
from megaclass.study.table import as_json, as_markdown, gather, measure
from megaclass.train.outcome import PREEMPTED

MISSING = 1
"""Exit code of a study of which runs are missing."""


def study(
    path: Path,
    out: Path,
    *,
    jobs: int | None = None,
    only: str | None = None,
    report_only: bool = False,
    as_text: bool = True,
) -> int:
    """Make the study in file `path` in folder `out`; its exit code is 0, 1 (runs are missing) or 75 (stopped).

    Args:
        path: the study file.
        out: made if missing; runs that are completed there are not run again.
        jobs: runs at a time; None for the number of cores this process may use.
        only: train only the cases whose name matches this shell pattern; the table has all of them.
        report_only: train nothing.
        as_text: print the table for people; otherwise the content of table.json.

    Raises:
        ConfigError, DataError: before anything is trained; or after the first run, where a metric does not exist.
    """
    if jobs is not None and jobs < 1:
        raise ConfigError(f"--jobs {jobs}: at least 1 run at a time is needed")
    wanted = read_study(path)
    cases = expand(wanted, out)
    runs = _chosen(cases, only)
    check_existing([run for case in cases for run in case.runs])
    pending = [] if report_only else [run for run in runs if not is_done(run)]
    check(pending)
    _prepare_folder(path, out)
    reasons: dict[tuple[str, int], str] = {}
    if pending:
        with _ProgressLine(len(runs) - len(pending), len(runs)) as line:
            ended = train_all(pending, jobs or len(os.sched_getaffinity(0)), _Watch(line, wanted.metrics))
        reasons = {(one.case, one.seed): one.words for one in ended.failures}
        if ended.is_stopped:
            done = sum(is_done(run) for run in runs)
            print(
                f"megaclass: stopped with {done} of {len(runs)} runs done; the same command goes on from there, "
                "and with --report-only it shows what there is",
                file=sys.stderr,
            )
            return PREEMPTED
    _report(wanted, cases, out, path.stem, reasons, as_text)
    missing = [run for run in runs if not is_done(run)]
    if missing:
        print(
            f"megaclass: {len(missing)} of {len(runs)} runs are missing, see {out / 'table.md'}; the same command "
            "tries them again",
            file=sys.stderr,
        )
    return MISSING if missing else 0


def _chosen(cases: Sequence[Case], only: str | None) -> list[Run]:
    """The runs of the cases that match, seed by seed: early on there is something of every case."""
    # The whole name is that case, though its brackets would mean something else in a pattern.
    chosen = [case for case in cases if only in (None, case.name) or fnmatch.fnmatchcase(case.name, only or "")]
    if not chosen:
        names = ", ".join(repr(case.name) for case in cases)
        raise ConfigError(f"--only {only!r} matches no case; there are {names} (* and ? stand for any letters)")
    return [run for runs in zip(*(case.runs for case in chosen), strict=True) for run in runs]


def _prepare_folder(path: Path, out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        replace_bytes(out / "study.yaml", path.read_bytes())
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error.strerror}; give another folder") from None


def _report(
    wanted: Study, cases: Sequence[Case], out: Path, name: str, reasons: dict[tuple[str, int], str], as_text: bool
) -> None:
    table = gather(wanted, cases, reasons)
    content = as_json(table, cases, name)
    text = as_markdown(table, name, content)
    encoded = json.dumps(content, indent=2, allow_nan=False) + "\n"
    replace_bytes(out / "table.json", encoded.encode())
    replace_bytes(out / "table.md", text.encode())
    for plot in wanted.plots:
        replace_bytes(out / plot.file, draw(plot, table, cases))
    print(text if as_text else encoded, end="")


class _Watch:
    """Passes progress on, and ends a study whose first completed run lacks a metric: no other would have it."""

    def __init__(self, line: Callable[[Progress], None], metrics: Sequence[Metric]) -> None:
        self._line = line
        self._metrics: Sequence[Metric] | None = metrics

    def __call__(self, progress: Progress) -> None:
        """See `runs.train_all`."""
        self._line(progress)
        done = [run for run, _, failure in progress.ended if failure is None]
        if not done or self._metrics is None:
            return
        _, faults = measure(done[0], self._metrics)
        self._metrics = None
        if faults:
            raise ConfigError(
                "\n".join([*faults, "correct `metrics` in the study; the same command goes on with the runs there are"])
            )


class _ProgressLine:
    """Runs done of all, time taken, time expected; a live line in a terminal, elsewhere one line for each run."""

    def __init__(self, done: int, total: int) -> None:
        self._before, self._total = done, total
        self._since = time.monotonic()
        self._console = Console(stderr=True)
        columns = (BarColumn(bar_width=16), TextColumn("{task.description}", markup=False))
        self._bar = Bar(*columns, console=self._console, refresh_per_second=2, disable=not self._console.is_terminal)
        self._task = self._bar.add_task("starting", total=total, completed=done)

    def __call__(self, progress: Progress) -> None:
        """Show where the runs are, and a line for each that has ended."""
        done = self._before + progress.done
        rest = "unknown" if progress.rest_seconds is None else duration(progress.rest_seconds)
        figures = f"{done}/{self._total} runs  elapsed {duration(time.monotonic() - self._since)}  rest {rest}"
        self._bar.update(self._task, completed=done, description=figures)
        for run, seconds, failure in progress.ended:
            how = f"done in {duration(seconds)}" if failure is None else f"ended with {failure.words}"
            text = f"{run.case}, seed {run.seed}: {how}"
            shown = f"{figures}  {text}" if self._bar.disable else text
            self._console.print(shown, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> _ProgressLine:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
