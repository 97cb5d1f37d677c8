"""The moving average: its weights, its swap, and what it saves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megaclass.errors import CheckpointError
from megaclass.optim.ema import MovingAverage


def _module():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)).double()


def _train(module, average, num_steps):
    values = []
    for step in range(num_steps):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.1 * (step + 1))
        module(torch.full((4, 5), float(step), dtype=torch.float64) + torch.arange(4.0).unsqueeze(1))
        average.update()
        values.append({name: tensor.clone() for name, tensor in module.state_dict().items()})
    return values


def test_average_follows_the_warmed_up_decay():
    module = _module()
    expected = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    average = MovingAverage(module, 0.3)
    for number, values in enumerate(_train(module, average, 6)):
        decay = min(0.3, (1 + number) / (10 + number))
        for name, value in values.items():
            expected[name] = decay * expected[name] + (1 - decay) * value if value.is_floating_point() else value
    state = average.state_dict()
    assert state.pop("num_updates") == 6
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=1e-12, atol=1e-12)
    assert state["1.num_batches_tracked"] == 6


def test_applied_swaps_in_place_and_restores_to_the_bit():
    module = _module()
    average = MovingAverage(module, 0.9)
    own = _train(module, average, 3)[-1]
    addresses = [tensor.data_ptr() for tensor in module.state_dict().values()]
    averaged = {name: tensor.clone() for name, tensor in average.state_dict().items()}

    def look_and_fail():
        with average.applied():
            for name, tensor in module.state_dict().items():
                assert torch.equal(tensor, averaged[name]), name
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        look_and_fail()
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, own[name]), name
    assert [tensor.data_ptr() for tensor in module.state_dict().values()] == addresses
    for name, tensor in average.state_dict().items():
        assert torch.equal(tensor, averaged[name]), name


def test_a_restored_average_goes_on_to_the_bit():
    module = _module()
    average = MovingAverage(module, 0.9)
    _train(module, average, 3)
    saved = {name: tensor.clone() for name, tensor in average.state_dict().items()}
    own = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    _train(module, average, 2)
    other = _module()
    other.load_state_dict(own)
    restored = MovingAverage(other, 0.9)
    restored.load_state_dict(saved)
    _train(other, restored, 2)
    for name, tensor in average.state_dict().items():
        assert torch.equal(restored.state_dict()[name], tensor), name


def test_an_average_of_another_backbone_is_refused():
    average = MovingAverage(_module(), 0.9)
    state = average.state_dict()
    state["0.bias"] = torch.zeros(4)
    with pytest.raises(
        CheckpointError, match=r"'0.bias' has shape \(4,\) in the checkpoint and \(3,\) here \(1 tensors"
    ):
        average.load_state_dict(state)
    del state["0.bias"]
    with pytest.raises(CheckpointError, match=r"'0.bias' has shape none in the checkpoint"):
        average.load_state_dict(state)
