"""Synchronised batch norm on two ranks against torch's batch norm of one process on the whole batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megaclass.backbones.norm import SynchronisedBatchNorm, batch_norm
from tests.support.spawn import spawn

CHANNELS = 7


def _inputs(dims, sizes, dtype, offset=0.0, spread=1.0):
    generator = torch.Generator().manual_seed(3)
    shape = (sum(sizes), CHANNELS, *[3, 5][:dims])
    steps = []
    for _ in range(3):
        x = torch.randn(shape, generator=generator, dtype=torch.float64) * spread + offset
        steps.append((x.to(dtype), torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)))
    return steps


def _run(module, steps, eval_input):
    """Three training steps, then one evaluation: everything that can differ."""
    outputs, gradients = [], []
    for x, g in steps:
        x = x.clone().requires_grad_()
        y = module(x)
        y.backward(g)
        outputs.append(y.detach())
        gradients.append(x.grad)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    parameters = [p.grad for p in module.parameters()]
    module.eval()
    return outputs, gradients, parameters, state, module(eval_input).detach()


def _prepared(module, dtype):
    module = module.to(dtype)
    with torch.no_grad():
        module.weight.copy_(torch.linspace(-1.5, 2, CHANNELS))
        module.bias.copy_(torch.linspace(1, -1, CHANNELS))
    return module


def _rank(world, dims, sizes, steps, dtype, channels_last):
    torch.manual_seed(world.rank)
    module = _prepared(batch_norm(CHANNELS, dims, "sync", world.group), dtype)
    assert isinstance(module, SynchronisedBatchNorm)
    begin = sum(sizes[: world.rank])
    part = slice(begin, begin + sizes[world.rank])
    mine = [(x[part], g[part]) for x, g in steps]
    if channels_last:
        mine = [tuple(t.to(memory_format=torch.channels_last) for t in pair) for pair in mine]
    return _run(module, mine, steps[0][0])


def _compare(dims, sizes, dtype, rtol, atol, channels_last=False, **kwargs):
    steps = _inputs(dims, sizes, dtype, **kwargs)
    ranks = spawn(_rank, 2, dims, sizes, steps, dtype, channels_last)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    whole = [(x.to(exact), g.to(exact)) for x, g in steps]
    expected = _run(_prepared(batch_norm(CHANNELS, dims, "local", None), exact), whole, whole[0][0])

    def close(actual, wanted):
        torch.testing.assert_close(actual.to(wanted.dtype), wanted, rtol=rtol, atol=atol)

    for step in range(len(steps)):
        close(torch.cat([rank[0][step] for rank in ranks]), expected[0][step])
        close(torch.cat([rank[1][step] for rank in ranks]), expected[1][step])
    for ours, wanted in zip(zip(ranks[0][2], ranks[1][2], strict=True), expected[2], strict=True):
        close(ours[0] + ours[1], wanted)
    for rank in ranks:
        assert rank[3].keys() == expected[3].keys()
        for name, wanted in expected[3].items():
            close(rank[3][name], wanted)
            assert torch.equal(rank[3][name], ranks[0][3][name])
        close(rank[4], expected[4])


@pytest.mark.distributed
@pytest.mark.parametrize(("dims", "sizes"), [(0, [5, 3]), (2, [1, 4])])
def test_two_ranks_equal_one_in_float64(dims, sizes):
    _compare(dims, sizes, torch.float64, rtol=1e-12, atol=1e-12)


@pytest.mark.distributed
def test_two_ranks_equal_one_in_float32_far_from_zero():
    # Sums of squares in float32 would lose every digit of a variance of 1 beside a mean of 10,000.
    _compare(2, [4, 4], torch.float32, rtol=2e-3, atol=2e-3, offset=1e4)


@pytest.mark.distributed
def test_channels_last_gives_the_same():
    _compare(2, [3, 2], torch.float64, rtol=1e-12, atol=1e-12, channels_last=True)


def _bfloat16_rank(world, x):
    module = _prepared(batch_norm(CHANNELS, 2, "sync", world.group), torch.float32)
    part = x[4 * world.rank : 4 * world.rank + 4].clone().requires_grad_()
    y = module(part)
    y.sum().backward()  # the gradient is an expanded tensor here
    return y.dtype, y.detach().float(), part.grad.float(), module.running_mean.dtype, module.weight.grad


@pytest.mark.distributed
def test_bfloat16_input_keeps_float32_statistics():
    x = _inputs(2, [8], torch.bfloat16, offset=3.0)[0][0]
    ranks = spawn(_bfloat16_rank, 2, x)
    expected = _prepared(nn.BatchNorm2d(CHANNELS), torch.float32)(x.float()).detach()
    for rank, wanted in zip(ranks, expected.split(4), strict=True):
        assert rank[0] == torch.bfloat16
        assert rank[3] == torch.float32
        torch.testing.assert_close(rank[1], wanted, rtol=1e-2, atol=1e-2)
        # The gradient of the sum of a normalised batch vanishes.
        assert rank[2].abs().max() < 2e-2
    assert (ranks[0][4] + ranks[1][4]).abs().max() < 1e-3


def _ddp_rank(world, x, wanted):
    module = nn.Sequential(nn.Linear(5, CHANNELS), batch_norm(CHANNELS, 0, "sync", world.group), nn.Linear(CHANNELS, 2))
    _fill(module)
    wrapped = nn.parallel.DistributedDataParallel(module.double(), process_group=world.group)
    part = slice(4 * world.rank, 4 * world.rank + 4)
    ((wrapped(x[part]) - wanted[part]) ** 2).mean().backward()
    return [p.grad.numpy() for p in module.parameters()]


def _fill(module):
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            parameter.copy_(torch.sin(torch.arange(parameter.numel()) * 1.7 + number).view_as(parameter))


@pytest.mark.distributed
def test_ddp_with_sync_norm_equals_one_process():
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(8, 5, generator=generator, dtype=torch.float64)
    wanted = torch.randn(8, 2, generator=generator, dtype=torch.float64)
    module = nn.Sequential(nn.Linear(5, CHANNELS), nn.BatchNorm1d(CHANNELS), nn.Linear(CHANNELS, 2))
    _fill(module)
    ((module.double()(x) - wanted) ** 2).mean().backward()
    for gradients in spawn(_ddp_rank, 2, x, wanted):
        for ours, parameter in zip(gradients, module.parameters(), strict=True):
            torch.testing.assert_close(torch.from_numpy(ours), parameter.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("dims", "expected"), [(0, nn.BatchNorm1d), (2, nn.BatchNorm2d)])
def test_local_is_torchs(dims, expected):
    assert type(batch_norm(CHANNELS, dims, "local", None)) is expected


def test_sync_alone_equals_torchs():
    """One process computes as several do; against torch's module in float64: outputs, gradients, running statistics."""
    x = torch.randn(5, CHANNELS, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    results = []
    for kind in ("local", "sync"):
        module = batch_norm(CHANNELS, 2, kind, None).double()
        one = x.clone().requires_grad_()
        out = module(one)
        (out * torch.arange(out.numel(), dtype=torch.float64).reshape(out.shape).sin()).sum().backward()
        results.append([out.detach(), one.grad, module.weight.grad, module.bias.grad, *module.buffers()])
    for torchs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-10, atol=1e-12)


def test_a_fixed_scale_has_no_gradient():
    module = batch_norm(CHANNELS, 0, "local", None, learn_scale=False)
    module(torch.randn(4, CHANNELS)).square().sum().backward()
    assert module.weight.grad is None
    assert module.bias.grad is not None
    assert torch.equal(module.weight, torch.ones(CHANNELS))


def _wrong_shape(world):
    batch_norm(CHANNELS, 2, "sync", world.group)(torch.zeros(2, CHANNELS))


@pytest.mark.distributed
def test_a_wrong_number_of_dimensions_is_caught():
    with pytest.raises(AssertionError, match=r"over 2 spatial dimensions got \(2, 7\)"):
        spawn(_wrong_shape, 2)
