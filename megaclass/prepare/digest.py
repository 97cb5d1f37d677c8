"""SHA-256 of files and of what decides a data set: whether two runs would write the same."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def parts_sha256(parts: Iterable[str | np.ndarray]) -> str:
    """The SHA-256 of a row of texts and arrays, in hex; each counts with its length, so none runs into another."""
    made = hashlib.sha256()
    for part in parts:
        content = part.encode() if isinstance(part, str) else part.tobytes()
        made.update(b"%d " % len(content))
        made.update(content)
    return made.hexdigest()


def state_of(path: Path) -> str:
    """Size and time of the last change of a file: whether it is the one it was. `gone` if there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return "gone"
    return f"{found.st_size} {found.st_mtime_ns}"
