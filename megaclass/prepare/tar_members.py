"""Walking the members of a tar that nobody has checked.

Separate from `verify` because it knows tar and nothing of data sets. The walk only ever goes forward: a negative or too
large size ends it, so no header can make it spin or read outside the file, and only regular files with plain names are
given back as such.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from megaclass.data.bad_samples import BadSample
from megaclass.data.members import parse_header

BLOCK = 512
# Writers fill the file to whole records of at most this size.
_MAX_PADDING = 20 * BLOCK


@dataclass(frozen=True)
class Member:
    """One member: its name, the byte range it takes with header and padding, and the place and size of its data."""

    name: str
    start: int
    end: int
    data_start: int
    size: int


def walk(stream: BinaryIO, fault: Callable[[str], None]) -> Iterator[Member]:
    """The regular members of an uncompressed tar, in order; `fault` is called with a line for whatever is wrong.

    Links, devices, long-name records and names with folders are faults and passed over. A header that cannot be read, a
    size that leaves the file, and a missing end mark are faults that end the walk.
    """
    length = os.fstat(stream.fileno()).st_size
    position = 0
    while True:
        stream.seek(position)
        header = stream.read(BLOCK)
        if len(header) < BLOCK:
            fault(f"truncated at byte {length}: the end mark is missing")
            return
        if header == bytes(BLOCK):
            rest = stream.read(_MAX_PADDING + 1)
            if rest.strip(b"\0") or len(rest) > _MAX_PADDING:
                fault(f"bytes after the end mark at {position}")
            return
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
        except (tarfile.HeaderError, ValueError) as error:
            fault(f"damaged header at byte {position}: {error}")
            return
        end = position + BLOCK + -(-info.size // BLOCK) * BLOCK
        if info.size < 0 or end > length:
            fault(f"member {info.name!r} at byte {position} declares {info.size} bytes, which leaves the file")
            return
        if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            fault(f"member {info.name!r} at byte {position} is no regular file (type {info.type!r})")
        elif "/" in info.name or "\\" in info.name or not info.name.isprintable() or info.name.startswith("."):
            fault(f"member {info.name!r} at byte {position} has a name with folders; allowed is KEY.EXTENSION")
        elif (strict := _as_readers_see(header)) is not None:
            fault(f"damaged header at byte {position}: {strict}")
        else:
            yield Member(info.name, position, end, position + BLOCK, info.size)
        position = end


def _as_readers_see(header: bytes) -> str | None:
    """What the readers' parser has against the header of a regular member, which knows fewer ways to write a number."""
    try:
        parse_header(header, 0)
    except BadSample as error:
        return error.detail
    return None
