from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from megaclass.config import validate
from megaclass.errors import ConfigError
from megaclass.observe.charts import MAX_POINTS, line_chart
from megaclass.observe.journal import Journal
from megaclass.observe.metrics import Snapshot
from megaclass.observe.report import lineage, write_report
from megaclass.parallel.process import World

EVIL = "<script>alert('\"x')</script>"


MONITORS = {
    "negative_cosine_mean": -0.0625,
    "negative_cosine_max": 0.5,
    "end_point": 0.75,
    "past_end_point": 0.125,
    "rows_touched": 11.0,
}


def evaluation(value: float) -> dict[str, Any]:
    return {
        "verification": {"accuracy": value, "tar_at_far": {"1e-3": value - 0.1}, "eer": 1 - value},
        "retrieval": {"recall_at_1": value},
        "one_shot": {"20": value},
    }


def make_run(folder: Path, monitors: dict[str, float] = MONITORS) -> Path:
    world = World(0, 2, 0, torch.device("cpu"), None, None)
    for attempt, steps in ((1, range(20, 200, 20)), (2, range(120, 320, 20))):
        with Journal(folder, attempt, world) as journal:
            for step in steps:
                loss = 10.0 / step + (1000.0 if attempt == 1 and step >= 120 else 0.0)
                journal.write_metrics(
                    Snapshot(
                        loss, loss / 3, loss / 1.5, 0.5, 1.0, monitors, step * 5, 1234.0, 0.1, 0.02, 0.05, 0.01, 3.0
                    ),
                    step=step,
                    epoch=1,
                    position=step * 5,
                    lr=0.1,
                )
                if step % 60 == 0:
                    journal.write_evaluation(step, evaluation(0.9))
            journal.write_summary(
                {
                    "status": "completed",
                    "exit_code": 0,
                    "step": 300,
                    "world_size": 2,
                    "attempts": 2,
                    "samples": {"read": 1505, "trained": 1500, "skipped": {"truncated": 5}, "replayed": 400},
                    "goodput": {"wall_seconds": 100.0, "productive_seconds": 80.0, "init_seconds": 5.0, "share": 0.8},
                    "evaluation": {"trained": evaluation(0.98), "untrained": evaluation(0.66)},
                }
            )
    config = {"dataset": {"path": "s3://store/data", "reader": "stream"}, "train": {"steps": 300}}
    # No configuration takes a password any more, but a run may have been begun before that.
    text = validate(config).to_yaml().replace("s3://store", "s3://me:hunter2@store")
    assert "hunter2" in text
    (folder / "config.yaml").write_text(text)
    return folder


def figures_of(path: Path) -> dict[str, list[str]]:
    """Titles of the figures of a page, with the names of the curves in their legends."""
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", path.read_text(encoding="utf-8"))
    return {caption.split("<")[0]: re.findall(r"</i>(.*?)</small>", caption) for caption in captions}


class Page(HTMLParser):
    """Text, tags and attributes of a page; complains about a tag that is closed but was not opened."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = ""
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert set(self._open) <= {"meta"}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        while (top := self._open.pop()) != tag:
            assert top == "meta", f"</{tag}> closes <{top}>"

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"


def test_the_report_tells_what_the_run_did(tmp_path: Path) -> None:
    path = write_report(make_run(tmp_path / "demo"))
    assert path == tmp_path / "demo" / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    for expected in (
        "megaclass · demo",
        "completed",
        "1m 40s",
        "1,234",
        "98.00%",
        "66.00%",
        "Verification, TAR at FAR 1e-3",
        "One-shot, 20-way",
        "skipped: truncated",
        "read = trained + skipped",
        "productive 1m 20s (80.0%)",
        "Dotted lines",
        "***@store/data",
    ):
        assert expected in page.text, expected
    assert "hunter2" not in path.read_text()
    assert page.tags.count("svg") == 9


def test_both_terms_the_cosines_and_the_end_point_have_curves(tmp_path: Path) -> None:
    figures = figures_of(write_report(make_run(tmp_path)))
    assert figures["Loss"] == ["total", "intra", "inter"]
    assert figures["Cosines"] == ["positive, mean", "negative, mean", "negative, largest", "end point after the margin"]
    assert figures["Samples past the end point"] == figures["Rows touched per step"] == []  # one curve: no legend


def test_a_curve_left_alone_is_named_in_the_title(tmp_path: Path) -> None:
    """A run of an older version has no monitors; a loss without negatives has fewer."""
    figures = figures_of(write_report(make_run(tmp_path, {"negative_cosine_max": math.nan})))
    assert "Cosines: positive, mean" in figures
    assert not {"Cosines", "Samples past the end point", "Rows touched per step"} & set(figures)


def test_the_report_needs_nothing_from_anywhere(tmp_path: Path) -> None:
    text = write_report(make_run(tmp_path)).read_text(encoding="utf-8")
    page = Page(text)
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    references = [value for name, value in page.attributes if name in ("href", "xlink:href", "src")]
    assert all(str(value).startswith("#") for value in references)
    assert not re.search(r"url\((?!#)|@import", text)


def test_ids_in_the_page_are_unique(tmp_path: Path) -> None:
    page = Page(write_report(make_run(tmp_path)).read_text(encoding="utf-8"))
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    targets = {str(value)[1:] for name, value in page.attributes if name == "xlink:href"}
    assert targets <= set(ids)


def test_superseded_attempts_are_dropped(tmp_path: Path) -> None:
    def line(step: int, attempt: int) -> dict[str, Any]:
        return {"step": step, "attempt": attempt}

    lines = [line(20, 1), line(40, 1), line(60, 2), line(70, 1), line(75, 3), line(80, 2)]
    assert [(kept["step"], kept["attempt"]) for kept in lineage(lines)] == [(20, 1), (40, 1), (60, 2), (75, 3)]


def test_hostile_files_are_shown_as_text(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a <b> & 'c'")
    summary = {
        "status": EVIL,
        "exit_code": EVIL,
        "step": [EVIL],
        "samples": {"read": EVIL, "trained": {}, "skipped": {EVIL: 10**40}},
        "goodput": {EVIL: EVIL, "wall_seconds": -5, "x_seconds": True},
        "evaluation": {EVIL: {EVIL: EVIL}, "trained": 7},
        "peak_rss_bytes": EVIL,
    }
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "config.yaml").write_text(f'classifier: {{preset: "{EVIL.replace(chr(34), "")}"}}\n')
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 400, "attempt": 3, "loss": EVIL, "intra": True, "time": EVIL, "lr": 10**400}))
        file.write('\n{"step": -1}\n{"step": "x"}\n{"step": 1e400}\n{"attempt": null, "step": 3}\n{"loss": NaN')
    text = write_report(run).read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in page.tags
    assert EVIL in page.text
    assert "a <b> & 'c'" in page.text


def test_an_unfinished_run_has_a_report_too(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("{")
    (tmp_path / "summary.json").write_text("[" * 100_000)
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "not finished" in page.text
    assert "svg" not in page.tags


def test_unaccounted_samples_are_said_out_loud(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text('{"samples": {"read": 10, "trained": 8, "skipped": {"truncated": 1}}}')
    assert "samples are unaccounted for" in write_report(tmp_path).read_text()


@pytest.mark.parametrize("name", ["", "missing"])
def test_a_folder_that_is_no_run_directory_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"is not a run directory: it has none of config\.yaml.*give the run\.dir"):
        write_report(tmp_path / name)


def test_long_curves_are_averaged_down() -> None:
    points = [(float(step), float(step % 2)) for step in range(20 * MAX_POINTS)]
    svg = line_chart("long", {"a": points, "b": [(1.0, float("nan")), (2.0, -1.0)]})
    assert len(svg) < 60_000
    assert "var(--series-1)" in svg
    assert "#03030" not in svg
    assert line_chart("long", {"a": points}) == line_chart("long", {"a": points})
