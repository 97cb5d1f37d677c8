"""What a study file may say, and what is said about one that is wrong."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from megaclass.errors import ConfigError
from megaclass.study import USAGE
from megaclass.study.spec import Metric, Study, read_study


def content(**changes: Any) -> dict[str, Any]:
    return {
        "base": "base.yaml",
        "seeds": [0, 1],
        "cases": [{"name": "a", "labels": {"loss": "A"}}],
        "metrics": ["retrieval.recall_at_1", "log.positive_cosine"],
        **changes,
    }


def read(folder: Path, text: str) -> Study:
    path = folder / "study.yaml"
    path.write_text(text, encoding="utf-8")
    return read_study(path)


def faults(folder: Path, wanted: dict[str, Any]) -> list[str]:
    """The lines about a study, without the first, which names the file."""
    with pytest.raises(ConfigError) as caught:
        read(folder, yaml.safe_dump(wanted))
    first, *lines = str(caught.value).split("\n")
    assert first == f"study file {folder / 'study.yaml'}:"
    return lines


def test_the_example_of_the_help_is_a_study(tmp_path: Path) -> None:
    example = USAGE.split("`losses.yaml`:\n")[1].split("  megaclass study")[0]
    (tmp_path / "study").mkdir()
    study = read(tmp_path / "study", example)
    assert study.base == tmp_path / "study" / ".." / "configs" / "demo.yaml"
    assert [case.name for case in study.cases] == ["softmax", "d-softmax-k"]
    assert study.cases[1].vary == {"classifier.sampling_rate": [0.016, 0.0625, 0.25]}
    assert [metric.is_percent for metric in study.metrics] == [True, True, False]
    assert study.plots[0].lines == "loss"


def test_base_counts_from_the_study_file(tmp_path: Path) -> None:
    assert read(tmp_path, yaml.safe_dump(content(base="../base.yaml"))).base == tmp_path / ".." / "base.yaml"
    assert read(tmp_path, yaml.safe_dump(content(base="/etc/base.yaml"))).base == Path("/etc/base.yaml")


def test_hyphens_in_names_of_options_are_underscores(tmp_path: Path) -> None:
    study = read(tmp_path, yaml.safe_dump(content(settings={"classifier.sampling-rate": 0.5})))
    assert study.settings == {"classifier.sampling_rate": 0.5}


def test_every_mistake_is_told_at_once_with_its_place(tmp_path: Path) -> None:
    wanted = content(
        seeds=[0, -1],
        seed=1,
        settings={"classifier.scael": 3},
        cases=[{"name": ""}, {"name": "b", "setings": {}, "vary": {"optim.lr": []}}, {"settings": {}}],
        metrics=["recall.at_1", {"name": "retrieval.map", "better": "most", "percents": True}],
        plots=[{"file": "a.png", "x": "loss", "y": "retrieval.map"}],
    )
    del wanted["base"]
    lines = faults(tmp_path, wanted)
    for expected in (
        "base is missing; give it",
        "unknown key seed; did you mean seeds?",
        "seeds[1]: -1 is not allowed: Input should be greater than or equal to 0",
        "settings: unknown option classifier.scael; did you mean classifier.scale?",
        "cases[0].name: '' is not allowed: String should have at least 1 character",
        "unknown key cases[1].setings; did you mean settings?",
        "cases[1].vary.optim.lr is empty; give at least one",
        "cases[2].name is missing; give it",
        "metrics[0]: metric 'recall.at_1' must begin with log., verification., identification., retrieval., one_shot.",
        "metrics[1].better: 'most' is not allowed: allowed are 'higher', 'lower' or 'none'",
        "unknown key metrics[1].percents; did you mean percent?",
    ):
        assert expected in lines, lines
    assert any(line.startswith("plots[0].file: 'a.png' is not allowed: String should match") for line in lines)
    assert len(lines) == 12


def test_a_key_that_is_near_to_none_is_told_what_there_is(tmp_path: Path) -> None:
    (line,) = faults(tmp_path, content(grid={}))
    assert line == "unknown key grid; allowed are base, seeds, settings, cases, metrics, plots"


@pytest.mark.parametrize("place", ["settings", "case", "vary"])
@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("train.seed", "train.seed cannot be set here: give `seeds`"),
        ("train-seed", "unknown option train_seed; did you mean train.seed?"),
        ("run.dir", "run.dir cannot be set here: it follows from --out"),
        ("run", "unknown option run"),
    ],
)
def test_options_the_study_sets_itself_and_unknown_ones_are_refused(
    tmp_path: Path, place: str, option: str, expected: str
) -> None:
    case: dict[str, Any] = {"name": "a"}
    wanted = content(cases=[case])
    if place == "settings":
        wanted["settings"] = {option: 1}
    else:
        case["settings" if place == "case" else "vary"] = {option: [1]}
    (line,) = faults(tmp_path, wanted)
    where = {"settings": "settings", "case": "cases[0].settings", "vary": "cases[0].vary"}[place]
    assert line.startswith(f"{where}: {expected}")


def test_an_option_given_with_both_spellings_is_refused(tmp_path: Path) -> None:
    (line,) = faults(tmp_path, content(settings={"optim.class-lr": 1, "optim.class_lr": 2}))
    assert line == "settings: an option is given twice, with - and with _"


def test_what_is_given_twice_is_named(tmp_path: Path) -> None:
    assert faults(tmp_path, content(seeds=[3, 1, 3, 1])) == ["seeds: 1, 3 is given more than once"]
    plot = {"file": "a.svg", "x": "loss", "y": "retrieval.recall_at_1"}
    twice = ["retrieval.recall_at_1", {"name": "retrieval.recall_at_1", "title": "again"}]
    assert faults(tmp_path, content(metrics=twice, plots=[plot, plot])) == [
        "metrics: retrieval.recall_at_1 is given more than once",
        "plots: a.svg is given more than once",
    ]


def test_seeds_cases_and_metrics_must_be_there(tmp_path: Path) -> None:
    lines = faults(tmp_path, content(seeds=[], cases=[], metrics=[]))
    assert lines == [f"{name} is empty; give at least one" for name in ("seeds", "cases", "metrics")]


def test_plots_name_what_exists_and_the_nearest_is_shown(tmp_path: Path) -> None:
    plot = {"file": "a.svg", "x": "classifier.scal", "y": "retrieval.recall_at_2", "lines": "los"}
    assert faults(tmp_path, content(plots=[plot])) == [
        "plots: x 'classifier.scal' of a.svg must be an option, a label, or one of `metrics`; "
        "did you mean classifier.scale?",
        "plots: y 'retrieval.recall_at_2' of a.svg must be one of `metrics`; did you mean retrieval.recall_at_1?",
        "plots: lines 'los' of a.svg must be an option, a label, or `case`; did you mean loss?",
    ]


@pytest.mark.parametrize("x", ["classifier.scale", "loss", "log.positive_cosine"])
def test_x_may_be_an_option_a_label_or_a_metric(tmp_path: Path, x: str) -> None:
    plot = {"file": "a.svg", "x": x, "y": "retrieval.recall_at_1"}
    made = read(tmp_path, yaml.safe_dump(content(plots=[plot]))).plots[0]
    assert (made.x, made.lines, made.log_x, made.points_labelled) == (x, "case", False, False)


@pytest.mark.parametrize("file", ["../a.svg", "a/b.svg", ".svg", "a.html", "table.json"])
def test_plots_stay_in_the_output_folder(tmp_path: Path, file: str) -> None:
    (line,) = faults(tmp_path, content(plots=[{"file": file, "x": "loss", "y": "log.positive_cosine"}]))
    assert line.startswith(f"plots[0].file: {file!r} is not allowed")


@pytest.mark.parametrize("name", ["verfication.accuracy", "verification", "log", "log.", "loss"])
def test_a_metric_has_a_source(tmp_path: Path, name: str) -> None:
    (line,) = faults(tmp_path, content(metrics=[name]))
    assert line.startswith(f"metrics[0]: metric {name!r} must begin with log., ")
    assert ("did you mean verification?" in line) == name.startswith("ver")


@pytest.mark.parametrize(
    ("given", "is_percent", "direction"),
    [
        ({"name": "retrieval.map"}, True, "higher"),
        ({"name": "verification.eer"}, True, "lower"),
        ({"name": "log.loss"}, False, "none"),
        ({"name": "log.loss", "better": "lower", "percent": True}, True, "lower"),
        ({"name": "retrieval.map", "better": "none", "percent": False}, False, "none"),
    ],
)
def test_how_a_metric_is_shown_follows_from_its_name_unless_said(
    given: dict[str, Any], is_percent: bool, direction: str
) -> None:
    metric = Metric.model_validate(given)
    assert (metric.is_percent, metric.direction) == (is_percent, direction)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- a\n", "must hold keys like `cases:`, not a list; `megaclass study --help` shows a complete example"),
        ("", "must hold keys like `cases:`, not a NoneType; "),
        ("a: [", "cannot be read: while parsing a flow node"),
        ("a: !!python/object/apply:os.system [id]", "cannot be read: could not determine a constructor for the tag"),
    ],
)
def test_a_file_that_is_no_study(tmp_path: Path, text: str, expected: str) -> None:
    message = f"study file {tmp_path / 'study.yaml'} {expected}"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        read(tmp_path, text)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    message = f"study file {tmp_path / 'none.yaml'} does not exist; `megaclass study --help` shows a complete example"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        read_study(tmp_path / "none.yaml")
