"""The plots of a study as SVG pictures on white: one point per case, error bars of one standard error over the seeds.

Separate because it alone knows matplotlib. Lines differ in colour, marker and stroke at once, in colours that people
with any colour vision tell apart (Okabe and Ito, 2008, without yellow, which white swallows). Text stays text. The same
numbers give the same bytes.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from megaclass.study.cases import Case
from megaclass.study.spec import Metric, Plot
from megaclass.study.table import Cell, Table, title

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "p")
_STROKES = ("-", "--", "-.", ":")
_INK, _GRID = "#24292f", "#d0d7de"

_MOST_INSIDE = 4  # lines of a legend that finds room among the points
_MOST_TICKS = 8
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "megaclass study",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "text.color": _INK,
}
# Where a text may stand beside its point, in points of type; the first that is free is taken.
_PLACES = [(right, up) for up, right in product((5, -13, 14, -22), (6, -6, 0))]


@dataclass(frozen=True)
class _Point:
    """A case in the plane: place and standard errors; `x` None means that it has none, and holds for all."""

    x: Any
    y: float
    x_error: float | None
    y_error: float | None
    text: str
    is_whole: bool


def draw(plot: Plot, table: Table, cases: Sequence[Case]) -> bytes:
    """The picture as SVG.

    A case without a value on the horizontal axis (an option that means nothing for it) is a horizontal line. A case
    with fewer seeds than the study has is hollow, one without any is left out, and a line below the picture says so.
    """
    with mpl.rc_context(_STYLE):
        buffer = io.BytesIO()
        metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
        _figure(plot, table, cases).savefig(buffer, format="svg", facecolor="white", metadata=metadata)
    return buffer.getvalue()


def _figure(plot: Plot, table: Table, cases: Sequence[Case]) -> Figure:
    metrics = {metric.name: metric for metric in table.metrics}
    lines = _lines(plot, table, cases)
    is_outside = len(lines) > _MOST_INSIDE
    figure = Figure(figsize=(8.6 if is_outside else 6.4, 4.2), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)  # knows how long a text is
    axes = figure.add_subplot(facecolor="white")
    placed = [point for points in lines.values() for point in points if point.x is not None]
    is_log = plot.log_x and bool(placed) and all(_is_number(point.x) and point.x > 0 for point in placed)
    if is_log:
        axes.set_xscale("log")
    for index, (name, points) in enumerate(lines.items()):
        _draw_line(axes, index, _plain(name), points)
    _dress(axes, plot, metrics, placed)
    if not (plot.points_labelled and plot.lines == "case"):  # the points say who they are
        if len(lines) > 1 and is_outside:
            figure.legend(loc="outside right upper", frameon=False, fontsize=8.5)
        elif len(lines) > 1:
            axes.legend(frameon=True, edgecolor="none", facecolor="white", framealpha=0.85, fontsize=8.5)
    notes = []
    if short := [name for name, row in table.cells.items() if len(row[plot.y].known) < table.num_seeds]:
        where = "1 case" if len(short) == 1 else f"{len(short)} cases"
        notes.append(f"hollow or left out: fewer than {table.num_seeds} seeds in {where}")
    if plot.log_x and placed and not is_log:
        notes.append("not logarithmic, as not every value is a number above 0")
    if plot.y_min is not None:
        highest = max((point.y for points in lines.values() for point in points), default=1.0)
        axes.set_ylim(plot.y_min, highest + 0.1 * abs(highest - plot.y_min))
        lower = {name: sum(point.y < plot.y_min for point in points) for name, points in lines.items()}
        notes += [f"{count} of {_plain(name)} lie lower" for name, count in lower.items() if count]
    if notes:
        figure.supxlabel("\n".join(notes), fontsize=8, color=_INK)
    _part_ticks(figure, axes)
    if plot.points_labelled:
        _label(figure, axes, placed)
    return figure


def _lines(plot: Plot, table: Table, cases: Sequence[Case]) -> dict[str, list[_Point]]:
    """The points of each line, from left to right; lines in the order of the study."""
    metrics = {metric.name for metric in table.metrics}
    lines: dict[str, list[_Point]] = {}
    for case in cases:
        row = table.cells[case.name]
        x_cell, y_cell = row[plot.x] if plot.x in metrics else None, row[plot.y]
        x = case.value(plot.x) if x_cell is None else x_cell.mean
        if y_cell.mean is None or (x_cell is not None and x is None):
            continue
        value = None if plot.lines == "case" else case.value(plot.lines)
        name = case.name if value is None else str(value)
        is_whole = all(len(cell.known) == table.num_seeds for cell in (x_cell, y_cell) if cell is not None)
        text = case.name if plot.lines == "case" else case.short
        lines.setdefault(name, []).append(_Point(x, y_cell.mean, _error(x_cell), y_cell.error, text, is_whole))
    values = [point.x for points in lines.values() for point in points if point.x is not None]
    if all(_is_number(value) for value in values):
        return {name: sorted(points, key=lambda point: (point.x is None, point.x)) for name, points in lines.items()}
    # One name among numbers makes names of them all: places side by side, in the order of the study.
    return {name: [replace(point, x=_place(point.x)) for point in points] for name, points in lines.items()}


def _draw_line(axes: Any, index: int, name: str, points: Sequence[_Point]) -> None:
    colour, marker = _COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)]
    stroke = _STROKES[index // len(_COLOURS) % len(_STROKES)]
    placed = [point for point in points if point.x is not None]
    if placed:
        axes.plot(
            [point.x for point in placed], [point.y for point in placed], color=colour, linestyle=stroke,
            linewidth=1.6, marker=marker, markersize=5.5, label=name, zorder=3,
        )  # fmt: skip
    for point in placed:
        axes.errorbar(
            [point.x], [point.y], xerr=point.x_error, yerr=point.y_error, color=colour, marker=marker,
            markersize=5.5, markerfacecolor=colour if point.is_whole else "white", linewidth=0, elinewidth=1.1,
            capsize=2.5, zorder=4,
        )  # fmt: skip
    is_named = bool(placed)
    for point in points:
        if point.x is None:
            label = None if is_named else name
            axes.axhline(point.y, color=colour, linestyle="--", linewidth=1.4, label=label, zorder=2)
            is_named = True
            if point.y_error is not None:
                axes.axhspan(point.y - point.y_error, point.y + point.y_error, color=colour, alpha=0.12, linewidth=0)


def _dress(axes: Any, plot: Plot, metrics: dict[str, Metric], points: Sequence[_Point]) -> None:
    """Words, ticks and grid."""
    axes.set_title(_plain(plot.title), fontsize=11, loc="left")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(color=_GRID, linewidth=0.7, alpha=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_INK, length=0)
    axes.margins(0.08)
    axes.set_xlabel(_plain(title(metrics[plot.x]) if plot.x in metrics else plot.x))
    axes.set_ylabel(_plain(title(metrics[plot.y])))
    as_percent = FuncFormatter(lambda share, _: f"{round(100 * share, 6):g} %")
    if metrics[plot.y].is_percent:
        axes.yaxis.set_major_formatter(as_percent)
    if not points:
        axes.set_xticks([])  # lines across have no place
        return
    if plot.x in metrics:
        if metrics[plot.x].is_percent:
            axes.xaxis.set_major_formatter(as_percent)
        return
    values = sorted({point.x for point in points if _is_number(point.x)})
    if values and len(values) <= _MOST_TICKS and all(_is_number(point.x) for point in points):
        # The values that were tried, and none between.
        whole = [f"{value:,g}" for value in values]
        short = [f"{value:.3g}" if value < 1000 else text for value, text in zip(values, whole, strict=True)]
        axes.set_xticks(values, short if len(set(short)) == len(short) else whole)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())


def _part_ticks(figure: Figure, axes: Any) -> None:
    """Slant the names below the horizontal axis where they would run into each other."""
    figure.draw_without_rendering()
    labels = [label for label in axes.get_xticklabels() if label.get_text()]
    boxes = sorted((label.get_window_extent() for label in labels), key=lambda box: box.x0)
    if any(right.x0 < left.x1 + 2 for left, right in pairwise(boxes)):
        for label in labels:
            label.set(rotation=30, horizontalalignment="right", rotation_mode="anchor")


def _label(figure: Figure, axes: Any, points: Sequence[_Point]) -> None:
    """Write beside every point what it is, at the first place where no other text or point stands."""
    figure.draw_without_rendering()
    taken = []
    for point in points:
        x, y = axes.transData.transform((axes.convert_xunits(point.x), point.y))
        taken.append(mpl.transforms.Bbox.from_bounds(x - 4, y - 4, 8, 8))
    inside = axes.get_window_extent()
    for point in points:
        best = None
        for place in _PLACES:
            side = "left" if place[0] > 0 else "right" if place[0] < 0 else "center"
            made = axes.annotate(
                _plain(point.text), (point.x, point.y), xytext=place, textcoords="offset points", ha=side, fontsize=8,
                color=_INK, zorder=5, annotation_clip=False,
            )  # fmt: skip
            box = made.get_window_extent(figure.canvas.get_renderer())  # type: ignore[attr-defined]
            free = box.count_overlaps(taken) + (0 if box.x0 >= inside.x0 and box.x1 <= inside.x1 else 3)
            if best is None or free < best[0]:
                if best is not None:
                    best[1].remove()
                best = (free, made, box)
            else:
                made.remove()
            if best[0] == 0:
                break
        assert best is not None
        taken.append(best[2])


def _error(cell: Cell | None) -> float | None:
    return None if cell is None else cell.error


def _place(value: Any) -> str | None:
    """The name of a place on the horizontal axis; None for a case that has none."""
    return None if value is None else _plain(f"{value:g}" if _is_number(value) else str(value))


def _plain(text: str) -> str:
    """A text that matplotlib shows as it is: a dollar sign would begin a formula."""
    return text.replace("$", r"\$")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
