"""Names of the parts a loss is made of, and how one is built from its name and its own hyper-parameters.

Separate because objectives, margins and negative maps are found the same way.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from megaclass.errors import ConfigError

_Part = TypeVar("_Part")
_Class = TypeVar("_Class", bound=type[Any])


class Registry(Generic[_Part]):
    """Implementations of one kind of part, by name.

    Args:
        kind: the option of the classifier that holds such a name.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._classes: dict[str, type[_Part]] = {}

    def register(self, name: str) -> Callable[[_Class], _Class]:
        """Class decorator: make a frozen dataclass known under `name`."""

        def add(implementation: _Class) -> _Class:
            assert name not in self._classes, name
            self._classes[name] = implementation
            return implementation

        return add

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._classes)

    def find(self, name: str) -> type[_Part]:
        """The class registered as `name`.

        Raises:
            ConfigError: there is none; the message gives the nearest.
        """
        if name not in self._classes:
            raise ConfigError(unknown(f"classifier.{self.kind}", name, self.names()))
        return self._classes[name]

    def build(self, name: str, hyper: Mapping[str, float] | None = None) -> _Part:
        """The part called `name` with those of the hyper-parameters that are its own."""
        wanted = self.hyper_parameters(name)
        return self.find(name)(**{key: value for key, value in (hyper or {}).items() if key in wanted})

    def hyper_parameters(self, name: str) -> list[str]:
        """Names of a part's own hyper-parameters."""
        return [field.name for field in dataclasses.fields(self.find(name))]  # type: ignore[arg-type]


def check_hyper(name: str, value: float, low: float, high: float) -> None:
    """Refuse a hyper-parameter outside the open interval (low, high).

    Raises:
        ConfigError: with the range.
    """
    if not low < value < high:
        raise ConfigError(f"classifier.hyper.{name} {value:g} is outside ({low:g}, {high:g})")


def unknown(option: str, name: str, allowed: list[str]) -> str:
    """The message for a name that does not exist."""
    near = difflib.get_close_matches(name, allowed, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{option} {name!r} does not exist{hint}; there are {', '.join(allowed)}"
