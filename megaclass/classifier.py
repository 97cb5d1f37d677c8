"""`ShardedClassifier`: owns this rank's class weights and turns embeddings and labels into the loss.

What happens to a batch stands in `class_layer.py`; here are the rows, how they begin, and what a loss leaves behind
until the optimizers take it: the gradient of the rows, of a learned bias, and a running state.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from megaclass.class_layer import ClassLayer, Pass
from megaclass.counter import mix
from megaclass.host_rows import HostRows
from megaclass.kernels.interface import RowBlocks
from megaclass.kernels.memory import Pool
from megaclass.kernels.row_gradient import RowGradient, RowUpdate, collect, merge
from megaclass.loss import Balance, Loss
from megaclass.marks import part
from megaclass.micro_batch import MicroBatch
from megaclass.objectives.objective import Values
from megaclass.parallel.collectives import Group, group_size
from megaclass.parallel.shard import ClassShard
from megaclass.pass_rows import PassRows, from_host, on_device
from megaclass.row_stream import RowStream

# Initial rows are drawn in blocks of this many global classes, each from a generator of its own.
INIT_BLOCK = 1024


@dataclass(frozen=True)
class Monitors:
    """Numbers about the negatives and the end point, for people; scalars, the same on every rank, detached.

    They are read off what the step computes anyway, and only when asked for.

    Attributes:
        negative_cosine_mean: over all pairs of a sample and one of its negatives; NaN where there is none.
        negative_cosine_max: the largest of them; NaN where there is none.
        end_point: adjusted cosine (after the margin) at which the pull towards the own class is half its strength,
            mean over the samples; it moves with the negatives where the loss is entangled.
        past_end_point: share of the samples whose adjusted cosine lies past it.
        rows_touched: classes whose rows have a gradient in this pass, over all shards.
    """

    negative_cosine_mean: Tensor
    negative_cosine_max: Tensor
    end_point: Tensor
    past_end_point: Tensor
    rows_touched: Tensor


@dataclass(frozen=True)
class ClassifierOutput:
    """The loss of one global batch; every field is a scalar, the same on every rank.

    Attributes:
        loss: mean over the global batch, with a gradient.
        intra: the part of the loss that depends on the own class alone (zero for entangled losses), detached.
        inter: the rest, detached.
        positive_cosine: mean cosine of the samples and their own class, before the margin, detached.
        monitors: more numbers, if they were asked for.
    """

    loss: Tensor
    intra: Tensor
    inter: Tensor
    positive_cosine: Tensor
    monitors: Monitors | None = None


class ShardedClassifier(nn.Module):
    """The class weights of this rank's shard and the loss over all shards.

    Args:
        dim: width of the embeddings.
        shard: which global classes are rows here.
        loss: the choices that make the loss.
        seed: of the initial rows; with `shard` it determines them at any world size.
        group: the ranks that hold the other shards; None for one process.
        grad_divisor: what the strategy divides backbone gradients by. The embedding gradient is multiplied by it, so
            that the backbone's gradient is that of the mean over the global batch. It appears nowhere else.
        kernel: `auto`, `reference`, `chunked` or `triton`.
        balance: weights and margins of the classes of this shard, from their counts; None for all alike.
        dtype: of the rows.
        device: that the class layer computes on.
        on_host: whether the rows stay in the host's memory; `host_rows` must then be set before the first pass.

    Attributes:
        weight: [shard.num_rows * rows_per_class, dim], this rank's rows only; it takes no part in autograd and must
            stay out of any wrapper around the backbone, which would average it over ranks that hold different classes.
        host_rows: brings rows from the host to the device; None where all rows are on the device.
        bias: learned scalar, the same on every rank; None for a loss without one.
        state: running scalar of the negative map, the same on every rank; None for a loss without one.
        row_update: writes the rows during the backward pass, block by block, where a strategy has said so; None keeps
            their gradient until `take_row_gradient`.
        memory: what passes take over from each other.
        row_stream: where the rows' part of the backward pass runs; None for the stream of everything else.
        cpu_seconds: processor time this process has spent in the class layer; 0 on a GPU, where it means nothing.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    state: Tensor | None

    def __init__(
        self,
        dim: int,
        shard: ClassShard,
        loss: Loss,
        *,
        seed: int,
        group: Group = None,
        grad_divisor: int = 1,
        kernel: str = "auto",
        balance: Balance | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        on_host: bool = False,
    ) -> None:
        super().__init__()
        self.device = torch.device(device)
        # Rows may be stored in bfloat16; everything that is computed from them is float32 or wider.
        self.dtype = torch.float32 if dtype == torch.bfloat16 else dtype
        assert shard.count == group_size(group), (shard, group_size(group))
        self.dim = dim
        self.shard = shard
        self.loss = loss
        self.group = group
        self.grad_divisor = grad_divisor
        self.kernel = kernel
        rows = initial_rows(shard, dim, seed, rows_per_class=loss.rows_per_class, dtype=dtype)
        self.weight = nn.Parameter(rows if on_host else rows.to(device), requires_grad=False)
        self.host_rows: HostRows | None = None
        self._like = torch.empty(0, dtype=self.dtype, device=device)
        values = loss.preset.values(0.0)
        if loss.preset.sampler == "batch" or loss.preset.correction == "inverse-rate":
            # The rate is then no share of the negatives, or the sum stands for all of them.
            values = replace(values, sampling_rate=1.0)
        initial = loss.objective.initial_bias(values, shard.num_classes)
        bias = None if initial is None else torch.tensor(initial, dtype=self.dtype, device=device)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        initial = loss.negative_map.initial_state
        self.state = None if initial is None else torch.tensor(initial, dtype=self.dtype, device=device)
        self.balance = None if balance is None else balance.to(self._like)
        self.cpu_seconds = 0.0
        self.row_update: RowUpdate | None = None
        self.row_stream: RowStream | None = None
        self.memory = Pool(self.device)
        self._gradient_memory = Pool(self.device)
        self._row_gradients: list[RowGradient] = []
        self._bias_gradient: Tensor | None = None
        self._proposed_states: list[Tensor] = []

    def forward(
        self, embeddings: Tensor, labels: Tensor, *, draw_id: int, values: Values | None = None, monitor: bool = False
    ) -> ClassifierOutput:
        """The loss of the global batch, of which this rank gives its part.

        Args:
            embeddings: [batch, dim], of any length and floating type; the same batch size on every rank.
            labels: [batch] int64 global class ids.
            draw_id: number of the forward pass; the same on every rank.
            values: the moving hyper-parameters; those of the beginning if they are left out.
            monitor: whether to fill in `ClassifierOutput.monitors`; the same on every rank.

        Raises:
            DataError: as `MicroBatch`.

        Cost: one all-gather of the labels and one of the embeddings, one all-reduce of m + 2 numbers (m + G + 2 for an
        entangled loss; W + 4 more with monitors), and in backward one reduce-scatter of the embedding gradients. Where
        m < G samples have an inter term the two large ones are of m embeddings, beside an all-to-all of this rank's B
        each way (`parallel/exchange.py`). What a loss needs beyond that it says itself (`class_layer.py`).
        """
        batch = self.begin(labels)
        batch.add(embeddings)
        return self.finish(batch, draw_id=draw_id, values=values, monitor=monitor)

    def begin(self, labels: Tensor) -> MicroBatch:
        """Start a forward pass with its labels, before the embeddings are known; `finish` ends it.

        With `MicroBatch.add` for every slice of the embeddings this is `forward`, whose arguments and errors these
        are, but that what has been added travels while the next slice is computed: one all-gather a slice. The
        embeddings of a loss with an inter term for a part of the batch travel at the end (`Loss.sends_whole_batch`).
        """
        return MicroBatch(self, labels)

    def finish(
        self, batch: MicroBatch, *, draw_id: int, values: Values | None = None, monitor: bool = False
    ) -> ClassifierOutput:
        """The loss of a micro-batch whose embeddings have all been added; see `forward`."""
        with self.timed(), part("class layer forward"):
            this = Pass(draw_id, values or self.loss.preset.values(0.0), monitor)
            loss, intra, inter, positive_cosine, seen = ClassLayer.apply(
                batch.embeddings(), batch.norms(), batch, self, this
            )
        return ClassifierOutput(loss, intra, inter, positive_cosine, Monitors(*seen.unbind()) if monitor else None)

    def rows_of_pass(self, labels: Tensor, draw_id: int, rate: float) -> PassRows:
        """The draw of a pass and the rows it works on, for labels [G] of the global batch."""
        if self.host_rows is not None:
            return from_host(self.host_rows, self.loss.sampler, labels, self.shard, draw_id, rate)
        return on_device(self.weight.detach(), self.loss.sampler, labels, self.shard, draw_id, rate)

    def take_row_gradient(self) -> RowGradient | None:
        """The gradient of the class weights since the last call, merged over micro-batches; None if there was none.

        Called in every step, also where the backward pass writes the rows itself: what follows sees them written.
        Hold the gradient itself as long as you read a part of it: its memory is used again when nobody does.
        """
        if self.row_stream is not None:
            self.row_stream.join()
        pending, self._row_gradients = self._row_gradients, []
        return merge(pending) if pending else None

    def receive_rows(self, blocks: RowBlocks, rows: Tensor | None, own: RowGradient, loss: Tensor) -> None:
        """Take what the backward pass finds for the rows: update them block by block, or keep their gradient.

        Args:
            blocks: the gradient of the candidates' rows.
            rows: which rows those are; None: all.
            own: the gradient of the samples' own rows.
            loss: of this pass, the same on every rank; rows are not written where it is not finite (on CUDA that
                waits for the device).
        """
        if self.row_update is None:
            memory = self._gradient_memory.take()
            gradient = collect(blocks, rows, len(self.weight), own, memory)
            self._gradient_memory.give_back_after(gradient.values, memory)
            if self.host_rows is not None:
                # Micro-batches see different parts: what is merged must count the rows of the shard.
                gradient = self.host_rows.in_shard(gradient)
            self._row_gradients.append(gradient)
        elif bool(torch.isfinite(loss)):
            self.row_update(blocks(None), rows, own)

    def beside(self, *inputs: object) -> AbstractContextManager[None]:
        """The block of the backward pass that calls `receive_rows`; `inputs` hold all tensors that it reads."""
        return nullcontext() if self.row_stream is None else self.row_stream.beside(*inputs)

    def take_bias_gradient(self) -> Tensor | None:
        """The gradient of the learned bias since the last call, a scalar, the same on every rank."""
        taken, self._bias_gradient = self._bias_gradient, None
        return taken

    def add_bias_gradient(self, gradient: Tensor) -> None:
        """Keep a gradient of the bias until `take_bias_gradient`; called by the backward pass."""
        self._bias_gradient = gradient if self._bias_gradient is None else self._bias_gradient + gradient

    def propose_state(self, state: Tensor) -> None:
        """The running state after a forward pass; it counts once `keep_state` says that the step was taken."""
        self._proposed_states.append(state)

    def keep_state(self, is_taken: bool) -> None:
        """Let the proposed states count, or forget them: a step that is not taken must leave nothing behind.

        Of several micro-batches it is their mean: a state moves by the mean of a batch, so that is the global batch's.
        """
        if is_taken and self._proposed_states and self.state is not None:
            self.state.copy_(torch.stack(self._proposed_states).mean())
        self._proposed_states = []
        if not is_taken and self.host_rows is not None:
            self.host_rows.forget()

    def margin_sizes(self, own_row: Tensor, values: Values) -> Tensor:
        """The size of each sample's margin: a scalar, or [G] by class (those of other shards mean nothing)."""
        size = self._like.new_tensor(values.margin)
        if self.balance is None or self.balance.margin_factors is None or len(self.balance.margin_factors) == 0:
            return size
        return size * self.balance.margin_factors[own_row.clamp_min(0)]

    def sample_weights(self, own_row: Tensor) -> Tensor | None:
        """[G] weights of the samples whose class is here, zero elsewhere; None where all count alike."""
        if self.balance is None or self.balance.weights is None:
            return None
        if len(self.balance.weights) == 0:
            return self._like.new_zeros(len(own_row))
        return torch.where(own_row >= 0, self.balance.weights[own_row.clamp_min(0)], 0.0)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Count the processor time spent inside towards `cpu_seconds`."""
        begin = time.process_time()
        yield
        if self.device.type != "cuda":
            self.cpu_seconds += time.process_time() - begin


def initial_rows(
    shard: ClassShard, dim: int, seed: int, *, rows_per_class: int = 1, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Initial class weights of a shard, [shard.num_rows * rows_per_class, dim], normal with deviation 0.01, on the CPU.

    A row depends on the seed and its global class only: whole blocks of `INIT_BLOCK` classes come from generators of
    their own, so that no rank draws more than its shard and two blocks, and no world size changes a row.
    """
    rows = torch.empty(shard.num_rows, rows_per_class, dim, dtype=dtype)
    for block in range(shard.start // INIT_BLOCK, -(-shard.stop // INIT_BLOCK)):
        first = block * INIT_BLOCK
        low, high = max(first, shard.start), min(first + INIT_BLOCK, shard.stop)
        if low >= high:
            continue
        generator = torch.Generator().manual_seed(mix(mix(seed) ^ block) >> 1)
        values = torch.randn(INIT_BLOCK, rows_per_class, dim, generator=generator)
        rows[low - shard.start : high - shard.start] = values[low - first : high - first]
    return rows.mul_(0.01).flatten(0, 1)
