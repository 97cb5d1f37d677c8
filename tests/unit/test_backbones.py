"""Every backbone: shapes, sizes known from the literature, gradients, errors, and learning for the small one."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from megaclass import backbones
from megaclass.backbones.vit import patch_size
from megaclass.errors import ConfigError
from tests.support.spawn import spawn


def _build(name, **options):
    torch.manual_seed(0)
    settings = {"dim": 7, "image_size": 32, "channels": 1, "batch_norm": "local", "group": None, **options}
    return backbones.build(name, **settings)


def _num_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", ["tiny", "iresnet18", "vit-tiny", "mobilefacenet"])
@pytest.mark.parametrize(("image_size", "channels"), [(32, 1), (45, 3)])
def test_embeddings_have_the_asked_shape_and_every_parameter_a_gradient(name, image_size, channels):
    backbone = _build(name, image_size=image_size, channels=channels)
    embeddings = backbone(torch.randn(5, channels, image_size, image_size))
    assert embeddings.shape == (5, 7)
    (embeddings * torch.randn(5, 7)).sum().backward()
    for parameter_name, parameter in backbone.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, parameter_name
            assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.is_contiguous(), parameter_name


@pytest.mark.parametrize(
    ("name", "dim", "millions"),
    [
        ("iresnet18", 512, 24.03),
        ("iresnet34", 512, 34.14),
        ("iresnet50", 512, 43.59),
        ("iresnet100", 512, 65.16),
        ("iresnet200", 512, 118.83),
        ("mobilefacenet", 128, 1.00),
    ],
)
def test_sizes_at_112_pixels_are_those_of_the_literature(name, dim, millions):
    with torch.device("meta"):
        backbone = backbones.build(name, dim=dim, image_size=112, channels=3, batch_norm="local", group=None)
    assert round(_num_parameters(backbone) / 1e6, 2) == millions
    if _num_parameters(backbone) < 5e7:
        assert backbone(torch.empty(2, 3, 112, 112, device="meta")).shape == (2, dim)


def test_vit_sizes_without_end_and_positions_are_those_of_the_literature():
    # 12 blocks of 12 width^2 + 13 width, the patches and the last norm.
    for name, width in [("vit-tiny", 192), ("vit-small", 384), ("vit-base", 768)]:
        with torch.device("meta"):
            backbone = backbones.build(name, dim=512, image_size=112, channels=3, batch_norm="local", group=None)
        rest = _num_parameters(backbone) - 196 * width * (512 + 1) - 2 * 512
        assert rest == 12 * (12 * width**2 + 13 * width) + (3 * 64 * width + width) + 2 * width
        assert backbone(torch.empty(2, 3, 112, 112, device="meta")).shape == (2, 512)


@pytest.mark.parametrize(("image_size", "patch"), [(8, 1), (32, 2), (48, 3), (112, 8), (224, 16)])
def test_patch_is_a_fourteenth_of_the_image(image_size, patch):
    assert patch_size(image_size) == patch


def test_vit_sees_every_pixel_of_an_image_that_does_not_divide():
    backbone = _build("vit-tiny", image_size=31).eval()
    images = torch.randn(2, 1, 31, 31, requires_grad=True)
    (backbone(images) * torch.randn(2, 7)).sum().backward()
    assert (images.grad != 0).all()


def test_embedding_ends_with_a_batch_norm_of_fixed_scale():
    for name in ["tiny", "iresnet18", "vit-tiny", "mobilefacenet"]:
        backbone = _build(name)
        embeddings = backbone(torch.randn(16, 1, 32, 32) * 3 + 1)
        torch.testing.assert_close(embeddings.mean(0), torch.zeros(7), atol=1e-4, rtol=0)
        torch.testing.assert_close(embeddings.var(0, correction=0), torch.ones(7), atol=1e-2, rtol=0)
        fixed = [parameter for parameter in backbone.parameters() if not parameter.requires_grad]
        assert [tuple(parameter.shape) for parameter in fixed] == [(7,)]


def test_tiny_works_from_8_pixels_and_width_scales_channels():
    assert _build("tiny", image_size=8)(torch.randn(3, 1, 8, 8)).shape == (3, 7)
    normal, double = _build("tiny"), _build("tiny", width=2.0)
    assert double.fc.in_features == 2 * normal.fc.in_features
    assert _build("tiny", width=0.01)(torch.randn(3, 1, 32, 32)).shape == (3, 7)


def test_the_same_seed_builds_the_same_network():
    first, second = _build("tiny").state_dict(), _build("tiny").state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_unknown_name_is_refused_with_the_nearest_and_all():
    with pytest.raises(
        ConfigError, match=r"backbone.name: 'iresnet5' is not known; did you mean 'iresnet50'\?"
    ) as error:
        _build("iresnet5")
    assert all(name in str(error.value) for name in backbones.names())
    with pytest.raises(ConfigError, match=r"'zzz' is not known; allowed are .*tiny"):
        _build("zzz")


def test_impossible_sizes_are_refused():
    with pytest.raises(
        ConfigError, match=r"dataset.image_size: 31 is too small for iresnet50, which needs at least 32"
    ):
        _build("iresnet50", image_size=31)
    with pytest.raises(ConfigError, match=r"image_size: 16 is too small for mobilefacenet"):
        _build("mobilefacenet", image_size=16)
    with pytest.raises(ConfigError, match=r"backbone.width: 2.0 is not allowed for vit-tiny: only tiny has a width"):
        _build("vit-tiny", width=2.0)


def test_tiny_learns_to_tell_patterns_apart():
    generator = torch.Generator().manual_seed(1)
    patterns = torch.randn(13, 1, 16, 16, generator=generator)
    backbone = _build("tiny", dim=16, image_size=16)
    classes = nn.Parameter(torch.randn(13, 16, generator=generator))
    optimizer = torch.optim.SGD([*backbone.parameters(), classes], lr=0.05, momentum=0.9)
    for _ in range(60):
        labels = torch.randint(13, (52,), generator=generator)
        images = patterns[labels] + torch.randn(52, 1, 16, 16, generator=generator)
        logits = 16 * F.normalize(backbone(images)) @ F.normalize(classes).T
        optimizer.zero_grad()
        F.cross_entropy(logits, labels).backward()
        optimizer.step()
    labels = torch.arange(13).repeat(10)
    images = patterns[labels] + torch.randn(130, 1, 16, 16, generator=generator)
    predicted = (backbone.eval()(images) @ F.normalize(classes).T).argmax(1)
    assert (predicted == labels).float().mean() > 0.9


def _data(size):
    generator = torch.Generator().manual_seed(4)
    images = torch.randn(size, 1, 32, 32, generator=generator, dtype=torch.float64)
    return images, torch.randn(size, 7, generator=generator, dtype=torch.float64)


def _train_rank(world, images, targets):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # DDP warns about gradients laid out unlike their parameters
        backbone = _build("tiny", batch_norm="sync", group=world.group).double()
        wrapped = nn.parallel.DistributedDataParallel(backbone, process_group=world.group)
        part = slice(4 * world.rank, 4 * world.rank + 4)
        for _ in range(2):
            wrapped.zero_grad()
            ((wrapped(images[part]) - targets[part]) ** 2).mean().backward()
    gradients = {name: parameter.grad for name, parameter in backbone.named_parameters() if parameter.requires_grad}
    return gradients, backbone.state_dict()


@pytest.mark.distributed
def test_two_ranks_with_sync_norm_equal_one_process():
    images, targets = _data(8)
    backbone = _build("tiny", batch_norm="sync").double()
    for _ in range(2):
        backbone.zero_grad()
        ((backbone(images) - targets) ** 2).mean().backward()
    for gradients, state in spawn(_train_rank, 2, images, targets):
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, backbone.get_parameter(name).grad, rtol=1e-9, atol=1e-12)
        assert state.keys() == backbone.state_dict().keys()
        for name, value in backbone.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=1e-10, atol=1e-12)
