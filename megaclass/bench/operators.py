"""Measuring single operators on this machine: each in its turn, round after round.

In turn, because in a step no operator finds its inputs and its code in the caches as a loop over one operator would:
on this project's backbones such a loop is up to six times too fast. Processor time, so that other programs that run at
the same time count little.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from megaclass.plan.machine import Known
from megaclass.plan.operators import Operator, Shape

# Tensors of one group of operators that take turns; and the largest matrix that rows are chosen from.
_GROUP_BYTES, _MATRIX_BYTES = 2**30, 2**29
_INTEGERS = 1 << 31
# Of a negative number they are many times slower, and no step has one there.
_OF_POSITIVE = ("sqrt", "rsqrt", "log", "log1p")
# What a chunk or a block leaves in the caches.
_NEAR_BYTES = 2**22


@dataclass
class Turn:
    """One operator with tensors to call it with, and the seconds of its calls so far."""

    operator: Operator
    call: Callable[[], Any]
    refresh: Callable[[], Any]
    near: list[Tensor]
    seconds: list[float] = field(default_factory=list)

    def take(self) -> None:
        """Call it once, timed."""
        self.refresh()
        for tensor in self.near:
            tensor.add_(0)
        begin = time.thread_time()
        result = self.call()
        self.seconds.append(time.thread_time() - begin)
        del result

    @property
    def known(self) -> Known:
        """What is known of it now."""
        one = self.operator
        return Known(one.kind, one.flops, one.num_bytes, median(self.seconds))


def groups(operators: Mapping[Operator, float], near: frozenset[Operator] = frozenset()) -> list[list[Turn]]:
    """The operators that take any time, in groups whose tensors fit memory together; with how often a step calls each.

    Those of `near` work in blocks on what the one before has left in the caches; the small tensors of the others are
    not there.
    """
    found: list[list[Turn]] = [[]]
    used = 0
    matrices: dict[str, Tensor] = {}
    for operator, number in operators.items():
        if operator.is_free:
            continue
        size = sum(min(shape.num_bytes, _MATRIX_BYTES) for shape in operator.shapes())
        if used + size > _GROUP_BYTES and found[-1]:
            found.append([])
            used, matrices = 0, {}
        used += size
        found[-1].append(_turn(operator, number, matrices, operator in near))
    return found


def _turn(operator: Operator, number: float, matrices: dict[str, Tensor], is_near: bool) -> Turn:
    library, name, overload = operator.name.split(".")
    function = getattr(getattr(getattr(torch.ops, library), name), overload)
    whole = _index_limit(operator)
    # A step goes through its rows in so many calls, each in a part of the matrix that no call before has been to.
    limit = whole if whole == _INTEGERS else max(1, int(whole / max(1.0, number)))
    arguments = [_real(value, limit, matrices) for value in operator.arguments]
    keywords = {key: _real(value, limit, matrices) for key, value in operator.keywords}
    refresh: Callable[[], Any] = lambda: None  # noqa: E731
    first = arguments[0] if arguments else None
    if operator.kind.rstrip("_") in _OF_POSITIVE and isinstance(first, Tensor):
        first.abs_()
    if limit < whole:
        chosen = [x for x in tree_leaves(arguments) if isinstance(x, Tensor) and x.dtype == torch.int64]
        refresh = _moving(chosen, whole - limit + 1)
    elif (
        name.endswith("_") and isinstance(first, Tensor) and first.is_floating_point() and first.nbytes < _MATRIX_BYTES
    ):
        # Written in place again and again, values would leave the numbers; and whoever wrote them before did so now.
        before = first.clone()
        refresh = lambda: first.copy_(before)  # noqa: E731

    def call() -> Any:
        with torch.no_grad():
            return function(*arguments, **keywords)

    close = [x for x in arguments if isinstance(x, Tensor) and x.is_floating_point() and x.nbytes < _NEAR_BYTES]
    return Turn(operator, call, refresh, [x for x in close if 0 not in x.stride()] if is_near else [])


def _moving(chosen: list[Tensor], num_places: int) -> Callable[[], Any]:
    """What moves the chosen rows to another place of the matrix."""
    place = 0

    def move() -> None:
        nonlocal place
        new = int(torch.randint(num_places, ()))
        for rows in chosen:
            rows.add_(new - place)
        place = new

    return move


def _index_limit(operator: Operator) -> int:
    """Below what whole numbers lie that choose from the first argument; those of other operators may be any."""
    if operator.kind not in ("index_select", "index", "gather", "index_add_", "index_put_", "scatter_", "index_copy_"):
        return _INTEGERS
    dim = operator.arguments[1] if isinstance(operator.arguments[1], int) else 0
    shape = operator.arguments[0]
    return max(1, _fitted(shape).size[dim])


def _fitted(shape: Shape) -> Shape:
    """The shape, with fewer rows where it is too large to be made."""
    if shape.num_bytes <= _MATRIX_BYTES or not shape.size:
        return shape
    rows = max(1, int(shape.size[0] * _MATRIX_BYTES / shape.num_bytes))
    return Shape((rows, *shape.size[1:]), shape.stride, shape.dtype)


def _real(value: Any, limit: int, matrices: dict[str, Tensor]) -> Any:
    if isinstance(value, Shape):
        fitted = _fitted(value)
        if fitted.num_bytes < _MATRIX_BYTES // 8:
            return _filled(fitted, limit)
        # Large matrices are shared: no cache could hold one anyway.
        return matrices.setdefault(str(fitted), _filled(fitted, limit))
    if isinstance(value, tuple):
        return [_real(part, limit, matrices) for part in value]
    if isinstance(value, str) and hasattr(torch, value.removeprefix("torch.")) and value.startswith("torch."):
        return getattr(torch, value.removeprefix("torch."))
    return value


def _filled(shape: Shape, limit: int) -> Tensor:
    dtype = getattr(torch, shape.dtype)
    # Of a tensor that was expanded every element is there once.
    once = [length if step else 1 for length, step in zip(shape.size, shape.stride, strict=True)]
    made = torch.empty_strided(once, shape.stride, dtype=dtype)
    if dtype.is_floating_point:
        # Of both signs: an activation that branches on the sign is several times faster where all are alike.
        made.copy_(torch.randn(once))
    elif dtype == torch.bool:
        made.copy_(torch.rand(once) < 0.5)
    else:
        drawn = torch.randint(limit, once)
        made.copy_(drawn.sort(dim=0).values if drawn.dim() else drawn)
    return made.expand(shape.size)
