"""The file `.unfinished` in a folder that is being written: who writes there, under what conditions, how far.

Its first line holds the conditions that decide every byte (options, inputs, classes, order); each line after it one
complete shard. A run that is started again under the same conditions keeps these shards and goes on behind them; so an
interrupted conversion gives the same bytes as one that was not. The file is locked while somebody writes, and gone when
the data set is finished.

Separate from `writer`, which knows the format of a data set; no reader ever opens this file.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from megaclass.data.manifest import ShardInfo
from megaclass.errors import ConfigError
from megaclass.prepare.digest import file_sha256

MARKER = ".unfinished"
_FORMAT = 1
Conditions = Mapping[str, Any]


class Complete(BaseModel):
    """A shard that is complete on the disk.

    Attributes:
        split: whose it is.
        done: how many samples of the split, in writing order, lie in it and in those before it or were left out.
        left_out: the numbers of those left out since the shard before.
        modes: image modes in it.
        shard: its entry of the manifest.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    split: str
    done: int
    left_out: list[int]
    modes: list[str]
    shard: ShardInfo


class Unfinished:
    """The locked marker of a folder; made when writing begins.

    Attributes:
        complete: the shards that are kept of an earlier run.
        warning: a line for the user if one with other conditions was discarded, else None.

    Args:
        folder: exists, and may be written to as `writer.check_output` says.
        conditions: plain JSON values by name; None: another run cannot be continued and this one neither.
        may_leave_out: whether samples may be left out; an earlier run that did so is else one of other conditions.
        is_fresh: discard whatever an earlier run has left; its shards are not deleted here.
        overwrite: discard an earlier run of other conditions.

    Raises:
        ConfigError: somebody else is writing there, or an earlier run had other conditions.
        OSError: the file cannot be written.
    """

    def __init__(
        self, folder: Path, conditions: Conditions | None, *, may_leave_out: bool, is_fresh: bool, overwrite: bool
    ) -> None:
        self.complete: list[Complete] = []
        self.warning: str | None = None
        self._path = folder / MARKER
        self._handle = _locked(self._path)
        try:
            self._begin(folder, conditions, may_leave_out, is_fresh, overwrite)
        except BaseException:
            self.release()
            raise

    def _begin(
        self, folder: Path, conditions: Conditions | None, may_leave_out: bool, is_fresh: bool, overwrite: bool
    ) -> None:
        earlier, lines, ends = _read(self._handle)
        if earlier is not None and conditions is not None and lines and not is_fresh:
            wanted = dict(conditions)
            if not may_leave_out and any(line.left_out for line in lines):
                wanted["on_bad"] = "stop"
            if differing := _differences(earlier, wanted):
                if not overwrite:
                    raise ConfigError(
                        f"{folder} holds an unfinished data set, {len(lines)} of its shards complete, that was begun "
                        f"otherwise: {differing}; run the same command again to continue it, or give --overwrite to "
                        "begin anew"
                    )
                self.warning = f"an unfinished data set of {len(lines)} complete shards was discarded: {differing}"
            else:
                num_sound = _count_sound(folder, lines)
                self.complete = lines[:num_sound]
                os.ftruncate(self._handle, ends[num_sound])
                os.lseek(self._handle, 0, os.SEEK_END)
                return
        os.ftruncate(self._handle, 0)
        self._append({"format": _FORMAT, "conditions": None if conditions is None else dict(conditions)})

    def add(self, complete: Complete) -> None:
        """Note a shard whose files are on the disk."""
        self._append(complete.model_dump())

    def _append(self, content: dict[str, Any]) -> None:
        os.write(self._handle, json.dumps(content, ensure_ascii=False).encode() + b"\n")
        os.fsync(self._handle)

    def remove(self) -> None:
        """Delete the marker: the data set is finished."""
        self._path.unlink()
        self.release()

    def release(self) -> None:
        """Let others write to the folder; a second call does nothing."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


def _locked(path: Path) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The one who held the lock may have finished and deleted the file in between.
            if os.path.exists(path) and os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        except BlockingIOError:
            os.close(handle)
            raise ConfigError(
                f"{path.parent} is being written by another process; wait until it has ended, or give another folder"
            ) from None
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _read(handle: int) -> tuple[dict[str, Any] | None, list[Complete], list[int]]:
    """The conditions of the earlier run (None if it left none), its shards, and where the line before each ends."""
    content = os.pread(handle, os.fstat(handle).st_size, 0)
    *lines, _ = content.split(b"\n")  # behind the last line break stands nothing, or half a line
    try:
        header = json.loads(lines[0]) if lines else None
    except ValueError:
        header = None
    if (
        not isinstance(header, dict)
        or header.get("format") != _FORMAT
        or not isinstance(header.get("conditions"), dict)
    ):
        return None, [], []
    complete: list[Complete] = []
    ends = [len(lines[0]) + 1]
    for line in lines[1:]:
        try:
            complete.append(Complete.model_validate_json(line))
        except ValidationError:
            break
        ends.append(ends[-1] + len(line) + 1)
    return header["conditions"], complete, ends


def _differences(earlier: Conditions, wanted: Conditions) -> str:
    """What differs, for people; digests by name alone."""
    parts = []
    for name in sorted({*earlier, *wanted}):
        before, now = earlier.get(name), wanted.get(name)
        if name == "on_bad":
            parts.append("it left images out, and on-bad is stop")
        elif before != now:
            is_digest = any(isinstance(value, str) and len(value) == 64 for value in (before, now))
            option = name.replace("_", "-")
            parts.append(f"{option} differ" if is_digest else f"{option} was {before}, now {now}")
    return ", ".join(parts)


def _count_sound(folder: Path, lines: list[Complete]) -> int:
    """How many shards from the first on are as they were written: byte for byte, since a disk may have lost some."""
    for number, line in enumerate(lines):
        shard = line.shard
        try:
            if file_sha256(folder / shard.file) != shard.sha256:
                return number
            if file_sha256(folder / shard.index) != shard.index_sha256:
                return number
        except OSError:
            return number
    return len(lines)
