"""The fused kernels against the reference: by Triton's interpreter on the CPU, or on a GPU where there is one.

The interpreter widens operands to float32, so there bfloat16 rows are exact; a GPU rounds embeddings and slopes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megaclass import config, loss
from megaclass.classifier import ShardedClassifier
from megaclass.errors import ConfigError
from megaclass.kernels import negatives, reference
from megaclass.kernels.interface import Candidates, Negatives
from megaclass.kernels.terms import Exponential, Filtered, Quadratic, Summed, Term
from megaclass.objectives import presets
from megaclass.parallel.shard import ClassShard
from megaclass.train import build

# The interpreter runs on the CPU (tests/__init__.py chooses it where there is no GPU).
DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
CURVE = Quadratic(0.1, 1.3, 0.25)
TERMS: dict[str, Exponential] = {
    "identity": Exponential(16.0),
    "quadratic": Exponential(16.0, CURVE),
    "filtered": Exponential(16.0, Filtered(None, 0.1)),
    "filtered quadratic": Exponential(16.0, Filtered(CURVE, 0.1)),
}


def inputs(
    dim: int, drawn: int | None, dtype: torch.dtype, m: int = 37, n: int = 51
) -> tuple[Tensor, Candidates, Tensor]:
    generator = torch.Generator().manual_seed(dim)
    embeddings = torch.nn.functional.normalize(torch.randn(m, dim, generator=generator), dim=1)
    if dtype == torch.bfloat16:  # as the class layer sends them beside such rows
        embeddings = embeddings.bfloat16().float()
    weight = torch.randn(n, dim, generator=generator).to(dtype)
    weight[7] = 0.0
    rows = None if drawn is None else torch.randperm(n, generator=generator)[:drawn].sort().values
    log_weight = torch.rand(n if drawn is None else drawn, generator=generator).double()
    log_weight[:2] = -torch.inf
    labels = torch.randint(-1, n, (m,), generator=generator)
    if rows is not None:
        rows = rows.to(DEVICE)
    return embeddings.to(DEVICE), Candidates(weight.to(DEVICE), rows, log_weight.to(DEVICE)), labels.to(DEVICE)


def all_rows(sums: Negatives, coefficients: Tensor) -> Tensor:
    blocks = [block.values.clone() for block in sums.row_pass(coefficients)]
    return torch.cat([coefficients.new_empty(0, sums.embedding_gradient.shape[1]), *blocks])


def all_rows_in_given_memory(sums: Negatives, coefficients: Tensor, num_rows: int) -> Tensor:
    memory = coefficients.new_full((num_rows, sums.embedding_gradient.shape[1]), torch.nan)
    for block in sums.row_pass(coefficients, memory):
        assert block.values.data_ptr() == memory[block.start :].data_ptr()
    return memory


def assert_equal_to_reference(embeddings: Tensor, candidates: Candidates, labels: Tensor, term: Term) -> None:
    relative = 3e-3 if embeddings.is_cuda and candidates.weight.dtype == torch.bfloat16 else 1e-5
    coefficients = torch.linspace(-0.5, 1, len(embeddings), device=embeddings.device)
    got = negatives.forward(embeddings, candidates, labels, term, monitor=True, kernel="triton")
    got_rows = all_rows(got, coefficients)
    again = negatives.forward(embeddings, candidates, labels, term, kernel="triton")
    assert torch.equal(all_rows_in_given_memory(again, coefficients, len(got_rows)), got_rows)
    exact = replace(candidates, weight=candidates.weight.double())
    want = reference.forward(embeddings.double(), exact, labels, term, monitor=True)
    for actual, expected in (
        (got.total, want.total),
        (got.embedding_gradient, want.embedding_gradient),
        (got_rows, all_rows(want, coefficients.double())),
    ):
        assert actual.dtype == torch.float32
        assert actual.shape == expected.shape
        assert float((actual.double() - expected).norm()) <= relative * float(expected.norm())
    assert got.monitor is not None
    assert want.monitor is not None
    for name in ("cosine_sum", "num_pairs", "cosine_max"):
        torch.testing.assert_close(
            getattr(got.monitor, name).double(), getattr(want.monitor, name), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("drawn", [None, 21])
@pytest.mark.parametrize("dim", [32, 96, 128, 200, 512, 1024])
def test_every_width_and_map(dim: int, drawn: int | None, dtype: torch.dtype) -> None:
    for term in TERMS.values():
        assert_equal_to_reference(*inputs(dim, drawn, dtype), term)


@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 70), (33, 1), (65, 130), (32, 32)])
def test_sizes_that_divide_by_nothing(m: int, n: int) -> None:
    generator = torch.Generator().manual_seed(m + n)
    embeddings = torch.nn.functional.normalize(torch.randn(m, 40, generator=generator), dim=1)
    labels = torch.randint(-1, n, (m,), generator=generator)
    assert_equal_to_reference(
        embeddings, Candidates(torch.randn(n, 40, generator=generator)), labels, TERMS["identity"]
    )


def test_row_gradients_come_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from megaclass.kernels import triton

    monkeypatch.setattr(triton, "BLOCK_ROWS", 20)
    for drawn in (None, 21):
        assert_equal_to_reference(*inputs(40, drawn, torch.float32), TERMS["quadratic"])


def test_no_candidate_at_all() -> None:
    embeddings, candidates, labels = inputs(40, None, torch.float32)
    nothing = replace(candidates, rows=torch.empty(0, dtype=torch.int64, device=DEVICE), log_weight=0.0)
    got = negatives.forward(embeddings, nothing, labels, TERMS["identity"], monitor=True, kernel="triton")
    assert got.total.tolist() == [0.0] * 37
    assert all_rows(got, torch.ones(37, device=DEVICE)).shape == (0, 40)
    assert got.monitor is not None
    assert float(got.monitor.cosine_max) == -torch.inf


def test_two_runs_are_equal_to_the_bit() -> None:
    embeddings, candidates, labels = inputs(96, None, torch.float32)
    one, two = (negatives.forward(embeddings, candidates, labels, TERMS["identity"], kernel="triton") for _ in range(2))
    assert torch.equal(one.total, two.total)
    assert torch.equal(one.embedding_gradient, two.embedding_gradient)
    assert torch.equal(all_rows(one, torch.ones(37, device=DEVICE)), all_rows(two, torch.ones(37, device=DEVICE)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"term": Exponential(300.0, None, use_maximum=True)}, "kernel triton has no maxima"),
        ({"term": Exponential(16.0, lambda x: (x, None))}, "knows the negative maps identity and quadratic"),
        ({"term": Summed(lambda x: (x, x, None))}, "has no sums of per-class terms"),
        ({"rows_per_class": 3}, r"has no sub-centres \(3 rows a class\); use classifier.kernel chunked"),
        ({"dtype": torch.float64}, "computes in float32, not torch.float64"),
        ({"rows": torch.float16}, "takes rows of float32 or bfloat16, not torch.float16"),
    ],
)
def test_what_it_does_not_cover_is_refused(change: dict[str, Any], message: str) -> None:
    embeddings, candidates, labels = inputs(40, None, torch.float32)
    candidates = replace(candidates, rows_per_class=change.get("rows_per_class", 1), log_weight=0.0)
    candidates = replace(candidates, weight=candidates.weight.to(change.get("rows", torch.float32)))
    with pytest.raises(ValueError, match=message):
        negatives.forward(
            embeddings.to(change.get("dtype", torch.float32)), candidates, labels,
            change.get("term", TERMS["identity"]), kernel="triton",
        )  # fmt: skip


@pytest.mark.parametrize("preset", ["d-softmax", "d-softmax-k", "partial-fc", "so-d-softmax"])
def test_the_class_layer_gives_what_it_gives_with_the_reference(preset: str) -> None:
    rate = {"sampling_rate": 0.4} if preset in ("d-softmax-k", "partial-fc") else {}
    chosen = presets.resolve(preset, hyper={}, schedule={}, scale=16.0, **rate)
    generator = torch.Generator().manual_seed(0)
    embeddings, labels = torch.randn(9, 40, generator=generator), torch.randint(61, (9,), generator=generator)
    found = []
    for kernel in ("triton", "reference"):
        classifier = ShardedClassifier(
            40, ClassShard(61, 0, 1), loss.build(chosen, 61, seed=0), seed=0, kernel=kernel, device=DEVICE
        )
        raw = embeddings.to(DEVICE).requires_grad_()
        output = classifier(raw, labels.to(DEVICE), draw_id=3, monitor=True)
        output.loss.backward()
        gradient = classifier.take_row_gradient()
        assert gradient is not None
        assert output.monitors is not None
        found.append([output.loss.detach(), raw.grad, gradient.values, output.monitors.negative_cosine_mean])
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({}, "needs a CUDA device, and this run is on cpu"),
        ({"classifier": {"sub_centres": 3}}, "has no sub-centres, and classifier.sub_centres is 3"),
        ({"classifier": {"preset": "sphereface2"}}, "has no sums of per-class terms, as 'sphereface2' is"),
        ({"classifier": {"preset": "circle"}}, "has no maxima, which exponents beyond float32 need; lower"),
        ({"classifier": {"preset": "curricularface"}}, "knows no negative map 'curricular'"),
        ({"backbone": {"dim": 2048}}, "takes embeddings of up to 1024 numbers, and backbone.dim is 2048"),
        ({"train": {"precision": "float64"}}, "computes in float32, and train.precision is float64"),
    ],
)
def test_a_run_that_it_does_not_cover_is_refused_before_training(sections: dict[str, Any], message: str) -> None:
    content: dict[str, Any] = {
        "dataset": {"reader": "synthetic"}, "classifier": {}, "train": {"steps": 1}, "evaluate": {"protocols": []},
    }  # fmt: skip
    for name, options in sections.items():
        content[name] = {**content.get(name, {}), **options}
    resolved = config.validate(content)
    own_loss = build.build_loss(resolved, build.resolve_preset(resolved), 1000, None)
    with pytest.raises(ConfigError) as error:
        build.check_fused(resolved, own_loss, torch.device("cpu" if not sections else "cuda"))
    assert f"classifier.kernel triton {message}" in str(error.value)


def test_a_machine_without_a_gpu_is_told_so() -> None:
    program = """
import torch
from megaclass.kernels import negatives
from megaclass.kernels.interface import Candidates
from megaclass.kernels.terms import Exponential
try:
    candidates, labels = Candidates(torch.ones(3, 8)), torch.tensor([0])
    negatives.forward(torch.ones(1, 8), candidates, labels, Exponential(1.0), kernel="triton")
except ValueError as error:
    print(error)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120,
        env={**environment, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.stdout.startswith("kernel triton needs a CUDA device, or TRITON_INTERPRET=1 to be tried on a CPU; use")


def test_nobody_imports_triton_who_does_not_ask_for_it() -> None:
    program = "import sys, megaclass.classifier, megaclass.train.build; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout.strip() == "False", done.stderr
