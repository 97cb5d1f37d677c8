"""The commands that measure the class layer, its parts, whole steps and the readers."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from megaclass.cli.command import command
from megaclass.errors import ConfigError


def add_to(commands: Any) -> None:
    """Make the commands known to the parser."""
    bench = command(
        commands, "bench", lambda _: 2, "measure the class layer, steps and readers, beside others and the floor"
    )
    kinds = bench.add_subparsers(title="commands", required=True, metavar="COMMAND")
    head = command(kinds, "head", _head, "a step of the class layer: draw, gather, loss, backward, update of the rows")
    _add_case(head)
    head.add_argument("--sampling-rate", type=float, nargs="+", default=[1.0], help="one or more; 1: all classes")
    head.add_argument("--num-classes", type=int, default=500_000, help="over all ranks")
    head.add_argument("--peer", type=Path, metavar="DIR", help="recognition/arcface_torch of a checkout of insightface")
    head.add_argument(
        "--baselines", nargs="*", default=[], metavar="NAME", help="torch-cross-entropy, naive-d-softmax, ..."
    )
    head.add_argument("--no-memory", action="store_true", help="measure time alone")
    scaling = command(kinds, "scaling", _scaling, "the same over several numbers of classes, with as many rows drawn")
    _add_case(scaling)
    scaling.add_argument("--num-classes", type=int, nargs="+", default=[500_000, 1_000_000, 2_000_000, 4_000_000])
    scaling.add_argument("--rows", type=int, default=5000, help="rows drawn in a step, over all ranks")
    sampler = command(kinds, "sampler", _sampler, "drawing some of many classes")
    sampler.add_argument("--num-classes", type=int, default=10_000_000)
    sampler.add_argument("--num-picks", type=int, default=156_250)
    optimizer = command(kinds, "optimizer", _optimizer, "a step of the row optimizers")
    optimizer.add_argument("--num-rows", type=int, default=100_000)
    optimizer.add_argument("--num-drawn", type=int, default=1_562)
    optimizer.add_argument("--dim", type=int, default=512)
    step = command(kinds, "step", _step, "whole training steps of a configuration", takes_options=True)
    step.add_argument("config", type=Path, metavar="CONFIG", help="YAML file; --section.key value as in train")
    step.add_argument("--nproc", type=int, default=1, help="ranks on this machine")
    data = command(kinds, "data", _data, "the readers on a configuration's own data, and its model", takes_options=True)
    data.add_argument("config", type=Path, metavar="CONFIG", help="YAML file; --section.key value as in train")
    data.add_argument("--nproc", type=int, default=1, help="ranks on this machine, all reading at once")
    data.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="of each reader, beside the config's")
    data.add_argument("--seconds", type=float, default=1.0, help="of each turn of each row")
    data.add_argument("--repeats", type=int, default=5, help="turns of each row, after one for warming up")
    data.add_argument(
        "--memory-samples", type=int, default=0, metavar="N", help="read on for N images to see whether memory grows"
    )
    data.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    machine = command(
        kinds, "machine", _machine, "single operators and messages, for megaclass plan --machine", takes_options=True
    )
    machine.add_argument("config", type=Path, metavar="CONFIG", help="whose operators; --section.key value as in train")
    machine.add_argument("--nproc", type=int, default=1, help="ranks that measure at once")
    machine.add_argument("--out", type=Path, required=True, metavar="FILE", help="the profile, JSON")
    model = command(kinds, "model", _model, "the step-time model of the planner beside measured steps")
    model.add_argument("--nproc", type=int, nargs="+", default=[1, 2, 3, 4], help="ranks on this machine")
    model.add_argument("--cases", nargs="*", default=[], metavar="PART", help="cases whose names hold one of these")
    model.add_argument("--blocks", type=int, default=3, help="turns of steps and of operators")
    model.add_argument("--steps", type=int, default=3, help="measured steps of each turn, after one for warming up")
    model.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    for made in (head, scaling):
        made.add_argument("--plot", type=Path, metavar="FILE", help="draw the figures; .svg, .png or .pdf")
    for made in (head, scaling, sampler, optimizer, step):
        made.add_argument("--repeats", type=int, default=20, help="measured steps, after two for warming up")
        made.add_argument("--json", type=Path, metavar="FILE", help="write all figures")


def _add_case(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=64, help="samples of each rank")
    parser.add_argument("--preset", default="partial-fc", help="our loss: docs/losses.md")
    parser.add_argument("--optimizer", choices=["sgd", "adamw", "adagrad"], default="sgd")
    parser.add_argument("--row-dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--row-update", choices=["deferred", "fused"], default="deferred")
    parser.add_argument("--row-memory", choices=["device", "host"], default="device", help="where all rows are kept")
    parser.add_argument("--kernel", choices=["auto", "reference", "chunked", "triton"], default="auto")
    parser.add_argument("--nproc", type=int, default=1, help="ranks on this machine")


def _case(known: argparse.Namespace, num_classes: int, rate: float) -> Any:
    from megaclass.bench import plot
    from megaclass.bench.case import Case

    for name, value in (
        ("--num-classes", num_classes), ("--dim", known.dim), ("--batch-size", known.batch_size),
        ("--nproc", known.nproc), ("--repeats", known.repeats),
    ):  # fmt: skip
        if value < 1:
            raise ConfigError(f"{name} {value}: at least 1 is needed")
    if known.plot is not None:
        plot.check(known.plot)
    return Case(
        num_classes=num_classes, dim=known.dim, batch_size=known.batch_size, sampling_rate=rate, preset=known.preset,
        optimizer=known.optimizer, row_dtype=known.row_dtype, row_update=known.row_update,
        row_memory=known.row_memory, kernel=known.kernel, world_size=known.nproc,
    )  # fmt: skip


def _head(known: argparse.Namespace) -> int:
    from megaclass.bench import head
    from megaclass.bench.others import BASELINES

    for name in known.baselines:
        if name not in BASELINES:
            raise ConfigError(f"--baselines: {name!r} is not known; allowed are {', '.join(BASELINES)}")
    reports: list[dict[str, Any]] = []
    missing: dict[str, str] = {}
    for rate in known.sampling_rate:
        more, missing = head.compare(
            _case(known, known.num_classes, rate), known.baselines, known.peer, known.repeats, not known.no_memory
        )
        reports += more
    return _finish(known, reports, missing)


def _scaling(known: argparse.Namespace) -> int:
    from megaclass.bench import head

    if known.rows > min(known.num_classes):
        raise ConfigError(f"--rows {known.rows} exceeds --num-classes {min(known.num_classes)}; draw fewer")
    reports = head.scaling(_case(known, min(known.num_classes), 1.0), known.num_classes, known.rows, known.repeats)
    times = [report["cpu_ms"] for report in reports]
    code = _finish(known, reports, {})
    print(f"slowest / fastest: {max(times) / min(times):.3f}")
    return code


def _sampler(known: argparse.Namespace) -> int:
    from megaclass.bench import parts

    if not 0 < known.num_picks <= known.num_classes:
        raise ConfigError(f"--num-picks {known.num_picks}: must lie in [1, --num-classes {known.num_classes}]")
    return _finish(known, parts.samplers(known.num_classes, known.num_picks, known.repeats), {})


def _optimizer(known: argparse.Namespace) -> int:
    from megaclass.bench import parts

    if not 0 < known.num_drawn <= known.num_rows:
        raise ConfigError(f"--num-drawn {known.num_drawn}: must lie in [1, --num-rows {known.num_rows}]")
    return _finish(known, parts.optimizers(known.num_rows, known.dim, known.num_drawn, known.repeats), {})


def _step(known: argparse.Namespace, rest: list[str]) -> int:
    from megaclass import config
    from megaclass.bench import head, step, table

    for name, value in (("--nproc", known.nproc), ("--repeats", known.repeats)):
        if value < 1:
            raise ConfigError(f"{name} {value}: at least 1 is needed")
    report = step.compare(config.load(known.config, rest), known.nproc, known.repeats)
    table.show_step(report)
    print(step.bottleneck(report))
    if known.json is not None:
        known.json.write_text(json.dumps(head.document([report]), indent=1) + "\n")
    return 0


def _data(known: argparse.Namespace, rest: list[str]) -> int:
    from megaclass import config
    from megaclass.bench import data, head, table

    for name, value, least in (
        ("--nproc", known.nproc, 1), ("--repeats", known.repeats, 1), ("--workers", min(known.workers), 0),
        ("--seconds", known.seconds, 0), ("--memory-samples", known.memory_samples, 0),
    ):  # fmt: skip
        if value < least:
            raise ConfigError(f"{name} {value}: at least {least} is needed")
    reports, missing, verdict = data.compare(
        config.load(known.config, rest), known.nproc, known.repeats, known.seconds, known.workers, known.memory_samples
    )
    table.show_data(reports, missing, verdict)
    if known.json is not None:
        known.json.write_text(json.dumps(head.document(reports) | {"verdict": verdict}, indent=1) + "\n")
    return 0


def _finish(known: argparse.Namespace, reports: list[dict[str, Any]], missing: dict[str, str]) -> int:
    from megaclass.bench import head, table

    table.show(reports, missing)
    if known.json is not None:
        known.json.write_text(json.dumps(head.document(reports), indent=1) + "\n")
    if getattr(known, "plot", None) is not None:
        from megaclass.bench import plot

        plot.draw(reports, known.plot)
    return 0


def _machine(known: argparse.Namespace, rest: list[str]) -> int:
    from megaclass import config, plan
    from megaclass.bench import machine
    from megaclass.plan import work
    from megaclass.train import build

    resolved = config.load(known.config, rest)
    done = work.count(resolved, build.resolve_preset(resolved), plan.number_of_classes(resolved), known.nproc)
    found = machine.of_run(resolved, done)
    found.save(known.out)
    print(f"{found.name}: {len(found.operators)} operators with {found.ranks} ranks at once -> {known.out}")
    return 0


def _model(known: argparse.Namespace) -> int:
    from megaclass.bench import cases, model

    chosen = cases.cases(known.nproc, known.cases)
    if not chosen:
        raise ConfigError(f"--cases {' '.join(known.cases)}: none of {', '.join(cases.CONFIGURATIONS)} holds that")
    reports = []
    for case in chosen:
        reports.append(model.compare(case, known.blocks, known.steps))
        print(model.line(reports[-1]), flush=True)
    print(model.summary(reports))
    if known.json is not None:
        known.json.write_text(json.dumps([model.plain(report) for report in reports], indent=2) + "\n")
    return 0
