"""Where a data set lies: a folder of this machine, or an address on a server or in an object store.

Separate because the configuration, the command line and the readers must agree on what an address is, because
`Path("https://host")` silently becomes another thing, and because an address may hold secrets. Imports nothing heavy.
Only the schemes listed here exist: libraries below would also run `pipe:` commands, open `file:` paths and chains of
file systems (`zip::s3://`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

SCHEMES = ("http", "https", "s3", "gs")

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")
# Host and port, or a bucket; then segments of a path. No wildcard, no escape from the folder, no control character.
_HOST = re.compile(r"[A-Za-z0-9._-]+(:[0-9]{1,5})?|\[[0-9A-Fa-f:.]+\](:[0-9]{1,5})?")
_PATH = re.compile(r"(/[A-Za-z0-9._~!$&'()+,;=@%-]+)*")
# To the last @, slashes included: a password may hold one, and to take out too much harms nobody.
_USER = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*:/{1,2})[^\s'\"]*@")
_QUERY = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*:/[^?#\s'\"]*)[?#][^\s'\"]*")


@dataclass(frozen=True)
class Address:
    """The folder of a data set on a server; `str` gives it back. Holds no user, password or query."""

    scheme: str
    host: str
    path: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.host}{self.path}"

    def file(self, name: str) -> str:
        """The address of a file in the folder."""
        return f"{self}/{name}"


Location = Path | Address


def parse_location(value: object) -> Location:
    """A folder or an address from what a user gave.

    Raises:
        ValueError: with what is wrong and what to do, without any secret that the value holds.
    """
    if isinstance(value, Address):
        return value
    if isinstance(value, Path):
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(value)):
            raise ValueError("an address must be given as text; a path has lost one of its slashes")
        return value
    if not isinstance(value, str):
        raise ValueError("must be a folder, or an address such as https://host/folder")
    match = _SCHEME.match(value)
    if match is None or "/" in match[1]:
        return Path(value)
    scheme = match[1].lower()
    if scheme not in SCHEMES:
        raise ValueError(
            f"scheme {scheme}: is refused; allowed are {', '.join(SCHEMES)}, or a folder of this machine without a "
            f"scheme (write ./{match[1]}:... for one that is called so)"
        )
    return _parse_address(scheme, value)


def _parse_address(scheme: str, value: str) -> Address:
    if not value.isascii() or not value.isprintable():
        # Below, line breaks would be dropped without a word.
        raise ValueError(f"not an address; give {scheme}://host/folder in printable ASCII characters")
    try:
        parts = urlsplit(value)
        is_port_good = parts.port is None or scheme in ("http", "https")
    except ValueError:
        raise ValueError(f"not an address; give {scheme}://host/folder") from None
    if "@" in parts.netloc:
        raise ValueError(
            "no user or password in an address, which is written to config.yaml and to checkpoints; give them in "
            "~/.netrc for http(s), or where s3fs and gcsfs look for them (AWS_..., GOOGLE_APPLICATION_CREDENTIALS)"
        )
    if "?" in value or "#" in value:
        raise ValueError(
            "no query or signature in an address (? or #): it names a folder and is written to config.yaml"
        )
    path = parts.path.rstrip("/")
    is_good = value.startswith(f"{value[: len(scheme)]}://") and is_port_good
    if not is_good or not _HOST.fullmatch(parts.netloc) or not _PATH.fullmatch(path):
        raise ValueError(f"not an address; give {scheme}://host/folder, without spaces, wildcards or empty parts")
    if any(part in (".", "..") or "%2e" in part.lower() or "%2f" in part.lower() for part in path.split("/")):
        raise ValueError("an address has no . or .. in it")
    return Address(scheme, parts.netloc, path)


def redact(text: str) -> str:
    """The text with the secrets of every address in it taken out: users, passwords and query strings."""
    return _QUERY.sub(r"\1?...", _USER.sub(r"\1...@", text))
