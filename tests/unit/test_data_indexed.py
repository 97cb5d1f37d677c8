from __future__ import annotations

import tarfile
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megaclass.config import Augment
from megaclass.data.bad_samples import REASONS
from megaclass.data.batch import Batch
from megaclass.data.indexed import IndexedReader
from megaclass.data.manifest import load_index, load_manifest
from megaclass.data.open_order import OrderOptions
from megaclass.errors import DataError
from tests.support.readers import opened
from tests.support.tiny_dataset import (
    encode,
    shard_entry,
    tar_member,
    tiny_image,
    write_manifest,
    write_shard,
    write_tiny_dataset,
)

SIZE = 9
AUGMENT = Augment(flip=0.5, shift=0.1, rotation=10, erase=0.5)


def open_indexed(folder: Path, batch_size: int, rank: int = 0, world_size: int = 1, **options: Any) -> IndexedReader:
    fixed: dict[str, Any] = {"seed": 4, "image_size": SIZE, "channels": 1, **options}
    return opened(IndexedReader, folder, "train", batch_size=batch_size, rank=rank, world_size=world_size, **fixed)


def read(reader: IndexedReader, num_batches: int, position: int = 0) -> list[Batch]:
    reader.seek(position)
    batches = list(islice(reader, num_batches))
    reader.close()
    return batches


def read_steps(
    folder: Path, global_batch: int, world_size: int, num_steps: int, position: int = 0, accumulation: int = 1
) -> tuple[list[list[int]], int]:
    """The ids of every step over all ranks, micro-batch by micro-batch and rank by rank; and the position after it."""
    batch_size = global_batch // (world_size * accumulation)
    parts = [
        read(open_indexed(folder, batch_size, rank, world_size), num_steps * accumulation, position)
        for rank in range(world_size)
    ]
    steps = []
    for step in range(num_steps):
        micro = range(step * accumulation, (step + 1) * accumulation)
        steps.append([i for a in micro for rank in range(world_size) for i in parts[rank][a].ids.tolist()])
    positions = {batches[-1].position for batches in parts}
    assert len(positions) == 1
    return steps, positions.pop()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """60 samples of 15 classes in 4 shards."""
    return write_tiny_dataset(tmp_path / "data", 15, 4, SIZE, 4)


def replace_sample(folder: Path, shard: int, place: int, members: bytes, label: int | None = None) -> int:
    """Put other members in a sample's place and write the shard and its index anew; returns the sample's id."""
    content = load_manifest(folder).model_dump()
    split = content["splits"]["train"]
    entries = split["shards"]
    stem = entries[shard]["file"].removesuffix(".tar")
    tar = (folder / f"{stem}.tar").read_bytes()
    records = np.load(folder / f"{stem}.index.npy")
    samples = [(tar[r["offset"] : r["offset"] + r["length"]], int(r["label"]), int(r["source"])) for r in records]
    samples[place] = (members, samples[place][1] if label is None else label, -1)
    entries[shard] = write_shard(folder, stem, samples)
    write_manifest(folder, content)
    return sum(entry["num_samples"] for entry in entries[:shard]) + place


def stored_label(folder: Path, sample_id: int) -> int:
    return int(load_index(folder, "train", load_manifest(folder).splits["train"])[0]["label"][sample_id])


def break_image(folder: Path, shard: int = 1, place: int = 3) -> int:
    label = np.load(folder / f"train-{shard:06d}.index.npy")["label"][place]
    image = encode(tiny_image(0, 0, SIZE, 1))[:-30]
    return replace_sample(
        folder,
        shard,
        place,
        tar_member(f"k{place}.png", image) + tar_member(f"k{place}.label", label.astype("<i8").tobytes()),
    )


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_each_sample_once_per_epoch_and_the_same_order_at_every_world_size(
    folder: Path, world_size: int, accumulation: int
) -> None:
    # 24 does not divide 60: steps 3 and 5 span two epochs, and 5 steps are 2 epochs.
    steps, position = read_steps(folder, 24, world_size, 5, accumulation=accumulation)
    assert position == 120
    assert steps == read_steps(folder, 24, 1, 5)[0]
    sequence = [sample for step in steps for sample in step]
    assert sorted(sequence[:60]) == list(range(60))
    assert sorted(sequence[60:]) == list(range(60))
    assert sequence[:60] != sequence[60:]


@pytest.mark.parametrize("batch_size", [1, 5, 7, 60])
def test_odd_batch_sizes(folder: Path, batch_size: int) -> None:
    batches = read(open_indexed(folder, batch_size), -(-120 // batch_size))
    assert all(batch.images.shape == (batch_size, 1, SIZE, SIZE) for batch in batches)
    assert [batch.position for batch in batches] == [batch_size * (n + 1) for n in range(len(batches))]
    assert Counter(i for batch in batches for i in batch.ids.tolist()).most_common()[-1][1] == 2


def test_resuming_in_the_middle_of_an_epoch_at_other_world_sizes(folder: Path) -> None:
    whole, _ = read_steps(folder, 12, 1, 10)
    steps: list[list[int]] = []
    position = 0
    for world_size, num_steps in ((4, 3), (2, 2), (3, 1), (1, 4)):
        part, position = read_steps(folder, 12, world_size, num_steps, position)
        steps += part
    assert steps == whole


def test_pixels_do_not_depend_on_world_size_or_resumption(folder: Path) -> None:
    one = read(open_indexed(folder, 12, augment=AUGMENT), 10)
    images = torch.cat([batch.images for batch in one])
    labels = torch.cat([batch.labels for batch in one])
    for rank in range(3):
        for number, batch in enumerate(read(open_indexed(folder, 4, rank, 3, augment=AUGMENT), 4, 72), start=6):
            at = slice(number * 12 + rank * 4, number * 12 + rank * 4 + 4)
            assert torch.equal(batch.images, images[at])
            assert torch.equal(batch.labels, labels[at])
    # The same sample in two epochs is changed differently.
    ids = torch.cat([batch.ids for batch in one])
    assert not torch.equal(images[(ids == 7)][0], images[(ids == 7)][1])


def test_labels_are_those_of_the_index(folder: Path) -> None:
    for batch in read(open_indexed(folder, 12), 5):
        assert batch.labels.tolist() == [stored_label(folder, i) for i in batch.ids.tolist()]
        assert batch.images.dtype == torch.uint8
        assert batch.skipped == ()


def test_manifest_order_and_other_sizes(folder: Path) -> None:
    reader = open_indexed(folder, 12, order=OrderOptions(shuffle=False), image_size=14, channels=3)
    batches = read(reader, 6)
    assert [i for batch in batches for i in batch.ids.tolist()] == [*range(60), *range(12)]
    assert batches[0].images.shape == (12, 3, 14, 14)
    assert (reader.num_samples, reader.num_classes) == (60, 15)


def test_iterating_again_starts_at_the_position_last_sought(folder: Path) -> None:
    reader = open_indexed(folder, 12)
    first = next(iter(reader))
    assert torch.equal(next(iter(reader)).ids, first.ids)
    reader.seek(24)
    iterator = iter(reader)
    third = next(iterator)
    assert third.position == 36
    reader.seek(0)
    with pytest.raises(StopIteration):
        next(iterator)
    assert torch.equal(next(iter(reader)).ids, first.ids)
    reader.close()
    reader.close()


def test_global_random_state_is_not_touched(folder: Path) -> None:
    state = torch.get_rng_state()
    read(open_indexed(folder, 12, augment=AUGMENT), 3)
    assert torch.equal(torch.get_rng_state(), state)


def test_fewer_samples_than_a_global_batch(folder: Path) -> None:
    with pytest.raises(
        DataError, match=r"has 60 samples, fewer than train\.global_batch_size 64; lower the batch size"
    ):
        open_indexed(folder, 16, 0, 2, accumulation_steps=2)
    open_indexed(folder, 15, 0, 2, accumulation_steps=2).close()


def test_a_cut_off_shard_stops_before_the_first_batch(folder: Path) -> None:
    path = folder / "train-000002.tar"
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(DataError, match=r"train-000002\.tar has \d+ bytes but dataset\.json says \d+: cut off"):
        open_indexed(folder, 12)


def test_empty_shards_do_no_harm(tmp_path: Path) -> None:
    folder = write_tiny_dataset(tmp_path, 3, 2, SIZE, 9)
    assert (folder / "train-000008.tar").stat().st_size == 1024
    assert sorted(read(open_indexed(folder, 6), 1)[0].ids.tolist()) == list(range(6))
    (folder / "train-000008.tar").write_bytes(b"")
    content = load_manifest(folder).model_dump()
    content["splits"]["train"]["shards"][8] = shard_entry(folder, "train-000008")
    write_manifest(folder, content)
    assert sorted(read(open_indexed(folder, 6), 1)[0].ids.tolist()) == list(range(6))


def bad_members(kind: str, label: int) -> bytes:
    image = encode(tiny_image(0, 0, SIZE, 1))
    right = np.array(label, "<i8").tobytes()
    return {
        "no label": tar_member("k.png", image) + tar_member("l.label", right),
        "short label": tar_member("k.png", image) + tar_member("k.label", b"12"),
        "label too large": tar_member("k.png", image) + tar_member("k.label", np.array(15, "<i8").tobytes()),
        "negative label": tar_member("k.png", image) + tar_member("k.label", np.array(-1, "<i8").tobytes()),
        "other label": tar_member("k.png", image) + tar_member("k.label", np.array((label + 1) % 15, "<i8").tobytes()),
        "broken image": tar_member("k.png", image[:-30]) + tar_member("k.label", right),
        "link": tar_member("k.png", b"", tarfile.SYMTYPE) + tar_member("k.label", right),
        "zeros": bytes(2048),
    }[kind]


@pytest.mark.parametrize(
    ("kind", "reason", "text"),
    [
        ("no label", "bad-tar", "expected member 'k.label', found 'l.label'"),
        ("short label", "bad-label", "member 'k.label': label has 2 bytes, expected 8"),
        ("label too large", "bad-label", r"key 'k': label 15, allowed is \[0, 15\)"),
        ("negative label", "bad-label", r"key 'k': label -1, allowed is \[0, 15\)"),
        ("other label", "bad-label", r"key 'k': label \d+ in the shard but \d+ in the index"),
        ("broken image", "bad-image", "key 'k': PNG does not decode: .*truncated"),
        ("link", "bad-tar", "'k.png' is of tar type b'2'; only regular files are allowed"),
        ("zeros", "bad-tar", "no valid tar header"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_bad_sample_stops_or_is_replaced(folder: Path, kind: str, reason: str, text: str) -> None:
    label = int(np.load(folder / "train-000001.index.npy")["label"][3])
    bad = replace_sample(folder, 1, 3, bad_members(kind, label))
    assert bad == 18
    with pytest.raises(DataError, match=text) as caught:
        read(open_indexed(folder, 12), 5)
    caught.match(r"shard .*train-000001\.tar, byte \d+.*on_bad_sample: skip")
    assert "\n" not in str(caught.value)

    batches = read(open_indexed(folder, 12, on_bad_sample="skip", bad_sample_budget=0.05), 5)
    (skipped,) = [skip for batch in batches for skip in batch.skipped]
    assert (skipped.sample_id, skipped.reason) == (18, reason)
    assert reason in REASONS
    ids = Counter(i for batch in batches for i in batch.ids.tolist())
    # Everything else keeps its visit, and one sample has a second one as the substitute.
    assert set(ids) == set(range(60)) - {18}
    assert sum(ids.values()) == 60
    for batch in batches:
        assert batch.labels.tolist() == [stored_label(folder, i) for i in batch.ids.tolist()]


def test_substitutes_do_not_depend_on_world_size(folder: Path) -> None:
    break_image(folder)
    policy = {"on_bad_sample": "skip", "bad_sample_budget": 0.5}
    one = [i for batch in read(open_indexed(folder, 12, **policy), 10) for i in batch.ids.tolist()]
    parts = [read(open_indexed(folder, 6, rank, 2, **policy), 10) for rank in range(2)]
    assert [i for step in range(10) for part in parts for i in part[step].ids.tolist()] == one
    # The two epochs have two substitutes.
    first, second = (Counter(one[:60]) - Counter(range(60))), (Counter(one[60:]) - Counter(range(60)))
    assert len(first) == len(second) == 1
    assert first != second


def test_bad_substitutes_are_counted_and_replaced_in_turn(folder: Path) -> None:
    bad = {break_image(folder, shard, place) for shard in range(4) for place in range(13)}
    batches = read(open_indexed(folder, 12, on_bad_sample="skip", bad_sample_budget=1.0), 5)
    ids = [i for batch in batches for i in batch.ids.tolist()]
    assert len(ids) == 60
    assert not bad & set(ids)
    skipped = [skip.sample_id for batch in batches for skip in batch.skipped]
    assert set(skipped) == bad
    assert len(skipped) > len(bad)
    assert all(len({skip.sample_id for skip in batch.skipped}) == len(batch.skipped) for batch in batches)


def test_more_bad_samples_than_the_budget_stop_the_run(folder: Path) -> None:
    for place in range(5):
        break_image(folder, 0, place)
    reader = open_indexed(folder, 6, on_bad_sample="skip", bad_sample_budget=0.05)
    with pytest.raises(DataError, match=r"\d of the \d+ samples this rank read .* allowed are 3 .*train-000000\.tar"):
        read(reader, 10)
    assert len(read(open_indexed(folder, 6, on_bad_sample="skip", bad_sample_budget=0.1), 10)) == 10


def test_nothing_good_left(tmp_path: Path) -> None:
    folder = write_tiny_dataset(tmp_path, 2, 2, SIZE, 1)
    for place in range(4):
        break_image(folder, 0, place)
    with pytest.raises(DataError, match="no usable sample found in 100 tries in place of a bad one"):
        read(open_indexed(folder, 2, on_bad_sample="skip", bad_sample_budget=1.0), 1)
