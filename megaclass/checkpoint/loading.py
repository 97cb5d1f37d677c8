"""Loading the state of a run at any world size, or its replicated part alone."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megaclass.checkpoint.files import open_tensors, read_rows
from megaclass.checkpoint.format import Manifest, Part, TensorEntry, read_manifest
from megaclass.checkpoint.snapshot import Snapshot
from megaclass.checkpoint.verifying import find_faults
from megaclass.errors import CheckpointError
from megaclass.parallel.shard import ClassShard


def load(path: Path, shard: ClassShard) -> Snapshot:
    """The snapshot of the checkpoint folder `path` for the owner of `shard`, in host memory; for any world size.

    Every file that is needed is hashed before any of its values is used. Independent of other ranks: each reads
    `replicated.safetensors` and the files that hold rows of its own.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, or has another number of classes.
    """
    path = Path(path)
    manifest = read_manifest(path)
    if manifest.num_classes != shard.num_classes:
        raise CheckpointError(
            f"checkpoint {path} has {manifest.num_classes} classes but this run has {shard.num_classes}; "
            "train on the data set it was made with, or start in a new run.dir"
        )
    return _read(path, manifest, shard)


def load_replicated(path: Path) -> Snapshot:
    """The snapshot of the checkpoint folder `path` without its class rows (`sharded` is empty), in host memory.

    For judging or exporting a backbone; of the tensor files only `replicated.safetensors` is read.

    Raises:
        CheckpointError: the checkpoint is missing or damaged.
    """
    path = Path(path)
    return _read(path, read_manifest(path), None)


def _read(path: Path, manifest: Manifest, shard: ClassShard | None) -> Snapshot:
    """The replicated tensors and the rows of `shard`, every file hashed before it is used."""
    needed = _needed(manifest, shard)
    faults = find_faults(path, manifest, needed)
    if faults:
        listed = "; ".join(f"{name} {fault}" for name, fault in faults.items())
        raise CheckpointError(f"checkpoint {path}: {listed}; choose another checkpoint of the run")
    replicated: dict[str, Tensor] = {}
    sharded: dict[str, Tensor] = {}
    if shard is not None:
        for name, entry in manifest.tensors.items():
            if not entry.replicated:
                sharded[name] = torch.empty([shard.num_rows, *entry.shape[1:]], dtype=getattr(torch, entry.dtype))
    for file, parts in needed.items():
        with open_tensors(path, manifest, file) as handle:
            for name, entry, part in parts:
                if entry.replicated:
                    # Cloned: the library may hand out memory of the file, which may be removed while we train.
                    replicated[name] = read_rows(handle, name, entry, part, 0, entry.num_rows).clone()
                else:
                    assert shard is not None
                    start, stop = max(part.start, shard.start), min(part.stop, shard.stop)
                    rows = read_rows(handle, name, entry, part, start, stop)
                    sharded[name][start - shard.start : stop - shard.start] = rows
    return Snapshot(
        manifest.step,
        manifest.position,
        manifest.attempt,
        replicated,
        sharded,
        manifest.num_classes,
        manifest.config,
        manifest.extra,
    )


def _needed(manifest: Manifest, shard: ClassShard | None) -> dict[str, list[tuple[str, TensorEntry, Part]]]:
    """The parts that a shard's owner reads, by file; without a shard the replicated ones."""
    needed: dict[str, list[tuple[str, TensorEntry, Part]]] = {}
    for name, entry in manifest.tensors.items():
        for part in entry.parts:
            is_mine = shard is not None and max(part.start, shard.start) < min(part.stop, shard.stop)
            if entry.replicated or is_mine:
                needed.setdefault(part.file, []).append((name, entry, part))
    return needed
