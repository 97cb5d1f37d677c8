"""The class weights of a checkpoint as unit vectors, a range of classes at a time.

Separate from `loading`, which reads a shard with the state of its optimizer at once: a report on a finished run looks
at all classes in one process, whose memory need not hold them.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megaclass.checkpoint.files import open_tensors, read_rows
from megaclass.checkpoint.format import read_manifest
from megaclass.checkpoint.verifying import find_faults
from megaclass.errors import CheckpointError, NumericError

CLASS_WEIGHT = "class_weight"


class CheckpointRows:
    """The class weights of a checkpoint as unit vectors, read from its files a range of classes at a time.

    A context manager: the files are open, and their hashes proven, within its block.

    Args:
        path: the checkpoint folder.
        device: where the rows that are read go.
        rows_per_class: rows of each class, next to each other.

    Raises:
        CheckpointError: the checkpoint is missing or damaged, or has no rows for that many per class.

    Cost: one pass over the files that hold class weights, for their hashes; memory for the rows of one range.
    """

    def __init__(self, path: Path, device: torch.device, rows_per_class: int = 1) -> None:
        self._path, self._device = path, device
        self._manifest = read_manifest(path)
        self.step = self._manifest.step
        self.num_classes = self._manifest.num_classes
        self.rows_per_class = rows_per_class
        entry = self._manifest.tensors.get(CLASS_WEIGHT)
        if entry is None or len(entry.shape) != 2 or entry.shape[0] != self.num_classes * rows_per_class:
            raise CheckpointError(
                f"checkpoint {path}: {CLASS_WEIGHT} has shape {entry and entry.shape}, expected {rows_per_class} rows "
                f"for each of {self.num_classes} classes; choose another checkpoint of the run"
            )
        self._entry = entry
        self._handles: dict[str, Any] = {}
        self._open = ExitStack()

    def read(self, start: int, stop: int) -> Tensor:
        """Rows of the classes [start, stop): [(stop - start) * rows_per_class, dim] float32, unit length.

        Raises:
            NumericError: a class weight is not finite.
        """
        first, last = start * self.rows_per_class, stop * self.rows_per_class
        found = [torch.empty(0, self._entry.shape[1], dtype=getattr(torch, self._entry.dtype))]
        for part in self._entry.parts:
            low, high = max(part.start, first), min(part.stop, last)
            if low < high:
                stored = read_rows(self._handles[part.file], CLASS_WEIGHT, self._entry, part, low, high)
                found.append(stored)
        rows = nn.functional.normalize(torch.cat(found).to(self._device, torch.float32), dim=1)
        if not bool(torch.isfinite(rows).all()):
            raise NumericError(f"checkpoint {self._path}: class weights among {start} to {stop} are not finite")
        return rows

    def __enter__(self) -> CheckpointRows:
        files = list(dict.fromkeys(part.file for part in self._entry.parts if part.start < part.stop))
        faults = find_faults(self._path, self._manifest, files)
        if faults:
            listed = "; ".join(f"{name} {fault}" for name, fault in faults.items())
            raise CheckpointError(f"checkpoint {self._path}: {listed}; choose another checkpoint of the run")
        for file in files:
            self._handles[file] = self._open.enter_context(open_tensors(self._path, self._manifest, file))
        return self

    def __exit__(self, *_: object) -> None:
        self._handles.clear()
        self._open.close()
