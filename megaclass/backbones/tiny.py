"""A small residual network for small images on a CPU: the backbone of the demo and of most tests.

Separate because it is ours and not from a paper; its shape was chosen by measuring. Time on a CPU goes into memory, not
multiplications: halving the image in the stem and again in every stage, so that no block works above a quarter of the
side, beat wider and deeper networks of twice the cost, in recall reached in equal time as well as in speed.

The activation is SiLU because it is smooth. Under ReLU two runs that differ by rounding alone part within 50 steps:
somewhere a unit lies within 1e-7 of zero, which one run passes and the other blocks. SiLU costs no time beside it.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megaclass.backbones import Norm, Sizes, register, require_image_size
from megaclass.backbones.block import Block

_STEM_CHANNELS = 16
_STAGE_CHANNELS = (32, 64, 128)


class _Block(Block):
    """Two 3x3 convolutions beside a shortcut that halves the side and changes the channels."""

    def __init__(self, num_in: int, num_out: int, norm: Norm) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(num_in, num_out, 3, stride=2, padding=1, bias=False),
            norm(num_out, 2),
            nn.SiLU(inplace=True),
            nn.Conv2d(num_out, num_out, 3, padding=1, bias=False),
            norm(num_out, 2),
        )
        self.shortcut = nn.Sequential(nn.Conv2d(num_in, num_out, 1, stride=2, bias=False), norm(num_out, 2))

    def compute(self, x: Tensor) -> Tensor:
        """[batch, num_in, side, side] to [batch, num_out, ceil(side / 2), ceil(side / 2)]."""
        return F.silu(self.body(x) + self.shortcut(x), inplace=True)


class Tiny(nn.Module):
    """Stem and three residual blocks, each with stride 2, then a matrix over all positions and a batch norm.

    About 3 million multiply-adds for a grey 32x32 image at width 1. Inside, tensors are laid out channels last, which
    on a CPU is a third faster than the default.
    """

    def __init__(self, sizes: Sizes, norm: Norm) -> None:
        super().__init__()
        stem, *stages = (max(1, round(count * sizes.width)) for count in (_STEM_CHANNELS, *_STAGE_CHANNELS))
        self.stem = nn.Conv2d(sizes.channels, stem, 3, stride=2, padding=1, bias=False)
        blocks = (_Block(num_in, num_out, norm) for num_in, num_out in pairwise((stem, *stages)))
        self.layers = nn.Sequential(norm(stem, 2), nn.SiLU(inplace=True), *blocks)
        side = math.ceil(sizes.image_size / 2 ** (1 + len(stages)))
        self.fc = nn.Linear(stages[-1] * side * side, sizes.dim, bias=False)
        self.norm = norm(sizes.dim, 0, learn_scale=False)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.kernel_size == (1, 1):
                    # Both layouts of such a kernel are the same bytes; named channels last, as its gradient will be,
                    # DDP need not copy that gradient into another shape of strides.
                    module.weight.data = module.weight.data.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings [batch, dim] of images [batch, channels, side, side]."""
        # After the stem, because a grey image fits both layouts and torch would then go on with the slower one. The
        # parameters stay contiguous, which is what checkpoints want.
        x = self.layers(self.stem(images).contiguous(memory_format=torch.channels_last))
        embeddings: Tensor = self.norm(self.fc(x.flatten(1)))
        return embeddings


@register("tiny")
def build_tiny(sizes: Sizes, norm: Norm) -> nn.Module:
    """The network for images of at least 8 pixels a side."""
    require_image_size("tiny", sizes, 8)
    return Tiny(sizes, norm)
