"""The dense oracle: every preset in one process with the whole class matrix, in float64, written from the formulas.

Nothing of `megaclass` is used but the draw, which says which classes are negatives and which samples have an inter
term; whether draws are right is tested apart. Gradients come from torch's autograd through the plain formulas.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Dense:
    """What the oracle gives: the loss, its two parts, and both gradients."""

    loss: Tensor
    intra: Tensor
    inter: Tensor
    positive_cosine: Tensor
    embedding_gradient: Tensor  # [global batch, dim], of the raw embeddings
    class_gradient: Tensor  # [classes, dim]


def dense(
    preset: str,
    embeddings: Tensor,
    labels: Tensor,
    weight: Tensor,
    *,
    scale: float,
    margin: float = 0.0,
    end_point: float = 0.9,
    negatives: Tensor | None = None,
    batch_rows: Tensor | None = None,
) -> Dense:
    """The loss of `preset` over the whole batch [G, dim], labels [G] and matrix [C, dim], with gradients.

    `negatives` are the drawn classes (None: all), `batch_rows` the samples with an inter term (None: all).
    """
    x = embeddings.double().clone().requires_grad_()
    w = weight.double().clone().requires_grad_()
    cosines = (x / x.norm(dim=1, keepdim=True)) @ (w / w.norm(dim=1, keepdim=True)).T
    batch = torch.arange(len(labels))
    own = cosines[batch, labels]

    if preset in ("cosface", "partial-fc"):
        adjusted = own - margin
    elif preset == "arcface":
        theta = torch.arccos(own)
        adjusted = torch.where(theta + margin < math.pi, torch.cos(theta + margin), own - margin * math.sin(margin))
    else:
        adjusted = own

    is_negative = torch.zeros(len(labels), len(w), dtype=torch.bool)
    is_negative[:, torch.arange(len(w)) if negatives is None else negatives] = True
    is_negative[batch, labels] = False
    rest = torch.where(is_negative, torch.exp(scale * cosines), 0.0).sum(dim=1)

    chosen = batch if batch_rows is None else batch_rows
    if preset.startswith("d-softmax"):
        intra = torch.log(1 + torch.exp(scale * end_point - scale * adjusted)).mean()
        inter = torch.log(1 + rest)[chosen].mean()
    else:
        intra = torch.zeros((), dtype=torch.float64)
        exponential = torch.exp(scale * adjusted)
        inter = -torch.log(exponential / (exponential + rest))[chosen].mean()
    loss = intra + inter
    gradient_x, gradient_w = torch.autograd.grad(loss, (x, w))
    return Dense(
        loss.detach(), intra.detach(), inter.detach(), own.mean().detach(), gradient_x.detach(), gradient_w.detach()
    )
