"""The commands that make and check data sets."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from megaclass.cli.command import Progress, command, data_folder
from megaclass.errors import ConfigError, DataError


def add_to(commands: Any) -> None:
    """Make the commands known to the parser."""
    data = command(commands, "data", lambda _: 2, "make and check data sets")
    kinds = data.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_sources(kinds)
    _add_copies(kinds)
    _add_looks(kinds)


def _add_sources(kinds: Any) -> None:
    glyphs = command(kinds, "glyphs", _data_glyphs, "render the characters of fonts, or read strips of rendered ones")
    glyphs.add_argument("--fonts", nargs="+", type=Path, metavar="PATH", help="font files or folders (default: DejaVu)")
    glyphs.add_argument("--strips", type=Path, metavar="ZIP", help="read one strip of tiles per class instead")
    glyphs.add_argument("--sources", type=Path, metavar="JSON", help="with --strips: names of the tiles")
    glyphs.add_argument("--min-faces", type=int, help="faces that must draw a character (default 8)")
    glyphs.add_argument("--min-images", type=int, help="different pictures that a class must have (default 2)")
    glyphs.add_argument("--characters", choices=["all", "han"], help="han: the unified ideographs alone (default all)")
    glyphs.add_argument("--reserve", metavar="KEY:BUCKETS", help="leave out characters by hash; see docs/data.md")
    images = command(kinds, "images", _data_images, "import a folder or zip with one folder of images per class")
    images.add_argument("root", type=Path, metavar="ROOT", help="folder or .zip")
    images.add_argument("--class-depth", type=int, default=1, help="folder levels that make the class name")
    images.add_argument("--source-pattern", metavar="REGEX", help="one group, searched in the file name: the source")
    records = command(kinds, "recordio", _data_recordio, "import a .rec file of labelled images, without MXNet")
    records.add_argument("path", type=Path, metavar="TRAIN.rec", help=".idx and property beside it are checked")
    listed = command(kinds, "list", _data_list, "import the images that a csv, tsv or Parquet file names")
    listed.add_argument("path", type=Path, metavar="LIST", help=".csv, .tsv, .txt or .parquet: image, label")
    listed.add_argument("--root", type=Path, help="folder or .zip of the images (default: the folder of the list)")
    listed.add_argument(
        "--columns", nargs=2, metavar=("IMAGE", "LABEL"), help="the columns wanted, where the first line has names"
    )
    pairs = command(
        kinds, "bin", _data_bin, "import verification sets as lfw.bin; each file becomes a split with pairs"
    )
    pairs.add_argument("paths", type=Path, nargs="+", metavar="FILE.bin", help="images, and true or false for each two")
    pairs.add_argument("--image-mode", choices=["L", "RGB"], help="convert all images (default: grey stays grey)")
    for made in (images, records, listed):
        made.add_argument("--image-mode", choices=["L", "RGB"], help="convert all images (default: grey stays grey)")
        made.add_argument("--on-bad", choices=["stop", "skip"], default="stop", help="what an unreadable image does")
    images.add_argument(
        "--quarter-turns", action="store_true", help="add each trained class turned by 90, 180, 270 degrees as classes"
    )
    images.add_argument("--unseen-groups", metavar="NAMES", help="groups kept unseen: last:5, or names with commas")
    for made in (images, records, listed, pairs):
        made.add_argument(
            "--jobs", type=int, metavar="N",
            help="processes that decode and encode (default: the cores of this process); it changes no byte",
        )  # fmt: skip
    for made in (glyphs, images, records, listed):
        made.add_argument("--unseen-fraction", type=float, help="share of classes never trained on, chosen by hash")
        made.add_argument("--unseen-classes", type=int, help="number of classes never trained on, chosen by hash")
    for made in (glyphs, images, records, listed, pairs):
        made.add_argument("--out", type=Path, required=True, metavar="DIR")
        made.add_argument("--image-size", type=int, help="pixels a side")
        made.add_argument("--samples-per-shard", type=int, help="samples in one tar shard")
        made.add_argument("--name", help="name of the data set")
        made.add_argument("--overwrite", action="store_true", help="replace the data set in DIR")


def _add_copies(kinds: Any) -> None:
    reshard = command(kinds, "reshard", _data_copy, "write a data set into shards of another size; sample ids stay")
    reshard.set_defaults(num_classes=None, samples_per_class=None)
    subset = command(
        kinds, "subset", _data_copy, "write some classes or samples of a data set; unseen splits stay whole"
    )
    subset.add_argument("--num-classes", type=int, help="as many classes to train on, those of dataset.num_classes")
    subset.add_argument("--samples-per-class", type=int, help="the first so many samples of each")
    for made in (reshard, subset):
        made.add_argument("folder", metavar="DIR")
        made.add_argument("--out", type=Path, required=True, metavar="DIR")
        made.add_argument("--samples-per-shard", type=int, required=made is reshard, help="samples in one tar shard")
        made.add_argument("--name", help="name of the copy")
        made.add_argument("--overwrite", action="store_true", help="replace the data set in DIR")


def _add_looks(kinds: Any) -> None:
    preview = command(
        kinds, "preview", _data_preview, "draw the images that a run would see, augmented", takes_options=True
    )
    preview.add_argument("config", type=Path, metavar="CONFIG", help="YAML file; --section.key value as in train")
    preview.add_argument("--out", type=Path, required=True, metavar="FILE", help="the picture: .png")
    preview.add_argument("--count", type=int, default=64, help="images (default 64)")
    verify = command(kinds, "verify", _data_verify, "check every shard of a data set against its manifest")
    verify.add_argument("folder", metavar="DIR")
    verify.add_argument("--json", action="store_true")


def _given(known: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The arguments that were given, for functions that have defaults of their own."""
    common = ("image_size", "unseen_fraction", "unseen_classes", "samples_per_shard", "name", "overwrite", "jobs")
    values = {name: getattr(known, name, None) for name in (*names, *common)}
    if "jobs" in known and known.jobs is None:
        values["jobs"] = len(os.sched_getaffinity(0))
    return {name: value for name, value in values.items() if value is not None}


def _data_glyphs(known: argparse.Namespace) -> int:
    with Progress("glyphs") as progress:
        if known.strips is not None:
            from megaclass.prepare.strips import import_strips

            for name in ("fonts", "min_faces", "min_images", "characters", "reserve"):
                if getattr(known, name) is not None:
                    option = name.replace("_", "-")
                    raise ConfigError(f"--{option} means nothing with --strips, which hold the pictures; leave it out")
            report = import_strips(known.strips, known.out, progress=progress, **_given(known, "sources"))
        else:
            from megaclass.prepare.characters import Reserve
            from megaclass.prepare.glyphs import make_glyphs

            if known.sources:
                raise ConfigError("--sources means nothing without --strips; leave it out")
            options = _given(known, "fonts", "min_faces", "min_images", "characters")
            if known.reserve is not None:
                options["reserve"] = Reserve.parse(known.reserve)
            report = make_glyphs(known.out, progress=progress, **options)
    print(report.text())
    return 0


def _data_images(known: argparse.Namespace) -> int:
    from megaclass.prepare.images import import_images

    names = ("class_depth", "source_pattern", "image_mode", "on_bad", "quarter_turns", "unseen_groups")
    with Progress("images") as progress:
        report = import_images(known.root, known.out, progress=progress, **_given(known, *names))
    print(report.text())
    return 0


def _data_recordio(known: argparse.Namespace) -> int:
    from megaclass.prepare.import_records import import_records

    with Progress("images") as progress:
        report = import_records(known.path, known.out, progress=progress, **_given(known, "image_mode", "on_bad"))
    print(report.text())
    return 0


def _data_list(known: argparse.Namespace) -> int:
    from megaclass.prepare.import_list import import_list

    root = known.path.parent if known.root is None else known.root
    with Progress("images") as progress:
        report = import_list(
            known.path, root, known.out, progress=progress, **_given(known, "image_mode", "on_bad", "columns")
        )
    print(report.text())
    return 0


def _data_bin(known: argparse.Namespace) -> int:
    from megaclass.prepare.verification_bin import import_pairs

    with Progress("images") as progress:
        report = import_pairs(known.paths, known.out, progress=progress, **_given(known, "image_mode"))
    print(report.text())
    return 0


def _data_copy(known: argparse.Namespace) -> int:
    from megaclass.prepare.copying import copy_dataset

    names = ("num_classes", "samples_per_class", "samples_per_shard", "name", "overwrite")
    options = {name: getattr(known, name) for name in names if getattr(known, name) is not None}
    with Progress("samples") as progress:
        report = copy_dataset(data_folder("DIR", known.folder), known.out, progress=progress, **options)
    print(report.text())
    return 0


def _data_preview(known: argparse.Namespace, rest: list[str]) -> int:
    from megaclass import config
    from megaclass.train.preview import contact_sheet

    if known.out.suffix != ".png":
        raise ConfigError(f"--out {known.out}: the ending must be .png")
    sheet = contact_sheet(config.load(known.config, rest), known.count)
    try:
        sheet.save(known.out)
    except OSError as error:
        raise ConfigError(f"--out {known.out} cannot be written: {error.strerror}; give another file") from None
    print(f"{known.count} images written to {known.out}")
    return 0


def _data_verify(known: argparse.Namespace) -> int:
    from megaclass.prepare.verify import verify

    with Progress("samples") as progress:
        report = verify(data_folder("DIR", known.folder), progress)
    print(json.dumps(report.as_dict(), indent=2) if known.json else report.text())
    return 0 if report.ok else DataError.exit_code
