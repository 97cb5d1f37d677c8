"""`megaclass bench data`: its rows, what it says of reader and model, and that workers are weighed with their rank."""

from __future__ import annotations

import json
import mmap
import multiprocessing
import time
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from megaclass.bench import data
from megaclass.bench.processes import cpu_seconds, resident_bytes
from megaclass.bench.sources import Images, Source, decode_alone
from megaclass.cli import main
from megaclass.config import Dataset
from megaclass.data.decode import decode_image
from megaclass.data.members import SampleMembers
from tests.support.tiny_dataset import encode, tiny_image, write_tiny_dataset

CONFIG = """
dataset: {{path: {path}, image_size: 16, channels: 3, workers: 1, augment: {{flip: 0.5}}}}
backbone: {{name: tiny, dim: 16}}
classifier: {{preset: arcface}}
train: {{steps: 5, global_batch_size: 6}}
evaluate: {{protocols: []}}
"""
BRIEF = ["--repeats", "1", "--seconds", "0.01"]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    folder = write_tiny_dataset(tmp_path / "data", 7, 5, channels=3, image_format="jpg")
    file = tmp_path / "faces.yaml"
    file.write_text(CONFIG.format(path=folder))
    return file


def run(config: Path, *options: str) -> dict[str, Any]:
    figures = config.parent / "figures.json"
    assert main(["bench", "data", str(config), *BRIEF, "--json", str(figures), *options]) == 0
    return json.loads(figures.read_text())


@pytest.mark.distributed
def test_all_readers_beside_their_bounds(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(config, "--nproc", "2", "--workers", "0", "--memory-samples", "60")
    names = [f"{reader}, {workers} workers{augmented}" for reader in ("indexed", "stream")
             for augmented in ("", ", augmented") for workers in (0, 1)]  # fmt: skip
    assert set(get_args(Dataset.model_fields["reader"].annotation)) >= {"indexed", "stream", "synthetic"}
    shown = [case["impl"] for case in found["cases"]]
    assert shown[:2] == ["read bytes", "decode alone"]
    assert set(names) <= set(shown)
    for case in found["cases"]:
        speed, share = case["images_per_second"], case["share_of_decoding"]
        assert 0 < speed["p20"] <= speed["p50"] <= speed["p80"]
        assert 0 < share["p20"] <= share["p50"] <= share["p80"]
        assert case["repeats"] == 1
        assert case["case"]["world_size"] == 2
        assert case["cpu_us_per_image"] > 0
        assert case["cores"] > 0
        assert case["resident_bytes"] > 2**24
    assert found["cases"][1]["share_of_decoding"] == {"p20": 1.0, "p50": 1.0, "p80": 1.0}
    verdict = found["verdict"]
    assert verdict["reader"] == "indexed, 1 workers, augmented"
    assert verdict["model_images_per_second"] > 0
    assert isinstance(verdict["growth_bytes_per_1000_images"], float)
    output = capsys.readouterr().out
    assert "bytes in 1,000 images" in output
    assert verdict["bottleneck"] in output


def test_a_reader_that_cannot_be_used_is_named(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(config, "--workers", "0", "--dataset.workers", "0", "--dataset.num-classes", "5")
    assert not [case for case in found["cases"] if case["impl"].startswith("stream")]
    assert "left out: stream (dataset.reader stream reads whole shards; use indexed)" in capsys.readouterr().out
    assert "growth_bytes_per_1000_images" not in found["verdict"]


def test_synthetic_images_are_compared_with_nothing(config: Path) -> None:
    found = run(config, "--workers", "0", "--dataset.reader", "synthetic", "--dataset.workers", "0")
    assert [case["impl"] for case in found["cases"]] == ["synthetic, 0 workers", "synthetic, 0 workers, augmented"]
    assert all("share_of_decoding" not in case for case in found["cases"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--nproc", "0"], "--nproc 0: at least 1 is needed"),
        (["--repeats", "0"], "--repeats 0: at least 1 is needed"),
        (["--workers", "0", "-1"], "--workers -1: at least 0 is needed"),
        (["--seconds", "-1"], "--seconds -1.0: at least 0 is needed"),
        (["--memory-samples", "-1"], "--memory-samples -1: at least 0 is needed"),
        (["--nproc", "4"], "train.global_batch_size 6 does not divide by 4 ranks"),
        (["--dataset.path", "/nowhere"], "/nowhere"),
    ],
)
def test_mistakes(config: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "data", str(config), *BRIEF, *options]) in (2, 3)
    assert message in capsys.readouterr().err


def test_the_bottleneck_is_the_slower_one() -> None:
    found = {"reader": "indexed, 0 workers", "reader_images_per_second": 3000.0, "model_images_per_second": 1000.0}
    assert data.bottleneck(found) == (
        "the run's reader (indexed, 0 workers) gives 3,000 images/s and the model takes 1,000: the model is the "
        "bottleneck; data could come 3.0 times as slowly"
    )
    assert "takes 9,000: the data is the bottleneck; raise dataset.workers up to" in data.bottleneck(
        found | {"model_images_per_second": 9000.0}
    )


def test_the_time_of_a_turn_is_that_after_what_lay_ready() -> None:
    """Three batches lie ready at once; the others take 20 ms each, and they alone are counted."""
    closed = []

    def images(position: int) -> Images:
        assert position == 77
        try:
            yield from (10, 10, 10)
            while True:
                time.sleep(0.02)
                yield 10
        finally:
            closed.append(True)

    figures = data.Figures()
    data.take_turn(Source("slow", {}, images, num_ahead=2), figures, 77, 0.2)
    (speed,) = figures.images_per_second
    assert 100 < speed < 500
    assert figures.cores[0] < 0.5
    assert closed == [True]


def test_memory_that_grows_is_seen() -> None:
    kept: list[mmap.mmap] = []

    def leaking(position: int) -> Images:
        while True:
            # Not from the heap, which in a long process has room without growing.
            kept.append(mmap.mmap(-1, 2**20))
            kept[-1].write(bytes([1]) * 2**20)
            yield 100

    def flat(position: int) -> Images:
        while True:
            np.ones(2**17)
            yield 100

    assert data.growth(Source("leaking", {}, leaking), 12_000) == pytest.approx(10 * 2**20, rel=0.1)
    assert abs(data.growth(Source("flat", {}, flat), 12_000)) < 2**19


def _busy() -> None:
    held = np.ones(2**22)
    while held.sum():
        pass


def test_children_are_counted_with_their_parent() -> None:
    cpu, memory = cpu_seconds(), resident_bytes()
    child = multiprocessing.get_context("fork").Process(target=_busy, daemon=True)
    child.start()
    try:
        own = time.process_time()
        deadline = time.monotonic() + 60
        while cpu_seconds() - cpu < 0.5 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert cpu_seconds() - cpu >= 0.5
        assert time.process_time() - own < 0.3
        assert resident_bytes() - memory > 2**24
    finally:
        child.kill()
        child.join()


@pytest.mark.parametrize("image_format", ["jpg", "png"])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_ceiling_decodes_what_the_readers_decode(image_format: str, channels: int) -> None:
    content = encode(tiny_image(1, 2, 16, channels), image_format)
    alone = decode_alone(SampleMembers("a", image_format, content, 0), channels)
    assert np.array_equal(alone.reshape(16, 16, channels), decode_image(content, image_format, 16, channels))


@pytest.mark.distributed
def test_steps_of_a_configuration_with_workers(config: Path, tmp_path: Path) -> None:
    """A rank of a benchmark may have children."""
    figures = tmp_path / "step.json"
    assert main(["bench", "step", str(config), "--repeats", "2", "--json", str(figures)]) == 0
    assert json.loads(figures.read_text())["cases"][0]["repeats"] == 2
