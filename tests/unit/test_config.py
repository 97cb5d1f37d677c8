"""Configuration: every mistake at once, in one line each, with the nearest name; and a lossless round trip."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megaclass import config
from megaclass.errors import ConfigError

GOOD = "dataset: {path: data/glyphs}\ntrain: {steps: 10}\n"


def load(tmp_path: Path, text: str, *overrides: str) -> config.Config:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return config.load(path, overrides)


def faults(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, *overrides)
    return str(caught.value).split("\n")


def test_all_mistakes_come_at_once(tmp_path: Path) -> None:
    lines = faults(
        tmp_path,
        "train: {stepz: 3, seed: -1, strategy: dpp}\nclassifer: {preset: a}\ndataset: 3\n",
        "--train.global-batch-size", "abc", "--optim.lr=nan", "--foo", "--run.log_every",
    )  # fmt: skip
    assert lines == [
        "argument '--foo' is not understood; options are given as --section.key value",
        "--run.log_every has no value; give it as --run.log_every VALUE",
        "dataset: must be a section with options of its own, not 3",
        "optim.lr: 'nan' is not allowed: Input should be a finite number",
        "train.global_batch_size: 'abc' is not allowed: must be a number (Input should be a valid integer, unable to "
        "parse string as an integer)",
        "train.seed: -1 is not allowed: Input should be greater than or equal to 0",
        "train.strategy: 'dpp' is not allowed: allowed are 'auto', 'ddp', 'fsdp' or 'deepspeed'; did you mean 'ddp'?",
        "unknown option train.stepz; did you mean train.steps?",
        "unknown option classifer; did you mean classifier?",
    ]


def test_option_of_another_section_is_found(tmp_path: Path) -> None:
    lines = faults(tmp_path, GOOD, "--train.sampling_rate", "0.1")
    assert lines == ["unknown option train.sampling_rate; did you mean classifier.sampling_rate?"]


def test_impossible_combinations_come_at_once(tmp_path: Path) -> None:
    lines = faults(tmp_path, "train: {steps: 3, epochs: 4, accumulation_steps: 3}\noptim: {warmup_steps: 3}\n")
    assert lines == [
        "train: give exactly one of train.steps and train.epochs",
        "dataset.path is required; make a data set with `megaclass data glyphs --out data/glyphs` and give "
        "dataset.path: data/glyphs",
        "train.global_batch_size 256 does not divide by train.accumulation_steps 3; choose a multiple",
        "optim.warmup_steps 3 leaves nothing of train.steps 3; lower it",
    ]


def test_overrides_in_both_spellings(tmp_path: Path) -> None:
    made = load(tmp_path, GOOD, "--train.global-batch-size", "96", "--dataset.augment.flip=0.5", "--train.steps", "7")
    assert made.train.global_batch_size == 96
    assert made.train.steps == 7
    assert made.dataset.augment.flip == 0.5


def test_mistakes_in_augmentation(tmp_path: Path) -> None:
    wrong = ("--dataset.augment.crop-area", "[0.5, 1.5]", "--dataset.augment.crop-aspect", "[2, 1]")
    assert faults(tmp_path, GOOD, *wrong, "--dataset.augment.blurr", "1") == [
        "dataset.augment.crop_area: [0.5, 1.5] is not allowed: no more than the whole image can be cut out; end with "
        "at most 1",
        "dataset.augment.crop_aspect: [2, 1] is not allowed: two positive numbers are needed, the smaller one first",
        "unknown option dataset.augment.blurr; did you mean dataset.augment.blur?",
    ]
    colours = ("--dataset.augment.saturation", "0.2", "--dataset.augment.hue", "0.1", "--dataset.augment.grey", "0.5")
    assert faults(tmp_path, GOOD, "--dataset.channels", "1", "--dataset.augment.contrast", "0.5", *colours) == [
        f"dataset.augment.{name} changes colours, and with dataset.channels 1 there are none; leave it out or use "
        "dataset.channels 3"
        for name in ("saturation 0.2", "hue 0.1", "grey 0.5")
    ]
    assert load(tmp_path, GOOD, "--dataset.channels", "3", *colours).dataset.augment.hue == 0.1


COURSE = "{shape: step, points: [[0, 16], [0.75, 4]]}"


@pytest.mark.parametrize(
    "overrides",
    [
        ("--classifier.schedule.scale", COURSE),
        (f"--classifier.schedule.scale={COURSE}",),
        ("--classifier.schedule.scale.shape", "step", "--classifier.schedule.scale.points", "[[0, 16], [0.75, 4]]"),
        ("--classifier.schedule", f"{{scale: {COURSE}}}"),
    ],
)
def test_a_course_on_the_command_line(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    course = load(tmp_path, GOOD, *overrides).classifier.schedule.scale
    assert course is not None
    assert (course.shape, course.points) == ("step", ((0.0, 16.0), (0.75, 4.0)))


def test_the_command_line_changes_what_the_file_says_of_courses_and_hyper_parameters(tmp_path: Path) -> None:
    text = f"{GOOD}classifier: {{hyper: {{exponent: 3}}, schedule: {{scale: {COURSE}, margin: {COURSE}}}}}\n"
    made = load(
        tmp_path, text, "--classifier.hyper.positive-share", "0.5", "--classifier.schedule.scale.shape", "linear",
        "--classifier.schedule.margin", "null",
    )  # fmt: skip
    assert made.classifier.hyper == {"exponent": 3.0, "positive_share": 0.5}
    assert load(tmp_path, text, "--classifier.hyper.exponent", "2").classifier.hyper == {"exponent": 2.0}
    schedule = made.classifier.schedule
    assert schedule.scale == config.Course(shape="linear", points=((0.0, 16.0), (0.75, 4.0)))
    assert schedule.margin is None


def test_mistakes_in_courses_and_hyper_parameters(tmp_path: Path) -> None:
    lines = faults(
        tmp_path, GOOD, "--classifier.schedule.scale", "{shape: stp}", "--classifier.schedule.margin", "0.5",
        "--classifier.schedule.end-point", "{points: [[0, 1, 2]], shap: linear}", "--classifier.schedule.sampling",
        "{}", "--classifier.hyper.exponent", "much",
    )  # fmt: skip
    assert lines == [
        "classifier.hyper.exponent: 'much' is not allowed: must be a number (Input should be a valid number, unable to "
        "parse string as a number)",
        "classifier.schedule.scale.shape: 'stp' is not allowed: allowed are 'step', 'linear' or 'cosine'; did you mean "
        "'step'?",
        "classifier.schedule.scale.points is missing; give it",
        "classifier.schedule.margin: must be a section with options of its own, not 0.5",
        "classifier.schedule.end_point.points.0: [0, 1, 2] is not allowed: Tuple should have at most 2 items after "
        "validation, not 3",
        "unknown option classifier.schedule.end_point.shap; did you mean classifier.schedule.end_point.shape?",
        "unknown option classifier.schedule.sampling; did you mean classifier.schedule.sampling_rate?",
    ]


def test_the_table_says_what_a_course_looks_like() -> None:
    (row,) = [row for row in config.option_table() if row[0] == "classifier.schedule.scale"]
    assert row == ("classifier.schedule.scale", "none", "course of classifier.scale: {shape: ..., points: ...}")


def test_resolved_configuration_reads_back_equal(tmp_path: Path) -> None:
    made = load(
        tmp_path, GOOD, "--classifier.preset", "d-softmax-k", "--optim.milestones", "[0.3, 0.6]",
        "--classifier.schedule.scale", COURSE, "--classifier.hyper.exponent", "2.5",
    )  # fmt: skip
    assert made.classifier.schedule.scale is not None
    assert load(tmp_path, made.to_yaml()) == made


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "cannot be read"),
        ("- 1\n", "must hold sections like `train:`, not a list"),
        ("!!python/object/apply:os.system ['true']", "cannot be read"),
    ],
)
def test_unreadable_files(tmp_path: Path, text: str, message: str) -> None:
    assert message in faults(tmp_path, text)[0]
    assert len(faults(tmp_path, text)) == 1


def test_a_saved_configuration_gets_the_defaults_of_later_options() -> None:
    """A run that was begun before an option existed may be continued: its configuration is that with the default."""
    whole = config.validate({"dataset": {"path": "x"}, "train": {"steps": 9}}).model_dump(mode="json")
    assert config.with_defaults(whole) == whole
    earlier = {name: dict(section) for name, section in whole.items()}
    for section, option in (
        ("dataset", "shuffle_window"),
        ("dataset", "remote"),
        ("classifier", "row_memory"),
        ("optim", "milestones"),
        ("run", "dir"),
    ):
        del earlier[section][option]
    del earlier["observe"]
    assert config.with_defaults(earlier) == whole
    assert config.with_defaults({**whole, "gone": {"option": 1}})["gone"] == {"option": 1}


def test_missing_file_says_where_there_are_some(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing.yaml does not exist; CONFIG comes before the options"):
        config.load(tmp_path / "nothing.yaml")


def test_every_option_is_described() -> None:
    assert all(description for _, _, description in config.option_table())


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)  # fmt: skip


@given(data=st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_value_of_any_option_escapes_as_a_traceback(tmp_path: Path, data: st.DataObject) -> None:
    content = yaml.safe_load(GOOD)
    for name, _, _ in data.draw(st.lists(st.sampled_from(config.option_table()), min_size=1, max_size=3)):
        node = content
        *sections, key = name.split(".")
        for section in sections:
            node = node.setdefault(section, {})
        node[key] = data.draw(VALUES)
    with suppress(ConfigError):  # any other exception would fail the test
        config.validate(content)


def test_configuration_imports_nothing_heavy() -> None:
    code = "import sys, megaclass.config, megaclass.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
