"""What a trained backbone has to beat: the pixels themselves, and the same backbone untrained.

Both run through the same reader, the same gather and the same protocols as the trained backbone, so that a table of
the three compares nothing but the embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from megaclass.evaluate.embed import EmbeddedSplit, LabelledImages, embed_split
from megaclass.parallel.process import World

LARGEST_SIDE = 32


class RawPixels(nn.Module):
    """A backbone without parameters: the pixels less their mean, so that a cosine is a correlation of two images.

    Images of more than 32 pixels a side are averaged down to that, or 100,000 of them would not fit into memory.

    Attributes:
        dim: width of the embeddings, for images of the size and channels given.
    """

    def __init__(self, image_size: int, channels: int) -> None:
        super().__init__()
        self.side = min(image_size, LARGEST_SIDE)
        self.dim = channels * self.side**2

    def forward(self, images: Tensor) -> Tensor:
        """[batch, channels, height, width] → [batch, dim] of any length; zero for an image of one colour."""
        small = images if images.shape[-1] == self.side else adaptive_avg_pool2d(images, self.side)
        flat = small.flatten(1)
        return flat - flat.mean(dim=1, keepdim=True)


def embed_baselines(
    build: Callable[[], nn.Module],
    batches: Callable[[], Iterable[LabelledImages]],
    world: World,
    device: torch.device,
    *,
    dim: int,
    image_size: int,
    channels: int,
) -> dict[str, EmbeddedSplit]:
    """Embeddings of the split by the untrained backbone and by its pixels, under `untrained` and `pixels`.

    Called by all ranks.

    Args:
        build: makes the backbone exactly as a new run with the same seed would, the same on every rank.
        batches: starts this rank's part of the split anew; called once for each of the two.
        world: the ranks.
        device: where to compute.
        dim: width of the backbone's embeddings.
        image_size: pixels a side of the images.
        channels: of the images.
    """
    pixels = RawPixels(image_size, channels)
    return {
        "untrained": embed_split(build().to(device), batches(), world, device, dim),
        "pixels": embed_split(pixels, batches(), world, device, pixels.dim),
    }
