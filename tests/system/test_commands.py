"""The commands around training, as a user calls them: evaluate, embed, report, checkpoint, data, --dry-run, metrics."""

from __future__ import annotations

import json
import pickle
import re
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from megaclass.checkpoint import find_latest, verify
from megaclass.cli import main
from megaclass.observe.journal import read_metrics
from tests.support.interrupted import start, wait_for_step
from tests.support.tiny_dataset import encode, tiny_image
from tests.support.training import small_config, small_dataset, train


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small finished run, with evaluations and baselines, made by two ranks."""
    folder = tmp_path_factory.mktemp("trained")
    content = small_config(
        small_dataset(folder / "tiny"), folder / "run", train={"steps": 40, "checkpoint_every": 15}, optim={"lr": 0.05},
        evaluate={"protocols": ["verification", "identification", "retrieval"], "every": 10, "baselines": True},
    )  # fmt: skip
    train(content, world_size=2)
    return folder


def test_the_run_directory_is_complete(trained: Path) -> None:
    run_dir = trained / "run"
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["status"] == "completed"
    assert summary["exit_code"] == 0
    assert summary["world_size"] == 2
    assert set(summary["evaluation"]) == {"trained", "untrained", "pixels"}
    for evaluation in summary["evaluation"].values():
        assert set(evaluation) == {"verification", "identification", "retrieval"}
        assert 0 <= evaluation["retrieval"]["recall_at_1"] <= 1
    assert summary["goodput"]["wall_seconds"] > summary["goodput"]["compute_seconds"] > 0
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    fields = {
        "attempt", "step", "epoch", "position", "loss", "loss_hex", "intra", "inter", "positive_cosine", "lr",
        "grad_norm", "samples", "samples_per_second", "data_wait_seconds", "world_size", "time",
    }  # fmt: skip
    assert len(lines) == 40
    assert all(fields <= set(line) for line in lines)
    assert lines[-1]["position"] == 40 * 36
    assert all(abs(line["loss"] - line["intra"] - line["inter"]) < 1e-4 for line in lines)
    assert len((run_dir / "evaluations.jsonl").read_text().splitlines()) == 4
    assert "<svg" in (run_dir / "report.html").read_text()
    again = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert again["classifier"]["preset"] == "d-softmax-k"


def test_best_and_newest_checkpoints_are_kept(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "list", str(trained / "run"), "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    best = json.loads((trained / "run" / "summary.json").read_text())["best"]
    assert [line["step"] for line in listed if line["is_best"]] == [best["step"]]
    assert listed[-1]["step"] == 40
    assert len(listed) <= 3
    assert main(["checkpoint", "verify", str(trained / "run"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is True
    assert (told["step"], told["world_size"], told["num_classes"]) == (40, 2, 37)
    assert told["tensors"]["class_weight"]["shape"] == [37, 16]


def test_evaluate_gives_what_training_reported(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One process judges what two trained: the same embeddings up to rounding."""
    assert main(["evaluate", str(trained / "run"), "--data", str(trained / "tiny"), "--json", "--baselines"]) == 0
    again = json.loads(capsys.readouterr().out)
    reported = json.loads((trained / "run" / "summary.json").read_text())["evaluation"]
    for name in ("trained", "untrained", "pixels"):
        assert again[name]["retrieval"] == pytest.approx(reported[name]["retrieval"], abs=1e-6)
    assert main(["evaluate", str(trained / "run"), "--split", "train", "--protocol", "retrieval"]) == 0
    assert "recall at 1" in capsys.readouterr().out


def test_standard_pairs_are_judged_by_verification_alone(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`data bin`, then `evaluate`: on raw pixels a class and its noise are told apart without fault."""
    pictures = [[encode(tiny_image(number, sample, 16, 1)) for sample in (0, 1)] for number in range(80)]
    images = [picture for number in range(40) for picture in (pictures[number][0], pictures[number + number % 2][1])]
    (tmp_path / "lfw.bin").write_bytes(pickle.dumps((images, [number % 2 == 0 for number in range(40)])))
    assert main(["data", "bin", str(tmp_path / "lfw.bin"), "--out", str(tmp_path / "pairs")]) == 0
    capsys.readouterr()
    command = ["evaluate", str(trained / "run"), "--data", str(tmp_path / "pairs"), "--baselines", "--json"]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["trained"]) == ["verification"]
    assert found["pixels"]["verification"]["accuracy"] == 1
    assert found["pixels"]["verification"]["num_fold_pairs"] == 40
    assert main([*command, "--protocol", "retrieval"]) == 2
    assert "split 'lfw' of" in capsys.readouterr().err
    assert main([*command, "--split", "faces"]) == 3
    assert "has no split 'faces'; it has lfw" in capsys.readouterr().err


def test_embed_writes_what_interfaces_promise(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "images" / "b").mkdir(parents=True)
    for name, number in (("b/two.png", 2), ("a.png", 1)):
        Image.fromarray(tiny_image(number, 0, 16, 1)[:, :, 0]).save(tmp_path / "images" / name)
    output = tmp_path / "out.npz"
    command = ["embed", str(trained / "run"), "--images", str(tmp_path / "images"), "--output", str(output)]
    assert main(command) == 0
    with np.load(output, allow_pickle=False) as made:
        assert made["names"].tolist() == ["a.png", "b/two.png"]
        assert made["names"].dtype.kind == "U"
        assert made["embeddings"].shape == (2, 16)
        assert made["embeddings"].dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(made["embeddings"], axis=1), 1, atol=1e-6)
    (tmp_path / "images" / "broken.png").write_bytes(b"no image")
    assert main(command) == 3


def test_report_and_verify(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(trained / "run")]) == 0
    assert main(["data", "verify", str(trained / "tiny"), "--json"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out[out.index("{") :])["ok"] is True


def test_dry_run_shows_the_plan_and_makes_nothing(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(small_config(trained / "tiny", tmp_path / "dry")))
    assert main(["train", str(path), "--dry-run", "--train.steps", "7"]) == 0
    shown = capsys.readouterr().out
    assert "steps: 7, 1.36 epochs of 185 samples" in shown
    assert "loss: d-softmax with margin none and negative map identity, sampler classes; at the start " in shown
    assert "rows per rank: 37" in shown
    first = re.search(r"micro-batch 0: samples ([\d, ]+)", shown)
    assert first is not None
    ids = [int(number) for number in first.group(1).strip(", ").split(", ")]
    assert main(["train", str(path), "--train.steps", "7", "--optim.warmup-steps", "0"]) == 0
    lines = (tmp_path / "dry" / "samples" / "attempt-1-rank-0.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["ids"][: len(ids)] == ids


@pytest.mark.distributed
@pytest.mark.slow
def test_prometheus_can_scrape_every_rank_while_it_trains(trained: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    content = small_config(
        trained / "tiny", run_dir, train={"steps": 100_000}, evaluate={"protocols": []}, observe={"metrics_port": 0}
    )
    process = start(content, 1)
    try:
        wait_for_step(run_dir, 5, process)
        address = re.search(r"http://127.0.0.1:\d+/metrics", (run_dir / "train.log").read_text())
        assert address is not None
        values = []
        for _ in range(2):
            with urllib.request.urlopen(address.group(), timeout=10) as answer:
                families = {family.name: family for family in text_string_to_metric_families(answer.read().decode())}
            values.append(families["megaclass_samples"].samples[0].value)
            time.sleep(1)
        assert values[1] > values[0] > 0
        terms = {sample.labels["term"]: sample.value for sample in families["megaclass_loss"].samples}
        assert terms["total"] == pytest.approx(terms["intra"] + terms["inter"], rel=1e-4)
        assert families["megaclass_step_seconds"].samples
    finally:
        process.terminate()
        process.communicate(timeout=60)
    assert process.returncode == 75


def test_synthetic_data_needs_no_files(tmp_path: Path) -> None:
    content = small_config(tmp_path, tmp_path / "run", train={"steps": 60}, optim={"lr": 0.05})
    content["dataset"] = {
        "reader": "synthetic", "image_size": 16, "channels": 1,
        "synthetic": {"num_classes": 50, "samples_per_class": 8, "noise": 0.3},
    }  # fmt: skip
    lines = train(content)
    assert lines[-1]["positive_cosine"] > lines[0]["positive_cosine"] + 0.2


@pytest.mark.parametrize("batch_norm", ["local", "sync"])
def test_bfloat16_autocast_learns_with_float32_weights(trained: Path, tmp_path: Path, batch_norm: str) -> None:
    content = small_config(
        trained / "tiny", tmp_path / "run", train={"precision": "bfloat16", "steps": 25}, optim={"lr": 0.05},
        backbone={"batch_norm": batch_norm},
    )  # fmt: skip
    lines = train(content)
    assert lines[-1]["positive_cosine"] > lines[0]["positive_cosine"] + 0.2
    path = find_latest(tmp_path / "run" / "checkpoints")
    assert path is not None
    assert {fact["dtype"] for fact in verify(path).tensors.values()} <= {"float32", "int64"}


@pytest.mark.slow
def test_streaming_reader_trains_with_workers(trained: Path, tmp_path: Path) -> None:
    content = small_config(
        trained / "tiny", tmp_path / "run", dataset={"reader": "stream", "workers": 2}, train={"steps": 15},
        optim={"lr": 0.05},
    )  # fmt: skip
    process = start(content, 1)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    lines = read_metrics(tmp_path / "run")
    assert len(lines) == 15
    assert lines[-1]["loss"] < lines[0]["loss"]
