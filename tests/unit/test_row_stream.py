"""The order of work on two streams, with streams that write down what they are told; GPUs are in tests/gpu."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from megaclass import config
from megaclass.errors import ConfigError
from megaclass.parallel.process import World
from megaclass.row_stream import RowStream
from megaclass.train import build
from tests.distributed.test_oracle import compare, run_case
from tests.support.cases import Case
from tests.support.training import small_config, small_dataset


class _Stream:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: _Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What streams were told, where `torch.cuda` has only these."""
    told: list[str] = []
    first, second = _Stream("first", told), _Stream("second", told)
    current = [first]

    @contextmanager
    def stream(chosen: _Stream) -> Iterator[None]:
        current.append(chosen)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: second)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])
    monkeypatch.setattr(torch.cuda, "stream", stream)
    return told


def test_the_second_stream_waits_before_a_block_and_the_first_at_the_join(log: list[str]) -> None:
    rows = RowStream(torch.device("cuda", 0))
    read = torch.ones(3)
    is_there = weakref.ref(read)
    with rows.beside({"read": read}):
        log.append(f"on {torch.cuda.current_stream(0).name}")
    del read
    log.append(f"on {torch.cuda.current_stream(0).name}")
    assert is_there() is not None  # no other tensor may take its memory while the second stream reads it
    rows.join()
    assert is_there() is None
    assert log == ["second waits for first", "on second", "on first", "first waits for second"]
    rows.join()
    assert len(log) == 4


def test_the_row_gradient_is_taken_after_the_join(log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the whole class layer: one block a backward pass, joined before its gradient is used."""
    case = Case("d-softmax-k", 13, 5, "any")
    made: list[Any] = []
    original = Case.build

    def with_stream(*args: Any, **kwargs: Any) -> Any:
        made.append(original(*args, **kwargs))
        made[-1].row_stream = RowStream(torch.device("cuda", 0))
        return made[-1]

    monkeypatch.setattr(Case, "build", with_stream)
    compare(case, [run_case(World(0, 1, 0, torch.device("cpu"), None, None), case)])
    assert log == ["second waits for first", "first waits for second"]
    assert made[0].row_stream._held == []


def test_where_there_is_no_second_stream_it_is_refused(tmp_path: Path) -> None:
    content = small_config(small_dataset(tmp_path / "data"), tmp_path, train={"row_stream": True})
    world = World(0, 1, 0, torch.device("cpu"), None, None)
    with pytest.raises(ConfigError, match=r"train\.row_stream is for CUDA, and this run is on cpu, whose cores"):
        build.build(config.validate(content), world)
    with pytest.raises(ConfigError, match=r"train\.row_stream is for train\.strategy ddp, and that is fsdp"):
        config.validate({**content, "train": {**content["train"], "strategy": "fsdp"}})
    content["classifier"]["row_memory"] = "host"
    with pytest.raises(ConfigError, match=r"train\.row_stream: rows that visit the device .* leave one of the two out"):
        config.validate(content)
