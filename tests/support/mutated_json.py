"""What can be done to the JSON files of a data set; beside `mutations`, which does the rest."""

from __future__ import annotations

import json
import random
from typing import Any

VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 3, 1.5, 1e308, 10**30, 2**31, 2**63, 10**12, float("nan"), float("inf"), "", "x",
    "../canary", "/etc/passwd", "train-000000.tar", "pipe:touch canary", "..", ".", "a/b", "NUL\0", "\ud800",
    "x" * 100_000, [], {}, [[]], {"x": 1}, [None], "dataset.json", "train-000000.tar\n",
)  # fmt: skip


def places(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value."""
    found = [path] if path else []
    if isinstance(content, dict):
        found += [place for key in content for place in places(content[key], (*path, key))]
    elif isinstance(content, list):
        found += [place for number, item in enumerate(content) for place in places(item, (*path, number))]
    return found


def mutated(raw: bytes, chance: random.Random) -> tuple[bytes, str]:
    """Another JSON text, or something that is none."""
    content = json.loads(raw)
    kind = chance.choice(("value", "value", "value", "value", "remove", "add", "twice", "text", "swap", "repeat"))
    path = chance.choice(places(content))
    parent = content
    for step in path[:-1]:
        parent = parent[step]
    value = chance.choice(VALUES)
    if kind == "text":
        return text(raw, chance)
    if kind == "twice":  # the same key twice: the first or the last may count
        key = json.dumps(path[-1])
        return raw.replace(
            key.encode(), f"{key}: {json.dumps(value)}, {key}".encode(), 1
        ), f"{key} twice, {value!r:.40}"
    if kind == "remove":
        del parent[path[-1]]
    elif kind == "add" and isinstance(parent, dict):
        parent[chance.choice(("x", "file ", "__class__", "pipe", "urls", ""))] = value
    elif kind == "add":
        parent.append(value)
    elif kind == "swap":
        other = chance.choice([place for place in places(content) if place[-1] == path[-1]])
        source = content
        for step in other:
            source = source[step]
        parent[path[-1]] = source
        value = source
    elif kind == "repeat" and isinstance(parent, list):
        parent.append(parent[path[-1]])
    else:
        parent[path[-1]] = value
    return json.dumps(content).encode(), f"{kind} {'.'.join(map(str, path))} {value!r:.40}"


def text(raw: bytes, chance: random.Random) -> tuple[bytes, str]:
    """Something else than a JSON object of the right kind, or one written strangely."""
    deep = 100_000
    number = b"9" * 10_000
    return chance.choice(
        (
            (b"", "empty"), (b"\xef\xbb\xbf" + raw, "byte order mark"), (raw.decode().encode("utf-16"), "UTF-16"),
            (raw + b"x", "more behind it"), (raw + raw, "twice"), (b"[" * deep, "open lists"), (b"null", "null"),
            (b'{"a":' * deep + b"1" + b"}" * deep, "nested objects"), (b"[" * deep + b"]" * deep, "nested lists"),
            (raw[:-1] + b', "x": ' + number + b"}", "a number of 10,000 digits"), (b'{"format": 1}', "format alone"),
            (raw.replace(b"1", number, 1), "a number of 10,000 digits"), (raw.replace(b'"', b"'"), "other quotes"),
            (raw.replace(b":", b":\0"), "NUL"), (b"\xff" + raw, "no UTF-8"), (raw[: len(raw) // 2], "half"),
            (b"1", "1"), (b'"' + raw + b'"', "a string"), (b"NaN", "NaN"),
            (b'{"format": NaN}', "format NaN"), (b"\x80\x04N.", "pickle"),
            (b"!!python/object/apply:os.system [touch canary]", "YAML"), (raw.replace(b"{", b"{ \n\t"), "spaces"),
        )
    )  # fmt: skip
