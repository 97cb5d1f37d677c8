"""Whether a checkpoint is what was written, and the hashes by which two checkpoints are compared.

Separate from loading because it looks for every fault instead of stopping at the first, and reads every file whatever
the world size. `find_latest`, `megaclass checkpoint verify` and the tests of resuming all rest on it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaclass.checkpoint.files import hash_file, open_tensors, read_rows
from megaclass.checkpoint.format import Manifest, TensorEntry, folder_faults, read_manifest
from megaclass.errors import CheckpointError

_CHUNK_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Verification:
    """What was found: all faults, and of every intact tensor its global shape, type and hash.

    `digest` stands for all tensors together and is None while any is damaged; like their hashes it does not depend on
    how many ranks wrote. Without a readable manifest, `step`, `world_size` and `num_classes` are None.
    """

    path: Path
    step: int | None = None
    world_size: int | None = None
    num_classes: int | None = None
    faults: list[str] = field(default_factory=list)
    tensors: dict[str, dict[str, Any]] = field(default_factory=dict)
    digest: str | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.faults

    def as_dict(self) -> dict[str, Any]:
        """The facts as plain JSON: what `megaclass checkpoint verify --json` prints."""
        return {
            "ok": self.ok,
            "step": self.step,
            "world_size": self.world_size,
            "num_classes": self.num_classes,
            "faults": self.faults,
            "tensors": self.tensors,
            "digest": self.digest,
        }


def find_faults(path: Path, manifest: Manifest, files: Collection[str] | None = None) -> dict[str, str]:
    """What is wrong with the files of a checkpoint, by file: names and sizes of all, hashes of `files` or of all.

    Cost: one pass over the files that are hashed.
    """
    faults = folder_faults(path, manifest)
    for name in manifest.files if files is None else files:
        if name in faults:
            continue
        try:
            if hash_file(path / name) != manifest.files[name].sha256:
                faults[name] = "is damaged: its SHA-256 is not the one written"
        except OSError as error:
            faults[name] = f"cannot be read: {error.strerror}"
    return faults


def verify(path: Path) -> Verification:
    """Everything that is wrong with the checkpoint folder `path`, and the hashes of its tensors; never raises for it.

    The SHA-256 of a tensor is over its global row-major bytes, the parts streamed in order of their rows. Cost: two
    passes over all files; memory for 32 MiB of rows, or one row.
    """
    path = Path(path)
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        return Verification(path, faults=[str(error).removeprefix(f"checkpoint {path}: ")])
    damaged = find_faults(path, manifest)
    faults = [f"{name} {fault}" for name, fault in damaged.items()]
    tensors: dict[str, dict[str, Any]] = {}
    for name, entry in sorted(manifest.tensors.items()):
        if any(part.file in damaged for part in entry.parts):
            continue
        try:
            sha256 = _hash_tensor(path, manifest, name, entry)
        except CheckpointError as error:
            fault = str(error).removeprefix(f"checkpoint {path}: ")
            faults.extend([fault] if fault not in faults else [])
            continue
        tensors[name] = {"shape": entry.shape, "dtype": entry.dtype, "sha256": sha256}
    digest = _digest(tensors) if len(tensors) == len(manifest.tensors) else None
    return Verification(path, manifest.step, manifest.world_size, manifest.num_classes, faults, tensors, digest)


def _hash_tensor(path: Path, manifest: Manifest, name: str, entry: TensorEntry) -> str:
    """SHA-256 over the global row-major bytes of one tensor."""
    hasher = hashlib.sha256()
    num_rows = max(_CHUNK_BYTES // max(entry.row_bytes, 1), 1)
    for part in entry.parts:
        with open_tensors(path, manifest, part.file) as handle:
            for start in range(part.start, part.stop, num_rows):
                stop = min(start + num_rows, part.stop)
                hasher.update(_bytes_of(read_rows(handle, name, entry, part, start, stop)))
    return hasher.hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    """The row-major bytes of a tensor of any type."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _digest(tensors: dict[str, dict[str, Any]]) -> str:
    lines = [f"{name} {facts['dtype']} {facts['shape']} {facts['sha256']}\n" for name, facts in sorted(tensors.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
