"""`run.profile` on a CUDA device: kernels count for the parts that start them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megaclass import cli
from tests.support.training import small_config, small_dataset

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here"),
]


def test_every_part_of_a_step_has_its_kernels(tmp_path: Path) -> None:
    content = small_config(
        small_dataset(tmp_path / "data"), tmp_path / "run", train={"steps": 12, "device": "cuda"},
        run={"profile": 4, "profile_after": 4},
    )  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(content))
    assert cli.main(["train", str(path)]) == 0
    (found,) = json.loads((tmp_path / "run" / "profile" / "summary.json").read_text())["ranks"]
    parts = {"backbone forward", "class layer forward", "backbone backward", "weight pass", "norm", "row update"}
    assert parts <= {name for name, seconds in found["device_seconds"].items() if seconds > 0}
    assert 0 < found["compute_seconds"] <= found["step_seconds"]
    assert found["communication"]["seconds"] == 0
