"""The class layer in fused Triton kernels, for GPUs: no logits in memory, rows gathered inside, sums in float32.

Three kernels. `_lengths` reads the drawn rows once for their inverse lengths. `_forward` takes blocks of samples: for
each block of classes it computes logits, exponentials, the sum, and with a second product the embedding gradient.
`_rows` takes blocks of classes ("owner computes"): it recomputes the exponentials, adds up the row's gradient over all
samples, takes out the part along the row, and writes it once. No atomic additions: partial sums are added up in a fixed
order, so that two runs are equal to the bit.

Products take bfloat16 operands where rows are bfloat16, and exact float32 ones where they are float32. Under Triton's
interpreter (TRITON_INTERPRET=1, CPU) bfloat16 operands are widened first: its products of bfloat16 are wrong.

This file imports Triton at its top because a kernel must be a module-level function; it is itself imported only where
the kernel is asked for (`negatives.py`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megaclass.kernels.interface import Candidates, Monitor, Negatives, RowBlock
from megaclass.kernels.memory import Memory
from megaclass.kernels.terms import Exponential, Filtered, Quadratic, Term

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Rows whose gradient is made at a time; bounds the memory of the second pass.
BLOCK_ROWS = 16384
_SAMPLES, _CLASSES = 32, 32
# Parts the classes are cut into in the forward pass, so that a small batch fills a GPU; their sums are added up after.
_PARTS = 8


@triton.jit
def _lengths(weight, rows, inverse, n, dim, stride, has_rows: tl.constexpr, width: tl.constexpr, block: tl.constexpr):
    """inverse[j] = 1 / length of candidate j, 0 for a row of length zero."""
    place = tl.program_id(0) * block + tl.arange(0, block)
    is_in = place < n
    row = tl.load(rows + place, mask=is_in, other=0) if has_rows else place.to(tl.int64)
    column = tl.arange(0, width)
    at = weight + row[:, None] * stride + column[None, :]
    values = tl.load(at, mask=is_in[:, None] & (column < dim)[None, :], other=0.0).to(tl.float32)
    square = tl.sum(values * values, axis=1)
    tl.store(inverse + place, tl.where(square > 0, 1.0 / tl.sqrt(tl.where(square > 0, square, 1.0)), 0.0), mask=is_in)


@triton.jit
def _contributions(
    cosine, counts, log_weight, scale, goal, curve, margin, left, threshold,
    is_quadratic: tl.constexpr, is_filtered: tl.constexpr,
):  # fmt: skip
    """Exponentials of a tile of cosines, and their derivatives in the cosine over the scale."""
    mapped = cosine
    slope = tl.full(cosine.shape, 1.0, tl.float32)
    if is_quadratic:
        distance = cosine - goal
        is_active = cosine > left
        mapped = tl.where(is_active, curve * distance * distance - margin * margin, 0.0)
        slope = tl.where(is_active, 2.0 * curve * distance, 0.0)
    if is_filtered:
        counts = counts & (cosine <= threshold)
    value = tl.where(counts, tl.exp(scale * mapped + log_weight[None, :]), 0.0)
    return value, value * slope


@triton.jit
def _tile(
    weight, rows, inverse, log_weight, place, n, dim, stride, column, has_rows: tl.constexpr, has_weight: tl.constexpr
):
    """One block of candidates: their classes, rows, inverse lengths and log weights."""
    is_in = place < n
    row = tl.load(rows + place, mask=is_in, other=-1) if has_rows else tl.where(is_in, place, -1).to(tl.int64)
    at = weight + tl.where(is_in, row, 0)[:, None] * stride + column[None, :]
    values = tl.load(at, mask=is_in[:, None] & (column < dim)[None, :], other=0.0)
    length = tl.load(inverse + place, mask=is_in, other=0.0)
    extra = tl.load(log_weight + place, mask=is_in, other=0.0) if has_weight else tl.zeros(place.shape, tl.float32)
    return is_in, row, values, length, extra


@triton.jit
def _forward(
    embeddings, weight, rows, inverse, log_weight, labels, total, gradient, seen,
    m, n, dim, stride, scale, goal, curve, margin, left, threshold,
    has_rows: tl.constexpr, has_weight: tl.constexpr, is_quadratic: tl.constexpr, is_filtered: tl.constexpr,
    widen: tl.constexpr, width: tl.constexpr, samples: tl.constexpr, classes: tl.constexpr, parts: tl.constexpr,
):  # fmt: skip
    """Part `program_id(1)` of the sums [parts, m], gradients [parts, m, dim] and monitors [parts, 3, m]."""
    sample = tl.program_id(0) * samples + tl.arange(0, samples)
    part = tl.program_id(1)
    column = tl.arange(0, width)
    is_sample = sample < m
    inside = is_sample[:, None] & (column < dim)[None, :]
    own = tl.load(labels + sample, mask=is_sample, other=-1)
    left_operand = tl.load(embeddings + sample[:, None].to(tl.int64) * dim + column[None, :], mask=inside, other=0.0)
    if not widen:
        left_operand = left_operand.to(weight.dtype.element_ty)
    summed = tl.zeros([samples], tl.float32)
    moved = tl.zeros([samples, width], tl.float32)
    cosine_sum = tl.zeros([samples], tl.float32)
    pairs = tl.zeros([samples], tl.float32)
    largest = tl.full([samples], float("-inf"), tl.float32)
    for start in range(part * classes, n, parts * classes):
        place = start + tl.arange(0, classes)
        is_in, row, values, length, extra = _tile(
            weight, rows, inverse, log_weight, place, n, dim, stride, column, has_rows, has_weight
        )
        if widen:
            values = values.to(tl.float32)
        cosine = tl.dot(left_operand, tl.trans(values), input_precision="ieee") * length[None, :]
        counts = is_in[None, :] & (row[None, :] != own[:, None]) & is_sample[:, None]
        value, slope = _contributions(
            cosine, counts, extra, scale, goal, curve, margin, left, threshold, is_quadratic, is_filtered
        )
        summed += tl.sum(value, axis=1)
        moved += tl.dot((slope * (scale * length)[None, :]).to(values.dtype), values, input_precision="ieee")
        cosine_sum += tl.sum(tl.where(counts, cosine, 0.0), axis=1)
        pairs += tl.sum(counts.to(tl.float32), axis=1)
        largest = tl.maximum(largest, tl.max(tl.where(counts, cosine, float("-inf")), axis=1))
    tl.store(total + part * m + sample, summed, mask=is_sample)
    to = gradient + (part * m + sample)[:, None].to(tl.int64) * dim + column[None, :]
    tl.store(to, moved, mask=inside)
    tl.store(seen + (part * 3 + 0) * m + sample, cosine_sum, mask=is_sample)
    tl.store(seen + (part * 3 + 1) * m + sample, pairs, mask=is_sample)
    tl.store(seen + (part * 3 + 2) * m + sample, largest, mask=is_sample)


@triton.jit
def _rows(
    embeddings, weight, rows, inverse, log_weight, labels, coefficients, values_out,
    first, m, n, dim, stride, scale, goal, curve, margin, left, threshold,
    has_rows: tl.constexpr, has_weight: tl.constexpr, is_quadratic: tl.constexpr, is_filtered: tl.constexpr,
    widen: tl.constexpr, width: tl.constexpr, samples: tl.constexpr, classes: tl.constexpr,
):  # fmt: skip
    """The gradient of candidates [first + block, ...), written to `values_out` from its beginning."""
    offset = tl.program_id(0) * classes + tl.arange(0, classes)
    place = first + offset
    column = tl.arange(0, width)
    is_in, row, values, length, extra = _tile(
        weight, rows, inverse, log_weight, place, n, dim, stride, column, has_rows, has_weight
    )
    if widen:
        values = values.to(tl.float32)
    direction = tl.zeros([classes, width], tl.float32)
    for start in range(0, m, samples):
        sample = start + tl.arange(0, samples)
        is_sample = sample < m
        own = tl.load(labels + sample, mask=is_sample, other=-1)
        weighting = tl.load(coefficients + sample, mask=is_sample, other=0.0)
        right = tl.load(
            embeddings + sample[:, None].to(tl.int64) * dim + column[None, :],
            mask=is_sample[:, None] & (column < dim)[None, :], other=0.0,
        )  # fmt: skip
        if not widen:
            right = right.to(weight.dtype.element_ty)
        cosine = tl.dot(right, tl.trans(values), input_precision="ieee") * length[None, :]
        counts = is_in[None, :] & (row[None, :] != own[:, None]) & is_sample[:, None]
        _value, slope = _contributions(
            cosine, counts, extra, scale, goal, curve, margin, left, threshold, is_quadratic, is_filtered
        )
        factor = (slope * weighting[:, None]).to(values.dtype)
        direction += tl.dot(tl.trans(factor), right, input_precision="ieee")
    unit = values.to(tl.float32) * length[:, None]
    direction -= unit * tl.sum(unit * direction, axis=1)[:, None]
    to = values_out + offset[:, None].to(tl.int64) * dim + column[None, :]
    tl.store(to, direction * (scale * length)[:, None], mask=is_in[:, None] & (column < dim)[None, :])


def check(term: Term, candidates: Candidates, embeddings: Tensor) -> None:
    """Refuse what the fused kernels do not cover.

    Raises:
        ValueError: with what it is, and the kernel that covers it.
    """
    use = "use classifier.kernel chunked"
    if not (embeddings.is_cuda or IS_INTERPRETED):
        raise ValueError(f"kernel triton needs a CUDA device, or TRITON_INTERPRET=1 to be tried on a CPU; {use}")
    if embeddings.dtype != torch.float32:
        raise ValueError(f"kernel triton computes in float32, not {embeddings.dtype}; {use}")
    if candidates.weight.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"kernel triton takes rows of float32 or bfloat16, not {candidates.weight.dtype}; {use}")
    if not isinstance(term, Exponential):
        raise ValueError(f"kernel triton has no sums of per-class terms (SphereFace2, UniFace, SFace); {use}")
    if term.use_maximum:
        raise ValueError(f"kernel triton has no maxima, which exponents beyond float32 need; {use} or a smaller scale")
    inner = term.transform.inner if isinstance(term.transform, Filtered) else term.transform
    if inner is not None and not isinstance(inner, Quadratic):
        raise ValueError(f"kernel triton knows the negative maps identity and quadratic, with a filter; {use}")
    if candidates.rows_per_class > 1:
        raise ValueError(f"kernel triton has no sub-centres ({candidates.rows_per_class} rows a class); {use}")
    if not 1 <= embeddings.shape[1] <= 1024:
        raise ValueError(f"kernel triton takes embeddings of up to 1024 numbers, not {embeddings.shape[1]}; {use}")


def forward(
    embeddings: Tensor,
    candidates: Candidates,
    labels: Tensor,
    term: Term,
    *,
    monitor: bool = False,
    memory: Memory | None = None,
) -> Negatives:
    """Fused sums and gradients; see `negatives.Kernel`.

    Cost: `_PARTS` partial embedding gradients [m, dim], 4 bytes a candidate, and `BLOCK_ROWS` row gradients at a time.

    Raises:
        ValueError: as `check`.
    """
    check(term, candidates, embeddings)
    assert isinstance(term, Exponential)
    m, dim = embeddings.shape
    n = candidates.num_classes
    total = embeddings.new_zeros(_PARTS, m)
    gradient = embeddings.new_zeros(_PARTS, m, dim)
    seen = embeddings.new_zeros(_PARTS, 3, m)
    inverse = embeddings.new_zeros(max(n, 1))
    weight = candidates.weight
    rows = candidates.rows
    given, log_weight = candidates.log_weight, None
    if isinstance(given, Tensor):
        log_weight = given.to(torch.float32)
    elif given:
        log_weight = embeddings.new_full((n,), given)
    embeddings = embeddings.contiguous()
    # Where there are no drawn rows or no weights the kernel reads neither; any tensor stands for them.
    common = (
        embeddings, weight, labels if rows is None else rows, inverse, inverse if log_weight is None else log_weight,
        labels,
    )  # fmt: skip
    numbers = _numbers(term)
    shape: dict[str, Any] = {
        "has_rows": rows is not None,
        "has_weight": log_weight is not None,
        "is_quadratic": isinstance(_inner(term), Quadratic),
        "is_filtered": isinstance(term.transform, Filtered),
        "widen": IS_INTERPRETED,
        "width": max(16, triton.next_power_of_2(dim)),
        "samples": _SAMPLES if dim <= 512 else _SAMPLES // 2,
        "classes": _CLASSES if dim <= 512 else _CLASSES // 2,
    }
    if n:
        _lengths[(triton.cdiv(n, 16),)](
            weight, common[2], inverse, n, dim, weight.stride(0), rows is not None, shape["width"], 16
        )
        grid = (triton.cdiv(m, shape["samples"]), _PARTS)
        _forward[grid](
            *common, total, gradient, seen, m, n, dim, weight.stride(0), *numbers, **shape, parts=_PARTS
        )  # fmt: skip

    def row_pass(coefficients: Tensor, out: Tensor | None = None) -> Iterator[RowBlock]:
        block = embeddings.new_empty(min(n, BLOCK_ROWS) if out is None else 0, dim)
        for start in range(0, n, BLOCK_ROWS):
            stop = min(start + BLOCK_ROWS, n)
            values = block[: stop - start] if out is None else out[start:stop]
            _rows[(triton.cdiv(stop - start, shape["classes"]),)](
                *common, coefficients.contiguous(), values, start, m, stop, dim, weight.stride(0), *numbers, **shape
            )
            yield RowBlock(start, stop, values)

    found = None
    if monitor:
        largest = seen[:, 2].max() if n else total.new_tensor(-torch.inf)
        found = Monitor(seen[:, 0].sum(), seen[:, 1].sum(), largest)
    return Negatives(total.sum(dim=0), gradient.sum(dim=0), row_pass, None, None, found)


def _inner(term: Exponential) -> Any:
    return term.transform.inner if isinstance(term.transform, Filtered) else term.transform


def _numbers(term: Exponential) -> tuple[float, ...]:
    """Scale, goal, weight, margin and beginning of the quadratic map, threshold of the filter; zeros where unused."""
    inner = _inner(term)
    curve = (inner.goal, inner.weight, inner.margin, inner.left) if isinstance(inner, Quadratic) else (0.0,) * 4
    threshold = term.transform.threshold if isinstance(term.transform, Filtered) else 0.0
    return (term.scale, *curve, threshold)
