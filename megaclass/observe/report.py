"""report.html: what a run did, on one page that needs nothing else.

Reads only the files of the run directory, so that it can be made again at any time, for an unfinished run too. Those
files may come from elsewhere: every string is escaped on its way into the page, and a value of the wrong type is shown
as it is instead of breaking the page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from megaclass.errors import ConfigError
from megaclass.observe import page, values
from megaclass.observe.charts import line_chart
from megaclass.observe.journal import read_evaluations, read_lines, read_metrics
from megaclass.observe.logging import redact
from megaclass.observe.progress import duration

_CURVES: tuple[tuple[str, tuple[tuple[str, str], ...], bool], ...] = (
    ("Loss", (("loss", "total"), ("intra", "intra"), ("inter", "inter")), False),
    (
        "Cosines",
        (
            ("positive_cosine", "positive, mean"),
            ("negative_cosine_mean", "negative, mean"),
            ("negative_cosine_max", "negative, largest"),
            ("end_point", "end point after the margin"),
        ),
        False,
    ),
    ("Samples past the end point", (("past_end_point", "share"),), True),
    ("Rows touched per step", (("rows_touched", "classes"),), False),
    ("Learning rate", (("lr", "backbone"), ("class_lr", "classes")), False),
    ("Samples per second", (("samples_per_second", "samples/s"),), False),
    ("Waiting for data", (("data_wait_share", "share of the time"),), True),
    ("Gradient norm", (("grad_norm", "joint norm"),), False),
)
_EVALUATION_CURVES = {
    "retrieval.recall_at_1": "recall@1",
    "verification.accuracy": "verification accuracy",
    "identification.rank_1": "rank-1",
    "one_shot.20": "20-way one-shot",
}
_NAMES = {
    "verification": "Verification",
    "identification": "Identification",
    "retrieval": "Retrieval",
    "one_shot": "One-shot",
    "accuracy": "accuracy",
    "accuracy_std": "standard deviation of the accuracy over folds",
    "num_fold_pairs": "number of pairs in the folds",
    "folds_share_classes": "folds share classes",
    "num_positive_pairs": "number of positive pairs",
    "num_negative_pairs": "number of negative pairs",
    "num_gallery": "number of samples in the gallery",
    "num_queries": "number of queries",
    "num_without_gallery": "number of samples of classes outside the gallery",
    "num_alone": "number of samples alone in their class",
    "num_trials": "number of trials",
    "num_groups": "number of groups with enough classes",
    "tar_at_far": "TAR at FAR",
    "eer": "equal error rate",
    "rank_1": "rank-1",
    "rank_5": "rank-5",
    "recall_at_1": "recall@1",
    "recall_at_5": "recall@5",
    "recall_at_10": "recall@10",
    "map": "mean average precision",
}


def write_report(run_dir: Path) -> Path:
    """Write report.html into a run directory and return its path.

    Raises:
        ConfigError: the folder is no run directory.
    """
    run_dir = Path(run_dir)
    known = ("config.yaml", "metrics.jsonl", "summary.json", "attempts.jsonl")
    if not any((run_dir / name).is_file() for name in known):
        raise ConfigError(
            f"{run_dir} is not a run directory: it has none of {', '.join(known)}; give the run.dir of a training run"
        )
    summary = values.read_json(run_dir / "summary.json")
    config, config_text = values.read_yaml(run_dir / "config.yaml")
    attempts = read_lines(run_dir / "attempts.jsonl")
    lines = lineage(read_metrics(run_dir))
    evaluations = lineage(read_evaluations(run_dir))
    document = page.page(
        f"megaclass · {run_dir.resolve().name}",
        _subtitle(config),
        [
            page.facts(_facts(summary, lines, attempts, _wall_seconds(summary, run_dir, attempts))),
            page.section("Evaluation on classes never trained on", _evaluation(summary, evaluations)),
            page.section("Training", _curves(lines)),
            page.section("Samples", _samples(summary)),
            page.section("Where the time went", _goodput(summary)),
            page.section("Configuration", page.folded("config.yaml", redact(config_text)) if config_text else ""),
        ],
    )
    target = run_dir / "report.html"
    beside = run_dir / ".report.html.tmp"
    beside.write_text(document, encoding="utf-8")
    beside.replace(target)
    return target


def lineage(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines that led to the newest state, by step: none that a later attempt has gone back behind.

    A later attempt that went back to step 60 takes the place of everything the earlier ones logged from there on, also
    at steps it has not logged itself.
    """
    lowest: dict[int, int] = {}
    for line in lines:
        lowest[line["attempt"]] = min(lowest.get(line["attempt"], line["step"]), line["step"])
    return [
        line
        for line in sorted(lines, key=lambda line: int(line["step"]))
        if all(line["step"] < step for attempt, step in lowest.items() if attempt > line["attempt"])
    ]


def _subtitle(config: Mapping[str, Any]) -> str:
    parts = [
        values.text(values.dig(config, "classifier.preset")),
        values.text(values.dig(config, "backbone.name")),
        values.text(values.dig(config, "backbone.dim"), "{} dimensions"),
        values.text(values.dig(config, "train.global_batch_size"), "global batch {}"),
        values.text(str(values.dig(config, "train.seed")), "seed {}"),
    ]
    return redact(" · ".join(part for part in parts if part))


def _facts(
    summary: Mapping[str, Any],
    lines: Sequence[Mapping[str, Any]],
    attempts: Sequence[Mapping[str, Any]],
    wall: float | None,
) -> list[tuple[str, str]]:
    """The figures at the top: summary.json where it exists, else the newest line."""
    newest = lines[-1] if lines else {}
    status = values.text(summary.get("status"), "{}") or "not finished"
    if summary.get("exit_code"):
        status += f" (exit code {values.text(summary.get('exit_code'))})"
    speeds = [value for line in lines if (value := values.number(line.get("samples_per_second"))) is not None]
    waits = [value for line in lines if (value := values.number(line.get("data_wait_share"))) is not None]
    peaks = [
        (name, values.number(summary.get(f"peak_{key}_bytes"))) for name, key in (("memory", "rss"), ("GPU", "gpu"))
    ]
    return [
        ("status", status),
        ("steps", values.text(summary.get("step", newest.get("step")))),
        ("epochs", values.text(summary.get("epoch", newest.get("epoch")))),
        ("duration", duration(wall) if wall is not None else ""),
        ("ranks", values.text(summary.get("world_size", newest.get("world_size")))),
        ("device", values.text(attempts[-1].get("device")) if attempts else ""),
        ("samples per second", f"{sorted(speeds)[len(speeds) // 2]:,.0f}" if speeds else ""),
        ("waiting for data", f"{sum(waits) / len(waits):.1%}" if waits else ""),
        ("final loss", values.text(newest.get("loss"))),
        ("attempts", values.text(summary.get("attempts", len(attempts) or None))),
        *((f"peak {name}", f"{peak / 2**30:,.2f} GiB") for name, peak in peaks if peak),
    ]


def _wall_seconds(summary: Mapping[str, Any], run_dir: Path, attempts: Sequence[Mapping[str, Any]]) -> float | None:
    """What the summary measured, else the time between each attempt's start and its last line; None if unknown."""
    measured = values.number(values.dig(summary, "goodput.wall_seconds"))
    if measured is not None:
        return measured
    lines, spans = read_lines(run_dir / "metrics.jsonl"), []
    for attempt in attempts:
        times = [values.number(line.get("time")) for line in lines if line["attempt"] == attempt["attempt"]]
        start, ends = values.number(attempt.get("time")), [time for time in times if time is not None]
        if start is not None and ends:
            spans.append(max(max(ends) - start, 0.0))
    return sum(spans) if spans else None


def _curves(lines: Sequence[dict[str, Any]]) -> str:
    marks = [later["step"] for earlier, later in pairwise(lines) if later["attempt"] != earlier["attempt"]]
    figures = []
    for title, fields, percent in _CURVES:
        series = {label: points for key, label in fields if len(points := _points(lines, key)) > 1}
        if series:
            if len(series) == 1 < len(fields):
                title = f"{title}: {next(iter(series))}"  # there is no legend for one curve
            figures.append(page.figure(title, list(series), line_chart(title, series, percent=percent, marks=marks)))
    note = page.paragraph("Dotted lines: the run was started again.") if marks and figures else ""
    return f'<div class="grid">{"".join(figures)}</div>{note}' if figures else ""


def _points(lines: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(line["step"], value) for line in lines if (value := values.number(values.dig(line, key))) is not None]


def _evaluation(summary: Mapping[str, Any], evaluations: Sequence[dict[str, Any]]) -> str:
    content = ""
    final = values.dig(summary, "evaluation")
    if isinstance(final, Mapping) and final:
        models = [name for name in ("trained", "untrained", "pixels") if name in final]
        models += [str(name) for name in final if name not in models]
        flat = {name: values.flatten(final[name]) for name in models}
        keys = list(dict.fromkeys(key for found in flat.values() for key in found))
        rows = [[_label(key), *(_cell(key, flat[name].get(key)) for name in models)] for key in keys]
        content += page.table(["", *models], rows, strong_column=1)
    series = {}
    for key, label in _EVALUATION_CURVES.items():
        if len(points := _points(evaluations, f"evaluation.{key}")) > 1:
            series[label] = points
    if series:
        chart = line_chart("Evaluation during training", series, percent=True, zoom=True)
        content += page.figure("During training", list(series), chart)
    return f'<div class="grid">{content}</div>' if content else ""


def _cell(key: str, value: object) -> str:
    """A number of an evaluation: counts as they are, yes or no, everything else a share."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    is_count = key.rsplit(".", 1)[-1].startswith("num_")
    return values.text(value) if is_count and value is not None else values.percent(value)


def _label(key: str) -> str:
    """A dotted key of an evaluation in words."""
    group, *rest = key.split(".")
    if group == "one_shot" and rest:
        return f"One-shot, {rest[0]}-way"
    return " ".join([_NAMES.get(group, group) + ("," if rest else ""), *(_NAMES.get(part, part) for part in rest)])


def _samples(summary: Mapping[str, Any]) -> str:
    samples = summary.get("samples")
    if not isinstance(samples, Mapping):
        return ""
    skipped = samples.get("skipped")
    skipped = skipped if isinstance(skipped, Mapping) else {}
    rows = [["read", values.text(samples.get("read"))], ["trained", values.text(samples.get("trained"))]]
    rows += [[f"skipped: {reason}", values.text(count)] for reason, count in skipped.items()]
    rows.append(["replayed after a restart", values.text(samples.get("replayed"))])
    if "epochs_checked" in samples:
        rows.append(["ends of epochs at which this was checked", values.text(samples["epochs_checked"])])
    counts = [values.number(value) for value in (samples.get("read"), samples.get("trained"), *skipped.values())]
    note = ""
    if all(count is not None for count in counts):
        read, *parts = (count or 0 for count in counts)
        right = read == sum(parts)
        note = page.paragraph(
            "read = trained + skipped" if right else "read is not trained + skipped: samples are unaccounted for",
            "good" if right else "bad",
        )
    return page.table(["", "samples"], rows) + note


def _goodput(summary: Mapping[str, Any]) -> str:
    """The wall time divided into its named parts, then every other entry."""
    goodput = summary.get("goodput")
    if not isinstance(goodput, Mapping):
        return ""
    parts: list[tuple[str, float]] = []
    rows: list[list[str]] = []
    wall = values.number(goodput.get("wall_seconds"))
    for key, value in goodput.items():
        amount, name = values.number(value), str(key).removesuffix("_seconds").replace("_", " ")
        if amount is None or amount < 0:
            rows.append([name, values.text(value)])
        elif not str(key).endswith("_seconds"):
            rows.append([name, f"{amount:.1%}" if amount <= 1 else values.text(value)])
        elif key == "wall_seconds" or len(parts) == page.NUM_COLOURS:
            rows.append([name, duration(amount)])
        else:
            parts.append((name, amount))
    whole = max(wall or 0.0, sum(amount for _, amount in parts))
    shown = [(f"{name} {duration(amount)}", amount / whole) for name, amount in parts] if whole else []
    return (page.shares(shown) if shown else "") + (page.table(["", ""], rows) if rows else "")
