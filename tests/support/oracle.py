"""The dense oracle: every loss in one process with the whole class matrix, in float64, written from the formulas.

Nothing of `megaclass` is used. What is random comes in as an argument: how often each class counts as a negative,
which samples have an inter term, the noise of a random margin. Gradients come from torch's autograd through the plain
formulas; where a paper holds a factor constant in its gradient, `.detach()` stands in the same place here.

A margin, a negative map and an objective are a function each, in the three tables at the end of their sections. The
defaults of their own hyper-parameters are the papers'.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Batch:
    """What the formulas see of one global batch of G samples and C classes, all float64.

    `cosines` [G, C] (of a class with sub-centres: the largest), `own` [G] those with the own class, `length` [G] of the
    raw embeddings, `margin` [G] sizes of the margins, `noise` [G] standard normal numbers, `count` [G, C] how often
    each class counts as a negative of each sample (0: it is none); `positive` [G] and `mapped` [G, C] are filled in as
    they become known: the scale times the own cosine after the margin, and the cosines after the negative map.
    """

    scale: float
    end_point: float
    map_margin: float
    hyper: Mapping[str, float]
    cosines: Tensor
    own: Tensor
    length: Tensor
    margin: Tensor
    noise: Tensor
    count: Tensor
    bias: Tensor
    state: float
    positive: Tensor = field(default_factory=lambda: torch.empty(0))
    mapped: Tensor = field(default_factory=lambda: torch.empty(0))

    def log_sum(self, exponents: Tensor) -> Tensor:
        """Log of the sum over each sample's negatives of count e^{exponent}; -10,000, as good as none, without any."""
        is_counted = self.count > 0
        log_count = torch.where(is_counted, self.count, 1.0).log()
        return torch.logsumexp(torch.where(is_counted, exponents + log_count, -1e4), dim=1)


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x); torch's own is off by 2e-9 above 20."""
    return torch.logaddexp(torch.zeros_like(x), x)


# Margins: own cosines -> adjusted cosines.


def falling(theta: Tensor) -> Tensor:
    """(-1)^k cos(theta) - 2 k for theta in [k pi, (k + 1) pi]: SphereFace eq. 6."""
    k = (theta / math.pi).floor().detach()
    return (-1.0) ** k * torch.cos(theta) - 2 * k


def arcface(z: Tensor, m: Tensor) -> Tensor:
    theta = torch.arccos(z)
    return torch.where(theta + m < math.pi, torch.cos(theta + m), z - m * torch.sin(m))


def combined(batch: Batch) -> Tensor:
    m1, m3 = batch.hyper.get("angle_factor", 1.0), batch.hyper.get("cosine_margin", 0.2)
    return falling(m1 * torch.arccos(batch.own) + batch.margin) - m3


def adaface(batch: Batch) -> Tensor:
    norm = batch.length.detach().clip(1e-3, 100)
    spread = norm.std() if len(norm) > 1 else torch.zeros(())
    quality = ((norm - norm.mean()) / (spread + 1e-3) * batch.hyper.get("concentration", 0.333)).clip(-1, 1)
    theta = (torch.arccos(batch.own) - batch.margin * quality).clip(0, math.pi)
    return torch.cos(theta) - (batch.margin + batch.margin * quality)


def magface_length(batch: Batch) -> Tensor:
    return batch.length.clip(batch.hyper.get("smallest_norm", 10.0), batch.hyper.get("largest_norm", 110.0))


def magface(batch: Batch) -> Tensor:
    low, high = batch.hyper.get("smallest_norm", 10.0), batch.hyper.get("largest_norm", 110.0)
    top = batch.hyper.get("largest_margin", 0.8)
    return arcface(batch.own, (top - batch.margin) / (high - low) * (magface_length(batch) - low) + batch.margin)


def magface_penalty(batch: Batch) -> Tensor:
    a, u = magface_length(batch), batch.hyper.get("largest_norm", 110.0)
    return batch.hyper.get("norm_weight", 35.0) * (a / u**2 + 1 / a)


def elastic(batch: Batch) -> Tensor:
    return batch.margin + batch.hyper.get("deviation", 0.0125) * batch.noise


def quadratic_positive(batch: Batch) -> Tensor:
    goal, weight = batch.hyper.get("positive_goal", 1.0), batch.hyper.get("positive_weight", 1.0)
    return batch.margin**2 - weight * (batch.own - goal) ** 2


def circle_positive(batch: Batch) -> Tensor:
    alpha = torch.relu(1 + batch.margin - batch.own).detach()
    return alpha * (batch.own - (1 - batch.margin))


def spread_out(batch: Batch, z: Tensor) -> Tensor:
    """SphereFace2's g."""
    return 2 * ((z + 1) / 2) ** batch.hyper.get("exponent", 3.0) - 1


MARGINS: dict[str, Callable[[Batch], Tensor]] = {
    "none": lambda batch: batch.own,
    "cosine": lambda batch: batch.own - batch.margin,
    "angle": lambda batch: arcface(batch.own, batch.margin),
    "angle-straight-through": lambda batch: batch.own + (arcface(batch.own, batch.margin) - batch.own).detach(),
    "combined": combined,
    "sphereface": lambda batch: falling((1 + batch.margin) * torch.arccos(batch.own)),
    "adaface": adaface,
    "magface": magface,
    "elastic-angle": lambda batch: arcface(batch.own, elastic(batch)),
    "elastic-cosine": lambda batch: batch.own - elastic(batch),
    "quadratic": quadratic_positive,
    "circle": circle_positive,
    "sphereface2": lambda batch: spread_out(batch, batch.own) - batch.margin,
}
PENALTIES: dict[str, Callable[[Batch], Tensor]] = {"magface": magface_penalty}


# Negative maps: cosines [G, C] -> mapped cosines [G, C].


def curricular_state(batch: Batch) -> Tensor:
    share = batch.hyper.get("momentum", 0.01)
    return (share * batch.own.mean() + (1 - share) * batch.state).detach()


def curricular(batch: Batch) -> Tensor:
    z, border = batch.cosines, (batch.positive / batch.scale).detach()[:, None]
    return torch.where(z > border, z * (curricular_state(batch) + z), z)


def quadratic_negative(batch: Batch) -> Tensor:
    goal, weight, m = batch.hyper.get("negative_goal", 0.0), batch.hyper.get("negative_weight", 1.0), batch.map_margin
    left_zero = goal - m / math.sqrt(weight)
    return torch.where(batch.cosines > left_zero, weight * (batch.cosines - goal) ** 2 - m**2, 0.0)


def circle_negative(batch: Batch) -> Tensor:
    alpha = torch.relu(batch.cosines + batch.map_margin).detach()
    return alpha * (batch.cosines - batch.map_margin)


NEGATIVE_MAPS: dict[str, Callable[[Batch], Tensor]] = {
    "identity": lambda batch: batch.cosines,
    "curricular": curricular,
    "quadratic": quadratic_negative,
    "circle": circle_negative,
}


# Objectives: -> intra [G], inter [G].


def softmax(batch: Batch) -> tuple[Tensor, Tensor]:
    """-log(e^{z_y} / (e^{z_y} + sum e^{z_k})), divided through by e^{z_y}."""
    return torch.zeros_like(batch.own), softplus(batch.log_sum(batch.scale * batch.mapped - batch.positive[:, None]))


def d_softmax(batch: Batch) -> tuple[Tensor, Tensor]:
    """log(1 + e^{s d} / e^{z_y}) and log(1 + sum e^{z_k})."""
    return softplus(batch.scale * batch.end_point - batch.positive), softplus(batch.log_sum(batch.scale * batch.mapped))


def sphereface2(batch: Batch) -> tuple[Tensor, Tensor]:
    share, weight = batch.hyper.get("positive_share", 0.7), batch.hyper.get("loss_weight", 50.0)
    others = softplus(batch.scale * (spread_out(batch, batch.cosines) + batch.map_margin) + batch.bias)
    own = weight * share / batch.scale * softplus(-(batch.positive + batch.bias))
    return own, weight * (1 - share) / batch.scale * (batch.count * others).sum(dim=1)


def uniface(batch: Batch) -> tuple[Tensor, Tensor]:
    others = (batch.count * softplus(batch.scale * batch.cosines - batch.bias)).sum(dim=1)
    return softplus(-(batch.positive - batch.bias)), batch.hyper.get("negative_share", 1.0) * others


def sface(batch: Batch) -> tuple[Tensor, Tensor]:
    k, a, b = (batch.hyper.get(*x) for x in (("steepness", 80.0), ("intra_angle", 0.80), ("inter_angle", 1.23)))
    theta_own = torch.arccos((batch.positive / batch.scale).detach().clip(-1, 1))
    theta = torch.arccos(batch.cosines.detach().clip(-1, 1))
    own = -torch.sigmoid(k * (theta_own - a)) * batch.positive
    return own, (batch.count * torch.sigmoid(-k * (theta - b)) * batch.scale * batch.cosines).sum(dim=1)


OBJECTIVES: dict[str, Callable[[Batch], tuple[Tensor, Tensor]]] = {
    "softmax": softmax,
    "d-softmax": d_softmax,
    "sphereface2": sphereface2,
    "uniface": uniface,
    "sface": sface,
}


# The positive logit at which the pull towards the own class is half its strength.
END_POINTS: dict[str, Callable[[Batch], Tensor]] = {
    "softmax": lambda batch: batch.log_sum(batch.scale * batch.mapped),
    "d-softmax": lambda batch: torch.full_like(batch.own, batch.scale * batch.end_point),
    "sphereface2": lambda batch: -batch.bias.expand_as(batch.own),
    "uniface": lambda batch: batch.bias.expand_as(batch.own),
    "sface": lambda batch: torch.full_like(batch.own, batch.scale * math.cos(batch.hyper.get("intra_angle", 0.80))),
}


@dataclass
class Dense:
    """What the oracle gives; gradients are those of `loss`."""

    loss: Tensor
    intra: Tensor
    inter: Tensor
    positive_cosine: Tensor
    embedding_gradient: Tensor  # [G, dim], of the raw embeddings
    class_gradient: Tensor  # [classes * rows_per_class, dim]
    bias_gradient: Tensor  # scalar, zero for a loss without a bias
    state: Tensor  # the running mean of CurricularFace after this batch
    monitors: Tensor  # mean and largest negative cosine, end point, share past it, rows touched


def dense(
    objective: str,
    embeddings: Tensor,
    labels: Tensor,
    weight: Tensor,
    *,
    scale: float,
    margin_kind: str = "none",
    negative_map: str = "identity",
    margin: float = 0.0,
    end_point: float = 0.9,
    hyper: Mapping[str, float] | None = None,
    count: Tensor | None = None,
    batch_rows: Tensor | None = None,
    rows_per_class: int = 1,
    negative_filter: float = math.inf,
    normalisation: str = "l2",
    sample_weight: Tensor | None = None,
    margin_factor: Tensor | None = None,
    noise: Tensor | None = None,
    bias: float = 0.0,
    state: float = 0.0,
) -> Dense:
    """The loss over the whole batch [G, dim], labels [G] and matrix [classes * rows_per_class, dim], with gradients.

    `count` [classes] says how often each class counts as a negative (None: once), `batch_rows` which samples have an
    inter term (None: all), `sample_weight` [G] and `margin_factor` [G] what a sample and its margin are multiplied by.
    """
    inputs = (embeddings, weight, torch.tensor(bias, dtype=torch.float64))
    x, w, b = (tensor.double().clone().requires_grad_() for tensor in inputs)
    length = x.norm(dim=1)
    unit = x / math.sqrt(x.shape[1]) if normalisation == "batch-norm" else x / length[:, None]
    every = unit @ (w / w.norm(dim=1, keepdim=True)).T
    cosines = every.unflatten(1, (-1, rows_per_class)).max(dim=2).values
    places, ones = torch.arange(len(labels)), torch.ones(len(labels)).double()
    is_drawn = (torch.ones(cosines.shape[1]) if count is None else count).double().expand_as(cosines).clone()
    is_drawn[places, labels] = 0.0
    batch = Batch(
        scale, end_point, margin, hyper or {}, cosines, cosines[places, labels], length,
        margin * (ones if margin_factor is None else margin_factor),
        0 * ones if noise is None else noise, torch.where(cosines > negative_filter, 0.0, is_drawn), b, state,
    )  # fmt: skip
    batch.positive = scale * MARGINS[margin_kind](batch)
    batch.mapped = NEGATIVE_MAPS[negative_map](batch)
    intra, inter = OBJECTIVES[objective](batch)
    if margin_kind in PENALTIES:
        intra = intra + PENALTIES[margin_kind](batch)
    chosen, sample_weight = (
        places if batch_rows is None else batch_rows,
        ones if sample_weight is None else sample_weight,
    )
    intra, inter = (sample_weight * intra).mean(), (sample_weight * inter)[chosen].mean()
    gradients = torch.autograd.grad(intra + inter, (x, w, b), allow_unused=True, materialize_grads=True)
    scalars = (intra + inter, intra, inter, batch.own.mean())
    seen = monitors(objective, batch, is_drawn, chosen, labels)
    return Dense(*(x.detach() for x in scalars), *gradients, curricular_state(batch), seen)


def monitors(objective: str, batch: Batch, is_drawn: Tensor, chosen: Tensor, labels: Tensor) -> Tensor:
    """The numbers for people; a negative that the filter drops is still shown, a missing number is NaN."""
    shown = batch.cosines.detach()[chosen][is_drawn[chosen] > 0]
    ends = END_POINTS[objective](batch).detach()
    is_there = ends > -1e3
    rows = torch.unique(torch.cat([labels, (is_drawn > 0).any(dim=0).nonzero()[:, 0]]))
    largest = shown.max() if len(shown) else torch.tensor(torch.nan)
    end, share = (ends[is_there] / batch.scale).mean(), (batch.positive.detach() >= ends).double().mean()
    return torch.stack([number.double() for number in (shown.mean(), largest, end, share, torch.tensor(len(rows)))])
