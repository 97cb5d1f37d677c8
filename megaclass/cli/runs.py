"""The commands that make runs and look at them: train, study, evaluate, embed, classes, report, profile."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from megaclass.cli.command import Progress, command, data_location
from megaclass.errors import ConfigError


def add_to(commands: Any) -> None:
    """Make the commands known to the parser."""
    _add_train(commands)
    _add_study(commands)
    _add_evaluate(commands)
    _add_embed(commands)
    _add_classes(commands)
    _add_report(commands)
    _add_profile(commands)


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
    made = command(
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

    try:
        resolved = config.load(known.config, rest)
    except ConfigError as error:
        from megaclass.train.outcome import refuse

        return refuse(error)
    if known.dry_run:
        from megaclass.train.dry_run import describe

        print(describe(resolved), end="")
        return 0
    from megaclass.train.run import train

    return train(resolved)


def _add_evaluate(commands: Any) -> None:
    made = command(
        commands, "evaluate", _evaluate, "judge a trained run on a data set: verification, identification, retrieval"
    )
    made.add_argument("run", type=Path, metavar="RUN", help="run directory")
    made.add_argument("--data", metavar="DIR", help="data set, a folder or an address (default: the run's)")
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

    data = None if known.data is None else data_location("--data", known.data)
    results = judge_run(
        known.run, data=data, split=known.split, protocols=known.protocol, gallery_source=known.gallery_source,
        checkpoint=known.checkpoint, batch_size=known.batch_size, baselines=known.baselines, device=known.device,
    )  # fmt: skip
    if known.json:
        print(json.dumps(results, indent=2))
    else:
        from rich.console import Console

        Console().print(table(results))
    return 0


def _add_embed(commands: Any) -> None:
    made = command(commands, "embed", _embed, "write the embeddings of a folder of images as .npz")
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


def _add_classes(commands: Any) -> None:
    made = command(commands, "classes", _classes, "list likely duplicate classes and mislabelled samples of a run")
    made.add_argument("run", type=Path, metavar="RUN", help="run directory")
    made.add_argument("--checkpoint", type=Path, metavar="DIR", help="default: the newest complete one")
    made.add_argument("--top", type=int, default=50, help="length of every ranked list (default 50)")
    made.add_argument("--max-samples", type=int, metavar="N", help="look at N samples, evenly spaced (default: all)")
    made.add_argument("--batch-size", type=int, default=256)
    made.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    made.add_argument("--json", type=Path, metavar="FILE", help="also write the whole report there")
    made.add_argument("--csv", type=Path, metavar="FILE", help="write all samples nearer to another class there")


def _classes(known: argparse.Namespace) -> int:
    from rich.console import Console

    from megaclass.train.classes import report_classes, tables

    with Progress("samples") as progress:
        report = report_classes(
            known.run, path=known.checkpoint, max_samples=known.max_samples, top=known.top,
            batch_size=known.batch_size, device=known.device, json_file=known.json, csv_file=known.csv,
            progress=progress,
        )  # fmt: skip
    Console().print(*tables(report), sep="\n")
    return 0


def _add_study(commands: Any) -> None:
    from megaclass.study import USAGE

    made = command(commands, "study", _study, "train a grid of cases and seeds; one table and the plots", epilog=USAGE)
    made.add_argument("config", type=Path, metavar="STUDY", help="YAML file; see below and configs/study/")
    made.add_argument("--out", type=Path, required=True, metavar="DIR", help="table, plots and run directories")
    made.add_argument("--jobs", type=int, metavar="N", help="runs at a time (default: the cores of this process)")
    made.add_argument("--only", metavar="PATTERN", help="train only the cases whose name matches, such as 'd-softmax*'")
    made.add_argument("--report-only", action="store_true", help="train nothing; make table and plots of what is there")
    made.add_argument("--json", action="store_true", help="print table.json instead of a table")


def _study(known: argparse.Namespace) -> int:
    from megaclass.study.command import study

    return study(
        known.config, known.out, jobs=known.jobs, only=known.only, report_only=known.report_only,
        as_text=not known.json,
    )  # fmt: skip


def _add_report(commands: Any) -> None:
    made = command(commands, "report", _report, "write report.html of a run")
    made.add_argument("run", type=Path, nargs="+", metavar="RUN", help="run directories")


def _report(known: argparse.Namespace) -> int:
    from megaclass.observe.report import write_report

    for run in known.run:
        if not run.is_dir():
            raise ConfigError(f"run directory {run} does not exist; give the run.dir of a training run")
        print(write_report(run))
    return 0


def _add_profile(commands: Any) -> None:
    made = command(commands, "profile", _profile, "print where the time of profiled steps went: train --run.profile N")
    made.add_argument("run", type=Path, metavar="RUN", help="run directory; its traces in RUN/profile/ are read")
    made.add_argument("--json", action="store_true", help="print profile/summary.json instead of tables")


def _profile(known: argparse.Namespace) -> int:
    from megaclass.observe.profile import read_timelines, tables, write_summary

    timelines = read_timelines(known.run)
    summary = write_summary(known.run, timelines)
    if known.json:
        print(json.dumps(summary, indent=2))
    else:
        from rich.console import Console

        Console().print(tables(timelines))
    return 0
