"""The optimizer of the replicated backbone: torch's own, over two groups of parameters.

Separate because what may decay is a decision of its own: weight decay belongs to the kernels and matrices, whose
length the following norm makes free, and to nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from megaclass.config import Optim


def parameter_groups(backbone: nn.Module | Mapping[str, nn.Parameter], weight_decay: float) -> list[dict[str, object]]:
    """The trainable parameters of a module, or of a table by their names, in two groups.

    Those that decay come first, then those that do not; empty groups are left out.

    What decays is a `weight` of two or more dimensions: kernels of convolutions and matrices of linear layers. Norms,
    biases, PReLU slopes, and position and class tokens (however many dimensions they have) do not.
    """
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    named = backbone.named_parameters() if isinstance(backbone, nn.Module) else backbone.items()
    for name, parameter in named:
        if parameter.requires_grad:
            is_matrix = parameter.ndim >= 2 and name.rsplit(".", 1)[-1] == "weight"
            (decayed if is_matrix else free).append(parameter)
    groups: list[dict[str, object]] = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build(backbone: nn.Module | Mapping[str, nn.Parameter], optim: Optim, lr: float) -> torch.optim.Optimizer:
    """The optimizer `optim.name` over `parameter_groups`, with learning rate `lr` in every group.

    The schedule writes `group["lr"]`. Both optimizers run fused: one pass over parameters and state.
    """
    groups = parameter_groups(backbone, optim.weight_decay)
    if optim.name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=optim.momentum, nesterov=False, fused=True)
    assert optim.name == "adamw", optim.name
    return torch.optim.AdamW(groups, lr=lr, betas=optim.betas, fused=True)
