"""`ShardedClassifier`: owns this rank's class weights and turns embeddings and labels into the loss.

The path of one batch, W ranks with B samples each, G = W B:

 1. unit-length embeddings [B, dim] and labels [B] are gathered to [G, dim] and [G];
 2. the sampler draws the negative rows of this shard, or the part of the batch that has an inter term;
 3. the rank that owns a sample's class computes its cosine, and for a dissected loss its intra term, alone;
 4. the kernel sums the exponentials of this shard's negatives and, with them, the embedding gradient of each sum;
 5. ONE all-reduce completes the sums; it also carries the positive logits where the loss is entangled;
 6. the objective gives the loss and its derivatives in each sum and each positive cosine, the same on every rank;
 7. backward: the embedding gradient is reduce-scattered to the ranks its samples came from, and while it travels the
    gradient of the class-weight rows is computed. It stays here, as a `RowGradient`, until the row optimizer takes it.

Steps 3 to 7 are one autograd function, because the gradient of a sharded loss is not what differentiating each
collective on its own would give, and because the order in step 7 is the point.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megaclass.errors import DataError
from megaclass.kernels import negatives
from megaclass.kernels.row_gradient import RowGradient, merge
from megaclass.objectives.margins import Margin
from megaclass.objectives.objective import Objective
from megaclass.parallel.collectives import (
    Group,
    all_gather_batch,
    group_size,
    reduce_scatter_batch,
    sum_over_shards,
)
from megaclass.parallel.shard import ClassShard
from megaclass.sampling import Draw, Sampler, mix

# Initial rows are drawn in blocks of this many global classes, each from a generator of its own.
INIT_BLOCK = 1024


@dataclass(frozen=True)
class ClassifierOutput:
    """The loss of one global batch; every field is a scalar, the same on every rank.

    Attributes:
        loss: mean over the global batch, with a gradient.
        intra: the part of the loss that depends on the own class alone (zero for entangled losses), detached.
        inter: the rest, detached.
        positive_cosine: mean cosine of the samples and their own class, before the margin, detached.
    """

    loss: Tensor
    intra: Tensor
    inter: Tensor
    positive_cosine: Tensor


class ShardedClassifier(nn.Module):
    """The class weights of this rank's shard and the loss over all shards.

    Args:
        dim: width of the embeddings.
        shard: which global classes are rows here.
        objective, margin, sampler: the three choices that make the loss.
        scale: multiplier of the cosines.
        seed: of the initial rows; with `shard` it determines them at any world size.
        group: the ranks that hold the other shards; None for one process.
        grad_divisor: what the strategy divides backbone gradients by. The embedding gradient is multiplied by it, so
            that the backbone's gradient is that of the mean over the global batch. It appears nowhere else.
        kernel: `auto`, `reference` or `chunked`.

    `weight` is [shard.num_rows, dim], this rank's rows only; it takes no part in autograd and must stay out of any
    wrapper around the backbone, which would average it over ranks that hold different classes.
    """

    weight: nn.Parameter

    def __init__(
        self,
        dim: int,
        shard: ClassShard,
        objective: Objective,
        margin: Margin,
        sampler: Sampler,
        *,
        scale: float,
        seed: int,
        group: Group = None,
        grad_divisor: int = 1,
        kernel: str = "auto",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        assert shard.count == group_size(group), (shard, group_size(group))
        self.dim = dim
        self.shard = shard
        self.objective = objective
        self.margin = margin
        self.sampler = sampler
        self.scale = scale
        self.group = group
        self.grad_divisor = grad_divisor
        self.kernel = kernel
        self.weight = nn.Parameter(initial_rows(shard, dim, seed, dtype=dtype).to(device), requires_grad=False)
        self._row_gradients: list[RowGradient] = []

    def forward(self, embeddings: Tensor, labels: Tensor, *, draw_id: int) -> ClassifierOutput:
        """The loss of the global batch, of which this rank gives its part.

        Args:
            embeddings: [batch, dim], of any length and floating type; the same batch size on every rank.
            labels: [batch] int64 global class ids.
            draw_id: number of the forward pass; the same on every rank.

        Raises:
            DataError: a label outside [0, num_classes) or not an integer; found on this rank, before anything is sent.

        Cost: one all-gather of the embeddings and one of the labels, one all-reduce of m + 2 numbers (m + G + 2 for an
        entangled loss), and in backward one reduce-scatter of the embedding gradients.
        """
        check_labels(labels, self.shard.num_classes)
        unit = nn.functional.normalize(embeddings.to(self.weight.dtype), dim=1)
        loss, intra, inter, positive_cosine = _ClassLayer.apply(unit, labels, self, draw_id)
        return ClassifierOutput(loss, intra, inter, positive_cosine)

    def take_row_gradient(self) -> RowGradient | None:
        """The gradient of the class weights since the last call, merged over micro-batches; None if there was none."""
        pending, self._row_gradients = self._row_gradients, []
        return merge(pending) if pending else None

    def add_row_gradient(self, gradient: RowGradient) -> None:
        """Keep a row gradient until `take_row_gradient`; called by the backward pass."""
        self._row_gradients.append(gradient)


def initial_rows(shard: ClassShard, dim: int, seed: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Initial class weights of a shard, [shard.num_rows, dim], normal with standard deviation 0.01, on the CPU.

    A row depends on the seed and its global class only: whole blocks of `INIT_BLOCK` classes come from generators of
    their own, so that no rank draws more than its shard and two blocks, and no world size changes a row.
    """
    rows = torch.empty(shard.num_rows, dim, dtype=dtype)
    for block in range(shard.start // INIT_BLOCK, -(-shard.stop // INIT_BLOCK)):
        first = block * INIT_BLOCK
        low, high = max(first, shard.start), min(first + INIT_BLOCK, shard.stop)
        if low >= high:
            continue
        generator = torch.Generator().manual_seed(mix(mix(seed) ^ block) >> 1)
        values = torch.randn(INIT_BLOCK, dim, generator=generator)
        rows[low - shard.start : high - shard.start] = values[low - first : high - first]
    return rows.mul_(0.01)


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Refuse labels that no shard owns: they would give a finite, wrong loss and no error at all.

    Raises:
        DataError: on the CPU, with the first bad label. On CUDA, where reading one would stall the GPU, the check runs
            on the device and a bad label ends the process there; the readers have already checked on the host.
    """
    if labels.dtype != torch.int64:
        raise DataError(f"labels have type {labels.dtype}; int64 class ids in [0, {num_classes}) are needed")
    is_bad = (labels < 0) | (labels >= num_classes)
    if labels.is_cuda:
        torch._assert_async(~is_bad.any())
    elif bool(is_bad.any()):
        first = int(labels[is_bad][0])
        raise DataError(
            f"label {first} is outside [0, {num_classes}); correct the data set (`megaclass data verify DIR` lists "
            "such labels) or the number of classes"
        )


class _ClassLayer(torch.autograd.Function):
    """Steps 1 and 3 to 7 of the module's description; unit embeddings [batch, dim] -> four scalars."""

    @staticmethod
    def forward(
        ctx: Any, unit: Tensor, labels: Tensor, classifier: ShardedClassifier, draw_id: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with torch.autocast(unit.device.type, enabled=False):
            group, shard, weight = classifier.group, classifier.shard, classifier.weight.detach()
            embeddings = all_gather_batch(unit, group)
            labels = all_gather_batch(labels, group)
            draw = classifier.sampler.draw(labels, shard, draw_id)
            own_row = shard.to_row(labels)
            own_unit, own_length = _own_rows(weight, own_row)
            cosine = (embeddings * own_unit).sum(dim=1)
            batch_rows = draw.batch_rows
            sums = negatives.forward(
                embeddings if batch_rows is None else embeddings[batch_rows],
                weight,
                draw.rows,
                own_row if batch_rows is None else own_row[batch_rows],
                scale=classifier.scale,
                log_weight=draw.log_weight,
                kernel=classifier.kernel,
            )
            terms, d_cosine, d_sum = _loss_and_derivatives(classifier, cosine, own_row >= 0, sums.exp_sum, draw)
        ctx.classifier, ctx.sums, ctx.batch_rows = classifier, sums, batch_rows
        ctx.save_for_backward(embeddings, own_row, own_unit, own_length, cosine, d_cosine, d_sum)
        ctx.mark_non_differentiable(*terms[1:])
        return terms

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor, None, None, None]:
        classifier: ShardedClassifier = ctx.classifier
        embeddings, own_row, own_unit, own_length, cosine, d_cosine, d_sum = ctx.saved_tensors
        d_cosine, d_sum = d_cosine * grad_loss, d_sum * grad_loss
        partial = d_cosine[:, None] * own_unit
        if ctx.batch_rows is None:
            partial += d_sum[:, None] * ctx.sums.embedding_gradient
        else:
            partial.index_add_(0, ctx.batch_rows, d_sum[:, None] * ctx.sums.embedding_gradient)
        travelling = reduce_scatter_batch(partial * classifier.grad_divisor, classifier.group)
        classifier.add_row_gradient(
            merge(
                [
                    ctx.sums.row_pass(d_sum),
                    _own_row_gradient(embeddings, own_row, own_unit, own_length, cosine, d_cosine),
                ]
            )
        )
        return travelling.wait(), None, None, None


def _own_rows(weight: Tensor, own_row: Tensor) -> tuple[Tensor, Tensor]:
    """Each sample's own class weight as a unit vector [G, dim] (zeros if it lies elsewhere) and its length [G, 1]."""
    if len(weight) == 0:
        return weight.new_zeros(len(own_row), weight.shape[1]), weight.new_ones(len(own_row), 1)
    own = weight.index_select(0, own_row.clamp_min(0))
    length = own.norm(dim=1, keepdim=True).clamp_min(torch.finfo(own.dtype).tiny)
    return (own / length).masked_fill_((own_row < 0)[:, None], 0.0), length


def _own_row_gradient(
    embeddings: Tensor, own_row: Tensor, own_unit: Tensor, own_length: Tensor, cosine: Tensor, d_cosine: Tensor
) -> RowGradient:
    """The gradient that reaches class weights through the positive cosines of the samples this shard owns."""
    is_owned = own_row >= 0
    direction = (embeddings - cosine[:, None] * own_unit) * (d_cosine[:, None] / own_length)
    rows, position = torch.unique(own_row[is_owned], return_inverse=True)
    return RowGradient(
        rows, embeddings.new_zeros(len(rows), embeddings.shape[1]).index_add_(0, position, direction[is_owned])
    )


def _loss_and_derivatives(
    classifier: ShardedClassifier, cosine: Tensor, is_owned: Tensor, exp_sum: Tensor, draw: Draw
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor, Tensor]:
    """The four outputs, and the loss's derivatives in this shard's cosines [G] and in the complete sums [m].

    `cosine` and `exp_sum` are partial (cosines are zero where another shard owns the class). Torch differentiates the
    objective over these short vectors; `sum_over_shards` passes gradients through unchanged, so each rank obtains the
    derivatives of the one loss in its own contributions.
    """
    objective, group = classifier.objective, classifier.group
    with torch.enable_grad():
        cosine, exp_sum = cosine.detach().requires_grad_(), exp_sum.detach().requires_grad_()
        logit = classifier.scale * classifier.margin(cosine)
        intra_sum = torch.where(is_owned, objective.intra(logit, classifier.scale), 0.0).sum()
        packed = [exp_sum, intra_sum[None], cosine.detach().sum()[None]]
        if objective.needs_positive:
            packed.append(torch.where(is_owned, logit, 0.0))
        complete = sum_over_shards(torch.cat(packed), group)
        m = len(exp_sum)
        total, intra_sum, cosine_sum = complete[:m], complete[m], complete[m + 1].detach()
        positive = complete[m + 2 :] if objective.needs_positive else None
        if positive is not None and draw.batch_rows is not None:
            positive = positive[draw.batch_rows]
        intra = intra_sum / len(cosine)
        inter = objective.inter(_log_sum(total, draw), positive).mean()
        loss = intra + inter
        d_cosine, d_sum = torch.autograd.grad(loss, (cosine, exp_sum), materialize_grads=True)
    outputs = (loss.detach(), intra.detach(), inter.detach(), cosine_sum / len(cosine))
    return outputs, d_cosine, d_sum


def _log_sum(total: Tensor, draw: Draw) -> Tensor:
    """Logarithm of the exponential sums; where there was no negative: minus infinity, with gradient zero, never NaN."""
    is_empty = total == 0
    return torch.where(is_empty, -torch.inf, torch.where(is_empty, 1.0, total).log())
