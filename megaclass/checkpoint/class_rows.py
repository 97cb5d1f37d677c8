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

    Attributes:
        step: that the checkpoint was made at.
        num_classes: classes are in [0, num_classes).
        rows_per_class: rows of each class, next to each other: its sub-centres.

    Raises:
        CheckpointError: the checkpoint is missing or damaged, or its class weights have another form.

    Cost: one pass over the files that hold class weights, for their hashes; memory for the rows of one range.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        self._path, self._device = path, device
        self._manifest = read_manifest(path)
        self.step = self._manifest.step
        self.num_classes = self._manifest.num_classes
        entry = self._manifest.tensors.get(CLASS_WEIGHT)
        shape = [] if entry is None else entry.shape
        if entry is None or len(shape) not in (2, 3) or shape[0] != self.num_classes or 0 in shape:
            raise CheckpointError(
                f"checkpoint {path}: {CLASS_WEIGHT} has shape {entry and shape}, expected [classes, dim] or [classes, "
                "sub-centres, dim]; choose another checkpoint of the run"
            )
        self.rows_per_class = shape[1] if len(shape) == 3 else 1
        self._entry = entry
        self._handles: dict[str, Any] = {}
        self._open = ExitStack()

    def read(self, start: int, stop: int) -> Tensor:
        """Rows of the classes [start, stop): [(stop - start) * rows_per_class, dim] float32, unit length.

        Raises:
            NumericError: a class weight is not finite.
        """
        found = [torch.empty([0, *self._entry.shape[1:]], dtype=getattr(torch, self._entry.dtype))]
        for part in self._entry.parts:
            low, high = max(part.start, start), min(part.stop, stop)
            if low < high:
                found.append(read_rows(self._handles[part.file], CLASS_WEIGHT, self._entry, part, low, high))
        rows = torch.cat(found).to(self._device, torch.float32).flatten(0, -2)
        rows = nn.functional.normalize(rows, dim=1)
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
