"""The backbone's parameters, activations and flops, counted on the meta device: nothing is computed or allocated."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from megaclass.config import Config
from megaclass.parallel.process import World
from megaclass.train import build


@dataclass(frozen=True)
class BackboneWork:
    """One rank's backbone for one micro-batch.

    Attributes:
        num_parameters: trained numbers.
        parameter_bytes: of them.
        activation_bytes: kept from the forward for the backward pass.
        forward_flops: of the forward pass; backward takes twice as many.
    """

    num_parameters: int
    parameter_bytes: int
    activation_bytes: int
    forward_flops: int


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
    skipped = {parameter.untyped_storage()._cdata for parameter in parameters}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in skipped:
            kept[storage] = tensor  # held, so that no other storage takes its place
        return tensor

    side, channels = config.dataset.image_size, config.dataset.channels
    images = torch.empty(max(2, batch), channels, side, side, device=meta, dtype=build.backbone_dtype(config))
    skipped.add(images.untyped_storage()._cdata)
    flops = FlopCounterMode(display=False)
    with flops, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = backbone(images)
    assert output.shape[1] == config.backbone.dim
    size = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    share = batch / len(images)
    return BackboneWork(
        num_parameters=sum(parameter.numel() for parameter in parameters),
        parameter_bytes=sum(parameter.numel() * parameter.element_size() for parameter in parameters),
        activation_bytes=int(size * share) // (2 if config.train.precision == "bfloat16" else 1),
        forward_flops=int(flops.get_total_flops() * share),
    )
