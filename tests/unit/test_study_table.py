"""The table of a study, from run directories written by hand."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megaclass.config import validate
from megaclass.errors import ConfigError
from megaclass.provenance import commit
from megaclass.study import command
from megaclass.study.cases import Case, Run
from megaclass.study.runs import Failure, Progress
from megaclass.study.spec import Metric, Study
from megaclass.study.table import Cell, Table, as_json, as_markdown, cell_text, gather, measure

RECALL, EER, LOSS = "retrieval.recall_at_1", "verification.eer", "log.loss"


def study(*metrics: Any, seeds: Sequence[int] = (0, 1, 2)) -> Study:
    content = {"base": "b.yaml", "seeds": list(seeds), "cases": [{"name": "a"}], "metrics": list(metrics or [RECALL])}
    return Study.model_validate(content)


def case(folder: Path, name: str, seeds: Sequence[int] = (0, 1, 2)) -> Case:
    runs = []
    for seed in seeds:
        content = {"dataset": {"path": "d"}, "train": {"steps": 9, "seed": seed}}
        runs.append(Run(name, seed, validate({**content, "run": {"dir": str(folder / name / str(seed))}})))
    return Case(name, name, {"train.steps": 9}, {"loss": name}, runs)


def finish(run: Run, evaluation: Any, lines: Sequence[dict[str, Any]] = (), status: str = "completed") -> None:
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "summary.json").write_text(json.dumps({"status": status, "evaluation": evaluation}))
    (run.folder / "attempts.jsonl").write_text('{"attempt": 1, "device": "cpu"}\n')
    logged = [json.dumps({"attempt": 1, "step": step, **line}) + "\n" for step, line in enumerate(lines, 1)]
    (run.folder / "metrics.jsonl").write_text("".join(logged))


def recalls(found: Case, *values: float | None) -> Case:
    for run, value in zip(found.runs, values, strict=False):
        finish(run, {"trained": {"retrieval": {"recall_at_1": value}}})
    return found


def table(*columns: tuple[str, list[float]], better: str = "higher", num_seeds: int = 3) -> Table:
    metric = Metric.model_validate({"name": RECALL, "better": better})
    cells = {name: {RECALL: Cell(dict(enumerate(values)))} for name, values in columns}
    return Table([metric], cells, num_seeds, [])


def test_a_study_ends_with_its_first_run_if_a_metric_is_misspelt(tmp_path: Path) -> None:
    runs = case(tmp_path, "a", [0, 1]).runs
    for run in runs:
        finish(run, {"trained": {"retrieval": {"recall_at_1": 0.5}}})
    told: list[Progress] = []
    watch = command._Watch(told.append, study("retrieval.recall_at_l").metrics)
    failed = Progress(1, None, [(runs[0], 1.0, Failure("a", 0, 5, "numbers", tmp_path))])
    watch(failed)
    first = Progress(2, None, [(runs[1], 1.0, None)])
    with pytest.raises(
        ConfigError, match=r"recall_at_l is not in the evaluation of 'a'; there is retrieval.recall_at_1"
    ):
        watch(first)
    assert told == [failed, first]
    watch = command._Watch(told.append, study(RECALL).metrics)
    watch(first)


# --- the figures ------------------------------------------------------------------------------------------------------


def test_mean_deviation_and_standard_error_are_those_of_a_sample() -> None:
    cell = Cell({0: 0.5, 1: 0.7, 2: 0.9})
    assert cell.mean == pytest.approx(0.7)
    assert cell.deviation == pytest.approx(0.2)
    assert cell.deviation == pytest.approx(statistics.stdev([0.5, 0.7, 0.9]))
    assert cell.error == pytest.approx(0.2 / math.sqrt(3))


def test_one_value_has_no_spread_and_none_has_no_mean() -> None:
    assert (Cell({7: 0.5}).mean, Cell({7: 0.5}).deviation, Cell({7: 0.5}).error) == (0.5, None, None)
    assert (Cell({}).mean, Cell({0: None}).mean, Cell({0: None}).deviation) == (None, None, None)
    assert Cell({0: None, 1: 0.25, 2: 0.75}).mean == 0.5  # of those that are known


def test_the_best_are_those_within_one_standard_error_of_the_best() -> None:
    best = [0.8, 0.9, 1.0]  # mean 0.9, standard error 0.0577
    near, far = [0.85, 0.85, 0.85], [0.84, 0.84, 0.84]
    made = table(("far", far), ("near", near), ("best", best))
    assert made.best(made.metrics[0]) == {"near", "best"}


def test_a_wide_spread_of_its_own_makes_no_case_one_of_the_best() -> None:
    made = table(("best", [0.9, 0.9, 0.9]), ("wide", [0.5, 0.9, 1.2]))
    assert made.best(made.metrics[0]) == {"best"}


def test_lower_is_better_where_the_metric_says_so() -> None:
    columns = ("low", [0.1, 0.1]), ("high", [0.2, 0.2])
    made = table(*columns, better="lower")
    assert made.best(made.metrics[0]) == {"low"}
    made = table(*columns, better="none")
    assert made.best(made.metrics[0]) == set()


def test_equal_means_are_all_best_and_a_single_case_is_not() -> None:
    made = table(("a", [0.5]), ("b", [0.5]), ("c", []))
    assert made.best(made.metrics[0]) == {"a", "b"}
    made = table(("a", [0.5]), ("c", []))
    assert made.best(made.metrics[0]) == set()


# --- what a run has ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_lines", "num_taken"), [(1, 1), (9, 1), (10, 1), (11, 2), (40, 4)])
def test_a_logged_metric_is_the_mean_over_the_last_tenth(tmp_path: Path, num_lines: int, num_taken: int) -> None:
    (run,) = case(tmp_path, "a", [0]).runs
    finish(run, None, [{"loss": float(step**2)} for step in range(num_lines)])
    found, faults = measure(run, study(LOSS).metrics)
    assert not faults
    assert found == {LOSS: pytest.approx(statistics.fmean(s**2 for s in range(num_lines - num_taken, num_lines)))}


def test_of_lines_written_twice_the_newest_attempt_counts(tmp_path: Path) -> None:
    (run,) = case(tmp_path, "a", [0]).runs
    finish(run, None, [{"loss": 1.0}])
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write('{"attempt": 2, "step": 1, "loss": 3.0}\n{"attempt": 2, "st')
    assert measure(run, study(LOSS).metrics) == ({LOSS: 3.0}, [])


def test_a_number_that_is_not_finite_makes_none_not_a_mean_of_the_rest(tmp_path: Path) -> None:
    (run,) = case(tmp_path, "a", [0]).runs
    lines = [{"loss": 1.0, "inter": 2.0}] * 19 + [{"loss": None, "inter": 2.0}]
    finish(run, {"trained": {"verification": {"eer": None}}}, lines)
    found, faults = measure(run, study(LOSS, "log.inter", EER).metrics)
    assert (found, faults) == ({LOSS: None, "log.inter": 2.0, EER: None}, [])


def test_a_metric_a_run_does_not_have_is_named_with_what_there_is(tmp_path: Path) -> None:
    made = case(tmp_path, "a", [0, 1])
    for run in made.runs:
        finish(run, {"trained": {"retrieval": {"recall_at_1": 0.5, "exact": True}}}, [{"loss": 1.0, "loss_hex": "0x"}])
    with pytest.raises(ConfigError) as caught:
        gather(study("retrieval.recall_at_2", "log.los", "retrieval.exact", LOSS), [made], {})
    assert str(caught.value).split("\n") == [
        "metric retrieval.recall_at_2 is not in the evaluation of 'a'; there is retrieval.recall_at_1",
        "metric log.los is not in metrics.jsonl of 'a'; there is log.attempt, log.step, log.loss",
        "metric retrieval.exact is not in the evaluation of 'a'; there is retrieval.recall_at_1",
        "correct `metrics` in the study; --report-only makes the table anew",
    ]


@pytest.mark.parametrize("evaluation", [None, {}, {"trained": None}, [1]])
def test_a_run_without_evaluation_has_none_of_its_metrics(tmp_path: Path, evaluation: Any) -> None:
    """As of a data set without unseen classes; logged metrics are there all the same."""
    (run,) = case(tmp_path, "a", [0]).runs
    finish(run, evaluation, [{"loss": 1.0}])
    found, faults = measure(run, study(LOSS, RECALL).metrics)
    assert found == {LOSS: 1.0}
    assert faults == [f"metric {RECALL} is not in the evaluation of 'a'; there is nothing"]


# --- missing runs -----------------------------------------------------------------------------------------------------


def test_runs_that_are_missing_are_said_with_the_reason(tmp_path: Path) -> None:
    whole, part = recalls(case(tmp_path, "whole"), 0.5, 0.6, 0.7), recalls(case(tmp_path, "part"), 0.5)
    second, third = part.runs[1:]
    finish(second, None, status="failed")
    (second.folder / "outcome.json").write_text('{"code": 5, "reason": "not finite"}')
    made = gather(study(), [whole, part, case(tmp_path, "new", [0])], {("part", 2): "exit code 3: no data"})
    assert made.missing == [
        ("part", 1, f"exit code 5: not finite (see {second.folder})"),
        ("part", 2, "exit code 3: no data"),
        ("new", 0, "not run"),
    ]
    third.folder.mkdir()
    assert gather(study(), [part], {}).missing[1] == ("part", 2, f"begun and not ended (see {third.folder})")
    assert made.cells["part"][RECALL].values == {0: 0.5}
    text = as_markdown(made, "n", as_json(made, [whole, part, case(tmp_path, "new", [0])], "n"))
    assert "| part | 50.00 % (1) |" in text
    assert "| new | - (0) |" in text
    assert "Mean ± standard deviation over seeds (number of seeds; 3 are wanted)." in text
    assert "**3 runs are missing:**\n\n- part, seed 1: exit code 5: not finite (see " in text


# --- how it is shown --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "metric", "expected"),
    [
        ([0.98123, 0.98323], RECALL, "98.22 ± 0.14 % (2)"),
        ([1.0], RECALL, "100.00 % (1)"),
        ([12.3456, 12.5], LOSS, "12.42 ± 0.11 (2)"),
        ([1e-7], LOSS, "1e-07 (1)"),
        ([], LOSS, "- (0)"),
    ],
)
def test_cells_for_people(values: list[float], metric: str, expected: str) -> None:
    assert cell_text(Cell(dict(enumerate(values))), Metric.model_validate(metric)) == expected


def test_the_table_in_markdown(tmp_path: Path) -> None:
    cases = [recalls(case(tmp_path, "low"), 0.1, 0.1, 0.1), recalls(case(tmp_path, "high"), 0.9, 0.9, 0.9)]
    made = gather(study(), cases, {})
    content = as_json(made, cases, "losses")
    lines = as_markdown(made, "losses", {**content, "commit": "0123456789abcdef", "cpu": "C"}).split("\n")
    assert lines[:6] == [
        "# losses",
        "",
        "| case | retrieval: recall at 1 |",
        "| --- | ---: |",
        "| low | 10.00 ± 0.00 % (3) |",
        "| high | **90.00 ± 0.00 % (3)** |",
    ]
    assert lines[8] == "Bold: within one standard error of the best of the column, that error being the best one's."
    assert lines[10].startswith(f"cpu; C; torch {content['torch']}, commit 0123456789ab; 20")
    assert not any("missing" in line or "Logged" in line for line in lines)


def test_nothing_a_user_names_breaks_the_markdown(tmp_path: Path) -> None:
    name = "a | b\n*c* <i> `d` [e](f) \\"
    made = case(tmp_path, name, [0])
    title = "t | <b>"
    wanted = study({"name": LOSS, "title": title}, seeds=[0])
    text = as_markdown(gather(wanted, [made], {(name, 0): "<x> | *y*\nz"}), "n", as_json(table(), [], "n"))
    escaped = r"a \| b \*c\* \<i> \`d\` \[e](f) \\"
    assert r"| case | t \| \<b> |" in text
    assert f"\n| {escaped} | - (0) |\n" in text
    assert f"\n- {escaped}, seed 0: " + r"\<x> \| \*y\* z" + "\n" in text
    assert "Logged numbers are means over the last tenth" in text


def test_the_table_in_json_is_finite_and_complete(tmp_path: Path) -> None:
    first, second = recalls(case(tmp_path, "a"), 0.5, None, 0.75), case(tmp_path, "b")
    wanted = study({"name": RECALL, "title": "R@1"})
    content = as_json(gather(wanted, [first, second], {}), [first, second], "losses")
    again = json.loads(json.dumps(content, allow_nan=False))
    assert (again["format"], again["study"], again["device"]) == (1, "losses", ["cpu"])
    assert again["metrics"] == [{"name": RECALL, "title": "R@1", "better": "higher", "percent": True}]
    row, empty = again["cases"]
    assert (row["name"], row["settings"], row["labels"], row["seeds"]) == (
        "a", {"train.steps": 9}, {"loss": "a"}, [0, 1, 2],
    )  # fmt: skip
    cell = row["metrics"][RECALL]
    assert cell.pop("std") == pytest.approx(statistics.stdev([0.5, 0.75]))
    assert cell.pop("sem") == pytest.approx(0.125)
    assert cell == {"values": {"0": 0.5, "1": None, "2": 0.75}, "n": 2, "mean": 0.625}
    assert empty["metrics"][RECALL] == {"values": {}, "n": 0, "mean": None, "std": None, "sem": None}
    assert [(one["case"], one["seed"], one["reason"]) for one in again["missing"]] == [
        ("b", seed, "not run") for seed in (0, 1, 2)
    ]


# --- the commit -------------------------------------------------------------------------------------------------------


def test_the_commit_is_read_from_the_files_of_the_repository(tmp_path: Path) -> None:
    assert commit(tmp_path) is None
    git = tmp_path / ".git"
    (git / "refs" / "heads").mkdir(parents=True)
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    assert commit(tmp_path) is None
    (git / "packed-refs").write_text("# pack-refs\naaa refs/heads/other\nbbb refs/heads/main\n")
    assert commit(tmp_path) == "bbb"
    (git / "refs" / "heads" / "main").write_text("ccc\n")
    assert commit(tmp_path) == "ccc"
    (git / "HEAD").write_text("ddd\n")
    assert commit(tmp_path) == "ddd"
