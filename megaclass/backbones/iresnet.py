"""The residual networks of the ArcFace line of work, 18 to 200 layers.

Separate because it is a family of its own: like ResNet, but with a stem that keeps the image's side, a batch norm at
the beginning of each block, PReLU, and an end made of a matrix between two batch norms.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from megaclass.backbones import Norm, Sizes, register, require_image_size
from megaclass.backbones.block import Block

_CHANNELS = (64, 128, 256, 512)
_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 14, 3), 100: (3, 13, 30, 3), 200: (6, 26, 60, 6)}


class _Block(Block):
    """Batch norm, 3x3, batch norm, PReLU, 3x3 (which has the stride), batch norm; a shortcut beside it."""

    def __init__(self, num_in: int, num_out: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.body = nn.Sequential(
            norm(num_in, 2),
            nn.Conv2d(num_in, num_out, 3, padding=1, bias=False),
            norm(num_out, 2),
            nn.PReLU(num_out),
            nn.Conv2d(num_out, num_out, 3, stride=stride, padding=1, bias=False),
            norm(num_out, 2),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or num_in != num_out:
            self.shortcut = nn.Sequential(nn.Conv2d(num_in, num_out, 1, stride=stride, bias=False), norm(num_out, 2))

    def compute(self, x: Tensor) -> Tensor:
        """[batch, num_in, side, side] to [batch, num_out, ceil(side / stride), ceil(side / stride)]."""
        out: Tensor = self.body(x) + self.shortcut(x)
        return out


class IResNet(nn.Module):
    """Improved residual network with `blocks` blocks in its four stages, each of which halves the side.

    Source: Deng et al., ArcFace, CVPR 2019 (arXiv 1801.07698), section 3.1; blocks after Han et al., Deep Pyramidal
    Residual Networks, CVPR 2017 (arXiv 1610.02915). The papers have dropout before the matrix; there is none here.
    Their initial values are not stated; these are Kaiming's, with PReLU slopes of 0.25.
    """

    def __init__(self, blocks: tuple[int, ...], sizes: Sizes, norm: Norm) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(sizes.channels, _CHANNELS[0], 3, padding=1, bias=False), norm(_CHANNELS[0], 2), nn.PReLU(64)
        )
        layers: list[nn.Module] = []
        num_in, side = _CHANNELS[0], sizes.image_size
        for num_out, count in zip(_CHANNELS, blocks, strict=True):
            for position in range(count):
                layers.append(_Block(num_in, num_out, 2 if position == 0 else 1, norm))
                num_in = num_out
            side = -(-side // 2)
        self.stages = nn.Sequential(*layers)
        self.end = nn.Sequential(
            norm(num_in, 2),
            nn.Flatten(),
            nn.Linear(num_in * side * side, sizes.dim),
            norm(sizes.dim, 0, learn_scale=False),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", a=0.25)

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings [batch, dim] of images [batch, channels, side, side]."""
        embeddings: Tensor = self.end(self.stages(self.stem(images)))
        return embeddings


def _build(layers: int, sizes: Sizes, norm: Norm) -> nn.Module:
    require_image_size(f"iresnet{layers}", sizes, 32)
    return IResNet(_BLOCKS[layers], sizes, norm)


for _layers in _BLOCKS:
    register(f"iresnet{_layers}")(partial(_build, _layers))
