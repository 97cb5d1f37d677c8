"""A data set wherever it lies: a folder of this machine, or one behind an address whose files are fetched when needed.

Separate so that readers see a folder in both cases. They hold the files they are about to read, and say which they will
read next. Of a folder on this machine everything is there already. Of an address the manifest is fetched when the data
set is opened, and everything else when it is first held: into the cache of this node, once for all its processes, and
only with the SHA-256 that the manifest gives. The manifest itself is what is trusted: it is not signed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from megaclass import durable
from megaclass.config import Remote
from megaclass.data.address import Address, Location
from megaclass.data.cache import Cache
from megaclass.data.download import Expected, Stopped, download
from megaclass.data.manifest import INDEX_DTYPE, MANIFEST_NAME, Manifest, SplitInfo, load_manifest
from megaclass.data.sources import open_source
from megaclass.errors import DataError

_MOST_MANIFEST_BYTES = 2**28
_INDEX_HEADER_BYTES = 4096
_MOST_PAIRS_BYTES = 2**30
_CLASS_NAME_BYTES = 200
# Processes of a node that start together ask for the manifest once.
_MANIFEST_SECONDS = 60.0
_ADDRESSES = "addresses"


class DataFolder:
    """A data set on this machine, and what is common to one behind an address.

    Attributes:
        location: what the user gave; `str` of it is for messages.
        folder: where files that are held lie.
        manifest: of the data set.

    Raises:
        DataError: it is not there, or its manifest is not valid.
    """

    def __init__(self, location: Location, folder: Path) -> None:
        self.location, self.folder = location, Path(folder)
        self.manifest: Manifest = load_manifest(folder)

    @contextmanager
    def hold(self, *names: str) -> Iterator[None]:
        """The named files of the manifest lie in `folder` as long as the context is open.

        Raises:
            DataError: a file cannot be fetched or is not the one of the manifest.
        """
        yield

    def fetch_ahead(self, *names: str) -> None:
        """Say which files will be held next."""

    def close(self) -> None:
        """End what goes on in the background; the files can be held again."""


def open_folder(location: Location, remote: Remote) -> DataFolder:
    """The data set at a location.

    Raises:
        ConfigError: the package for an address is not installed.
        DataError: there is no data set, or it cannot be fetched.
    """
    return RemoteFolder(location, remote) if isinstance(location, Address) else DataFolder(location, location)


def files_of(split: SplitInfo) -> list[str]:
    """Names of all shards and index files of a split."""
    return [name for shard in split.shards for name in (shard.index, shard.file)]


class RemoteFolder(DataFolder):
    """A data set behind an address, through the cache of this node.

    At most one file is fetched ahead at a time, by one thread, which ends with `close`.
    """

    def __init__(self, address: Address, remote: Remote) -> None:
        self._address, self._remote = address, remote
        self._source = open_source(address, remote)
        self._cache = Cache(remote.cache_dir, int(remote.cache_gib * 2**30))
        self._never = threading.Event()
        self._ahead: _Ahead | None = None
        self._held = ExitStack()
        weakref.finalize(self, self._held.close)
        self._content, num_bytes = self._find_manifest()
        self._expected = {
            MANIFEST_NAME: Expected(MANIFEST_NAME, num_bytes, num_bytes, self._content),
        }
        self._held.enter_context(self._hold_one(MANIFEST_NAME, self._never))
        super().__init__(address, self._cache.folder / self._content)
        self._expected |= _expected_files(self.manifest, address)
        largest = max(self._expected.values(), key=lambda file: file.num_bytes or 0)
        if (largest.num_bytes or 0) > self._cache.most_bytes:
            raise DataError(
                f"{address}: {largest.name} of {largest.num_bytes} bytes is more than dataset.remote.cache_gib "
                f"{remote.cache_gib:g} holds; raise it, or make smaller shards with `megaclass data reshard`"
            )

    @contextmanager
    def hold(self, *names: str) -> Iterator[None]:
        """Fetch what is not in the cache, and keep it there as long as the context is open."""
        with ExitStack() as stack:
            for name in names:
                if self._ahead is not None:
                    self._ahead.wait_for(name)
                stack.enter_context(self._hold_one(name, self._never))
            yield

    def fetch_ahead(self, *names: str) -> None:
        """Fetch files in the background, as far as there is room; what goes wrong is raised when they are held."""
        if self._ahead is None or self._ahead.names != names:
            self.close()
            self._ahead = _Ahead(self, names)

    def close(self) -> None:
        """End the thread that fetches ahead."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    @contextmanager
    def _hold_one(self, name: str, stop: threading.Event, *, is_needed: bool = True) -> Iterator[None]:
        expected = self._expected[name]

        def fill(file: BinaryIO) -> None:
            download(self._source, self._address.file(name), expected, file, self._remote, stop)

        with self._cache.hold(
            self._content, name, expected.most_bytes, fill, stop,
            is_exact=expected.num_bytes is not None, is_needed=is_needed,
        ):  # fmt: skip
            yield

    def _find_manifest(self) -> tuple[str, int]:
        """SHA-256 and size of the manifest; fetched and checked unless a process of this node just did."""
        key = hashlib.sha256(str(self._address).encode()).hexdigest()[:32]
        known = self._cache.folder / _ADDRESSES / key
        try:
            with self._cache.alone(key, self._never):
                found = _read_known(known)
                if found is None:
                    known.parent.mkdir(mode=0o700, exist_ok=True)
                    found = self._fetch_manifest(known.with_suffix(".new"))
                    durable.replace_bytes(known, json.dumps(found).encode())
        except OSError as error:
            raise DataError(
                f"cache folder {self._cache.folder} cannot be used: {error.strerror or error}; make room, or give "
                "another dataset.remote.cache_dir"
            ) from None
        return found

    def _fetch_manifest(self, new: Path) -> tuple[str, int]:
        url = self._address.file(MANIFEST_NAME)
        expected = Expected(MANIFEST_NAME, _MOST_MANIFEST_BYTES, check=_check_json)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        with open(os.open(new, flags, 0o600), "r+b", buffering=0) as file:
            # Nobody makes room of it, here and under its later name, until it is known to be good.
            fcntl.flock(file, fcntl.LOCK_SH)
            download(self._source, url, expected, file, self._remote, self._never)
            content = new.read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            folder = self._cache.folder / digest
            folder.mkdir(mode=0o700, exist_ok=True)
            os.replace(new, folder / MANIFEST_NAME)
            try:
                load_manifest(folder)
            except DataError as error:
                raise DataError(str(error).replace(str(folder / MANIFEST_NAME), url)) from None
        return digest, len(content)


class _Ahead:
    """One thread that brings some files into the cache."""

    def __init__(self, owner: RemoteFolder, names: tuple[str, ...]) -> None:
        self.names = names
        self._owner, self._stop = owner, threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="fetch-ahead", daemon=True)
        self._thread.start()

    def wait_for(self, name: str) -> None:
        """Wait until the thread is done, if it is about this file, and raise what it met."""
        if name in self.names:
            self._thread.join()
            if self._error is not None:
                raise self._error

    def close(self) -> None:
        """End the thread, also in the middle of a file."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            for name in self.names:
                with self._owner._hold_one(name, self._stop, is_needed=False):
                    pass
        except Stopped:
            pass
        except BaseException as error:
            self._error = error


def _expected_files(manifest: Manifest, address: Address) -> dict[str, Expected]:
    """Every file that the manifest names, with what it must be.

    Raises:
        DataError: two files share a name, or one has a name that the cache needs.
    """
    expected: list[Expected] = []
    for split in manifest.splits.values():
        most = split.num_classes * _CLASS_NAME_BYTES + 2**16
        expected.append(Expected(split.classes, most, sha256=split.classes_sha256))
        if split.pairs is not None:
            expected.append(Expected(split.pairs, _MOST_PAIRS_BYTES, sha256=split.pairs_sha256))
        for shard in split.shards:
            expected.append(Expected(shard.file, shard.num_bytes, shard.num_bytes, shard.sha256))
            most = shard.num_samples * INDEX_DTYPE.itemsize + _INDEX_HEADER_BYTES
            expected.append(Expected(shard.index, most, sha256=shard.index_sha256))
    found: dict[str, Expected] = {}
    for file in expected:
        if file.name in found or file.name in (MANIFEST_NAME, "locks") or file.name.endswith(".part"):
            raise DataError(
                f"{address.file(MANIFEST_NAME)} names {file.name!r} twice, or as a file that it cannot be; make the "
                "data set again"
            )
        found[file.name] = file
    return found


def _read_known(path: Path) -> tuple[str, int] | None:
    """What was written a short time ago about a manifest."""
    with suppress(OSError, ValueError, TypeError):
        if abs(time.time() - path.stat().st_mtime) < _MANIFEST_SECONDS:
            digest, num_bytes = json.loads(path.read_bytes())
            if re.fullmatch(r"[0-9a-f]{64}", digest) and isinstance(num_bytes, int):
                return digest, num_bytes
    return None


def _check_json(file: BinaryIO) -> None:
    try:
        json.loads(file.read())
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"it is no JSON: {error}") from None
