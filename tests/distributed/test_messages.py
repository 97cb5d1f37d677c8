"""What messages take, measured for the model of a step: all collectives, of two sizes, and the wrapper."""

from __future__ import annotations

import math

import pytest

from megaclass.bench.messages import Sent, sent
from megaclass.parallel.process import World
from tests.support.spawn import spawn


def measured(world: World) -> Sent:
    return sent(world, repeats=2)


@pytest.mark.distributed
def test_two_ranks_measure_every_collective_and_the_wrapper() -> None:
    for found in spawn(measured, 2):
        assert set(found.messages) == {"all-reduce", "maximum", "all-gather", "reduce-scatter", "all-to-all"}
        for message in found.messages.values():
            for size in (0, 2**22):
                assert math.isfinite(message.seconds(size))
                assert 0 <= message.seconds(size) < 1
                assert 0 <= message.cpu_seconds(size) < 1
            assert message.seconds(2**24) > message.seconds(256)
        fixed, each = found.wrapper
        assert 0 <= fixed < 0.1
        assert 0 <= each < 0.01


def test_one_rank_sends_nothing() -> None:
    [found] = spawn(measured, 1)
    assert found == Sent({}, (0.0, 0.0))
