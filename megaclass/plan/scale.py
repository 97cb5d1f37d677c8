"""One run on many GPUs: step, samples per second, failures and checkpoints, as a row of a table over world sizes.

`Scenario` holds what neither the configuration nor the data sheet says; every default is an assumption that stands
beside it, and an option of `megaclass plan`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from megaclass.config import Config
from megaclass.errors import ConfigError
from megaclass.objectives import presets
from megaclass.plan import backbone, memory, step, work
from megaclass.plan.devices import GIB, Device
from megaclass.plan.failures import Failures, best_interval, goodput, losses
from megaclass.plan.program import Program, program
from megaclass.plan.time_gpu import GpuTime, gpu_time
from megaclass.train import build


@dataclass(frozen=True)
class Scenario:
    """The cluster around the devices.

    Attributes:
        per_node: ranks of a node; None: the device's.
        jitter: relative standard deviation of a rank's computing from step to step. Assumed: 2 %.
        decode_rate: samples per second of one decoding process; None: data never makes a step wait.
        failures: how often, and how long a restart takes.
        storage_bandwidth: bytes per second that one rank writes of a checkpoint. Assumed: 0.5 GB/s, 4 GB/s a node.
    """

    per_node: int | None = None
    jitter: float = 0.02
    decode_rate: float | None = None
    failures: Failures = field(default_factory=Failures)
    storage_bandwidth: float = 0.5e9


@dataclass(frozen=True)
class Scaled:
    """One world size.

    Attributes:
        ranks, num_classes, global_batch: of the run.
        peak_bytes: of a rank's memory; it fits if at most `memory_bytes`.
        memory_bytes: of the device; None: not known.
        time: the step.
        checkpoint_bytes: that the largest rank writes.
        blocked_seconds: that the run stops for a checkpoint.
        interval_seconds: between checkpoints, as configured.
        best_interval_seconds: that would lose least.
        mtbf_seconds: between failures of the job.
        shares: of wall time; see `failures.losses`.
        best_goodput: with the best interval.
    """

    ranks: int
    num_classes: int
    global_batch: int
    peak_bytes: int
    memory_bytes: int | None
    time: GpuTime
    checkpoint_bytes: int
    blocked_seconds: float
    interval_seconds: float
    best_interval_seconds: float
    mtbf_seconds: float
    shares: dict[str, float]
    best_goodput: float

    @property
    def fits(self) -> bool:
        """Whether a rank's memory is enough."""
        return self.memory_bytes is None or self.peak_bytes <= self.memory_bytes

    @property
    def samples_per_second(self) -> float:
        """Of all ranks while nothing fails."""
        return self.global_batch / self.time.seconds

    @property
    def useful_samples_per_second(self) -> float:
        """Of all ranks, saving, restarts and repeated steps included, as configured."""
        return self.samples_per_second * self.shares["progress"]

    def to_text(self) -> str:
        """The step by part, and what failures leave of it, for people."""
        lines = [
            f"modelled step: {1e3 * self.time.seconds:.3g} ms, {self.samples_per_second:,.0f} samples/s; limited by "
            f"{self.time.limit} (from data sheets, never measured)"
        ]
        for name, value in self.time.parts.items():
            note = " (the host issues operators more slowly)" if name in self.time.issue_bound else ""
            lines.append(f"  {name:26}{1e3 * value:>12.3g} ms{note}")
        lines += [
            f"  sending: {name:28}{1e3 * value:>12.3g} ms not hidden" for name, value in self.time.exposed.items()
        ]
        lines += [
            f"  hidden messages           {1e3 * self.time.hidden:>12.3g} ms beside the others",
            f"  waiting for data          {1e3 * self.time.data_wait:>12.3g} ms",
            f"  waiting for the slowest   {1e3 * self.time.straggling:>12.3g} ms",
            f"a checkpoint, {self.checkpoint_bytes / 1e9:.2f} GB a rank, stops it for {self.blocked_seconds:.3g} s",
            f"a failure every {self.mtbf_seconds / 3600:.3g} h; saving every {_minutes(self.interval_seconds)} "
            f"as configured leaves {self.shares['progress']:.2%} of the time as progress, "
            f"{self.useful_samples_per_second:,.0f} samples/s",
            f"saving every {_minutes(self.best_interval_seconds)} (train.checkpoint_every "
            f"{max(1, round(self.best_interval_seconds / self.time.seconds))}) would leave {self.best_goodput:.2%}",
        ]
        return "\n".join(lines) + "\n"

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "ranks": self.ranks,
            "num_classes": self.num_classes,
            "global_batch_size": self.global_batch,
            "step_seconds": self.time.seconds,
            "samples_per_second": self.samples_per_second,
            "useful_samples_per_second": self.useful_samples_per_second,
            "peak_bytes": self.peak_bytes,
            "fits": self.fits,
            "parts_seconds": self.time.parts,
            "exposed_seconds": self.time.exposed,
            "hidden_seconds": self.time.hidden,
            "data_wait_seconds": self.time.data_wait,
            "straggling_seconds": self.time.straggling,
            "head_share": self.time.head_share,
            "communication_share": self.time.communication_share,
            "limit": self.time.limit,
            "checkpoint_bytes": self.checkpoint_bytes,
            "checkpoint_seconds": self.blocked_seconds,
            "checkpoint_interval_seconds": self.interval_seconds,
            "best_interval_seconds": self.best_interval_seconds,
            "best_interval_steps": max(1, round(self.best_interval_seconds / self.time.seconds)),
            "mtbf_seconds": self.mtbf_seconds,
            "shares": self.shares,
            "best_goodput": self.best_goodput,
        }


def scale(config: Config, num_classes: int, ranks: int, device: Device, scenario: Scenario) -> Scaled:
    """One world size; nothing of the run's size is allocated.

    Raises:
        ConfigError: as the run would.
    """
    preset = build.resolve_preset(config)
    done = work.count(config, preset, num_classes, ranks)
    build.check_batch(config, ranks)
    presets.check_negatives(preset, num_classes)
    network = backbone.trace(config, done.batch)
    return assembled(config, done, program(config, preset, done, device_type="cuda"), network, device, scenario)


def scenario(
    *,
    gpus_per_node: int | None = None,
    jitter: float | None = None,
    decode_rate: float | None = None,
    mtbf_hours: float | None = None,
    restart_seconds: float | None = None,
    storage_gb: float | None = None,
) -> Scenario:
    """A scenario from the options of `megaclass plan`, defaults where they are None.

    Raises:
        ConfigError: a number that is not positive (0 is allowed for `jitter` and `restart_seconds`).
    """
    default = Scenario()
    for name, value in (("gpus-per-node", gpus_per_node), ("decode-rate", decode_rate), ("mtbf-hours", mtbf_hours),
                        ("storage-gb", storage_gb)):  # fmt: skip
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"--{name} {value} must be a positive number")
    for name, value in (("jitter", jitter), ("restart-seconds", restart_seconds)):
        if value is not None and not 0 <= value < math.inf:
            raise ConfigError(f"--{name} {value} must be a number of at least 0")
    return Scenario(
        per_node=gpus_per_node,
        jitter=default.jitter if jitter is None else jitter,
        decode_rate=decode_rate,
        failures=Failures(
            default.failures.gpu_mtbf_hours if mtbf_hours is None else mtbf_hours,
            default.failures.restart_seconds if restart_seconds is None else restart_seconds,
        ),
        storage_bandwidth=default.storage_bandwidth if storage_gb is None else 1e9 * storage_gb,
    )


def assembled(
    config: Config,
    done: work.Work,
    calls: Program,
    network: backbone.BackboneWork,
    device: Device,
    scenario: Scenario,
) -> Scaled:
    """The same from a step's parts."""
    preset = build.resolve_preset(config)
    exchanges = step.collectives(config, preset, done, network)
    taken = gpu_time(
        config, done, calls, network, exchanges, device,
        per_node=scenario.per_node, jitter=scenario.jitter, decode_rate=scenario.decode_rate,
    )  # fmt: skip
    parts = memory.parts(config, done, network, device.name == "cpu")
    size = checkpoint_bytes(config, done, network)
    blocked = size / scenario.storage_bandwidth
    mtbf = scenario.failures.job_mtbf_seconds(done.world_size)
    restart = scenario.failures.restart_seconds + blocked
    interval = config.train.checkpoint_every * taken.seconds
    best = best_interval(blocked, mtbf)
    return Scaled(
        ranks=done.world_size,
        num_classes=done.num_classes,
        global_batch=config.train.global_batch_size,
        peak_bytes=memory.peak(parts)[0],
        memory_bytes=device.memory_bytes,
        time=taken,
        checkpoint_bytes=size,
        blocked_seconds=blocked,
        interval_seconds=interval,
        best_interval_seconds=best,
        mtbf_seconds=mtbf,
        shares=losses(interval, blocked, restart, mtbf),
        best_goodput=goodput(best, blocked, restart, mtbf),
    )


def checkpoint_bytes(config: Config, done: work.Work, network: backbone.BackboneWork) -> int:
    """What the first rank writes: its class rows with their state, and the backbone with its own."""
    copies = 1 + (2 if config.optim.name == "adamw" else bool(config.optim.momentum)) + (
        config.optim.ema_decay is not None)  # fmt: skip
    rows = memory.row_bytes(config, done.num_rows, done.dim) + memory.state_bytes(config, done.num_rows, done.dim)
    return rows + copies * network.parameter_bytes


def table(rows: list[Scaled], device: Device) -> str:
    """World sizes one below the other, for people."""
    first = rows[0]
    lines = [
        f"{first.num_classes:,} classes on {device.name}, modelled from data sheets, never measured",
        f"{'ranks':>6}{'batch':>9}{'step ms':>10}{'samples/s':>12}{'GB a rank':>11}{'head':>7}{'sent':>7}"
        f"{'useful':>8}{'best':>7}{'save every':>12}  limited by",
    ]
    for row in rows:
        size = f"{row.peak_bytes / 1e9:.1f}{'' if row.fits else '!'}"
        lines.append(
            f"{row.ranks:>6,}{row.global_batch:>9,}{1e3 * row.time.seconds:>10.1f}{row.samples_per_second:>12,.0f}"
            f"{size:>11}{row.time.head_share:>7.1%}{row.time.communication_share:>7.1%}{row.shares['progress']:>8.1%}"
            f"{row.best_goodput:>7.1%}{_minutes(row.best_interval_seconds):>12}  {row.time.limit}"
        )
    if not all(row.fits for row in rows):
        lines.append(f"!: more than the {first.memory_bytes / GIB:.0f} GiB of a device" if first.memory_bytes else "")
    lines += [
        "head, sent: shares of the step of the class layer and of messages that nothing hides; useful: share of wall",
        "time that makes progress under failures as configured, best: with a checkpoint as often as `save every` says",
    ]
    return "\n".join(lines) + "\n"


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else (
        f"{seconds / 3600:.1f} h")  # fmt: skip
