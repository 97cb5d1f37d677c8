"""The pictures of a study: what stands in them, and that they are the same again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
import pytest
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from megaclass.config import validate
from megaclass.study import plots
from megaclass.study.cases import Case, Run
from megaclass.study.spec import Metric, Plot
from megaclass.study.table import Cell, Table

RECALL, ROWS = "retrieval.recall_at_1", "log.rows_touched"
RATE = "classifier.sampling_rate"
Content = tuple[Table, list[Case]]


def content(*rows: tuple[str, Any, Any, Sequence[float]], num_seeds: int = 3) -> Content:
    """A table of (loss, sampling rate or label `x`, rows touched, values of recall@1)."""
    cases, cells = [], {}
    for loss, rate, touched, values in rows:
        name = f"{loss} {rate}"
        is_rate = isinstance(rate, float)
        options = {"dataset": {"path": "d"}, "train": {"steps": 9}, "classifier": {"sampling_rate": rate}}
        config = validate(options if is_rate else {**options, "classifier": {}})
        labels = {"loss": loss} if rate is None else {"loss": loss, "x": rate}
        cases.append(Case(name, str(rate), {}, labels, [Run(name, 0, config)]))
        cells[name] = {RECALL: Cell(dict(enumerate(values))), ROWS: Cell({0: touched} if values else {})}
    metrics = [Metric.model_validate(RECALL), Metric.model_validate(ROWS)]
    return Table(metrics, cells, num_seeds, []), cases


TWO_LINES = (
    ("K", 0.25, 500, [0.90, 0.92, 0.94]), ("K", 0.0625, 130, [0.80, 0.82, 0.84]), ("B", 0.25, 700, [0.7, 0.8, 0.9]),
)  # fmt: skip
SOFTMAX = ("softmax", None, 6000, [0.6, 0.7, 0.8])


def plot(**changes: Any) -> Plot:
    return Plot.model_validate({"file": "a.svg", "title": "T", "x": RATE, "y": RECALL, "lines": "loss", **changes})


def figure(made: Content, **changes: Any) -> tuple[Figure, Axes]:
    with mpl.rc_context(plots._STYLE):
        drawn = plots._figure(plot(**changes), *made)
        drawn.draw_without_rendering()
    return drawn, drawn.axes[0]


def svg(made: Content, **changes: Any) -> str:
    return plots.draw(plot(**changes), *made).decode()


def texts(picture: str) -> list[str]:
    return ["".join(node.itertext()).strip() for node in ElementTree.fromstring(picture).iter() if "text" in node.tag]


def lines(axes: Axes, style: str) -> dict[str, Any]:
    """The lines of a stroke that stand in the legend, by name."""
    return {
        str(one.get_label()): one for one in axes.lines if one.get_linestyle() == style and "_" not in one.get_label()
    }


def bars(axes: Axes) -> list[ErrorbarContainer]:
    return [one for one in axes.containers if isinstance(one, ErrorbarContainer)]


def test_the_picture_is_an_svg_whose_words_are_words() -> None:
    picture = svg(content(*TWO_LINES, SOFTMAX), title="Sampled negatives")
    root = ElementTree.fromstring(picture)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert {"Sampled negatives", RATE, "retrieval: recall at 1", "K", "B", "softmax", "0.0625", "0.25"} <= set(
        texts(picture)
    )
    assert "90 %" in texts(picture)


def test_the_same_numbers_give_the_same_bytes() -> None:
    made = content(*TWO_LINES, SOFTMAX)
    first, second = (plots.draw(plot(log_x=True, points_labelled=True), *made) for _ in range(2))
    assert first == second
    assert b"<dc:date>" not in first
    moved = content(*TWO_LINES[:2], ("B", 0.25, 700, [0.7, 0.8, 0.91]), SOFTMAX)
    assert plots.draw(plot(log_x=True, points_labelled=True), *moved) != first


def test_cases_alike_are_joined_from_left_to_right() -> None:
    _, axes = figure(content(*TWO_LINES))
    joined = lines(axes, "-")
    assert list(joined) == ["K", "B"]
    assert joined["K"].get_xdata() == pytest.approx([0.0625, 0.25])
    assert joined["K"].get_ydata() == pytest.approx([0.82, 0.92])
    assert joined["K"].get_color() != joined["B"].get_color()
    assert joined["K"].get_marker() != joined["B"].get_marker()


def test_only_the_values_that_were_tried_are_ticks() -> None:
    _, axes = figure(content(*TWO_LINES), log_x=True)
    assert axes.get_xscale() == "log"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.0625", "0.25"]
    assert len(axes.xaxis.get_minorticklocs()) == 0


def test_thousands_are_written_out() -> None:
    drawn = content(*((f"K{rows}", None, rows, [0.9]) for rows in (30, 1000, 21150)), num_seeds=1)
    for case in drawn[1]:
        case.labels["x"] = int(case.name.split()[0][1:])
    _, axes = figure(drawn, x="x", log_x=True, lines="case")
    assert [label.get_text() for label in axes.get_xticklabels()] == ["30", "1,000", "21,150"]


def test_error_bars_are_one_standard_error_over_the_seeds() -> None:
    _, axes = figure(content(*TWO_LINES))
    (segment,) = (
        bar.lines[2][0].get_segments()[0] for bar in bars(axes) if bar.lines[0].get_xdata()[0] == 0.0625
    )  # fmt: skip
    error = 0.02 / 3**0.5
    assert [y for _, y in segment] == pytest.approx([0.82 - error, 0.82 + error])


def test_one_seed_has_no_error_bar() -> None:
    _, axes = figure(content(("K", 0.25, 500, [0.9]), num_seeds=1))
    (bar,) = bars(axes)
    assert bar.lines[2] == ()


def test_a_metric_as_x_has_error_bars_of_its_own() -> None:
    made = content(("K", 0.25, 500, [0.9, 0.8, 0.7]))
    made[0].cells["K 0.25"][ROWS].values.update({1: 520, 2: 540})  # type: ignore[attr-defined]
    _, axes = figure(made, x=ROWS)
    (bar,) = bars(axes)
    across = [x for x, _ in bar.lines[2][0].get_segments()[0]]
    assert across == pytest.approx([520 - 20 / 3**0.5, 520 + 20 / 3**0.5])
    assert axes.get_xlabel() == "rows touched"


def test_a_case_without_x_is_a_dashed_line_across_with_its_error() -> None:
    _, axes = figure(content(*TWO_LINES, SOFTMAX))
    dashed = lines(axes, "--")
    assert list(dashed) == ["softmax"]
    assert dashed["softmax"].get_ydata() == pytest.approx([0.7, 0.7])
    (band,) = axes.patches
    assert band.get_y() == pytest.approx(0.7 - 0.1 / 3**0.5)
    assert band.get_height() == pytest.approx(2 * 0.1 / 3**0.5)


def test_a_line_stands_once_in_the_legend() -> None:
    """Also one that has no points and is several dashed lines, and one that is points and a dashed line."""
    made = content(*TWO_LINES, ("K", None, 9, [0.5]), ("A", None, 1, [0.3]), ("A", "", 1, [0.4]))
    _, axes = figure(made)
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["K", "B", "A"]


def test_nothing_but_dashed_lines_has_no_places() -> None:
    _, axes = figure(content(SOFTMAX, ("A", None, 1, [0.3])), log_x=True)
    assert list(lines(axes, "--")) == ["softmax", "A"]
    assert len(axes.get_xticks()) == 0


def test_fewer_seeds_make_a_hollow_point_and_a_line_below_says_so() -> None:
    made = content(("K", 0.25, 500, [0.9, 0.8]), ("K", 0.5, 500, [0.9, 0.8, 0.7]), ("K", 0.75, 500, []))
    drawn, axes = figure(made)
    faces = [bar.lines[0].get_markerfacecolor() for bar in bars(axes)]
    assert faces == ["white", plots._COLOURS[0]]
    assert "hollow or left out: fewer than 3 seeds in 2 cases" in texts(svg(made))
    assert not [text for text in texts(svg(content(*TWO_LINES))) if "fewer" in text]
    assert "hollow or left out: fewer than 3 seeds in 1 case" in texts(svg(content(("K", 0.5, 1, [0.9, 0.8]))))
    assert drawn.get_supxlabel() != ""


def test_a_study_without_a_run_has_an_empty_picture() -> None:
    picture = svg(content(("K", 0.25, 500, []), ("B", None, 1, [])), log_x=True, points_labelled=True)
    assert "hollow or left out: fewer than 3 seeds in 2 cases" in texts(picture)


def test_points_are_labelled_with_what_was_varied_or_with_their_case() -> None:
    made = content(*TWO_LINES)
    _, axes = figure(made, points_labelled=True)
    assert [text.get_text() for text in axes.texts] == ["0.0625", "0.25", "0.25"]
    assert axes.get_legend() is not None
    _, axes = figure(made, x=ROWS, lines="case", points_labelled=True)
    assert [text.get_text() for text in axes.texts] == ["K 0.25", "K 0.0625", "B 0.25"]
    assert axes.get_legend() is None  # the points say who they are


def test_labels_stand_in_nobodys_way_where_there_is_room() -> None:
    drawn, axes = figure(
        content(*((f"case {n}", 0.5, 100.0, [value]) for n, value in enumerate((0.1, 0.9, 0.901, 0.902))), num_seeds=1),
        x=ROWS, lines="case", points_labelled=True,
    )  # fmt: skip
    renderer = drawn.canvas.get_renderer()  # type: ignore[attr-defined]
    boxes = [text.get_window_extent(renderer) for text in axes.texts]
    for index, box in enumerate(boxes):
        assert box.count_overlaps(boxes[:index]) == 0


def test_many_lines_have_their_legend_outside() -> None:
    many = [(f"loss {n}", 0.25 + n / 100, 1, [0.5 + n / 50] * 3) for n in range(9)]
    wide, axes = figure(content(*many))
    narrow, _ = figure(content(*TWO_LINES))
    assert axes.get_legend() is None
    (legend,) = wide.legends
    assert len(legend.get_texts()) == 9
    assert wide.get_figwidth() > narrow.get_figwidth()
    renderer = wide.canvas.get_renderer()  # type: ignore[attr-defined]
    assert legend.get_window_extent(renderer).x0 >= axes.get_window_extent().x1
    looks = {(one.get_color(), one.get_linestyle()) for one in axes.lines if str(one.get_label()).startswith("loss")}
    assert len(looks) == 9  # more lines than colours


def test_names_are_places_side_by_side_and_one_name_makes_all_of_them_names() -> None:
    made = content(("A", "wide", 1, [0.5] * 3), ("A", "0.5", 1, [0.6] * 3), ("B", 0.5, 1, [0.7] * 3))
    _, axes = figure(made, x="x", log_x=True)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["wide", "0.5"]
    found = [(bar.lines[0].get_xdata()[0], round(bar.lines[0].get_ydata()[0], 6)) for bar in bars(axes)]
    assert found == [("wide", 0.5), ("0.5", 0.6), ("0.5", 0.7)]
    assert axes.get_xscale() == "linear"
    assert "not logarithmic, as not every value is a number above 0" in texts(svg(made, x="x", log_x=True))


def test_zero_has_no_place_on_a_logarithmic_axis_so_it_is_none() -> None:
    made = content(("A", 1, 0, [0.5] * 3), ("A", 2, 100, [0.6] * 3))
    _, axes = figure(made, x=ROWS, log_x=True)
    assert axes.get_xscale() == "linear"
    assert "not logarithmic, as not every value is a number above 0" in texts(svg(made, x=ROWS, log_x=True))


def test_long_names_below_the_axis_do_not_run_into_each_other() -> None:
    names = [f"a rather long name of a place {n}" for n in range(5)]
    _, axes = figure(content(*(("A", name, 1, [0.5] * 3) for name in names)), x="x")
    assert {label.get_rotation() for label in axes.get_xticklabels()} == {30.0}
    _, axes = figure(content(("A", "a", 1, [0.5] * 3), ("A", "b", 1, [0.5] * 3)), x="x")
    assert {label.get_rotation() for label in axes.get_xticklabels()} == {0.0}


@pytest.mark.parametrize("name", ["$x_{$ and $\\frac$", "a < b & c", "50 % $", "größer"])
def test_what_a_user_names_is_shown_as_it_is(name: str) -> None:
    made = content((name, 0.5, 1, [0.5] * 3), ("b", name, 1, [0.6] * 3))
    shown = texts(svg(made, title=name, x="x", points_labelled=True))
    assert shown.count(name) >= 4  # title, legend, place, point


def test_no_text_stands_outside_the_picture(tmp_path: Path) -> None:
    many = [(f"D-Softmax-K with a long name {n}", 0.25 + n / 100, 1, [0.5 + n / 50] * 3) for n in range(6)]
    drawn, _ = figure(content(*many))
    box = drawn.get_tightbbox(drawn.canvas.get_renderer())  # type: ignore[attr-defined]
    assert box.x0 >= -0.01
    assert box.y0 >= -0.01
    assert box.x1 <= drawn.get_figwidth() + 0.01
    assert box.y1 <= drawn.get_figheight() + 0.01


def test_what_lies_below_the_lowest_value_shown_is_said() -> None:
    drawn, axes = figure(content(*TWO_LINES), y_min=0.85)
    assert axes.get_ylim()[0] == 0.85
    assert "1 of K lie lower" in texts(svg(content(*TWO_LINES), y_min=0.85))
    assert "1 of B lie lower" in texts(svg(content(*TWO_LINES), y_min=0.85))
    assert not any("lie lower" in text for text in texts(svg(content(*TWO_LINES), y_min=0.5)))
    assert drawn.get_supxlabel()
