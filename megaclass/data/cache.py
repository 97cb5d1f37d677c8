"""A bounded folder of fetched files that all processes of a node share.

Separate because sharing and bounds are hard enough without knowing what the files are. Layout:

    lock                        held while room is made
    CONTENT/NAME                a complete file; whoever reads it holds a shared lock on it
    CONTENT/NAME.BYTES.part     one that is being fetched, counted with the size it may have
    CONTENT/locks/NAME          held by the process that fetches it: every file is fetched once, however many want it

CONTENT is the hash of a manifest, so a file never changes: it appears by a rename, and goes when room is needed and
nobody holds it, the one unused for longest first. All locks are `flock`: they end with the process that holds them.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from megaclass.data.download import Stopped
from megaclass.errors import DataError

_SECONDS_BETWEEN_LOOKS = 0.05
_PART, _LOCKS = ".part", "locks"


class Cache:
    """Files by content and name, at most `most_bytes` of them.

    Args:
        folder: made if it is not there; readable by this user alone.
        most_bytes: bound of complete files and of files being fetched, together; lock files are empty.
        option: of the configuration that sets the bound, for messages.
    """

    def __init__(self, folder: Path, most_bytes: int, option: str = "dataset.remote.cache_gib") -> None:
        self.folder = Path(folder).expanduser().absolute()
        self.most_bytes, self._option = most_bytes, option

    @contextmanager
    def hold(
        self, content: str, name: str, num_bytes: int, fill: Callable[[BinaryIO], None], stop: threading.Event,
        *, is_exact: bool = False, is_needed: bool = True,
    ) -> Iterator[Path]:  # fmt: skip
        """A complete file, which stays as long as the context is open; fetched if it is not there.

        Args:
            content: hash of the manifest that names the file.
            name: of the file; both are names, never paths.
            num_bytes: most that it may have; room for as much is made before it is fetched.
            is_exact: it has just so many; a file of another size is fetched again.
            fill: completes a file that may hold a part of it already; called by one process at a time.
            stop: ends all waiting by `Stopped`.
            is_needed: without room, False raises `Stopped` where True waits for it.

        Raises:
            DataError: too many bytes are in use at once, or the folder cannot be written; or from `fill`.
        """
        assert "/" not in content + name, (content, name)
        try:
            handle = self._get(content, name, num_bytes, fill, stop, is_exact, is_needed)
        except OSError as error:
            raise DataError(
                f"cache folder {self.folder} cannot be used: {error.strerror or error}; make room, or give another "
                "dataset.remote.cache_dir"
            ) from None
        try:
            yield self.folder / content / name
        finally:
            os.close(handle)

    @contextmanager
    def alone(self, name: str, stop: threading.Event) -> Iterator[None]:
        """Nobody else on this node is in a block of the same name."""
        with self._locked(self.folder / _LOCKS / name, stop):
            yield

    def _get(
        self, content: str, name: str, num_bytes: int, fill: Callable[[BinaryIO], None], stop: threading.Event,
        is_exact: bool, is_needed: bool,
    ) -> int:  # fmt: skip
        """An open handle with a shared lock on the complete file."""
        path = self.folder / content / name
        while True:
            handle = _hold_whole(path, num_bytes if is_exact else None)
            if handle is not None:
                return handle
            with self._locked(self.folder / content / _LOCKS / name, stop):
                if path.exists():
                    continue
                part = path.with_name(f"{name}.{num_bytes}{_PART}")
                with self._open_with_room(part, num_bytes, stop, is_needed) as file:
                    try:
                        fill(file)
                        os.fsync(file.fileno())
                    except OSError:
                        # The disk is full: what is there of the file would only keep it so.
                        part.unlink(missing_ok=True)
                        raise
                # Held before it has its name: else it might be removed before it was ever read.
                handle = _open_shared(part)
                os.rename(part, path)
                return handle

    def _open_with_room(self, part: Path, num_bytes: int, stop: threading.Event, is_needed: bool) -> BinaryIO:
        """The part file, for which there is room from now on; waits for others that are fetching."""
        while True:
            with self._locked(self.folder / "lock", stop):
                in_use, is_busy = self._make_room(part, num_bytes)
                if in_use + num_bytes <= self.most_bytes:
                    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
                    return open(os.open(part, flags, 0o600), "r+b", buffering=0)
            if not is_needed:
                raise Stopped
            if not is_busy:
                raise DataError(
                    f"cache folder {self.folder} has no room for {part.name.rsplit('.', 2)[0]} of {num_bytes} bytes: "
                    f"{in_use} of {self.most_bytes} are in use; set {self._option} to at least "
                    f"{(in_use + num_bytes) / 2**30:.3g}"
                )
            if stop.wait(_SECONDS_BETWEEN_LOOKS):
                raise Stopped

    def _make_room(self, wanted: Path, num_bytes: int) -> tuple[int, bool]:
        """Remove what nobody uses until there is room for `wanted`; the bytes left, and whether any are being fetched.

        Cost: looks at every file of the cache.
        """
        kept, total, is_busy = [], 0, False
        for path, found in self._files():
            if path == wanted:
                continue
            is_fetched_now = path.suffix == _PART and not self._is_left_over(path)
            is_busy |= is_fetched_now
            # A complete file whose name looks like that of a part counts like any other.
            declared = path.name.split(".")[-2] if is_fetched_now else ""
            size = int(declared) if declared.isdecimal() else found.st_size
            total += size
            if not is_fetched_now:
                kept.append((found.st_mtime, path, size))
        if num_bytes > self.most_bytes:
            return total, False
        for _, path, size in sorted(kept):
            if total + num_bytes <= self.most_bytes:
                break
            if self._remove(path):
                total -= size
        return total, is_busy

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for folder in os.scandir(self.folder):
            if not folder.is_dir(follow_symlinks=False) or folder.name == _LOCKS:
                continue
            for entry in os.scandir(folder):
                with suppress(FileNotFoundError):
                    if entry.is_file(follow_symlinks=False):
                        yield Path(entry.path), entry.stat(follow_symlinks=False)

    def _is_left_over(self, part: Path) -> bool:
        """Whether the process that fetched it is gone."""
        try:
            with _try_lock(_lock_of(part)) as is_mine:
                return is_mine
        except FileNotFoundError:
            return True

    def _remove(self, path: Path) -> bool:
        """Remove a file unless somebody uses it."""
        try:
            with _try_lock(_lock_of(path)) as is_mine:
                if is_mine:
                    path.unlink()
                return is_mine
        except FileNotFoundError:
            path.unlink(missing_ok=True)
            return True

    @contextmanager
    def _locked(self, path: Path, stop: threading.Event) -> Iterator[None]:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            while not _flock(handle, fcntl.LOCK_EX):
                if stop.wait(_SECONDS_BETWEEN_LOOKS):
                    raise Stopped
            yield
        finally:
            os.close(handle)


def _lock_of(path: Path) -> Path:
    """What is locked while a file is in use: itself, or for one that is being fetched the lock of its name."""
    return path.parent / _LOCKS / path.name.rsplit(".", 2)[0] if path.suffix == _PART else path


def _hold_whole(path: Path, num_bytes: int | None) -> int | None:
    """A handle with a shared lock on a file that is there, and that is marked as just used; None without one.

    A file of another size than `num_bytes` was changed by somebody else, and is removed.
    """
    try:
        handle = _open_shared(path)
    except FileNotFoundError:
        return None
    try:
        found = os.fstat(handle)
        # It may have been removed between opening and locking.
        if found.st_ino == path.stat().st_ino:
            if num_bytes is None or found.st_size == num_bytes:
                os.utime(handle)
                return handle
            path.unlink()
    except FileNotFoundError:
        pass
    except BaseException:
        os.close(handle)
        raise
    os.close(handle)
    return None


def _open_shared(path: Path) -> int:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    # Who removes a file holds it for a moment only.
    fcntl.flock(handle, fcntl.LOCK_SH)
    return handle


@contextmanager
def _try_lock(path: Path) -> Iterator[bool]:
    """Whether nobody else holds a lock on an existing file; nobody can take one meanwhile."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        yield _flock(handle, fcntl.LOCK_EX)
    finally:
        os.close(handle)


def _flock(handle: int, kind: int) -> bool:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
