"""One file from a server to the disk: tries, waits, goes on where it was cut off, and checks every byte by SHA-256.

Separate because it knows neither where files are kept (`cache.py`) nor how a server is talked to (`sources.py`). A try
ends when nothing has come for `dataset.remote.timeout_seconds`, and also when bytes drip in more slowly than 1 KiB a
second. Between tries it waits twice as long as before, half of it by chance, or as long as the server says.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import hashlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeVar

from megaclass.config import Remote
from megaclass.config.remote import LONGEST_WAIT_SECONDS
from megaclass.data.address import redact
from megaclass.data.counter import Stream, hash_counters, uniform
from megaclass.data.sources import Body, Interrupted, Refused, Source
from megaclass.errors import DataError

_log = logging.getLogger(__name__)

_FIRST_WAIT_SECONDS = 0.5
_LEAST_BYTES_A_SECOND = 1024
_SECONDS_BETWEEN_LOOKS = 0.1
_HASH_BYTES = 2**20
_T = TypeVar("_T")


class Stopped(Exception):
    """Nobody wants the file any more."""


@dataclass(frozen=True)
class Expected:
    """What a file must be.

    Attributes:
        name: in the folder.
        most_bytes: no more are written to the disk.
        num_bytes: its exact size, or None.
        sha256: of its content; None where nothing says it, and then a cut-off file is fetched from the start.
        check: looks at a complete file of unknown hash; raises `ValueError` for one that must be fetched again.
    """

    name: str
    most_bytes: int
    num_bytes: int | None = None
    sha256: str | None = None
    check: Callable[[BinaryIO], None] = lambda file: None


def download(
    source: Source, url: str, expected: Expected, file: BinaryIO, remote: Remote, stop: threading.Event
) -> None:
    """Fill `file` (read and write, not buffered) with the file `url`; what it holds already counts as received.

    Raises:
        DataError: it could not be fetched; with address, attempts and the last cause.
        Stopped: `stop` was set.
        OSError: the file cannot be written.
    """
    part = _Part(file, expected)
    shown = redact(url)
    for attempt in range(1, remote.attempts + 1):
        try:
            if not part.is_complete:
                _try_once(source, part, remote.timeout_seconds, stop)
            part.check()
            return
        except Refused as error:
            raise DataError(f"{shown} could not be fetched (attempt {attempt}): {error}") from None
        except Interrupted as error:
            if error.is_useless or expected.sha256 is None:
                part.restart()
            if attempt == remote.attempts:
                raise DataError(
                    f"{shown} could not be fetched in {attempt} attempts; the last ended with: {error}; "
                    "start again when the server is well"
                ) from None
            seconds = max(_back_off(url, attempt), min(error.wait_seconds, LONGEST_WAIT_SECONDS))
            _log.warning("%s: attempt %d of %d: %s; again in %.1f s", shown, attempt, remote.attempts, error, seconds)
            if stop.wait(seconds):
                raise Stopped from None


class _Part:
    """What has been received of a file, with its hash so far."""

    def __init__(self, file: BinaryIO, expected: Expected) -> None:
        self._file, self._expected = file, expected
        self.num_bytes, self._hash = 0, hashlib.sha256()
        if expected.sha256 is None:
            self.restart()
        else:
            self._read_again()

    @property
    def name(self) -> str:
        """Of the file in its folder."""
        return self._expected.name

    @property
    def is_complete(self) -> bool:
        """Whether no byte is missing, as far as the size is known."""
        return self.num_bytes == self._expected.num_bytes

    def add(self, data: bytes) -> None:
        """Write what came next."""
        if self.num_bytes + len(data) > self._expected.most_bytes:
            said = "it may have" if self._expected.num_bytes is None else "dataset.json says"
            raise Interrupted(f"it is longer than the {self._expected.most_bytes} bytes {said}", is_useless=True)
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]
        self._hash.update(data)
        self.num_bytes += len(data)

    def restart(self) -> None:
        """Throw away what there is."""
        self._file.seek(0)
        self._file.truncate()
        self.num_bytes, self._hash = 0, hashlib.sha256()

    def check(self) -> None:
        """Raise `Interrupted` unless the file is what it must be."""
        expected = self._expected
        if expected.num_bytes is not None and self.num_bytes < expected.num_bytes:
            raise Interrupted(f"it ended after {self.num_bytes} of {expected.num_bytes} bytes")
        if expected.sha256 is not None and self._hash.hexdigest() != expected.sha256:
            raise Interrupted(
                f"its SHA-256 is {self._hash.hexdigest()[:16]}... and not the {expected.sha256[:16]}... of "
                "dataset.json",
                is_useless=True,
            )
        try:
            self._file.seek(0)
            expected.check(self._file)
        except ValueError as error:
            raise Interrupted(str(error), is_useless=True) from None

    def _read_again(self) -> None:
        """Take over what an earlier process left; its hash is part of the whole."""
        self._file.seek(0)
        while data := self._file.read(_HASH_BYTES):
            self._hash.update(data)
            self.num_bytes += len(data)
        if self.num_bytes > self._expected.most_bytes:
            self.restart()


async def _receive(source: Source, part: _Part, seconds: float, ended: threading.Event) -> None:
    """One try: everything that the server sends from where the part ends."""
    try:
        body = await _answer(source, source.open(part.name, part.num_bytes), seconds)
        try:
            if body.start != part.num_bytes:
                part.restart()
            await _copy(source, body, part, seconds)
        finally:
            body.close()
    finally:
        ended.set()


async def _copy(source: Source, body: Body, part: _Part, seconds: float) -> None:
    since, received = time.monotonic(), 0
    while data := await _answer(source, body.read(), seconds):
        part.add(data)
        received += len(data)
        passed = time.monotonic() - since
        if passed >= seconds:
            if received < passed * _LEAST_BYTES_A_SECOND:
                raise Interrupted(f"only {received} bytes came in {passed:.1f} s")
            since, received = time.monotonic(), 0


async def _answer(source: Source, question: Coroutine[Any, Any, _T], seconds: float) -> _T:
    """What the server answers in time; its failures in our words, while those of the disk stay what they are."""
    try:
        async with asyncio.timeout(seconds):
            return await question
    except TimeoutError:
        raise Interrupted(f"nothing came for {seconds:g} s") from None
    except (Refused, Interrupted):
        raise
    except Exception as error:
        raise source.translate(error) from None


def _try_once(source: Source, part: _Part, seconds: float, stop: threading.Event) -> None:
    """One try in the source's thread; ends early when the file is no longer wanted."""
    ended = threading.Event()
    future = asyncio.run_coroutine_threadsafe(_receive(source, part, seconds, ended), source.loop)
    try:
        while not future.done():
            if stop.is_set():
                raise Stopped
            concurrent.futures.wait([future], _SECONDS_BETWEEN_LOOKS)
    except BaseException:
        future.cancel()
        # The caller closes the file. What is cancelled before it began never writes.
        ended.wait(1.0)
        raise
    future.result()


def _back_off(url: str, attempt: int) -> float:
    """Seconds to wait after a try; processes that failed together do not come back together."""
    longest = min(LONGEST_WAIT_SECONDS, _FIRST_WAIT_SECONDS * 2.0 ** min(attempt - 1, 20))
    who = hashlib.sha256(f"{socket.gethostname()}/{os.getpid()}/{url}".encode()).digest()
    bits = hash_counters(int.from_bytes(who[:8], "little"), Stream.BACK_OFF, attempt)
    return longest * (0.5 + 0.5 * float(uniform(bits)))
