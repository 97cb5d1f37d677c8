"""`Plan`: memory, flops, links and time of one rank of a run, from its configuration alone; as text and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from megaclass.config import Config
from megaclass.data.folder import open_folder
from megaclass.data.manifest import load_split
from megaclass.objectives import presets
from megaclass.plan import backbone, memory, step, work
from megaclass.plan.devices import Device
from megaclass.train import build


@dataclass(frozen=True)
class Plan:
    """What a step needs on the rank with the largest shard.

    Attributes:
        device: the rank runs on.
        work: rows, samples and logits.
        memory_bytes: by part.
        peak_bytes, peak_moment: the largest sum of parts that exist together, and when.
        host_bytes: of class rows and their state in the host's memory beside a GPU.
        flops: of `backbone` and `head` in a step.
        collectives: of a step.
        seconds: at least, by part, at the device's rates.
    """

    device: Device
    work: work.Work
    memory_bytes: dict[str, int]
    peak_bytes: int
    peak_moment: str
    host_bytes: int
    flops: dict[str, int]
    collectives: list[step.Collective]
    seconds: dict[str, float]

    @property
    def bound(self) -> str:
        """The part that takes longest."""
        return max(self.seconds, key=lambda name: self.seconds[name])

    @property
    def step_seconds(self) -> float:
        """Of the step at least; the head takes the longer of computing and moving, rows of the host come beside."""
        head = max(self.seconds["head compute"], self.seconds["head memory"])
        return max(self.seconds["backbone"] + head + self.seconds["collectives"], self.seconds["rows from the host"])

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON holds it."""
        return {**asdict(self), "bound": self.bound, "step_seconds": self.step_seconds}

    def to_text(self) -> str:
        """A table for people."""
        alive = memory.alive(self.memory_bytes, self.peak_moment)
        w = self.work
        lines = [
            f"{w.num_classes:,} classes x {w.dim} on {w.world_size} ranks ({self.device.name}): {w.num_rows:,} rows, "
            f"{w.num_candidates:,} candidates and {w.num_touched:,} rows with a gradient on the largest shard",
            f"memory of a rank, peak {readable(self.peak_bytes)} in the {self.peak_moment} (* exists then)",
        ]
        for name, size in self.memory_bytes.items():
            lines.append(f"  {name:26}{readable(size):>12}{' *' if name in alive and size else ''}")
        if self.host_bytes:
            lines.append(f"memory of the host for this rank's class rows and their state: {readable(self.host_bytes)}")
        lines.append("flops of a step")
        lines += [f"  {name:26}{value:>12.3e}" for name, value in self.flops.items()]
        lines.append("bytes each rank sends in a step" if self.collectives else "nothing is sent: one rank")
        for one in self.collectives:
            lines.append(f"  {one.name + ', ' + one.what:40}{readable(one.sent_bytes):>12}  x {one.count}")
        lines.append(f"floor of a step: {1e3 * self.step_seconds:.3g} ms, bound by {self.bound}")
        lines += [f"  {name:26}{1e3 * value:>12.3g} ms" for name, value in self.seconds.items()]
        return "\n".join(lines) + "\n"


def forecast(config: Config, num_classes: int, world_size: int, device: Device) -> Plan:
    """The plan of a run; cost: the backbone once on the meta device, whatever the sizes.

    Raises:
        ConfigError: as the run would, or a size below 1.
    """
    preset = build.resolve_preset(config)
    done = work.count(config, preset, num_classes, max(world_size, 0))
    build.check_batch(config, world_size)
    build.check_row_memory(config, preset)
    build.check_slices(config, preset)
    presets.check_negatives(preset, num_classes)
    presets.check_exponents(preset, num_classes, config.classifier.normalisation)
    network = backbone.trace(config, done.batch)
    parts = memory.parts(config, done, network, device.name == "cpu")
    peak, moment = memory.peak(parts)
    exchanges = step.collectives(config, preset, done, network)
    return Plan(
        device=device,
        work=done,
        memory_bytes=parts,
        peak_bytes=peak,
        peak_moment=moment,
        host_bytes=memory.host_bytes(config, done, device.name == "cpu"),
        flops={
            "backbone": step.backbone_flops(network, done),
            "head": step.head_flops(config, done),
        },
        collectives=exchanges,
        seconds=step.seconds(config, done, network, device, exchanges),
    )


def number_of_classes(config: Config) -> int:
    """Classes that a configuration trains on: as it says, else those of the data set's manifest.

    Raises:
        DataError: the manifest or its split cannot be read.
    """
    dataset = config.dataset
    if dataset.reader == "synthetic":
        return dataset.synthetic.num_classes
    if dataset.num_classes is not None:
        return dataset.num_classes
    assert dataset.path is not None
    return load_split(dataset.path, open_folder(dataset.path, dataset.remote).manifest, dataset.split).num_classes


def readable(size: int) -> str:
    """Bytes in decimal units."""
    value = float(size)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.2f} GB"
