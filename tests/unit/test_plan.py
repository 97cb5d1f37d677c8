"""The planner against numbers worked out by hand, and how it scales."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from megaclass import config
from megaclass.errors import ConfigError
from megaclass.plan import Plan, check_fits, find, forecast, refuse


def configured(num_classes: int = 1000, **sections: Any) -> config.Config:
    content: dict[str, Any] = {
        "dataset": {"reader": "synthetic", "image_size": 16, "synthetic": {"num_classes": num_classes}},
        "backbone": {"name": "tiny", "dim": 512},
        "classifier": {"preset": "d-softmax-k", "sampling_rate": 1 / 64},
        "train": {"steps": 10, "global_batch_size": 4096},
    }
    for name, values in sections.items():
        content[name] = {**content.get(name, {}), **values}
    return config.validate(content)


def planned(num_classes: int, world_size: int, gpu: str = "h200", **sections: Any) -> Plan:
    return forecast(configured(**sections), num_classes, world_size, find(gpu))


SMALLEST: dict[str, Any] = {
    "classifier": {"row_dtype": "bfloat16", "preset": "d-softmax-k", "sampling_rate": 1 / 64},
    "optim": {"class_name": "adagrad"},
}


@pytest.mark.parametrize(
    ("num_classes", "world_size", "sections", "bytes_each"),
    [
        (10_000_000, 8, SMALLEST, 2 + 4 / 512),
        (100_000_000, 1, SMALLEST, 2 + 4 / 512),
        (10_000_000, 8, {}, 8),
        (10_000_000, 8, {"optim": {"class_name": "adamw"}}, 12 + 8 / 512),
        (10_000_000, 8, {"optim": {"momentum": 0.0}}, 4),
        (10_000_000, 8, {"classifier": {"sub_centres": 3}}, 24),
    ],
)
def test_rows_and_state_are_the_bytes_of_the_table(
    num_classes: int, world_size: int, sections: dict[str, Any], bytes_each: float
) -> None:
    parts = planned(num_classes, world_size, **sections).memory_bytes
    expected = num_classes * 512 / world_size * bytes_each
    assert parts["class rows"] + parts["row optimizer state"] == pytest.approx(expected, rel=1e-9)


def test_flops_are_six_products_where_slopes_are_kept_and_eight_where_not() -> None:
    # 4096 x 10M/8 x 1/64 logits take 320 MB in float32: computed again. A quarter of the batch is kept.
    plan = planned(10_000_000, 8, classifier={"batch_positives": False})
    assert plan.flops["head"] == pytest.approx(8 * 4096 * 512 * 10e6 / 8 / 64, rel=1e-4)
    small = planned(10_000_000, 8, classifier={"batch_positives": False}, train={"steps": 9, "global_batch_size": 1024})
    assert small.flops["head"] == pytest.approx(6 * 1024 * 512 * 10e6 / 8 / 64, rel=1e-4)


def test_flops_follow_the_rate_and_all_rows_move_for_a_sampled_batch() -> None:
    low, high = (
        planned(10_000_000, 8, classifier={"sampling_rate": rate, "batch_positives": False}) for rate in (0.05, 0.1)
    )
    assert high.flops["head"] == pytest.approx(2 * low.flops["head"], rel=1e-5)
    batch = planned(10_000_000, 8, classifier={"preset": "d-softmax-b"})
    assert batch.work.num_touched == 1_250_000
    assert batch.work.inter_batch == 64
    alone = planned(10_000_000, 8, classifier={"preset": "d-softmax-k", "sampler": "positives", "sampling_rate": None})
    assert alone.work.num_touched == 512


def test_memory_falls_with_ranks_and_fused_updates_have_no_gradient() -> None:
    peaks = [planned(20_000_000, ranks).peak_bytes for ranks in (1, 2, 4, 8)]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[0] > 4 * peaks[-1]
    fused = planned(10_000_000, 8, optim={"row_update": "fused", "clip_norm": None})
    assert fused.memory_bytes["row gradients"] == 0
    assert planned(10_000_000, 8).memory_bytes["row gradients"] > 0


def test_what_is_sent() -> None:
    sent = {one.what: one.sent_bytes for one in planned(10_000_000, 8).collectives}
    assert sent["embeddings"] == 7 * 512 * 512 * 4
    assert sent["embedding gradient"] == 7 * 512 * 512 * 4
    assert sent["sums over negatives"] == 2 * 7 * (4096 + 2) * 4 // 8
    assert planned(10_000_000, 1).collectives == []


def test_with_a_sixty_fourth_of_the_batch_a_thousand_ranks_send_a_sixtieth() -> None:
    """performance.md, 1.4: 8.4 and 0.5 MB instead of 536 with 1,024 ranks of 512 samples."""
    classifier = {"preset": "d-softmax-b", "sampling_rate": 1 / 64, "row_dtype": "bfloat16"}
    plan = planned(10_000_000, 1024, classifier=classifier, train={"global_batch_size": 1024 * 512})
    sent = {one.what: one.sent_bytes for one in plan.collectives}
    assert sent["embeddings"] == 1023 * 8 * 512 * 2
    assert sent["embeddings to owners"] == pytest.approx(512 * 512 * 2, rel=1e-2)
    assert sent["their gradient"] == 2 * sent["embeddings to owners"]
    every = planned(
        10_000_000, 1024, classifier=classifier | {"preset": "d-softmax-k"}, train={"global_batch_size": 1024 * 512}
    )
    assert {one.what: one.sent_bytes for one in every.collectives}["embeddings"] == 1023 * 512 * 512 * 2


def test_a_billion_classes_on_1024_ranks_take_no_time() -> None:
    start = time.perf_counter()
    plan = planned(1_000_000_000, 1024, **SMALLEST)
    assert time.perf_counter() - start < 2
    assert plan.work.num_rows == 976_563


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: find("h20"), r"gpu 'h20' is not known; did you mean .*h200"),
        (lambda: planned(1000, 0), "world size 0 is less than 1"),
        (lambda: planned(0, 1), "number of classes 0 is less than 1"),
        (lambda: planned(1000, 3), "4096 does not divide by 3 ranks"),
    ],
)
def test_mistakes(call: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()


def test_a_hopeless_run_is_refused_with_figures_and_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refuse, "available_bytes", lambda *_: 16 * 10**9)
    with pytest.raises(
        ConfigError, match=r"needs 4\d\.\d+ GB .* 16\.00 GB are there; the largest part is class rows"
    ) as e:
        check_fits(configured(), 10_000_000, 1, torch.device("cpu"))
    assert "4 ranks with as much memory each" in str(e.value)
    assert "bfloat16 rows with adagrad" in str(e.value)
    check_fits(configured(), 1_000_000, 1, torch.device("cpu"))


def test_ranks_of_a_node_share_its_memory() -> None:
    whole, half = (refuse.available_bytes(torch.device("cpu"), ranks) for ranks in (1, 2))
    assert whole is not None
    assert half == pytest.approx(whole / 2, rel=0.2)


HOSTED: dict[str, Any] = {
    "classifier": {"row_dtype": "bfloat16", "sampling_rate": 1 / 64, "row_memory": "host"},
    "optim": {"class_name": "adagrad", "row_update": "fused", "clip_norm": None},
}


def test_rows_on_the_host_leave_the_device_to_three_parts() -> None:
    """100 million classes x 512 in bfloat16 with four bytes of state: 102.8 GB on the host."""
    here, there = planned(100_000_000, 1, "h100", **HOSTED), planned(100_000_000, 1, "h100", **SMALLEST)
    assert here.host_bytes == 100_000_000 * (1024 + 4)
    assert there.host_bytes == 0
    assert here.memory_bytes["class rows"] == here.memory_bytes["row optimizer state"] == 0
    assert here.memory_bytes["rows visiting the device"] == 3 * here.work.num_touched * 1028
    assert here.peak_bytes < 12e9 < 79 * 2**30 < there.peak_bytes
    assert here.seconds["rows from the host"] == pytest.approx(here.work.num_touched * 1028 / 50e9)
    assert "memory of the host for this rank's class rows and their state: 102.80 GB" in here.to_text()
    assert there.seconds["rows from the host"] == 0


def test_on_a_cpu_both_memories_are_one() -> None:
    here = planned(1_000_000, 1, "cpu", **HOSTED)
    assert here.host_bytes == 0
    assert here.memory_bytes["class rows"] == 1_000_000 * 1024


def test_a_slow_link_bounds_the_step() -> None:
    plan = planned(100_000_000, 1, "v100", **HOSTED, train={"global_batch_size": 64})
    link = plan.seconds["rows from the host"]
    assert plan.step_seconds == link > plan.seconds["backbone"] + plan.seconds["head memory"]
    assert plan.bound == "rows from the host"


def test_the_host_is_asked_for_room_too(monkeypatch: pytest.MonkeyPatch) -> None:
    gib = 2**30
    monkeypatch.setattr(
        refuse, "available_bytes", lambda device, local=None: (64 if device.type == "cpu" else 79) * gib
    )
    with pytest.raises(ConfigError, match=r"row_memory host needs 102.80 GB of the host.s memory for each of its"):
        check_fits(configured(**HOSTED), 100_000_000, 1, torch.device("cuda"))
    with pytest.raises(ConfigError, match=r"classifier.row_memory host"):
        check_fits(configured(**{**HOSTED, "classifier": SMALLEST["classifier"]}), 100_000_000, 1, torch.device("cuda"))


def _backbone(**train: Any) -> dict[str, int]:
    sections: dict[str, Any] = {"backbone": {"name": "iresnet50"}, "dataset": {"image_size": 112}}
    return planned(10_000, 8, **sections, train={"global_batch_size": 1024, **train}).memory_bytes


def test_recomputing_keeps_the_inputs_of_the_blocks_and_one_inside() -> None:
    whole, recomputed = _backbone(), _backbone(activation_checkpointing=True)
    assert recomputed["backbone activations"] < 0.5 * whole["backbone activations"]
    assert _backbone(precision="float16")["backbone activations"] == whole["backbone activations"] // 2
    plain, twice = (
        planned(1000, 1, backbone={"name": "vit-tiny"}, train={"activation_checkpointing": one})
        for one in (False, True)
    )
    # Nearly all of the network is in blocks: a fourth pass beside forward and twice backward.
    assert 3.9 / 3 < twice.flops["backbone"] / plain.flops["backbone"] < 4 / 3


def test_a_backbone_in_parts_is_held_once_over_all_ranks() -> None:
    whole, parts = _backbone(), _backbone(strategy="fsdp")
    assert parts["backbone optimizer state"] == -(-whole["backbone optimizer state"] // 8)
    # An eighth; the matrix at the end, 25,088 x 512 (with the stem and two norms); and two blocks of 2 x 512 x 512 x 9.
    expected = whole["backbone parameters"] / 8 + 4 * (25_088 * 512 + 2 * 2 * 512 * 512 * 9)
    assert parts["backbone parameters"] == pytest.approx(expected, rel=0.01)
    assert parts["backbone gradients"] < whole["backbone gradients"]
    kept, summed = _backbone(strategy="fsdp", fsdp_reshard=False), _backbone(strategy="fsdp", accumulation_steps=2)
    assert kept["backbone parameters"] > whole["backbone parameters"]
    assert summed["backbone gradients"] > parts["backbone gradients"]
    sent = {one.what: one.sent_bytes for one in planned(10_000, 8, train={"strategy": "fsdp"}).collectives}
    assert sent["backbone parameters"] == 2 * sent["backbone gradient"]


def test_deepspeed_holds_an_eighth_of_what_its_stage_takes_apart() -> None:
    whole = _backbone()
    assert _backbone(strategy="deepspeed", zero_stage=0) == whole
    size, held = whole["backbone parameters"], -(-whole["backbone parameters"] // 8)
    for stage, parameters in ((None, size + held), (2, size + held), (3, size + 2 * held)):
        parts = _backbone(strategy="deepspeed", zero_stage=stage)
        assert parts["backbone optimizer state"] == held
        assert parts["backbone parameters"] == parameters
        assert parts["backbone gradients"] == size + held
