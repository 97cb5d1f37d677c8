"""DALI's own webdataset reader: every sample of the shards under its true id, in the order that docs/data.md states."""

from __future__ import annotations

import io
import json
import tempfile
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from megaclass.cli import main
from megaclass.config import Augment, Dataset
from megaclass.data.batch import Batch
from megaclass.data.dali_stream import DaliStreamReader
from megaclass.data.indexed import IndexedReader
from megaclass.data.open_order import OrderOptions
from megaclass.data.options import ReaderOptions
from megaclass.errors import DataError
from tests.support.readers import opened
from tests.support.tiny_dataset import tar_member, write_tiny_dataset
from tests.support.training import sample_ids, small_config
from tests.unit.test_data_decode import blank_png
from tests.unit.test_data_indexed import break_image, replace_sample, stored_label

SIZE = 16
NUM_SAMPLES = 60


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """15 classes of 4 colour samples; the last of seven shards is empty, the others are of unequal size."""
    return write_tiny_dataset(
        tmp_path / "tiny", num_classes=15, samples_per_class=4, image_size=SIZE, num_shards=7, channels=3
    )


def reader(folder: Path, **options: Any) -> DaliStreamReader:
    fixed = {"batch_size": 12, "rank": 0, "world_size": 1, "seed": 4, "image_size": SIZE, "channels": 3}
    return opened(DaliStreamReader, folder, "train", **{**fixed, **options})


def read(folder: Path, num_batches: int, position: int = 0, **options: Any) -> list[Batch]:
    one = reader(folder, **options)
    one.seek(position)
    try:
        return list(islice(one, num_batches))
    finally:
        one.close()


def ids(batches: list[Batch]) -> list[int]:
    return [int(sample) for batch in batches for sample in batch.ids]


@pytest.mark.parametrize("image_size", [SIZE, 11])
def test_ids_labels_and_pixels_belong_together(folder: Path, image_size: int) -> None:
    batches = read(folder, 7, image_size=image_size)
    options = ReaderOptions(batch_size=NUM_SAMPLES, rank=0, world_size=1, seed=0, image_size=image_size, channels=3)
    indexed = IndexedReader(folder, "train", options, order=OrderOptions(shuffle=False))
    every = next(iter(indexed)).to(torch.device("cpu"))
    indexed.close()
    assert every.ids.tolist() == list(range(NUM_SAMPLES))
    for number, batch in enumerate(batches):
        assert batch.position == 12 * (number + 1)
        assert batch.num_read == 12
        assert batch.labels.dtype == torch.int64
        assert torch.equal(batch.labels, every.labels[batch.ids])
        # A resized image keeps DALI's border pixels, repeated where Pillow leaves them out.
        inside = slice(2, -2) if image_size != SIZE else slice(None)
        difference = (batch.images - every.images[batch.ids])[..., inside, inside].abs().max()
        assert difference <= (0 if image_size == SIZE else 1.5 / 127.5)


@pytest.mark.parametrize("shuffle_buffer", [1, 7, None])
def test_each_sample_once_in_every_turn(folder: Path, shuffle_buffer: int | None) -> None:
    order = ids(read(folder, 15, shuffle_buffer=shuffle_buffer))
    turns = [order[start : start + NUM_SAMPLES] for start in range(0, 180, NUM_SAMPLES)]
    for turn in turns:
        assert Counter(turn) == Counter(range(NUM_SAMPLES))
    in_order = reader(folder).ring(0).tolist()
    assert in_order != list(range(NUM_SAMPLES)), "shards are shuffled"
    assert [turn == in_order for turn in turns] == [shuffle_buffer == 1] * 3
    if shuffle_buffer == 7:
        late = [turns[0].index(sample) - place for place, sample in enumerate(in_order)]
        assert min(late) >= -7, "a sample comes at most as much earlier as the buffer is large"


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_share_an_epoch(folder: Path, world_size: int) -> None:
    """Unmixed, an epoch has each sample once over all ranks, and the next one too, though not at the same rank."""
    parts = [
        ids(read(folder, 2 * NUM_SAMPLES // 5 // world_size + 1, batch_size=5, rank=rank, world_size=world_size,
                 shuffle_buffer=1))
        for rank in range(world_size)
    ]  # fmt: skip
    size = NUM_SAMPLES // world_size
    epochs = [[part[epoch * size : (epoch + 1) * size] for part in parts] for epoch in range(2)]
    for epoch in epochs:
        assert Counter(sample for part in epoch for sample in part) == Counter(range(NUM_SAMPLES))
    assert world_size == 1 or epochs[1] == [*epochs[0][1:], epochs[0][0]]


def test_the_same_command_gives_the_same_batches(folder: Path) -> None:
    flip = Augment(flip=0.5)
    one, two = (read(folder, 8, augment=flip, workers=threads) for threads in (1, 3))
    assert ids(one) == ids(two)
    assert all(torch.equal(a.images, b.images) for a, b in zip(one, two, strict=True))
    assert ids(read(folder, 8, seed=5)) != ids(one)


def test_one_image_of_another_size_and_a_long_header(folder: Path) -> None:
    """All are resized then; a header beyond the first kilobytes is found."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 23, 3), np.uint8))
    stream = io.BytesIO()
    picture.save(stream, "JPEG", exif=b"Exif\0\0" + bytes(9000))
    label = np.array([3], "<i8").tobytes()
    odd = replace_sample(folder, 2, 1, tar_member("x.jpg", stream.getvalue()) + tar_member("x.label", label), label=3)
    batches = read(folder, 5)
    assert odd in ids(batches)
    assert all(batch.images.shape == (12, 3, SIZE, SIZE) for batch in batches)


def test_half_of_the_images_are_flipped(folder: Path) -> None:
    plain = {
        int(sample): image for batch in read(folder, 5) for sample, image in zip(batch.ids, batch.images, strict=True)
    }
    flipped = 0
    batches = read(folder, 50, augment=Augment(flip=0.5))
    for batch in batches:
        for sample, image in zip(batch.ids, batch.images, strict=True):
            is_flipped = torch.equal(image, plain[int(sample)].flip(-1))
            assert is_flipped or torch.equal(image, plain[int(sample)])
            flipped += is_flipped
    assert abs(flipped / 600 - 0.5) < 4 * 0.5 / 600**0.5


@pytest.mark.parametrize("position", [12, 48, 60, 132])
def test_seek_goes_on_in_the_ring(folder: Path, position: int) -> None:
    straight = ids(read(folder, 18, shuffle_buffer=1))
    batches = read(folder, 5, position, shuffle_buffer=1)
    assert ids(batches) == straight[position : position + NUM_SAMPLES]
    assert batches[0].position == position + 12
    mixed = ids(read(folder, 5, position))
    assert Counter(mixed) == Counter(range(NUM_SAMPLES))


def test_a_single_shard_is_a_ring_too(tmp_path: Path) -> None:
    folder = write_tiny_dataset(tmp_path / "one", num_classes=4, samples_per_class=5, num_shards=1)
    batches = [ids(read(folder, 8, rank=rank, world_size=3, batch_size=5, channels=1)) for rank in range(3)]
    for order in batches:
        assert [Counter(order[start : start + 20]) for start in (0, 20)] == [Counter(range(20))] * 2


def test_the_ends_of_an_iteration_leave_no_files(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    read(folder, 2)
    assert list((tmp_path / "temporary").iterdir()) == []


def test_an_image_that_does_not_decode_is_named(tmp_path: Path) -> None:
    folder = write_tiny_dataset(tmp_path / "tiny", num_classes=15, samples_per_class=4, image_size=SIZE, num_shards=4)
    break_image(folder, shard=1, place=3)
    one = reader(folder, channels=1, shuffle_buffer=9)
    batches = iter(one)
    with pytest.raises(DataError, match=r"train-000001\.tar, byte \d+, key 'k3'.*bad-image"):
        list(islice(batches, 5))
    one.close()


def test_a_label_that_is_not_that_of_the_index_is_named(folder: Path) -> None:
    image = tar_member("x.png", _png())
    wrong = tar_member("x.label", np.array([14 - stored_label(folder, 2)], "<i8").tobytes())
    sample_id = replace_sample(folder, 0, 2, image + wrong)
    one = reader(folder)
    with pytest.raises(DataError, match=rf"label {14 - stored_label(folder, sample_id)} in the shard but"):
        list(islice(one, 5))
    one.close()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (lambda: tar_member("x.pyd", b"x"), "expected an image"),
        (lambda: tar_member("x.png", _png()) + tar_member("y.label", bytes(8)), "expected member 'x.label'"),
        (lambda: tar_member("x.png", blank_png(13_300)) + tar_member("x.label", bytes(8)), "image-too-large"),
        (lambda: tar_member("x.jpg", b"#!/bin/sh") + tar_member("x.label", bytes(8)), "bad-image"),
        (lambda: tar_member("x.png", b"/etc/passwd", b"2") + tar_member("x.label", bytes(8)), "only regular files"),
    ],
)
def test_a_member_that_is_no_sample_is_named_before_dali_sees_it(folder: Path, members: Any, message: str) -> None:
    replace_sample(folder, 1, 4, members())
    one = reader(folder)
    with pytest.raises(DataError, match=rf"train-000001\.tar, byte \d+: .*{message}"):
        next(iter(one))
    one.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_bad_sample": "skip"}, "has no substitutes"),
        ({"num_classes": 3}, "reads whole shards"),
        ({"label_noise": 0.1}, "knows the true labels only"),
        ({"shuffle_window": 2}, "mixes through dataset.shuffle_buffer"),
        ({"augment": {"flip": 0.5, "erase": 0.1, "blur": 0.2}}, "makes flips, not blur, erase"),
    ],
)
def test_what_it_cannot_do_is_refused(options: dict[str, Any], message: str) -> None:
    Dataset.model_validate({"path": "x", "reader": "dali-stream", "shuffle_buffer": 5, "augment": {"flip": 0.5}})
    with pytest.raises(ValueError, match=message):
        Dataset.model_validate({"path": "x", "reader": "dali-stream", **options})


def test_a_run_reads_through_it(folder: Path, tmp_path: Path) -> None:
    """Each sample is trained once in the one turn that a run of five steps makes, and the books are right."""
    content = small_config(
        folder, tmp_path / "run", train={"steps": 5, "global_batch_size": 12, "precision": "float32"},
        dataset={"reader": "dali-stream", "channels": 3, "workers": 2, "augment": {"flip": 0.5}},
        optim={"warmup_steps": 0},
    )  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    assert main(["train", str(tmp_path / "run.yaml")]) == 0
    trained = [sample for used in sample_ids(tmp_path / "run").values() for sample in used]
    assert Counter(trained) == Counter(range(NUM_SAMPLES))
    samples = json.loads((tmp_path / "run" / "summary.json").read_text())["samples"]
    assert (samples["read"], samples["trained"]) == (NUM_SAMPLES, NUM_SAMPLES)


def _png() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (SIZE, SIZE)).save(stream, "PNG")
    return stream.getvalue()
