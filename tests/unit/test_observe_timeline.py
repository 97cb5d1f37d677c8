"""Timelines of traces made by hand, on a CPU and on a GPU; every number can be counted on the fingers."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.profiler import ProfilerActivity, profile

from megaclass import marks
from megaclass.errors import DataError
from megaclass.observe.profile import from_json, read_timelines, tables, to_json, trace_path, write_summary
from megaclass.observe.timeline import read, summarise

HOST, BACKWARD, GLOO, STREAM, NCCL = 1, 2, 3, 7, 8


def event(name: str, category: str, start: int, stop: int, thread: int = HOST, correlation: int | None = None) -> Any:
    made = {"ph": "X", "name": name, "cat": category, "ts": start, "dur": stop - start, "pid": 1, "tid": thread}
    return made if correlation is None else {**made, "args": {"correlation": correlation}}


def mark(name: str, start: int, stop: int, thread: int = HOST) -> Any:
    return event(marks.PREFIX + name, "user_annotation", start, stop, thread)


def trace(*events: Any) -> dict[str, Any]:
    return {"traceEvents": [{"ph": "M", "name": "process_name", "args": {}}, *events]}


# Two steps from 0 to 100 and from 200 to 300; what happens between them, and before, counts for nothing.
ON_CPU = trace(
    mark("step", 0, 100), mark("step", 200, 300),
    mark("data wait", 0, 10), mark("backbone forward", 10, 40), mark("gather", 20, 30),
    mark("backbone backward", 40, 80), mark("weight pass", 50, 70), mark("norm", 90, 100), mark("norm", 280, 300),
    event("aten::conv2d", "cpu_op", 12, 20), event("aten::_convolution", "cpu_op", 13, 19),
    event("aten::mm", "cpu_op", 30, 36), event("aten::mm", "cpu_op", 50, 70), event("aten::add", "cpu_op", 95, 130),
    event("aten::random", "cpu_op", 0, 300, thread=9),  # a reader's thread
    event("ClassLayerBackward", "cpu_op", 40, 80),  # not an operator: it waits as well
    event("aten::copy_", "cpu_op", 60, 64, thread=GLOO),
    # Handed over at 22, 45, 55 and 281, in this order; gloo has one thread and comes to the third late.
    event("c10d::_allgather_base_", "cpu_op", 22, 23), event("c10d::allreduce_", "cpu_op", 45, 46),
    event("c10d::_reduce_scatter_base_", "cpu_op", 55, 56), event("c10d::allreduce_", "cpu_op", 281, 282),
    event("gloo:all_gather", "user_annotation", 24, 34, thread=GLOO),
    event("gloo:all_reduce", "user_annotation", 46, 60, thread=GLOO),
    event("gloo:all_reduce", "user_annotation", 62, 82, thread=GLOO),
    event("gloo:all_reduce", "user_annotation", 290, 310, thread=GLOO),
)  # fmt: skip


def test_parts_take_their_time_from_those_around_them() -> None:
    found = summarise(ON_CPU, 3)
    assert (found.rank, found.num_steps) == (3, 2)
    assert found.step_seconds == pytest.approx(100e-6)
    microseconds = {name: 2e6 * value for name, value in found.host_seconds.items()}
    assert microseconds == pytest.approx(
        {"data wait": 10, "backbone forward": 20, "gather": 10, "backbone backward": 20, "weight pass": 20, "norm": 30}
    )
    assert found.device_seconds == {}


def test_what_gloo_does_beside_operators_is_hidden() -> None:
    found = summarise(ON_CPU, 0)
    # Operators of the training thread within the steps: 12-20, 30-36, 50-70, 95-100.
    assert 2e6 * found.compute_seconds == pytest.approx(8 + 6 + 20 + 5)
    both = {name: (2e6 * one.seconds, 2e6 * one.hidden_seconds) for name, one in found.kinds.items()}
    assert both == {
        "gather": pytest.approx((10, 4)),
        "gradient reduction": pytest.approx((14, 10)),
        "weight pass": pytest.approx((20, 8)),
        "norm": pytest.approx((10, 0)),
    }
    assert 2e6 * found.communication.seconds == pytest.approx(54)
    assert found.communication.hidden_share == pytest.approx(22 / 54)


def test_a_collective_across_the_edge_of_the_trace_is_counted_all_the_same() -> None:
    """Its start is not in the trace, so that numbers differ; the last start before each is taken then."""
    events = [one for one in ON_CPU["traceEvents"] if one["name"] != "c10d::_allgather_base_"]
    found = summarise({"traceEvents": events}, 0)
    assert found.communication == summarise(ON_CPU, 0).communication
    assert 2e6 * found.kinds["other"].seconds == pytest.approx(10)


ON_GPU = trace(
    mark("step", 0, 100),
    mark("backbone forward", 0, 10), mark("class layer forward", 10, 20), mark("gather", 12, 14),
    mark("backbone backward", 20, 60), mark("reduce-scatter", 22, 24, BACKWARD), mark("weight pass", 24, 30, BACKWARD),
    event("cudaLaunchKernel", "cuda_runtime", 1, 2, correlation=1), event("gemm", "kernel", 5, 25, STREAM, 1),
    event("cudaLaunchKernelExC", "cuda_runtime", 13, 14, correlation=2),
    event("ncclDevKernel_AllGather_RING_LL", "kernel", 25, 35, NCCL, 2),
    event("cudaMemcpyAsync", "cuda_runtime", 15, 16, correlation=3),
    event("Memcpy DtoD", "gpu_memcpy", 26, 28, STREAM, 3),
    event("cudaLaunchKernelExC", "cuda_runtime", 23, 24, BACKWARD, 4),
    event("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL", "kernel", 40, 50, NCCL, 4),
    event("cuLaunchKernel", "cuda_driver", 25, 26, BACKWARD, 5), event("_row_pass", "kernel", 38, 56, STREAM, 5),
    event("cudaLaunchKernel", "cuda_runtime", 31, 32, BACKWARD, 6), event("wgrad", "kernel", 56, 90, STREAM, 6),
    event("cudaLaunchKernelExC", "cuda_runtime", 40, 41, BACKWARD, 7),
    event("ncclDevKernel_AllReduce_Sum_f32_RING_LL", "kernel", 80, 120, NCCL, 7),
    event("aten::mm", "cpu_op", 0, 100),  # the host only starts kernels
)  # fmt: skip


def test_kernels_count_for_the_part_that_started_them() -> None:
    found = summarise(ON_GPU, 0)
    microseconds = {name: 1e6 * value for name, value in found.device_seconds.items()}
    assert microseconds == pytest.approx(
        {
            "backbone forward": 20, "class layer forward": 2, "gather": 10, "reduce-scatter": 10, "weight pass": 18,
            "backbone backward": 44,
        }
    )  # fmt: skip
    assert 1e6 * found.compute_seconds == pytest.approx(20 + 2 + 18 + 34)
    assert 1e6 * found.host_seconds["backbone backward"] == pytest.approx(32)
    both = {name: (1e6 * one.seconds, 1e6 * one.hidden_seconds) for name, one in found.kinds.items()}
    assert both == {
        "gather": pytest.approx((10, 2)),
        "reduce-scatter": pytest.approx((10, 10)),
        "gradient reduction": pytest.approx((20, 10)),
    }
    assert found.communication.hidden_share == pytest.approx(22 / 40)


def test_without_communication_nothing_is_hidden() -> None:
    found = summarise(trace(mark("step", 0, 10), event("aten::mm", "cpu_op", 1, 9)), 0)
    assert (found.communication.seconds, found.communication.hidden_share, found.kinds) == (0, None, {})


def test_a_timeline_goes_through_json() -> None:
    found = summarise(ON_GPU, 2)
    assert from_json(json.loads(json.dumps(to_json(found)))) == found


def test_traces_of_a_run_become_a_summary_and_tables(tmp_path: Path) -> None:
    (tmp_path / "profile").mkdir()
    for rank, content in {0: ON_CPU, 1: ON_GPU, 10: ON_CPU}.items():
        trace_path(tmp_path, rank).write_bytes(gzip.compress(json.dumps(content).encode()))
    timelines = read_timelines(tmp_path)
    assert [one.rank for one in timelines] == [0, 1, 10]
    summary = write_summary(tmp_path, timelines)
    assert json.loads((tmp_path / "profile" / "summary.json").read_text()) == summary
    # Of all ranks' communication: 27 + 40 + 27 microseconds a step, of which 11 + 22 + 11 are hidden.
    assert summary["hidden_share"] == pytest.approx(44 / 94)
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(tables(timelines))
    text = console.export_text()
    assert "device ms" in text
    assert "gradient reduction" in text
    assert "46.81%" in text


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"no json", r"trace .*rank-0\.json\.gz cannot be read"),
        (gzip.compress(b"[]"), r"has no list traceEvents; give a trace that run\.profile has written"),
        (gzip.compress(b'{"traceEvents": []}'), r"the trace of rank 0 holds no step"),
    ],
    # Compressed bytes hold the time, and names of tests must not differ between processes.
    ids=["not compressed", "no object", "no event"],
)
def test_a_file_that_is_no_trace_of_a_run_is_refused(tmp_path: Path, content: bytes, fault: str) -> None:
    (tmp_path / "profile").mkdir()
    trace_path(tmp_path, 0).write_bytes(content)
    with pytest.raises(DataError, match=fault):
        read_timelines(tmp_path)


def test_a_run_without_a_profile_is_told_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no profile; train it with --run\.profile 5"):
        read_timelines(tmp_path)


def test_marks_are_seen_by_any_torch_profiler_and_are_nothing_without_one(tmp_path: Path) -> None:
    assert marks.part("gather") is marks.part("sums")  # one object that does nothing
    with profile(activities=[ProfilerActivity.CPU]) as profiler, marks.part(marks.STEP), marks.part("sums"):
        torch.ones(3).sum()
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    found = summarise(read(tmp_path / "trace.json"), 0)
    assert found.num_steps == 1
    assert 0 < found.compute_seconds <= found.host_seconds["sums"] <= found.step_seconds
