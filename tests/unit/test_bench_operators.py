"""Single operators as a step meets them: rows from a part of the matrix, roots of positive numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megaclass.bench.operators import groups
from megaclass.plan import operators


class Seen(TorchDispatchMode):
    """The arguments of every call of one operator."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.arguments: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(function) == self.name:
            self.arguments.append(tuple(x.clone() if isinstance(x, Tensor) else x for x in args))
        return function(*args, **(kwargs or {}))


def calls(name: str, number: float, times: int, function: Callable[[], Any]) -> list[tuple[Any, ...]]:
    """What the turns of an operator are called with that a step calls so many times."""
    with operators.recorded() as recorder:
        function()
    one = next(operator for operator in recorder.calls if operator.name == name)
    [[turn]] = groups(Counter({one: number}))
    with Seen(name) as seen:
        for _ in range(times):
            turn.take()
    assert len(turn.seconds) == times
    return seen.arguments


def gather() -> Tensor:
    return torch.empty(1000, 8).index_select(0, torch.empty(10, dtype=torch.int64))


def test_rows_come_from_as_large_a_part_as_one_call_of_a_step_sees() -> None:
    chosen = [rows for _, _, rows in calls("aten.index_select.default", 20, 50, gather)]
    for rows in chosen:
        assert 0 <= int(rows.min()) <= int(rows.max()) < 1000
        assert int(rows.max() - rows.min()) < 1000 // 20
        assert torch.equal(rows, rows.sort().values)
    assert len({int(rows[0]) for rows in chosen}) > 20, "the parts lie all over the matrix"


def test_one_call_sees_the_whole_matrix() -> None:
    chosen = torch.cat([rows for _, _, rows in calls("aten.index_select.default", 1, 1, gather)])
    assert int(chosen.max()) < 1000
    assert int(chosen.max() - chosen.min()) > 100


def test_parts_of_a_matrix_with_fewer_rows_than_calls() -> None:
    for _, _, rows in calls("aten.index_select.default", 5000, 5, gather):
        assert 0 <= int(rows.min()) <= int(rows.max()) < 1000


def test_roots_are_taken_of_positive_numbers() -> None:
    for (x,) in calls("aten.sqrt.default", 3, 2, lambda: torch.empty(100).sqrt()):
        assert float(x.min()) >= 0
    for (x,) in calls("aten.exp.default", 3, 1, lambda: torch.empty(100).exp()):
        assert float(x.min()) < 0 < float(x.max())
