"""Which parameters decay, and that the optimizer is torch's own."""

from __future__ import annotations

import copy

import pytest
import torch

from megaclass import backbones
from megaclass.config import Optim
from megaclass.optim.backbone import build, parameter_groups


def _backbone(name):
    torch.manual_seed(0)
    return backbones.build(name, dim=7, image_size=32, channels=1, batch_norm="local", group=None)


@pytest.mark.parametrize("name", ["tiny", "iresnet18", "vit-tiny", "mobilefacenet"])
def test_kernels_and_matrices_decay_and_nothing_else(name):
    backbone = _backbone(name)
    decayed, free = parameter_groups(backbone, 0.5)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.5, 0.0)
    kinds = (torch.nn.Conv2d, torch.nn.Linear)
    expected = {id(module.weight) for module in backbone.modules() if isinstance(module, kinds)}
    assert {id(parameter) for parameter in decayed["params"]} == expected
    every = {id(parameter) for parameter in backbone.parameters() if parameter.requires_grad}
    assert {id(parameter) for parameter in free["params"]} == every - expected
    assert len(decayed["params"]) + len(free["params"]) == len(every)


def test_an_empty_group_is_left_out():
    assert len(parameter_groups(torch.nn.Linear(3, 2, bias=False), 0.5)) == 1


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_steps_equal_torchs_plain_optimizer(name):
    ours = _backbone("tiny").double()
    theirs = copy.deepcopy(ours)
    optim = Optim(name=name, weight_decay=0.1, betas=(0.8, 0.95))
    groups = parameter_groups(theirs, 0.1)
    reference = (
        torch.optim.SGD(groups, lr=0.1, momentum=0.9, foreach=False)
        if name == "sgd"
        else torch.optim.AdamW(groups, lr=0.1, betas=(0.8, 0.95), foreach=False)
    )
    optimizer = build(ours, optim, 0.1)
    images = torch.randn(5, 1, 32, 32, dtype=torch.float64)
    for lr in (0.1, 0.05, 0.0):
        for module, stepper in [(ours, optimizer), (theirs, reference)]:
            for group in stepper.param_groups:
                group["lr"] = lr
            stepper.zero_grad()
            (module(images) ** 3).sum().backward()
            stepper.step()
    for ours_now, theirs_now in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours_now, theirs_now, rtol=1e-9, atol=1e-9)
