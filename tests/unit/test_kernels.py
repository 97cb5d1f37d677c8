"""Every kernel gives what the reference gives, over chunk borders, kept or recomputed, and merges of row gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megaclass.kernels import chunked, negatives
from megaclass.kernels.interface import Candidates, Negatives
from megaclass.kernels.row_gradient import RowGradient, merge
from megaclass.kernels.terms import Exponential, Summed, Term
from megaclass.objectives.negative_map import NEGATIVE_MAPS, filtered, filtered_function
from megaclass.objectives.objective import OBJECTIVES, Values
from tests.support.largest import Largest

QUADRATIC = NEGATIVE_MAPS.build("quadratic").bind(None, 0.25)
CIRCLE = NEGATIVE_MAPS.build("circle").bind(None, 0.25)
BIAS = torch.tensor(0.75, dtype=torch.float64)


def summed(name: str) -> Summed:
    function = OBJECTIVES.build(name).negative_function(Values(16.0, margin=0.4), BIAS)
    assert function is not None
    return Summed(function, has_bias=name != "sface")


TERMS: dict[str, Term] = {
    "plain": Exponential(16.0),
    "quadratic": Exponential(16.0, QUADRATIC),
    "filtered": Exponential(16.0, filtered(None, 0.2)),
    "filtered quadratic": Exponential(16.0, filtered(QUADRATIC, 0.2)),
    "all filtered": Exponential(16.0, filtered(None, -1.1)),
    "with maximum": Exponential(256.0, CIRCLE, use_maximum=True),
    "filtered with maximum": Exponential(256.0, filtered(CIRCLE, 0.2), use_maximum=True),
    "all filtered with maximum": Exponential(256.0, filtered(None, -1.1), use_maximum=True),
    "sphereface2": summed("sphereface2"),
    "uniface": summed("uniface"),
    "sface": summed("sface"),
    "filtered uniface": Summed(filtered_function(summed("uniface").function, 0.2), has_bias=True),
}


@dataclass(frozen=True)
class Layer:
    """The arguments of one call; `drawn` of None is all rows, `is_corrected` gives every row a weight of its own."""

    m: int = 5
    classes: int = 13
    dim: int = 7
    drawn: int | None = None
    rows_per_class: int = 1
    is_corrected: bool = False
    term: str = "plain"
    dtype: torch.dtype = torch.float64

    def tensors(self) -> tuple[Tensor, Candidates, Tensor]:
        generator = torch.Generator().manual_seed(self.m * 1000 + self.classes)
        embeddings = torch.randn(self.m, self.dim, generator=generator, dtype=self.dtype)
        weight = torch.randn(self.classes * self.rows_per_class, self.dim, generator=generator, dtype=self.dtype)
        rows = None
        if self.drawn is not None:
            rows = torch.randperm(self.classes, generator=generator)[: self.drawn].sort().values
        labels = torch.randint(-1, self.classes, (self.m,), generator=generator)
        size = self.classes if rows is None else len(rows)
        log_weight = torch.rand(size, generator=generator).double() if self.is_corrected else 0.7
        embeddings = torch.nn.functional.normalize(embeddings, dim=1)
        return embeddings, Candidates(weight, rows, log_weight, self.rows_per_class), labels

    def run(self, kernel: str, **changed: Any) -> Negatives:
        embeddings, candidates, labels = self.tensors()
        candidates = replace(candidates, **{key: x for key, x in changed.items() if key != "embeddings"})
        embeddings = changed.get("embeddings", embeddings)
        return negatives.forward(embeddings, candidates, labels, TERMS[self.term], monitor=True, kernel=kernel)


def all_rows(sums: Negatives, coefficients: Tensor) -> Tensor:
    """The gradient of all candidates' rows: the blocks of the second pass, one after another without a gap."""
    values = [coefficients.new_empty(0, sums.embedding_gradient.shape[1])]
    stop = 0
    for block in sums.row_pass(coefficients):
        assert block.start == stop
        assert len(block.values) == block.stop - block.start
        values.append(block.values.clone())
        stop = block.stop
    return torch.cat(values)


def all_rows_in_given_memory(sums: Negatives, coefficients: Tensor, num_rows: int) -> Tensor:
    """The same, where every block has to stand at its place in one piece of memory."""
    memory = coefficients.new_full((num_rows, sums.embedding_gradient.shape[1]), torch.nan)
    for block in sums.row_pass(coefficients, memory):
        assert block.values.data_ptr() == memory[block.start :].data_ptr()
        assert block.values.shape == memory[block.start : block.stop].shape
    return memory


def same(actual: Tensor | None, expected: Tensor | None) -> None:
    """Equal up to rounding, relative to the largest entry."""
    assert (actual is None) == (expected is None)
    if actual is None or expected is None or not expected.numel():
        return
    finite = expected[torch.isfinite(expected)].abs()
    largest = float(finite.max()) if len(finite) else 0.0
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12 * largest)


def compare(layer: Layer, chunk: int, keep: bool) -> None:
    """The chunked kernel against the reference."""
    coefficients = torch.linspace(0.1, 1, layer.m, dtype=torch.float64)
    want = layer.run("reference")
    with (
        mock.patch.object(chunked, "CHUNK_ROWS", chunk),
        mock.patch.object(chunked, "KEEP_BYTES", 2**20 if keep else 0),
    ):
        got = layer.run("chunked")
        got_rows, want_rows = all_rows(got, coefficients), all_rows(want, coefficients)
    for name in ("total", "embedding_gradient", "maximum", "bias_derivative"):
        same(getattr(got, name), getattr(want, name))
    assert got.monitor is not None
    assert want.monitor is not None
    for name in ("cosine_sum", "num_pairs", "cosine_max"):
        torch.testing.assert_close(getattr(got.monitor, name), getattr(want.monitor, name), rtol=1e-12, atol=1e-12)
    num_rows = (layer.classes if layer.drawn is None else min(layer.drawn, layer.classes)) * layer.rows_per_class
    assert len(got_rows) == len(want_rows) == num_rows
    same(got_rows, want_rows)
    for kernel in negatives.KERNELS:
        same(all_rows_in_given_memory(layer.run(kernel), coefficients, num_rows), want_rows)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("term", TERMS)
def test_chunked_equals_reference_for_every_term(term: str, keep: bool) -> None:
    for chunk in (1, 4, 13, 2048):
        for drawn in (None, 5, 0):
            compare(Layer(term=term, drawn=drawn, is_corrected=True), chunk, keep)


@given(
    layer=st.builds(
        Layer,
        m=st.integers(1, 6),
        classes=st.integers(1, 20),
        dim=st.integers(2, 9),
        drawn=st.none() | st.integers(0, 20),
        rows_per_class=st.integers(1, 3),
        is_corrected=st.booleans(),
        term=st.sampled_from(sorted(TERMS)),
    ),
    chunk=st.integers(1, 25),
    keep=st.booleans(),
)
@settings(deadline=None, max_examples=150)
def test_chunked_equals_reference_for_any_shape(layer: Layer, chunk: int, keep: bool) -> None:
    compare(layer, chunk, keep)


def test_a_shard_without_rows_contributes_nothing() -> None:
    for kernel in negatives.KERNELS:
        got = Layer().run(kernel, weight=torch.zeros(0, 7, dtype=torch.float64), log_weight=0.0)
        assert got.total.tolist() == [0.0] * 5
        assert all_rows(got, torch.ones(5, dtype=torch.float64)).shape == (0, 7)


@pytest.mark.parametrize("kernel", negatives.KERNELS)
@pytest.mark.parametrize("drawn", [None, 9])
@pytest.mark.parametrize("term", ["plain", "with maximum", "uniface"])
def test_own_class_is_left_out_also_where_it_is_drawn(kernel: str, drawn: int | None, term: str) -> None:
    layer = Layer(drawn=drawn, term=term)
    _, candidates, labels = layer.tensors()
    got, rows = layer.run(kernel), candidates.rows
    is_own = labels >= 0 if rows is None else torch.isin(labels, rows)
    assert int(is_own.sum()) > 1
    for sample in is_own.nonzero()[:, 0].tolist():
        weight = candidates.weight.clone()
        weight[labels[sample]] *= -1.0
        turned = layer.run(kernel, weight=weight).total
        assert torch.equal(turned[sample], got.total[sample])
        assert not torch.equal(turned, got.total), "the other samples have this class as a negative"


@pytest.mark.parametrize("kernel", negatives.KERNELS)
@pytest.mark.parametrize(("term", "rows_per_class"), [("quadratic", 2), ("sphereface2", 1), ("plain", 3)])
def test_gradients_are_those_of_finite_differences(kernel: str, term: str, rows_per_class: int) -> None:
    layer = Layer(drawn=6, term=term, rows_per_class=rows_per_class, is_corrected=True)
    embeddings, candidates, _ = layer.tensors()
    coefficients = torch.linspace(0.1, 1, 5, dtype=torch.float64)
    got = layer.run(kernel)
    gradient = torch.zeros_like(candidates.weight)
    gradient[candidates.weight_rows] = all_rows(got, coefficients)
    for name, tensor, wanted in (
        ("embeddings", embeddings, coefficients[:, None] * got.embedding_gradient),
        ("weight", candidates.weight, gradient),
    ):
        slopes = _differences(lambda x, name=name: (coefficients * layer.run(kernel, **{name: x}).total).sum(), tensor)
        assert float((wanted - slopes).abs().max()) < 1e-7 * float(slopes.abs().max())


def _differences(function: Callable[[Tensor], Tensor], at: Tensor, step: float = 1e-5) -> Tensor:
    slopes = torch.zeros_like(at)
    for place in range(at.numel()):
        move = torch.zeros_like(at)
        move.view(-1)[place] = step
        slopes.view(-1)[place] = (function(at + move) - function(at - move)) / (2 * step)
    return slopes


@pytest.mark.parametrize("kernel", negatives.KERNELS)
def test_log_weights_multiply_what_a_row_contributes(kernel: str) -> None:
    for term in ("plain", "uniface"):
        layer = Layer(term=term)
        once = layer.run(kernel, log_weight=0.0)
        twice = layer.run(kernel, log_weight=torch.full((13,), 2.0).double().log())
        torch.testing.assert_close(twice.total, 2 * once.total)
        torch.testing.assert_close(twice.embedding_gradient, 2 * once.embedding_gradient)


@pytest.mark.parametrize("kernel", negatives.KERNELS)
def test_zero_row_has_cosine_zero_and_no_gradient(kernel: str) -> None:
    layer = Layer(dtype=torch.float32)
    weight = layer.tensors()[1].weight
    weight[2] = 0.0
    got = layer.run(kernel, weight=weight)
    assert bool(torch.isfinite(got.total).all())
    rows = all_rows(got, torch.ones(5))
    assert bool(torch.isfinite(rows).all())
    assert rows[2].tolist() == [0.0] * 7
    assert float(rows[3].abs().max()) > 0


@pytest.mark.parametrize("drawn", [None, 9])
@pytest.mark.parametrize("term", ["plain", "quadratic", "with maximum", "sphereface2"])
@pytest.mark.parametrize("rows_per_class", [1, 2])
def test_bfloat16_rows_give_what_their_float32_copies_give(drawn: int | None, term: str, rows_per_class: int) -> None:
    """With embeddings of bfloat16 too the sums are those of float32; in the gradients a factor is rounded (2^-9)."""
    layer = Layer(m=33, classes=70, dim=40, drawn=drawn, term=term, rows_per_class=rows_per_class, dtype=torch.float32)
    low = layer.tensors()[1].weight.bfloat16()
    coefficients = torch.linspace(0.1, 1, 33)
    embeddings = layer.tensors()[0].bfloat16().float()
    want = layer.run("reference", weight=low.float(), embeddings=embeddings)
    got = layer.run("chunked", weight=low, embeddings=embeddings)
    assert got.total.dtype == torch.float32
    assert got.embedding_gradient.dtype == torch.float32
    torch.testing.assert_close(got.total, want.total, rtol=1e-4, atol=0)
    for actual, expected in (
        (got.embedding_gradient, want.embedding_gradient),
        (all_rows(got, coefficients), all_rows(want, coefficients)),
    ):
        assert float((actual - expected).norm() / expected.norm()) < 2**-8
    torch.testing.assert_close(layer.run("reference", weight=low, embeddings=embeddings).total, want.total)


@pytest.mark.parametrize("kernel", negatives.KERNELS)
def test_exponents_beyond_float32_are_summed_relative_to_the_largest(kernel: str) -> None:
    embeddings, _, labels = Layer(dtype=torch.float32).tensors()
    weight = torch.cat([embeddings, embeddings, embeddings[:3]])

    def log_sum(dtype: torch.dtype, kernel: str) -> Tensor:
        candidates = Candidates(weight.to(dtype))
        got = negatives.forward(embeddings.to(dtype), candidates, labels, TERMS["with maximum"], kernel=kernel)
        assert got.maximum is not None
        assert float(got.maximum.max()) > 230
        return (got.total.log() + got.maximum).double()

    torch.testing.assert_close(log_sum(torch.float32, kernel), log_sum(torch.float64, "reference"), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kernel", negatives.KERNELS)
def test_monitor_changes_no_number(kernel: str) -> None:
    for term in TERMS:
        layer = Layer(term=term, drawn=9)
        embeddings, candidates, labels = layer.tensors()
        asked = layer.run(kernel)
        silent = negatives.forward(embeddings, candidates, labels, TERMS[term], kernel=kernel)
        assert silent.monitor is None
        assert torch.equal(asked.total, silent.total)
        assert torch.equal(asked.embedding_gradient, silent.embedding_gradient)


def test_kernels_leave_their_arguments_alone() -> None:
    for kernel in negatives.KERNELS:
        for term in TERMS:
            embeddings, candidates, labels = Layer(term=term, is_corrected=True).tensors()
            before = [x.clone() for x in (embeddings, candidates.weight, candidates.log_weight, labels)]
            got = negatives.forward(embeddings, candidates, labels, TERMS[term], monitor=True, kernel=kernel)
            all_rows(got, torch.ones(5, dtype=torch.float64))
            after = (embeddings, candidates.weight, candidates.log_weight, labels)
            assert all(map(torch.equal, before, after)), (kernel, term)


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


@pytest.mark.parametrize("term", ["plain", "quadratic", "with maximum", "filtered uniface"])
def test_chunked_never_holds_the_logits(monkeypatch: pytest.MonkeyPatch, term: str) -> None:
    """Peers keep several [batch, classes] matrices; here nothing is larger than a chunk's logits."""
    monkeypatch.setattr(chunked, "CHUNK_ROWS", 64)
    monkeypatch.setattr(chunked, "KEEP_BYTES", 0)
    layer = Layer(m=256, classes=5000, dim=8, term=term, dtype=torch.float32)
    embeddings, candidates, labels = layer.tensors()

    def run(kernel: str) -> Negatives:
        return negatives.forward(embeddings, candidates, labels, TERMS[term], monitor=True, kernel=kernel)

    with Largest() as forward:
        sums = run("chunked")
    assert 0 < forward.numel <= 256 * 64
    with Largest() as backward:
        for _ in sums.row_pass(torch.ones(256)):
            pass
    assert 0 < backward.numel <= 256 * 64
    with Largest() as dense:
        run("reference")
    assert dense.numel >= 256 * 5000
