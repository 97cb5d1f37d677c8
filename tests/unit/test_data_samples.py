from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from megaclass.data import samples as samples_module
from megaclass.data.manifest import load_index, load_manifest, load_split
from megaclass.data.samples import StoredSamples, iterate_split
from megaclass.errors import DataError
from tests.support.tiny_dataset import tiny_image, write_tiny_dataset


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("batch_size", [5, 8, 100])
def test_a_pass_visits_every_sample_once_in_order(tmp_path: Path, world_size: int, batch_size: int) -> None:
    folder = write_tiny_dataset(tmp_path, 13, 4, 9, 3, unseen_classes=7)
    labels = load_index(folder, "unseen", load_split(folder, load_manifest(folder), "unseen"))[0]["label"]
    ids: list[int] = []
    for rank in range(world_size):
        batches = list(
            iterate_split(
                folder, "unseen", rank=rank, world_size=world_size, batch_size=batch_size, image_size=9, channels=1
            )
        )
        assert all(len(batch.ids) == batch_size for batch in batches[:-1])
        for batch in batches:
            assert batch.labels.tolist() == labels[batch.ids.numpy()].tolist()
            assert batch.position == batch.ids[-1] + 1
            ids += batch.ids.tolist()
    assert ids == list(range(28))


def test_images_are_those_written(tmp_path: Path) -> None:
    folder = write_tiny_dataset(tmp_path, 5, 3, 9, 2)
    (batch,) = iterate_split(folder, "train", rank=0, world_size=1, batch_size=15, image_size=9, channels=1)
    written = {(label, k): tiny_image(label, k, 9, 1)[:, :, 0] for label in range(5) for k in range(3)}
    seen = set()
    for image, label in zip(batch.images, batch.labels.tolist(), strict=True):
        pixels = ((image[0] + 1) * 127.5).round().to(torch.uint8).numpy()
        seen |= {key for key, value in written.items() if key[0] == label and np.array_equal(value, pixels)}
    assert seen == set(written)


def test_more_ranks_than_samples_and_empty_splits(tmp_path: Path) -> None:
    folder = write_tiny_dataset(tmp_path, 3, 1, 9, 1)
    counts = [
        sum(
            len(batch.ids)
            for batch in iterate_split(folder, "train", rank=rank, world_size=5, batch_size=2, image_size=9, channels=1)
        )
        for rank in range(5)
    ]
    assert sum(counts) == 3
    content = json.loads((folder / "dataset.json").read_text())
    content["splits"]["train"].update(num_samples=0, shards=[])
    (folder / "dataset.json").write_text(json.dumps(content))
    assert list(iterate_split(folder, "train", rank=0, world_size=1, batch_size=2, image_size=9, channels=1)) == []


def test_a_bad_sample_ends_a_pass(tmp_path: Path) -> None:
    folder = write_tiny_dataset(tmp_path, 5, 3, 9, 1)
    path = folder / "train-000000.tar"
    content = bytearray(path.read_bytes())
    content[512 + 60] ^= 255
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"train-000000\.tar, byte 0, key '\d+-\d+': PNG does not decode.*bad-image"):
        list(iterate_split(folder, "train", rank=0, world_size=1, batch_size=4, image_size=9, channels=1))


def test_few_files_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_tiny_dataset(tmp_path, 10, 2, 9, 20)
    monkeypatch.setattr(samples_module, "_MAX_OPEN_SHARDS", 3)
    before = len(os.listdir("/proc/self/fd"))
    samples = StoredSamples(folder, "train", image_size=9, channels=1)
    for _ in range(2):
        _, labels, bad = samples.read(np.arange(20))
        assert not bad
        assert len(os.listdir("/proc/self/fd")) == before + 3
    samples.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert np.array_equal(samples.read(np.arange(20))[1], labels)
    samples.close()


def test_missing_and_changed_shards_are_found_at_once(tmp_path: Path) -> None:
    folder = write_tiny_dataset(tmp_path, 5, 3, 9, 2)
    path = folder / "train-000001.tar"
    whole = path.read_bytes()
    for content, text in (
        (whole[: len(whole) // 2], rf"has {len(whole) // 2} bytes but dataset.json says {len(whole)}: cut off"),
        (whole + b"x", "changed; copy it again, then run `megaclass data verify"),
        (b"", "has 0 bytes"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=text):
            StoredSamples(folder, "train", image_size=9, channels=1)
    path.unlink()
    with pytest.raises(DataError, match=r"train-000001\.tar cannot be read: No such file"):
        StoredSamples(folder, "train", image_size=9, channels=1)
    with pytest.raises(DataError, match="has no split 'unseen'; it has train"):
        StoredSamples(folder, "unseen", image_size=9, channels=1)


def test_a_shard_that_shrinks_or_goes_while_it_is_read(tmp_path: Path) -> None:
    folder = write_tiny_dataset(tmp_path, 5, 3, 9, 2)
    samples = StoredSamples(folder, "train", image_size=9, channels=1)
    path = folder / "train-000001.tar"
    path.write_bytes(path.read_bytes()[:3000])
    _, _, bad = samples.read(np.array([14]))
    assert bad[0].reason == "unreadable"
    assert "only 0 of" in bad[0].detail
    samples.close()
    path.unlink()
    _, _, bad = samples.read(np.array([14, 0]))
    assert list(bad) == [0]
    assert "No such file" in bad[0].detail
    samples.close()


def test_twins_share_the_index_and_part_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples_module, "_MAX_OPEN_SHARDS", 6)
    folder = write_tiny_dataset(tmp_path, 5, 4, 9, 10)
    samples = StoredSamples(folder, "train", image_size=9, channels=1, num_classes=4)
    before = len(os.listdir("/proc/self/fd"))
    twins = [samples.twin(3) for _ in range(3)]
    ids = np.arange(samples.num_samples)
    expected = samples.read(ids)
    samples.close()
    for twin in twins:
        images, labels, bad = twin.read(ids)
        assert np.array_equal(images, expected[0])
        assert np.array_equal(labels, expected[1])
        assert not bad
        for sample_id in ids.tolist():
            members, label, where = twin.encoded(sample_id)
            assert (members.extension, label) == ("png", expected[1][sample_id])
            assert f"key {members.key!r}" in where
    assert len(os.listdir("/proc/self/fd")) == before + 6
    for twin in twins:
        twin.close()
    assert len(os.listdir("/proc/self/fd")) == before
