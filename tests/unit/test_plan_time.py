"""The step-time model: formulas against numbers worked out by hand, limits, and what must rise or fall."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megaclass import plan
from megaclass.errors import ConfigError
from megaclass.parallel.process import World
from megaclass.plan import backbone, failures, links, machine, operators, program, step, straggling, time_gpu
from megaclass.plan import work as counted
from megaclass.plan.time_cpu import cpu_time, messages
from megaclass.train import build
from tests.unit.test_plan import configured

H100 = plan.find("h100")


def parts(num_classes: int, ranks: int, **sections: Any) -> tuple[Any, counted.Work, program.Program]:
    config = configured(num_classes, **sections)
    preset = build.resolve_preset(config)
    work = counted.count(config, preset, num_classes, ranks)
    return config, work, program.program(config, preset, work, device_type="cpu")


@pytest.mark.parametrize(
    ("ranks", "deviations"), [(2, 1 / math.sqrt(math.pi)), (3, 1.5 / math.sqrt(math.pi)), (1000, 3.2414)]
)
def test_the_slowest_of_many(ranks: int, deviations: float) -> None:
    """Expectations of the largest of 2 and 3 normal values are known exactly, of 1,000 from tables."""
    assert straggling.slowest(10.0, 1.0, ranks) == pytest.approx(10 + deviations, abs=0.03)
    assert straggling.slowest(10.0, 1.0, 1) == straggling.slowest(10.0, 0.0, ranks) == 10


@given(st.integers(1, 100_000), st.floats(0, 1))
def test_more_ranks_have_a_slower_one(ranks: int, deviation: float) -> None:
    assert straggling.slow_by(2 * ranks, deviation) >= straggling.slow_by(ranks, deviation) >= 1


def test_goodput_of_the_reliability_goals() -> None:
    """512 GPUs, a failure in 12 h, 10 minutes between checkpoints, 3 to restart: (5 + 3) minutes in 720 are lost."""
    found = failures.goodput(600, 0, 180, 12 * 3600)
    assert 1 - found == pytest.approx(8 / 720, rel=0.02)
    assert failures.goodput(600, 60, 180, math.inf) == 600 / 660
    assert failures.goodput(1e6, 60, 180, 10) == 0
    job = failures.Failures(gpu_mtbf_hours=512 * 12)
    assert job.job_mtbf_seconds(512) == 12 * 3600
    assert failures.Failures().gpu_mtbf_hours == pytest.approx(50_676, rel=1e-4)


def test_the_best_interval_is_youngs_where_saving_is_short() -> None:
    assert failures.best_interval(2, 1e6) == pytest.approx(math.sqrt(2 * 2 * 1e6), rel=0.01)
    assert failures.best_interval(100, 40) == 40


@given(st.floats(0.1, 1e3), st.floats(1, 1e3), st.floats(1e4, 1e7), st.floats(1.2, 5))
def test_no_other_interval_is_better(blocked: float, restart: float, mtbf: float, factor: float) -> None:
    best = failures.best_interval(blocked, mtbf)
    most = failures.goodput(best, blocked, restart, mtbf)
    for other in (best * factor, best / factor):
        assert failures.goodput(other, blocked, restart, mtbf) <= most * (1 + 1e-6)
    assert sum(failures.losses(best, blocked, restart, mtbf).values()) == pytest.approx(1)
    assert failures.goodput(best, blocked, restart, 2 * mtbf) >= most


def test_links_by_hand() -> None:
    near, far = links.Layout(8, 8), links.Layout(1024, 8)
    # 7/8 of 512 samples x 512 x 2 bytes x 8 over NVLink: 3.67 MB at 360 GB/s, and 20 + 7 us until it begins.
    assert links.seconds(H100, near, "all-gather", 7 * 512 * 1024) == pytest.approx(27e-6 + 3.67e6 / 360e9, rel=1e-3)
    # 1,024 ranks: what is gathered enters each node over 8 cards, 127 parts of 0.5 MB each.
    start = links.ring_start(H100, far)
    assert start == pytest.approx(128 * 5e-6 + 896e-6)
    gathered = links.seconds(H100, far, "all-gather", 1023 * 512 * 1024)
    assert gathered - start - 20e-6 == pytest.approx(127 * 512 * 1024 / 45e9)
    assert links.seconds(H100, links.Layout(1, 8), "all-reduce", 0) == 0
    # A small all-reduce takes the tree.
    assert links.seconds(H100, far, "all-reduce", 8) == pytest.approx(20e-6 + 2 * (7e-6 + 7 * 5e-6), rel=1e-3)


@given(
    st.integers(1, 10),
    st.sampled_from(["all-reduce", "all-gather", "reduce-scatter", "all-to-all"]),
    st.floats(0, 1e10),
)
def test_links_rise_with_ranks_and_bytes(power: int, name: str, sent: float) -> None:
    fewer, more = links.Layout(2**power, 8), links.Layout(2 ** (power + 1), 8)

    def of_a_tensor(layout: links.Layout) -> float:
        # What a ring sends of it: an all-reduce twice all but one part, the others all other ranks' parts.
        share = 2 * (layout.ranks - 1) / layout.ranks if name == "all-reduce" else layout.ranks - 1
        return links.seconds(H100, layout, name, share * sent)

    assert of_a_tensor(more) >= of_a_tensor(fewer) * (1 - 1e-9) > 0
    assert links.seconds(H100, fewer, name, 2 * sent) >= links.seconds(H100, fewer, name, sent)


@given(st.integers(1, 10**6), st.integers(1, 10**6), st.integers(1, 10**6))
def test_no_product_is_faster_than_the_device(rows: int, columns: int, inner: int) -> None:
    share = time_gpu.tile_share(rows, columns, inner, H100)
    assert 0 < share < 1
    assert time_gpu.tile_share(2**14, 2**14, 2**14, H100) > 0.99


def test_operators_are_counted_without_memory() -> None:
    with operators.recorded() as recorder:
        left, right = torch.empty(1 << 20, 1 << 10), torch.empty(1 << 10, 1 << 18)
        recorder.calls.clear()
        left @ right  # a terabyte
        left[torch.empty(7, dtype=torch.int64)]
    found = {one.kind: one for one in recorder.calls}
    assert found["mm"].flops == 2 << (20 + 10 + 18)
    assert found["mm"].num_bytes == 4 * ((1 << 30) + (1 << 28) + (1 << 38))
    assert found["index"].num_bytes == 2 * 7 * 4096 + 7 * 8


def _really_called(config: Any) -> operators.Calls:
    """Calls of a real step on real tensors, after one."""
    from megaclass.train.loop import train_step

    training = build.build(config, World(0, 1, 0, torch.device("cpu"), None, None))
    batches = iter(training.reader)
    train_step(training, batches, lambda _: None)
    training.step = 1

    class Real(operators.Recorder):
        def _answer(self, kind: str, args: Any) -> Any:
            return None

    with Real(lambda number: number) as recorder:
        train_step(training, batches, lambda _: None)
    training.reader.close()
    return recorder.calls


@pytest.mark.parametrize(
    ("preset", "rate", "kind"),
    [("d-softmax", None, "sgd"), ("d-softmax-k", 0.5, "adamw"), ("partial-fc", 0.3, "sgd")],
)
def test_the_program_is_what_a_step_calls(preset: str, rate: float | None, kind: str) -> None:
    """Three chunks and a part of one, where two were recorded: operations as counted in a real step."""
    config = configured(
        7001, classifier={"preset": preset, "sampling_rate": rate}, backbone={"dim": 32}, optim={"class_name": kind},
        train={"global_batch_size": 24, "steps": 9},
    )  # fmt: skip
    real = _really_called(config)
    work = counted.count(config, build.resolve_preset(config), 7001, 1)
    told = operators.total(
        *program.program(config, build.resolve_preset(config), work, device_type="cpu").parts.values()
    )
    for name in ("mm", "addmm", "convolution", "convolution_backward", "native_batch_norm", "exp_", "silu_backward"):
        wanted = [(one.flops, one.num_bytes, count) for one, count in real.items() if one.kind == name]
        found = [(one.flops, one.num_bytes, count) for one, count in told.items() if one.kind == name]
        for number in (0, 1):
            assert sum(one[number] * one[2] for one in found) == pytest.approx(
                sum(one[number] * one[2] for one in wanted), rel=0.02
            ), name
    moved = [sum(one.num_bytes * n for one, n in calls.items() if not one.is_free) for calls in (real, told)]
    assert moved[1] == pytest.approx(moved[0], rel=0.15)


def _machine(ranks: int, known: dict[str, machine.Known], **more: Any) -> machine.Machine:
    message = machine.Message((1e-4, 1e-9), (5e-5, 1e-9))
    names = ("all-reduce", "maximum", "all-gather", "reduce-scatter", "all-to-all")
    return machine.Machine("m", 2, ranks, 1e11, 1e10, 2e-6, 0.0, known, dict.fromkeys(names, message), **more)


def test_a_machine_is_kept_and_refused(tmp_path: Path) -> None:
    known = {"a": machine.Known("mm", 100, 10, 1e-3)}
    made = _machine(2, known, wrapper=(1e-3, 2e-6))
    made.save(tmp_path / "m.json")
    assert machine.load(tmp_path / "m.json") == made
    (tmp_path / "m.json").write_text("{}")
    with pytest.raises(ConfigError, match="not a profile of a machine"):
        machine.load(tmp_path / "m.json")
    with pytest.raises(ConfigError, match="megaclass bench machine"):
        machine.load(tmp_path / "none.json")


def test_an_unknown_operator_is_scaled_from_the_nearest_of_its_kind() -> None:
    with operators.recorded() as recorder:
        torch.empty(100, 100) @ torch.empty(100, 200)
        torch.empty(100, 100).exp()
    product, exponential = (next(one for one in recorder.calls if one.kind == kind) for kind in ("mm", "exp"))
    known = {
        "near": machine.Known("mm", product.flops // 2, product.num_bytes // 2, 1e-3),
        "far": machine.Known("mm", 1000 * product.flops, product.num_bytes, 5.0),
    }
    found = _machine(1, known)
    assert found.seconds(product) == (pytest.approx(2e-3, rel=1e-2), "scaled")
    assert found.seconds(exponential) == (exponential.num_bytes / 1e10, "floor")
    known[product.key] = machine.Known("mm", product.flops, product.num_bytes, 7.0)
    assert _machine(1, known).seconds(product) == (7.0, "measured")


def test_processor_time_is_the_sum_of_what_is_called() -> None:
    config, work, calls = parts(1000, 2, train={"global_batch_size": 32, "steps": 9}, backbone={"batch_norm": "sync"})
    network = backbone.trace(config, work.batch)
    exchanges = step.collectives(config, build.resolve_preset(config), work, network)
    everything = operators.total(*calls.parts.values())
    known = {one.key: machine.Known(one.kind, one.flops, one.num_bytes, 1e-5) for one in everything if not one.is_free}
    found = cpu_time(
        config, work, calls, network, exchanges, _machine(2, known, sample_seconds=1e-3, wrapper=(1e-3, 1e-5))
    )
    number = sum(count for one, count in everything.items() if not one.is_free)
    assert found.cpu["data"] == 16 * 1e-3
    assert network.num_tensors == len(
        list(build.build_backbone(config, World(0, 1, 0, torch.device("cpu"), None, None)).parameters())
    )
    assert found.cpu["wrapper"] == pytest.approx(1e-3 + 1e-5 * network.num_tensors)
    assert found.cpu["calls from Python"] == pytest.approx(number * 2e-6)
    assert sum(found.cpu[name] for name in calls.parts) == pytest.approx(number * 1e-5)
    # One per batch norm forward and backward, and those of the class layer and the backbone; half of each start waits.
    assert found.waits["messages"] == pytest.approx((2 * 11 + sum(one.count for one in exchanges)) * 5e-5, rel=1e-6)
    assert found.wall_seconds == pytest.approx(found.cpu_seconds + found.waits["messages"])
    assert found.sources == {"measured": 1.0, "scaled": 0.0, "floor": 0.0}
    with pytest.raises(ConfigError, match="measured with 3 ranks at once and the run has 2"):
        cpu_time(config, work, calls, network, exchanges, _machine(3, known))


def test_messages_are_the_tensors_of_a_rank() -> None:
    config, work, calls = parts(
        999, 4, train={"global_batch_size": 64, "steps": 9}, backbone={"dim": 32},
        classifier={"preset": "d-softmax-b", "sampling_rate": 0.25},
    )  # fmt: skip
    network = backbone.trace(config, work.batch)
    exchanges = step.collectives(config, build.resolve_preset(config), work, network)
    found = dict(zip((one.what for one in exchanges), messages(work, calls, exchanges), strict=False))
    assert found["labels"] == ("all-gather", 16 * 8, 1)
    assert found["embeddings"] == ("all-gather", 4 * 32 * 4, 1)
    assert found["embeddings to owners"] == ("all-to-all", 16 * 32 * 4, 1)
    assert found["embedding gradient"] == ("reduce-scatter", 4 * 4 * 32 * 4, 1)
    assert found["sums over negatives"] == ("all-reduce", pytest.approx((16 + 2) * 4, abs=4), 1)
    assert found["backbone gradient"] == ("all-reduce", pytest.approx(network.parameter_bytes, rel=1e-4), 1)


SMALL: dict[str, Any] = {
    "classifier": {"row_dtype": "bfloat16", "preset": "d-softmax-k", "sampling_rate": 1 / 64},
    "optim": {"class_name": "adagrad"},
}


def test_a_billion_classes_on_1024_gpus_take_seconds_and_no_memory() -> None:
    begin = time.process_time()
    row = plan.scale(configured(**SMALL), 1_000_000_000, 1024, H100, plan.Scenario())
    assert time.process_time() - begin < 20
    assert row.fits
    assert row.checkpoint_bytes == pytest.approx(1e9 / 1024 * (1024 + 4), rel=0.02)
    assert sum(row.shares.values()) == pytest.approx(1)
    assert row.useful_samples_per_second < row.samples_per_second < 4096 / row.time.parts["class layer"]
    assert json.dumps(row.to_json())
    assert "never measured" in row.to_text()
    assert "1,000,000,000 classes" in plan.table([row], H100)


def test_what_makes_a_step_longer() -> None:
    config, work, calls = parts(1_000_000, 8, **SMALL)
    network = backbone.trace(config, work.batch)
    exchanges = step.collectives(config, build.resolve_preset(config), work, network)

    def taken(**more: Any) -> time_gpu.GpuTime:
        return time_gpu.gpu_time(config, work, calls, network, exchanges, H100, **more)

    alone = taken()
    assert taken(jitter=0.05).seconds > alone.seconds
    assert taken(per_node=1).seconds > alone.seconds
    assert taken(decode_rate=1e9).data_wait == 0
    slow = taken(decode_rate=100.0)
    assert slow.seconds == pytest.approx(512 / 100)
    assert slow.limit == "waiting for data"
    assert alone.seconds == pytest.approx(sum(alone.parts.values()) + sum(alone.exposed.values()))
    # The host issues the chunks' operators more slowly than a GPU does them.
    assert "class rows" in alone.issue_bound
    more = parts(4_000_000, 8, **SMALL)
    exchanges = step.collectives(more[0], build.resolve_preset(more[0]), more[1], network)
    longer = time_gpu.gpu_time(more[0], more[1], more[2], network, exchanges, H100)
    # Four times the rows, and the draw and the batch's own classes as before.
    assert 4 * alone.parts["class layer"] > longer.parts["class layer"] > 1.5 * alone.parts["class layer"]
    assert longer.parts["backbone forward"] == alone.parts["backbone forward"]


def test_the_fused_kernel_is_one_operator_of_the_heads_operations() -> None:
    classifier = {**SMALL["classifier"], "kernel": "triton"}
    config, work, calls = parts(1_000_000, 8, classifier=classifier, optim=SMALL["optim"])
    fused = [
        one for name in ("class layer", "class rows") for one in calls.parts[name] if one.kind == "fused_class_layer"
    ]
    assert sum(one.flops for one in fused) == pytest.approx(step.head_flops(config, work), rel=1e-6)
    taken = sum(time_gpu.operator_seconds(one, H100, True) for one in fused)
    assert taken == pytest.approx(step.head_flops(config, work) / (0.75 * H100.bf16_flops), rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mtbf_hours": 0.0}, "--mtbf-hours 0.0 must be a positive number"),
        ({"storage_gb": math.inf}, "--storage-gb inf must be a positive number"),
        ({"jitter": -1.0}, "--jitter -1.0 must be a number of at least 0"),
        ({"gpus_per_node": -8}, "--gpus-per-node -8 must be a positive number"),
    ],
)
def test_impossible_clusters(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan.scenario(**options)
    assert plan.scenario() == plan.Scenario()
