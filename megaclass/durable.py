"""Writing files so that they survive a power cut, and so that a reader never sees half of one.

Separate because checkpoints, hints and outcomes all need it; it imports nothing heavy.
"""

from __future__ import annotations

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a new file and wait until it is on the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace_bytes(path: Path, content: bytes) -> None:
    """Give a file new content such that readers, also after a power cut, see the old or the new and nothing between.

    Raises:
        OSError: the new content cannot be written; the old one stands.
    """
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        write_bytes(temporary, content)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)
