"""The one way to read a configuration: a YAML file plus `--section.key value` overrides, merged and validated once.

Every mistake is reported at once, and the resolved configuration is written beside the run and can be given back
unchanged. There is no inheritance between files and no option in the environment.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import to_jsonable_python

from megaclass.config.models import Config
from megaclass.data.address import redact
from megaclass.errors import ConfigError


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `--section.key value` overrides, validate everything at once.

    Raises:
        ConfigError: the file cannot be read, or with one line for every mistake in it and in the overrides.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"configuration file {path} does not exist; CONFIG comes before the options, and some are in configs/"
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"configuration file {path} cannot be read: {' '.join(str(error).split())}") from None
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise ConfigError(f"configuration file {path} must hold sections like `train:`, not a {type(content).__name__}")
    faults = _apply(content, overrides)
    return validate(content, faults)


def validate(content: dict[str, Any], faults: Sequence[str] = ()) -> Config:
    """The configuration held by a nested dictionary; `faults` are mistakes found before.

    Raises:
        ConfigError: with one line for every mistake.
    """
    lines = list(faults)
    try:
        config = Config.model_validate(content)
    except ValidationError as error:
        for item in error.errors():
            lines.extend(_describe(item))
    if lines:
        raise ConfigError("\n".join(lines))
    return config


def option_table() -> list[tuple[str, str, str]]:
    """Every option as (name, default, description), in the order of the models: for `--help` and the docs."""
    rows = []

    def walk(model: type[BaseModel], prefix: str) -> None:
        for name, field in model.model_fields.items():
            kind = field.annotation
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                walk(kind, f"{prefix}{name}.")
            else:
                default = "none" if field.default is None else str(field.default)
                rows.append((prefix + name, default, (field.description or "") + _form(kind)))

    walk(Config, "")
    return rows


def with_defaults(content: dict[str, Any]) -> dict[str, Any]:
    """A configuration that was saved as plain JSON, with the defaults of options that were not there yet."""

    def filled(model: type[BaseModel], values: dict[str, Any]) -> dict[str, Any]:
        result = dict(values)
        for name, field in model.model_fields.items():
            kind = field.annotation
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                result[name] = filled(kind, values.get(name, {}))
            elif name not in values:
                result[name] = to_jsonable_python(field.get_default(call_default_factory=True))
        return result

    return filled(Config, content)


def _form(kind: Any) -> str:
    """What an option that is a section or nothing looks like: `: {shape: ..., points: ...}`; empty for any other."""
    models = [choice for choice in get_args(kind) if isinstance(choice, type) and issubclass(choice, BaseModel)]
    return "".join(f": {{{', '.join(f'{name}: ...' for name in model.model_fields)}}}" for model in models)


def _apply(content: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Write overrides into `content`; what cannot be understood comes back as lines."""
    faults = []
    tokens = list(overrides)
    while tokens:
        token = tokens.pop(0)
        if not token.startswith("--") or "." not in token.split("=", 1)[0]:
            faults.append(f"argument {token!r} is not understood; options are given as --section.key value")
            continue
        name, equals, value = token[2:].partition("=")
        if not equals:
            if not tokens or tokens[0].startswith("--"):
                faults.append(f"--{name} has no value; give it as --{name} VALUE")
                continue
            value = tokens.pop(0)
        keys = name.replace("-", "_").split(".")
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError:
            parsed = value
        node = content
        for key in keys[:-1]:
            if not isinstance(node.get(key), dict):
                node[key] = {}
            node = node[key]
        node[keys[-1]] = parsed
    return faults


def _describe(item: Any) -> list[str]:
    """One pydantic error as lines of ours: key, value, what is allowed, and the nearest name for a misspelt one."""
    location = [str(part) for part in item["loc"]]
    name = ".".join(location)
    kind, value = item["type"], item.get("input")
    if kind == "extra_forbidden":
        return [f"unknown option {name}{_suggest(location)}"]
    if kind == "value_error" and not location:
        return str(item["ctx"]["error"]).split("\n")
    if kind == "missing":
        return [f"{name} is missing; give it"]
    if kind in ("model_type", "model_attributes_type"):
        return [f"{name}: must be a section with options of its own, not {value!r}"]
    allowed = item["msg"]
    if kind == "literal_error":
        allowed = f"allowed are {item['ctx']['expected']}"
        if isinstance(value, str):
            choices = [part.strip().strip("'") for part in item["ctx"]["expected"].replace(" or ", ",").split(",")]
            near = difflib.get_close_matches(value, choices, 1)
            allowed += f"; did you mean {near[0]!r}?" if near else ""
    elif kind == "float_parsing" or kind == "int_parsing":
        allowed = f"must be a number ({allowed})"
    shown = redact(repr(value)) if not isinstance(value, float) or math.isfinite(value) else str(value)
    return [f"{name}: {shown[:80]} is not allowed: {allowed}"]


def _suggest(location: list[str]) -> str:
    """A "did you mean" for an unknown key: among its siblings, else among all options."""
    model: type[BaseModel] = Config
    for part in location[:-1]:
        kind = model.model_fields[part].annotation if part in model.model_fields else None
        candidates = [kind, *get_args(kind)]
        model = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), model)
    siblings = list(model.model_fields)
    near = difflib.get_close_matches(location[-1], siblings, 1)
    if near:
        return f"; did you mean {'.'.join([*location[:-1], near[0]])}?"
    every: dict[str, str] = {}
    for option in sorted((row[0] for row in option_table()), key=lambda option: option.count(".")):
        every.setdefault(option.rsplit(".", 1)[-1], option)
    near = difflib.get_close_matches(location[-1], list(every), 1)
    return f"; did you mean {every[near[0]]}?" if near else f"; allowed here are {', '.join(siblings)}"
