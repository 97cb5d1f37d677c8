"""What a user's mistakes get: one line with the thing, the value and what is allowed, and an exit code of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from megaclass.cli import main
from tests.support.tiny_dataset import encode, shard_entry, tar_member, tiny_image, write_shard, write_tiny_dataset
from tests.support.training import small_config, small_dataset, train

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return small_dataset(tmp_path / "tiny")


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Trains a configuration in this process; gives exit code and what stood on stderr."""

    def call(content: dict[str, Any], *overrides: str) -> tuple[int, str]:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(content))
        code = main(["train", str(path), *overrides])
        return code, capsys.readouterr().err

    return call


def base(dataset: Path, tmp_path: Path, **more: Any) -> dict[str, Any]:
    content = small_config(dataset, tmp_path / "run", train={"steps": 6, **more})
    content["optim"]["warmup_steps"] = 1
    return content


def test_every_mistake_of_a_configuration_at_once(run, dataset: Path, tmp_path: Path) -> None:
    content = base(dataset, tmp_path)
    code, errors = run(content, "--train.stepz", "3", "--classifier.preset", "arcfase", "--optim.lr", "-1")
    assert code == 2
    assert "unknown option train.stepz; did you mean train.steps?" in errors
    assert "optim.lr: -1 is not allowed: Input should be greater than 0" in errors
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "code", "message"),
    [
        (["--classifier.preset", "arcfase"], 2, "'arcfase' does not exist; did you mean 'arcface'?"),
        (["--classifier.preset", "arcface"], 2, "classifier.sampling_rate 0.3 means nothing for preset 'arcface'"),
        (["--backbone.name", "iresnet5"], 2, "did you mean 'iresnet50'"),
        (["--classifier.scale", "79.9"], 0, ""),
        (["--evaluate.gallery-source", "nobody"], 2, "evaluate.gallery_source 'nobody' is not a source of the split"),
        (["--evaluate.split", "unsen", "--evaluate.every", "2"], 3, "has no split 'unsen'; it has train, unseen"),
        (["--dataset.split", "trian"], 3, "has no split 'trian'; it has train, unseen"),
        (["--train.global-batch-size", "240"], 3, "has 185 samples, fewer than train.global_batch_size 240"),
        (["--run.dir", "/dev/null/run"], 2, "run directory /dev/null/run cannot be written"),
        (
            ["--dataset.path", "nowhere"],
            3,
            "data set folder nowhere does not exist; make one with `megaclass data glyphs",
        ),
        (["--dataset.num-classes", "38"], 2, "dataset.num_classes is 38 but split 'train' of"),
        (
            ["--dataset.num-classes", "7", "--dataset.reader", "stream"],
            2,
            "dataset.num_classes: 7 is not allowed: dataset.reader stream reads whole shards; use indexed",
        ),
        (
            ["--dataset.shuffle-window", "2", "--dataset.reader", "stream"],
            2,
            "dataset.shuffle_window: 2 is not allowed: dataset.reader stream mixes shards through",
        ),
        (["--dataset.shuffle-window", "0"], 2, "dataset.shuffle_window: 0 is not allowed: Input should be greater"),
        (["--dataset.num-classes", "7"], 3, "has 35 samples, fewer than train.global_batch_size 36"),
        (["--dataset.label-noise", "1"], 2, "dataset.label_noise: 1 is not allowed: Input should be less than 1"),
        (
            ["--dataset.label-noise", "0.2", "--dataset.reader", "stream"],
            2,
            "dataset.label_noise: 0.2 is not allowed: dataset.reader stream knows the true labels only; use indexed",
        ),
        (
            ["--classifier.negative-filter", "1"],
            2,
            "classifier.negative_filter: 1 is not allowed: Input should be less",
        ),
        (
            ["--classifier.sub-centres", "0"],
            2,
            "classifier.sub_centres: 0 is not allowed: Input should be greater than",
        ),
        (["--classifier.count-weight-power", "3"], 2, "classifier.count_weight_power: 3 is not allowed: Input should"),
        (
            ["--classifier.count-margin-power", "0.25"],
            2,
            "classifier.count_margin_power 0.25 means nothing without a margin; choose a margin_kind or leave it out",
        ),
        (["--train.device", "cuda"], 2, "train.device cuda: torch finds no CUDA device here"),
        (["--classifier.kernel", "triton"], 2, "classifier.kernel triton needs a CUDA device, and this run is on cpu"),
    ],
)
def test_mistakes_found_before_training(
    run, dataset: Path, tmp_path: Path, overrides: list[str], code: int, message: str
) -> None:
    import torch

    if "cuda" in overrides and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    found, errors = run(base(dataset, tmp_path), *overrides)
    assert found == code, errors
    assert message in errors
    assert "Traceback" not in errors
    if code:
        lines = [line for line in errors.splitlines() if line.startswith("megaclass: ")]
        assert len(lines) == 1


def replace_first_sample(dataset: Path, members: bytes, label: int = 0) -> None:
    """A data set of one shard whose first sample is `members`; the manifest agrees with the files."""
    good = []
    for number in range(1, 37):
        image = tar_member(f"{number}.png", encode(tiny_image(number, 0, 16, 1)))
        good.append((image + tar_member(f"{number}.label", np.array(number, "<i8").tobytes()), number, 0))
    write_shard(dataset, "train-000000", [(members, label, 0), *good])
    manifest = json.loads((dataset / "dataset.json").read_text())
    split = manifest["splits"]["train"]
    split["shards"] = [shard_entry(dataset, "train-000000")]
    split["num_samples"] = split["shards"][0]["num_samples"]
    (dataset / "dataset.json").write_text(json.dumps(manifest))


def png(name: str = "0.png") -> bytes:
    return tar_member(name, encode(tiny_image(0, 0, 16, 1)))


def label(value: int) -> bytes:
    return tar_member("0.label", np.array(value, "<i8").tobytes())


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (png() + label(37), "label"),
        (png() + label(-1), "label"),
        (png(), "label"),
        (png() + tar_member("0.label", b"7"), "label"),
        (tar_member("0.png", encode(tiny_image(0, 0, 16, 1))[:60]) + label(0), "image"),
        (tar_member("0.png", b"not an image at all") + label(0), "image"),
    ],
)
def test_a_bad_sample_stops_the_run_and_is_named(
    run, dataset: Path, tmp_path: Path, members: bytes, message: str
) -> None:
    replace_first_sample(dataset, members)
    content = base(dataset, tmp_path, global_batch_size=37)
    code, errors = run(content)
    assert code == 3
    assert "train-000000.tar" in errors
    assert message in errors
    assert "dataset.on_bad_sample: skip" in errors
    assert "Traceback" not in errors
    content["dataset"] |= {"on_bad_sample": "skip", "bad_sample_budget": 0.1}
    content["run"]["dir"] = str(tmp_path / "skipping")
    code, errors = run(content)
    assert code == 0, errors
    samples = json.loads((tmp_path / "skipping" / "summary.json").read_text())["samples"]
    assert samples["trained"] == 6 * 37
    assert sum(samples["skipped"].values()) == 6
    assert samples["read"] == 6 * 37 + 6


def test_index_with_a_label_outside_the_classes(run, dataset: Path, tmp_path: Path) -> None:
    replace_first_sample(dataset, png() + label(37), label=37)
    code, errors = run(base(dataset, tmp_path))
    assert code == 3
    assert "sample 0 has label 37, allowed is [0, 37)" in errors


def test_truncated_and_missing_shards(run, dataset: Path, tmp_path: Path) -> None:
    tar = dataset / "train-000001.tar"
    tar.write_bytes(tar.read_bytes()[:-700])
    code, errors = run(base(dataset, tmp_path))
    assert code == 3
    assert "train-000001.tar" in errors
    assert "bytes" in errors
    tar.unlink()
    code, errors = run(base(dataset, tmp_path))
    assert code == 3
    assert "train-000001.tar" in errors
    assert main(["data", "verify", str(dataset)]) == 3


def test_empty_shards_train_like_any_other(tmp_path: Path, run) -> None:
    dataset = write_tiny_dataset(tmp_path / "few", num_classes=37, samples_per_class=1, num_shards=40, unseen_classes=6)
    content = base(dataset, tmp_path)
    content["evaluate"] = {"protocols": []}
    code, errors = run(content)
    assert code == 0, errors


def test_checkpoint_of_another_class_count(run, dataset: Path, tmp_path: Path) -> None:
    train(base(dataset, tmp_path))
    other = write_tiny_dataset(tmp_path / "other", num_classes=38, samples_per_class=5, unseen_classes=6)
    (tmp_path / "tiny" / "dataset.json").unlink()
    dataset.rename(tmp_path / "old")
    other.rename(dataset)
    code, errors = run(base(dataset, tmp_path))
    assert code == 4
    assert "has 37 classes but this run has 38" in errors


def test_damaged_checkpoints(run, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(base(dataset, tmp_path))
    [folder] = (tmp_path / "run" / "checkpoints").glob("step-*")
    file = folder / "replicated.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-5] ^= 1
    file.write_bytes(raw)
    code, errors = run(base(dataset, tmp_path))
    assert code == 4
    assert "replicated.safetensors" in errors
    capsys.readouterr()
    assert main(["checkpoint", "verify", str(folder), "--json"]) == 4
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is False
    assert "replicated.safetensors" in told["faults"][0]


def test_run_directory_of_another_live_run(run, dataset: Path, tmp_path: Path) -> None:
    content = base(dataset, tmp_path, steps=100_000)
    path = tmp_path / "other.yaml"
    path.write_text(yaml.safe_dump(content))
    other = subprocess.Popen(
        [sys.executable, "-m", "megaclass", "train", str(path)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        code, errors = run(content)
        assert code == 2
        assert f"is in use by pid {other.pid} on host" in errors
    finally:
        other.kill()
        other.wait()


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(("option", "code"), [("sample", 3), ("batch", 2), ("warm-up", 2)])
def test_two_ranks_end_alike_without_a_restart(dataset: Path, tmp_path: Path, option: str, code: int) -> None:
    """Under torchrun: the cause on stderr once, the code returned by the launcher, no traceback, no second attempt."""
    content = base(dataset, tmp_path, global_batch_size=36 if option == "sample" else 35)
    if option == "sample":
        replace_first_sample(dataset, tar_member("0.png", b"not an image at all") + label(0))
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    command = [str(ROOT / "launch/torchrun.sh"), "--nproc-per-node", "2", "-m", "megaclass", "train", str(path)]
    if option == "warm-up":  # found before the ranks meet
        command += ["--optim.warmup-steps", "1000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    if option == "sample":
        assert done.stderr.count("train-000000.tar: sample") >= 1 or "train-000000.tar" in done.stderr
        assert json.loads((tmp_path / "run" / "outcome.json").read_text())["code"] == code
        assert len((tmp_path / "run" / "attempts.jsonl").read_text().splitlines()) == 1
    elif option == "warm-up":
        assert done.stderr.count("optim.warmup_steps 1000 leaves nothing of train.steps") == 1
    else:
        assert "35 does not divide by 2 ranks x 1 accumulation steps = 2; use 34 or 36" in done.stderr


def test_commands_without_their_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (
        ["evaluate", str(tmp_path / "none")],
        ["embed", str(tmp_path / "none"), "--images", str(tmp_path), "--output", str(tmp_path / "x.npz")],
        ["classes", str(tmp_path / "none")],
        ["report", str(tmp_path / "none")],
    ):
        assert main(command) == 2
        assert "run directory" in capsys.readouterr().err
    assert main(["checkpoint", "list", str(tmp_path)]) == 4
    assert "has no checkpoints folder" in capsys.readouterr().err
