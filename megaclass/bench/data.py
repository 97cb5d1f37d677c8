"""`megaclass bench data`: what each reader gives on the user's own data, beside its bounds and beside the model."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

import numpy as np

from megaclass.bench import measure, ranks
from megaclass.bench.processes import cpu_seconds, mapped_bytes, resident_bytes
from megaclass.bench.sources import DECODING, Source, sources
from megaclass.config import Augment, Config
from megaclass.parallel.process import World
from megaclass.train import build
from megaclass.train.loop import train_step

_WARMUP = 3
# Positions between two turns: each meets other samples, in a set that has so many.
_STRIDE = 65_536


@dataclass
class Figures:
    """What one row gave on one rank, turn by turn.

    Attributes:
        images_per_second, cpu_seconds_per_image: of each turn.
        cores: processors kept busy in each turn.
        resident_bytes: at the end of each turn, of this rank and its workers.
    """

    images_per_second: list[float] = field(default_factory=list)
    cpu_seconds_per_image: list[float] = field(default_factory=list)
    cores: list[float] = field(default_factory=list)
    resident_bytes: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Answer:
    """What a rank measured: its rows, who was left out, the model's seconds per step and the growth of memory."""

    rows: list[tuple[str, dict[str, Any], Figures]]
    missing: dict[str, str]
    step_seconds: list[float]
    growth_bytes: float | None


def compare(
    config: Config, world_size: int, repeats: int, seconds: float, workers: Sequence[int], memory_samples: int
) -> tuple[list[dict[str, Any]], dict[str, str], dict[str, Any]]:
    """Entries of the JSON of `megaclass bench`, who was left out and why, and what holds the run back.

    Args:
        config: of the run; its data set, batch size, augmentation and model are those measured.
        world_size: ranks on this machine, all reading at once.
        repeats: turns of each row, in turn with the others.
        seconds: of each turn.
        workers: numbers of decoding processes of each rank that every reader is measured with.
        memory_samples: images read on and on by the run's own reader to see whether its memory grows; 0 for none.

    Raises:
        ConfigError, DataError: as the run would.
    """
    build.check_batch(config, world_size)
    answers = ranks.run(_measured, world_size, config, repeats, seconds, sorted({*workers, config.dataset.workers}),
                        memory_samples)  # fmt: skip
    reports = [
        _report(config, world_size, [answer.rows[row] for answer in answers]) for row in range(len(answers[0].rows))
    ]
    ceiling = next((report["images_per_second_all"] for report in reports if report["impl"] == DECODING), None)
    for report in reports:
        every = report.pop("images_per_second_all")
        if ceiling is not None:
            # Turn by turn: whatever else the machine does meets both alike.
            report["share_of_decoding"] = _spread([one / other for one, other in zip(every, ceiling, strict=True)])
    return reports, answers[0].missing, _verdict(config, reports, answers)


def _measured(
    world: World, config: Config, repeats: int, seconds: float, workers: list[int], memory_samples: int
) -> Answer:
    rows, missing = sources(config, world, workers)
    found = {row.name: Figures() for row in rows}
    for turn in range(repeats + 1):
        for row in rows:
            measure.meet(world)
            # The first round fills caches and compiles what is compiled once.
            take_turn(row, found[row.name] if turn else Figures(), turn * _STRIDE, seconds)
    grown = growth(_own(rows, config), memory_samples) if memory_samples else None
    return Answer(
        [(row.name, row.options, found[row.name]) for row in rows], missing, _model(world, config, repeats), grown
    )


def take_turn(row: Source, figures: Figures, position: int, seconds: float) -> None:
    """Read for so long, once what lay ready is used up."""
    images = row.open(position)
    try:
        for _ in range(row.num_ahead + 1):
            next(images)
        number = 0
        cpu, begin = cpu_seconds(), time.perf_counter()
        while (taken := time.perf_counter() - begin) < seconds or not number:
            number += next(images)
        used = cpu_seconds() - cpu
        figures.images_per_second.append(number / taken)
        figures.cpu_seconds_per_image.append(used / number)
        figures.cores.append(used / taken)
        figures.resident_bytes.append(resident_bytes())
    finally:
        images.close()
        gc.collect()


def _own(rows: list[Source], config: Config) -> Source:
    """The row of the run's own reader."""
    wanted = {
        "reader": config.dataset.reader,
        "workers": config.dataset.workers,
        "is_augmented": config.dataset.augment != Augment(),
    }
    return next(row for row in rows if row.options == wanted)


def growth(row: Source, num_samples: int) -> float:
    """Bytes that memory grows by with every 1,000 images: a straight line through the last five sixths of so many."""
    images = row.open(0)
    number = 0
    places: list[int] = []
    sizes: list[int] = []
    try:
        while number < num_samples:
            number += next(images)
            if number >= num_samples / 6 + len(places) * num_samples / 200:
                places.append(number)
                sizes.append(mapped_bytes())
    finally:
        images.close()
    return 1000 * float(np.polyfit(places, sizes, 1)[0]) if len(places) > 1 else 0.0


def _model(world: World, config: Config, repeats: int) -> list[float]:
    """Seconds of each training step when the data is there already: one batch, again and again."""
    training = build.build(config, world)
    training.num_steps = max(training.num_steps, _WARMUP + repeats)
    first = next(iter(training.reader))
    training.reader.close()
    batches, found = repeat(first), []
    for number in range(_WARMUP + repeats):
        measure.meet(world)
        result = train_step(training, batches, lambda _: None)
        measure.finish(world)
        training.step += 1
        if number >= _WARMUP:
            found.append(result.step_seconds)
    return found


def _report(config: Config, world_size: int, ranks_of_row: list[tuple[str, dict[str, Any], Figures]]) -> dict[str, Any]:
    name, options, _ = ranks_of_row[0]
    figures = [figures for _, _, figures in ranks_of_row]
    every = [sum(turn) for turn in zip(*(rank.images_per_second for rank in figures), strict=True)]
    dataset = config.dataset
    case = {"world_size": world_size, "batch_size": config.train.global_batch_size, "image_size": dataset.image_size,
            "channels": dataset.channels, **options}  # fmt: skip
    return {
        "case": case,
        "impl": name,
        "repeats": len(every),
        "images_per_second": _spread(every),
        "images_per_second_all": every,
        "cpu_us_per_image": 1e6 * statistics.median(value for rank in figures for value in rank.cpu_seconds_per_image),
        "cores": sum(statistics.median(rank.cores) for rank in figures),
        "resident_bytes": sum(int(statistics.median(rank.resident_bytes)) for rank in figures),
    }


def _verdict(config: Config, reports: list[dict[str, Any]], answers: list[Answer]) -> dict[str, Any]:
    """What the model takes beside what the run's reader gives, in images per second over all ranks."""
    wanted = (config.dataset.reader, config.dataset.workers, config.dataset.augment != Augment())
    own = next(
        report for report in reports
        if tuple(report["case"].get(name) for name in ("reader", "workers", "is_augmented")) == wanted
    )  # fmt: skip
    step = max(statistics.median(answer.step_seconds) for answer in answers)
    found = {
        "reader": own["impl"],
        "reader_images_per_second": own["images_per_second"]["p50"],
        "model_images_per_second": config.train.global_batch_size / step,
    }
    growths = [answer.growth_bytes for answer in answers if answer.growth_bytes is not None]
    if growths:
        found["growth_bytes_per_1000_images"] = max(growths)
    return found | {"bottleneck": bottleneck(found)}


def bottleneck(found: dict[str, Any]) -> str:
    """Whether the reader or the model makes a step as long as it is, in a sentence."""
    given, taken = found["reader_images_per_second"], found["model_images_per_second"]
    beginning = f"the run's reader ({found['reader']}) gives {given:,.0f} images/s and the model takes {taken:,.0f}: "
    if given >= taken:
        return f"{beginning}the model is the bottleneck; data could come {given / taken:.1f} times as slowly"
    return (
        f"{beginning}the data is the bottleneck; raise dataset.workers up to the cores there are, store images of "
        "dataset.image_size as JPEG, or use less of dataset.augment"
    )


def _spread(values: list[float]) -> dict[str, float]:
    return {f"p{share}": float(np.percentile(values, share)) for share in (20, 50, 80)}
