"""Saving: the protocol by which the work of all ranks becomes one checkpoint, or none.

Separate from loading because only here ranks depend on each other. A checkpoint is written into a folder beside its
final place, by all ranks at once; each rank reports the size and hash of its file, or the reason why there is none.
Only when all have succeeded rank 0 writes the manifest and renames the folder: at every moment there is either the
whole checkpoint under its name or nothing. A name is never used twice, so no failure can harm an earlier checkpoint.
All ranks must see the same file system.
"""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from megaclass.checkpoint.files import dtype_name, write_tensors
from megaclass.checkpoint.folder import BEST, LATEST, prune, write_hint
from megaclass.checkpoint.format import (
    FORMAT,
    MANIFEST,
    FileEntry,
    FolderName,
    Manifest,
    Part,
    TensorEntry,
    encode,
)
from megaclass.checkpoint.snapshot import Snapshot
from megaclass.durable import sync, write_bytes
from megaclass.errors import CheckpointError, PeerError, UserError
from megaclass.parallel.agreement import Agreement
from megaclass.parallel.process import World
from megaclass.parallel.shard import ClassShard

REPLICATED = "replicated.safetensors"

_log = logging.getLogger(__name__)


def save(
    directory: Path,
    snapshot: Snapshot,
    shard: ClassShard,
    world: World,
    *,
    keep: int,
    best: bool = False,
    timeout_seconds: float = 1800.0,
) -> Path:
    """Save a snapshot as a new folder of `directory` and return it; on every rank, and it fails on all ranks alike.

    When it returns, the checkpoint is on the disk under its name `step-%09d` (`step-%09d-aA` from the second start
    on), `latest` names it, and all but the newest `keep` and the best checkpoint are removed.

    Args:
        directory: folder of the run's checkpoints, the same on every rank; made where it does not exist.
        snapshot: this rank's state; all but `sharded` is the same on every rank.
        shard: which rows `snapshot.sharded` holds.
        world: the ranks; they talk through its store, no collective is used.
        keep: newest checkpoints kept.
        best: this is the best checkpoint so far; it is kept until another one is.
        timeout_seconds: how long ranks wait for each other.

    Raises:
        CheckpointError: a rank could not write; names rank, file, cause and free space. Earlier checkpoints are as
            they were, and nothing is left of this one.
        PeerError: rank 0 did not answer in time.
    """
    assert snapshot.num_classes == shard.num_classes, (snapshot.num_classes, shard)
    assert (shard.index, shard.count) == (world.rank, world.size)
    name = FolderName(snapshot.attempt, snapshot.step)
    temporary = Path(directory) / f"{name}.tmp-{snapshot.attempt}"
    target = Path(directory) / str(name)
    talk = Agreement(world, f"checkpoint/{snapshot.attempt}")
    if not world.is_main:
        _follow(talk, temporary, snapshot, shard, timeout_seconds)
        return target
    try:
        _commit(talk, temporary, target, snapshot, shard, timeout_seconds)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        failure = _failure(error, snapshot.step, Path(directory))
        for key in ("begin", "end"):
            talk.tell(key, {"error": str(failure), "is_peer": isinstance(failure, PeerError)})
        if isinstance(error, OSError | UserError):
            raise failure from error
        raise
    _tidy(Path(directory), target, keep, best)
    talk.tell("end", {"error": None})
    return target


def _follow(talk: Agreement, temporary: Path, snapshot: Snapshot, shard: ClassShard, seconds: float) -> None:
    """The save of every rank but 0: write when told to, report, and learn how it ended."""
    answer = talk.hear("begin", seconds)
    if answer["error"] is None:
        talk.tell(f"part/{shard.index}", _write_part(temporary, snapshot, shard))
        answer = talk.hear("end", seconds)
    if answer["error"] is not None:
        raise PeerError(answer["error"]) if answer["is_peer"] else CheckpointError(answer["error"])


def _commit(
    talk: Agreement, temporary: Path, target: Path, snapshot: Snapshot, shard: ClassShard, seconds: float
) -> None:
    """The save of rank 0: let all write, hear their votes, and make the checkpoint true or raise."""
    if target.exists():
        raise CheckpointError(f"{target} exists already and is never overwritten; save a step once")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir()
    talk.tell("begin", {"error": None})
    deadline = time.monotonic() + seconds
    reports = [_write_part(temporary, snapshot, shard)]
    reports += talk.collect("part", max(deadline - time.monotonic(), 1.0))
    errors = [report["error"] for report in reports if report["error"]]
    if errors:
        raise CheckpointError("; ".join(errors))
    write_bytes(temporary / MANIFEST, encode(_manifest(snapshot, shard, reports)))
    sync(temporary)
    temporary.rename(target)
    sync(target.parent)


def _write_part(temporary: Path, snapshot: Snapshot, shard: ClassShard) -> dict[str, Any]:
    """Write what this rank holds; the report says what was written, or under `error` why not."""
    report: dict[str, Any] = {"error": None, "files": {}, "tensors": {}}
    classes = f"classes-{shard.index:05d}-of-{shard.count:05d}.safetensors"
    work = [(classes, snapshot.sharded)] + ([(REPLICATED, snapshot.replicated)] if shard.index == 0 else [])
    for file, tensors in work:
        try:
            for name, tensor in tensors.items():
                if file == classes:
                    assert list(tensor.shape[:1]) == [shard.num_rows], (name, tensor.shape, shard)
                report["tensors"][name] = {"dtype": dtype_name(tensor), "shape": list(tensor.shape), "file": file}
            report["files"][file] = write_tensors(temporary / file, tensors).model_dump()
        except Exception as error:  # whatever it is, the other ranks are waiting to hear of it
            needed = sum(tensor.nbytes for tensor in tensors.values())
            report["error"] = f"rank {shard.index}: {file}: {_cause(error)} ({_space(temporary.parent, needed)})"
            if not isinstance(error, OSError | SafetensorError):
                _log.exception("rank %d cannot write %s", shard.index, file)
            break
    return report


def _manifest(snapshot: Snapshot, shard: ClassShard, reports: list[dict[str, Any]]) -> Manifest:
    """The manifest of a checkpoint whose ranks, in order, have reported these files and tensors."""
    tensors: dict[str, TensorEntry] = {}
    assert not snapshot.sharded.keys() & snapshot.replicated.keys(), "a tensor is either sharded or replicated"
    for name, tensor in snapshot.replicated.items():
        stop = len(tensor) if tensor.dim() else 1
        parts = [Part(file=REPLICATED, start=0, stop=stop)]
        tensors[name] = TensorEntry(dtype=dtype_name(tensor), shape=list(tensor.shape), replicated=True, parts=parts)
    for name, tensor in snapshot.sharded.items():
        parts = []
        for rank, report in enumerate(reports):
            found, block = report["tensors"][name], ClassShard(shard.num_classes, rank, shard.count)
            assert (found["dtype"], found["shape"][1:]) == (dtype_name(tensor), list(tensor.shape[1:])), (rank, found)
            parts.append(Part(file=found["file"], start=block.start, stop=block.stop))
        shape = [shard.num_classes, *tensor.shape[1:]]
        tensors[name] = TensorEntry(dtype=dtype_name(tensor), shape=shape, replicated=False, parts=parts)
    files = {name: FileEntry(**facts) for report in reports for name, facts in report["files"].items()}
    return Manifest(
        format=FORMAT,
        step=snapshot.step,
        position=snapshot.position,
        attempt=snapshot.attempt,
        world_size=shard.count,
        num_classes=shard.num_classes,
        config=snapshot.config,
        extra=snapshot.extra,
        files=files,
        tensors=tensors,
    )


def _tidy(directory: Path, target: Path, keep: int, best: bool) -> None:
    """What follows a complete checkpoint; as that one stands whatever happens here, a failure is only a warning."""
    try:
        if best:
            write_hint(directory, BEST, target)
        write_hint(directory, LATEST, target)
        # Not thorough: hashing the older ones again would cost every save as much as it costs to write one.
        prune(directory, keep, thorough=False)
    except OSError as error:
        _log.warning("checkpoint %s is saved, but its folder could not be tidied: %s", target, error)


def _failure(error: BaseException, step: int, directory: Path) -> UserError:
    """What every rank raises when rank 0 could not commit because of `error`."""
    kind: type[UserError] = PeerError if isinstance(error, PeerError) else CheckpointError
    cause = str(error)
    if not isinstance(error, UserError):
        file = Path(error.filename).name if isinstance(error, OSError) and error.filename else MANIFEST
        cause = f"rank 0: {file}: {_cause(error)} ({_space(directory, 0)})"
    return kind(
        f"checkpoint of step {step} failed: {cause}; earlier checkpoints are as they were; make room or mend the disk, "
        "then start the same command again"
    )


def _cause(error: BaseException) -> str:
    """An error in the words of the operating system."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _space(directory: Path, needed: int) -> str:
    """Space needed and free, in MiB."""
    try:
        free = f"{shutil.disk_usage(directory).free / 2**20:.1f} MiB free in {directory}"
    except OSError:
        free = f"{directory} does not answer"
    return f"needs {needed / 2**20:.1f} MiB, {free}"
