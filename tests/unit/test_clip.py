"""The joint norm: replicated gradients once, shards summed, nothing hidden that is not finite."""

from __future__ import annotations

import math

import pytest
import torch

from megaclass.optim.clip import clip_coefficient, joint_norm
from tests.support.spawn import spawn


def _gradients():
    generator = torch.Generator().manual_seed(1)
    replicated = [torch.randn(shape, generator=generator) for shape in [(3, 5), (7,), (2, 3, 3, 3)]]
    return replicated, torch.randn(13, 7, generator=generator)


def _flat_norm(tensors):
    return torch.cat([tensor.double().flatten() for tensor in tensors]).norm()


def test_alone_it_is_the_norm_of_everything():
    replicated, rows = _gradients()
    norm = joint_norm(iter(replicated), iter([rows]), None)
    assert norm.shape == ()
    torch.testing.assert_close(norm, _flat_norm([*replicated, rows]), rtol=1e-12, atol=0)
    torch.testing.assert_close(joint_norm(replicated, [], None), _flat_norm(replicated), rtol=1e-12, atol=0)
    torch.testing.assert_close(joint_norm([], [rows], None), _flat_norm([rows]), rtol=1e-12, atol=0)


def test_empty_rows_and_bfloat16_gradients_are_understood():
    replicated, _ = _gradients()
    norm = joint_norm([gradient.bfloat16() for gradient in replicated], [torch.empty(0, 7)], None)
    torch.testing.assert_close(norm, _flat_norm([g.bfloat16() for g in replicated]), rtol=1e-6, atol=0)
    assert joint_norm([torch.empty(0)], [torch.empty(0, 7)], None) == 0


def test_large_float32_gradients_do_not_overflow():
    assert joint_norm([torch.full((4,), 1e30)], [], None).item() == pytest.approx(2e30)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("in_rows", [False, True])
def test_what_is_not_finite_stays_so(bad, in_rows):
    replicated, rows = _gradients()
    (rows if in_rows else replicated[1]).view(-1)[2] = bad
    assert not joint_norm(replicated, [rows], None).isfinite()


def _rank(world, replicated, rows, bad_rank):
    mine = rows[:9] if world.rank == 0 else rows[9:]
    if bad_rank == world.rank:
        mine = mine * math.nan
    none = joint_norm(replicated, [] if world.rank == 1 else [rows], world.group)
    return joint_norm(replicated, [mine[:2], mine[2:]], world.group), none


@pytest.mark.distributed
def test_replicated_gradients_count_once_and_shards_are_summed():
    replicated, rows = _gradients()
    ranks = spawn(_rank, 2, replicated, rows, None)
    for norm, without_rows_on_one in ranks:
        torch.testing.assert_close(norm, _flat_norm([*replicated, rows]), rtol=1e-12, atol=0)
        torch.testing.assert_close(without_rows_on_one, _flat_norm([*replicated, rows]), rtol=1e-12, atol=0)
    assert torch.equal(ranks[0][0], ranks[1][0])


@pytest.mark.distributed
def test_one_bad_rank_shows_on_all():
    for norm, _ in spawn(_rank, 2, *_gradients(), 1):
        assert norm.isnan()


def test_coefficient_limits_the_norm_and_never_enlarges():
    assert clip_coefficient(torch.tensor(10.0), 5.0).item() == 0.5
    assert clip_coefficient(torch.tensor(2.0), 5.0).item() == 1.0
    assert clip_coefficient(torch.tensor(0.0), 5.0).item() == 1.0
    assert clip_coefficient(torch.tensor(1e9), None).item() == 1.0
    assert clip_coefficient(torch.tensor(math.nan), 5.0).isnan()
    replicated, rows = _gradients()
    factor = clip_coefficient(joint_norm(replicated, [rows], None), 0.25)
    clipped = joint_norm([gradient * factor for gradient in replicated], [rows * factor], None)
    assert clipped.item() == pytest.approx(0.25, rel=1e-6)
