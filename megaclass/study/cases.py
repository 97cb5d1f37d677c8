"""The runs a study asks for: every case with its resolved configuration for every seed, all checked before one starts.

Separate from the study file, which is plain text, and from the running: nothing here writes anything.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml

from megaclass import config
from megaclass.config import Config
from megaclass.errors import ConfigError, DataError, UserError
from megaclass.observe.values import dig, flatten, read_json
from megaclass.study.spec import CaseSpec, Study

RUNS = "runs"
"""Folder of the run directories in the output folder."""

_MOST_BYTES = 200  # of the name of a folder; file systems take 255


@dataclass(frozen=True)
class Run:
    """One training of one case.

    Attributes:
        case: name of the case.
        seed: its `train.seed`.
        config: what `megaclass train` would be given.
    """

    case: str
    seed: int
    config: Config

    @property
    def folder(self) -> Path:
        """The run directory."""
        return self.config.run.dir


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        name: unique in the study.
        short: what was varied, or the name; for the points of a plot.
        settings: option -> value, those of the study, of the case and of `vary` together.
        labels: free keys for plots.
        runs: one for every seed, in the order of the seeds.
    """

    name: str
    short: str
    settings: Mapping[str, Any]
    labels: Mapping[str, Any]
    runs: Sequence[Run]

    def value(self, name: str) -> Any:
        """The label of this name, else the resolved option; None where neither has a value."""
        if name in self.labels:
            return self.labels[name]
        return dig(self.runs[0].config.model_dump(mode="json"), name)


def expand(study: Study, out: Path) -> list[Case]:
    """Every case with its runs below `out`, in the order of the file; `vary` makes the last option change fastest.

    Raises:
        ConfigError: with one line for every mistake in any configuration, or where two cases have one name.
    """
    cases: list[Case] = []
    faults: dict[str, list[str]] = {}
    for spec in study.cases:
        for values in itertools.product(*spec.vary.values()):
            varied = dict(zip(spec.vary, values, strict=True))
            name = " ".join([spec.name, *_named(varied)])
            if (size := len(slug(name).encode())) > _MOST_BYTES:
                fault = f"its folder would have a name of {size} bytes, {_MOST_BYTES} are allowed"
                _note(faults, name, f"{fault}; give it a shorter name")
            settings = {**study.settings, **spec.settings, **varied}
            runs = []
            for seed in study.seeds:
                folder = out / RUNS / slug(name) / f"seed-{seed}"
                try:
                    resolved = _resolve(study.base, {**settings, "train.seed": seed, "run.dir": str(folder)})
                except ConfigError as error:
                    _note(faults, name, str(error))
                    break
                runs.append(Run(name, seed, resolved))
            for fault in _unmeasured(study, runs):
                _note(faults, name, fault)
            cases.append(Case(name, _short(spec, varied), settings, spec.labels, runs))
    folders: dict[str, list[str]] = {}
    for case in cases:
        folders.setdefault(slug(case.name), []).append(case.name)
    lines = _fault_lines(faults, len(cases))
    for names in folders.values():
        if len(names) > 1:
            lines.append(f"cases {', '.join(map(repr, names))} would share one folder; give them different names")
    if lines:
        raise ConfigError("\n".join(lines))
    return cases


def check(runs: Sequence[Run]) -> None:
    """Refuse what a run would refuse at its start: losses, batches, data sets, splits; nothing is trained or written.

    One run for each case is looked at, since the others differ in their seed alone. Cost: opens the data set for each.

    Raises:
        ConfigError, DataError: with one line for every case that cannot be trained.
    """
    from megaclass.train.dry_run import describe

    faults: dict[str, list[str]] = {}
    kinds = set()
    first: dict[str, Run] = {}
    for run in runs:
        first.setdefault(run.case, run)
    for name, run in first.items():
        try:
            describe(run.config)
        except UserError as error:
            kinds.add(type(error))
            _note(faults, name, str(error))
    if faults:
        kind = DataError if kinds == {DataError} else ConfigError
        raise kind("\n".join(_fault_lines(faults, len(first))))


def is_done(run: Run) -> bool:
    """Whether the run has been completed, as its summary.json says."""
    return read_json(run.folder / "summary.json").get("status") == "completed"


def check_existing(runs: Sequence[Run]) -> None:
    """Refuse run directories that were made with another configuration; where they lie does not count.

    Raises:
        ConfigError: with one line for every such run that names all differences.
    """
    lines = []
    for run in runs:
        path = run.folder / "config.yaml"
        if not path.exists():
            continue
        try:
            found = config.load(path)
        except ConfigError as error:
            lines.append(f"{path} cannot be used: {' '.join(str(error).split())}")
            continue
        before, now = (flatten(one.model_dump(mode="json")) for one in (found, run.config))
        different = [
            f"{key}: {_shown(before.get(key))} there, {_shown(now.get(key))} wanted"
            for key in sorted(before.keys() | now.keys())
            if key != "run.dir" and before.get(key) != now.get(key)
        ]
        if different:
            lines.append(f"run {run.folder} was made with other options ({'; '.join(different)})")
    if lines:
        raise ConfigError("\n".join([*lines, "give another --out, or delete these folders"]))


def slug(name: str) -> str:
    """The name of a case as the name of its folder: small letters, digits, `._=-`."""
    return re.sub(r"[^\w.=-]+", "-", name.lower()).strip("-.") or "case"


def _resolve(base: Path, settings: Mapping[str, Any]) -> Config:
    """The configuration as the command line would make it of the same options."""
    overrides = []
    for name, value in settings.items():
        given = _default(name) if value is None else value
        overrides.append(f"--{name}={yaml.safe_dump(given, default_flow_style=True)}")
    return config.load(base, overrides)


def _default(name: str) -> Any:
    """What null means for an option: its default; none where it may be none, as that cannot be said otherwise."""
    model: Any = Config
    *sections, last = name.split(".")
    for section in sections:
        model = model.model_fields[section].annotation
    field = model.model_fields[last]
    may_be_none = field.annotation is None or type(None) in get_args(field.annotation)
    return None if may_be_none or field.is_required() else field.get_default(call_default_factory=True)


def _unmeasured(study: Study, runs: Sequence[Run]) -> list[str]:
    """Lines for metrics that no run of a case can have, as their protocol is left out."""
    if not runs:
        return []
    protocols = [name.replace("-", "_") for name in runs[0].config.evaluate.protocols]
    return [
        f"metric {metric.name} is not made by evaluate.protocols ({', '.join(protocols) or 'none'}); add its protocol"
        for metric in study.metrics
        if not metric.is_logged and metric.name.split(".")[0] not in protocols
    ]


def _named(varied: Mapping[str, Any]) -> list[str]:
    """`key=value` for every varied option, with the last part of its name where that tells them apart."""
    last = [name.rsplit(".", 1)[-1] for name in varied]
    return [
        f"{short if last.count(short) == 1 else name}={_shown(value)}"
        for short, (name, value) in zip(last, varied.items(), strict=True)
    ]


def _short(spec: CaseSpec, varied: Mapping[str, Any]) -> str:
    return ", ".join(_shown(value) for value in varied.values()) or spec.name


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value)


def _note(faults: dict[str, list[str]], case: str, text: str) -> None:
    """Note every line of `text` against a case; cases with the same mistake are reported together."""
    for line in text.split("\n"):
        cases = faults.setdefault(line, [])
        if case not in cases:
            cases.append(case)


def _fault_lines(faults: Mapping[str, Sequence[str]], num_cases: int) -> list[str]:
    lines = []
    for fault, names in faults.items():
        is_all = len(names) == num_cases and num_cases > 1
        shown = "every case" if is_all else f"case {', '.join(map(repr, names))}"
        lines.append(f"{shown}: {fault}")
    return lines
