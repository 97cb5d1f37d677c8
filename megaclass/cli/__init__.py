"""The subcommands and nothing else: each reads its arguments and makes one call into the package.

Everything heavy is imported inside the command that needs it, so that `--help` and a wrong option answer at once.
Mistakes of the user's end as one line on stderr and the exit code of their kind.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megaclass import __version__
from megaclass.cli import bench, checkpoints, data, plan, runs
from megaclass.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    parser = _parser()
    known, rest = parser.parse_known_args(arguments)
    if rest and not getattr(known, "takes_options", False):
        parser.error(f"argument not understood: {rest[0]}")
    try:
        code: int = known.command(known, rest) if known.takes_options else known.command(known)
    except UserError as error:
        print(f"megaclass: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 141
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megaclass", description="Trains classifiers with millions of classes; class weights sharded over ranks."
    )
    parser.add_argument("--version", action="version", version=f"megaclass {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    runs.add_to(commands)
    data.add_to(commands)
    checkpoints.add_to(commands)
    bench.add_to(commands)
    plan.add_to(commands)
    return parser
