"""The subcommands and nothing else: each reads its arguments and makes one call into the package.

Everything heavy is imported inside the command that needs it, so that `--help` and a wrong option answer at once.
Mistakes of the user's end as one line on stderr and the exit code of their kind.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megaclass import __version__
from megaclass.errors import CheckpointError, ConfigError, DataError, UserError


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
    _add_train(commands)
    _add_evaluate(commands)
    _add_embed(commands)
    _add_data(commands)
    _add_checkpoint(commands)
    _add_report(commands)
    return parser


def _command(
    commands: Any, name: str, function: Callable[..., int], text: str, *, takes_options: bool = False, **more: Any
) -> argparse.ArgumentParser:
    made: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        **more,
    )
    made.set_defaults(command=function, takes_options=takes_options)
    return made


# --- train, evaluate, embed -------------------------------------------------------------------------------------------


class _OptionHelp(argparse.Action):
    """`--help` of `train`: the usual help, then every option of the configuration."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from megaclass.config import option_table

        parser.print_help()
        print("\noptions of the configuration, in CONFIG or as --section.key value (default in brackets):")
        for name, default, description in option_table():
            print(f"  --{name:32} {description} [{default}]")
        parser.exit()


def _add_train(commands: Any) -> None:
    made = _command(
        commands,
        "train",
        _train,
        "train a configuration, or continue its run directory",
        takes_options=True,
        add_help=False,
    )
    made.add_argument("-h", "--help", action=_OptionHelp, nargs=0, help="show this help and every option")
    made.add_argument("config", type=Path, metavar="CONFIG", help="YAML file; see configs/")
    made.add_argument("--dry-run", action="store_true", help="print configuration, plan and order of the data; stop")


def _train(known: argparse.Namespace, rest: list[str]) -> int:
    from megaclass import config

    resolved = config.load(known.config, rest)
    if known.dry_run:
        from megaclass.train.dry_run import describe

        print(describe(resolved), end="")
        return 0
    from megaclass.train.run import train

    return train(resolved)


def _add_evaluate(commands: Any) -> None:
    made = _command(
        commands, "evaluate", _evaluate, "judge a trained run on a data set: verification, identification, retrieval"
    )
    made.add_argument("run", type=Path, metavar="RUN", help="run directory")
    made.add_argument("--data", type=Path, metavar="DIR", help="data set (default: the run's)")
    made.add_argument("--split", help="split (default: unseen where there is one, else the only one)")
    made.add_argument(
        "--protocol", action="append", choices=["verification", "identification", "retrieval", "one-shot"]
    )
    made.add_argument("--gallery-source", metavar="NAME", help="identification: the source that is the gallery")
    made.add_argument("--checkpoint", type=Path, metavar="DIR", help="default: the newest complete one")
    made.add_argument("--batch-size", type=int, default=256)
    made.add_argument("--baselines", action="store_true", help="also judge raw pixels and the untrained backbone")
    made.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    made.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _evaluate(known: argparse.Namespace) -> int:
    from megaclass.evaluate.judge import table
    from megaclass.train.trained import judge_run

    results = judge_run(
        known.run, data=known.data, split=known.split, protocols=known.protocol, gallery_source=known.gallery_source,
        checkpoint=known.checkpoint, batch_size=known.batch_size, baselines=known.baselines, device=known.device,
    )  # fmt: skip
    if known.json:
        print(json.dumps(results, indent=2))
    else:
        from rich.console import Console

        Console().print(table(results))
    return 0


def _add_embed(commands: Any) -> None:
    made = _command(commands, "embed", _embed, "write the embeddings of a folder of images as .npz")
    made.add_argument("run", type=Path, metavar="RUN", help="run directory")
    made.add_argument("--images", type=Path, required=True, metavar="DIR")
    made.add_argument("--output", type=Path, required=True, metavar="FILE.npz")
    made.add_argument("--checkpoint", type=Path, metavar="DIR", help="default: the newest complete one")
    made.add_argument("--batch-size", type=int, default=256)
    made.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")


def _embed(known: argparse.Namespace) -> int:
    from megaclass.train.trained import embed_images_of_run

    count = embed_images_of_run(
        known.run, known.images, known.output, checkpoint=known.checkpoint, batch_size=known.batch_size,
        device=known.device,
    )  # fmt: skip
    print(f"{count} embeddings written to {known.output}")
    return 0


# --- data -------------------------------------------------------------------------------------------------------------


def _add_data(commands: Any) -> None:
    data = _command(commands, "data", lambda _: 2, "make and check data sets")
    kinds = data.add_subparsers(title="commands", required=True, metavar="COMMAND")
    glyphs = _command(kinds, "glyphs", _data_glyphs, "render the characters of fonts, or read strips of rendered ones")
    glyphs.add_argument("--fonts", nargs="+", type=Path, metavar="PATH", help="font files or folders (default: DejaVu)")
    glyphs.add_argument("--strips", type=Path, metavar="ZIP", help="read one strip of tiles per class instead")
    glyphs.add_argument("--sources", type=Path, metavar="JSON", help="with --strips: names of the tiles")
    glyphs.add_argument("--min-faces", type=int, help="faces that must draw a character (default 8)")
    glyphs.add_argument("--min-images", type=int, help="different pictures that a class must have (default 2)")
    images = _command(kinds, "images", _data_images, "import a folder or zip with one folder of images per class")
    images.add_argument("root", type=Path, metavar="ROOT", help="folder or .zip")
    images.add_argument("--class-depth", type=int, default=1, help="folder levels that make the class name")
    images.add_argument("--source-pattern", metavar="REGEX", help="one group, searched in the file name: the source")
    images.add_argument("--image-mode", choices=["L", "RGB"], help="convert all images (default: grey stays grey)")
    images.add_argument("--on-bad", choices=["stop", "skip"], default="stop", help="what an unreadable image does")
    images.add_argument(
        "--quarter-turns", action="store_true", help="add each trained class turned by 90, 180, 270 degrees as classes"
    )
    images.add_argument("--unseen-groups", metavar="NAMES", help="groups kept unseen: last:5, or names with commas")
    for made in (glyphs, images):
        made.add_argument("--out", type=Path, required=True, metavar="DIR")
        made.add_argument("--image-size", type=int, help="pixels a side")
        made.add_argument("--unseen-fraction", type=float, help="share of classes never trained on, chosen by hash")
        made.add_argument("--unseen-classes", type=int, help="number of classes never trained on, chosen by hash")
        made.add_argument("--samples-per-shard", type=int, help="samples in one tar shard")
        made.add_argument("--name", help="name of the data set")
        made.add_argument("--overwrite", action="store_true", help="replace the data set in DIR")
    verify = _command(kinds, "verify", _data_verify, "check every shard of a data set against its manifest")
    verify.add_argument("folder", type=Path, metavar="DIR")
    verify.add_argument("--json", action="store_true")


def _given(known: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The arguments that were given, for functions that have defaults of their own."""
    common = ("image_size", "unseen_fraction", "unseen_classes", "samples_per_shard", "name", "overwrite")
    values = {name: getattr(known, name) for name in (*names, *common)}
    return {name: value for name, value in values.items() if value is not None}


def _data_glyphs(known: argparse.Namespace) -> int:
    with _Progress("glyphs") as progress:
        if known.strips is not None:
            from megaclass.prepare.strips import import_strips

            if known.fonts or known.min_faces or known.min_images:
                raise ConfigError("--fonts, --min-faces and --min-images mean nothing with --strips; leave them out")
            report = import_strips(known.strips, known.out, progress=progress, **_given(known, "sources"))
        else:
            from megaclass.prepare.glyphs import make_glyphs

            if known.sources:
                raise ConfigError("--sources means nothing without --strips; leave it out")
            report = make_glyphs(known.out, progress=progress, **_given(known, "fonts", "min_faces", "min_images"))
    print(report.text())
    return 0


def _data_images(known: argparse.Namespace) -> int:
    from megaclass.prepare.images import import_images

    names = ("class_depth", "source_pattern", "image_mode", "on_bad", "quarter_turns", "unseen_groups")
    with _Progress("images") as progress:
        report = import_images(known.root, known.out, progress=progress, **_given(known, *names))
    print(report.text())
    return 0


def _data_verify(known: argparse.Namespace) -> int:
    from megaclass.prepare.verify import verify

    with _Progress("samples") as progress:
        report = verify(known.folder, progress)
    print(json.dumps(report.as_dict(), indent=2) if known.json else report.text())
    return 0 if report.ok else DataError.exit_code


class _Progress:
    """A bar on stderr where that is a terminal, nothing elsewhere; called with (done, all)."""

    def __init__(self, what: str) -> None:
        from rich.console import Console
        from rich.progress import MofNCompleteColumn, Progress

        self._bar = Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=Console(stderr=True))
        self._bar.disable = not sys.stderr.isatty()
        self._task = self._bar.add_task(what, total=None)

    def __call__(self, done: int, total: int) -> None:
        self._bar.update(self._task, completed=done, total=total)

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


# --- checkpoint, report -----------------------------------------------------------------------------------------------


def _add_checkpoint(commands: Any) -> None:
    group = _command(commands, "checkpoint", lambda _: 2, "list, check and remove checkpoints")
    kinds = group.add_subparsers(title="commands", required=True, metavar="COMMAND")
    listing = _command(kinds, "list", _checkpoint_list, "the checkpoints of a run, oldest first")
    listing.add_argument("run", type=Path, metavar="RUN", help="run directory")
    listing.add_argument("--json", action="store_true")
    verify = _command(kinds, "verify", _checkpoint_verify, "hash every file and tensor of a checkpoint")
    verify.add_argument("path", type=Path, metavar="PATH", help="checkpoint folder, or a run directory for its newest")
    verify.add_argument("--json", action="store_true")
    prune = _command(kinds, "prune", _checkpoint_prune, "remove all but the newest good checkpoints and the best one")
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


def _add_report(commands: Any) -> None:
    made = _command(commands, "report", _report, "write report.html of a run")
    made.add_argument("run", type=Path, nargs="+", metavar="RUN", help="run directories")


def _report(known: argparse.Namespace) -> int:
    from megaclass.observe.report import write_report

    for run in known.run:
        if not run.is_dir():
            raise ConfigError(f"run directory {run} does not exist; give the run.dir of a training run")
        print(write_report(run))
    return 0
