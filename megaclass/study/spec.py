"""What a study file may say, as frozen models, and the one way to read it.

Separate from the runs it describes because it imports nothing heavy: a misspelt name is reported at once, and every
mistake of the file together.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Field, ValidationError, model_validator

from megaclass.config import Section, option_table
from megaclass.errors import ConfigError

LOG = "log"
PROTOCOLS = ("verification", "identification", "retrieval", "one_shot")
"""First part of a metric: `log`, or the protocol whose outcome it is in."""

# Set by the study itself, for every run.
_OURS = {"train.seed": "give `seeds`", "run.dir": "it follows from --out"}


def _nearest(name: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {near[0]}?" if near else ""


def _names_of_options(values: dict[str, Any]) -> dict[str, Any]:
    """The same with `_` for `-` in names; refuses what is no option, and what the study itself sets."""
    known = [row[0] for row in option_table()]
    faults = []
    named = {name.replace("-", "_"): value for name, value in values.items()}
    for name in named:
        if name in _OURS:
            faults.append(f"{name} cannot be set here: {_OURS[name]}")
        elif name not in known:
            faults.append(f"unknown option {name}{_nearest(name, known)}")
    if len(named) < len(values):
        faults.append("an option is given twice, with - and with _")
    if faults:
        raise ValueError("\n".join(faults))
    return named


def _different(values: tuple[Any, ...]) -> tuple[Any, ...]:
    again = _repeated(values)
    if again:
        raise ValueError(f"{', '.join(again)} is given more than once")
    return values


Settings = Annotated[dict[str, Any], AfterValidator(_names_of_options)]
Choices = Annotated[dict[str, Annotated[list[Any], Field(min_length=1)]], AfterValidator(_names_of_options)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class CaseSpec(Section):
    """One case, or several: one for every combination of the values in `vary`."""

    name: str = Field(min_length=1, pattern=r"\w", description="in tables and plots")
    settings: Settings = Field({}, description="option -> value, on top of those of the study")
    vary: Choices = Field({}, description="option -> values; all combinations become cases")
    labels: dict[str, str | int | float] = Field({}, description="free keys for plots")


class Metric(Section):
    """One column of the table; in the file its name alone will do."""

    name: str = Field(description="path in evaluation.trained of summary.json, or log.NAME of metrics.jsonl")
    title: str | None = Field(None, description="for people; default: by name")
    better: Literal["higher", "lower", "none"] | None = Field(None, description="which is best; default: by name")
    percent: bool | None = Field(None, description="shown as percentage; default: what is evaluated")

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _has_a_source(self) -> Metric:
        first, _, rest = self.name.partition(".")
        if first not in (LOG, *PROTOCOLS) or not rest:
            raise ValueError(
                f"metric {self.name!r} must begin with {LOG}., {', '.join(f'{name}.' for name in PROTOCOLS)}"
                f"{_nearest(first, (LOG, *PROTOCOLS))}"
            )
        return self

    @property
    def is_logged(self) -> bool:
        """Whether it comes from metrics.jsonl and not from the evaluation."""
        return self.name.startswith(f"{LOG}.")

    @property
    def is_percent(self) -> bool:
        """Whether values in [0, 1] are shown as percentages."""
        return not self.is_logged if self.percent is None else self.percent

    @property
    def direction(self) -> str:
        """`higher`, `lower` or `none`. A logged number has none by default: losses are not comparable."""
        if self.better is not None:
            return self.better
        if self.is_logged:
            return "none"
        return "lower" if self.name.endswith(".eer") else "higher"


class Plot(Section):
    """One picture: a metric over an option, a label or another metric, a point for every case."""

    file: str = Field(pattern=r"^\w[\w.-]*\.svg$", description="name.svg, in the output folder")
    title: str = Field("", description="above the picture")
    x: str = Field(description="an option, a label, or one of `metrics`")
    y: str = Field(description="one of `metrics`")
    lines: str = Field("case", description="cases alike in this are joined: an option, a label, or `case`")
    log_x: bool = Field(False, description="logarithmic horizontal axis")
    y_min: float | None = Field(None, description="lowest value shown; a line below the picture says what lies lower")
    points_labelled: bool = Field(False, description="write what a point is beside it")


class Study(Section):
    """A study file."""

    base: Path = Field(description="configuration of a run; relative to the study file")
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1), AfterValidator(_different)] = Field(
        description="train.seed of the runs of each case"
    )
    settings: Settings = Field({}, description="option -> value, of every run")
    cases: tuple[CaseSpec, ...] = Field(min_length=1)
    metrics: tuple[Metric, ...] = Field(min_length=1)
    plots: tuple[Plot, ...] = ()

    @model_validator(mode="after")
    def _names_that_belong_together(self) -> Study:
        """Whether plots name what exists, and nothing is there twice; all faults together."""
        metrics = [metric.name for metric in self.metrics]
        labels = {key for case in self.cases for key in case.labels}
        options = {row[0] for row in option_table()}
        faults = [f"metrics: {name} is given more than once" for name in _repeated(metrics)]
        faults += [f"plots: {name} is given more than once" for name in _repeated([plot.file for plot in self.plots])]
        for plot in self.plots:
            allowed: dict[str, tuple[Collection[str], str]] = {
                "x": ({*metrics, *labels, *options}, "an option, a label, or one of `metrics`"),
                "y": (metrics, "one of `metrics`"),
                "lines": ({"case", *labels, *options}, "an option, a label, or `case`"),
            }
            for key, (known, words) in allowed.items():
                name = getattr(plot, key)
                if name not in known:
                    faults.append(f"plots: {key} {name!r} of {plot.file} must be {words}{_nearest(name, known)}")
        if faults:
            raise ValueError("\n".join(faults))
        return self


def read_study(path: Path) -> Study:
    """The study in a YAML file, with `base` as a path from here.

    Raises:
        ConfigError: the file cannot be read, or with one line for every mistake in it.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"study file {path} does not exist; `megaclass study --help` shows a complete example"
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"study file {path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(
            f"study file {path} must hold keys like `cases:`, not a {type(content).__name__}; "
            "`megaclass study --help` shows a complete example"
        )
    try:
        study = Study.model_validate(content)
    except ValidationError as error:
        lines = [line for item in error.errors() for line in _describe(item)]
        raise ConfigError("\n".join([f"study file {path}:", *lines])) from None
    return study.model_copy(update={"base": path.parent / study.base})


def _describe(item: Any) -> list[str]:
    """One pydantic error as lines of ours: where, what is allowed, and the nearest name for a misspelt one."""
    location = [part for part in item["loc"] if part != "[key]"]
    where = re.sub(r"\.\[", "[", ".".join(f"[{part}]" if isinstance(part, int) else str(part) for part in location))
    prefix = f"{where}: " if where else ""
    kind, value = item["type"], item.get("input")
    if kind == "too_short":
        # pydantic also calls a list too short whose items are all wrong, each of which has its own line.
        return [] if value else [f"{where} is empty; give at least one"]
    if kind == "extra_forbidden":
        known = _fields_at(location[:-1])
        return [f"unknown key {where}{_nearest(str(location[-1]), known) or '; allowed are ' + ', '.join(known)}"]
    if kind == "missing":
        return [f"{where} is missing; give it"]
    if kind == "value_error":
        return [f"{prefix}{line}" for line in str(item["ctx"]["error"]).split("\n")]
    if kind == "literal_error":
        return [f"{prefix}{value!r} is not allowed: allowed are {item['ctx']['expected']}"]
    return [f"{prefix}{repr(value)[:80]} is not allowed: {item['msg']}"]


def _fields_at(location: list[Any]) -> list[str]:
    """Names of the keys that may stand at a place in the file."""
    models: dict[str, type[Section]] = {"cases": CaseSpec, "metrics": Metric, "plots": Plot}
    return list(models.get(str(location[0]) if location else "", Study).model_fields)


def _repeated(values: Iterable[Any]) -> list[str]:
    found = list(values)
    return sorted({str(value) for value in found if found.count(value) > 1})
