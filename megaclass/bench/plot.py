"""Figures of a benchmark as a picture: processor time by sampling rate or by number of classes, with the floor."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaclass.bench.measure import has_gpu
from megaclass.errors import ConfigError

if TYPE_CHECKING:
    from megaclass.plan import Scaled

# Told apart with any colour vision (Okabe and Ito, 2008), and by marker.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
_MARKERS = "os^Dv<>"
_TYPES = (".svg", ".png", ".pdf")


def check(file: Path) -> None:
    """Refuse, before anything is measured, a picture that cannot be drawn.

    Raises:
        ConfigError: matplotlib is missing, or the file's ending is of no picture.
    """
    if file.suffix not in _TYPES:
        raise ConfigError(f"--plot {file}: the ending must be one of {', '.join(_TYPES)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib; pip install matplotlib, or use --json")


def draw(reports: Sequence[dict[str, Any]], file: Path) -> None:
    """Write the picture of `cases` of `megaclass bench head` or `scaling`: medians, and the 20 to 80 % of the steps."""
    from matplotlib.figure import Figure

    axis = "num_classes" if len({report["case"]["num_classes"] for report in reports}) > 1 else "sampling_rate"
    time = "wall_ms" if has_gpu() else "cpu_ms_spread"
    figure = Figure(figsize=(6.4, 4.2), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    for index, name in enumerate(dict.fromkeys(report["impl"] for report in reports)):
        lines = [report for report in reports if report["impl"] == name]
        colour = _COLOURS[index % len(_COLOURS)]
        places, middle = [report["case"][axis] for report in lines], [report[time]["p50"] for report in lines]
        spread = [
            [report[time]["p50"] - report[time]["p20"] for report in lines],
            [report[time]["p80"] - report[time]["p50"] for report in lines],
        ]
        marker = _MARKERS[index % len(_MARKERS)]
        axes.errorbar(places, middle, yerr=spread, color=colour, marker=marker, capsize=3, label=name)
        if index == 0:
            floors = [report["floor_ms"] for report in lines]
            axes.plot(places, floors, color="#57606a", linestyle=":", marker=".", label="floor of the machine")
    axes.set(
        xscale="log", yscale="log", xlabel="classes" if axis == "num_classes" else "sampling rate",
        ylabel="ms a step" if has_gpu() else "processor ms a step, slowest rank",
        title=_title(reports, axis),
    )  # fmt: skip
    axes.grid(which="major", color="#d0d7de", linewidth=0.6)
    axes.legend(frameon=False)
    figure.savefig(file)


def _title(reports: Sequence[dict[str, Any]], axis: str) -> str:
    case = reports[0]["case"]
    what = f"{case['num_classes']:,} classes" if axis == "sampling_rate" else "as many rows drawn"
    return f"{what} x {case['dim']}, {case['batch_size']} samples on each of {case['world_size']} ranks"


def draw_scaling(rows: Sequence[Scaled], device: str, file: Path) -> None:
    """Write the picture of `megaclass plan --world-sizes`: samples per second, with and without failures."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    ranks = [row.ranks for row in rows]
    ideal = [rows[0].samples_per_second / rows[0].ranks * number for number in ranks]
    axes.plot(ranks, ideal, color="#57606a", linestyle=":", label="the first times the ranks")
    axes.plot(ranks, [row.samples_per_second for row in rows], color=_COLOURS[0], marker="o", label="without failures")
    useful = [row.useful_samples_per_second for row in rows]
    axes.plot(ranks, useful, color=_COLOURS[1], marker="s", label="saving and failures included")
    axes.set(
        xscale="log", yscale="log", xlabel="GPUs", ylabel="samples/s",
        title=f"{rows[0].num_classes:,} classes on {device}, modelled, never measured",
    )  # fmt: skip
    axes.set_xticks(ranks, [f"{number:,}" for number in ranks], minor=False)
    axes.minorticks_off()
    axes.grid(which="major", color="#d0d7de", linewidth=0.6)
    axes.legend(frameon=False)
    figure.savefig(file)
