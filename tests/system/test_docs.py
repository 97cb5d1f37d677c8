"""The documents are true where a machine can tell: links, command lines, configurations, tables, the worked example."""

from __future__ import annotations

import fnmatch
import importlib
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import groupby, pairwise, takewhile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token
from torch import Tensor

from megaclass import config, loss, objectives
from megaclass.classifier import ShardedClassifier
from megaclass.cli import _parser
from megaclass.data.bad_samples import REASONS
from megaclass.errors import ConfigError, UserError
from megaclass.objectives import presets
from megaclass.objectives.margin import MARGINS
from megaclass.objectives.negative_map import NEGATIVE_MAPS
from megaclass.objectives.objective import OBJECTIVES
from megaclass.observe.prometheus import _TABLE as METRICS
from megaclass.parallel.process import World
from megaclass.parallel.shard import ClassShard
from megaclass.study.cases import expand
from megaclass.study.spec import Study, read_study
from megaclass.train.build import resolve_preset
from megaclass.train.outcome import PREEMPTED
from tests.support.spawn import spawn

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
STUDY_PAGES = sorted((DOCS / "study").glob("*.md"))
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md"), *STUDY_PAGES])
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
STUDIES = sorted((ROOT / "configs" / "study").glob("*.yaml"))
ADD_A_LOSS = DOCS / "add-a-loss.md"
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


def test_every_page_of_the_study_is_on_its_map() -> None:
    linked = {(DOCS / target.partition("#")[0]).resolve() for target in links(DOCS / "index.md")}
    for target in links(DOCS / "study" / "README.md") if STUDY_PAGES else ():
        linked.add((DOCS / "study" / target.partition("#")[0]).resolve())
    assert set(STUDY_PAGES) <= linked


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
        resolve_preset(config.load(ROOT / known.config, rest))
        return
    assert not rest, f"megaclass {shlex.join(arguments)}: {rest[0]} is not understood"
    # A study outside configs/ is the reader's own.
    if arguments[0] == "study" and known.config.is_relative_to("configs"):
        names = [case.name for case in expand(read_study(ROOT / known.config), known.out)]
        assert any(fnmatch.fnmatchcase(name, known.only or "*") for name in names), (known.only, names)


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_command_lines_are_understood(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in command_lines(path):
        if words[0] == "make":
            wanted = {word for word in words[1:] if re.fullmatch(r"[a-z][a-z-]*", word)}
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
    [
        "data verify", "evaluate r --protocol recall", "train configs/none.yaml", "train configs/demo.yaml --a.b 3",
        "train configs/demo.yaml --classifier.preset d-sofmax", "train configs/demo.yaml --classifier.hyper.power 3",
        "study configs/study/none.yaml --out runs/none", "study losses.yaml",
    ],
)  # fmt: skip
def test_a_wrong_command_line_is_found(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((AssertionError, UserError)):
        check_arguments(line.split())


# --- configurations ---------------------------------------------------------------------------------------------------


def said_commands(path: Path) -> list[list[str]]:
    """What may be commands in the comment that a file begins with: each as words."""
    comment = takewhile(lambda line: line.startswith("# "), path.read_text(encoding="utf-8").splitlines())
    parts = [part for line in comment for part in re.split(r" or\b| && ", line[2:])]
    return [re.split(r"[:,;] ", part)[-1].split() for part in parts]


@pytest.mark.parametrize("path", CONFIGS, ids=page_name)
def test_configurations_load_and_say_how_to_run_them(path: Path) -> None:
    resolve_preset(config.load(path))
    said = [arguments_of_megaclass(words) for words in said_commands(path)]
    trained = [arguments[1] for arguments in said if arguments]
    assert trained == [page_name(path)], f"the first comment of {path.name} names no command with its path"


@pytest.mark.parametrize("path", STUDIES, ids=page_name)
def test_studies_load_and_say_how_to_run_them(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for case in expand(read_study(path), tmp_path):
        resolve_preset(case.runs[0].config)
    said = [arguments_of_megaclass(words) for words in said_commands(path)]
    assert ["study", page_name(path)] in [arguments[:2] for arguments in said if arguments]


@pytest.mark.parametrize("path", [path for path in PAGES if blocks(path, "yaml")], ids=page_name)
def test_options_in_yaml_blocks_exist(path: Path, request: pytest.FixtureRequest) -> None:
    if path == ADD_A_LOSS:
        request.getfixturevalue("example")
    for text in blocks(path, "yaml"):
        given = yaml.safe_load(text)
        if "cases" in given:
            Study.model_validate(given)
            continue
        content: dict[str, Any] = {"dataset": {"path": "data/glyphs"}, "train": {"steps": 1000}}
        for section, options in given.items():
            content[section] = content.get(section, {}) | options
        resolve_preset(config.validate(content))


# --- tables -----------------------------------------------------------------------------------------------------------


OPTIONS_EXAMPLE = [
    "megaclass train configs/demo.yaml --classifier.scale null \\",
    "    --classifier.schedule.scale '{shape: step, points: [[0, 32], [0.75, 16]]}'",
    "megaclass train configs/demo.yaml --classifier.schedule.end-point.points '[[0, 0.7], [0.5, 0.9]]'",
    "megaclass train configs/demo.yaml --classifier.preset sphereface2 --classifier.sampling-rate null \\",
    "    --classifier.hyper.positive-share 0.8",
]


def options_page() -> str:
    """The text of docs/options.md: every option, one table per section."""
    lines = [
        "# Options",
        "",
        "Every option of a configuration: in the YAML file under its section, or on the command line as "
        "`--section.key value`.",
        "`none` means that nothing is set; the value `null` takes an option back to that. An option with braces is a",
        "section of its own ([training.md](training.md#what-moves-during-a-run)). `classifier.hyper` holds what the",
        "chosen loss alone has ([losses.md](losses.md)). Both can be given as a whole or part by part:",
        "",
        "```sh",
        *OPTIONS_EXAMPLE,
        "```",
        "",
        "This page is made from the code; how is told at the end of [CONTRIBUTING.md](../CONTRIBUTING.md).",
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
        show(preset.end_point), show(preset.sampling_rate), positives,
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

NUM_CLASSES, BATCH, DIM, DRAW_ID = 13, 6, 7, 3
WORKED = [
    ("d-hinge", {}),
    ("d-hinge-k", {"sampling_rate": 0.4}),
    ("fading", {}),
    ("fading", {"margin": 0.2, "hyper": {"power": 3.0}}),
    ("d-softmax-near", {"scale": 8.0}),
    ("d-softmax-near", {"scale": 64.0, "hyper": {"near_weight": 2.0}}),
    ("contrastive", {"hyper": {"border": 0.1}}),
    ("contrastive-k", {"sampling_rate": 0.4}),
]


def apply_example(folder: Path) -> None:
    """What the page tells, in this process and with its files in `folder`: write them, list them, import them."""
    text = ADD_A_LOSS.read_text(encoding="utf-8")
    files = re.findall(r"^`megaclass/objectives/(\w+)\.py`:\n\n```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    for name, content in files:
        (folder / f"{name}.py").write_text(content, encoding="utf-8")
    objectives.__path__.append(str(folder))
    (diff,) = blocks(ADD_A_LOSS, "diff")
    before, after = (
        "".join(f"{line[1:]}\n" for line in diff.splitlines() if line[0] in signs) for signs in (" -", " +")
    )
    listing = (ROOT / "megaclass" / "objectives" / "__init__.py").read_text(encoding="utf-8")
    assert listing.count(before) == 1, "the lines that the diff changes are not there"
    exec(compile(listing.replace(before, after), "objectives", "exec"), {"__name__": "megaclass.objectives"})
    assert f"megaclass.objectives.{files[0][0]}" in sys.modules, "the diff does not list the file"
    for name, _ in files[1:]:
        importlib.import_module(f"megaclass.objectives.{name}")


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """docs/add-a-loss.md applied, and taken back afterwards."""
    for registry in (OBJECTIVES, MARGINS, NEGATIVE_MAPS):
        monkeypatch.setattr(registry, "_classes", dict(registry._classes))
    shipped, path, modules = dict(presets.PRESETS), list(objectives.__path__), set(sys.modules)
    apply_example(tmp_path)
    yield
    objectives.__path__[:] = path
    for name in set(sys.modules) - modules:
        if name.startswith("megaclass.objectives."):
            del sys.modules[name]
            delattr(objectives, name.rsplit(".", 1)[1])
    presets.PRESETS.clear()
    presets.PRESETS.update(shipped)


def entries() -> str:
    """The page's entries of the oracle."""
    return "\n\n".join(text for text in blocks(ADD_A_LOSS, "python") if text.startswith("def "))


def formulas() -> dict[str, Any]:
    """Those entries in tables that hold nothing else: what they need of the oracle is here, in its own words."""
    known: dict[str, Any] = {
        "Batch": SimpleNamespace,
        "Tensor": Tensor,
        "torch": torch,
        "MARGINS": {"none": lambda batch: batch.own},
        "NEGATIVE_MAPS": {"identity": lambda batch: batch.cosines},
        "OBJECTIVES": {
            "softmax": lambda batch: (
                torch.zeros_like(batch.own),
                torch.log(1 + (batch.count * torch.exp(batch.scale * batch.mapped)).sum(1) / torch.exp(batch.positive)),
            ),
            "d-softmax": lambda batch: (
                torch.log(1 + torch.exp(batch.scale * batch.end_point - batch.positive)),
                torch.log(1 + (batch.count * torch.exp(batch.scale * batch.mapped)).sum(1)),
            ),
        },
        "END_POINTS": {},
    }
    exec(entries(), known)
    return known


def dense(preset: presets.Preset, embeddings: Tensor, labels: Tensor, weight: Tensor, count: Tensor) -> list[Tensor]:
    """Loss, its two parts and the gradients of embeddings and class weights, by the page's formulas in one process.

    `count` [classes] is how often each class counts as a negative.
    """
    tables = formulas()
    x, w = embeddings.clone().requires_grad_(), weight.clone().requires_grad_()
    cosines = torch.nn.functional.normalize(x, dim=1) @ torch.nn.functional.normalize(w, dim=1).T
    places = torch.arange(len(labels))
    counts = count.expand_as(cosines).clone()
    counts[places, labels] = 0.0
    batch = SimpleNamespace(
        scale=preset.scale, end_point=preset.end_point, margin=preset.margin or 0.0, hyper=preset.hyper,
        cosines=cosines, own=cosines[places, labels], count=counts,
    )  # fmt: skip
    batch.positive = batch.scale * tables["MARGINS"][preset.margin_kind](batch)
    batch.mapped = tables["NEGATIVE_MAPS"][preset.negative_map](batch)
    intra, inter = (part.mean() for part in tables["OBJECTIVES"][preset.objective](batch))
    return [(intra + inter).detach(), intra.detach(), inter.detach(), *torch.autograd.grad(intra + inter, (x, w))]


def inputs() -> tuple[Tensor, Tensor]:
    """Embeddings of the global batch, two of them close to their class or to another, and labels."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.tensor([0, 5, 12, 5, 7, 3])
    embeddings = torch.randn(BATCH, DIM, generator=generator, dtype=torch.float64)
    shard = ClassShard(NUM_CLASSES, 0, 1)
    rows = ShardedClassifier(DIM, shard, loss.build(presets.resolve("softmax"), NUM_CLASSES, seed=0), seed=9).weight
    embeddings[0] = 100 * rows[0].double() + 0.1 * embeddings[0]
    embeddings[1] = 100 * rows[6].double() + 0.1 * embeddings[1]
    return embeddings, labels


def classifier_of(preset: presets.Preset, world: World | None = None, kernel: str = "auto") -> ShardedClassifier:
    shard = ClassShard(NUM_CLASSES, 0, 1) if world is None else ClassShard(NUM_CLASSES, world.rank, world.size)
    built = loss.build(preset, NUM_CLASSES, seed=4)
    group, divisor = (None, 1) if world is None else (world.group, world.size)
    return ShardedClassifier(
        DIM, shard, built, seed=9, group=group, grad_divisor=divisor, kernel=kernel, dtype=torch.float64
    )


def step(classifier: ShardedClassifier, embeddings: Tensor, labels: Tensor) -> tuple[list[Tensor], Tensor]:
    """What `dense` gives, of this rank's part of the batch and this rank's rows; and the end point as it is shown."""
    raw = embeddings.clone().requires_grad_()
    output = classifier(raw, labels, draw_id=DRAW_ID, monitor=True)
    output.loss.backward()
    gradient = classifier.take_row_gradient()
    assert gradient is not None
    assert raw.grad is not None
    assert output.monitors is not None
    rows = torch.zeros_like(classifier.weight)
    rows[slice(None) if gradient.rows is None else gradient.rows] = gradient.values
    return [output.loss.detach(), output.intra, output.inter, raw.grad, rows], output.monitors.end_point


def counts(classifier: ShardedClassifier, labels: Tensor) -> Tensor:
    """[classes] how often each class counts as a negative in the draw, by the sampler of the whole matrix."""
    draw = classifier.loss.sampler.draw(labels, classifier.shard, DRAW_ID, classifier.loss.preset.sampling_rate or 1.0)
    found = torch.zeros(NUM_CLASSES, dtype=torch.float64)
    weight = torch.as_tensor(draw.log_weight, dtype=torch.float64).exp()
    found[slice(None) if draw.rows is None else draw.rows] = weight
    return found


def check_equal(found: list[Tensor], wanted: list[Tensor]) -> None:
    for actual, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()) + 1e-14)


@pytest.mark.usefixtures("example")
@pytest.mark.parametrize("kernel", ["reference", "chunked"])
@pytest.mark.parametrize(("name", "options"), WORKED)
def test_the_worked_example_works(name: str, options: Mapping[str, Any], kernel: str) -> None:
    preset = presets.resolve(name, **options)
    embeddings, labels = inputs()
    classifier = classifier_of(preset, kernel=kernel)
    negatives = counts(classifier, labels)
    assert (0 < len(negatives.nonzero()) < NUM_CLASSES) == (preset.sampler == "classes")
    found, end_point = step(classifier, embeddings, labels)
    wanted = dense(preset, embeddings, labels, classifier.weight, negatives)
    assert float(wanted[2]) > 0
    check_equal(found, wanted)
    if preset.end_point is not None:
        assert float(wanted[1]) > 0
        assert float(end_point) == pytest.approx(preset.end_point)


def _step_of_a_rank(world: World, folder: Path) -> list[list[Tensor]]:
    apply_example(folder / str(world.rank))
    embeddings, labels = inputs()
    mine = slice(world.rank * BATCH // world.size, (world.rank + 1) * BATCH // world.size)
    made = (classifier_of(presets.resolve(name, **options), world) for name, options in WORKED)
    return [step(classifier, embeddings[mine], labels[mine])[0] for classifier in made]


@pytest.mark.distributed
@pytest.mark.usefixtures("example")
def test_the_worked_example_works_on_two_ranks(tmp_path: Path) -> None:
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    embeddings, labels = inputs()
    for (name, options), first, second in zip(WORKED, *spawn(_step_of_a_rank, 2, tmp_path), strict=True):
        preset = presets.resolve(name, **options)
        whole = classifier_of(preset)
        wanted = dense(preset, embeddings, labels, whole.weight, counts(whole, labels))
        # Embedding gradients are those before the backbone's are averaged over the ranks.
        gradients = [torch.cat([first[3], second[3]]) / 2, torch.cat([first[4], second[4]])]
        check_equal([*first[:3], *gradients], wanted)
        check_equal(second[:3], wanted[:3])


@pytest.mark.usefixtures("example")
def test_the_oracle_takes_the_entries_of_the_worked_example() -> None:
    from tests.support import oracle

    known = dict(vars(oracle))
    for table in ("MARGINS", "NEGATIVE_MAPS", "OBJECTIVES", "END_POINTS"):
        known[table] = dict(known[table])
    path = Path(oracle.__file__)
    exec(compile(path.read_text(encoding="utf-8") + "\n\n" + entries(), path.name, "exec"), known)
    embeddings, labels = inputs()
    for name, options in WORKED:
        preset = presets.resolve(name, **options)
        classifier = classifier_of(preset)
        negatives = counts(classifier, labels)
        made = known["dense"](
            preset.objective, embeddings, labels, classifier.weight, scale=preset.scale, margin=preset.margin or 0.0,
            margin_kind=preset.margin_kind, negative_map=preset.negative_map, end_point=preset.end_point or 0.9,
            hyper=preset.hyper, count=negatives,
        )  # fmt: skip
        wanted = dense(preset, embeddings, labels, classifier.weight, negatives)
        check_equal([made.loss, made.intra, made.inter, made.embedding_gradient, made.class_gradient], wanted)


@pytest.mark.usefixtures("example")
def test_the_options_of_the_worked_example_are_those_of_the_page() -> None:
    assert presets.resolve("d-hinge", end_point=0.8).end_point == 0.8
    assert presets.resolve("fading").margin == 0.35
    with pytest.raises(ConfigError, match=r"classifier.hyper.powr .* did you mean 'power'"):
        presets.resolve("fading", hyper={"powr": 3.0})
    with pytest.raises(ConfigError, match=r"classifier.hyper.near_weight -1 is outside \(0, inf\)"):
        presets.resolve("d-softmax-near", hyper={"near_weight": -1.0})
    with pytest.raises(ConfigError, match="makes no sense with margin 'fading'"):
        loss.build(presets.resolve("fading"), NUM_CLASSES, seed=0, normalisation="batch-norm")
    # Beyond what float32 holds as it is; `largest` tells.
    assert loss.build(presets.resolve("d-softmax-near", hyper={"near_weight": 2.0}), NUM_CLASSES, seed=0).use_maximum


def test_the_worked_example_is_gone_afterwards() -> None:
    assert not {name for name, _ in WORKED} & set(presets.PRESETS)
