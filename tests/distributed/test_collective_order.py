"""The order of collectives on a thousand ranks, without a thousand ranks: all must send the same in the same order.

Torch's fake process group sends nothing and answers at once, each rank as if all others held what it holds.
"""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch.distributed as dist
from torch import Tensor

from megaclass.parallel.process import World
from tests.distributed.test_traffic import BATCH, DIM, Case, _record
from tests.support.spawn import spawn

RANKS = 1024


def _all_to_all(out: Tensor, *_: object, **__: object) -> mock.Mock:
    """The fake group's own cannot give a rank more than it sends."""
    out.zero_()
    return mock.Mock()


def _as_rank(world: World, rank: int, case: Case) -> list[tuple[str, int]]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=RANKS, store=FakeStore())
    try:
        with mock.patch.object(dist, "all_to_all_single", _all_to_all):
            return _record(replace(world, rank=rank, size=RANKS, group=dist.group.WORLD), case)
    finally:
        dist.destroy_process_group()


@pytest.mark.distributed
@pytest.mark.parametrize("preset", ["d-softmax", "d-softmax-k", "d-softmax-b", "partial-fc", "adaface", "sphereface2"])
def test_all_ranks_send_the_same_in_the_same_order(preset: str) -> None:
    """Thirteen classes: most ranks own none, and their turn comes all the same."""
    sent = [spawn(_as_rank, 1, rank, Case(preset, 13, BATCH, "any"))[0] for rank in (0, 1, 700, RANKS - 1)]
    # What a rank routes to the owners depends on which classes it owns; how often it routes does not.
    common = [[(name, 0 if name == "all-to-all" else size) for name, size in each] for each in sent]
    assert common[0][0] == ("all-gather", BATCH)
    assert all(each == common[0] for each in common)
    assert ("all-to-all" in dict(sent[0])) == (preset == "d-softmax-b")
    if preset == "d-softmax":
        total = RANKS * BATCH
        assert sent[0][1:] == [("all-gather", BATCH * DIM), ("all-reduce", total + 2), ("reduce-scatter", total * DIM)]
