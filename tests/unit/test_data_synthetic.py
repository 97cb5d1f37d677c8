from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch

from megaclass.config import Augment
from megaclass.data.synthetic import SyntheticReader, SyntheticSamples
from megaclass.errors import DataError
from tests.support.readers import opened


def open_synthetic(batch_size: int, rank: int = 0, world_size: int = 1, **options: Any) -> SyntheticReader:
    fixed: dict[str, Any] = {"num_classes": 13, "samples_per_class": 4, "noise": 0.5, "seed": 3, "image_size": 17}
    where = {"batch_size": batch_size, "rank": rank, "world_size": world_size, "channels": 3}
    return opened(SyntheticReader, **where, **(fixed | options))


def test_each_sample_once_per_epoch_over_all_ranks() -> None:
    parts = [list(islice(open_synthetic(13, rank, 2), 4)) for rank in range(2)]
    ids = [i for step in range(4) for part in parts for i in part[step].ids.tolist()]
    assert sorted(ids[:52]) == sorted(ids[52:]) == list(range(52))
    whole = list(islice(open_synthetic(26), 4))
    assert [i for batch in whole for i in batch.ids.tolist()] == ids
    assert torch.equal(whole[0].images[:13], parts[0][0].images)
    for batch in whole:
        assert batch.labels.tolist() == [i // 4 for i in batch.ids.tolist()]
        assert batch.images.shape == (26, 3, 17, 17)
        assert batch.images.dtype == torch.uint8


def test_classes_are_separable_by_their_means() -> None:
    samples = SyntheticSamples(50, 8, 0.5, 16, 1, seed=1)
    images, labels, bad = samples.read(np.arange(400))
    assert not bad
    pixels = images.reshape(400, -1).astype(np.float64) - 127.5
    means = pixels.reshape(50, 8, -1)[:, :4].mean(1)
    nearest = ((pixels[:, None] - means) ** 2).sum(2).argmin(1)
    assert (nearest == labels).mean() == 1
    assert len(np.unique(images.reshape(400, -1), axis=0)) == 400


def test_pattern_and_noise_have_the_deviations_asked_for() -> None:
    for noise in (0.0, 0.5, 2.0):
        images, _, _ = SyntheticSamples(200, 2, noise, 16, 1, seed=1).read(np.arange(400))
        pairs = images.reshape(200, 2, -1).astype(np.float64) * (1 + noise) / 127.5 * 3**0.5
        pattern = pairs.mean(1).var() - ((pairs[:, 0] - pairs[:, 1]) / 2).var()
        assert pattern**0.5 == pytest.approx(1, rel=0.05)
        assert (pairs[:, 0] - pairs[:, 1]).std() / 2**0.5 == pytest.approx(noise, rel=0.05, abs=0.001)
        assert images.min() < 8
        assert images.max() > 247


def test_seeds_augmentation_and_size() -> None:
    first = next(iter(open_synthetic(13)))
    assert not torch.equal(first.images, next(iter(open_synthetic(13, seed=4))).images)
    changed = next(iter(open_synthetic(13, augment=Augment(shift=0.3))))
    assert torch.equal(first.ids, changed.ids)
    assert not torch.equal(first.images, changed.images)
    with pytest.raises(DataError, match=r"the synthetic data set has 52 samples, fewer than .* 56"):
        open_synthetic(14, 0, 2, accumulation_steps=2)


def test_populated_classes_are_spread_over_all() -> None:
    samples = SyntheticSamples(1000, 4, 0.5, 8, 1, seed=1, num_populated=7)
    images, labels, _ = samples.read(np.arange(28))
    assert samples.num_samples == 28
    assert labels[::4].tolist() == [0, 142, 285, 428, 571, 714, 857]
    assert np.array_equal(np.bincount(labels, minlength=1000), samples.class_counts())
    everyone, _, _ = SyntheticSamples(1000, 4, 0.5, 8, 1, seed=1).read(np.arange(4 * 142, 4 * 142 + 4))
    # The pattern is that of the class, whoever else has samples; the noise is that of the sample's number.
    centre, other = images[4:8].astype(float).mean(axis=0), everyone.astype(float).mean(axis=0)
    assert np.corrcoef(centre.ravel(), other.ravel())[0, 1] > 0.9
    reader = open_synthetic(2, num_classes=1000, num_populated=7)
    assert int(reader.class_counts.sum()) == reader.num_samples == 28
