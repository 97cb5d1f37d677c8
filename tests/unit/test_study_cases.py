"""Which runs a study asks for, and what is refused before the first of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from megaclass.config import Config
from megaclass.errors import ConfigError, DataError
from megaclass.study.cases import Case, check, check_existing, expand, is_done, slug
from megaclass.study.spec import Study, read_study
from tests.support.training import small_config, small_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("data") / "tiny")


def study(folder: Path, cases: list[dict[str, Any]], *, dataset: Path | None = None, **changes: Any) -> Study:
    base = small_config(dataset or folder / "no-data", folder / "unused", train={"checkpoint_every": 7})
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    content = {"base": "base.yaml", "seeds": [4, 2], "cases": cases, "metrics": ["retrieval.recall_at_1"], **changes}
    (folder / "study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return read_study(folder / "study.yaml")


def refused(folder: Path, cases: list[dict[str, Any]], **changes: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        expand(study(folder, cases, **changes), folder / "out")
    return str(caught.value).split("\n")


def only(cases: list[Case]) -> Config:
    (case,) = cases
    return case.runs[0].config


def test_every_case_has_a_run_for_every_seed_in_a_folder_of_its_own(tmp_path: Path) -> None:
    cases = expand(study(tmp_path, [{"name": "D-Softmax"}, {"name": "Partial FC, rate 1/4"}]), tmp_path / "out")
    runs = [run for case in cases for run in case.runs]
    assert [(run.case, run.seed, run.config.train.seed) for run in runs] == [
        ("D-Softmax", 4, 4), ("D-Softmax", 2, 2), ("Partial FC, rate 1/4", 4, 4), ("Partial FC, rate 1/4", 2, 2),
    ]  # fmt: skip
    assert [str(run.folder.relative_to(tmp_path / "out")) for run in runs] == [
        "runs/d-softmax/seed-4", "runs/d-softmax/seed-2",
        "runs/partial-fc-rate-1-4/seed-4", "runs/partial-fc-rate-1-4/seed-2",
    ]  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_vary_makes_all_combinations_and_the_last_option_changes_fastest(tmp_path: Path) -> None:
    vary = {"classifier.scale": [8, 16], "classifier.sampling_rate": [0.25, None, 1]}
    cases = expand(study(tmp_path, [{"name": "k", "vary": vary}]), tmp_path)
    assert [case.name for case in cases] == [
        f"k scale={scale} sampling_rate={rate}" for scale in (8, 16) for rate in ("0.25", "none", "1")
    ]
    assert [case.short for case in cases] == [f"{s}, {r}" for s in (8, 16) for r in ("0.25", "none", "1")]
    assert [(case.value("classifier.scale"), case.value("classifier.sampling_rate")) for case in cases] == [
        (8, 0.25), (8, None), (8, 1), (16, 0.25), (16, None), (16, 1),
    ]  # fmt: skip


def test_options_with_the_same_last_word_are_told_apart_in_names(tmp_path: Path) -> None:
    vary = {"dataset.augment.scale": [0.5], "classifier.scale": [8], "train.steps": [9]}
    (case,) = expand(study(tmp_path, [{"name": "a", "vary": vary}]), tmp_path)
    assert case.name == "a dataset.augment.scale=0.5 classifier.scale=8 steps=9"


def test_settings_of_the_case_come_after_those_of_the_study_and_vary_last(tmp_path: Path) -> None:
    case = {"name": "a", "settings": {"optim.lr": 2, "train.steps": 20}, "vary": {"train.steps": [30]}}
    everywhere = {"optim.lr": 1, "train.steps": 10, "optim.warmup_steps": 1}
    (made,) = expand(study(tmp_path, [case], settings=everywhere), tmp_path)
    found = made.runs[0].config
    assert (found.optim.lr, found.train.steps, found.optim.warmup_steps) == (2, 30, 1)
    assert found.train.checkpoint_every == 7  # of base
    assert made.settings == {"optim.lr": 2, "train.steps": 30, "optim.warmup_steps": 1}


def test_null_takes_an_option_of_base_back_to_its_default(tmp_path: Path) -> None:
    names = ("classifier.sampling_rate", "classifier.scale", "train.checkpoint_every", "evaluate.protocols")
    found = only(expand(study(tmp_path, [{"name": "a", "settings": dict.fromkeys(names)}]), tmp_path))
    assert (found.classifier.sampling_rate, found.classifier.scale) == (None, None)
    assert found.train.checkpoint_every == Config.model_fields["train"].annotation().checkpoint_every != 7
    assert found.evaluate.protocols == ("verification", "identification", "retrieval")


def test_null_of_an_option_that_may_be_none_is_none(tmp_path: Path) -> None:
    """Gradient clipping is on by default; this is the only way to turn it off."""
    found = only(expand(study(tmp_path, [{"name": "a", "settings": {"optim.clip_norm": None}}]), tmp_path))
    assert found.optim.clip_norm is None


def test_null_of_a_required_option_is_refused(tmp_path: Path) -> None:
    (line,) = refused(tmp_path, [{"name": "a", "settings": {"dataset.path": None}}])
    assert line.startswith("case 'a': dataset.path is required")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("evaluate.baselines", True),
        ("optim.milestones", [0.5, 0.8]),
        ("optim.lr", 1e-05),
        ("optim.schedule", "step"),
        ("evaluate.gallery_source", "no: [plain] = 'name' # at all"),
        ("classifier.hyper", {"t": 0.5}),
    ],
)
def test_values_reach_the_configuration_as_they_are(tmp_path: Path, option: str, value: Any) -> None:
    (case,) = expand(study(tmp_path, [{"name": "a", "settings": {option: value}}]), tmp_path)
    assert case.value(option) == value


def test_a_number_that_yaml_reads_as_text_is_the_number(tmp_path: Path) -> None:
    (case,) = expand(study(tmp_path, [{"name": "a", "vary": {"optim.lr": ["1e-3"]}}]), tmp_path)
    assert case.value("optim.lr") == 0.001
    assert case.name == "a lr=1e-3"


def test_a_label_comes_before_an_option_of_its_name(tmp_path: Path) -> None:
    (case,) = expand(study(tmp_path, [{"name": "a", "labels": {"optim.lr": "low", "loss": "A"}}]), tmp_path)
    assert (case.value("optim.lr"), case.value("loss"), case.value("nothing")) == ("low", "A", None)
    assert case.value("train.steps") == 50


@pytest.mark.parametrize(("first", "second"), [("a b", "a-b"), ("Loss", "loss"), ("x:1", "x/1")])
def test_two_cases_with_one_folder_are_refused(tmp_path: Path, first: str, second: str) -> None:
    assert refused(tmp_path, [{"name": first}, {"name": "other"}, {"name": second}]) == [
        f"cases {first!r}, {second!r} would share one folder; give them different names"
    ]


def test_a_folder_name_no_file_system_takes_is_refused(tmp_path: Path) -> None:
    name = "ü" * 150  # two bytes each
    (line,) = refused(tmp_path, [{"name": name}])
    assert line == f"case {name!r}: its folder would have a name of 300 bytes, 200 are allowed; give it a shorter name"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("D-Softmax-K sampling_rate=0.0625", "d-softmax-k-sampling_rate=0.0625"),
        ("../../etc", "etc"),
        ("..", "case"),
        ("a/../b", "a-..-b"),
        ("Größe", "größe"),
    ],
)
def test_folders_cannot_leave_the_output_folder(name: str, expected: str) -> None:
    assert slug(name) == expected


def test_every_mistake_of_every_case_is_told_and_equal_ones_once(tmp_path: Path) -> None:
    cases = [
        {"name": "a", "settings": {"optim.schedule": "cosin"}},
        {"name": "b", "settings": {"optim.lr": -1}},
        {"name": "c", "settings": {"optim.schedule": "cosin", "train.steps": "many"}},
    ]
    lines = refused(tmp_path, cases)
    assert any(line.startswith("case 'a', 'c': optim.schedule: 'cosin' is not allowed") for line in lines), lines
    assert any(line.startswith("case 'b': optim.lr: -1 is not allowed") for line in lines)
    assert any(line.startswith("case 'c': train.steps: 'many' is not allowed") for line in lines)
    assert len(lines) == 3


def test_a_mistake_of_all_is_told_once(tmp_path: Path) -> None:
    (line,) = refused(tmp_path, [{"name": "a"}, {"name": "b"}], settings={"optim.lr": -1})
    assert line.startswith("every case: optim.lr: -1 is not allowed")


def test_a_base_that_is_not_there_is_told_once(tmp_path: Path) -> None:
    (line,) = refused(tmp_path, [{"name": "a"}, {"name": "b"}], base="none.yaml")
    assert line.startswith(f"every case: configuration file {tmp_path / 'none.yaml'} does not exist")


def test_a_metric_no_protocol_makes_is_refused(tmp_path: Path) -> None:
    metrics = ["retrieval.map", "verification.accuracy", "one_shot.20", "log.loss"]
    both = {"name": "b", "settings": {"evaluate.protocols": ["retrieval", "one-shot"]}}
    assert refused(tmp_path, [{"name": "a"}, both], metrics=metrics) == [
        "case 'a': metric verification.accuracy is not made by evaluate.protocols (retrieval); add its protocol",
        "case 'a': metric one_shot.20 is not made by evaluate.protocols (retrieval); add its protocol",
        "case 'b': metric verification.accuracy is not made by evaluate.protocols (retrieval, one_shot); "
        "add its protocol",
    ]


def test_logged_metrics_need_no_protocol(tmp_path: Path) -> None:
    wanted = study(tmp_path, [{"name": "a"}], metrics=["log.loss"], settings={"evaluate.protocols": []})
    assert len(expand(wanted, tmp_path)) == 1


# --- the dry run of every case ----------------------------------------------------------------------------------------


def runs_of(folder: Path, dataset: Path, cases: list[dict[str, Any]], **changes: Any) -> list[Any]:
    wanted = study(folder, cases, dataset=dataset, **changes)
    return [run for case in expand(wanted, folder / "out") for run in case.runs]


def test_every_case_is_checked_and_nothing_is_written(dataset: Path, tmp_path: Path) -> None:
    other = {"classifier.preset": "cosface", "classifier.sampling_rate": None}
    check(runs_of(tmp_path, dataset, [{"name": "a"}, {"name": "b", "settings": other}]))
    assert not (tmp_path / "out").exists()


def test_what_only_the_dry_run_finds_is_told_of_every_case_in_their_order(dataset: Path, tmp_path: Path) -> None:
    cases = [
        {"name": "a", "settings": {"train.global_batch_size": 1000}},
        {"name": "b"},
        {"name": "c", "settings": {"classifier.preset": "d-sofmax-k"}},
        {"name": "d", "settings": {"train.global_batch_size": 1000}},
    ]
    with pytest.raises(ConfigError) as caught:
        check(runs_of(tmp_path, dataset, cases))
    first, second = str(caught.value).split("\n")
    assert first.startswith("case 'a', 'd': ")
    assert "1000" in first
    assert second.startswith("case 'c': ")
    assert "did you mean" in second
    assert "d-softmax-k" in second


def test_a_missing_data_set_is_a_fault_of_the_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^every case: .*no-data.* does not exist"):
        check(runs_of(tmp_path, tmp_path / "no-data", [{"name": "a"}, {"name": "b"}]))


# --- run directories that are there already ---------------------------------------------------------------------------


def test_a_run_with_the_same_options_goes_on_wherever_it_lies(dataset: Path, tmp_path: Path) -> None:
    (run,) = runs_of(tmp_path, dataset, [{"name": "a"}], seeds=[1])
    run.folder.mkdir(parents=True)
    elsewhere = run.config.model_copy(update={"run": run.config.run.model_copy(update={"dir": Path("/elsewhere")})})
    (run.folder / "config.yaml").write_text(elsewhere.to_yaml())
    check_existing([run])


def test_a_run_with_other_options_is_refused_with_every_difference(dataset: Path, tmp_path: Path) -> None:
    old = runs_of(tmp_path, dataset, [{"name": "a", "settings": {"optim.lr": 0.5}}, {"name": "b"}])
    for run in old:
        run.folder.mkdir(parents=True)
        (run.folder / "config.yaml").write_text(run.config.to_yaml())
    check_existing(old)
    changed = {"optim.lr": 0.25, "classifier.sampling_rate": None}
    new = runs_of(tmp_path, dataset, [{"name": "a", "settings": changed}, {"name": "b"}], seeds=[2, 9])
    with pytest.raises(ConfigError) as caught:
        check_existing(new)
    assert str(caught.value) == (
        f"run {tmp_path / 'out' / 'runs' / 'a' / 'seed-2'} was made with other options "
        "(classifier.sampling_rate: 0.3 there, none wanted; optim.lr: 0.5 there, 0.25 wanted)\n"
        "give another --out, or delete these folders"
    )


def test_a_run_whose_options_cannot_be_read_is_refused(dataset: Path, tmp_path: Path) -> None:
    (run,) = runs_of(tmp_path, dataset, [{"name": "a"}], seeds=[1])
    run.folder.mkdir(parents=True)
    (run.folder / "config.yaml").write_text("optim: {rl: 1}\n")
    message = f"^{re.escape(str(run.folder / 'config.yaml'))} cannot be used: .*unknown option optim.rl"
    with pytest.raises(ConfigError, match=message):
        check_existing([run])


@pytest.mark.parametrize(
    ("summary", "expected"),
    [(None, False), ("{", False), ("[]", False), ('{"status": "preempted"}', False), ('{"status": "completed"}', True)],
)
def test_a_run_is_done_when_its_summary_says_so(tmp_path: Path, summary: str | None, expected: bool) -> None:
    ((run,),) = (case.runs for case in expand(study(tmp_path, [{"name": "a"}], seeds=[1]), tmp_path / "out"))
    run.folder.mkdir(parents=True)
    if summary is not None:
        (run.folder / "summary.json").write_text(summary)
    assert is_done(run) is expected
