from __future__ import annotations

import io
import math
from dataclasses import replace

import pytest
from rich.console import Console

from megaclass.observe.metrics import Snapshot
from megaclass.observe.progress import ProgressLine, duration, figures

SNAPSHOT = Snapshot(3.25, 1.0, 2.25, 0.25, 1.5, {}, 35, 5120.4, 0.5, 0.05, 0.031, 0.01, 133.0)
LINE = "ETA 2m 13s   loss 3.2500 (intra 1.0000, inter 2.2500)  cos 0.250  5,120 samples/s  data wait 3%  lr 0.18"


def test_elsewhere_than_in_a_terminal_every_logged_step_is_one_plain_line() -> None:
    stream = io.StringIO()
    line = ProgressLine(1500, console=Console(file=stream, width=40))
    line.advance(19)
    line.update(20, SNAPSHOT, 0.18)
    line.close()
    line.close()
    assert stream.getvalue() == f"step   20/1500  {LINE}\n"


@pytest.mark.parametrize("width", [60, 160])
def test_in_a_terminal_the_line_is_drawn_live(width: int) -> None:
    stream = io.StringIO()
    line = ProgressLine(1500, step=10, console=Console(file=stream, force_terminal=True, width=width))
    line.update(20, replace(SNAPSHOT, loss=math.nan), 0.18)
    line.advance(21)
    line.close()
    shown = stream.getvalue()
    assert "21/1500" in shown
    assert "ETA 2m 13s   loss nan" in shown
    assert ("5,120 samples/s" in shown) == (width == 160)


def test_other_ranks_show_nothing() -> None:
    stream = io.StringIO()
    line = ProgressLine(1500, is_main=False, console=Console(file=stream))
    line.update(20, SNAPSHOT, 0.18)
    line.advance(21)
    line.close()
    assert stream.getvalue() == ""


def test_figures_fit_in_a_line_of_120_characters() -> None:
    assert figures(SNAPSHOT, 0.18) == LINE
    assert len(figures(replace(SNAPSHOT, eta_seconds=9e5, samples_per_second=123456.0), 1.25e-5)) < 120


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.0s"),
        (9.96, "10.0s"),
        (59.4, "59s"),
        (59.6, "1m 00s"),
        (3599.7, "1h 00m"),
        (7500, "2h 05m"),
        (367200, "4d 06h"),
        (math.inf, "unknown"),
        (-1.0, "unknown"),
    ],
)
def test_durations_in_words(seconds: float, text: str) -> None:
    assert duration(seconds) == text
