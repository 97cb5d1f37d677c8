"""Curves as small SVG pictures for the report, coloured by the page they stand on.

Separate from the report because it alone knows matplotlib. Colours are style variables of the page (`--series-1`,
`--ink-soft`, `--grid`), so that one picture serves light and dark; text stays text in the page's own typeface.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

MAX_POINTS = 500
NUM_COLOURS = 4

# matplotlib writes these; the page's own colours take their place afterwards.
_INK, _GRID = "#010101", "#020202"
_SERIES = [f"#03030{index}" for index in range(NUM_COLOURS)]

Series = Sequence[tuple[float, float]]


def line_chart(
    name: str, series: Mapping[str, Series], *, percent: bool = False, marks: Sequence[float] = (), zoom: bool = False
) -> str:
    """An `<svg>` element of curves over steps.

    Args:
        name: unique in the page; also the text for those who cannot see the picture.
        series: label -> (step, value) points by step, at most `NUM_COLOURS`; the i-th has colour `--series-{i}`, from
            1 on. More than `MAX_POINTS` points are averaged in blocks of neighbours.
        percent: whether values in [0, 1] are shown as percentages.
        marks: steps at which a dotted line stands, for restarts.
        zoom: fit the value axis to the curves; otherwise it starts at zero where no value is negative.
    """
    assert len(series) <= NUM_COLOURS
    # The salt makes the ids in the picture differ from those of the page's other pictures, and repeatable.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 8.5}):
        figure = Figure(figsize=(5.0, 2.5), layout="constrained", facecolor="none")
        canvas = FigureCanvasSVG(figure)
        axes = figure.add_subplot(facecolor="none")
        lowest = 0.0
        for colour, points in zip(_SERIES, series.values(), strict=False):
            steps, values = _reduced(points)
            lowest = min([lowest, *values])
            marker = "o" if len(steps) <= 40 else ""
            axes.plot(steps, values, color=colour, linewidth=1.5, marker=marker, markersize=3)
        if not zoom and lowest == 0.0 and axes.get_ylim()[1] > 0:
            axes.set_ylim(bottom=0.0)
        for mark in marks:
            axes.axvline(mark, color=_INK, linewidth=0.8, linestyle=":", alpha=0.6)
        _dress(axes, percent)
        buffer = io.StringIO()
        canvas.print_svg(buffer, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _themed(buffer.getvalue(), name)


def _dress(axes: Any, percent: bool) -> None:
    """Take away from the axes what the eye does not need."""
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)
    axes.tick_params(colors=_INK, length=0)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.01)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    bottom, top = axes.get_ylim()
    if percent:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{round(100 * share, 6):g}%"))
    elif max(abs(bottom), abs(top)) >= 10_000:
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))


def _reduced(points: Series) -> tuple[list[float], list[float]]:
    """Steps and values of the finite points, averaged in equal blocks down to at most `MAX_POINTS`."""
    finite = [(step, value) for step, value in points if math.isfinite(value)]
    block = math.ceil(len(finite) / MAX_POINTS) or 1
    blocks = [finite[start : start + block] for start in range(0, len(finite), block)]
    return (
        [sum(step for step, _ in part) / len(part) for part in blocks],
        [sum(value for _, value in part) / len(part) for part in blocks],
    )


def _themed(svg: str, name: str) -> str:
    """The bare `<svg>` element with the page's colours and typeface, sized by the page, and without repeated ids."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[\w.]+_[0-9]+"', "", svg)
    svg = re.sub(r"font: ([0-9.]+px) [^;\"]+", r"font: \1 var(--typeface)", svg)
    svg = svg.replace(_INK, "var(--ink-soft)").replace(_GRID, "var(--grid)")
    for index, colour in enumerate(_SERIES, 1):
        svg = svg.replace(colour, f"var(--series-{index})")
    label = re.sub(r"[^\w ,.@-]", " ", name)
    return re.sub(r' width="[0-9.]+pt"| height="[0-9.]+pt"', "", svg, count=2).replace(
        "<svg", f'<svg role="img" aria-label="{label}"', 1
    )
