"""MobileFaceNet: a network of about a million parameters for devices.

Separate because it is one design of one paper: inverted residual blocks, PReLU, and an end that weighs every position
by itself instead of averaging.
"""

from __future__ import annotations

from torch import Tensor, nn

from megaclass.backbones import Norm, Sizes, register, require_image_size
from megaclass.backbones.block import Block

# Expansion, channels, blocks, stride of the first block: table 1 of the paper, between the stem and the end.
_STAGES = ((2, 64, 5, 2), (4, 128, 1, 2), (2, 128, 6, 1), (4, 128, 1, 2), (2, 128, 2, 1))
_STEM_CHANNELS = 64
_END_CHANNELS = 512


def _conv(
    norm: Norm,
    num_in: int,
    num_out: int,
    kernel: int,
    *,
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
    linear: bool = False,
) -> nn.Sequential:
    """Convolution, batch norm and, unless `linear`, PReLU."""
    layers = [
        nn.Conv2d(num_in, num_out, kernel, stride=stride, padding=padding, groups=groups, bias=False),
        norm(num_out, 2),
    ]
    return nn.Sequential(*layers) if linear else nn.Sequential(*layers, nn.PReLU(num_out))


class _Bottleneck(Block):
    """1x1 to more channels, 3x3 on each channel, 1x1 back without a nonlinearity; a shortcut where shapes allow."""

    def __init__(self, num_in: int, num_out: int, expansion: int, stride: int, norm: Norm) -> None:
        super().__init__()
        inner = num_in * expansion
        self.body = nn.Sequential(
            _conv(norm, num_in, inner, 1),
            _conv(norm, inner, inner, 3, stride=stride, padding=1, groups=inner),
            _conv(norm, inner, num_out, 1, linear=True),
        )
        self._has_shortcut = stride == 1 and num_in == num_out

    def compute(self, x: Tensor) -> Tensor:
        """[batch, num_in, side, side] to [batch, num_out, ceil(side / stride), ceil(side / stride)]."""
        out: Tensor = self.body(x)
        return x + out if self._has_shortcut else out


class MobileFaceNet(nn.Module):
    """The network of table 1, with its last depthwise kernel as large as the side that is left (7 at 112 pixels).

    Source: Chen et al., MobileFaceNets, CCBR 2018 (arXiv 1804.07573).
    """

    def __init__(self, sizes: Sizes, norm: Norm) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            _conv(norm, sizes.channels, _STEM_CHANNELS, 3, stride=2, padding=1),
            _conv(norm, _STEM_CHANNELS, _STEM_CHANNELS, 3, padding=1, groups=_STEM_CHANNELS),
        ]
        num_in, side = _STEM_CHANNELS, -(-sizes.image_size // 2)
        for expansion, num_out, count, stride in _STAGES:
            for position in range(count):
                layers.append(_Bottleneck(num_in, num_out, expansion, stride if position == 0 else 1, norm))
                num_in = num_out
            side = -(-side // stride)
        self.layers = nn.Sequential(*layers, _conv(norm, num_in, _END_CHANNELS, 1))
        self.end = nn.Sequential(
            _conv(norm, _END_CHANNELS, _END_CHANNELS, side, groups=_END_CHANNELS, linear=True),
            nn.Conv2d(_END_CHANNELS, sizes.dim, 1, bias=False),
            nn.Flatten(),
            norm(sizes.dim, 0, learn_scale=False),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", a=0.25)

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings [batch, dim] of images [batch, channels, side, side]."""
        embeddings: Tensor = self.end(self.layers(images))
        return embeddings


@register("mobilefacenet")
def build_mobilefacenet(sizes: Sizes, norm: Norm) -> nn.Module:
    """The network for images of at least 32 pixels a side."""
    require_image_size("mobilefacenet", sizes, 32)
    return MobileFaceNet(sizes, norm)
