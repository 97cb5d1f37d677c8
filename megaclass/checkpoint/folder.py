"""The checkpoints of one run beside each other: which is the newest good one, which are listed, which are removed.

Separate from saving and loading one checkpoint because the question here is which. Nothing is believed but a verified
manifest and hashes: the files `latest` and `best` are hints, times of files mean nothing.
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megaclass.checkpoint.format import FolderName, folder_faults, read_manifest
from megaclass.checkpoint.verifying import find_faults
from megaclass.durable import replace_bytes
from megaclass.errors import CheckpointError

LATEST = "latest"
BEST = "best"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Listed:
    """One line of a list of checkpoints; `fault` is what names and sizes show, None where they are right."""

    name: str
    step: int
    attempt: int
    world_size: int | None
    num_bytes: int | None
    is_best: bool
    fault: str | None

    def as_dict(self) -> dict[str, Any]:
        """The facts as plain JSON."""
        return asdict(self)


def find_latest(directory: Path) -> Path | None:
    """The newest checkpoint in a folder of checkpoints that is complete and right by every hash; None in a new run.

    A damaged one is passed over with a warning that names the fault. Cost: one pass over all files of the newest
    checkpoint; in a run of several ranks one of them searches and tells the others.

    Raises:
        CheckpointError: there are checkpoints but every one is damaged: starting anew must be the user's decision.
    """
    directory = Path(directory)
    faults = []
    for name in _names(directory):
        path = directory / str(name)
        fault = _fault(path, thorough=True)
        if fault is None:
            return path
        faults.append(fault)
        _log.warning("%s; falling back to the checkpoint before it", fault)
    if faults:
        raise CheckpointError(
            f"none of the {len(faults)} checkpoints in {directory} can be used: {faults[0]}; "
            "move the folder away to start from the beginning, or give another run.dir"
        )
    return None


def latest_attempt(directory: Path) -> int:
    """The highest start number that any checkpoint in the folder was written by; 0 where there is none."""
    return max((name.attempt for name in _names(Path(directory))), default=0)


def newest_name(directory: Path) -> Path:
    """The newest checkpoint of the folder by its name alone, good or damaged: the one to examine.

    Raises:
        CheckpointError: there is none.
    """
    names = _names(Path(directory))
    if not names:
        raise CheckpointError(f"there is no checkpoint in {directory}; give the run directory of a run that has saved")
    return Path(directory) / str(names[0])


def listing(directory: Path) -> list[Listed]:
    """All checkpoints of a folder, oldest first, checked by names and sizes only. Cost: reads the manifests."""
    directory = Path(directory)
    best = read_hint(directory, BEST)
    lines = []
    for name in reversed(_names(directory)):
        world_size = num_bytes = None
        fault = _fault(directory / str(name), thorough=False)
        if fault is None:
            manifest = read_manifest(directory / str(name))
            world_size, num_bytes = manifest.world_size, sum(entry.num_bytes for entry in manifest.files.values())
        lines.append(Listed(str(name), name.step, name.attempt, world_size, num_bytes, str(name) == best, fault))
    return lines


def prune(directory: Path, keep: int, *, thorough: bool = True) -> list[Path]:
    """Remove checkpoints older than the newest `keep` good ones, except the best one; returns what was removed.

    As long as fewer than `keep` are good nothing is removed, damaged ones included: a disk that cannot be read today
    may be readable tomorrow.

    Args:
        directory: folder of checkpoints.
        keep: at least 1.
        thorough: good means right by every hash; otherwise by manifest, names and sizes, which costs nothing.
    """
    assert keep >= 1, keep
    directory = Path(directory)
    best = read_hint(directory, BEST)
    num_good, removed = 0, []
    for name in _names(directory):
        path = directory / str(name)
        if num_good < keep:
            num_good += _fault(path, thorough=thorough) is None
        elif str(name) != best:
            # Renamed first: a removal cut short must leave debris, not something that looks like a checkpoint.
            debris = directory / f"{name}.tmp-removed"
            path.rename(debris)
            shutil.rmtree(debris)
            removed.append(path)
    return removed


def remove_leftovers(directory: Path) -> list[Path]:
    """Remove what interrupted saves left behind and return it; only for the owner of the run directory, before saving.

    Cost: none where there is nothing. A folder that does not exist has no leftovers.
    """
    leftovers = sorted(Path(directory).glob("*.tmp-*"))
    for path in leftovers:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    return leftovers


def write_hint(directory: Path, hint: str, path: Path) -> None:
    """Let the file `hint` (`latest` or `best`) name the checkpoint `path`."""
    replace_bytes(directory / hint, f"{path.name}\n".encode())


def read_hint(directory: Path, hint: str) -> str | None:
    """The name of a checkpoint that the file `hint` holds; None where there is no such file or no name in it."""
    try:
        with (directory / hint).open("rb") as file:
            name = FolderName.parse(file.read(200).decode("ascii", "replace").strip())
    except OSError:
        return None
    return None if name is None else str(name)


def _names(directory: Path) -> list[FolderName]:
    """The names of all complete checkpoints by their names, newest first."""
    if not directory.is_dir():
        return []
    parsed = (FolderName.parse(path.name) for path in directory.iterdir() if path.is_dir())
    return sorted((name for name in parsed if name is not None), reverse=True)


def _fault(path: Path, *, thorough: bool) -> str | None:
    """The first thing wrong with a checkpoint, None where it is good."""
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        return str(error)
    faults = find_faults(path, manifest) if thorough else folder_faults(path, manifest)
    if not faults:
        return None
    name, fault = next(iter(faults.items()))
    return f"checkpoint {path}: {name} {fault}"


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint folder that `find_latest` gave."""
    name = FolderName.parse(path.name)
    assert name is not None, path
    return name.step


def mark_best(directory: Path, path: Path) -> None:
    """Let a checkpoint that is already saved be the best one, which pruning keeps; on rank 0."""
    write_hint(directory, BEST, path)
