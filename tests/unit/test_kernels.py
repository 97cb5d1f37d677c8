"""Every kernel gives what the reference gives, over chunk borders, kept or recomputed, and merges of row gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megaclass.kernels import chunked, negatives
from megaclass.kernels.row_gradient import RowGradient, merge
from tests.support.largest import Largest


def make(m: int, classes: int, dim: int, drawn: int | None, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(m * 1000 + classes)
    embeddings = torch.nn.functional.normalize(torch.randn(m, dim, generator=generator, dtype=dtype), dim=1)
    weight = torch.randn(classes, dim, generator=generator, dtype=dtype)
    rows = None if drawn is None else torch.randperm(classes, generator=generator)[:drawn].sort().values
    labels = torch.randint(-1, classes, (m,), generator=generator)
    return embeddings, weight, rows, labels


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("chunk", [1, 4, 13, 2048])
@pytest.mark.parametrize(("classes", "drawn"), [(13, None), (13, 5), (13, 0), (1, None)])
def test_chunked_equals_reference(
    monkeypatch: pytest.MonkeyPatch, classes: int, drawn: int | None, chunk: int, keep: bool
) -> None:
    monkeypatch.setattr(chunked, "CHUNK_ROWS", chunk)
    monkeypatch.setattr(chunked, "KEEP_BYTES", 2**20 if keep else 0)
    embeddings, weight, rows, labels = make(5, classes, 7, drawn, torch.float64)
    coefficients = torch.linspace(0.1, 1, 5, dtype=torch.float64)
    got, want = (
        negatives.forward(embeddings, weight, rows, labels, scale=16.0, log_weight=0.7, kernel=kernel)
        for kernel in ("chunked", "reference")
    )
    torch.testing.assert_close(got.exp_sum, want.exp_sum, rtol=1e-12, atol=0)
    torch.testing.assert_close(got.embedding_gradient, want.embedding_gradient, rtol=1e-12, atol=1e-9)
    got_rows, want_rows = got.row_pass(coefficients), want.row_pass(coefficients)
    assert (got_rows.rows is None) == (rows is None)
    torch.testing.assert_close(got_rows.values, want_rows.values, rtol=1e-10, atol=1e-8)


def test_reference_gradients_are_those_of_autograd() -> None:
    embeddings, weight, rows, labels = make(5, 13, 7, 6, torch.float64)
    embeddings.requires_grad_()
    weight.requires_grad_()
    unit = weight[rows] / weight[rows].norm(dim=1, keepdim=True)
    exponentials = torch.exp(16.0 * embeddings @ unit.T)
    sums = torch.where(labels[:, None] == rows[None, :], 0.0, exponentials).sum(dim=1)
    coefficients = torch.linspace(0.1, 1, 5, dtype=torch.float64)
    wanted = torch.autograd.grad((coefficients * sums).sum(), (embeddings, weight))
    with torch.no_grad():
        got = negatives.forward(embeddings, weight, rows, labels, scale=16.0, kernel="reference")
        values = got.row_pass(coefficients).values
    torch.testing.assert_close(got.exp_sum, sums.detach())
    torch.testing.assert_close(coefficients[:, None] * got.embedding_gradient, wanted[0])
    torch.testing.assert_close(values, wanted[1][rows])


def test_zero_row_has_a_finite_gradient() -> None:
    embeddings, weight, rows, labels = make(3, 5, 7, None, torch.float32)
    weight[2] = 0.0
    sums = negatives.forward(embeddings, weight, rows, labels, scale=16.0)
    assert bool(torch.isfinite(sums.exp_sum).all())


def test_float32_sums_hold_ten_million_classes_at_scale_64() -> None:
    """The mass of 10 million classes, simulated through the log weight, against float64."""
    embeddings, weight, rows, labels = make(64, 5000, 128, None, torch.float64)
    log_weight = float(torch.log(torch.tensor(10_000_000 / 5000)))
    exact = negatives.forward(embeddings, weight, rows, labels, scale=64.0, log_weight=log_weight).exp_sum.log()
    single = negatives.forward(
        embeddings.float(), weight.float(), rows, labels, scale=64.0, log_weight=log_weight
    ).exp_sum
    assert float((single.double().log() - exact).abs().max()) < 2e-5


@given(
    parts=st.lists(st.lists(st.integers(0, 12), min_size=0, max_size=13, unique=True), min_size=1, max_size=4),
    whole=st.booleans(),
)
@settings(deadline=None)
def test_merge_adds_like_dense_matrices(parts: list[list[int]], whole: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = []
    dense = torch.zeros(13, 3, dtype=torch.float64)
    for part in parts:
        rows = torch.tensor(sorted(part), dtype=torch.int64)
        values = torch.randn(len(rows), 3, generator=generator, dtype=torch.float64)
        dense.index_add_(0, rows, values)
        gradients.append(RowGradient(rows, values))
    if whole:
        values = torch.randn(13, 3, generator=generator, dtype=torch.float64)
        dense += values
        gradients.append(RowGradient(None, values))
    merged = merge(gradients)
    result = torch.zeros_like(dense)
    if merged.rows is None:
        assert whole
        result = merged.values
    else:
        assert merged.rows.tolist() == sorted({row for part in parts for row in part})
        result[merged.rows] = merged.values
    torch.testing.assert_close(result, dense)


def test_chunked_never_holds_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peers keep several [batch, classes] matrices; here the largest tensor is the row gradient itself."""
    monkeypatch.setattr(chunked, "CHUNK_ROWS", 64)
    monkeypatch.setattr(chunked, "KEEP_BYTES", 0)
    embeddings, weight, rows, labels = make(256, 5000, 8, None, torch.float32)
    with Largest() as forward:
        sums = negatives.forward(embeddings, weight, rows, labels, scale=16.0, kernel="chunked")
    assert 0 < forward.numel <= 256 * 64
    with Largest() as backward:
        sums.row_pass(torch.ones(256))
    assert backward.numel == 5000 * 8
    with Largest() as dense:
        negatives.forward(embeddings, weight, rows, labels, scale=16.0, kernel="reference")
    assert dense.numel == 256 * 5000
