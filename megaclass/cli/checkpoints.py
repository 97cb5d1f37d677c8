"""The commands that list, check and remove checkpoints."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from megaclass.cli.command import command
from megaclass.errors import CheckpointError, ConfigError


def add_to(commands: Any) -> None:
    """Make the commands known to the parser."""
    group = command(commands, "checkpoint", lambda _: 2, "list, check and remove checkpoints")
    kinds = group.add_subparsers(title="commands", required=True, metavar="COMMAND")
    listing = command(kinds, "list", _checkpoint_list, "the checkpoints of a run, oldest first")
    listing.add_argument("run", type=Path, metavar="RUN", help="run directory")
    listing.add_argument("--json", action="store_true")
    verify = command(kinds, "verify", _checkpoint_verify, "hash every file and tensor of a checkpoint")
    verify.add_argument("path", type=Path, metavar="PATH", help="checkpoint folder, or a run directory for its newest")
    verify.add_argument("--json", action="store_true")
    prune = command(kinds, "prune", _checkpoint_prune, "remove all but the newest good checkpoints and the best one")
    prune.add_argument("run", type=Path, metavar="RUN", help="run directory")
    prune.add_argument("--keep", type=int, default=2)


def _checkpoints(run: Path) -> Path:
    folder = run / "checkpoints"
    if not folder.is_dir():
        raise CheckpointError(f"{run} has no checkpoints folder; give the run directory of a training run")
    return folder


def _checkpoint_list(known: argparse.Namespace) -> int:
    from megaclass.checkpoint import listing

    lines = listing(_checkpoints(known.run))
    if known.json:
        print(json.dumps([line.as_dict() for line in lines], indent=2))
    for line in lines if not known.json else []:
        size = "?" if line.num_bytes is None else f"{line.num_bytes / 2**20:.1f} MiB"
        print(f"{line.name}  {size}{'  best' if line.is_best else ''}{f'  FAULT {line.fault}' if line.fault else ''}")
    return 0


def _checkpoint_verify(known: argparse.Namespace) -> int:
    from megaclass.checkpoint import newest_name, verify

    path = known.path
    if (path / "checkpoints").is_dir():
        path = newest_name(path / "checkpoints")
    outcome = verify(path)
    if known.json:
        print(json.dumps(outcome.as_dict(), indent=2))
    else:
        print(f"{path}: {'sound' if outcome.ok else 'NOT sound'}, step {outcome.step}, {len(outcome.tensors)} tensors")
        for fault in outcome.faults:
            print(f"  fault: {fault}")
    return 0 if outcome.ok else CheckpointError.exit_code


def _checkpoint_prune(known: argparse.Namespace) -> int:
    from megaclass.checkpoint import prune

    if known.keep < 1:
        raise ConfigError(f"--keep {known.keep}: at least 1 checkpoint must stay")
    for path in prune(_checkpoints(known.run), known.keep):
        print(f"removed {path}")
    return 0
