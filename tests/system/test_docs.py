"""The documents are true where a machine can tell: links, command lines, configurations, tables, the worked example."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from functools import cache
from itertools import groupby, pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token

from megaclass import config
from megaclass.cli import _parser
from megaclass.data.bad_samples import REASONS
from megaclass.errors import UserError
from megaclass.objectives import objective, presets
from megaclass.observe.prometheus import _TABLE as METRICS
from megaclass.parallel.shard import ClassShard
from megaclass.train.outcome import PREEMPTED
from tests.support.cases import Case

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md")])
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
SHELLS = ("sh", "bash", "shell")


def page_name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def tokens(path: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(path.read_text(encoding="utf-8"))


def blocks(path: Path, *languages: str) -> list[str]:
    """The contents of the fenced blocks in one of these languages (the first word after the fence)."""
    return [
        token.content
        for token in tokens(path)
        if token.type == "fence" and (token.info.split() or [""])[0] in languages
    ]


# --- links ------------------------------------------------------------------------------------------------------------


def anchors(path: Path) -> set[str]:
    """The anchors a page's headings get: lower case, hyphens for spaces, no other punctuation."""
    headings = [after for token, after in pairwise(tokens(path)) if token.type == "heading_open"]
    texts = ["".join(part.content for part in heading.children or ()) for heading in headings]
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in texts}


def links(path: Path) -> Iterator[str]:
    for token in tokens(path):
        for part in token.children or ():
            target = part.attrs.get("href") or part.attrs.get("src")
            if target is not None:
                yield str(target)


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_relative_links_resolve(path: Path) -> None:
    for target in links(path):
        if re.match(r"[a-z]+:", target):
            continue
        file_name, _, anchor = target.partition("#")
        file = (path.parent / file_name).resolve() if file_name else path
        assert file.exists(), f"{page_name(path)} links to {target}, which does not exist"
        assert file.is_relative_to(ROOT), f"{page_name(path)} links to {target}, outside of the project"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{page_name(path)} links to {target}, but there is no such heading"


def test_every_page_is_on_the_map() -> None:
    linked = {target.partition("#")[0] for target in links(DOCS / "index.md")}
    assert {path.name for path in DOCS.glob("*.md")} - linked <= {"index.md"}


# --- command lines ----------------------------------------------------------------------------------------------------


def command_lines(path: Path) -> Iterator[list[str]]:
    """Every simple command of the fenced blocks, as words; lines are joined at backslashes, comments left out.

    In blocks that are not marked as shell, which also hold output and trees, only what is plainly a call counts.
    """
    call = r"^(?:\$ )?(?:\w+=\S+ )*(?:\S*/bin/)?(?:megaclass|make|launch/\w+\.sh) .*"
    for text in (*blocks(path, *SHELLS), *re.findall(call, "\n".join(blocks(path, "", "console")), re.MULTILINE)):
        for line in text.replace("\\\n", " ").splitlines():
            if re.search(r"\b(megaclass|launch/|make)\b", line):
                lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars=True)
                lexer.whitespace_split = True
                for is_operator, words in groupby(lexer, lambda word: re.fullmatch(r"[();<>|&]+", word) is not None):
                    if not is_operator:
                        yield list(words)


def arguments_of_megaclass(words: list[str]) -> list[str] | None:
    """What `megaclass` is given by a command, through whatever launcher; None if the command does not call it."""
    if "launch/slurm.sbatch" in words:
        given = words[words.index("launch/slurm.sbatch") + 1 :]
        return ["train", *given[given[:1] == ["--dry-run"] :]]
    for place, word in enumerate(words):
        if word == "megaclass" or word.endswith("/bin/megaclass"):
            before = words[:place]
            is_called = all(re.fullmatch(r"\w+=\S*", other) for other in before)
            if is_called or before[-1] == "-m" or before[0].endswith("launch/docker.sh"):
                return words[place + 1 :]
    return None


def check_arguments(arguments: list[str]) -> None:
    try:
        known, rest = _parser().parse_known_args(arguments)
    except SystemExit as ended:
        assert ended.code == 0, f"megaclass {shlex.join(arguments)} is not understood"  # noqa: PT017
        return
    if known.takes_options:
        config.load(ROOT / known.config, rest)
    else:
        assert not rest, f"megaclass {shlex.join(arguments)}: {rest[0]} is not understood"


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_command_lines_are_understood(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in command_lines(path):
        if words[0] == "make":
            wanted = {word for word in words[1:] if re.fullmatch(r"[a-z]+", word)}
            assert wanted <= targets, f"{page_name(path)}: no target {wanted - targets} in the Makefile"
        for word in words:
            assert not word.startswith(("launch/", "tests/", "docker/")) or (ROOT / word).exists(), (
                page_name(path), word,
            )  # fmt: skip
        arguments = arguments_of_megaclass(words)
        if arguments is not None:
            check_arguments(arguments)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("megaclass data verify d", ["data", "verify", "d"]),
        ("A=1 .venv/bin/megaclass report r", ["report", "r"]),
        ("launch/torchrun.sh --nproc-per-node 2 -m megaclass train c --a.b 3", ["train", "c", "--a.b", "3"]),
        ("launch/docker.sh --shm 2g megaclass report r", ["report", "r"]),
        ("sbatch --nodes 2 launch/slurm.sbatch c.yaml --a.b 3", ["train", "c.yaml", "--a.b", "3"]),
        ("bash launch/slurm.sbatch --dry-run c.yaml", ["train", "c.yaml"]),
        ("cd megaclass", None),
        ("pip install megaclass", None),
    ],
)
def test_what_counts_as_a_call(line: str, expected: list[str] | None) -> None:
    assert arguments_of_megaclass(line.split()) == expected


@pytest.mark.parametrize(
    "line",
    ["data verify", "evaluate r --protocol recall", "train configs/none.yaml", "train configs/demo.yaml --a.b 3"],
)
def test_a_wrong_command_line_is_found(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((AssertionError, UserError)):
        check_arguments(line.split())


# --- configurations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=page_name)
def test_configurations_load_and_say_how_to_run_them(path: Path) -> None:
    config.load(path)
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ")
    commands = [re.split(r"[:,;] ", part)[-1].split() for part in first.removeprefix("# ").split(" or")]
    trained = [arguments[1] for words in commands if (arguments := arguments_of_megaclass(words))]
    assert trained == [page_name(path)], f"the first comment of {path.name} names no command with its path: {first}"


@pytest.mark.parametrize("path", [path for path in PAGES if blocks(path, "yaml")], ids=page_name)
def test_options_in_yaml_blocks_exist(path: Path) -> None:
    for text in blocks(path, "yaml"):
        content: dict[str, Any] = {"dataset": {"path": "data/glyphs"}, "train": {"steps": 1000}}
        for section, options in yaml.safe_load(text).items():
            content[section] = content.get(section, {}) | options
        config.validate(content)


# --- tables -----------------------------------------------------------------------------------------------------------


def options_page() -> str:
    """The text of docs/options.md: every option, one table per section."""
    lines = [
        "# Options",
        "",
        "Every option of a configuration: in the YAML file under its section, or on the command line as "
        "`--section.key value`.",
        "`none` means that nothing is set. This page is made from the code; how is told at the end of",
        "[CONTRIBUTING.md](../CONTRIBUTING.md).",
    ]
    for section, rows in groupby(config.option_table(), lambda row: row[0].split(".")[0]):
        lines += ["", f"## {section}", "", "| option | default | meaning |", "|---|---|---|"]
        for name, default, description in rows:
            lines.append(f"| `{name}` | `{default}` | {description.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


def test_options_page_is_that_of_the_code() -> None:
    assert (DOCS / "options.md").read_text(encoding="utf-8") == options_page(), "make it again: see CONTRIBUTING.md"
    command = next(line for line in blocks(ROOT / "CONTRIBUTING.md", "sh")[-1].splitlines() if "options.md" in line)
    assert "tests.system.test_docs import options_page" in command


def preset_row(name: str, preset: presets.Preset) -> str:
    def show(value: float | None) -> str:
        return "-" if value is None else f"{value:g}"

    positives = {None: "-", True: "on", False: "off"}[preset.batch_positives]
    cells = [
        f"`{name}`", preset.objective, preset.margin_kind, preset.sampler, show(preset.scale), show(preset.margin),
        show(preset.end_point), show(preset.sampling_rate), f"{'always ' if preset.forced else ''}{positives}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |\n"


@pytest.mark.parametrize("name", presets.PRESETS)
def test_every_preset_is_documented(name: str) -> None:
    text = (DOCS / "losses.md").read_text(encoding="utf-8")
    assert preset_row(name, presets.PRESETS[name]) in text, (
        f"the row should be {preset_row(name, presets.PRESETS[name])}"
    )
    assert f"\n### `{name}`\n" in text


def test_metrics_codes_and_reasons_are_those_of_the_code() -> None:
    training = (DOCS / "training.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(megaclass_\w+)", training, re.MULTILINE)) == set(METRICS)
    for name, (_, _, labels, _) in METRICS.items():
        assert not labels or f"`{name}{{{','.join(labels)}}}`" in training, name
    codes = {int(code) for code in re.findall(r"^\| (\d+) \| ", training, re.MULTILINE)}
    assert codes == {0, PREEMPTED, *(kind.exit_code for kind in UserError.__subclasses__())}
    data = (DOCS / "data.md").read_text(encoding="utf-8")
    assert all(f"`{reason}`" in data for reason in REASONS)


# --- the worked example -----------------------------------------------------------------------------------------------


def module_from(path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path.write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(path.parent)
    monkeypatch.delitem(sys.modules, path.stem, raising=False)
    return importlib.import_module(path.stem)


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """docs/add-a-loss.md applied: the loss registered, its rows in the table; gives the oracle with its branch."""
    file, rows, branch = blocks(DOCS / "add-a-loss.md", "python")
    monkeypatch.setattr(objective, "_REGISTRY", dict(objective._REGISTRY))
    module_from(tmp_path / "d_hinge.py", file, monkeypatch)
    for name, preset in eval(f"{{{rows}}}", {"Preset": presets.Preset}).items():
        monkeypatch.setitem(presets.PRESETS, name, preset)
    oracle = (ROOT / "tests" / "support" / "oracle.py").read_text(encoding="utf-8")
    start = oracle.index('    if preset.startswith("d-softmax")')
    end = oracle.index("    else:\n", start)
    indented = "".join(f"    {line}\n" for line in branch.splitlines())
    text = oracle[:end] + indented + oracle[end:]
    return module_from(tmp_path / "oracle_with_example.py", text, monkeypatch)


@pytest.mark.parametrize("preset", ["d-hinge", "d-hinge-k"])
@pytest.mark.parametrize("num_classes", [3, 13])
def test_the_worked_example_works(example: ModuleType, preset: str, num_classes: int) -> None:
    case = Case(preset, num_classes, 5, "any")
    shard = ClassShard(num_classes, 0, 1)
    classifier = case.build(shard, None, grad_divisor=1)
    raw, labels, weight = case.inputs(1)
    embeddings = raw.clone().requires_grad_()
    output = classifier(embeddings, labels, draw_id=3)
    output.loss.backward()
    gradient = classifier.take_row_gradient()
    assert gradient is not None
    class_gradient = torch.zeros_like(weight)
    class_gradient[slice(None) if gradient.rows is None else gradient.rows] = gradient.values
    draw, settings = case.sampler().draw(labels, shard, 3), case.settings()
    expected = example.dense(
        preset, raw, labels, weight, scale=settings.scale, end_point=settings.end_point, negatives=draw.rows
    )
    assert float(expected.intra) > 0
    for actual, wanted in (
        (output.loss.detach(), expected.loss),
        (output.intra, expected.intra),
        (embeddings.grad, expected.embedding_gradient),
        (class_gradient, expected.class_gradient),
    ):
        torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-12)


def test_the_lines_the_example_changes_are_there(example: ModuleType) -> None:
    (diff,) = blocks(DOCS / "add-a-loss.md", "diff")
    before = next(line[1:] for line in diff.splitlines() if line.startswith("-"))
    assert f"{before}\n" in (ROOT / "megaclass" / "objectives" / "__init__.py").read_text(encoding="utf-8")
    assert presets.resolve("d-hinge", end_point=0.8).end_point == 0.8
