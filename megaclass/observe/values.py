"""Values out of files that may hold anything, taken for what they are.

Separate from the report so that its text says what is shown, and this what is believed: nothing here raises because a
value has another type than a run would have written.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml


def dig(value: object, path: str) -> Any:
    """What stands at a dotted path in nested mappings; None if nothing does."""
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def flatten(value: object, prefix: str = "") -> dict[str, object]:
    """Nested mappings as one with dotted keys."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    flat: dict[str, object] = {}
    for key, item in value.items():
        flat |= flatten(item, f"{prefix}.{key}" if prefix else str(key))
    return flat


def number(value: object) -> float | None:
    """The value as a float if it is a finite number of ordinary size, else None."""
    return float(value) if isinstance(value, int | float) and abs(value) < 1e300 and math.isfinite(value) else None


def text(value: object, form: str = "{}") -> str:
    """Any value as short text: whole numbers with separators, others to four digits; nothing for None."""
    if value is None:
        return ""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**18:
        return form.format(f"{value:,}")
    if isinstance(value, float):
        return form.format(f"{value:.4g}")
    return form.format(str(value)[:200]) if not isinstance(value, int) else form.format("a huge number")


def percent(value: object) -> str:
    """A share as a percentage; anything else as text, a hyphen for nothing."""
    share = number(value)
    return f"{share:.2%}" if share is not None else text(value) or "-"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one if there is no such file or it holds something else."""
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def read_yaml(path: Path) -> tuple[dict[str, Any], str]:
    """The sections in a YAML file, none where they cannot be read, and its text."""
    try:
        content_text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return {}, ""
    try:
        content = yaml.safe_load(content_text)
    except (yaml.YAMLError, RecursionError, ValueError):
        content = None
    return (content if isinstance(content, dict) else {}), content_text
