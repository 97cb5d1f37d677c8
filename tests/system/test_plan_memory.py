"""The planner's memory beside the measured peak of training steps, each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

FULL = {"preset": "d-softmax"}


def sampled(rate: float, **more: Any) -> dict[str, Any]:
    return {"preset": "d-softmax-k", "sampling_rate": rate, **more}


@pytest.mark.parametrize(
    ("classifier", "optim", "accumulation"),
    [
        (sampled(1 / 64), {"class_name": "sgd"}, 1),
        (sampled(0.1), {"class_name": "adamw"}, 1),
        (FULL, {"class_name": "sgd"}, 1),
        (FULL, {"class_name": "sgd", "row_update": "fused", "clip_norm": None}, 1),
        (sampled(0.1, row_dtype="bfloat16"), {"class_name": "adagrad"}, 1),
        (sampled(0.1), {"class_name": "adagrad"}, 4),
    ],
    ids=["sampled", "adamw", "full", "fused", "bfloat16", "accumulated"],
)
def test_the_forecast_is_within_a_tenth(classifier: dict[str, Any], optim: dict[str, Any], accumulation: int) -> None:
    options = {
        "dataset": {
            "reader": "synthetic", "image_size": 16, "channels": 1,
            "synthetic": {"num_classes": 400_001, "samples_per_class": 2},
        },
        "backbone": {"name": "tiny", "dim": 128},
        "classifier": classifier,
        "optim": optim,
        "train": {"steps": 2, "global_batch_size": 64, "accumulation_steps": accumulation},
    }  # fmt: skip
    command = [sys.executable, "-m", "tests.support.peak_of_steps", json.dumps(options)]
    # The heap of one and the same run is up to a fifth larger when its free blocks happen not to fit: 164 to 203 MB
    # were seen for bfloat16 rows. What the run needs is the least of a few.
    least: dict[str, Any] = {"measured": float("inf")}
    for _ in range(6):
        done = subprocess.run(command, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr
        least = min(least, json.loads(done.stdout), key=lambda found: found["measured"])
        if least["forecast"] == pytest.approx(least["measured"], rel=0.1):
            return
    raise AssertionError(least)
