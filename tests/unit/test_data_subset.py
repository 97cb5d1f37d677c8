"""`dataset.num_classes`: nested subsets of the classes, labelled anew; and how many samples readers say a class has."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaclass.config import Dataset, validate
from megaclass.data.batch import Reader
from megaclass.data.manifest import load_index, load_manifest
from megaclass.data.open import open_reader
from megaclass.data.order import SampleOrder, first_classes
from megaclass.data.samples import StoredSamples
from megaclass.errors import ConfigError, DataError
from tests.support.tiny_dataset import encode, shard_entry, tar_member, tiny_image, write_manifest, write_shard
from tests.support.tiny_dataset import write_tiny_dataset as write_even_dataset

# Samples of each class; class 4 has none, and the shards are of unequal length.
COUNTS = [3, 1, 5, 2, 0, 4, 6]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data set of 21 samples in two shards whose classes are not alike."""
    write_even_dataset(tmp_path, len(COUNTS), 1, 9, 2)
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(len(COUNTS)), COUNTS)).tolist()
    samples = [
        (
            tar_member(f"{place:03d}.png", encode(tiny_image(label, place, 9, 1)))
            + tar_member(f"{place:03d}.label", np.array(label, "<i8").tobytes()),
            label,
            0,
        )
        for place, label in enumerate(labels)
    ]
    for stem, part in (("train-000000", samples[:8]), ("train-000001", samples[8:])):
        write_shard(tmp_path, stem, part)
    content = load_manifest(tmp_path).model_dump()
    content["splits"]["train"]["num_samples"] = 21
    content["splits"]["train"]["shards"] = [shard_entry(tmp_path, f"train-{number:06d}") for number in range(2)]
    write_manifest(tmp_path, content)
    return tmp_path


def stored(folder: Path, num_classes: int | None = None) -> StoredSamples:
    return StoredSamples(folder, "train", image_size=9, channels=1, num_classes=num_classes)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 2000), st.data())
def test_a_subset_is_the_beginning_of_every_larger_one(num_classes: int, data: st.DataObject) -> None:
    few = data.draw(st.integers(1, num_classes))
    many = data.draw(st.integers(few, num_classes))
    larger = first_classes(num_classes, many)
    assert first_classes(num_classes, few).tolist() == larger[:few].tolist()
    assert len(set(larger.tolist())) == many
    assert ((larger >= 0) & (larger < num_classes)).all()
    assert np.array_equal(np.sort(first_classes(num_classes, num_classes)), np.arange(num_classes))


def test_a_subset_is_drawn_from_all_over_the_split() -> None:
    """Neighbouring classes are often alike (letters of one alphabet): the first n would be no sample of the split."""
    chosen = first_classes(6000, 600)
    # Tenths of the split hold 60 +- 7 each.
    assert all(30 < count < 90 for count in np.histogram(chosen, 10, (0, 6000))[0].tolist())
    order = SampleOrder(6000, 0).sample_ids(np.arange(600))
    assert (chosen == order).sum() < 5


@pytest.mark.parametrize("num_classes", [1, 2, 5, 6, 7])
def test_a_subset_holds_the_samples_of_its_classes_under_new_labels(folder: Path, num_classes: int) -> None:
    subset, whole = stored(folder, num_classes), stored(folder)
    classes = first_classes(len(COUNTS), num_classes)
    records = load_index(folder, "train", load_manifest(folder).splits["train"])[0]
    ids = np.flatnonzero(np.isin(records["label"], classes))
    assert subset.num_classes == num_classes
    assert subset.num_samples == len(ids)
    assert subset.classes.tolist() == classes.tolist()
    assert subset.class_counts.tolist() == [COUNTS[label] for label in classes.tolist()]
    images, labels, bad = subset.read(np.arange(len(ids)))
    assert not bad
    assert classes[labels].tolist() == records["label"][ids].tolist()
    assert np.array_equal(images, whole.read(ids)[0])
    assert [subset.locate(place) for place in range(len(ids))] == [whole.locate(place) for place in ids.tolist()]
    for samples in (subset, whole):
        samples.close()


def test_without_a_number_all_classes_keep_their_labels(folder: Path) -> None:
    samples = stored(folder)
    assert samples.classes.tolist() == list(range(len(COUNTS)))
    assert samples.class_counts.tolist() == COUNTS
    assert samples.locate(8) == ("008", "train-000001.tar")
    samples.close()


def read(folder: Path, kind: str, batch_size: int, **options: Any) -> Reader:
    content = {"path": folder, "reader": kind, "image_size": 9, "channels": 1, **options}
    content["synthetic"] = {"num_classes": 5, "samples_per_class": 3}
    return open_reader(
        Dataset.model_validate(content), batch_size=batch_size, accumulation_steps=1, rank=0, world_size=1, seed=2
    )


@pytest.mark.parametrize(
    ("kind", "options", "counts"),
    [
        ("indexed", {}, COUNTS),
        ("indexed", {"num_classes": 4}, [COUNTS[label] for label in first_classes(7, 4).tolist()]),
        ("stream", {}, COUNTS),
        ("synthetic", {}, [3] * 5),
    ],
)
def test_class_counts_are_the_samples_of_one_epoch(
    folder: Path, kind: str, options: dict[str, Any], counts: list[int]
) -> None:
    reader = read(folder, kind, sum(counts), **options)
    assert reader.class_counts.dtype == np.int64
    assert reader.class_counts.tolist() == counts
    assert (reader.num_classes, reader.num_samples) == (len(counts), sum(counts))
    batches = list(islice(reader, 2))
    reader.close()
    for batch in batches:
        assert np.bincount(batch.labels.numpy(), minlength=len(counts)).tolist() == counts


@pytest.mark.parametrize("kind", ["indexed", "stream"])
@pytest.mark.parametrize("rank", [0, 1])
def test_class_counts_are_those_of_all_ranks(folder: Path, kind: str, rank: int) -> None:
    dataset = Dataset.model_validate({"path": folder, "reader": kind, "image_size": 9, "channels": 1})
    reader = open_reader(dataset, batch_size=5, accumulation_steps=1, rank=rank, world_size=2, seed=2)
    assert reader.class_counts.tolist() == COUNTS


def test_empty_shards_count_nothing(tmp_path: Path) -> None:
    folder = write_even_dataset(tmp_path, 3, 1, 9, 5)
    for kind in ("indexed", "stream"):
        assert read(folder, kind, 3).class_counts.tolist() == [1, 1, 1]


def test_more_classes_than_there_are_are_refused_with_the_number_there_is(folder: Path) -> None:
    for number in (8, 2**40):
        text = rf"dataset\.num_classes is {number} but split 'train' of .* has 7 classes: give 1 to that, or none for"
        with pytest.raises(ConfigError, match=text):
            read(folder, "indexed", 2, num_classes=number)
    with pytest.raises(DataError, match=r"has \d+ samples, fewer than train\.global_batch_size 21"):
        read(folder, "indexed", 21, num_classes=6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reader": "stream"}, "4 is not allowed: dataset.reader stream reads whole shards; use indexed"),
        (
            {"reader": "synthetic"},
            "4 is not allowed: dataset.reader synthetic makes as many classes as dataset.synthetic.num_classes; give",
        ),
        ({"num_classes": 0}, "0 is not allowed: Input should be greater than or equal to 1"),
        ({"num_classes": 2.5}, "2.5 is not allowed: Input should be a valid integer"),
    ],
)
def test_a_number_of_classes_that_means_nothing_is_refused(options: dict[str, Any], message: str) -> None:
    content = {"dataset": {"path": "d", "num_classes": 4} | options, "train": {"steps": 3}}
    with pytest.raises(ConfigError) as caught:
        validate(content)
    assert f"dataset.num_classes: {message}" in str(caught.value)
