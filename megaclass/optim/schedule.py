"""Learning rates as pure functions of the step: no state, so nothing to save and nothing to drift after a restart."""

from __future__ import annotations

import math
from typing import NamedTuple

from megaclass.config import Optim


class BaseRates(NamedTuple):
    """Learning rates before the schedule, of the backbone and of the class weights."""

    backbone: float
    classes: float


def base_rates(optim: Optim, global_batch_size: int) -> BaseRates:
    """The rates of the configuration, scaled to the global batch if `optim.reference_batch_size` is set.

    Source of the linear scaling: Goyal et al., arXiv 1706.02677, section 2.1.
    """
    scale = global_batch_size / optim.reference_batch_size if optim.reference_batch_size is not None else 1.0
    return BaseRates(optim.lr * scale, (optim.class_lr if optim.class_lr is not None else optim.lr) * scale)


def learning_rate_factor(optim: Optim, step: int, total_steps: int) -> float:
    """The factor of the base rate at `step`, counted from 0; the last step is `total_steps - 1`.

    The warm-up rises linearly: 1 / (warmup_steps + 1) at step 0, 1 at step `warmup_steps`. From there `cosine` and
    `polynomial` fall to `final_fraction`, reached at the last step; `constant` stays; `step` falls by `gamma` from the
    first step at or after each share of the run in `milestones`.
    """
    assert 0 <= step < total_steps, (step, total_steps)
    warmup = optim.warmup_steps
    warm = min(1.0, (step + 1) / (warmup + 1))
    return warm * _decay(optim, step, max(0, step - warmup) / max(1, total_steps - 1 - warmup), total_steps)


def _decay(optim: Optim, step: int, progress: float, total_steps: int) -> float:
    """The factor after the warm-up; `progress` goes from 0 at its end to 1 at the last step."""
    if optim.schedule == "step":
        return float(optim.gamma ** sum(step >= share * total_steps for share in optim.milestones))
    if optim.schedule == "cosine":
        left = (1 + math.cos(math.pi * progress)) / 2
    elif optim.schedule == "polynomial":
        left = (1 - progress) ** optim.power
    else:
        assert optim.schedule == "constant", optim.schedule
        return 1.0
    return optim.final_fraction + (1 - optim.final_fraction) * left
