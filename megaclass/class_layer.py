"""The class layer as one autograd function: from this rank's embeddings to the loss of the global batch.

The path of one batch, W ranks with B samples each, G = W B:

 1. the labels [B] have been gathered to [G] while the backbone worked, and the sampler draws the negative rows of this
    shard, or the part of the batch that has an inter term;
 2. the embeddings [B, dim] are gathered to [G, dim] during that draw (`micro_batch.py`); where a part has an inter
    term only that part is, and the others are sent to the owners of their classes (`parallel/exchange.py`);
 3. the rank that owns a sample's class computes its cosine, and for a dissected loss its intra term, alone;
 4. the kernel sums what this shard's negatives contribute and, with it, the embedding gradient of each sum;
 5. ONE all-reduce completes the sums; it also carries the positive logits where the loss is entangled. A negative map
    that must know the positive cosines takes one more before step 4, exponents beyond float32 one for the maxima, and a
    margin that depends on the lengths of the embeddings has these gathered and their gradient sent back;
 6. the objective gives the loss and its derivatives in each sum and each positive cosine, the same on every rank;
 7. backward: the embedding gradient is sent back to the ranks its samples came from, and while it travels the
    gradient of the class-weight rows is computed.

One function, because the gradient of a sharded loss is not what differentiating each collective on its own would give,
and because the order in step 7 is the point.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megaclass.counter import STREAM_MARGIN, stream_key
from megaclass.kernels import negatives
from megaclass.kernels.interface import Candidates, Negatives, rows_of
from megaclass.kernels.row_gradient import RowGradient
from megaclass.kernels.terms import Exponential, Summed, Term
from megaclass.marks import part
from megaclass.objectives.margin import Facts
from megaclass.objectives.negative_map import Positives, filtered, filtered_function
from megaclass.objectives.objective import Values
from megaclass.parallel.collectives import (
    all_gather_batch,
    group_rank,
    group_size,
    max_over_ranks,
    reduce_scatter_batch,
    sum_over_ranks,
    sum_over_shards,
)
from megaclass.parallel.exchange import Exchange, Gathered, exchange
from megaclass.pass_rows import PassRows
from megaclass.sampling.draw import Draw

if TYPE_CHECKING:
    from megaclass.classifier import ShardedClassifier
    from megaclass.micro_batch import MicroBatch


@dataclass(frozen=True)
class Own:
    """Each sample's own class on this shard; [o] are those of the samples whose embeddings are here (`Exchange.own`).

    Attributes:
        row: [G] int64 local class, -1 where another shard owns it.
        weight_row: [o] int64 row of `PassRows.weight` that stands for it (the best sub-centre), -1 elsewhere.
        unit: [o, dim] that row as a unit vector, zeros elsewhere.
        inverse: [o, 1] 1 / its length; 0 elsewhere, and for a row of length zero, which has no direction.
    """

    row: Tensor
    weight_row: Tensor
    unit: Tensor
    inverse: Tensor


@dataclass(frozen=True)
class Pass:
    """One forward pass, apart from its tensors.

    Attributes:
        draw_id: its number; the same on every rank.
        values: the moving hyper-parameters.
        monitor: whether the numbers for people are computed too.
    """

    draw_id: int
    values: Values
    monitor: bool


class ClassLayer(torch.autograd.Function):
    """Steps 1 to 7; embeddings [B, dim], their lengths [B] or None -> loss, intra, inter, positive cosine, monitors.

    The tensors that have a gradient are given beside the micro-batch they come from.
    """

    @staticmethod
    def forward(
        ctx: Any, embeddings: Tensor, norm: Tensor | None, local: MicroBatch, classifier: ShardedClassifier, this: Pass
    ) -> Any:
        """Steps 1 to 6."""
        loss, group = classifier.loss, classifier.group
        with torch.autocast(embeddings.device.type, enabled=False):
            labels = local.all_labels()
            rows = classifier.rows_of_pass(labels, this.draw_id, this.values.sampling_rate)
            draw = rows.draw
            batch = _exchange(local, classifier, labels, draw, embeddings.dtype)
            own = _own_rows(classifier, batch.own, rows, batch)
            cosine = batch.spread((batch.own * own.unit).sum(dim=1))
            if norm is not None:
                with part("gather"):
                    norm = all_gather_batch(norm, group)
            facts = Facts(norm, stream_key(loss.seed, STREAM_MARGIN, this.draw_id))
            chosen = slice(None) if draw.batch_rows is None else draw.batch_rows
            candidates = Candidates(rows.weight, draw.rows, draw.log_weight, loss.rows_per_class)
            memory = classifier.memory.take()
            sums = negatives.forward(
                batch.inter,
                candidates,
                rows.own[chosen],
                _term(classifier, cosine, own, facts, chosen, this.values),
                monitor=this.monitor,
                memory=memory,
                kernel=classifier.kernel,
            )
            terms, derivatives = _loss_and_derivatives(classifier, cosine, own, facts, sums, draw, this)
        ctx.classifier, ctx.sums, ctx.draw, ctx.batch, ctx.loss = classifier, sums, draw, batch, terms[0].detach()
        ctx.memory = memory
        ctx.save_for_backward(
            own.row, own.weight_row, own.unit, own.inverse, cosine,
            derivatives.cosine, derivatives.total, derivatives.norm, derivatives.bias,
        )  # fmt: skip
        ctx.mark_non_differentiable(*terms[1:])
        return terms

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        """Step 7."""
        classifier: ShardedClassifier = ctx.classifier
        with classifier.timed(), part("class layer backward"):
            row, weight_row, unit, inverse, cosine, d_cosine, d_total, d_norm, d_bias = ctx.saved_tensors
            batch: Exchange = ctx.batch
            own = Own(row, weight_row, unit, inverse)
            d_cosine, d_total = batch.at_own(d_cosine) * grad_loss, d_total * grad_loss
            divisor = classifier.grad_divisor
            partial = (d_cosine * divisor)[:, None] * own.unit
            with part("reduce-scatter"):
                travelling = batch.send_back(partial, (d_total * divisor)[:, None] * ctx.sums.embedding_gradient)
                if d_norm is not None:
                    travelling_norm = reduce_scatter_batch(d_norm * grad_loss * divisor, classifier.group)
            with part("weight pass"), classifier.beside(ctx.sums, ctx.draw, batch, own, cosine, d_cosine, d_total):
                classifier.receive_rows(
                    lambda out: ctx.sums.row_pass(d_total, out),
                    None if ctx.draw.rows is None else rows_of(ctx.draw.rows, classifier.loss.rows_per_class),
                    _own_row_gradient(batch.own, own, batch.at_own(cosine), d_cosine),
                    ctx.loss,
                )
            classifier.memory.give_back(ctx.memory)
            if d_bias is not None:
                classifier.add_bias_gradient(sum_over_ranks(d_bias * grad_loss, classifier.group))
            with part("reduce-scatter"):
                return travelling.wait(), None if d_norm is None else travelling_norm.wait(), None, None, None


def _exchange(
    local: MicroBatch, classifier: ShardedClassifier, labels: Tensor, draw: Draw, dtype: torch.dtype
) -> Exchange:
    """The embeddings that this shard needs: what all ranks have sent already, or what is sent now."""
    everything = local.all_embeddings()
    if everything is not None:
        return Gathered(everything.to(dtype), draw.batch_rows, classifier.group)
    with part("gather"):
        owner = classifier.shard.owner_of(labels)
        return exchange(local.sent_embeddings(), owner, draw.batch_rows, classifier.group, dtype=dtype)


def _own_rows(classifier: ShardedClassifier, embeddings: Tensor, rows: PassRows, batch: Exchange) -> Own:
    """Each sample's own class weight, normalised; of several sub-centres the one with the largest cosine."""
    weight, row, per_class = rows.weight, rows.label, classifier.loss.rows_per_class
    weight_row = batch.at_own(rows.own)
    is_elsewhere = weight_row < 0
    if len(weight) == 0:
        return Own(row, weight_row, torch.zeros_like(embeddings), embeddings.new_zeros(len(embeddings), 1))
    weight_row = weight_row.clamp_min(0)
    if per_class > 1:
        every = weight.unflatten(0, (-1, per_class))[weight_row].to(embeddings.dtype)
        every = torch.nn.functional.normalize(every, dim=2)
        weight_row = weight_row * per_class + torch.linalg.vecdot(every, embeddings[:, None, :]).argmax(dim=1)
    own = weight.index_select(0, weight_row).to(embeddings.dtype)
    length = own.norm(dim=1, keepdim=True)
    inverse = torch.where((length > 0) & ~is_elsewhere[:, None], 1 / length, 0.0)
    return Own(row, weight_row.masked_fill(is_elsewhere, -1), own * inverse, inverse)


def _own_row_gradient(embeddings: Tensor, own: Own, cosine: Tensor, d_cosine: Tensor) -> RowGradient:
    """The gradient that reaches class weights through the positive cosines of the samples this shard owns."""
    is_owned = own.weight_row >= 0
    direction = (embeddings - cosine[:, None] * own.unit) * (d_cosine[:, None] * own.inverse)
    rows, position = torch.unique(own.weight_row[is_owned], return_inverse=True)
    return RowGradient(
        rows, embeddings.new_zeros(len(rows), embeddings.shape[1]).index_add_(0, position, direction[is_owned])
    )


def _term(classifier: ShardedClassifier, cosine: Tensor, own: Own, facts: Facts, chosen: Any, values: Values) -> Term:
    """What each negative contributes; completes the positive cosines first for a negative map that must know them."""
    loss = classifier.loss
    bias = None if classifier.bias is None else classifier.bias.detach()
    function = loss.objective.negative_function(values, bias)
    if function is not None:
        if loss.negative_filter is not None:
            function = filtered_function(function, loss.negative_filter)
        return Summed(function, bias is not None)
    positives = None
    if loss.negative_map.needs_positive:
        adjusted = torch.where(own.row >= 0, loss.margin(cosine, classifier.margin_sizes(own.row, values), facts), 0.0)
        with part("sums"):
            complete, adjusted = sum_over_ranks(torch.stack([cosine, adjusted]), classifier.group)
        assert classifier.state is not None
        positives = Positives(complete, adjusted, classifier.state)
        classifier.propose_state(loss.negative_map.next_state(positives))
        # The running state is that of the whole batch, also where only a part of it has an inter term.
        positives = Positives(complete, adjusted[chosen], classifier.state)
    transform = loss.negative_map.bind(positives, values.margin)
    if loss.negative_filter is not None:
        transform = filtered(transform, loss.negative_filter)
    return Exponential(values.scale, transform, loss.use_maximum)


@dataclass(frozen=True)
class Derivatives:
    """Derivatives of the loss in what this shard contributes.

    Attributes:
        cosine: [G], in its positive cosines.
        total: [m], in the kernel's sums.
        norm: [G], in the lengths of the embeddings, through its own samples; None if they do not matter.
        bias: scalar, in the learned bias, partial: sum over shards; None without one.
    """

    cosine: Tensor
    total: Tensor
    norm: Tensor | None
    bias: Tensor | None


def _loss_and_derivatives(
    classifier: ShardedClassifier, cosine: Tensor, own: Own, facts: Facts, sums: Negatives, draw: Draw, this: Pass
) -> tuple[tuple[Tensor, ...], Derivatives]:
    """The outputs, and the loss's derivatives in this shard's contributions.

    Cosines and sums are partial (cosines are zero where another shard owns the class). Torch differentiates the
    objective over these short vectors; `sum_over_shards` passes gradients through unchanged, so each rank obtains the
    derivatives of the one loss in its own contributions.
    """
    loss, group, values = classifier.loss, classifier.group, this.values
    objective, is_owned = loss.objective, own.row >= 0
    maximum, shrink = _common_maximum(sums, classifier)
    with torch.enable_grad():
        cosine, total = cosine.detach().requires_grad_(), (sums.total * shrink).requires_grad_()
        norm = None if facts.norm is None else facts.norm.detach().requires_grad_()
        bias = None if classifier.bias is None else classifier.bias.detach().clone().requires_grad_()
        facts = Facts(norm, facts.key)
        logit = values.scale * loss.margin(cosine, classifier.margin_sizes(own.row, values), facts)
        own_loss = objective.intra(logit, values, bias)
        penalty = loss.margin.penalty(facts)
        if penalty is not None:
            own_loss = own_loss + penalty
        sample_weight = classifier.sample_weights(own.row)
        if sample_weight is not None:
            own_loss = own_loss * sample_weight
        parts = [total, torch.where(is_owned, own_loss, 0.0).sum()[None], cosine.detach().sum()[None]]
        if objective.needs_positive:
            parts.append(torch.where(is_owned, logit, 0.0))
        if sample_weight is not None:
            parts.append(sample_weight)
        if this.monitor:
            parts.append(_monitored(classifier, sums, draw, own, logit.detach(), this))
        sizes = [len(part) for part in parts]
        with part("sums"):
            complete = list(sum_over_shards(torch.cat(parts), group).split(sizes))
        summed, intra_sum, cosine_sum = complete[0], complete[1][0], complete[2][0].detach()
        chosen = slice(None) if draw.batch_rows is None else draw.batch_rows
        positive = complete[3] if objective.needs_positive else None
        counted = summed if not objective.is_exponential else _log_sum(summed) + maximum
        inter = objective.inter(counted, None if positive is None else positive[chosen], values)
        if sample_weight is not None:
            inter = inter * complete[3 + objective.needs_positive][chosen]
        intra, inter = intra_sum / len(cosine), inter.mean()
        inputs = [x for x in (cosine, total, norm, bias) if x is not None]
        slopes = list(torch.autograd.grad(intra + inter, inputs, allow_unused=True, materialize_grads=True))
    monitors = cosine.new_empty(0)
    if this.monitor:
        pull_ends = objective.end_point(counted.detach(), values, None if bias is None else bias.detach())
        monitors = _monitors(complete[-1].detach(), positive, pull_ends, chosen, len(cosine), values.scale)
    d_cosine, d_total = slopes[0], slopes[1] * shrink
    d_bias = None
    if bias is not None:
        assert sums.bias_derivative is not None
        d_bias = slopes[-1] + (slopes[1] * sums.bias_derivative).sum()
    outputs = ((intra + inter).detach(), intra.detach(), inter.detach(), cosine_sum / len(cosine), monitors)
    return outputs, Derivatives(d_cosine, d_total, None if norm is None else slopes[2], d_bias)


def _common_maximum(sums: Negatives, classifier: ShardedClassifier) -> tuple[Tensor | float, Tensor | float]:
    """The samples' largest exponents over all shards [m], and what brings this shard's sums down to them [m]."""
    if sums.maximum is None:
        return 0.0, 1.0
    with part("sums"):
        maximum = max_over_ranks(sums.maximum, classifier.group)
    # Where no shard has a negative both are minus infinity; zero is then as good a reference as any.
    maximum = torch.where(maximum == -torch.inf, 0.0, maximum)
    return maximum, (sums.maximum - maximum).exp()


def _log_sum(total: Tensor) -> Tensor:
    """Logarithm of the sums; where there was no negative: minus infinity, with gradient zero, never NaN."""
    is_empty = total == 0
    return torch.where(is_empty, -torch.inf, torch.where(is_empty, 1.0, total).log())


def _monitored(
    classifier: ShardedClassifier, sums: Negatives, draw: Draw, own: Own, logit: Tensor, this: Pass
) -> Tensor:
    """This shard's part of the monitors, to be summed: cosine sum, pairs, samples past the end point, rows, maxima.

    The largest cosine of each shard stands in a slot of its own, so that a sum carries it.
    """
    seen = sums.monitor
    assert seen is not None
    num_past = logit.new_zeros(())
    if not classifier.loss.objective.needs_positive:
        bias = None if classifier.bias is None else classifier.bias.detach()
        ends = classifier.loss.objective.end_point(logit, this.values, bias)
        num_past = ((logit >= ends) & (own.row >= 0)).sum().to(logit.dtype)
    num_rows = classifier.shard.num_rows
    if draw.rows is not None:
        own_classes = own.weight_row[own.weight_row >= 0] // classifier.loss.rows_per_class
        num_rows = len(torch.unique(torch.cat([draw.rows, own_classes])))
    slots = logit.new_zeros(group_size(classifier.group))
    slots[group_rank(classifier.group)] = seen.cosine_max
    numbers = [seen.cosine_sum, seen.num_pairs, num_past, logit.new_tensor(float(num_rows))]
    return torch.cat([torch.stack(numbers), slots])


def _monitors(
    summed: Tensor, positive: Tensor | None, ends: Tensor, chosen: Any, num_samples: int, scale: float
) -> Tensor:
    """Mean and largest negative cosine, end point, share past it, rows touched; NaN where there is nothing to tell."""
    cosine_sum, num_pairs, num_past, num_rows = summed[:4]
    largest = summed[4:].max()
    if positive is not None:
        is_past = positive.detach()[chosen] >= ends
        num_past, num_samples = is_past.sum().to(ends.dtype), len(is_past)
    is_finite = torch.isfinite(ends)
    end = torch.where(is_finite, ends, 0.0).sum() / is_finite.sum() / scale
    largest = torch.where(largest == -torch.inf, torch.nan, largest)
    return torch.stack([cosine_sum / num_pairs, largest, end, num_past / num_samples, num_rows])
