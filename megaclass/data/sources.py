"""Opening one file behind an address through fsspec, and what its failures mean: try again, or never.

Separate because each kind of server has its own errors, while `download.py` knows two only. HTTP goes through
fsspec's session of aiohttp; redirects are followed here, one by one, since a server that is trusted with shards is not
trusted to choose any address for us. Object stores go through s3fs and gcsfs, in ranges of four MiB; what those need
(credentials, endpoint, anonymous access) they find where their documentation says.

Nothing is decompressed: a body of a few bytes could fill the disk, and shards are stored as they are.
"""

from __future__ import annotations

import asyncio
import email.utils
import re
import time
from typing import Any, Protocol

from megaclass.config import Remote
from megaclass.data.address import Address, redact
from megaclass.errors import ConfigError

_READ_BYTES = 2**20
_RANGE_BYTES = 2**22
_MOST_REDIRECTS = 5
_EXTRAS = {"s3": "s3fs", "gs": "gcsfs"}


class Refused(Exception):
    """A failure that another try will not change, in words."""


class Interrupted(Exception):
    """A failure that may pass, in words.

    Attributes:
        wait_seconds: what the server asks to wait.
        is_useless: what was received so far must be thrown away.
    """

    def __init__(self, text: str, *, wait_seconds: float = 0.0, is_useless: bool = False) -> None:
        super().__init__(text)
        self.wait_seconds = wait_seconds
        self.is_useless = is_useless


class Body(Protocol):
    """What a server sends of a file, from `start` on."""

    start: int

    async def read(self) -> bytes:
        """The next bytes; none at the end."""
        ...

    def close(self) -> None:
        """Let go of the connection."""
        ...


class Source(Protocol):
    """A folder on a server. Its coroutines run in `loop`, which has a thread of its own."""

    loop: asyncio.AbstractEventLoop

    async def open(self, name: str, start: int) -> Body:
        """A file from byte `start` on; servers without ranges send it from the beginning."""
        ...

    def translate(self, error: Exception) -> Exception:
        """What an error of the library means: `Refused`, `Interrupted`, or itself if it is none of its own."""
        ...


def open_source(address: Address, remote: Remote) -> Source:
    """The source for an address.

    Raises:
        ConfigError: the package for its scheme is not installed.
    """
    return HttpSource(address, remote) if address.scheme in ("http", "https") else ObjectSource(address)


class HttpSource:
    """Files of a folder behind http:// or https://; passwords come from ~/.netrc, proxies from the environment."""

    def __init__(self, address: Address, remote: Remote) -> None:
        import aiohttp
        import fsspec

        self._address, self._hosts = address, remote.redirect_hosts
        timeout = aiohttp.ClientTimeout(total=None, connect=remote.timeout_seconds, sock_read=remote.timeout_seconds)
        self._system: Any = fsspec.filesystem(
            "http",
            skip_instance_cache=True,
            client_kwargs={"timeout": timeout, "trust_env": True, "auto_decompress": False},
        )
        self.loop = self._system.loop

    async def open(self, name: str, start: int) -> Body:
        """GET, with a range where `start` is not 0; redirects within the same host or to the hosts allowed."""
        session = await self._system.set_session()
        url = self._system.encode_url(self._address.file(name))
        headers = {"Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        for _ in range(_MOST_REDIRECTS + 1):
            response = await session.get(url, headers=headers, allow_redirects=False)
            try:
                if response.status not in (301, 302, 303, 307, 308):
                    return _HttpBody(response, _check_status(response, start))
                url = self._redirected(url, response.headers.get("Location", ""))
            except BaseException:
                response.close()
                raise
            response.close()
        raise Refused(f"redirected more than {_MOST_REDIRECTS} times")

    def translate(self, error: Exception) -> Exception:
        """Connection errors, cut bodies and timeouts may pass; a certificate that is wrong stays wrong."""
        import aiohttp

        if isinstance(error, aiohttp.ClientConnectorCertificateError | aiohttp.InvalidURL):
            return Refused(_words(error))
        if isinstance(error, aiohttp.ClientError | OSError):
            return Interrupted(_words(error))
        return error

    def _redirected(self, url: Any, location: str) -> Any:
        """Where a redirect leads, if it may."""
        shown = redact(location)[:200]
        try:
            target = url.join(type(url)(location, encoded=True))
            origin = (target.scheme, target.host, target.port)
        except ValueError:
            raise Refused(f"redirected to {shown!r}, which is no address") from None
        if target.scheme not in ("http", "https") or not target.host or target.user or target.password:
            raise Refused(f"redirected to {shown!r}; only http(s) addresses without a password are followed")
        if url.scheme == "https" and target.scheme == "http":
            raise Refused(f"redirected to {shown!r}, from https to http; that is not followed")
        is_upgrade = (url.scheme, target.scheme) == ("http", "https") and url.host == target.host
        if origin != (url.scheme, url.host, url.port) and not is_upgrade and target.host not in self._hosts:
            raise Refused(
                f"redirected to {shown!r} on another host or port; if the files lie there, name {target.host!r} in "
                "dataset.remote.redirect_hosts"
            )
        return target


class _HttpBody:
    def __init__(self, response: Any, start: int) -> None:
        self._response = response
        self.start = start

    async def read(self) -> bytes:
        read: bytes = await self._response.content.read(_READ_BYTES)
        return read

    def close(self) -> None:
        # Not released: that would wait for the rest of the body.
        self._response.close()


def _check_status(response: Any, start: int) -> int:
    """The byte that the body of an answer begins with."""
    status, headers = response.status, response.headers
    said = f"{status} {(response.reason or '')[:80]}".strip()
    if status in (408, 425, 429) or status >= 500:
        raise Interrupted(f"the server answers {said}", wait_seconds=_retry_after(headers.get("Retry-After", "")))
    if status == 416:
        raise Interrupted(f"the server answers {said} to a range from byte {start}", is_useless=True)
    if status in (401, 403):
        raise Refused(f"the server answers {said}; give access to it, or credentials in ~/.netrc")
    if status not in (200, 206):
        raise Refused(f"the server answers {said}; check the address")
    encoding = headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        raise Refused(f"the server sends the file as {encoding[:40]!r}, though asked for it as it is")
    if status == 200:
        return 0
    found = re.fullmatch(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18}|\*)", headers.get("Content-Range", ""))
    if found is None or int(found[1]) != start:
        raise Interrupted("the server answers with another range than asked for", is_useless=True)
    return start


def _retry_after(value: str) -> float:
    """Seconds that the header `Retry-After` asks for: a number of them, or a date (RFC 9110, 10.2.3)."""
    if re.fullmatch(r"\d{1,9}", value.strip()):
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


class ObjectSource:
    """Files below a prefix of a bucket: s3:// through s3fs, gs:// through gcsfs.

    Raises:
        ConfigError: that package is not installed.
    """

    def __init__(self, address: Address) -> None:
        import fsspec

        package = _EXTRAS[address.scheme]
        try:
            self._system: Any = fsspec.filesystem(address.scheme, skip_instance_cache=True)
        except ImportError:
            raise ConfigError(
                f"{address} needs the package {package}; pip install 'megaclass[{address.scheme}]'"
            ) from None
        self._prefix = f"{address.host}{address.path}"
        self.loop = self._system.loop

    async def open(self, name: str, start: int) -> Body:
        """Asks for the size; the bytes are asked for as they are read."""
        path = f"{self._prefix}/{name}"
        size = (await self._system._info(path))["size"]
        if start > size:
            raise Interrupted(f"the object has {size} bytes, fewer than were received before", is_useless=True)
        return _ObjectBody(self._system, path, start, size)

    def translate(self, error: Exception) -> Exception:
        """A missing object or right stays missing; other errors of files and connections may pass."""
        import aiohttp

        if isinstance(error, FileNotFoundError):
            return Refused("there is no such object; check the address")
        if isinstance(error, PermissionError):
            return Refused(f"access is denied: {_words(error)}")
        if isinstance(error, OSError | aiohttp.ClientError):
            return Interrupted(_words(error))
        # Those of the client libraries: no credentials, an unknown region, a broken profile.
        return Refused(_words(error))


class _ObjectBody:
    def __init__(self, system: Any, path: str, start: int, size: int) -> None:
        self._system, self._path, self._size = system, path, size
        self.start = self._next = start

    async def read(self) -> bytes:
        end = min(self._next + _RANGE_BYTES, self._size)
        if self._next >= end:
            return b""
        found: bytes = await self._system._cat_file(self._path, start=self._next, end=end)
        if len(found) != end - self._next:
            raise Interrupted(f"{len(found)} bytes were sent for a range of {end - self._next}")
        self._next = end
        return found

    def close(self) -> None:
        pass


def _words(error: Exception) -> str:
    """An error of a library in one line, without the secrets of addresses in it."""
    text = redact(" ".join(str(error).split()))[:300]
    name = type(error).__name__
    return f"{name}: {text}" if text else name
