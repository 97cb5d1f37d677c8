"""The report of a trained run's classes: likely duplicates, likely mislabelled samples, classes that fall apart.

Separate from `trained` because this is the one use of a finished run that needs its class weights, and from
`evaluate.suspects` because that is pure: this file reads the checkpoint and the training samples and writes for people.
One process; the class weights are read a range at a time, the embeddings of all samples are held in memory.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from megaclass import checkpoint
from megaclass.checkpoint.class_rows import CheckpointRows
from megaclass.data.training_samples import TrainingSamples
from megaclass.data.transforms import normalise
from megaclass.durable import replace_bytes
from megaclass.errors import ConfigError, DataError
from megaclass.evaluate import suspects
from megaclass.evaluate.embed import embed_images
from megaclass.evaluate.similarity import blocks, check_unit_length
from megaclass.train.trained import load_backbone

# Pairs of classes judged by their samples, for each pair that is listed.
CANDIDATES_PER_PAIR = 20
SHOWN = 10


class _Embedded(NamedTuple):
    """Training samples as the backbone sees them: embeddings [n, dim], labels [n], ids [n]; and how many were bad."""

    embeddings: Tensor
    labels: Tensor
    ids: NDArray[np.int64]
    num_bad: int


def report_classes(
    run_dir: Path,
    *,
    path: Path | None,
    max_samples: int | None,
    top: int,
    batch_size: int,
    device: str,
    json_file: Path | None,
    csv_file: Path | None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """The report of a run's classes, as plain JSON; docs/noise.md says what each entry means.

    Args:
        run_dir: of a training run.
        path: of the checkpoint; None for the newest complete one.
        max_samples: at most so many training samples, evenly spaced over the split; None for all.
        top: length of every ranked list.
        batch_size: images embedded at a time.
        device: `auto`, `cpu` or `cuda`.
        json_file: where the report is also written.
        csv_file: where all samples that are nearer to another class than to their own are written, not only `top`.
        progress: called with samples embedded and samples in all.

    Raises:
        CheckpointError, DataError, ConfigError, NumericError: what is asked for is not there or cannot be used.

    Cost: one forward pass per sample, samples * classes cosines and classes² / 2 cosines of class weights, in float32.
    """
    for name, value in (("--top", top), ("--batch-size", batch_size), ("--max-samples", max_samples)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} {value}: must be at least 1")
    for option, file in (("--json", json_file), ("--csv", csv_file)):
        _check_writable(option, file)
    if path is None and Path(run_dir).is_dir():
        path = checkpoint.find_latest(Path(run_dir) / "checkpoints")
    config, backbone, world = load_backbone(run_dir, path, device)
    assert path is not None
    with CheckpointRows(path, world.device) as rows, closing(TrainingSamples(config)) as samples:
        if samples.num_classes != rows.num_classes or rows.num_classes < 2:
            raise DataError(
                f"{samples.what} has {samples.num_classes} classes and the checkpoint {rows.num_classes}; they must be "
                "equal, and 2 or more: give back the data set that the run was trained on"
            )
        embedded = _embed(backbone, samples, batch_size, max_samples, world.device, progress)
        nearest = suspects.nearest_classes(embedded.embeddings, embedded.labels, rows)
        close = suspects.close_pairs(rows, top * CANDIDATES_PER_PAIR)
        pairs = suspects.duplicates(embedded.embeddings, embedded.labels, rows, close)[:top]
        statistics = suspects.class_statistics(nearest, embedded.labels, rows.num_classes)
        strays = suspects.strays(nearest)
        describe = _Describe(samples, embedded, nearest)
        report = {
            "run": str(run_dir),
            "checkpoint": str(path),
            "step": rows.step,
            "num_classes": rows.num_classes,
            "rows_per_class": rows.rows_per_class,
            "num_samples": samples.num_samples,
            "num_embedded": len(embedded.ids),
            "num_bad": embedded.num_bad,
            "num_nearer_to_another": len(strays),
            "num_classes_without_samples": int((statistics.num_samples == 0).sum()),
            "percentiles": {
                "own_cosine": suspects.percentiles(nearest.own_cosine),
                "other_cosine": suspects.percentiles(nearest.other_cosine),
                "margin": suspects.percentiles(nearest.margin),
                "class_weight_cosine": suspects.percentiles(close.nearest_cosine),
            },
            "duplicates": [describe.pair(pair) for pair in pairs],
            "mislabelled": [describe.sample(int(place)) for place in strays[:top]],
            "classes_by_share": [describe.of_class(int(label), statistics) for label in statistics.by_share[:top]],
            "classes_by_cosine": [describe.of_class(int(label), statistics) for label in statistics.by_cosine[:top]],
        }
        if csv_file is not None:
            _write("--csv", csv_file, _csv(describe.sample(int(place)) for place in strays))
    if json_file is not None:
        _write("--json", json_file, json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return report


def _embed(
    backbone: nn.Module,
    samples: TrainingSamples,
    batch_size: int,
    max_samples: int | None,
    device: torch.device,
    progress: Callable[[int, int], None],
) -> _Embedded:
    """The embeddings of all samples, or of `max_samples` evenly spaced ones, without augmentation."""
    total = samples.num_samples
    count = total if max_samples is None else min(max_samples, total)
    chosen = np.arange(count, dtype=np.int64) * total // max(count, 1)
    parts, all_labels, ids = [torch.empty(0, 0)], [torch.empty(0, dtype=torch.int64)], [chosen[:0]]
    for block in blocks(count, batch_size):
        images, labels, bad = samples.read(chosen[block])
        for error in bad.values():
            if not samples.is_skipping:
                raise error.as_data_error()
        good = np.setdiff1d(np.arange(len(labels)), list(bad)) if bad else np.arange(len(labels))
        if len(good):
            pixels = normalise(torch.from_numpy(images[good]).permute(0, 3, 1, 2))
            parts.append(embed_images(backbone, pixels, device))
            all_labels.append(torch.from_numpy(labels[good]))
            ids.append(chosen[block][good])
        progress(block.stop, count)
    if len(parts) == 1:
        raise DataError(f"{samples.what} has no sample that can be used; run `megaclass data verify` on it")
    embeddings, numbers = torch.cat(parts[1:]), np.concatenate(ids)
    check_unit_length(embeddings)
    return _Embedded(embeddings, torch.cat(all_labels), numbers, count - len(numbers))


class _Describe:
    """Turns what the mathematics found into plain JSON: names beside numbers."""

    def __init__(self, samples: TrainingSamples, embedded: _Embedded, nearest: suspects.NearestClasses) -> None:
        self._samples, self._embedded, self._nearest = samples, embedded, nearest
        self._sorted_own = np.sort(nearest.own_cosine.numpy())
        self._is_stray = (nearest.margin > 0).numpy()

    def pair(self, pair: suspects.DuplicateCandidate) -> dict[str, Any]:
        """One pair of classes; a share is None where the class has no sample."""
        return {
            **self._class("first", pair.first),
            **self._class("second", pair.second),
            "score": pair.score,
            "weight_cosine": pair.weight_cosine,
            "mean_cosine": pair.mean_cosine,
            "first_share": pair.first_share,
            "second_share": pair.second_share,
        }

    def sample(self, place: int) -> dict[str, Any]:
        """One embedded sample, by its place among them."""
        own, other = (float(values[place]) for values in (self._nearest.own_cosine, self._nearest.other_cosine))
        return {
            **self._samples.locate(int(self._embedded.ids[place])),
            **self._class("class", int(self._embedded.labels[place])),
            **self._class("other", int(self._nearest.other_class[place])),
            "own_cosine": own,
            "other_cosine": other,
            "margin": other - own,
            "share_below": float(np.searchsorted(self._sorted_own, own) / len(self._sorted_own)),
        }

    def of_class(self, label: int, statistics: suspects.ClassStatistics) -> dict[str, Any]:
        """One class, with the class that most of its strays are nearest to (None without strays)."""
        others = self._nearest.other_class[(self._embedded.labels == label).numpy() & self._is_stray].numpy()
        other = int(np.bincount(others).argmax()) if len(others) else None
        return {
            **self._class("class", label),
            "num_samples": int(statistics.num_samples[label]),
            "mean_cosine": float(statistics.mean_cosine[label]),
            "spread": float(statistics.spread[label]),
            "stray_share": float(statistics.stray_share[label]),
            **self._class("other", other),
        }

    def _class(self, role: str, label: int | None) -> dict[str, Any]:
        return {role: label, f"{role}_name": None if label is None else self._samples.class_name(label)}


def tables(report: Mapping[str, Any]) -> Iterator[Table | Text]:
    """The first lines of every list of a report, for people."""
    bad = f", {report['num_bad']} of them unusable" if report["num_bad"] else ""
    yield Text(
        f"step {report['step']}: {report['num_classes']} classes, {report['num_embedded'] + report['num_bad']} of "
        f"{report['num_samples']} training samples looked at{bad}; {report['num_nearer_to_another']} are nearer to "
        "another class than to their own"
    )
    made = Table("percentile", *map(str, suspects.PERCENTILES), title="Cosines")
    titles = {
        "own_cosine": "samples, own class",
        "other_cosine": "samples, nearest other class",
        "margin": "samples, margin: other - own",
        "class_weight_cosine": "class weights, nearest other",
    }
    for key, title in titles.items():
        made.add_row(title, *(_number(value) for value in report["percentiles"][key].values()))
    yield made
    yield _table(
        "Classes most likely duplicates", report["duplicates"],
        first_name="class", second_name="class", score="score", weight_cosine="weights", mean_cosine="means",
        first_share="first to second", second_share="second to first",
    )  # fmt: skip
    yield _table(
        "Samples most likely mislabelled", report["mislabelled"],
        key="sample", class_name="given class", other_name="nearest class", own_cosine="own", other_cosine="nearest",
        margin="margin",
    )  # fmt: skip
    columns = {"class_name": "class", "num_samples": "samples", "mean_cosine": "mean cosine", "spread": "spread"}
    columns |= {"stray_share": "strays", "other_name": "most of them to"}
    yield _table("Classes with the most strays", report["classes_by_share"], **columns)
    yield _table("Classes with the lowest cosines", report["classes_by_cosine"], **columns)


def _table(title: str, entries: list[dict[str, Any]], **columns: str) -> Table | Text:
    if not entries:
        return Text(f"{title}: none")
    of = f", {SHOWN} of {len(entries)}" if len(entries) > SHOWN else ""
    made = Table(*columns.values(), title=title + of)
    for entry in entries[:SHOWN]:
        made.add_row(*(_number(entry[key]) for key in columns))
    return made


def _number(value: Any) -> Text:
    """A cell: names come from a data set and must write neither markup nor control characters on a terminal."""
    if isinstance(value, float):
        return Text(f"{value:.3f}", justify="right")
    text = "-" if value is None else str(value)
    return Text(text if text.isprintable() else ascii(text))


def _csv(entries: Iterator[dict[str, Any]]) -> str:
    columns = [
        "sample", "key", "shard", "class", "class_name", "other", "other_name", "own_cosine", "other_cosine", "margin",
        "share_below",
    ]  # fmt: skip
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(entries)
    return text.getvalue()


def _check_writable(option: str, file: Path | None) -> None:
    """`ConfigError` before the work rather than after it."""
    if file is not None and (file.is_dir() or not file.parent.is_dir() or not os.access(file.parent, os.W_OK)):
        raise ConfigError(f"{option} {file} cannot be written: give a file in an existing folder that is writable")


def _write(option: str, file: Path, text: str) -> None:
    try:
        replace_bytes(file, text.encode())
    except OSError as error:
        raise ConfigError(f"{option} {file} cannot be written: {error.strerror}; free space or give another") from None
