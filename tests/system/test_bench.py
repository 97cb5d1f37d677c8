"""`megaclass bench`: the commands, what they report, and that they need torch and numpy alone."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from megaclass.bench import head, measure, others, ranks, step
from megaclass.bench.case import Case, batch
from megaclass.cli import main
from megaclass.errors import PeerError
from megaclass.parallel.process import World

SMALL = ["--num-classes", "400", "--dim", "16", "--batch-size", "3", "--repeats", "3"]
PEER = """
import torch
from torch import nn

class PartialFC_V2(nn.Module):
    def __init__(self, margin, dim, num_classes, rate, fp16):
        super().__init__()
        assert (margin, dim, num_classes, rate, fp16) == ("margin 0.4", 16, 400, 0.25, False)
        self.weight = nn.Parameter(torch.randn(num_classes, dim))

    def forward(self, embeddings, labels):
        labels += 1
        return (embeddings @ self.weight.T).square().mean()
"""
LOSSES = """
def CombinedMarginLoss(s, m1, m2, m3):
    return f"margin {m3}"
"""


@pytest.fixture
def peer(tmp_path: Path) -> Path:
    folder = tmp_path / "arcface_torch"
    folder.mkdir()
    (folder / "partial_fc_v2.py").write_text(PEER)
    (folder / "losses.py").write_text(LOSSES)
    return folder


@pytest.mark.distributed
def test_head_beside_the_peer_on_two_ranks(peer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    arguments = [
        "bench",
        "head",
        *SMALL,
        "--sampling-rate",
        "0.25",
        "--nproc",
        "2",
        "--peer",
        str(peer),
        "--json",
        str(file),
    ]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "partialfc_v2" in shown
    assert "megaclass (partial-fc, deferred)" in shown
    figures = json.loads(file.read_text())
    assert figures.keys() == {"device", "torch", "commit", "cases"}
    assert [case["impl"] for case in figures["cases"]] == ["megaclass", "partialfc_v2"]
    for case in figures["cases"]:
        assert case["repeats"] == 3
        assert case["case"]["world_size"] == 2
        assert 0 < case["wall_ms"]["p20"] <= case["wall_ms"]["p50"] <= case["wall_ms"]["p80"]
        assert case["cpu_ms"] > 0
        assert case["floor_ms"] > 0
        assert case["peak_bytes"] > 0
        assert case["floor_bytes"] == 400 * 16 * 8


def test_rows_on_the_host(capsys: pytest.CaptureFixture[str]) -> None:
    rate = ["--sampling-rate", "0.1", "--no-memory", "--row-memory", "host"]
    assert main(["bench", "head", *SMALL, *rate, "--preset", "d-softmax-k", "--row-update", "fused"]) == 0
    assert "megaclass" in capsys.readouterr().out
    assert main(["bench", "head", *SMALL, "--preset", "d-softmax", "--row-memory", "host", "--no-memory"]) == 2
    assert "--row-memory host: preset 'd-softmax' needs all rows" in capsys.readouterr().err


def test_baselines_and_those_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    baselines = ["--baselines", "torch-cross-entropy", "torch-linear-cross-entropy-64", "naive-d-softmax"]
    assert (
        main(["bench", "head", *SMALL, "--preset", "d-softmax", "--row-update", "fused", "--no-memory", *baselines])
        == 0
    )
    shown = capsys.readouterr().out
    assert all(name in shown for name in baselines[1:])
    assert "left out: partialfc_v2 (no --peer; give the folder" in shown
    assert (
        main(["bench", "head", *SMALL, "--sampling-rate", "0.5", "--no-memory", "--baselines", "naive-d-softmax"]) == 0
    )
    assert "left out: naive-d-softmax (uses all classes on one rank; give --nproc 1 --sampling-rate 1)" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["head", *SMALL, "--peer", "/nowhere"], "partial_fc_v2.py and losses.py not found; give the folder"),
        (["head", *SMALL, "--preset", "arcfase"], "'arcfase' does not exist; did you mean 'arcface'?"),
        (["head", *SMALL, "--preset", "arcface", "--sampling-rate", "0.1"], "preset 'arcface' uses all classes, so"),
        (
            ["head", *SMALL, "--baselines", "torch"],
            "--baselines: 'torch' is not known; allowed are torch-cross-entropy",
        ),
        (["head", *SMALL, "--batch-size", "0"], "--batch-size 0: at least 1 is needed"),
        (["head", *SMALL, "--plot", "figures.gif"], "--plot figures.gif: the ending must be one of .svg, .png, .pdf"),
        (["step", "configs/ten-million.yaml", "--nproc", "0"], "--nproc 0: at least 1 is needed"),
        (["step", "/nowhere.yaml"], "/nowhere.yaml"),
        (["scaling", "--num-classes", "100", "--rows", "200"], "--rows 200 exceeds --num-classes 100; draw fewer"),
        (["sampler", "--num-classes", "10", "--num-picks", "11"], "--num-picks 11: must lie in [1, --num-classes 10]"),
        (["optimizer", "--num-rows", "9", "--num-drawn", "10"], "--num-drawn 10: must lie in [1, --num-rows 9]"),
    ],
)
def test_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["sampler", "optimizer", "scaling"])
def test_parts(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {
        "sampler": ["--num-classes", "5000", "--num-picks", "77"],
        "optimizer": ["--num-rows", "500", "--num-drawn", "13", "--dim", "7"],
        "scaling": [
            "--num-classes",
            "300",
            "600",
            "--rows",
            "30",
            "--dim",
            "8",
            "--batch-size",
            "3",
            "--row-dtype",
            "bfloat16",
        ],
    }[kind]
    file = tmp_path / "figures.json"
    assert main(["bench", kind, *options, "--repeats", "3", "--json", str(file)]) == 0
    cases = json.loads(file.read_text())["cases"]
    assert len(cases) == {"sampler": 4, "optimizer": 8, "scaling": 2}[kind]
    assert all(case["cpu_ms"] > 0 for case in cases)
    assert all(case["floor_ms"] > 0 and case["wall_ms"]["p50"] > 0 for case in cases)
    if kind == "scaling":
        assert [case["case"]["sampling_rate"] * case["case"]["num_classes"] for case in cases] == [30, 30]
        assert "slowest / fastest:" in capsys.readouterr().out


STEP = """
dataset: {reader: synthetic, image_size: 8, synthetic: {num_classes: 300}}
backbone: {name: tiny, dim: 16}
classifier: {preset: d-softmax-k, sampling_rate: 0.1}
train: {steps: 5, global_batch_size: 6}
evaluate: {protocols: []}
"""


@pytest.mark.distributed
@pytest.mark.parametrize("nproc", [1, 2])
def test_a_whole_step_by_part(nproc: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, figures = tmp_path / "step.yaml", tmp_path / "figures.json"
    file.write_text(STEP)
    options = ["--nproc", str(nproc), "--repeats", "4", "--json", str(figures), "--optim.lr", "0.01"]
    assert main(["bench", "step", str(file), *options]) == 0
    shown = capsys.readouterr().out
    assert f"d-softmax-k over 300 classes, tiny, 6 samples on {nproc} ranks" in shown
    assert "is the bottleneck" in shown
    (case,) = json.loads(figures.read_text())["cases"]
    assert case["repeats"] == 4
    assert 0 < case["head_cpu_ms"] < case["cpu_ms"]
    assert 0 <= case["data_wait_ms"] < case["wall_ms"]["p80"]
    assert case["samples_per_second"] == pytest.approx(6000 / case["wall_ms"]["p50"])
    assert case["planned_ms"] > 0
    assert case["peak_bytes"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figures.json", "step.yaml"], "a run was written"


@pytest.mark.parametrize(("share", "what"), [(0.02, "the model is"), (0.4, "the data is the bottleneck; raise")])
def test_the_bottleneck_is_named(share: float, what: str) -> None:
    assert what in step.bottleneck({"data_wait_share": share})


def test_a_picture_of_the_figures(tmp_path: Path) -> None:
    file = tmp_path / "head.svg"
    arguments = ["bench", "head", *SMALL, "--sampling-rate", "0.1", "1", "--no-memory", "--plot", str(file)]
    assert main(arguments) == 0
    drawn = file.read_text()
    assert "<svg" in drawn
    assert drawn.count("PolyCollection") + drawn.count("LineCollection") >= 1, "error bars"


def test_fused_kernels_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is missing is told why; who is there gets rows of unit length, scaled embeddings, and no gradient filter."""
    case = Case(40, dim=8, batch_size=3)
    names = ["cut-cross-entropy", "liger"]
    assert others.left_out(case, names) == {
        "cut-cross-entropy": "not installed; pip install cut-cross-entropy",
        "liger": "not installed; pip install liger-kernel",
    }
    with monkeypatch.context() as installed:
        installed.setattr(importlib.util, "find_spec", lambda name: name)
        if not torch.cuda.is_available():
            assert others.left_out(case, names) == dict.fromkeys(names, "needs a CUDA device")
    cut, liger = types.ModuleType("cut_cross_entropy"), types.ModuleType("liger")

    def loss(embeddings: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, filter_eps: None) -> torch.Tensor:
        assert embeddings.norm(dim=1).float().tolist() == pytest.approx([64.0] * 3, rel=1e-2)
        assert weight.norm(dim=1).float().tolist() == pytest.approx([1.0] * 40, rel=1e-2)
        return torch.nn.functional.cross_entropy(embeddings.float() @ weight.float().T, labels)

    cut.linear_cross_entropy = loss
    liger.LigerFusedLinearCrossEntropyLoss = lambda: (
        lambda weight, embeddings, labels: loss(embeddings, weight, labels, None)
    )
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", cut)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.fused_linear_cross_entropy", liger)
    world = World(0, 1, 0, torch.device("cpu"), None, None)
    embeddings, labels = batch(case, world, 0)
    expected = others.build("torch-cross-entropy", case, world, None).step(embeddings, labels)
    for name in names:
        got = others.build(name, case, world, None).step(embeddings, labels)
        torch.testing.assert_close(got, expected, rtol=0.05, atol=0.02 * float(expected.abs().max()))


def test_implementations_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order = []

    class Noted:
        def __init__(self, name: str) -> None:
            self.name = name

        def step(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            order.append((self.name, float(embeddings.sum())))
            return embeddings

    monkeypatch.setattr(measure, "make", lambda name, *_: Noted(name))
    world = World(0, 1, 0, torch.device("cpu"), None, None)
    times = measure.timed(world, Case(50, dim=4, batch_size=2), ["a", "b"], None, repeats=3)
    assert [name for name, _ in order] == ["a", "b"] * 5
    assert all(order[place][1] == order[place + 1][1] for place in range(0, 10, 2)), "both see the same batch"
    assert {name: len(found.wall) for name, found in times.items()} == {"a": 3, "b": 3}


def test_the_floor_is_that_of_the_cost_model() -> None:
    """Ten million rows of 512 on 8 ranks, 4,096 samples: 19.9 ms on an H200 (performance.md, 1.3), and 1/64 of it."""
    case = Case(10_000_000, 512, 512, 1.0, world_size=8)
    assert head.floor_seconds(case, 790e12, 1e30) == pytest.approx(0.0199, rel=0.01)
    sampled = Case(10_000_000, 512, 512, 1 / 64, world_size=8)
    assert head.floor_seconds(sampled, 790e12, 1e30) == pytest.approx(0.00031, rel=0.01)
    low = Case(100_000_000, 512, row_dtype="bfloat16", optimizer="adagrad")
    assert head.floor_bytes(low) == pytest.approx(102.8e9, rel=1e-3)
    # Six samples: the rows' bytes are the bound, read twice and written once.
    assert head.floor_seconds(low, 1e30, 4.3e12) == pytest.approx(100e6 * 512 * (6 + 8 / 512) / 4.3e12)


def _second_rank_fails(world: World) -> int:
    from megaclass.parallel.collectives import sum_over_ranks

    if world.rank == 1:
        raise ZeroDivisionError("of the second rank")
    return int(sum_over_ranks(torch.zeros(1), world.group))


@pytest.mark.distributed
def test_the_rank_that_failed_is_told_and_not_the_one_that_waits() -> None:
    with pytest.raises(PeerError, match=r"rank 1 failed:(.|\n)*ZeroDivisionError: of the second rank"):
        ranks.run(_second_rank_fails, 2)


def test_the_peer_runs_on_one_rank_too(peer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It insists on a process group; it gets one of a single rank."""
    (peer / "partial_fc_v2.py").write_text(
        PEER.replace("super().__init__()", "super().__init__(); assert torch.distributed.get_world_size() == 1")
    )
    assert main(["bench", "head", *SMALL, "--sampling-rate", "0.25", "--peer", str(peer)]) == 0
    assert "partialfc_v2" in capsys.readouterr().out


def test_percentiles_are_those_of_the_sample() -> None:
    found: dict[str, Any] = measure.percentiles([0.001 * number for number in range(11)])
    assert found == pytest.approx({"p20": 2.0, "p50": 5.0, "p80": 8.0})


def test_class_layer_and_benchmarks_need_torch_and_numpy_alone() -> None:
    """They run on a bare GPU machine: whatever else is installed here is made impossible to import."""
    program = """
import sys
for name in "pydantic yaml webdataset simplejpeg rich PIL matplotlib prometheus_client safetensors".split():
    sys.modules[name] = None
import megaclass.bench.head, megaclass.bench.parts, megaclass.bench.ranks, megaclass.bench.others
import megaclass.classifier, megaclass.optim.rowwise, megaclass.sampling
from megaclass.bench.case import Case, batch
print(len(megaclass.bench.head.compare(Case(300, 8, 3, 0.2), repeats=2, memory=False)[0]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "1"
