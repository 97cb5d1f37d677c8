"""A step on processors that ranks share, from the operators it calls and what a machine takes for each.

Processor time is the sum of everything that a rank does. Wall time adds what a rank waits for: the start of messages,
and the slowest of the others.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from megaclass.config import Config
from megaclass.errors import ConfigError
from megaclass.plan import backbone
from megaclass.plan.backbone import BackboneWork
from megaclass.plan.machine import Machine
from megaclass.plan.program import Program, program
from megaclass.plan.step import Collective, collectives
from megaclass.plan.straggling import slowest
from megaclass.plan.work import Work, count
from megaclass.train import build

# DistributedDataParallel copies each gradient into its bucket and back, dividing it: read and written twice.
_BUCKET_PASSES = 4
_NORM_MOMENTS = "batch norm moments"


@dataclass(frozen=True)
class CpuTime:
    """Seconds of one rank's step.

    Attributes:
        cpu: of the processor, by part.
        waits: of the wall clock alone, by part: messages on their way, the slowest rank.
        sources: share of the operators' time that was `measured`, `scaled`, or is a `floor`.
        cores: processors that the ranks share.
        ranks: of the run.
    """

    cpu: dict[str, float]
    waits: dict[str, float]
    sources: dict[str, float]
    cores: int
    ranks: int

    @property
    def cpu_seconds(self) -> float:
        """Of the processor."""
        return sum(self.cpu.values())

    @property
    def wall_seconds(self) -> float:
        """Of the clock: ranks that are more than the cores take turns."""
        return self.cpu_seconds * max(1.0, self.ranks / self.cores) + sum(self.waits.values())

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "cpu_seconds": self.cpu_seconds, "wall_seconds": self.wall_seconds}

    def to_text(self) -> str:
        """By part, for people."""
        lines = [
            f"modelled step on the measured machine: {1e3 * self.wall_seconds:.3g} ms, of them "
            f"{1e3 * self.cpu_seconds:.3g} ms of the processor"
        ]
        lines += [f"  {name:26}{1e3 * value:>12.3g} ms" for name, value in self.cpu.items()]
        lines += [f"  waiting: {name:17}{1e3 * value:>12.3g} ms" for name, value in self.waits.items()]
        known = ", ".join(f"{share:.0%} {name}" for name, share in self.sources.items() if share > 0.0005)
        return "\n".join([*lines, f"operators' time by its source: {known}"]) + "\n"


def cpu_step(config: Config, num_classes: int, world_size: int, machine: Machine) -> CpuTime:
    """The step of a run on a measured machine.

    Raises:
        ConfigError: as the run would, or as `cpu_time`.
    """
    preset = build.resolve_preset(config)
    work = count(config, preset, num_classes, world_size)
    network = backbone.trace(config, work.batch)
    exchanges = collectives(config, preset, work, network)
    return cpu_time(config, work, program(config, preset, work, device_type="cpu"), network, exchanges, machine)


def cpu_time(
    config: Config, work: Work, program: Program, network: BackboneWork, exchanges: list[Collective], machine: Machine
) -> CpuTime:
    """The step of a rank on a measured machine.

    Raises:
        ConfigError: the machine was measured with another number of ranks, so that it knows no messages among them.
    """
    if work.world_size > 1 and machine.ranks != work.world_size:
        raise ConfigError(
            f"the machine was measured with {machine.ranks} ranks at once and the run has {work.world_size}; measure "
            f"it with `megaclass bench machine --nproc {work.world_size}`"
        )
    cpu: dict[str, float] = {"data": machine.sample_seconds * work.batch * work.num_micro}
    if config.dataset.workers:
        cpu["data"] = 0.0
    sources = {"measured": 0.0, "scaled": 0.0, "floor": 0.0}
    calls = 0.0
    for name, part in program.parts.items():
        cpu[name] = 0.0
        for operator, number in part.items():
            seconds, source = machine.seconds(operator)
            cpu[name] += number * seconds
            sources[source] += number * seconds
            calls += 0 if operator.is_free else number
    cpu["calls from Python"] = max(0.0, calls) * machine.overhead
    waits: dict[str, float] = {}
    if work.world_size > 1:
        sent = messages(work, program, exchanges)
        cpu["messages"] = sum(count * machine.messages[name].cpu_seconds(size) for name, size, count in sent)
        cpu["gradient buckets"] = _BUCKET_PASSES * network.parameter_bytes / machine.copied
        cpu["wrapper"] = machine.wrapper[0] + machine.wrapper[1] * network.num_tensors
        waits["messages"] = sum(
            count * max(0.0, machine.messages[name].seconds(size) - machine.messages[name].cpu_seconds(size))
            for name, size, count in sent
        )
        own = sum(cpu.values())
        waits["slowest rank"] = slowest(own, machine.jitter * own, work.world_size) - own
    everything = sum(sources.values()) or 1.0
    return CpuTime(
        cpu, waits, {name: value / everything for name, value in sources.items()}, machine.cores, work.world_size
    )


def messages(work: Work, program: Program, exchanges: list[Collective]) -> list[tuple[str, float, int]]:
    """Name, bytes of a rank's own tensor and number of all messages of a step."""
    ranks, found = work.world_size, []
    for one in exchanges:
        name = "maximum" if one.what == "maxima" else one.name
        each = one.sent_bytes / one.count
        if one.name == "all-reduce":
            each *= ranks / (2 * (ranks - 1))
        elif one.name == "all-gather":
            each /= ranks - 1
        else:  # reduce-scatter and all-to-all: the own tensor holds the parts of all
            each *= ranks / (ranks - 1)
        found.append((name, each, one.count))
    if program.num_norms:
        numbers = program.norm_numbers / program.num_norms
        found.append(("all-reduce", 8 * numbers, 2 * program.num_norms * work.num_micro))
    return found
