"""`megaclass bench model`: the step-time model beside measured steps.

Every case takes turns in the same processes over the same seconds: some training steps, rounds of the operators it
calls, each alone, some steps, and so on. What is measured of a step never enters the model.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median
from typing import Any

from megaclass import config as configuration
from megaclass.bench import machine as machines
from megaclass.bench import measure, ranks
from megaclass.bench.cases import Modelled
from megaclass.bench.messages import sent
from megaclass.config import Config
from megaclass.parallel.process import World
from megaclass.plan import backbone, step
from megaclass.plan import work as counted
from megaclass.plan.machine import Machine
from megaclass.plan.program import Program, program
from megaclass.plan.time_cpu import cpu_time
from megaclass.train import build
from megaclass.train.loop import train_step

# Steps of a block that are thrown away: they find the caches full of operators.
_COLD = 1
# Rounds of operators after the steps of a block.
_ROUNDS = 3


@dataclass(frozen=True)
class Found:
    """One rank's measurement: seconds of the steps, and the machine."""

    wall: list[float]
    cpu: list[float]
    machine: Machine


def compare(case: Modelled, blocks: int, steps: int) -> dict[str, Any]:
    """Modelled and measured seconds of one case."""
    resolved = configuration.validate(case.options)
    preset = build.resolve_preset(resolved)
    num_classes = resolved.dataset.synthetic.num_classes
    work = counted.count(resolved, preset, num_classes, case.ranks)
    calls = program(resolved, preset, work, device_type="cpu")
    found = ranks.run(_alternate, case.ranks, resolved, calls, blocks, steps)
    machine = machines.together([one.machine for one in found])
    network = backbone.trace(resolved, work.batch)
    exchanges = step.collectives(resolved, preset, work, network)
    modelled = cpu_time(resolved, work, calls, network, exchanges, machine)
    measured = max(median(one.cpu) for one in found), max(median(one.wall) for one in found)
    return {
        "case": case.name,
        "ranks": case.ranks,
        "modelled_cpu_ms": 1000 * modelled.cpu_seconds,
        "measured_cpu_ms": 1000 * measured[0],
        "modelled_wall_ms": 1000 * modelled.wall_seconds,
        "measured_wall_ms": 1000 * measured[1],
        "parts_ms": {name: 1000 * value for name, value in modelled.cpu.items()},
        "waits_ms": {name: 1000 * value for name, value in modelled.waits.items()},
        "machine": machine,
    }


def _alternate(world: World, config: Config, calls: Program, blocks: int, steps: int) -> Found:
    training = build.build(config, world)
    training.num_steps = max(training.num_steps, (blocks + 2) * (steps + _COLD))
    batches = iter(training.reader)
    rounds = machines.Rounds(calls)
    exchanges = sent(world)
    wall: list[float] = []
    cpu: list[float] = []
    try:
        for block in range(blocks + 1):
            for number in range(steps + _COLD):
                measure.meet(world)
                begin, used = time.perf_counter(), time.process_time()
                train_step(training, batches, lambda _: None)
                training.step += 1
                if block and number >= _COLD:
                    wall.append(time.perf_counter() - begin)
                    cpu.append(time.process_time() - used)
            if block:
                measure.meet(world)
                for _ in range(_ROUNDS):
                    rounds.take()
    finally:
        training.reader.close()
    reader = machines.sample_seconds(config, world)
    return Found(wall, cpu, rounds.machine(world, exchanges, reader))


def error(report: dict[str, Any]) -> float:
    """The relative error that counts: of wall time where every rank has a core, else of processor time."""
    kind = "wall" if report["ranks"] <= report["machine"].cores else "cpu"
    return float(report[f"modelled_{kind}_ms"] / report[f"measured_{kind}_ms"] - 1)


def line(report: dict[str, Any]) -> str:
    """One case for people."""
    pairs = [
        f"{kind} {report[f'modelled_{kind}_ms']:8.1f} / {report[f'measured_{kind}_ms']:8.1f} ms "
        f"{report[f'modelled_{kind}_ms'] / report[f'measured_{kind}_ms'] - 1:+6.1%}"
        for kind in ("cpu", "wall")
    ]
    return f"{report['case']:36} {report['ranks']} ranks   {'   '.join(pairs)}"


def summary(reports: list[dict[str, Any]]) -> str:
    """How far the model is off over all cases."""
    found = sorted(abs(error(report)) for report in reports)
    within = sum(one <= 0.15 for one in found)
    return (
        f"modelled / measured; wall time counts where every rank has a core, processor time elsewhere: {within} of "
        f"{len(found)} within 15 %, median {median(found):.1%}, largest {found[-1]:.1%}"
    )


def plain(report: dict[str, Any]) -> dict[str, Any]:
    """The figures of a report as JSON holds them, without the operators."""
    machine: Machine = report["machine"]
    kept = {key: value for key, value in report.items() if key not in ("machine", "inputs")}
    return kept | {"error": error(report), "machine": machine.name, "jitter": machine.jitter}
