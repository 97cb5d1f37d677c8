"""The backbone's parameters, activations and flops, counted on the meta device: nothing is computed or allocated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from megaclass.backbones.block import Block, blocks, recompute_blocks
from megaclass.config import Config
from megaclass.parallel.process import World
from megaclass.train import build


@dataclass(frozen=True)
class BackboneWork:
    """One rank's backbone for one micro-batch.

    Attributes:
        num_parameters: trained numbers.
        num_tensors: that hold them.
        parameter_bytes: of them.
        gathered_bytes: of the parameters that are whole at once where ranks hold parts (`train.strategy: fsdp`): those
            outside of the blocks, and the two largest blocks, as the next one is gathered while one computes.
        activation_bytes: kept from the forward for the backward pass; where blocks recompute theirs, the inputs of all
            blocks and the inside of the largest one.
        forward_flops: of the forward pass; backward takes twice as many.
        repeated_flops: of what backward computes again.
    """

    num_parameters: int
    num_tensors: int
    parameter_bytes: int
    gathered_bytes: int
    activation_bytes: int
    forward_flops: int
    repeated_flops: int


def trace(config: Config, batch: int) -> BackboneWork:
    """Run the backbone forward on the meta device and count what autograd keeps.

    With autocast the kept activations are taken to be half as large, as meta tensors are not autocast.
    """
    meta = torch.device("meta")
    # Synchronised batch norm has no meta kernel; local batch norm has the same shapes.
    local = config.backbone.model_copy(update={"batch_norm": "local"})
    config = config.model_copy(update={"backbone": local})
    with meta:
        backbone = build.build_backbone(config, World(0, 1, 0, meta, None, None)).to(build.backbone_dtype(config))
    parameters = list(backbone.parameters())
    side, channels = config.dataset.image_size, config.dataset.channels
    images = torch.empty(max(2, batch), channels, side, side, device=meta, dtype=build.backbone_dtype(config))
    flops = FlopCounterMode(display=False, depth=8)
    with flops:
        size, inside = _kept_bytes(backbone, images)
    repeated = 0
    if config.train.activation_checkpointing:
        names = {
            f"{type(backbone).__name__}.{name}" for name, one in backbone.named_modules() if isinstance(one, Block)
        }
        repeated = sum(sum(counts.values()) for name, counts in flops.get_flop_counts().items() if name in names)
        recompute_blocks(backbone)
        size = _kept_bytes(backbone, images)[0] + inside
    share = batch / len(images)
    return BackboneWork(
        num_parameters=sum(parameter.numel() for parameter in parameters),
        num_tensors=len(parameters),
        parameter_bytes=_parameter_bytes(backbone),
        gathered_bytes=_gathered_bytes(backbone),
        activation_bytes=int(size * share) // (2 if config.train.precision in ("bfloat16", "float16") else 1),
        forward_flops=int(flops.get_total_flops() * share),
        repeated_flops=int(repeated * share),
    )


def _parameter_bytes(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def _gathered_bytes(backbone: nn.Module) -> int:
    """See `BackboneWork.gathered_bytes`."""
    sizes = sorted(_parameter_bytes(block) for block in blocks(backbone))
    return _parameter_bytes(backbone) - sum(sizes) + sum(sizes[-2:])


def _kept_bytes(backbone: nn.Module, images: Tensor) -> tuple[int, int]:
    """Bytes that a forward pass keeps for backward, parameters and images apart; and those of its largest block."""
    skipped = {tensor.untyped_storage()._cdata for tensor in (*backbone.parameters(), images)}
    kept: dict[int, Tensor] = {}
    largest = 0

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in skipped:
            kept[storage] = tensor  # held, so that no other storage takes its place
        return tensor

    def total() -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())

    def enter(block: nn.Module, _: Any) -> None:
        before[block] = total()

    def leave(block: nn.Module, *_: Any) -> None:
        nonlocal largest
        largest = max(largest, total() - before[block])

    before: dict[nn.Module, int] = {}
    hooks = [hook for one in blocks(backbone) for hook in (
        one.register_forward_pre_hook(enter), one.register_forward_hook(leave))]  # fmt: skip
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        backbone(images)
    for hook in hooks:
        hook.remove()
    return total(), largest
