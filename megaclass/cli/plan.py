"""The command that says what a run needs before it is started, and how it would scale."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaclass.cli.command import command
from megaclass.errors import ConfigError

if TYPE_CHECKING:
    from megaclass.config import Config
    from megaclass.plan import Device


def add_to(commands: Any) -> None:
    """Make the command known to the parser."""
    made = command(
        commands, "plan", _plan, "memory, flops, bytes on links, time and goodput of a run", takes_options=True
    )
    made.add_argument("config", type=Path, metavar="CONFIG", help="YAML file; --section.key value as in train")
    made.add_argument("--world-size", type=int, default=1, metavar="N", help="ranks (default 1)")
    made.add_argument("--gpu", default="cpu", metavar="NAME", help="h200, h100, a100, l40s, v100 or cpu (default)")
    made.add_argument("--num-classes", type=int, metavar="N", help="default: those of the data set")
    made.add_argument("--calibrate", action="store_true", help="cpu: measure the operators of this run here first")
    made.add_argument("--machine", type=Path, metavar="FILE", help="cpu: a profile that megaclass bench machine wrote")
    made.add_argument("--json", action="store_true", help="print JSON instead of a table")
    scaling = made.add_argument_group("scaling (GPUs; modelled from data sheets)")
    scaling.add_argument("--world-sizes", type=int, nargs="+", metavar="N", help="a table over these numbers of ranks")
    scaling.add_argument(
        "--batch-per-rank", type=int, metavar="B", help="the global batch is B x ranks, in place of the configured one"
    )
    scaling.add_argument("--gpus-per-node", type=int, metavar="N", help="default 8")
    scaling.add_argument(
        "--network-gbit", type=float, metavar="X", help="network card of each GPU, Gbit/s; 80 %% reached"
    )
    scaling.add_argument("--jitter", type=float, metavar="X", help="relative deviation of a rank's step (default 0.02)")
    scaling.add_argument(
        "--decode-rate", type=float, metavar="X", help="samples/s of a decoding process; default: ample"
    )
    scaling.add_argument("--mtbf-hours", type=float, metavar="H", help="of one GPU and its part of the node (50,676)")
    scaling.add_argument("--restart-seconds", type=float, metavar="S", help="from a failure to the next step (180)")
    scaling.add_argument("--storage-gb", type=float, metavar="X", help="GB/s that one rank writes (default 0.5)")
    scaling.add_argument("--plot", type=Path, metavar="FILE", help="draw the table; .svg, .png or .pdf")


_SCALING = ("jitter", "decode_rate", "mtbf_hours", "restart_seconds", "storage_gb", "plot", "batch_per_rank")


def _plan(known: argparse.Namespace, rest: list[str]) -> int:
    from megaclass import config, plan

    device = plan.find(known.gpu)
    resolved = config.load(known.config, rest)
    if (known.calibrate or known.machine) and device.name != "cpu":
        name = "--calibrate" if known.calibrate else "--machine"
        raise ConfigError(f"{name} is about a measured CPU, not {known.gpu}; leave one of them out")
    if known.calibrate and known.machine:
        raise ConfigError("--calibrate measures what --machine FILE has; leave one of them out")
    num_classes = plan.number_of_classes(resolved) if known.num_classes is None else known.num_classes
    if device.name == "cpu":
        _refuse_scaling(known)
        return _on_cpu(known, resolved, num_classes)
    return _on_gpus(known, resolved, num_classes, device)


def _refuse_scaling(known: argparse.Namespace) -> None:
    used = [
        name for name in ("world_sizes", "gpus_per_node", "network_gbit", *_SCALING) if getattr(known, name) is not None
    ]
    if used:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in used)
        raise ConfigError(f"{names}: for GPUs; give --gpu h200, h100, a100, l40s or v100")


def _on_cpu(known: argparse.Namespace, resolved: Config, num_classes: int) -> int:
    from megaclass import plan

    made = plan.forecast(resolved, num_classes, known.world_size, plan.find("cpu"))
    taken = None
    if known.machine or known.calibrate:
        from megaclass.bench import machine

        profile = plan.load_machine(known.machine) if known.machine else machine.of_run(resolved, made.work)
        taken = plan.cpu_step(resolved, num_classes, known.world_size, profile)
    if known.json:
        print(json.dumps(made.to_json() | ({"modelled": taken.to_json()} if taken else {}), indent=2))
    else:
        print(made.to_text() + (taken.to_text() if taken else ""), end="")
    return 0


def _on_gpus(known: argparse.Namespace, resolved: Config, num_classes: int, device: Device) -> int:
    from dataclasses import replace

    from megaclass import plan
    from megaclass.bench import plot

    if known.plot is not None:
        plot.check(known.plot)
    if known.network_gbit is not None:
        device = replace(device, network_bandwidth=0.8 * known.network_gbit * 1e9 / 8)
    if known.gpus_per_node is not None:
        device = replace(device, ranks_per_node=known.gpus_per_node)
    scenario = plan.scenario(
        **{name: getattr(known, name) for name in ("gpus_per_node", *_SCALING[:5])},
    )
    sizes = known.world_sizes or [known.world_size]
    rows = []
    for ranks in sizes:
        batch = resolved.train.global_batch_size if known.batch_per_rank is None else known.batch_per_rank * ranks
        train = resolved.train.model_copy(update={"global_batch_size": batch})
        rows.append(plan.scale(resolved.model_copy(update={"train": train}), num_classes, ranks, device, scenario))
    if known.plot is not None:
        plot.draw_scaling(rows, device.name, known.plot)
    if known.world_sizes is not None:
        text = plan.table(rows, device)
        print(
            json.dumps([row.to_json() for row in rows], indent=2) if known.json else text,
            end="\n" if known.json else "",
        )
        return 0
    train = resolved.train.model_copy(update={"global_batch_size": rows[0].global_batch})
    made = plan.forecast(resolved.model_copy(update={"train": train}), num_classes, known.world_size, device)
    if known.json:
        print(json.dumps(made.to_json() | {"modelled": rows[0].to_json()}, indent=2))
    else:
        print(made.to_text() + rows[0].to_text(), end="")
    return 0
