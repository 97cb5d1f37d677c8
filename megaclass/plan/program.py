"""The operators of one rank's step, by part: recorded from the code that a run executes, on tensors without memory.

The class layer goes through its rows chunk by chunk, all full chunks alike: two short recordings, of one chunk and of
two, say what one more costs, and the rest is multiplication. So it takes a second whatever the number of classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from megaclass.classifier import ShardedClassifier
from megaclass.config import Config
from megaclass.kernels import chunked
from megaclass.loss import Loss
from megaclass.objectives.presets import Preset
from megaclass.optim import backbone as backbone_optimizer
from megaclass.optim import rowwise
from megaclass.optim.clip import clip_coefficient, joint_norm
from megaclass.parallel.process import World
from megaclass.parallel.shard import ClassShard
from megaclass.plan.operators import Calls, Operator, difference, recorded, scaled, total
from megaclass.plan.step import head_bytes, head_flops
from megaclass.plan.work import Work
from megaclass.sampling.draw import Draw
from megaclass.sampling.picks import stratified
from megaclass.train import build
from megaclass.train.precision import autocast

_CPU = torch.device("cpu")
# The kernel that cannot be recorded, as it is not torch's: it is one operator with the head's operations and bytes.
FUSED = "triton"


@dataclass(frozen=True)
class Program:
    """What one rank calls in a step.

    Attributes:
        parts: calls of `backbone forward`, `backbone backward`, `class layer` (its forward pass with the draw), `class
            rows` (its backward pass), `gradient norm`, `backbone optimizer`, `row optimizer`, in all micro-batches.
        num_norms: batch norm layers that speak with the other ranks; 0 where statistics are local.
        norm_numbers: float64 numbers that all of them send in a forward pass.
    """

    parts: dict[str, Calls]
    num_norms: int
    norm_numbers: int


@dataclass(frozen=True)
class BackboneCalls:
    """Calls of the backbone on one micro-batch.

    Attributes:
        forward, backward: of the two passes.
        norms: channels of each batch norm that is synchronised.
        gradients: sizes of the gradients of all parameters.
    """

    forward: Calls
    backward: Calls
    norms: list[int]
    gradients: list[tuple[int, ...]]


def program(
    config: Config, preset: Preset, work: Work, network: BackboneCalls | None = None, *, device_type: str
) -> Program:
    """The calls of one step of the rank with the largest shard, as it is taken on a `cpu` or on `cuda`.

    `network` if it is known from `backbone_calls`.
    """
    network = network or backbone_calls(config, work.batch)
    micro = work.num_micro
    layer, rows = _class_layer(config, preset, work, device_type)
    parts = {
        "backbone forward": scaled(network.forward, micro),
        "backbone backward": scaled(network.backward, micro),
        "class layer": scaled(total(_draw(preset, work), layer), micro),
        "class rows": scaled(rows, micro),
        "gradient norm": _norm(config, work, network.gradients),
        "backbone optimizer": _backbone_step(config, network.gradients),
        "row optimizer": _row_step(config, work, device_type),
    }
    return Program(parts, len(network.norms), sum(2 * width + 1 for width in network.norms))


def backbone_calls(config: Config, batch: int) -> BackboneCalls:
    """The backbone forward and backward on so many samples."""
    # Built where nothing has memory and nothing is computed, then given parameters of the recording.
    meta = torch.device("meta")
    with meta:
        network = build.build_backbone(config, World(0, 1, 0, meta, None, None)).to(build.backbone_dtype(config))
    norms = [] if config.backbone.batch_norm == "local" else [
        len(module.running_mean) for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and module.running_mean is not None
    ]  # fmt: skip
    side, channels = config.dataset.image_size, config.dataset.channels
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}

    def empty(name: str, like: Tensor) -> Tensor:
        made = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)
        return made.requires_grad_(name in trained)

    with recorded() as recorder:
        state = {name: empty(name, x) for name, x in [*network.named_parameters(), *network.named_buffers()]}
        images = torch.empty(batch, channels, side, side, dtype=build.backbone_dtype(config))
        recorder.calls.clear()
        with autocast(config.train, _CPU):
            embeddings = torch.func.functional_call(network, state, (images,))
        forward = recorder.calls.copy()
        embeddings.backward(torch.empty_like(embeddings))
        backward = difference(recorder.calls, forward)
    return BackboneCalls(forward, backward, norms, [tuple(p.shape) for p in network.parameters() if p.requires_grad])


@dataclass(frozen=True)
class _Fixed:
    """A sampler that draws so many rows, so many of the batch, or everything."""

    rows: int | None
    batch_rows: int | None
    log_weight: float

    def draw(self, labels: Tensor, shard: ClassShard, draw_id: int, rate: float) -> Draw:
        """Always the same."""
        rows = None if self.rows is None else torch.empty(self.rows, dtype=torch.int64)
        some = None if self.batch_rows is None else torch.empty(self.batch_rows, dtype=torch.int64)
        return Draw(rows, some, self.log_weight)

    def drawn(self, shard: ClassShard, draw_id: int, rate: float) -> Tensor:
        """Nothing is read ahead."""
        return torch.empty(0, dtype=torch.int64)


def _class_layer(config: Config, preset: Preset, work: Work, device_type: str) -> tuple[Calls, Calls]:
    """Calls of the class layer forward and backward, rows updated where that is fused."""
    loss = build.build_loss(config, replace(preset, sampler="all"), work.num_classes, None)
    centres = config.classifier.sub_centres
    candidates = work.num_candidates // centres
    step = max(1, chunked.chunk_rows(work.inter_batch, device_type) // centres)
    if config.classifier.kernel == FUSED:
        forward, backward = _pass(config, loss, work, min(candidates, step), device_type)
        return total(forward, _fused(config, work, 2 / 3)), total(backward, _fused(config, work, 1 / 3))
    if config.classifier.kernel == "reference" or candidates <= step:
        return _pass(config, loss, work, candidates, device_type)
    one, two = (_pass(config, loss, work, number * step, device_type) for number in (1, 2))
    forward, backward = (
        total(fewer, scaled(difference(more, fewer), candidates / step - 1))
        for fewer, more in zip(one, two, strict=True)
    )
    return forward, backward


def _fused(config: Config, work: Work, share: float) -> Calls:
    """The fused kernel of a micro-batch as one operator with a share of the head's operations and bytes."""
    whole = head_flops(config, work) / work.num_micro, head_bytes(config, work) / work.num_micro
    return Calls([Operator("megaclass.fused_class_layer.default", (), (), *(int(share * one) for one in whole))])


def _pass(config: Config, loss: Loss, work: Work, candidates: int, device_type: str) -> tuple[Calls, Calls]:
    """Calls of one pass over so many candidate classes of this shard, forward and backward."""
    centres, dim = config.classifier.sub_centres, work.dim
    wide = build.backbone_dtype(config)
    is_part = work.inter_batch < work.global_batch
    sampler = _Fixed(candidates if work.is_sampled else None, work.inter_batch if is_part else None, 0.0)
    classes = max(candidates, work.num_rows // centres) if work.is_sampled else candidates
    own = max(1, -(-work.global_batch // work.world_size))

    def expected(number: int) -> int:
        return min(number, own)

    with recorded(expected) as recorder, _kernel_of_all(work, device_type):
        layer = ShardedClassifier(
            dim, ClassShard(1, 0, 1), replace(loss, sampler=sampler), seed=0, kernel=_kernel(config),
            dtype=build.row_dtype(config),
        )  # fmt: skip
        layer.shard = ClassShard(classes, 0, 1)
        layer.weight = nn.Parameter(torch.empty(classes * centres, dim, dtype=build.row_dtype(config)), False)
        layer.dtype = wide
        if config.optim.row_update == "fused":
            optimizer = rowwise.build(config.optim.class_name, layer.weight.detach(), config.optim)
            layer.row_update = partial(optimizer.step_in_backward, lr=0.1, number=0)
        embeddings = torch.empty(work.num_gathered, dim, dtype=wide).requires_grad_()
        labels = torch.empty(work.num_gathered, dtype=torch.int64)
        recorder.calls.clear()
        output = layer(embeddings, labels, draw_id=0)
        forward = recorder.calls.copy()
        output.loss.backward()
        layer.take_row_gradient()
    return forward, difference(recorder.calls, forward)


def _kernel(config: Config) -> str:
    name = config.classifier.kernel
    return "chunked" if name == FUSED else name


@contextmanager
def _kernel_of_all(work: Work, device_type: str) -> Iterator[None]:
    """Chunks and blocks are those of the device, and what the kernel keeps between its passes is as for all rows."""
    chunk, block = chunked.chunk_rows(work.inter_batch, device_type), rowwise.block_rows(work.dim, device_type)
    rows = work.num_candidates if work.is_sampled else None
    slopes, kept = chunked.keeps_slopes(work.inter_batch, work.num_candidates), chunked.keeps_rows(rows, work.dim)
    with (
        mock.patch.object(chunked, "chunk_rows", return_value=chunk),
        mock.patch.object(rowwise, "block_rows", return_value=block),
        mock.patch.object(chunked, "keeps_slopes", return_value=slopes),
        mock.patch.object(chunked, "keeps_rows", return_value=kept),
    ):
        yield


def _draw(preset: Preset, work: Work) -> Calls:
    """Calls that draw the rows, or the part of the batch, and join them with the batch's own classes."""
    shard = ClassShard(work.num_classes, 0, work.world_size)
    own = -(-work.global_batch // work.world_size)
    with recorded() as recorder:
        labels = torch.empty(work.global_batch, dtype=torch.int64)
        recorder.calls.clear()
        if preset.sampler == "batch":
            stratified(work.global_batch, work.inter_batch, 0, work.global_batch, key=1, device=_CPU)
        elif work.is_sampled and preset.sampler != "positives":
            drawn = min(shard.num_classes, work.num_candidates * work.world_size)
            stratified(shard.num_classes, drawn, shard.start, shard.stop, key=1, device=_CPU)
        if preset.sampler in ("partial-fc", "positives"):
            torch.unique(labels)
        if preset.sampler in ("partial-fc", "hard") or preset.batch_positives:
            torch.unique(torch.empty(work.num_candidates + own, dtype=torch.int64))
    return recorder.calls


def _norm(config: Config, work: Work, gradients: list[tuple[int, ...]]) -> Calls:
    """Calls of the joint norm and of the clipping."""
    wide = build.backbone_dtype(config)
    is_fused = config.optim.row_update == "fused"
    with recorded() as recorder:
        replicated = [torch.empty(size, dtype=wide) for size in gradients]
        values = None if is_fused else torch.empty(_touched(config, work), work.dim, dtype=wide)
        recorder.calls.clear()
        norm = joint_norm(replicated, [] if values is None else [values], None)
        coefficient = clip_coefficient(norm, config.optim.clip_norm)
        torch._foreach_mul_(replicated, coefficient)
        if config.optim.clip_norm is not None and values is not None:
            values.mul_(coefficient.to(values.dtype))
    return recorder.calls


def _backbone_step(config: Config, gradients: list[tuple[int, ...]]) -> Calls:
    """Calls of the backbone's optimizer after its first step."""
    with recorded() as recorder:
        network = nn.Module()
        for number, size in enumerate(gradients):
            parameter = nn.Parameter(torch.empty(size, dtype=build.backbone_dtype(config)))
            parameter.grad = torch.empty_like(parameter)
            network.register_parameter(f"weight{number}", parameter)
        optimizer = backbone_optimizer.build(network, config.optim, 0.1)
        optimizer.step()
        recorder.calls.clear()
        optimizer.step()
    return recorder.calls


def _touched(config: Config, work: Work) -> int:
    """Rows with a gradient in a step."""
    return min(work.num_rows, work.num_touched * work.num_micro)


def _row_step(config: Config, work: Work, device_type: str) -> Calls:
    """Calls of the row optimizer, which walks over blocks of rows; none where the backward pass has done it."""
    if config.optim.row_update == "fused":
        return Calls()
    is_dense = config.optim.untouched_rows == "dense"
    rows = work.num_rows if is_dense else _touched(config, work)
    step = rowwise.block_rows(work.dim, device_type)
    if rows <= step:
        return _row_blocks(config, work, rows, step)
    one, two = (_row_blocks(config, work, number * step, step) for number in (1, 2))
    return total(one, scaled(difference(two, one), rows / step - 1))


def _row_blocks(config: Config, work: Work, rows: int, size: int) -> Calls:
    with recorded() as recorder:
        weight = torch.empty(max(rows, work.num_rows), work.dim, dtype=build.row_dtype(config))
        optimizer = rowwise.build(config.optim.class_name, weight, config.optim)
        values = torch.empty(rows, work.dim, dtype=build.backbone_dtype(config))
        recorder.calls.clear()
        named = torch.empty(rows, dtype=torch.int64) if work.is_sampled else None
        step: Callable[..., Any] = optimizer._step_block
        for start, stop in rowwise.ranges(rows, size):
            where = slice(start, stop) if named is None else named[start:stop]
            step(where, values[start:stop], 0.1, 0)
    return recorder.calls
