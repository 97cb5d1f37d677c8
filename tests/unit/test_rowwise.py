"""Row optimizers: torch's own with all rows drawn, and rows not drawn untouched to the bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from megaclass.config import Optim
from megaclass.errors import ConfigError
from megaclass.kernels.interface import RowBlock
from megaclass.kernels.memory import Memory
from megaclass.kernels.row_gradient import RowGradient, collect
from megaclass.optim import rowwise
from megaclass.optim.rowwise import RowAdagrad, RowAdamW, RowSGD, build
from tests.support.largest import Largest

NUM_ROWS, DIM = 13, 7


def _weight(num_rows=NUM_ROWS, dtype=torch.float64):
    return torch.randn(num_rows, DIM, generator=torch.Generator().manual_seed(1), dtype=dtype)


CASES = [
    (lambda w: RowSGD(w, momentum=0.9), lambda p: torch.optim.SGD(p, momentum=0.9)),
    (lambda w: RowSGD(w, momentum=0.0), lambda p: torch.optim.SGD(p)),
    (
        lambda w: RowSGD(w, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, momentum=0.9, weight_decay=0.1),
    ),
    (lambda w: RowSGD(w, momentum=0.0, weight_decay=0.1), lambda p: torch.optim.SGD(p, weight_decay=0.1)),
    (lambda w: RowAdamW(w, betas=(0.9, 0.999)), lambda p: torch.optim.AdamW(p, weight_decay=0.0)),
    (
        lambda w: RowAdamW(w, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1),
    ),
    (lambda w: RowAdamW(w, betas=(0.0, 0.0)), lambda p: torch.optim.AdamW(p, betas=(0.0, 0.0), weight_decay=0.0)),
]
LAZY = [*(case[0] for case in CASES), RowAdagrad]


@pytest.mark.parametrize(("ours", "theirs"), CASES)
@pytest.mark.parametrize("as_rows", [False, True])
@pytest.mark.parametrize("block_rows", [5, 32768])
def test_all_rows_equal_torch(ours, theirs, as_rows, block_rows, monkeypatch):
    monkeypatch.setattr(rowwise, "block_rows", lambda dim, device_type: block_rows)
    weight, reference = _weight(), nn.Parameter(_weight())
    row_optimizer, torch_optimizer = ours(weight), theirs([reference])
    generator = torch.Generator().manual_seed(2)
    for step in range(20):
        values = torch.randn(NUM_ROWS, DIM, generator=generator, dtype=torch.float64)
        lr = 0.1 / (step + 1)
        given_values = values.clone()
        row_optimizer.step(RowGradient(torch.arange(NUM_ROWS) if as_rows else None, given_values), lr)
        assert torch.equal(given_values, values)
        reference.grad = values
        for group in torch_optimizer.param_groups:
            group["lr"] = lr
        torch_optimizer.step()
    torch.testing.assert_close(weight, reference.detach(), rtol=1e-13, atol=2e-15)


@pytest.mark.parametrize("ours", LAZY)
@settings(max_examples=15, deadline=None)
@given(draws=st.lists(st.sets(st.integers(0, NUM_ROWS - 1)), min_size=1, max_size=4))
def test_rows_not_drawn_are_untouched_to_the_bit(ours, draws):
    weight = _weight(dtype=torch.float32)
    optimizer = ours(weight)
    generator = torch.Generator().manual_seed(3)
    optimizer.step(RowGradient(None, torch.randn(NUM_ROWS, DIM, generator=generator)), 0.1)
    for draw in draws:
        before = {name: tensor.clone() for name, tensor in [("weight", weight), *optimizer.state.items()]}
        rows = torch.tensor(sorted(draw), dtype=torch.int64)
        optimizer.step(RowGradient(rows, torch.randn(len(rows), DIM, generator=generator)), 0.1)
        others = torch.ones(NUM_ROWS, dtype=torch.bool)
        others[rows] = False
        for name, tensor in [("weight", weight), *optimizer.state.items()]:
            assert torch.equal(tensor[others], before[name][others]), name
            assert not len(rows) or not torch.equal(tensor[rows], before[name][rows]), name


@pytest.mark.parametrize("ours", LAZY)
def test_a_row_moves_as_if_its_own_draws_were_all_the_steps(ours):
    weight, alone = _weight(), _weight()[4:5].clone()
    optimizer, single = ours(weight), ours(alone)
    generator = torch.Generator().manual_seed(6)
    for rows in ([1, 4], [0, 2], [4], [3], [0, 4, 12]):
        values = torch.randn(len(rows), DIM, generator=generator, dtype=torch.float64)
        optimizer.step(RowGradient(torch.tensor(rows), values), 0.05)
        if 4 in rows:
            position = rows.index(4)
            single.step(RowGradient(None, values[position : position + 1]), 0.05)
    assert torch.equal(weight[4], alone[0])


@pytest.mark.parametrize("ours", LAZY)
@pytest.mark.parametrize("rows", [None, torch.empty(0, dtype=torch.int64)])
def test_an_empty_shard_and_an_empty_draw_work(ours, rows):
    empty = _weight(0)
    ours(empty).step(RowGradient(rows, torch.empty(0, DIM, dtype=torch.float64)), 0.1)
    assert empty.shape == (0, DIM)
    weight = _weight()
    ours(weight).step(RowGradient(torch.empty(0, dtype=torch.int64), torch.empty(0, DIM, dtype=torch.float64)), 0.1)
    assert torch.equal(weight, _weight())


def test_state_has_one_entry_per_row_and_none_without_momentum():
    assert RowSGD(_weight(), momentum=0.0).state == {}
    assert {n: tuple(t.shape) for n, t in RowSGD(_weight(), momentum=0.9).state.items()} == {"momentum": (13, 7)}
    adam = RowAdamW(nn.Parameter(_weight()), betas=(0.9, 0.999)).state
    assert {name: tuple(tensor.shape) for name, tensor in adam.items()} == {
        "exp_avg": (13, 7),
        "exp_avg_sq": (13, 7),
        "num_steps": (13,),
    }
    assert not any(tensor.requires_grad for tensor in adam.values())


def test_a_parameter_that_requires_gradients_is_updated_in_place():
    weight = nn.Parameter(_weight())
    build("adamw", weight, Optim()).step(RowGradient(torch.tensor([3]), torch.ones(1, DIM, dtype=torch.float64)), 0.1)
    torch.testing.assert_close(weight.detach()[3], _weight()[3] - 0.1, rtol=0, atol=1e-8)


def test_build_follows_the_configuration():
    weight = _weight()
    assert isinstance(build("sgd", weight, Optim()), RowSGD)
    assert isinstance(build("adamw", weight, Optim()), RowAdamW)
    assert build("sgd", weight, Optim(momentum=0.0)).state == {}
    build("sgd", weight, Optim(weight_decay=0.5)).step(RowGradient(None, torch.zeros_like(weight)), 0.1)
    assert torch.equal(weight, _weight())
    with pytest.raises(ConfigError, match=r"optim.class_name: 'lamb' is not known; allowed are sgd, adamw, adagrad"):
        build("lamb", weight, Optim())


def test_mismatched_values_are_caught():
    optimizer = RowSGD(_weight(), momentum=0.0)
    with pytest.raises(AssertionError):
        optimizer.step(RowGradient(None, torch.zeros(5, DIM, dtype=torch.float64)), 0.1)
    with pytest.raises(AssertionError):
        optimizer.step(RowGradient(torch.tensor([1, 2]), torch.zeros(1, DIM, dtype=torch.float64)), 0.1)


@pytest.mark.parametrize("name", ["sgd", "adamw", "adagrad"])
def test_a_step_makes_nothing_larger_than_the_drawn_rows(name):
    """The peer's optimizer touches the whole shard whatever was drawn."""
    weight = torch.randn(5000, 8)
    optimizer = build(name, weight, Optim())
    with Largest() as step:
        optimizer.step(RowGradient(torch.arange(0, 5000, 100), torch.randn(50, 8)), 0.1)
    assert 0 < step.numel <= 50 * 8


@pytest.mark.parametrize(("ours", "theirs"), CASES)
@pytest.mark.parametrize("block_rows", [5, 4096])
def test_dense_rows_equal_torch_whatever_was_drawn(ours, theirs, block_rows, monkeypatch):
    """With `is_dense` rows without a gradient get one of zero, as in the public peer."""
    monkeypatch.setattr(rowwise, "block_rows", lambda dim, device_type: block_rows)
    weight, reference = _weight(), nn.Parameter(_weight())
    row_optimizer, torch_optimizer = ours(weight), theirs([reference])
    row_optimizer._is_dense = True
    generator = torch.Generator().manual_seed(2)
    for rows in ([12, 3, 4], [], [0, 1, 2, 3], list(range(13)), [5]):
        values = torch.randn(len(rows), DIM, generator=generator, dtype=torch.float64)
        where = torch.tensor(rows, dtype=torch.int64)
        row_optimizer.step(RowGradient(where, values), 0.05)
        reference.grad = torch.zeros_like(weight).index_add_(0, where, values)
        for group in torch_optimizer.param_groups:
            group["lr"] = 0.05
        torch_optimizer.step()
    torch.testing.assert_close(weight, reference.detach(), rtol=1e-13, atol=2e-15)


def test_adagrad_follows_its_formula():
    weight = _weight()
    optimizer = RowAdagrad(weight, eps=1e-3)
    generator = torch.Generator().manual_seed(2)
    expected, total = _weight(), torch.zeros(NUM_ROWS, dtype=torch.float64)
    for rows in ([0, 4], [4], [4, 12]):
        values = torch.randn(len(rows), DIM, generator=generator, dtype=torch.float64)
        optimizer.step(RowGradient(torch.tensor(rows), values), 0.3)
        for row, value in zip(rows, values, strict=True):
            total[row] += sum(float(number) ** 2 for number in value) / DIM
            expected[row] -= 0.3 * value / (float(total[row]) ** 0.5 + 1e-3)
    torch.testing.assert_close(weight, expected)
    torch.testing.assert_close(optimizer.state["square_sum"], total)


BF16 = [
    lambda w, **more: RowSGD(w, momentum=0.9, **more),
    lambda w, **more: RowSGD(w, momentum=0.9, momentum_dtype=torch.bfloat16, **more),
    lambda w, **more: RowAdamW(w, betas=(0.9, 0.999), **more),
    RowAdagrad,
]


@pytest.mark.parametrize("ours", BF16)
def test_rows_of_bfloat16_move_like_those_of_float32(ours):
    """Two hundred equal steps, each far below the spacing of bfloat16: rounding to the nearest would not move."""
    exact, low = torch.full((64, 33), 0.75), torch.full((64, 33), 0.75).bfloat16()
    first, second = ours(exact), ours(low, seed=3)
    assert all(entry.dtype in (torch.float32, torch.bfloat16, torch.int64) for entry in second.state.values())
    values = torch.linspace(-1, 1, 33).repeat(64, 1)
    for number in range(200):
        for optimizer in (first, second):
            optimizer.step(RowGradient(torch.arange(64), values), 1e-5, number)
    moved, wanted = (low.float() - 0.75).mean(dim=0), (exact - 0.75).mean(dim=0)
    # Each number takes 200 random decisions over a spacing of 2^-9 ... 2^-8; 64 rows are averaged.
    deviation = (float(wanted.abs().max()) * 2**-8 / 64) ** 0.5
    assert float((moved - wanted).abs().max()) < 5 * deviation
    assert float(moved @ wanted) > 0


@pytest.mark.parametrize("ours", BF16)
def test_rounding_knows_neither_shard_nor_order(ours):
    """Two shards, the second one's rows updated in another order: the same rows to the bit."""
    start = torch.randn(NUM_ROWS, DIM, generator=torch.Generator().manual_seed(1)).bfloat16()
    whole, parts = start.clone(), [start[:5].clone(), start[5:].clone()]
    together = ours(whole, seed=7)
    apart = [ours(parts[0], seed=7), ours(parts[1], seed=7, first_row=5)]
    for number in range(3):
        values = torch.randn(NUM_ROWS, DIM, generator=torch.Generator().manual_seed(number))
        together.step(RowGradient(None, values), 0.01, number)
        apart[0].step(RowGradient(None, values[:5]), 0.01, number)
        order = torch.tensor([7, 0, 3, 1, 2, 6, 5, 4])
        apart[1].step(RowGradient(order, values[5:][order]), 0.01, number)
    assert torch.equal(torch.cat(parts), whole)
    again = start.clone()
    ours(again, seed=8).step(RowGradient(None, torch.ones(NUM_ROWS, DIM)), 0.001, 0)
    other = start.clone()
    ours(other, seed=8).step(RowGradient(None, torch.ones(NUM_ROWS, DIM)), 0.001, 1)
    assert not torch.equal(again, other), "another step rounds otherwise"


@pytest.mark.parametrize("ours", [*LAZY, BF16[1]])
@pytest.mark.parametrize("drawn", [None, [1, 4, 6, 7, 12], []])
@pytest.mark.parametrize("is_low", [False, True])
def test_a_step_in_the_backward_pass_equals_one_after_it(ours, drawn, is_low):
    """Blocks of candidates, own rows among them and beside them: one update for each row, to the bit."""
    dtype = torch.bfloat16 if is_low else torch.float32
    weights = [_weight(dtype=torch.float32).to(dtype) for _ in range(2)]
    first, second = ours(weights[0]), ours(weights[1])
    rows = None if drawn is None else torch.tensor(drawn, dtype=torch.int64)
    size = NUM_ROWS if drawn is None else len(drawn)
    for number in range(3):
        generator = torch.Generator().manual_seed(number)
        values = torch.randn(size, DIM, generator=generator)
        own = RowGradient(torch.tensor([0, 4, 12]), torch.randn(3, DIM, generator=generator))

        def blocks(out=None, values=values, size=size):
            for start in range(0, size, 3):
                stop = min(start + 3, size)
                block = values[start:stop].clone() if out is None else out[start:stop].copy_(values[start:stop])
                yield RowBlock(start, stop, block)

        first.step(collect(blocks, rows, NUM_ROWS, own, Memory()), 0.05, number)
        second.step_in_backward(blocks(), rows, own, 0.05, number)
    assert torch.equal(*weights)
    assert all(torch.equal(first.state[name], second.state[name]) for name in first.state)
