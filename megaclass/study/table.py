"""The table of a study: what every metric was in every run, over the seeds of a case, as JSON and as Markdown.

Separate from the running: it reads finished run directories and nothing else. A case with fewer seeds than the study
has says so wherever its mean stands; a standard deviation or error of one value does not exist and is none.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch

from megaclass import provenance
from megaclass.errors import ConfigError
from megaclass.observe.journal import read_lines, read_metrics
from megaclass.observe.values import dig, flatten, number, read_json
from megaclass.study.cases import Case, Run, is_done
from megaclass.study.spec import LOG, Metric, Study
from megaclass.train.outcome import OUTCOME

FORMAT = 1
_SHARE_OF_STEPS = 10  # logged numbers are means over the last 1/10 of the lines


@dataclass(frozen=True)
class Cell:
    """One metric of one case.

    Attributes:
        values: seed -> value of that run; None where the run has no finite number there. Missing runs are left out.
    """

    values: Mapping[int, float | None]

    @property
    def known(self) -> list[float]:
        """The values there are."""
        return [value for value in self.values.values() if value is not None]

    @property
    def mean(self) -> float | None:
        """Mean over the seeds there are; None without any."""
        return statistics.fmean(self.known) if self.known else None

    @property
    def deviation(self) -> float | None:
        """Standard deviation of a sample (divided by n - 1); None for fewer than two."""
        return statistics.stdev(self.known) if len(self.known) > 1 else None

    @property
    def error(self) -> float | None:
        """Standard error of the mean; None for fewer than two."""
        return None if self.deviation is None else self.deviation / math.sqrt(len(self.known))


@dataclass(frozen=True)
class Table:
    """Cases x metrics.

    Attributes:
        metrics: the columns.
        cells: name of the case -> name of the metric -> cell, in the order of the study.
        num_seeds: runs that every case should have.
        missing: (case, seed, why) of the runs that are not there.
    """

    metrics: Sequence[Metric]
    cells: Mapping[str, Mapping[str, Cell]]
    num_seeds: int
    missing: Sequence[tuple[str, int, str]]

    def best(self, metric: Metric) -> set[str]:
        """The cases whose mean lies within one standard error of the best case's, that error being the best one's.

        None at all where the metric has no direction, or where fewer than two cases have a mean.
        """
        sign = {"higher": 1.0, "lower": -1.0}.get(metric.direction)
        column = {case: row[metric.name] for case, row in self.cells.items()}
        means = {case: cell.mean * (sign or 0.0) for case, cell in column.items() if cell.mean is not None}
        if sign is None or len(means) < 2:
            return set()
        winner = max(means, key=means.__getitem__)
        margin = column[winner].error or 0.0
        return {case for case, mean in means.items() if mean >= means[winner] - margin}


def gather(study: Study, cases: Sequence[Case], reasons: Mapping[tuple[str, int], str]) -> Table:
    """The table of the runs that are completed.

    Args:
        study: says which metrics.
        cases: with their runs.
        reasons: (case, seed) -> why this run is missing, where that is known.

    Raises:
        ConfigError: with one line for every metric that a completed run does not have, and those it has.
    """
    cells, missing, faults = {}, [], list[str]()
    for case in cases:
        values: dict[str, dict[int, float | None]] = {metric.name: {} for metric in study.metrics}
        for run in case.runs:
            if not is_done(run):
                missing.append((case.name, run.seed, reasons.get((case.name, run.seed)) or _recorded(run)))
                continue
            measured, unknown = measure(run, study.metrics)
            faults += [line for line in unknown if line not in faults]
            for name, value in measured.items():
                values[name][run.seed] = value
        cells[case.name] = {name: Cell(found) for name, found in values.items()}
    if faults:
        raise ConfigError("\n".join([*faults, "correct `metrics` in the study; --report-only makes the table anew"]))
    return Table(study.metrics, cells, len(study.seeds), missing)


def measure(run: Run, metrics: Sequence[Metric]) -> tuple[dict[str, float | None], list[str]]:
    """The metrics of one completed run, and a line for each that it does not have.

    A logged number is the mean over the last tenth (at least one) of the lines of metrics.jsonl that stand; None if one
    of them is not finite.
    """
    # Nothing is there where the data set has no split to judge on.
    evaluation = flatten(dig(read_json(run.folder / "summary.json"), "evaluation.trained"))
    lines = read_metrics(run.folder)
    lines = lines[-math.ceil(len(lines) / _SHARE_OF_STEPS) :] if lines else []
    found: dict[str, float | None] = {}
    faults = []
    for metric in metrics:
        name = metric.name.removeprefix(f"{LOG}.")
        values = [line.get(name, "") for line in lines] if metric.is_logged else [evaluation.get(name, "")]
        if not values or any(not (value is None or _is_number(value)) for value in values):
            known = _numbers(lines[-1] if lines else {}) if metric.is_logged else _numbers(evaluation)
            where = "metrics.jsonl" if metric.is_logged else "the evaluation"
            prefix = f"{LOG}." if metric.is_logged else ""
            there = ", ".join(f"{prefix}{one}" for one in known if one) or "nothing"
            faults.append(f"metric {metric.name} is not in {where} of {run.case!r}; there is {there}")
            continue
        sizes = [number(value) for value in values]
        finite = [size for size in sizes if size is not None]
        found[metric.name] = statistics.fmean(finite) if len(finite) == len(sizes) else None
    return found, faults


def as_json(table: Table, cases: Sequence[Case], name: str) -> dict[str, Any]:
    """The content of table.json."""
    columns = [
        {"name": metric.name, "title": title(metric), "better": metric.direction, "percent": metric.is_percent}
        for metric in table.metrics
    ]
    rows = []
    for case in cases:
        row = {
            metric: {
                "values": {str(seed): value for seed, value in cell.values.items()},
                "n": len(cell.known), "mean": cell.mean, "std": cell.deviation, "sem": cell.error,
            }
            for metric, cell in table.cells[case.name].items()
        }  # fmt: skip
        seeds = [run.seed for run in case.runs]
        rows.append(
            {"name": case.name, "settings": case.settings, "labels": case.labels, "seeds": seeds, "metrics": row}
        )
    return {
        "format": FORMAT, "study": name, **_circumstances(cases), "metrics": columns, "cases": rows,
        "missing": [{"case": case, "seed": seed, "reason": reason} for case, seed, reason in table.missing],
    }  # fmt: skip


def as_markdown(table: Table, name: str, facts: Mapping[str, Any]) -> str:
    """The content of table.md."""
    best = {metric.name: table.best(metric) for metric in table.metrics}
    lines = [
        f"# {_plain(name)}",
        "",
        _row(["case", *(_plain(title(metric)) for metric in table.metrics)]),
        _row(["---", *("---:" for _ in table.metrics)]),
    ]
    for case, cells in table.cells.items():
        shown = [cell_text(cells[metric.name], metric) for metric in table.metrics]
        bold = [case in best[metric.name] for metric in table.metrics]
        lines.append(
            _row(
                [_plain(case), *(f"**{text}**" if is_bold else text for text, is_bold in zip(shown, bold, strict=True))]
            )
        )
    lines += ["", f"Mean ± standard deviation over seeds (number of seeds; {table.num_seeds} are wanted)."]
    if any(best.values()):
        lines += ["Bold: within one standard error of the best of the column, that error being the best one's."]
    if any(metric.is_logged for metric in table.metrics):
        lines += ["Logged numbers are means over the last tenth of the logged steps of each run."]
    devices = ", ".join(facts["device"]) or "no device yet"
    commit = f", commit {facts['commit'][:12]}" if facts["commit"] else ""
    lines += ["", f"{devices}; {facts['cpu']}; torch {facts['torch']}{commit}; {facts['date'][:10]}."]
    if table.missing:
        lines += ["", f"**{len(table.missing)} runs are missing:**", ""]
        lines += [f"- {_plain(case)}, seed {seed}: {_plain(reason)}" for case, seed, reason in table.missing]
    return "\n".join(lines) + "\n"


def cell_text(cell: Cell, metric: Metric) -> str:
    """A cell for people: mean ± standard deviation (number of seeds), in the form of its metric; a dash for none."""
    if cell.mean is None:
        return "- (0)"
    spread = cell.deviation
    if metric.is_percent:
        shown = f"{100 * cell.mean:.2f}" + ("" if spread is None else f" ± {100 * spread:.2f}") + " %"
    else:
        shown = f"{cell.mean:.4g}" + ("" if spread is None else f" ± {spread:.2g}")
    return f"{shown} ({len(cell.known)})"


def title(metric: Metric) -> str:
    """The name of a metric for people."""
    from megaclass.evaluate.judge import ROWS

    return metric.title or dict(ROWS).get(metric.name, metric.name.removeprefix(f"{LOG}.").replace("_", " "))


def _recorded(run: Run) -> str:
    """How an earlier start of a run that is not completed has ended, as far as it could say."""
    outcome = read_json(run.folder / OUTCOME)
    if "code" in outcome:
        return f"exit code {outcome['code']}: {outcome.get('reason')} (see {run.folder})"
    return f"begun and not ended (see {run.folder})" if run.folder.exists() else "not run"


def _row(texts: Iterable[str]) -> str:
    return "| " + " | ".join(texts) + " |"


def _plain(text: str) -> str:
    """A text of the user's or of an error as one line of Markdown that shows it as it is."""
    return re.sub(r"([\\`*<|\[])", r"\\\1", " ".join(text.split()))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _numbers(values: Mapping[str, object]) -> list[str]:
    """Names of the numbers, and of what is null because it is not finite or had too few samples."""
    return [name for name, value in values.items() if value is None or _is_number(value)]


def _circumstances(cases: Sequence[Case]) -> dict[str, Any]:
    """Where and with what the runs were made and the table was; `device` is that of the runs."""
    runs = [run for case in cases for run in case.runs if is_done(run)]
    starts = [line for run in runs for line in read_lines(run.folder / "attempts.jsonl")]
    return {
        "device": sorted({str(line.get("device")) for line in starts}),
        "cpu": provenance.processor(),
        "torch": torch.__version__,
        "commit": provenance.commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
