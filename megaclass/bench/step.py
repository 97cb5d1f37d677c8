"""`megaclass bench step`: whole training steps of a configuration, taken apart, beside what the planner expects."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from megaclass.bench import measure, ranks
from megaclass.config import Config
from megaclass.parallel.process import World
from megaclass.plan import calibrated, forecast
from megaclass.train import build
from megaclass.train.loop import train_step

_WARMUP = 3


@dataclass(frozen=True)
class Steps:
    """Seconds of each measured step on one rank: all, waiting for data, processor time of all and of the class layer.

    `peak` is the most memory in bytes above the interpreter, `num_classes` those of the data set.
    """

    wall: list[float]
    wait: list[float]
    cpu: list[float]
    head: list[float]
    peak: int
    num_classes: int


def compare(config: Config, world_size: int, repeats: int) -> dict[str, Any]:
    """One entry of the JSON of `megaclass bench`: so many steps on ranks of one thread each, after three to warm up.

    Nothing is written: no log, no checkpoint. `planned_ms` is what `megaclass plan` expects, with this machine's rates
    where it has no GPU.

    Raises:
        ConfigError, DataError: as the run would.
    """
    answers = ranks.run(_stepped, world_size, config, repeats)
    slowest = max(answers, key=lambda rank: sum(rank.cpu))
    waiting = max(answers, key=lambda rank: sum(rank.wait))
    wall = measure.percentiles(max(answers, key=lambda rank: sum(rank.wall)).wall)
    report = {
        "case": {
            "num_classes": slowest.num_classes,
            "world_size": world_size,
            "global_batch_size": config.train.global_batch_size,
            "backbone": config.backbone.name,
            "preset": config.classifier.preset,
            "row_update": config.optim.row_update,
            "row_dtype": config.classifier.row_dtype,
        },
        "impl": measure.OURS,
        "repeats": repeats,
        "wall_ms": wall,
        "cpu_ms": measure.percentiles(slowest.cpu)["p50"],
        "cpu_ms_spread": measure.percentiles(slowest.cpu),
        "data_wait_ms": measure.percentiles(waiting.wait)["p50"],
        "data_wait_share": sum(waiting.wait) / sum(waiting.wall),
        "head_cpu_ms": measure.percentiles(max(answers, key=lambda rank: sum(rank.head)).head)["p50"],
        "samples_per_second": 1000 * config.train.global_batch_size / wall["p50"],
        "peak_bytes": sum(rank.peak for rank in answers),
    }
    if not measure.has_gpu():
        plan = forecast(config, slowest.num_classes, world_size, calibrated())
        report["planned_ms"] = 1000 * plan.step_seconds
    return report


def _stepped(world: World, config: Config, repeats: int) -> Steps:
    interpreter = measure.reset_peak(world)
    training = build.build(config, world)
    # The courses of learning rate and margin must not end before the measurement does.
    training.num_steps = max(training.num_steps, _WARMUP + repeats)
    found = Steps([], [], [], [], 0, training.reader.num_classes)
    batches = iter(training.reader)
    try:
        for number in range(_WARMUP + repeats):
            measure.meet(world)
            begin = time.process_time()
            result = train_step(training, batches, lambda _: None)
            measure.finish(world)
            training.step += 1
            if number >= _WARMUP:
                found.wall.append(result.step_seconds)
                found.wait.append(result.data_wait_seconds)
                found.cpu.append(time.process_time() - begin)
                found.head.append(result.head_cpu_seconds)
    finally:
        training.reader.close()
    peak = measure.peak(world) - interpreter
    return Steps(found.wall, found.wait, found.cpu, found.head, peak, found.num_classes)


def bottleneck(report: dict[str, Any]) -> str:
    """Whether more decoding or a faster model would make a step shorter, in a sentence."""
    share = report["data_wait_share"]
    if share > 0.1:
        return (
            f"a step waits for data {share:.0%} of its time: the data is the bottleneck; raise dataset.workers, or "
            "store smaller images"
        )
    return f"a step waits for data {share:.0%} of its time: the model is the bottleneck"
