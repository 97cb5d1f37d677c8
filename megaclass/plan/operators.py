"""`Operator`: one call of a torch operator by shapes alone, its operations and bytes; and recording what code calls.

Recording runs code on tensors that have shapes and no memory (torch's fake tensors), so a step of a billion classes can
be taken apart in a second. Where the code asks for something that depends on values (which labels are here, how many
classes are different), the recorder answers with the number that is expected.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import flop_registry

# They give another name to memory, or some without touching it: nothing but their overhead costs time.
FREE = frozenset({
    "alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "expand", "lift_fresh", "new_empty",
    "new_empty_strided", "permute", "select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose",
    "unbind", "unsqueeze", "view", "_unsafe_view", "_reshape_alias", "diagonal",
})  # fmt: skip
# Of these the recorder knows the answer; the value is what a scalar that the code reads back is taken to be.
_MANY = float(2**20)


@dataclass(frozen=True)
class Shape:
    """A tensor without its values.

    Attributes:
        size, stride: in elements.
        dtype: torch's name of it.
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Bytes of the elements, each counted once."""
        number = 1
        for length, step in zip(self.size, self.stride, strict=True):
            number *= length if step else 1
        return number * getattr(torch, self.dtype).itemsize

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.size)}{list(self.stride)}".replace(" ", "")


@dataclass(frozen=True)
class Operator:
    """One call.

    Attributes:
        name: torch's, such as `aten.mm.default`.
        arguments: shapes, numbers and nested tuples of them, in order; keywords last, as pairs.
        flops: of matrix products and convolutions, zero for all others.
        num_bytes: read and written at least: every tensor once.
    """

    name: str
    arguments: tuple[Any, ...]
    keywords: tuple[tuple[str, Any], ...]
    flops: int
    num_bytes: int

    @property
    def kind(self) -> str:
        """The name without library and overload."""
        return self.name.split(".")[1]

    @property
    def is_free(self) -> bool:
        """Whether nothing but its overhead takes time."""
        return self.kind in FREE

    @property
    def key(self) -> str:
        """Name and arguments as text: what a profile of a machine knows it by."""
        return f"{self.name}{_text(self.arguments)}{_text(self.keywords) if self.keywords else ''}"

    def shapes(self) -> list[Shape]:
        """The tensors among the arguments."""
        return list(_shapes((self.arguments, self.keywords)))


Calls = Counter[Operator]


class Recorder(TorchDispatchMode):
    """Counts the operators that are called inside; see `recorded`.

    Args:
        expected: of so many elements, how many a choice by value keeps.
    """

    def __init__(self, expected: Callable[[int], int]) -> None:
        super().__init__()
        self.calls: Calls = Counter()
        self._expected = expected
        self._last = ""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator on shapes and count it."""
        kwargs = kwargs or {}
        if not str(function).startswith("aten."):
            return function(*args, **kwargs)
        kind = str(function).split(".")[1]
        known = self._answer(kind, args)
        self._last = kind
        out = function(*args, **kwargs) if known is None else known
        self.calls[_operator(function, args, kwargs, out)] += 1
        return out

    def _answer(self, kind: str, args: Any) -> Any:
        """The result of an operator whose shape or value would depend on values; None of any other."""
        if kind == "_local_scalar_dense":
            if args[0].dtype == torch.bool:
                return self._last != "any"  # nothing is wrong with any label, and every loss is finite
            return _MANY if args[0].is_floating_point() else 0
        if kind == "_unique2":
            found = args[0].new_empty(self._expected(args[0].numel()))
            return found, args[0].new_empty(args[0].shape), args[0].new_empty(0)
        if kind == "nonzero":
            return args[0].new_empty((self._expected(args[0].numel()), args[0].dim()), dtype=torch.int64)
        if kind == "index":
            mask = args[1][0]
            if mask is not None and mask.dtype == torch.bool:
                return args[0].new_empty((self._expected(len(mask)), *args[0].shape[1:]))
        return None


@contextmanager
def recorded(expected: Callable[[int], int] = lambda number: number) -> Iterator[Recorder]:
    """Code inside runs on tensors without memory, on the CPU's operators; the recorder has the calls afterwards."""
    recorder = Recorder(expected)
    with FakeTensorMode(), recorder:
        yield recorder


def scaled(calls: Calls, factor: float) -> Calls:
    """So many times as many calls; fractions are allowed, as of a chunk that is not full."""
    return Counter({operator: count * factor for operator, count in calls.items()})


def difference(more: Calls, fewer: Calls) -> Calls:
    """Calls of `more` that `fewer` has not; negative where it has more of them, so that nothing is lost in a sum."""
    both = Counter(more)
    both.subtract(fewer)
    return Counter({operator: count for operator, count in both.items() if count})


def total(*parts: Calls) -> Calls:
    """All calls together."""
    found: Calls = Counter()
    for part in parts:
        found.update(part)
    return found


def _operator(function: Any, args: Any, kwargs: Any, out: Any) -> Operator:
    tensors = [leaf for leaf in tree_flatten((args, kwargs, out))[0] if isinstance(leaf, Tensor)]
    count = flop_registry.get(getattr(function, "overloadpacket", function))
    return Operator(
        name=str(function),
        arguments=_plain(args),
        keywords=tuple(sorted((name, _plain(value)) for name, value in kwargs.items())),
        flops=0 if count is None else int(count(*args, **kwargs, out_val=out)),
        num_bytes=_num_bytes(str(function).split(".")[1], tensors),
    )


# Where rows are chosen from a matrix, or put into it, the rest of the matrix is not touched.
_CHOOSING = frozenset({"index_select", "index", "gather", "embedding"})
_PUTTING = frozenset({"index_put_", "index_add_", "index_copy_", "scatter_", "scatter"})


def _num_bytes(kind: str, tensors: list[Tensor]) -> int:
    different = {id(tensor): _shape(tensor).num_bytes for tensor in tensors}
    if kind in _CHOOSING and len(tensors) > 1:
        rows = _shape(tensors[-1]).num_bytes
        return 2 * rows + sum(_shape(tensor).num_bytes for tensor in tensors[1:-1])
    if kind in _PUTTING and len(tensors) > 2:
        values = sum(_shape(tensor).num_bytes for tensor in tensors[1:-1])
        return 3 * values
    return sum(different.values())


def _shape(tensor: Tensor) -> Shape:
    return Shape(tuple(tensor.shape), tuple(tensor.stride()), str(tensor.dtype).removeprefix("torch."))


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _shape(value)
    if isinstance(value, (list, tuple)):
        return tuple(_plain(part) for part in value)
    if isinstance(value, (bool, int, float, str)) or value is None:
        return value
    return str(value)


def _shapes(value: Any) -> Iterator[Shape]:
    if isinstance(value, Shape):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _shapes(part)


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({','.join(_text(part) for part in value)})"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
