"""The orders as the readers give them: at every world size, over labels as training sees them, each visit its own."""

from __future__ import annotations

import hashlib
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megaclass import config
from megaclass.config import Augment, Dataset, Synthetic
from megaclass.data.batch import Batch
from megaclass.data.open import open_reader
from megaclass.errors import ConfigError, DataError
from tests.support.tiny_dataset import write_tiny_dataset

GLOBAL_BATCH = 24
OPTIONS: list[dict[str, Any]] = [
    {"class_balance": 0.5},
    {"class_balance": 1.0, "repeats": 2},
    {"samples_per_class": 4},
    {"samples_per_class": 6},  # more than a class has
    {"samples_per_class": 4, "num_classes": 7},
    {"samples_per_class": 3, "label_noise": 0.4},
    {"class_balance": 1.0, "label_noise": 0.4, "num_classes": 9},
    {"repeats": 3},
    {"repeats": 2, "shuffle_window": 2},
]
SYNTHETIC = Synthetic(num_classes=1000, samples_per_class=5, num_populated=13)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_dataset(tmp_path_factory.mktemp("orders"), 13, 5, 8, num_shards=7)


def read(
    dataset: Dataset, num_batches: int, world_size: int = 1, position: int = 0, accumulation_steps: int = 1
) -> list[list[Batch]]:
    """Micro-batches from a position on, [batch][rank]."""
    ranks = []
    for rank in range(world_size):
        size = GLOBAL_BATCH // world_size // accumulation_steps
        reader = open_reader(
            dataset, batch_size=size, accumulation_steps=accumulation_steps, rank=rank, world_size=world_size, seed=3
        )
        reader.seek(position)
        ranks.append(list(islice(reader, num_batches)))
        reader.close()
    return [list(batch) for batch in zip(*ranks, strict=True)]


def joined(batches: list[list[Batch]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, labels and images over all batches and ranks."""
    parts = [part for batch in batches for part in batch]
    return (
        torch.cat([part.ids for part in parts]),
        torch.cat([part.labels for part in parts]),
        torch.cat([part.images for part in parts]),
    )


def stored(folder: Path, **options: Any) -> Dataset:
    return Dataset(path=folder, image_size=8, channels=1, **options)


@pytest.mark.parametrize(
    ("options", "digest"),
    [
        ({}, "a51d3a7b42d3e55d"),
        ({"shuffle_window": 2}, "44199a31610ead33"),
        ({"label_noise": 0.3}, "c93012becd37f9fa"),
        ({"reader": "synthetic", "synthetic": Synthetic(num_classes=13, samples_per_class=5)}, "7ffe183e9fa672cf"),
    ],
    ids=str,
)
def test_without_the_options_ids_labels_and_images_are_those_of_before(
    folder: Path, options: dict[str, Any], digest: str
) -> None:
    """Written down before there were any."""
    dataset = stored(folder, augment=Augment(flip=0.5), **options)
    reader = open_reader(dataset, batch_size=6, accumulation_steps=1, rank=1, world_size=2, seed=3)
    seen = hashlib.sha256()
    for batch in islice(reader, 15):
        for tensor in (batch.ids, batch.labels, batch.images.contiguous()):
            seen.update(tensor.numpy().tobytes())
    reader.close()
    assert seen.hexdigest()[:16] == digest


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_same_at_every_world_size_from_everywhere_and_with_workers(folder: Path, options: dict[str, Any]) -> None:
    dataset = stored(folder, augment=Augment(flip=0.5, shift=0.2), **options)
    whole = joined(read(dataset, 12))
    for world_size in (2, 3, 4):
        for one, other in zip(whole, joined(read(dataset, 12, world_size)), strict=True):
            assert torch.equal(one, other)
    for one, other in zip(whole, joined(read(dataset, 5, 2, 7 * GLOBAL_BATCH)), strict=True):
        assert torch.equal(one[7 * GLOBAL_BATCH :], other)
    in_workers = stored(folder, augment=Augment(flip=0.5, shift=0.2), workers=2, **options)
    for one, other in zip(whole, joined(read(in_workers, 12)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("accumulation_steps", [1, 2])
@pytest.mark.parametrize(
    "options",
    [{"samples_per_class": 4}, {"samples_per_class": 3, "label_noise": 0.4}, {"samples_per_class": 6, "num_classes": 7},
     {"samples_per_class": 2, "reader": "synthetic", "synthetic": SYNTHETIC, "label_noise": 0.1}],
    ids=str,
)  # fmt: skip
def test_every_micro_batch_has_so_many_samples_of_each_of_its_classes(
    folder: Path, world_size: int, accumulation_steps: int, options: dict[str, Any]
) -> None:
    per_class = options["samples_per_class"]
    batches = read(stored(folder, **options), 9, world_size, accumulation_steps=accumulation_steps)
    for batch in batches:
        _, labels, _ = joined([batch])
        assert len(labels) == GLOBAL_BATCH // accumulation_steps // world_size * world_size
        _, counts = labels.unique(return_counts=True)
        assert set(counts.tolist()) == {per_class}


def test_balance_is_of_the_labels_that_training_sees(folder: Path) -> None:
    _, labels, _ = joined(read(stored(folder, class_balance=1.0, label_noise=0.3), 65))
    # 24 epochs of 65, in which each of 13 classes has five, whatever the noise made of their sizes.
    assert (np.abs(np.bincount(labels.numpy()) - 120) <= 1).all()


@pytest.mark.parametrize(
    "options", [{"samples_per_class": 12}, {"repeats": 6}, {"repeats": 4, "class_balance": 1.0}], ids=str
)
def test_copies_in_a_micro_batch_are_changed_differently(folder: Path, options: dict[str, Any]) -> None:
    """Every id that stands more than once has as many pictures as copies."""
    dataset = stored(folder, augment=Augment(rotation=180, shift=0.3), **options)
    for batch in read(dataset, 10, 2):
        ids, _, images = joined([batch])
        assert len(ids.unique()) < len(ids)
        assert len({(int(i), image.numpy().tobytes()) for i, image in zip(ids, images, strict=True)}) == len(ids)


def test_repeats_stand_so_often_in_every_micro_batch(folder: Path) -> None:
    batches = read(stored(folder, repeats=3), 65, 2)
    for batch in batches:
        ids, _, _ = joined([batch])
        # A sample may end one epoch of the order beneath and begin the next.
        assert set((ids.unique(return_counts=True)[1] % 3).tolist()) == {0}
    assert (np.bincount(joined(batches)[0].numpy()) == 24).all()


def test_too_few_classes_are_refused(folder: Path) -> None:
    with pytest.raises(
        DataError,
        match=r"split 'train' of .* has 13 classes with samples, fewer than the 24 of a micro-batch of 24 with "
        r"dataset\.samples_per_class 1; raise that, or lower train\.global_batch_size",
    ):
        read(stored(folder, samples_per_class=1), 1)
    # Accumulated, a micro-batch has half as many.
    assert read(stored(folder, samples_per_class=1), 1, accumulation_steps=2)
    synthetic = stored(folder, samples_per_class=1, reader="synthetic", synthetic=SYNTHETIC)
    with pytest.raises(DataError, match=r"the synthetic data set has 13 classes with samples, fewer than the 24 of"):
        read(synthetic, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_balance": 1.5}, r"dataset\.class_balance: 1\.5 is not allowed: Input should be less than or equal"),
        ({"class_balance": -0.1}, r"dataset\.class_balance: -0\.1 is not allowed"),
        ({"samples_per_class": 0}, r"dataset\.samples_per_class: 0 is not allowed"),
        ({"repeats": 0}, r"dataset\.repeats: 0 is not allowed"),
        (
            {"samples_per_class": 5},
            r"dataset\.samples_per_class 5 does not divide the 12 samples of a micro-batch .*; choose a divisor",
        ),
        ({"repeats": 8}, r"dataset\.repeats 8 does not divide the 12 samples of a micro-batch"),
        (
            {"samples_per_class": 4, "class_balance": 0.5},
            r"dataset\.samples_per_class 4 visits every class equally often, and dataset\.class_balance 0\.5 asks for",
        ),
        (
            {"samples_per_class": 4, "repeats": 3},
            r"dataset\.samples_per_class 4 and dataset\.repeats 3 both say what a micro-batch is made of",
        ),
        (
            {"samples_per_class": 4, "shuffle_window": 2},
            r"dataset\.samples_per_class 4 takes the samples of a class from all shards, and dataset\.shuffle_window 2 "
            r"keeps to few of them; leave one of the two out",
        ),
        ({"class_balance": 1.0, "shuffle_window": 2}, r"dataset\.class_balance 1 takes the samples of a class from"),
        ({"class_balance": 1.0, "reader": "stream"}, r"dataset\.class_balance 1: dataset\.reader stream reads whole"),
        ({"samples_per_class": 4, "reader": "stream"}, r"dataset\.samples_per_class 4: dataset\.reader stream reads"),
        ({"repeats": 2, "reader": "stream"}, r"dataset\.repeats 2: dataset\.reader stream reads .* or use indexed"),
    ],
    ids=str,
)
def test_what_cannot_be_had_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    content = {"dataset": {"path": str(tmp_path), **options}, "run": {"dir": str(tmp_path / "run")}}
    content["train"] = {"steps": 5, "global_batch_size": 24, "accumulation_steps": 2}
    with pytest.raises(ConfigError, match=message):
        config.validate(content)
