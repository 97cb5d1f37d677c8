"""What the trained backbone is compared with."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from megaclass.evaluate.baselines import RawPixels, embed_baselines
from megaclass.evaluate.embed import embed_images
from megaclass.evaluate.similarity import unit_length
from megaclass.parallel.process import World

CPU = torch.device("cpu")


def _images(n=5, channels=3, size=9):
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_pixel_cosines_are_correlations():
    images = _images(5, 1)
    made = embed_images(RawPixels(9, 1), images, CPU)
    assert made.shape == (5, RawPixels(9, 1).dim)
    np.testing.assert_allclose(made @ made.T, np.corrcoef(images.flatten(1).numpy()), atol=1e-6)


def test_brightness_and_contrast_do_not_count_and_blank_images_are_zero():
    images = _images()
    one, other = (embed_images(RawPixels(9, 3), x, CPU) for x in (images, images * 0.3 + 0.2))
    assert torch.allclose(one, other, atol=1e-6)
    assert torch.equal(embed_images(RawPixels(9, 3), torch.ones(2, 3, 9, 9), CPU), torch.zeros(2, 243))


@pytest.mark.parametrize(("size", "side"), [(31, 31), (32, 32), (33, 32), (64, 32), (105, 32)])
def test_large_images_are_averaged_down(size, side):
    pixels = RawPixels(size, 3)
    images = _images(2, 3, size)
    assert pixels.dim == 3 * side * side
    assert pixels(images).shape == (2, pixels.dim)
    if size == 64:
        means = images.reshape(2, 3, 32, 2, 32, 2).mean(dim=(3, 5)).flatten(1)
        assert torch.allclose(pixels(images), means - means.mean(dim=1, keepdim=True), atol=1e-6)


def test_both_baselines_see_the_whole_split():
    images = _images(13)
    starts = []

    def batches():
        starts.append(1)
        for part in torch.arange(13).split(5):
            yield SimpleNamespace(images=images[part], labels=part % 3, ids=part)

    def build():
        torch.manual_seed(5)
        return nn.Sequential(nn.Flatten(), nn.Linear(243, 7))

    world = World(0, 1, 0, CPU, None, None)
    made = embed_baselines(build, batches, world, CPU, dim=7, image_size=9, channels=3)
    assert list(made) == ["untrained", "pixels"]
    assert len(starts) == 2
    assert torch.allclose(made["untrained"].embeddings, unit_length(build()(images).detach()), atol=1e-6)
    assert made["pixels"].embeddings.shape == (13, 243)
    assert all(torch.equal(split.labels, torch.arange(13) % 3) for split in made.values())
