"""Failures and checkpoints: how much of the time makes progress, and how often to save.

A job of many GPUs fails when any of them does. Failures come at random (exponential times between them); after one the
job restarts and repeats what it did since its last checkpoint. Saving stops the run until the files are written, as it
does today.

Sources: Daly, A higher order estimate of the optimum checkpoint interval for restart dumps, FGCS 2006, for both
formulas; Young, CACM 1974, for the first one. Default time between failures: 419 unexpected interruptions of 16,384
GPUs in 54 days (Llama 3 report), so one in 50,676 GPU-hours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

GPU_MTBF_HOURS = 16_384 * 54 * 24 / 419
# Processes started, group formed, checkpoint read and checked: the reliability goals assume three minutes.
RESTART_SECONDS = 180.0


@dataclass(frozen=True)
class Failures:
    """What goes wrong how often.

    Attributes:
        gpu_mtbf_hours: mean hours between failures of one GPU with its share of the node.
        restart_seconds: from a failure to the next step.
    """

    gpu_mtbf_hours: float = GPU_MTBF_HOURS
    restart_seconds: float = RESTART_SECONDS

    def job_mtbf_seconds(self, ranks: int) -> float:
        """Of all of them together."""
        return 3600 * self.gpu_mtbf_hours / ranks


def goodput(interval: float, blocked: float, restart: float, mtbf: float) -> float:
    """Share of wall time that makes progress, with a checkpoint after each `interval` seconds of progress.

    Expected time of one interval with its checkpoint under failures: mtbf e^{restart / mtbf} (e^{(interval + blocked) /
    mtbf} - 1); Daly's equation 20, exact for exponential failures that may also strike while the job restarts.
    """
    if mtbf == math.inf:
        return interval / (interval + blocked)
    span, again = (interval + blocked) / mtbf, restart / mtbf
    if span + again > 700:  # not one interval in e^700 would ever end
        return 0.0
    return interval / (mtbf * math.exp(again) * math.expm1(span))


def best_interval(blocked: float, mtbf: float) -> float:
    """Seconds between checkpoints that lose least; Daly's equation 37, Young's sqrt(2 blocked mtbf) to first order."""
    if blocked >= 2 * mtbf:
        return mtbf
    ratio = blocked / (2 * mtbf)
    return math.sqrt(2 * blocked * mtbf) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - blocked


def losses(interval: float, blocked: float, restart: float, mtbf: float) -> dict[str, float]:
    """Shares of wall time: `progress`, `saving`, `repeated and restarting`; they add up to one."""
    progress = goodput(interval, blocked, restart, mtbf)
    saving = progress * blocked / interval
    return {"progress": progress, "saving": saving, "repeated and restarting": 1 - progress - saving}
