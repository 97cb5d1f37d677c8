"""The set-up of the log: rank 0 to stderr and train.log, other ranks only warnings, under their name.

Separate so that every other file just asks for `logging.getLogger(__name__)`. Only the `megaclass` logger is touched;
what else lives in the process keeps its own.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

# The look-behind keeps the search linear in a long text; passwords may hold an `@`, so the last one counts.
_CREDENTIALS = re.compile(
    r"(?<![a-zA-Z0-9+.-])(?P<scheme>[a-zA-Z][a-zA-Z0-9+.-]*:"
    # A path keeps one slash of a URL's two; there only a name with a password counts.
    r"(?://|/(?=[^/\s'\"]*:[^/\s'\"]*@)))[^/\s'\"]+@"
)
_QUERY = re.compile(
    r"(?P<name>[?&][\w.-]*(?:token|secret|signature|sig|password|passwd|credential|key|keyid|auth)[\w.-]*=)"
    r"[^&\s'\"#]+",
    re.IGNORECASE,
)


def redact(text: str) -> str:
    """The text with user names and passwords in URLs, and query values that are secrets by name, replaced by `***`."""
    return _QUERY.sub(r"\g<name>***", _CREDENTIALS.sub(r"\g<scheme>***@", text))


@contextmanager
def log_to_run(run_dir: Path | None, rank: int) -> Iterator[None]:
    """Send the log of this process to where it belongs for the length of a `with` block.

    Args:
        run_dir: folder of train.log, made if missing; None writes no file.
        rank: 0 logs everything from INFO on; others only from WARNING on, to stderr, as `[rank R]`.
    """
    root = logging.getLogger("megaclass")
    before = (root.level, root.propagate)
    handlers: list[logging.Handler] = [_CurrentStderr()]
    if rank == 0 and run_dir is not None:
        Path(run_dir).mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(Path(run_dir) / "train.log", encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(_Redacting(rank))
        root.addHandler(handler)
    root.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    root.propagate = False
    try:
        yield
    finally:
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()
        root.setLevel(before[0])
        root.propagate = before[1]


class _Redacting(logging.Formatter):
    """Formats a record and redacts the whole result, so that a traceback cannot leak what a message may not."""

    def __init__(self, rank: int) -> None:
        name = "" if rank == 0 else f"[rank {rank}] "
        super().__init__(f"%(asctime)s %(levelname)-7s {name}%(message)s")

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


class _CurrentStderr(logging.StreamHandler[TextIO]):
    """Writes to what `sys.stderr` is now: while a live line is shown, that is a stream which keeps it intact."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        """Standard error as it is at this moment."""
        return sys.stderr

    @stream.setter
    def stream(self, value: TextIO) -> None:
        raise AttributeError("the stream is always the current standard error")
