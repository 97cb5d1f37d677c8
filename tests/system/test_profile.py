"""`run.profile` in real runs: the traces, the summary, what is hidden, and that the run is the same without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megaclass import cli, config
from megaclass.errors import ConfigError
from megaclass.marks import PREFIX
from megaclass.observe.journal import read_metrics
from megaclass.observe.profile import trace_path
from megaclass.observe.timeline import read
from megaclass.parallel.process import World
from megaclass.train.recorder import Recorder
from tests.support.spawn import spawn
from tests.support.training import small_config, small_dataset, train_all

STEPS = {"steps": 8}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two ranks: without a profile, with one of three steps after two, and one that comes to an end in the middle."""
    folder = tmp_path_factory.mktemp("profile")
    data = small_dataset(folder / "data")
    contents = {
        "off": small_config(data, folder / "off", train=STEPS),
        "on": small_config(data, folder / "on", train=STEPS, run={"profile": 3, "profile_after": 2}),
        "again": small_config(data, folder / "on", train=STEPS, run={"profile": 3, "profile_after": 1}),
    }
    assert spawn(train_all, 2, list(contents.values())) == [[0, 0, 0]] * 2
    return {name: folder / name for name in contents}


@pytest.mark.distributed
def test_a_profiled_run_takes_the_same_steps(runs: dict[str, Path]) -> None:
    off, on = ([line["loss_hex"] for line in read_metrics(runs[name])] for name in ("off", "on"))
    assert len(off) == 8
    assert on == off
    assert not (runs["off"] / "profile").exists()


@pytest.mark.distributed
def test_every_rank_has_a_trace_and_the_summary_is_of_all(runs: dict[str, Path], capsys: Any) -> None:
    folder = runs["on"] / "profile"
    assert sorted(path.name for path in folder.iterdir()) == ["rank-0.json.gz", "rank-1.json.gz", "summary.json"]
    summary = json.loads((folder / "summary.json").read_text())
    assert [one["rank"] for one in summary["ranks"]] == [0, 1]
    for rank in summary["ranks"]:
        assert rank["num_steps"] == 3
        host, kinds = rank["host_seconds"], rank["kinds"]
        assert {"data wait", "backbone forward", "class layer forward", "gather", "sums", "backbone backward"} <= set(
            host
        )
        assert {"reduce-scatter", "weight pass", "norm", "row update", "label gather"} <= set(host)
        assert set(kinds) == {
            "label gather", "gather", "sums", "reduce-scatter", "batch norm", "gradient reduction", "norm"
        }  # fmt: skip
        assert 0 < sum(host.values()) <= rank["step_seconds"]
        assert rank["compute_seconds"] < rank["step_seconds"]
        for kind in (*kinds.values(), rank["communication"]):
            assert 0 <= kind["hidden_seconds"] <= kind["seconds"] < rank["step_seconds"]
    assert 0 < summary["hidden_share"] < 1
    assert cli.main(["profile", str(runs["on"]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == summary
    assert cli.main(["profile", str(runs["on"])]) == 0
    assert "reduce-scatter" in capsys.readouterr().out


@pytest.mark.distributed
def test_what_can_travel_is_sent_before_what_can_hide_it(runs: dict[str, Path]) -> None:
    """Labels before the backbone, embeddings before the draw, their gradient before the class-row pass."""
    trace = read(trace_path(runs["on"], 0))
    marks = sorted(
        (one["ts"], one["name"].removeprefix(PREFIX)) for one in trace["traceEvents"]
        if one.get("cat") == "user_annotation" and one["name"].startswith(PREFIX)
    )  # fmt: skip
    names = [name for _, name in marks if name not in ("batch norm", "row update")]
    step = [
        "step", "data wait", "label gather", "backbone forward", "class layer forward", "gather",
        "class layer forward", "label gather", "gather", "sums", "backbone backward", "class layer backward",
        "reduce-scatter", "weight pass", "reduce-scatter", "update", "norm",
    ]  # fmt: skip
    assert names == step * 3


@pytest.mark.distributed
def test_too_few_steps_left_are_said_in_the_log(runs: dict[str, Path]) -> None:
    """The run of eight steps was complete when it was started again: none of its steps is left to be recorded."""
    text = (runs["on"] / "train.log").read_text()
    assert "no step is profiled: run.profile_after 1 and run.profile 3 are more than the 0 steps left" in text


def test_more_steps_than_the_run_has_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"run\.profile 3 after run\.profile_after 6 steps is more than train\.steps 8"
    ):
        config.validate(small_config(tmp_path, tmp_path, train=STEPS, run={"profile": 3, "profile_after": 6}))


def test_a_profile_that_cannot_be_written_does_not_end_the_run(tmp_path: Path) -> None:
    content = small_config(
        small_dataset(tmp_path / "data"), tmp_path / "run", train=STEPS, run={"profile": 1, "profile_after": 1}
    )
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "profile").write_text("a file where the folder should be")
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(content))
    assert cli.main(["train", str(path)]) == 0
    assert "the trace of rank 0 could not be written" in (tmp_path / "run" / "train.log").read_text()
    assert len(read_metrics(tmp_path / "run")) == 8


def test_a_run_that_ends_in_the_middle_stops_the_profiler(tmp_path: Path) -> None:
    recorder = Recorder(
        config.Run(dir=tmp_path, profile=3, profile_after=1), World(0, 1, 0, torch.device("cpu"), None, None), 4, 20
    )
    recorder.record(5)
    assert torch.autograd.profiler._is_profiler_enabled
    recorder.close()
    assert not torch.autograd.profiler._is_profiler_enabled
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_a_profile_has_none_to_show(tmp_path: Path, capsys: Any) -> None:
    assert cli.main(["profile", str(tmp_path)]) == 3
    assert "holds no profile; train it with --run.profile 5" in capsys.readouterr().err
