"""`megaclass study` as a user calls it: trains what is missing, and says what went wrong."""

from __future__ import annotations

import fcntl
import json
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml

from megaclass.cli import main
from megaclass.observe.journal import read_lines, read_metrics
from megaclass.study import USAGE
from megaclass.study.spec import read_study
from tests.support.training import small_config, small_dataset, train

ROOT = Path(__file__).parent.parent.parent
STEPS = 10
METRICS = ["retrieval.recall_at_1", "log.positive_cosine", "log.rows_touched"]
CASES: list[dict[str, Any]] = [
    {"name": "Softmax", "settings": {"classifier.preset": "softmax", "classifier.sampling_rate": None}},
    {"name": "K", "vary": {"classifier.sampling_rate": [0.25]}, "labels": {"loss": "D-Softmax-K"}},
]
PLOT = {"file": "rates.svg", "title": "Rates", "x": "classifier.sampling_rate", "y": METRICS[0], "lines": "loss"}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("data") / "tiny")


def write(folder: Path, dataset: Path, cases: list[dict[str, Any]] = CASES, **changes: Any) -> Path:
    base = small_config(dataset, folder / "unused", train={"steps": STEPS}, run={"log_sample_ids": False})
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    content = {"base": "base.yaml", "seeds": [0, 1], "cases": cases, "metrics": METRICS, "plots": [PLOT], **changes}
    path = folder / "losses.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def attempts(out: Path) -> dict[str, int]:
    """How often each run below `out` was started."""
    found = sorted((out / "runs").glob("*/seed-*"))
    return {f"{run.parent.name}/{run.name}": len(read_lines(run / "attempts.jsonl")) for run in found}


@pytest.fixture(scope="module")
def finished(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of two cases and two seeds, made by the command; nothing in it is to be changed."""
    folder = tmp_path_factory.mktemp("study")
    assert main(["study", str(write(folder, dataset)), "--out", str(folder / "out"), "--jobs", "2"]) == 0
    return folder


# --- a study from end to end ------------------------------------------------------------------------------------------


def test_a_study_leaves_runs_a_table_and_plots(finished: Path) -> None:
    out = finished / "out"
    assert attempts(out) == dict.fromkeys(
        ("k-sampling_rate=0.25/seed-0", "k-sampling_rate=0.25/seed-1", "softmax/seed-0", "softmax/seed-1"), 1
    )
    for run in (out / "runs").glob("*/*"):
        assert json.loads((run / "summary.json").read_text())["status"] == "completed"
        assert (run / "report.html").exists()
        assert f"step {STEPS}/{STEPS}" in (run / "output.log").read_text()
    table = json.loads((out / "table.json").read_text())
    assert [case["name"] for case in table["cases"]] == ["Softmax", "K sampling_rate=0.25"]
    for case in table["cases"]:
        for seed in (0, 1):
            (path,) = (out / "runs").glob(f"{case['name'][0].lower()}*/seed-{seed}/summary.json")
            summary = json.loads(path.read_text())
            assert (
                case["metrics"][METRICS[0]]["values"][str(seed)]
                == (summary["evaluation"]["trained"]["retrieval"]["recall_at_1"])
            )
    assert table["missing"] == []
    softmax, sampled = (case["metrics"]["log.rows_touched"]["mean"] for case in table["cases"])
    assert softmax == 37
    assert sampled < 37
    text = (out / "table.md").read_text()
    assert text.startswith("# losses\n\n| case | retrieval: recall at 1 | positive cosine | rows touched |\n")
    assert "missing" not in text
    assert "<svg" in (out / "rates.svg").read_text()
    assert (out / "study.yaml").read_bytes() == (finished / "losses.yaml").read_bytes()


def test_a_run_is_what_train_makes_of_its_configuration(finished: Path, tmp_path: Path) -> None:
    """To the bit, with the seed of the run: the study adds nothing of its own."""
    run = finished / "out" / "runs" / "k-sampling_rate=0.25" / "seed-1"
    content = yaml.safe_load((run / "config.yaml").read_text())
    content["run"]["dir"] = str(tmp_path / "run")
    alone = [line["loss_hex"] for line in train(content)]
    studied = [line["loss_hex"] for line in read_metrics(run)]
    assert alone == studied
    assert len(alone) == STEPS
    other = read_metrics(run.parent / "seed-0")
    assert [line["loss_hex"] for line in other] != studied


def test_the_same_command_trains_nothing_again(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = finished / "out"
    before = {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*") if path.is_file()}
    svg = (out / "rates.svg").read_bytes()
    assert main(["study", str(finished / "losses.yaml"), "--out", str(out)]) == 0
    assert {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*") if path.is_file()} == before
    assert (out / "rates.svg").read_bytes() == svg
    captured = capsys.readouterr()
    assert captured.out == (out / "table.md").read_text()
    assert captured.err == ""


def test_json_is_the_content_of_the_table(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = finished / "out"
    assert main(["study", str(finished / "losses.yaml"), "--out", str(out), "--report-only", "--json"]) == 0
    shown = capsys.readouterr().out
    assert shown == (out / "table.json").read_text()
    assert json.loads(shown)["format"] == 1


def test_runs_made_with_other_options_are_refused_and_left_alone(
    finished: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = finished / "out"
    before = (out / "study.yaml").read_bytes()
    changed = write(tmp_path, dataset, settings={"optim.lr": 0.5})
    for more in ([], ["--report-only"], ["--only", "K*"]):
        assert main(["study", str(changed), "--out", str(out), *more]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 5
        assert lines[0] == (
            f"megaclass: run {out / 'runs' / 'softmax' / 'seed-0'} was made with other options "
            "(optim.lr: 0.003 there, 0.5 wanted)"
        )
        assert lines[-1] == "give another --out, or delete these folders"
    assert (out / "study.yaml").read_bytes() == before


# --- what is refused before anything is trained -----------------------------------------------------------------------


def test_a_mistake_in_the_last_case_stops_the_study_before_the_first_is_trained(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = {"name": "wrong", "settings": {"classifier.preset": "d-sofmax-k"}}
    assert main(["study", str(write(tmp_path, dataset, [*CASES, wrong])), "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("megaclass: case 'wrong': ")
    assert "d-softmax-k" in line
    assert not (tmp_path / "out").exists()


def test_a_missing_data_set_has_the_exit_code_of_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", str(write(tmp_path, tmp_path / "none")), "--out", str(tmp_path / "out")]) == 3
    assert capsys.readouterr().err.startswith("megaclass: every case: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("jobs", ["0", "-1"])
def test_no_runs_at_a_time_are_refused(
    dataset: Path, tmp_path: Path, jobs: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", str(write(tmp_path, dataset)), "--out", str(tmp_path / "out"), "--jobs", jobs]) == 2
    assert capsys.readouterr().err == f"megaclass: --jobs {jobs}: at least 1 run at a time is needed\n"


def test_a_pattern_that_matches_no_case_is_refused(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["study", str(write(tmp_path, dataset)), "--out", str(tmp_path / "out"), "--only", "k"]
    assert main(command) == 2
    assert capsys.readouterr().err == (
        "megaclass: --only 'k' matches no case; there are 'Softmax', 'K sampling_rate=0.25' "
        "(* and ? stand for any letters)\n"
    )


def test_an_output_folder_that_cannot_be_made_is_refused(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").write_text("a file")
    assert main(["study", str(write(tmp_path, dataset)), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == (
        f"megaclass: --out {tmp_path / 'out'} cannot be written: File exists; give another folder\n"
    )


def test_a_study_under_torchrun_is_refused(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["study", str(write(tmp_path, dataset)), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == (
        "megaclass: a study starts processes of its own, one rank each; start it without torchrun\n"
    )


# --- parts of a study -------------------------------------------------------------------------------------------------


def test_report_only_trains_nothing_and_says_what_is_missing(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["study", str(write(tmp_path, dataset)), "--out", str(out), "--report-only"]) == 1
    captured = capsys.readouterr()
    assert "**4 runs are missing:**" in captured.out
    assert "- Softmax, seed 1: not run" in captured.out
    assert captured.err == (
        f"megaclass: 4 of 4 runs are missing, see {out / 'table.md'}; the same command tries them again\n"
    )
    assert not (out / "runs").exists()
    assert "<svg" in (out / "rates.svg").read_text()


def test_only_trains_the_chosen_cases_and_failed_runs_are_told_with_their_reason(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One run diverges, one finds its run directory owned by another, one belongs to no chosen case."""
    diverges = {"name": "bad [a, b]", "settings": {"optim.lr": 1e38, "train.non_finite_limit": 1}}
    path, out = (
        write(tmp_path, dataset, [{"name": "good"}, diverges, {"name": "other"}], seeds=[3], plots=[]),
        tmp_path / "out",
    )
    taken = out / "runs" / "good" / "seed-3"
    taken.mkdir(parents=True)
    with (taken / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["study", str(path), "--out", str(out), "--only", "[!o]*", "--jobs", "2"]) == 1
    captured = capsys.readouterr()
    table = json.loads((out / "table.json").read_text())
    good, bad, other = (one["reason"] for one in table["missing"])
    assert good.startswith("exit code 2: ")
    assert f"run directory {taken} is in use by " in good
    assert bad.startswith("exit code 5: ")
    assert bad.endswith(f"(see {out / 'runs' / 'bad-a-b' / 'seed-3' / 'output.log'})")
    assert other == "not run"
    assert not (out / "runs" / "other").exists()
    assert r"- bad \[a, b], seed 3: exit code 5: " in captured.out
    assert "bad [a, b], seed 3: ended with exit code 5: " in captured.err
    assert f"2 of 2 runs are missing, see {out / 'table.md'}; the same command tries them again\n" in captured.err
    # The whole name of a case means that case, whatever letters it has.
    assert main(["study", str(path), "--out", str(out), "--only", "bad [a, b]", "--report-only"]) == 1
    assert "1 of 1 runs are missing" in capsys.readouterr().err


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_shows_the_example_of_the_help(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "study.md").read_text(encoding="utf-8")
    example = textwrap.dedent(USAGE.split("`losses.yaml`:\n")[1].split("  megaclass study")[0]).strip()
    assert f"```yaml\n{example}\n```" in page
    (tmp_path / "losses.yaml").write_text(example)
    assert read_study(tmp_path / "losses.yaml").seeds == (0, 1, 2)
    assert "megaclass study losses.yaml --out runs/losses" in page
