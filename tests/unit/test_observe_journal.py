from __future__ import annotations

import json
import math
import struct
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megaclass.observe.journal import Journal, next_attempt, read_evaluations, read_lines, read_metrics
from megaclass.observe.metrics import Snapshot
from megaclass.parallel.process import World

FIELDS = {
    *("attempt", "step", "epoch", "position", "loss", "loss_hex", "intra", "inter", "positive_cosine", "lr"),
    *("grad_norm", "samples", "samples_per_second", "data_wait_seconds", "world_size", "time"),
    *("head_cpu_seconds", "data_wait_share", "step_seconds"),
}


def world(rank: int = 0, size: int = 3) -> World:
    return World(rank, size, rank, torch.device("cpu"), None, None)


def snapshot(loss: float = 1 / 3) -> Snapshot:
    monitors = {"negative_cosine_mean": -0.25, "negative_cosine_max": math.nan, "rows_touched": 11.0}
    return Snapshot(loss, 0.1, 0.2, 0.5, 1.5, monitors, 35, 70.0, 0.1, 0.05, 0.1, 0.02, 12.0)


def log(journal: Journal, step: int, loss: float = 1 / 3) -> None:
    journal.write_metrics(snapshot(loss), step=step, epoch=0, position=step * 5, lr=0.1)


def test_a_line_has_the_promised_fields(tmp_path: Path) -> None:
    with Journal(tmp_path, 1, world()) as journal:
        journal.write_metrics(snapshot(), step=7, epoch=1, position=35, lr=0.1, class_lr=0.4)
        (line,) = read_metrics(tmp_path)  # read while still open: it was flushed
    assert set(line) >= FIELDS
    assert (line["step"], line["attempt"], line["world_size"], line["class_lr"]) == (7, 1, 3, 0.4)
    assert line["loss"] == 1 / 3
    assert line["loss_hex"] == struct.unpack("f", struct.pack("f", 1 / 3))[0].hex()


def test_monitors_stand_in_the_line_under_their_names(tmp_path: Path) -> None:
    with Journal(tmp_path, 1, world()) as journal:
        log(journal, 7)
    (line,) = read_metrics(tmp_path)
    assert (line["negative_cosine_mean"], line["rows_touched"], line["head_cpu_seconds"]) == (-0.25, 11.0, 0.02)
    assert line["negative_cosine_max"] is None  # a batch without negatives; JSON has no NaN


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_loss_hex_is_the_float32_loss_to_the_bit(loss: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        with Journal(Path(folder), 1, world()) as journal:
            log(journal, 1, loss)
        (line,) = read_metrics(Path(folder))
        assert float.fromhex(line["loss_hex"]) == loss == line["loss"]


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    with Journal(tmp_path, 1, world()) as journal:
        log(journal, 1, math.nan)
        log(journal, 2, 1e300)
        journal.write_summary({"goodput": {"share": math.inf}, "list": (1, math.nan)})
    first, second = read_metrics(tmp_path)
    assert (first["loss"], first["loss_hex"]) == (None, "nan")
    assert (second["loss"], second["loss_hex"]) == (1e300, "inf")
    assert json.loads((tmp_path / "summary.json").read_text()) == {
        "format": 1,
        "goodput": {"share": None},
        "list": [1, None],
    }


def test_only_rank_0_writes_what_is_written_once(tmp_path: Path) -> None:
    with Journal(tmp_path, 1, world(rank=2)) as journal:
        log(journal, 1)
        journal.write_summary({"status": "completed"})
        journal.write_evaluation(1, {"retrieval": {}})
        journal.write_samples(step=1, epoch=0, position=5, ids=[4, 2, 0])
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")] == ["samples/attempt-1-rank-2.jsonl"]
    assert read_lines(tmp_path / "samples/attempt-1-rank-2.jsonl") == [
        {"attempt": 1, "step": 1, "epoch": 0, "position": 5, "ids": [4, 2, 0]}
    ]


def test_the_highest_attempt_of_a_step_stands(tmp_path: Path) -> None:
    for attempt, steps in ((1, (20, 40, 60)), (2, (40, 80))):
        with Journal(tmp_path, attempt, world()) as journal:
            for step in steps:
                log(journal, step)
                journal.write_evaluation(step, {"attempt was": attempt})
    expected = [(20, 1), (40, 2), (60, 1), (80, 2)]
    assert [(line["step"], line["attempt"]) for line in read_metrics(tmp_path)] == expected
    assert [(e["step"], e["evaluation"]["attempt was"]) for e in read_evaluations(tmp_path)] == expected


@pytest.mark.parametrize("cut", [1, 17, 60])
def test_a_line_cut_short_spoils_neither_its_neighbours_nor_the_next_attempt(tmp_path: Path, cut: int) -> None:
    with Journal(tmp_path, 1, world()) as journal:
        log(journal, 20)
        log(journal, 40)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    left = [20] if cut > 1 else [20, 40]  # without the newline alone the line is whole
    assert [line["step"] for line in read_metrics(tmp_path)] == left
    with Journal(tmp_path, next_attempt(tmp_path), world()) as journal:
        log(journal, 60)
    assert [(line["step"], line["attempt"]) for line in read_metrics(tmp_path)] == [(s, 1) for s in left] + [(60, 2)]


@given(st.binary(max_size=200))
def test_no_bytes_break_reading(junk: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "metrics.jsonl").write_bytes(b'{"step": 3, "attempt": 2}\n' + junk + b"\n[1]\n{" + b"[" * 9999)
        assert {"step": 3, "attempt": 2} in read_metrics(Path(folder))
        assert next_attempt(Path(folder)) == 3


def test_attempts_are_counted_even_if_one_died_before_its_first_line(tmp_path: Path) -> None:
    assert next_attempt(tmp_path / "missing") == 1
    Journal(tmp_path, next_attempt(tmp_path), world()).close()
    assert next_attempt(tmp_path) == 2
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "attempt-12-rank-0.jsonl").touch()
    (tmp_path / "samples" / "attempt-x-rank-0.jsonl").touch()
    assert next_attempt(tmp_path) == 13


def test_the_summary_is_replaced_whole(tmp_path: Path) -> None:
    with Journal(tmp_path, 1, world()) as journal:
        journal.write_summary({"status": "preempted"})
        journal.write_summary({"status": "completed"})
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "completed"
    assert not list(tmp_path.glob("*.tmp")) + list(tmp_path.glob(".*.tmp"))
