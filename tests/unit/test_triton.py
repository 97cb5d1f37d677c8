"""The fused kernels against the reference, run on the CPU by Triton's interpreter (operands widened to float32)."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megaclass.kernels import negatives, reference
from megaclass.kernels.interface import Candidates, Negatives
from megaclass.kernels.terms import Exponential, Filtered, Quadratic, Summed, Term

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
    weight = torch.randn(n, dim, generator=generator).to(dtype)
    weight[7] = 0.0
    rows = None if drawn is None else torch.randperm(n, generator=generator)[:drawn].sort().values
    log_weight = torch.rand(n if drawn is None else drawn, generator=generator).double()
    log_weight[:2] = -torch.inf
    return embeddings, Candidates(weight, rows, log_weight), torch.randint(-1, n, (m,), generator=generator)


def all_rows(sums: Negatives, coefficients: Tensor) -> Tensor:
    blocks = [block.values.clone() for block in sums.row_pass(coefficients)]
    return torch.cat([coefficients.new_empty(0, sums.embedding_gradient.shape[1]), *blocks])


def assert_equal_to_reference(
    embeddings: Tensor, candidates: Candidates, labels: Tensor, term: Term, relative: float = 1e-5
) -> None:
    coefficients = torch.linspace(-0.5, 1, len(embeddings))
    got = negatives.forward(embeddings, candidates, labels, term, monitor=True, kernel="triton")
    exact = replace(candidates, weight=candidates.weight.double())
    want = reference.forward(embeddings.double(), exact, labels, term, monitor=True)
    for actual, expected in (
        (got.total, want.total),
        (got.embedding_gradient, want.embedding_gradient),
        (all_rows(got, coefficients), all_rows(want, coefficients.double())),
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
@pytest.mark.parametrize("dim", [32, 96, 200, 512, 1024])
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
    nothing = replace(candidates, rows=torch.empty(0, dtype=torch.int64), log_weight=0.0)
    got = negatives.forward(embeddings, nothing, labels, TERMS["identity"], monitor=True, kernel="triton")
    assert got.total.tolist() == [0.0] * 37
    assert all_rows(got, torch.ones(37)).shape == (0, 40)
    assert got.monitor is not None
    assert float(got.monitor.cosine_max) == -torch.inf


def test_two_runs_are_equal_to_the_bit() -> None:
    embeddings, candidates, labels = inputs(96, None, torch.float32)
    one, two = (negatives.forward(embeddings, candidates, labels, TERMS["identity"], kernel="triton") for _ in range(2))
    assert torch.equal(one.total, two.total)
    assert torch.equal(one.embedding_gradient, two.embedding_gradient)
    assert torch.equal(all_rows(one, torch.ones(37)), all_rows(two, torch.ones(37)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"term": Exponential(300.0, None, use_maximum=True)}, "kernel triton has no maxima"),
        ({"term": Exponential(16.0, lambda x: (x, None))}, "knows the negative maps identity and quadratic"),
        ({"term": Summed(lambda x: (x, x, None))}, "has no sums of per-class terms"),
        ({"rows_per_class": 3}, r"has no sub-centres \(3 rows a class\); use classifier.kernel chunked"),
        ({"dtype": torch.float64}, "computes in float32, not torch.float64"),
    ],
)
def test_what_it_does_not_cover_is_refused(change: dict[str, Any], message: str) -> None:
    embeddings, candidates, labels = inputs(40, None, torch.float32)
    candidates = replace(candidates, rows_per_class=change.get("rows_per_class", 1), log_weight=0.0)
    with pytest.raises(ValueError, match=message):
        negatives.forward(
            embeddings.to(change.get("dtype", torch.float32)), candidates, labels,
            change.get("term", TERMS["identity"]), kernel="triton",
        )  # fmt: skip


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
