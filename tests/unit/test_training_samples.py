"""What a report looks at is what training saw: the reader's samples, labels and classes, by the reader's ids."""

from __future__ import annotations

import json
import os
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megaclass.config import Config, validate
from megaclass.data.batch import Batch
from megaclass.data.manifest import load_manifest
from megaclass.data.open import open_reader
from megaclass.data.order import first_classes
from megaclass.data.training_samples import TrainingSamples
from megaclass.data.transforms import normalise
from megaclass.errors import ConfigError, DataError
from tests.support.tiny_dataset import write_tiny_dataset

NUM_CLASSES, PER_CLASS, SEED = 13, 7, 5
OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_classes": 5},
    {"label_noise": 0.4},
    {"num_classes": 6, "label_noise": 0.4},
    {"reader": "stream"},
    {"reader": "synthetic"},
    {"reader": "synthetic", "label_noise": 0.4},
]


def configured(folder: Path, **options: Any) -> Config:
    dataset = {"path": str(folder), "image_size": 9, "channels": 1, **options}
    if options.get("reader") == "synthetic":
        dataset["path"] = None
        dataset["synthetic"] = {"num_classes": NUM_CLASSES, "samples_per_class": PER_CLASS}
    return validate({"dataset": dataset, "train": {"steps": 3, "seed": SEED}})


def one_epoch(config: Config) -> Batch:
    """Every sample of the training reader once, in one batch."""
    samples = TrainingSamples(config)
    reader = open_reader(
        config.dataset,
        batch_size=samples.num_samples,
        accumulation_steps=1,
        rank=0,
        world_size=1,
        seed=config.train.seed,
    )
    (batch,) = islice(reader, 1)
    assert reader.num_classes == samples.num_classes
    reader.close()
    return batch


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_images_and_labels_are_those_that_the_reader_gives(tmp_path: Path, options: dict[str, Any]) -> None:
    config = configured(write_tiny_dataset(tmp_path, NUM_CLASSES, PER_CLASS, 9, 3), **options)
    batch, samples = one_epoch(config), TrainingSamples(config)
    assert sorted(batch.ids.tolist()) == list(range(samples.num_samples))
    images, labels, bad = samples.read(batch.ids.numpy())
    samples.close()
    assert not bad
    assert labels.tolist() == batch.labels.tolist()
    assert torch.equal(normalise(torch.from_numpy(images).permute(0, 3, 1, 2)), batch.to(torch.device("cpu")).images)


def test_wrong_labels_are_seen_as_training_saw_them(tmp_path: Path) -> None:
    folder = write_tiny_dataset(tmp_path, NUM_CLASSES, PER_CLASS, 9, 3)
    true, given = (
        TrainingSamples(configured(folder, label_noise=share)).read(np.arange(NUM_CLASSES * PER_CLASS))[1]
        for share in (0.0, 0.4)
    )
    # 91 samples at 0.4: 36 +- 4.7.
    assert 18 <= (true != given).sum() <= 55


@pytest.mark.parametrize("num_classes", [None, 5])
def test_a_sample_is_found_in_its_shard_by_its_key(tmp_path: Path, num_classes: int | None) -> None:
    folder = write_tiny_dataset(tmp_path, NUM_CLASSES, PER_CLASS, 9, 3)
    samples = TrainingSamples(configured(folder, num_classes=num_classes, label_noise=0.4))
    true_labels = TrainingSamples(configured(folder, num_classes=num_classes)).read(np.arange(samples.num_samples))[1]
    found = [samples.locate(number) for number in range(samples.num_samples)]
    samples.close()
    assert [place["sample"] for place in found] == list(range(samples.num_samples))
    stored = np.arange(NUM_CLASSES) if num_classes is None else first_classes(NUM_CLASSES, num_classes)
    # The key says which class a sample was made for, under the label the data set gives it.
    assert [int(place["key"].split("-")[0]) for place in found] == stored[true_labels].tolist()
    assert len({place["key"] for place in found}) == samples.num_samples
    for place in found:
        assert f"{place['key']}.png".encode() in (folder / place["shard"]).read_bytes()


@pytest.mark.parametrize("num_classes", [None, 5])
def test_classes_have_the_names_of_the_data_set(tmp_path: Path, num_classes: int | None) -> None:
    samples = TrainingSamples(
        configured(write_tiny_dataset(tmp_path, NUM_CLASSES, PER_CLASS, 9), num_classes=num_classes)
    )
    stored = range(NUM_CLASSES) if num_classes is None else first_classes(NUM_CLASSES, num_classes).tolist()
    assert [samples.class_name(label) for label in range(samples.num_classes)] == [f"class-{label}" for label in stored]


def test_computed_samples_have_numbers_and_no_place(tmp_path: Path) -> None:
    samples = TrainingSamples(configured(tmp_path, reader="synthetic"))
    assert (samples.num_classes, samples.num_samples) == (NUM_CLASSES, NUM_CLASSES * PER_CLASS)
    assert samples.what == "the synthetic data set"
    assert samples.class_name(11) == "11"
    assert samples.locate(17) == {"sample": 17, "key": None, "shard": None}
    samples.close()


def test_closing_closes_the_shards_under_wrong_labels_too(tmp_path: Path) -> None:
    folder = write_tiny_dataset(tmp_path, NUM_CLASSES, PER_CLASS, 9, 3)
    for options in ({}, {"label_noise": 0.4}):
        samples = TrainingSamples(configured(folder, **options))
        before = len(os.listdir("/proc/self/fd"))
        samples.read(np.arange(samples.num_samples))
        assert len(os.listdir("/proc/self/fd")) == before + 3
        samples.close()
        assert len(os.listdir("/proc/self/fd")) == before


def test_a_data_set_that_cannot_be_used_is_said_so(tmp_path: Path) -> None:
    folder = write_tiny_dataset(tmp_path, NUM_CLASSES, PER_CLASS, 9)
    with pytest.raises(ConfigError, match=r"dataset\.num_classes is 14 but split 'train' of .* has 13 classes"):
        TrainingSamples(configured(folder, num_classes=14))
    samples = TrainingSamples(configured(folder))
    shard = folder / load_manifest(folder).splits["train"].shards[0].file
    shard.unlink()
    with pytest.raises(DataError, match=r"train-000000\.tar.*No such file.*\(unreadable\)"):
        samples.locate(0)
    with pytest.raises(DataError, match=r"train-000000\.tar cannot be read: No such file"):
        TrainingSamples(configured(folder))
    (folder / "train.classes.json").write_text(json.dumps({"names": [str(number) for number in range(12)]}))
    shard.write_bytes(bytes(load_manifest(folder).splits["train"].shards[0].num_bytes))
    with pytest.raises(DataError, match="has 12 names for 13 classes"):
        TrainingSamples(configured(folder))


def test_skipping_is_that_of_the_run(tmp_path: Path) -> None:
    folder = write_tiny_dataset(tmp_path, NUM_CLASSES, PER_CLASS, 9)
    assert not TrainingSamples(configured(folder)).is_skipping
    assert TrainingSamples(configured(folder, on_bad_sample="skip")).is_skipping


def test_a_class_alone_cannot_be_mislabelled(tmp_path: Path) -> None:
    folder = write_tiny_dataset(tmp_path, NUM_CLASSES, PER_CLASS, 9)
    config = configured(folder, num_classes=1, label_noise=0.25)
    with pytest.raises(ConfigError, match=r"dataset\.label_noise is 0\.25 but there is no other class to name; give 0"):
        TrainingSamples(config)
