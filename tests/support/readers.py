"""Opens a reader from options given by name, whether all readers are told them or that one alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

from megaclass.data.options import ReaderOptions

Reader = TypeVar("Reader")


def opened(reader: Callable[..., Reader], *where: Any, **options: Any) -> Reader:
    """The reader of `where`, with `ReaderOptions` of those options that belong there, and the others as its own."""
    told = {field.name: options.pop(field.name) for field in fields(ReaderOptions) if field.name in options}
    return reader(*where, ReaderOptions(**told), **options)
