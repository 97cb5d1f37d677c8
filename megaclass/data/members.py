"""Reading tar members of untrusted shards: a strict parser of our own.

Separate because it is the one place that trusts no byte of a shard. It knows regular files with plain octal sizes and
nothing else, never looks outside the bytes it was given, always moves forward, and never uses a name as a path: no
links, devices, sparse files, extended headers, negative or giant sizes. `tarfile` accepts all of these, and on some
versions of Python a negative size makes it run for ever.

Layout: POSIX.1-1988 ustar; a sample is `KEY.png` or `KEY.jpg` followed by `KEY.label`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from megaclass.data.bad_samples import BadSample
from megaclass.errors import DataError

IMAGE_EXTENSIONS = ("png", "jpg")
HEADER_BYTES = _BLOCK = 512
_LABEL = struct.Struct("<q")
# Name, size, checksum, type, magic and prefix; what lies between is never used.
_HEADER = struct.Struct("100s 24x 12s 12x 8s c 100x 5s 83x 155s 12x")
assert _HEADER.size == _BLOCK


@dataclass(frozen=True)
class SampleMembers:
    """The two members of one sample: its key, the image file's bytes with their extension, and the label."""

    key: str
    extension: str
    image: bytes
    label: int


@dataclass(frozen=True)
class MemberPlaces:
    """Where the members of one sample lie, in bytes from the beginning of its first header."""

    key: str
    extension: str
    image_start: int
    image_size: int
    label_start: int
    label_size: int


def parse_sample(block: bytes) -> SampleMembers:
    """The sample whose members fill `block` exactly, headers and padding included.

    Raises:
        BadSample: `bad-tar` for anything but an image followed by its label, `bad-label` for a label that is not
            eight bytes.
    """
    at = place_members(lambda start: block[start : start + _BLOCK], len(block))
    try:
        label = parse_label(block[at.label_start : at.label_start + at.label_size])
    except BadSample as error:
        raise error.located(f"member {at.key + '.label'!r:.120}", key=at.key) from None
    return SampleMembers(at.key, at.extension, block[at.image_start : at.image_start + at.image_size], label)


def place_members(header_at: Callable[[int], bytes], length: int) -> MemberPlaces:
    """Where image and label lie in the `length` bytes of one sample, from their headers alone.

    Args:
        header_at: gives the header that starts at a byte of the sample.
        length: bytes of the sample by the index, which its members must fill.

    Raises:
        BadSample: `bad-tar` for anything but an image followed by its label.
    """
    name, size = parse_header(header_at(0), 0)
    end = _padded_end(0, size)
    key, extension = _split_name(name)
    if extension not in IMAGE_EXTENSIONS:
        raise BadSample("bad-tar", f"expected an image KEY.png or KEY.jpg, found member {name!r:.120}")
    if end >= length:
        raise BadSample("bad-tar", f"image {name!r:.120} of {size} bytes leaves no room for a label in {length}")
    label_name, label_size = parse_header(header_at(end), 0)
    if label_name != f"{key}.label":
        raise BadSample("bad-tar", f"expected member {key + '.label'!r:.120}, found {label_name!r:.120}", key=key)
    if _padded_end(end, label_size) != length:
        raise BadSample("bad-tar", f"members of {key!r:.120} do not fill the {length} bytes the index gives them")
    return MemberPlaces(key, extension, _BLOCK, size, end + _BLOCK, label_size)


def parse_label(data: bytes) -> int:
    """The class id in a label member; `BadSample` unless it is eight bytes (int64, little-endian)."""
    if len(data) != _LABEL.size:
        raise BadSample("bad-label", f"label has {len(data)} bytes, expected 8 (int64, little-endian)")
    return int(_LABEL.unpack(data)[0])


def check_label(label: int, expected: int, num_classes: int) -> None:
    """`BadSample` unless the stored label lies in [0, num_classes) and is the one the index gives."""
    if not 0 <= label < num_classes:
        raise BadSample("bad-label", f"label {label}, allowed is [0, {num_classes})")
    if label != expected:
        raise BadSample("bad-label", f"label {label} in the shard but {expected} in the index")


def check_shard(path: Path, num_samples: int) -> None:
    """Walk the headers of a whole shard; returns when it holds exactly `num_samples` well-formed samples.

    For readers that leave the parsing to a library: what passes here is safe to hand on, and holds no fewer and no
    more samples than the manifest says, each key once.

    Raises:
        DataError: with the shard, the byte offset and what was found there.

    Cost: reads one header per member and seeks over the content.
    """
    keys: set[str] = set()
    open_key = None
    for offset, name in _walk(path):
        key, extension = _split_name(name)
        if open_key is None and extension in IMAGE_EXTENSIONS and key not in keys:
            keys.add(key)
            open_key = key
        elif extension == "label" and key == open_key:
            open_key = None
        else:
            raise DataError(
                f"shard {path}: at byte {offset} member {name!r:.120} is not expected there; samples are KEY.png or "
                "KEY.jpg followed by KEY.label, each key once; make the data set again"
            )
    if open_key is not None or len(keys) != num_samples:
        raise DataError(
            f"shard {path} holds {len(keys)} samples{' (the last without a label)' if open_key is not None else ''} "
            f"but dataset.json says {num_samples}; run `megaclass data verify {path.parent}`"
        )


def read_samples(file: BinaryIO) -> Iterator[tuple[str, str, bytes, bytes]]:
    """Key, extension, image and label of each sample of a shard, from front to back, as long as they follow each other.

    For a shard that `check_shard` has passed: what is not expected there ends the iteration, and the caller counts.

    Raises:
        ValueError, EOFError: a header that is none, or a file that ends in a member: it has changed since.
    """
    while True:
        image = _read_member(file)
        label = None if image is None else _read_member(file)
        if image is None or label is None:
            return
        (name, data), (label_name, label_data) = image, label
        key, extension = _split_name(name)
        if extension not in IMAGE_EXTENSIONS or label_name != f"{key}.label":
            return
        yield key, extension, data, label_data


def _read_member(file: BinaryIO) -> tuple[str, bytes] | None:
    """Name and content of the member that starts here; None at the zeros that end a shard, or at its end."""
    header = file.read(_BLOCK)
    if not header.strip(b"\0"):
        return None
    try:
        name, size = parse_header(header, 0)
    except BadSample as bad:
        raise ValueError(bad.detail) from None
    data = file.read(_padded_end(0, size) - _BLOCK)
    if len(data) < size:
        raise EOFError(f"member {name!r:.120} ends after {len(data)} of {size} bytes")
    return name, data[:size]


def _walk(path: Path) -> Iterator[tuple[int, str]]:
    num_bytes = path.stat().st_size
    offset = 0
    with path.open("rb") as file:
        while offset < num_bytes:
            file.seek(offset)
            header = file.read(_BLOCK)
            if not any(header):
                return
            try:
                name, size = parse_header(header, 0)
            except BadSample as bad:
                raise DataError(f"shard {path}: at byte {offset}: {bad.detail}; make the data set again") from None
            end = _padded_end(offset, size)
            if end > num_bytes:
                raise DataError(
                    f"shard {path}: at byte {offset} member {name!r:.120} of {size} bytes ends behind the file of "
                    f"{num_bytes} bytes; make the data set again"
                )
            yield offset, name
            offset = end


def parse_header(block: bytes, start: int) -> tuple[str, int]:
    """Name and size of the member whose header starts at `start`; whether its data is there is the caller's to check.

    Raises:
        BadSample: `bad-tar` for anything but a regular file with plain numbers.
    """
    header = block[start : start + _BLOCK]
    if len(header) < _BLOCK:
        raise BadSample("bad-tar", f"tar header cut off after {len(header)} of {_BLOCK} bytes")
    name_field, size_field, checksum_field, kind, magic, prefix = _HEADER.unpack(header)
    checksum = _octal(checksum_field)
    # Most of a header is zeros: to leave them out takes a fraction of the time of adding them.
    added = sum(header.translate(None, b"\0")) - sum(checksum_field)
    if checksum is None or checksum != added + len(checksum_field) * 32:
        raise BadSample("bad-tar", "no valid tar header (wrong checksum)")
    name_bytes = name_field.split(b"\0", 1)[0]
    if magic == b"ustar" and prefix[0]:
        name_bytes = prefix.split(b"\0", 1)[0] + b"/" + name_bytes
    name = name_bytes.decode("utf-8", "backslashreplace")
    if kind not in (b"0", b"\0"):
        raise BadSample("bad-tar", f"member {name!r:.120} is of tar type {kind!r}; only regular files are allowed")
    size = _octal(size_field)
    if size is None:
        raise BadSample("bad-tar", f"member {name!r:.120} has size field {size_field!r}, not an octal number")
    return name, size


def _octal(field: bytes) -> int | None:
    """The number in a header field, or None: digits 0 to 7 only, so no sign and no base-256 form."""
    digits = field.strip(b" \0")
    if not digits or digits.strip(b"01234567"):
        return None
    return int(digits, 8)


def _padded_end(start: int, size: int) -> int:
    return start + _BLOCK + -(-size // _BLOCK) * _BLOCK


def _split_name(name: str) -> tuple[str, str]:
    """Key and extension, cut at the first dot as the webdataset library cuts; no key gives no extension."""
    key, _, extension = name.partition(".")
    return key, extension if key else ""
