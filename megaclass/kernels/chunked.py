"""The class layer chunk by chunk over classes, in plain torch, for CPU and GPU.

Chunks run over classes and never over the batch: the batch is small, the classes are many, and a chunk of classes is
touched once per pass. No logits matrix and no second copy of the rows ever exists; what the second pass needs of a
chunk is kept only where it is small (`KEEP_BYTES`), and is computed again otherwise.

Rows are never brought to unit length, which would be a pass over them: the inverse lengths [c] multiply the products
[m, c], of which there are fewer numbers. The slopes a chunk hands on are those in the raw products e . w, so that the
same matrix gives the embedding gradient (slopes @ rows) and the row gradient (slopes^T @ embeddings, less its part
along the row).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megaclass.kernels.interface import Candidates, Monitor, Negatives, RowBlock, rows_of
from megaclass.kernels.memory import Memory
from megaclass.kernels.product import low_precision, product
from megaclass.kernels.terms import Exponential, Summed, Term

# About 2,048 rows keep a chunk's logits and rows in the second- and third-level cache of a CPU core.
CHUNK_ROWS = 2048
# A chunk's logits on a GPU: the host issues some forty operators for a chunk, and with fewer logits (of 4,096 samples
# and 2,048 rows, say) the GPU has done them long before the next are issued. Reckoned, not measured.
GPU_LOGITS = 2**26
# Slopes and drawn rows up to this size are kept for the second pass: that saves one third of its work, or gathering.
KEEP_BYTES = 256 * 2**20


@dataclass
class _Chunk:
    """One chunk of classes: [m, c] contributions, and what they change by with the mapped cosine."""

    values: Tensor
    slopes: Tensor
    bias_slopes: Tensor | None
    best: Tensor | None  # [m, c] which sub-centre stands for the class
    shift: Tensor | None  # [m] what the exponents were reduced by


@dataclass
class _Rows:
    """The rows [c * rows_per_class, dim] of one chunk as they are stored, in the type of the sums, and 1 / length."""

    values: Tensor
    inverse: Tensor


@dataclass
class _Kept:
    """What the second pass needs of a chunk: slopes [m, c * rows_per_class] in the raw products, and their shift."""

    slopes: Tensor
    shift: Tensor | None


def chunk_rows(batch: int, device_type: str) -> int:
    """How many rows a chunk has for so many samples on such a device."""
    return CHUNK_ROWS if device_type == "cpu" else max(CHUNK_ROWS, GPU_LOGITS // batch)


def keeps_slopes(batch: int, num_rows: int) -> bool:
    """Whether the slopes of so many samples and rows are kept between the passes (float32)."""
    return batch * num_rows * 4 <= KEEP_BYTES


def keeps_rows(num_drawn: int | None, dim: int) -> bool:
    """Whether so many drawn rows are kept between the passes (float32) rather than gathered twice."""
    return num_drawn is not None and num_drawn * dim * 4 <= KEEP_BYTES


def forward(
    embeddings: Tensor,
    candidates: Candidates,
    labels: Tensor,
    term: Term,
    *,
    monitor: bool = False,
    memory: Memory | None = None,
) -> Negatives:
    """Sums accumulated over chunks of classes; see `negatives.Kernel`.

    Cost: [m, c] logits and [c, dim] rows of `chunk_rows` at a time; [m, n] slopes, and drawn rows [n, dim], if they
    fit KEEP_BYTES.
    """
    layer = _Layer(embeddings, candidates, labels, term, memory or Memory())
    num_drawn = None if candidates.rows is None else len(candidates.rows) * candidates.rows_per_class
    keep_rows = keeps_rows(num_drawn, embeddings.shape[1])
    keep = keeps_slopes(len(embeddings), layer.num_classes * candidates.rows_per_class)
    total, gradient = embeddings.new_zeros(len(embeddings)), torch.zeros_like(embeddings)
    maximum = embeddings.new_full((len(embeddings),), -torch.inf) if layer.use_maximum else None
    bias_derivative = torch.zeros_like(total) if isinstance(term, Summed) and term.has_bias else None
    seen = None
    kept: list[_Kept] = []
    loaded: list[_Rows | None] = []
    inverse = embeddings.new_empty(layer.num_classes * candidates.rows_per_class)
    layer.keeps_logits, layer.keeps_rows = keep, keep_rows
    for start, stop in layer.chunks():
        rows = layer.rows(start, stop)
        cosines, best = layer.cosines(rows)
        if monitor:
            seen = layer.monitored(cosines, start, stop, seen)
        if maximum is not None:
            exponents, slopes = layer.exponents(cosines, start, stop)
            larger = torch.maximum(maximum, exponents.amax(dim=1))
            shrink = _exponential_of_difference(maximum, larger)
            total.mul_(shrink)
            gradient.mul_(shrink[:, None])
            maximum = larger
            chunk = layer.shifted(exponents, slopes, best, maximum)
        else:
            chunk = layer.contributions(cosines, best, start, stop)
        total += chunk.values.sum(dim=1)
        if chunk.bias_slopes is not None and bias_derivative is not None:
            bias_derivative += chunk.bias_slopes.sum(dim=1)
        raw = layer.on_rows(chunk, rows)
        gradient += layer.multiplied(raw, rows.values)
        if keep:
            kept.append(_Kept(raw, chunk.shift))
        loaded.append(rows if keep_rows else None)
        inverse[start * candidates.rows_per_class : stop * candidates.rows_per_class] = rows.inverse

    def row_pass(coefficients: Tensor, out: Tensor | None = None) -> Iterator[RowBlock]:
        weighted = embeddings * coefficients[:, None]
        per_class = candidates.rows_per_class
        for number, (start, stop) in enumerate(layer.chunks()):
            first, last = start * per_class, stop * per_class
            rows = loaded[number] or layer.rows(start, stop, inverse[first:last])
            now = kept[number] if keep else layer.again(rows, start, stop, maximum)
            left = weighted
            if now.shift is not None and maximum is not None:
                left = weighted * _exponential_of_difference(now.shift, maximum)[:, None]
            place = layer.scratch("direction", last - first, left.shape[1]) if out is None else out[first:last]
            direction = layer.multiplied(now.slopes.T, left, place)
            # Only the part across the row counts: its length is normalised away.
            along = torch.mul(rows.values, direction, out=layer.scratch("along", *direction.shape))
            radial = along.sum(dim=1).mul_(rows.inverse.square())
            direction.addcmul_(rows.values, radial[:, None], value=-1)
            yield RowBlock(first, last, direction, rows.values)
        kept.clear()
        loaded.clear()

    if monitor and seen is None:
        seen = Monitor(total.new_zeros(()), total.new_zeros(()), total.new_tensor(-torch.inf))
    return Negatives(total, gradient, row_pass, maximum, bias_derivative, seen)


def _exponential_of_difference(smaller: Tensor, larger: Tensor) -> Tensor:
    """e^{smaller - larger}, and 1 where both are minus infinity: nothing was summed yet."""
    return torch.where(smaller == larger, 1.0, (smaller - larger).exp())


class _Layer:
    """The arguments of one forward pass, with the steps both passes take for a chunk of classes [start, stop)."""

    def __init__(self, embeddings: Tensor, candidates: Candidates, labels: Tensor, term: Term, memory: Memory) -> None:
        self.embeddings, self.candidates, self.labels, self.term = embeddings, candidates, labels, term
        self.num_classes = candidates.num_classes
        self.use_maximum = isinstance(term, Exponential) and term.use_maximum
        self.is_low = candidates.weight.dtype == torch.bfloat16
        self.keeps_logits = self.keeps_rows = False
        self._memory = memory
        # An exponential's slope is its value times the scale, which is applied together with the inverse lengths.
        self.factor = term.scale if isinstance(term, Exponential) else 1.0

    def scratch(self, name: str, num_rows: int, num_columns: int) -> Tensor:
        """Memory [num_rows, num_columns] that chunks take over from each other.

        Allocated anew for every chunk it would leave a CPU's heap in pieces several times the size of a chunk.
        """
        return self._memory.piece(name, num_rows, num_columns, self.embeddings)

    def chunks(self) -> list[tuple[int, int]]:
        """Ranges of candidates; sub-centres make them shorter, so that a chunk's rows stay as many."""
        size = chunk_rows(max(1, len(self.embeddings)), self.embeddings.device.type)
        size = max(1, size // self.candidates.rows_per_class)
        return [(start, min(start + size, self.num_classes)) for start in range(0, self.num_classes, size)]

    def rows(self, start: int, stop: int, inverse: Tensor | None = None) -> _Rows:
        """The chunk's rows; a view of the class weights where they are all candidates and not bfloat16.

        `inverse` is 1 / length where it is known.
        """
        weight, rows, per_class = self.candidates.weight, self.candidates.rows, self.candidates.rows_per_class
        first, last = start * per_class, stop * per_class
        is_wide = weight.dtype == self.embeddings.dtype
        if rows is None:
            chunk = weight[first:last]
        else:
            numbers = rows_of(rows[start:stop], per_class)
            place = (
                self._place(first, last)
                if is_wide
                else self._memory.piece("low rows", len(numbers), weight.shape[1], weight)
            )
            chunk = torch.index_select(weight, 0, numbers, out=place)
        if not is_wide:
            chunk = self._place(first, last).copy_(chunk)
        if inverse is None:
            length = torch.linalg.vector_norm(chunk, dim=1)
            # A row of length zero has no direction: cosine and gradient are zero.
            inverse = torch.where(length > 0, 1 / length, 0.0)
        return _Rows(chunk, inverse)

    def _place(self, first: int, last: int) -> Tensor:
        """Memory for rows [first, last), one's own if they are to be kept."""
        dim = self.embeddings.shape[1]
        if not self.keeps_rows:
            return self.scratch("rows", last - first, dim)
        return self.scratch("kept rows", self.num_classes * self.candidates.rows_per_class, dim)[first:last]

    def multiplied(self, left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
        """The matrix product in the precision that the rows are stored for."""
        with low_precision(self.is_low, left.device):
            return product(left, right, self.is_low, out)

    def cosines(self, rows: _Rows) -> tuple[Tensor, Tensor | None]:
        """Cosines [m, c] with each class, and which sub-centre [m, c] gave them."""
        memory = None if self.keeps_logits else self.scratch("logits", len(self.embeddings), len(rows.values))
        cosines = self.multiplied(self.embeddings, rows.values.T, memory).mul_(rows.inverse)
        if self.candidates.rows_per_class == 1:
            return cosines, None
        best = cosines.unflatten(1, (-1, self.candidates.rows_per_class)).max(dim=2)
        return best.values, best.indices

    def contributions(self, cosines: Tensor, best: Tensor | None, start: int, stop: int) -> _Chunk:
        """What the chunk's negatives contribute; `cosines` may be used up."""
        if not isinstance(self.term, Exponential):
            values, slopes, bias_slopes = self.term.function(cosines)
            weight = self._log_weight(start, stop)
            for x in (values, slopes, bias_slopes):
                if x is not None:
                    if weight is not None:
                        x.mul_(weight.exp())
                    self._put_at_own(x, start, stop, 0.0)
            return _Chunk(values, slopes, bias_slopes, best, None)
        exponents, map_slopes = self.exponents(cosines, start, stop, mask=False)
        values = self._put_at_own(exponents.exp_(), start, stop, 0.0)
        return _Chunk(values, values if map_slopes is None else map_slopes.mul_(values), None, best, None)

    def exponents(self, cosines: Tensor, start: int, stop: int, mask: bool = True) -> tuple[Tensor, Tensor | None]:
        """S g(cos) + log_weight [m, c], with minus infinity at a sample's own class, and the derivative of g."""
        assert isinstance(self.term, Exponential)
        if self.term.transform is None:
            exponents, slopes = cosines.mul_(self.term.scale), None
        else:
            mapped, slopes = self.term.transform(cosines)
            exponents = mapped.mul_(self.term.scale)
        weight = self._log_weight(start, stop)
        if weight is not None:
            exponents.add_(weight)
        if mask:
            self._put_at_own(exponents, start, stop, -torch.inf)
        return exponents, slopes

    def shifted(self, exponents: Tensor, slopes: Tensor | None, best: Tensor | None, maximum: Tensor) -> _Chunk:
        """Contributions relative to `maximum` [m]."""
        # Without a finite exponent so far everything is e^{-inf}; the finite stand-in avoids inf - inf.
        values = exponents.sub_(maximum.clamp_min(torch.finfo(maximum.dtype).min)[:, None]).exp_()
        return _Chunk(values, values if slopes is None else slopes.mul_(values), None, best, maximum)

    def again(self, rows: _Rows, start: int, stop: int, maximum: Tensor | None) -> _Kept:
        """The chunk's slopes computed a second time, relative to the final maximum."""
        cosines, best = self.cosines(rows)
        if maximum is None:
            chunk = self.contributions(cosines, best, start, stop)
        else:
            exponents, slopes = self.exponents(cosines, start, stop)
            chunk = self.shifted(exponents, slopes, best, maximum)
        return _Kept(self.on_rows(chunk, rows), chunk.shift)

    def on_rows(self, chunk: _Chunk, rows: _Rows) -> Tensor:
        """Slopes [m, c * rows_per_class] in the raw products; uses the chunk up.

        They are zero for the sub-centres that do not stand for their class.
        """
        slopes = chunk.slopes
        if chunk.best is not None:
            spread = slopes.new_zeros(*slopes.shape, self.candidates.rows_per_class)
            slopes = spread.scatter_(2, chunk.best[:, :, None], slopes[:, :, None]).flatten(1)
        return slopes.mul_(rows.inverse * self.factor)

    def monitored(self, cosines: Tensor, start: int, stop: int, before: Monitor | None) -> Monitor:
        """The running summary with this chunk, read while it is in cache."""
        column, is_own = self._own_column(start, stop)
        own = torch.where(is_own, cosines.gather(1, column[:, None])[:, 0], 0.0)
        others = self._put_at_own(cosines.clone(), start, stop, -torch.inf)
        now = Monitor(cosines.sum() - own.sum(), cosines.numel() - is_own.sum().to(cosines.dtype), others.max())
        if before is None:
            return now
        return Monitor(
            before.cosine_sum + now.cosine_sum,
            before.num_pairs + now.num_pairs,
            torch.maximum(before.cosine_max, now.cosine_max),
        )

    def _log_weight(self, start: int, stop: int) -> Tensor | None:
        weight = self.candidates.log_weight
        if isinstance(weight, Tensor):
            return weight[start:stop].to(self.embeddings.dtype)
        return self.embeddings.new_tensor(weight) if weight else None

    def _own_column(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """In which column of the chunk each sample's own class stands [m], and whether it does [m]."""
        rows = self.candidates.rows
        classes = torch.arange(start, stop, device=self.labels.device) if rows is None else rows[start:stop]
        # A sample's own class stands in at most one column. Looking it up costs a search in the chunk's sorted rows
        # instead of a comparison of every sample with every row; samples without one use column 0.
        column = torch.searchsorted(classes, self.labels).clamp_max_(stop - start - 1)
        is_own = classes[column] == self.labels
        return torch.where(is_own, column, 0), is_own

    def _put_at_own(self, x: Tensor, start: int, stop: int, value: float) -> Tensor:
        """`x` [m, c] with `value` at each sample's own class, in place."""
        column, is_own = self._own_column(start, stop)
        column = column[:, None]
        return x.scatter_(1, column, x.gather(1, column).masked_fill_(is_own[:, None], value))
