"""The command that says what a run needs before it is started."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from megaclass.cli.command import command
from megaclass.errors import ConfigError


def add_to(commands: Any) -> None:
    """Make the command known to the parser."""
    made = command(
        commands, "plan", _plan, "memory, flops, bytes on links and expected time of a run", takes_options=True
    )
    made.add_argument("config", type=Path, metavar="CONFIG", help="YAML file; --section.key value as in train")
    made.add_argument("--world-size", type=int, default=1, metavar="N", help="ranks (default 1)")
    made.add_argument("--gpu", default="cpu", metavar="NAME", help="h200, h100, a100, l40s, v100 or cpu (default)")
    made.add_argument("--num-classes", type=int, metavar="N", help="default: those of the data set")
    made.add_argument("--calibrate", action="store_true", help="cpu: measure this machine, about a second")
    made.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _plan(known: argparse.Namespace, rest: list[str]) -> int:
    from megaclass import config, plan

    device = plan.find(known.gpu)
    resolved = config.load(known.config, rest)
    if known.calibrate:
        if device.name != "cpu":
            raise ConfigError(f"--calibrate measures this machine's CPU, not {known.gpu}; leave one of them out")
        device = plan.calibrated()
    num_classes = plan.number_of_classes(resolved) if known.num_classes is None else known.num_classes
    made = plan.forecast(resolved, num_classes, known.world_size, device)
    print(json.dumps(made.to_json(), indent=2) if known.json else made.to_text(), end="\n" if known.json else "")
    return 0
