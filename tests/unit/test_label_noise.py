"""Wrong labels on purpose: how many, which, the same wherever they are read, and never in an evaluation."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megaclass.config import Dataset, validate
from megaclass.data.bad_samples import BadSample
from megaclass.data.batch import Reader
from megaclass.data.label_noise import NoisyLabels, with_label_noise
from megaclass.data.open import open_reader
from megaclass.data.samples import StoredSamples, iterate_split
from megaclass.data.synthetic import SyntheticSamples
from megaclass.errors import ConfigError
from tests.support.tiny_dataset import write_tiny_dataset

NUM_CLASSES, PER_CLASS = 13, 7
NUM_SAMPLES = NUM_CLASSES * PER_CLASS


def noisy(labels: np.ndarray, num_classes: int, share: float, seed: int = 3) -> np.ndarray:
    """The labels that samples 0, 1, 2, ... with these true ones are given."""
    samples = SyntheticSamples(num_classes, 1, 0.5, 8, 1, seed)
    return NoisyLabels(samples, num_classes, share, seed).noisy(np.arange(len(labels)), labels)


@pytest.mark.parametrize("share", [0.01, 0.2, 0.4, 0.97])
def test_the_share_is_the_one_asked_for(share: float) -> None:
    true = np.arange(50_000) % 1003
    count = int((noisy(true, 1003, share) != true).sum())
    assert abs(count - 50_000 * share) < 4.5 * (50_000 * share * (1 - share)) ** 0.5


def test_every_wrong_class_is_equally_likely_and_the_true_one_never_comes() -> None:
    num_samples, share = 130_000, 0.4
    true = np.arange(num_samples) % NUM_CLASSES
    given_labels = noisy(true, NUM_CLASSES, share)
    table = np.zeros((NUM_CLASSES, NUM_CLASSES))
    np.add.at(table, (true, given_labels), 1)
    off_diagonal = table[~np.eye(NUM_CLASSES, dtype=bool)]
    assert abs(np.diag(table) - 10_000 * 0.6).max() < 4.5 * (10_000 * 0.24) ** 0.5
    expected = num_samples * share / (NUM_CLASSES * (NUM_CLASSES - 1))
    # 156 cells, about normal: the sum of squares is 156 +- 18.
    assert 156 - 5 * 18 < ((off_diagonal - expected) ** 2 / expected).sum() < 156 + 5 * 18


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 5000), st.floats(0, 1, exclude_max=True), st.integers(0, 2**63 - 1))
def test_a_wrong_label_is_another_class_of_the_data_set(num_classes: int, share: float, seed: int) -> None:
    true = np.arange(200) * 7 % num_classes
    before = true.copy()
    labels = noisy(true, num_classes, share, seed)
    assert np.array_equal(true, before)
    assert labels.dtype == np.int64
    assert ((labels >= 0) & (labels < num_classes)).all()
    if share < 1e-12:
        assert np.array_equal(labels, true)
    if share > 0.999:
        assert (labels != true).sum() > 190


def test_with_two_classes_wrong_means_the_other_one() -> None:
    labels = noisy(np.arange(1000) % 2, 2, 0.3)
    # 300 +- 14.
    assert 230 < (labels != np.arange(1000) % 2).sum() < 370
    assert set(labels.tolist()) == {0, 1}


def test_seeds_choose_different_samples_and_a_larger_share_keeps_those_of_a_smaller() -> None:
    true = np.arange(5000) % NUM_CLASSES
    first, second, more = noisy(true, 13, 0.2, 1), noisy(true, 13, 0.2, 2), noisy(true, 13, 0.4, 1)
    # Of 1,000 each, 200 +- 14 are wrong in both by chance.
    assert ((first != true) & (second != true)).sum() < 300
    assert np.array_equal(more[first != true], first[first != true])


def test_a_sample_has_the_same_label_whatever_it_is_read_with() -> None:
    samples = NoisyLabels(SyntheticSamples(NUM_CLASSES, PER_CLASS, 0.5, 8, 1, 3), NUM_CLASSES, 0.5, 3)
    assert samples.num_samples == NUM_SAMPLES
    every = samples.read(np.arange(NUM_SAMPLES))[1]
    some = np.array([90, 3, 3, 17, 0])
    assert samples.read(some)[1].tolist() == every[some].tolist()
    assert samples.read(some[:0])[1].tolist() == []


def open_noisy(folder: Path, share: float, rank: int = 0, world_size: int = 1, **options: Any) -> Reader:
    dataset = Dataset.model_validate(
        {"path": folder, "image_size": 9, "channels": 1, "label_noise": share, **options}
        | ({"synthetic": {"num_classes": NUM_CLASSES, "samples_per_class": PER_CLASS}})
    )
    return open_reader(
        dataset, batch_size=84 // world_size, accumulation_steps=1, rank=rank, world_size=world_size, seed=3
    )


def labels_by_id(readers: list[Reader], num_steps: int) -> list[dict[int, int]]:
    """What each epoch's samples were labelled, over all ranks; steps of 84 of 91 samples, so batches span epochs."""
    epochs: list[dict[int, int]] = [{} for _ in range(num_steps * 84 // NUM_SAMPLES + 1)]
    parts = [list(islice(reader, num_steps)) for reader in readers]
    for step in range(num_steps):
        place = step * 84
        for part in parts:
            for sample, label in zip(part[step].ids.tolist(), part[step].labels.tolist(), strict=True):
                epochs[place // NUM_SAMPLES][sample] = label
                place += 1
    for reader in readers:
        reader.close()
    return epochs


@pytest.mark.parametrize("kind", ["indexed", "synthetic"])
def test_labels_are_the_same_in_every_epoch_rank_worker_and_world_size(tmp_path: Path, kind: str) -> None:
    folder = write_tiny_dataset(tmp_path, NUM_CLASSES, PER_CLASS, 9, 3)
    first, second, *_ = labels_by_id([open_noisy(folder, 0.4, reader=kind)], 3)
    assert len(first) == len(second) == NUM_SAMPLES
    assert first == second
    true = labels_by_id([open_noisy(folder, 0.0, reader=kind)], 2)[0]
    # 36 +- 4.7.
    assert 18 <= sum(first[sample] != true[sample] for sample in true) <= 55
    for world_size in (2, 3, 4):
        ranks = [open_noisy(folder, 0.4, rank, world_size, reader=kind) for rank in range(world_size)]
        assert labels_by_id(ranks, 2)[0] == first
    assert labels_by_id([open_noisy(folder, 0.4, reader=kind, workers=2)], 2)[0] == first


@pytest.mark.parametrize("kind", ["indexed", "synthetic"])
def test_images_order_and_class_counts_are_those_without_noise(tmp_path: Path, kind: str) -> None:
    folder = write_tiny_dataset(tmp_path, NUM_CLASSES, PER_CLASS, 9, 3)
    clean, noised = (open_noisy(folder, share, reader=kind, augment={"shift": 0.2}) for share in (0.0, 0.4))
    for before, after in zip(islice(clean, 2), islice(noised, 2), strict=False):
        assert torch.equal(before.images, after.images)
        assert torch.equal(before.ids, after.ids)
        assert not torch.equal(before.labels, after.labels)
    assert noised.class_counts.tolist() == [PER_CLASS] * NUM_CLASSES


def test_an_evaluation_sees_the_true_labels(tmp_path: Path) -> None:
    folder = write_tiny_dataset(tmp_path, NUM_CLASSES, PER_CLASS, 9, 3)
    true = StoredSamples(folder, "train", image_size=9, channels=1).read(np.arange(NUM_SAMPLES))[1]
    batches = iterate_split(folder, "train", rank=0, world_size=1, batch_size=50, image_size=9, channels=1)
    assert [label for batch in batches for label in batch.labels.tolist()] == true.tolist()
    given_labels = labels_by_id([open_noisy(folder, 0.4)], 2)[0]
    assert [given_labels[number] for number in range(NUM_SAMPLES)] != true.tolist()


class OneBad:
    """Two samples of which the second cannot be used."""

    num_samples = 2

    def read(self, sample_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, dict[int, BadSample]]:
        return np.zeros((2, 8, 8, 1), np.uint8), np.zeros(2, np.int64), {1: BadSample("bad-image", "no picture")}


def test_bad_samples_stay_bad_and_without_noise_nothing_is_wrapped() -> None:
    images, _, bad = NoisyLabels(OneBad(), 5, 0.9, 0).read(np.arange(2))
    assert images.shape == (2, 8, 8, 1)
    assert bad[1].detail == "no picture"
    samples = OneBad()
    assert with_label_noise(samples, 5, 0.0, 0) is samples


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"dataset\.label_noise is 0\.2 but there is no other class to name; give 0"):
        NoisyLabels(OneBad(), 1, 0.2, 0)
    content: dict[str, Any] = {"dataset": {"path": str(tmp_path), "label_noise": 0.2}, "train": {"steps": 3}}
    assert validate(content).dataset.label_noise == 0.2
    content["dataset"]["reader"] = "stream"
    text = r"dataset\.label_noise: 0\.2 is not allowed: dataset\.reader stream knows the true labels only; use indexed"
    with pytest.raises(ConfigError, match=text):
        validate(content)
    for value in (1.0, -0.1):
        content["dataset"] = {"path": str(tmp_path), "label_noise": value}
        with pytest.raises(ConfigError, match=rf"dataset\.label_noise: {value} is not allowed: Input should be"):
            validate(content)
