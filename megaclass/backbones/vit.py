"""Vision transformers in the form used for faces: small patches, no class token, a matrix over all tokens.

Separate because nothing here is a convolution network: no batch norm but the last one, and attention from torch's
`scaled_dot_product_attention`.
"""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn, zeros

from megaclass.backbones import Norm, Sizes, register
from megaclass.backbones.block import Block

_SHAPES = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12)}
_MLP_RATIO = 4


def patch_size(image_size: int) -> int:
    """Pixels a side of a patch: a fourteenth of the image, rounded, at least 1.

    112 gives 8 (14 by 14 tokens), 224 gives 16, 32 gives 2 (16 by 16 tokens). An image that does not divide is padded
    with zeros (mid grey) at the right and the bottom.
    """
    return max(1, round(image_size / 14))


class _Block(Block):
    """Attention and a two-layer network, each after a layer norm and beside a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self._heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, _MLP_RATIO * width), nn.GELU(), nn.Linear(_MLP_RATIO * width, width)
        )

    def compute(self, x: Tensor) -> Tensor:
        """[batch, tokens, width] to the same shape."""
        batch, tokens, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, tokens, 3, self._heads, width // self._heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        x = x + self.projection(mixed.transpose(1, 2).reshape(batch, tokens, width))
        out: Tensor = x + self.mlp(x)
        return out


class VisionTransformer(nn.Module):
    """Pre-norm transformer over patches with learned positions and no dropout; the end sees every token.

    Source: Dosovitskiy et al., ICLR 2021 (arXiv 2010.11929); shapes tiny and small from Touvron et al., DeiT (arXiv
    2012.12877). The end, a matrix over all tokens and a batch norm, is the habit of face recognition, where position
    in the aligned image means something; at 196 tokens it holds tokens * width * dim numbers.
    """

    def __init__(self, width: int, depth: int, heads: int, sizes: Sizes, norm: Norm) -> None:
        super().__init__()
        patch = patch_size(sizes.image_size)
        side = -(-sizes.image_size // patch)
        self._padding = side * patch - sizes.image_size
        self.patches = nn.Conv2d(sizes.channels, width, patch, stride=patch)
        self.position = nn.Parameter(zeros(1, side * side, width))
        self.blocks = nn.Sequential(*(_Block(width, heads) for _ in range(depth)))
        self.last_norm = nn.LayerNorm(width)
        self.fc = nn.Linear(side * side * width, sizes.dim, bias=False)
        self.norm = norm(sizes.dim, 0, learn_scale=False)
        nn.init.trunc_normal_(self.position, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings [batch, dim] of images [batch, channels, side, side]."""
        if self._padding:
            images = F.pad(images, (0, self._padding, 0, self._padding))
        x = self.patches(images).flatten(2).transpose(1, 2) + self.position
        x = self.last_norm(self.blocks(x))
        embeddings: Tensor = self.norm(self.fc(x.flatten(1)))
        return embeddings


def _build(shape: str, sizes: Sizes, norm: Norm) -> nn.Module:
    return VisionTransformer(*_SHAPES[shape], sizes, norm)


for _shape in _SHAPES:
    register(f"vit-{_shape}")(partial(_build, _shape))
