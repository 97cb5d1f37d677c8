"""What every command is made with: its parser, and the bar that shows how far it is."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megaclass.data.address import Location, parse_location, redact
from megaclass.errors import ConfigError


def command(
    commands: Any, name: str, function: Callable[..., int], text: str, *, takes_options: bool = False, **more: Any
) -> argparse.ArgumentParser:
    """The parser of one command, which will call `function`; `takes_options` hands it what it does not know as well."""
    made: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        **more,
    )
    made.set_defaults(command=function, takes_options=takes_options)
    return made


def data_location(argument: str, value: str) -> Location:
    """The folder or address of a data set that an argument gives; `ConfigError` for neither."""
    try:
        return parse_location(value)
    except ValueError as error:
        raise ConfigError(f"{argument} {redact(value)}: {error}") from None


def data_folder(argument: str, value: str) -> Path:
    """The folder of a data set on this machine that an argument gives; `ConfigError` for an address."""
    found = data_location(argument, value)
    if not isinstance(found, Path):
        raise ConfigError(f"{argument} {found}: this needs the whole data set on a disk; copy it to a folder first")
    return found


class Progress:
    """A bar on stderr where that is a terminal, nothing elsewhere; called with (done, all)."""

    def __init__(self, what: str) -> None:
        from rich.console import Console
        from rich.progress import MofNCompleteColumn, Progress

        self._bar = Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=Console(stderr=True))
        self._bar.disable = not sys.stderr.isatty()
        self._task = self._bar.add_task(what, total=None)

    def __call__(self, done: int, total: int) -> None:
        """Show that `done` of `total` are done."""
        self._bar.update(self._task, completed=done, total=total)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
