"""What a checkpoint folder is called and what its manifest.json says: the format, read as untrusted input.

Separate from reading and writing tensors because saving, loading, verifying and listing all rest on the same rules,
and because every check of a manifest that came from elsewhere belongs in one place. Format 1:

- a folder `step-%09d` of a run's first start and `step-%09d-aA` of its A-th, so that no name is ever used twice;
- `manifest.json` beside `*.safetensors` files, each named in the manifest with its size and SHA-256;
- every tensor is described globally: its shape, and which rows `[start, stop)` of it lie in which file. A replicated
  tensor is one part; the parts of a sharded tensor tile its classes exactly.

The hashes find damage and mixed-up files. They are no signature: someone who can write the folder can write them too,
which is why nothing in it is ever executed or used as a path.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from megaclass.errors import CheckpointError

FORMAT = 1
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 16 * 2**20
MAX_SIZE = 2**48
ITEM_BYTES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1,
    "bool": 1,
}  # fmt: skip
"""Bytes of one element of each type a checkpoint may hold, by torch's name of it."""

_FOLDER = re.compile(r"step-(\d{9,15})(?:-a([1-9]\d{0,8}))?")
_Size = Annotated[int, Field(ge=0, le=MAX_SIZE)]
_FileName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,99}\.safetensors$")]
_TensorName = Annotated[str, StringConstraints(pattern=r"^[\x20-\x7e]{1,500}$")]


@dataclass(frozen=True, order=True)
class FolderName:
    """The name of a checkpoint folder; ordered as the checkpoints were written.

    The attempt counts before the step: a run that was taken up again from an older checkpoint goes on from there, and
    what an earlier start wrote beyond that point is older.
    """

    attempt: int
    step: int

    @classmethod
    def parse(cls, name: str) -> FolderName | None:
        """The parts of a folder's name, None where it is not the name of a complete checkpoint."""
        match = _FOLDER.fullmatch(name)
        parsed = cls(int(match[2] or 1), int(match[1])) if match else None
        return parsed if str(parsed) == name else None

    def __str__(self) -> str:
        return f"step-{self.step:09d}" + (f"-a{self.attempt}" if self.attempt > 1 else "")


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class FileEntry(_Strict):
    """What is known of one file."""

    num_bytes: _Size
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class Part(_Strict):
    """Rows `[start, stop)` of a tensor, in a file under the tensor's name; may be empty."""

    file: _FileName
    start: _Size
    stop: _Size


class TensorEntry(_Strict):
    """One global tensor and where its rows lie."""

    dtype: str
    shape: Annotated[list[_Size], Field(max_length=8)]
    replicated: bool
    parts: Annotated[list[Part], Field(min_length=1)]

    @property
    def num_rows(self) -> int:
        """Size along the first dimension; a scalar counts as one row."""
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.shape[1:]) * ITEM_BYTES[self.dtype]

    def part_shape(self, part: Part) -> list[int]:
        """Shape of what the part's file holds under the tensor's name."""
        return [part.stop - part.start, *self.shape[1:]] if self.shape else []


class Manifest(_Strict):
    """Everything of a checkpoint but the values of its tensors."""

    format: int
    step: _Size
    position: _Size
    attempt: Annotated[int, Field(ge=1, le=MAX_SIZE)]
    world_size: Annotated[int, Field(ge=1, le=2**24)]
    num_classes: Annotated[int, Field(ge=1, le=MAX_SIZE)]
    config: dict[str, Any]
    extra: dict[str, Any]
    files: dict[_FileName, FileEntry]
    tensors: dict[_TensorName, TensorEntry]

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        """Parts tile their tensors and fit into their files, so that no size can exceed what lies on the disk."""
        room = {name: entry.num_bytes for name, entry in self.files.items()}
        for name, entry in self.tensors.items():
            if entry.dtype not in ITEM_BYTES:
                raise ValueError(f"tensor {name!r}: type {entry.dtype!r} is not one of {', '.join(ITEM_BYTES)}")
            self._check_tiling(name, entry)
            for part in entry.parts:
                if part.file not in room:
                    raise ValueError(f"tensor {name!r}: {part.file} is not among the files")
                room[part.file] -= (part.stop - part.start) * entry.row_bytes
                if room[part.file] < 0:
                    raise ValueError(
                        f"tensor {name!r}: shape {entry.shape} does not fit into the {self.files[part.file].num_bytes} "
                        f"bytes of {part.file}"
                    )
        return self

    def _check_tiling(self, name: str, entry: TensorEntry) -> None:
        """One whole part of a replicated tensor; parts of a sharded one from class 0 to the last without a gap."""
        if not entry.replicated and (not entry.shape or entry.shape[0] != self.num_classes):
            raise ValueError(
                f"tensor {name!r}: shape {entry.shape} has not a row for each of {self.num_classes} classes"
            )
        if entry.replicated and len(entry.parts) != 1:
            raise ValueError(f"tensor {name!r}: is replicated but has {len(entry.parts)} parts")
        if len({part.file for part in entry.parts}) < len(entry.parts):
            raise ValueError(f"tensor {name!r}: two parts lie in one file")
        reached = 0
        for part in entry.parts:
            if part.start != reached or part.stop < part.start:
                raise ValueError(f"tensor {name!r}: rows {part.start} to {part.stop} do not follow row {reached}")
            reached = part.stop
        if reached != entry.num_rows:
            raise ValueError(f"tensor {name!r}: parts end at row {reached} of {entry.num_rows}")


def encode(manifest: Manifest) -> bytes:
    """The bytes of manifest.json: JSON with sorted keys and a SHA-256 `digest` over all the rest.

    Raises:
        ValueError: `config` or `extra` holds something that is not plain JSON.
    """
    content = manifest.model_dump()
    digest = hashlib.sha256(_canonical(content)).hexdigest()
    return _canonical({**content, "digest": digest})


def decode(raw: bytes) -> Manifest:
    """The manifest held by the bytes of a manifest.json.

    Raises:
        CheckpointError: anything at all is wrong with it; the message does not name the checkpoint.
    """
    try:
        content = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError):
        raise CheckpointError(f"{MANIFEST} is damaged: it is not JSON") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{MANIFEST} is damaged: it is not a JSON object")
    found = content.get("format")
    if isinstance(found, int) and found != FORMAT:
        raise CheckpointError(f"{MANIFEST} has format {found}; this version of megaclass reads format {FORMAT}")
    digest = content.pop("digest", None)
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        raise CheckpointError(f"{MANIFEST} is not valid: {_first_fault(error)}") from None
    try:
        # Stricter than comparing digests: a flipped bit that JSON reads as the same value is damage, too.
        is_whole = encode(manifest) == raw
    except (ValueError, RecursionError):
        is_whole = False
    if not is_whole:
        raise CheckpointError(f"{MANIFEST} is damaged: its content does not match its digest {str(digest)[:64]!r}")
    return manifest


def read_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint folder `path`.

    Raises:
        CheckpointError: there is none, it is damaged, or it belongs to another step than the folder's name says.
    """
    file = path / MANIFEST
    try:
        status = file.lstat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"checkpoint {path}: {MANIFEST} is not a regular file")
        if status.st_size > MAX_MANIFEST_BYTES:
            raise CheckpointError(
                f"checkpoint {path}: {MANIFEST} has {status.st_size} bytes; at most {MAX_MANIFEST_BYTES} are read"
            )
        raw = file.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {path}: {MANIFEST} is missing; give the folder of one checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"checkpoint {path}: {MANIFEST} cannot be read: {error.strerror}") from None
    try:
        manifest = decode(raw)
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint {path}: {error}") from None
    name = FolderName.parse(path.name)
    if name is not None and name != FolderName(manifest.attempt, manifest.step):
        raise CheckpointError(
            f"checkpoint {path}: {MANIFEST} is of step {manifest.step} (start {manifest.attempt}), not of this folder"
        )
    return manifest


def folder_faults(path: Path, manifest: Manifest) -> dict[str, str]:
    """What is wrong with the files of a checkpoint, by file, as far as names and sizes tell; nothing is read."""
    faults = {}
    try:
        with os.scandir(path) as entries:
            present = {entry.name: entry.stat(follow_symlinks=False) for entry in entries}
    except OSError as error:
        return {".": f"cannot be listed: {error.strerror}"}
    for name, expected in manifest.files.items():
        if name not in present:
            faults[name] = "is missing"
        elif not stat.S_ISREG(present[name].st_mode):
            faults[name] = "is not a regular file"
        elif present[name].st_size != expected.num_bytes:
            faults[name] = f"has {present[name].st_size} bytes instead of {expected.num_bytes}"
    for name in sorted(present.keys() - manifest.files.keys() - {MANIFEST}):
        faults[_printable(name)] = "does not belong to the checkpoint"
    return faults


def _canonical(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def _first_fault(error: ValidationError) -> str:
    """The first fault as one printable line: names in a manifest from elsewhere must not write on a terminal."""
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    return _printable(f"{place}: {message}" if place else message)


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in text)[:300]
