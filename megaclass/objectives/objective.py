"""The `Objective` protocol and the registry of its implementations.

Separate from the implementations so that each of them imports this file and nothing else of ours.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from torch import Tensor

from megaclass.errors import ConfigError


class Objective(Protocol):
    """What a loss does with the positive logit z_y and the negatives' log-sum-exp N of each sample.

    The loss of a batch is the mean of `intra` over all its samples plus the mean of `inter` over the samples that have
    an inter term. An objective whose `inter` ignores z_y is *dissected*: its intra term needs only the rank that owns
    the class, and it keeps its strength when negatives are sampled.

    Attributes:
        needs_positive: whether `inter` uses z_y; if so z_y of the whole batch is sent along with the exponential sums.
    """

    needs_positive: bool

    def intra(self, positive: Tensor, scale: float) -> Tensor:
        """[batch] positive logits and the scale -> [batch] losses, elementwise."""
        ...

    def inter(self, negative_lse: Tensor, positive: Tensor | None) -> Tensor:
        """[m] log-sum-exps (minus infinity where there is no negative) and logits -> [m] losses, elementwise."""
        ...


_REGISTRY: dict[str, Callable[..., Objective]] = {}
_T = TypeVar("_T", bound=Callable[..., Any])


def register(name: str) -> Callable[[_T], _T]:
    """Class decorator: make an objective known under `name`."""

    def add(implementation: _T) -> _T:
        assert name not in _REGISTRY, name
        _REGISTRY[name] = implementation
        return implementation

    return add


def names() -> list[str]:
    """All registered objectives, sorted."""
    return sorted(_REGISTRY)


def build(name: str, **options: float) -> Objective:
    """The objective registered as `name`, with its hyper-parameters.

    Raises:
        ConfigError: no such objective; the message names the nearest.
    """
    if name not in _REGISTRY:
        near = difflib.get_close_matches(name, names(), 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"objective {name!r} does not exist{hint}; there are {', '.join(names())}")
    return _REGISTRY[name](**options)
