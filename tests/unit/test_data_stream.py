from __future__ import annotations

import gzip
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megaclass.data import stream
from megaclass.data.batch import Batch
from megaclass.data.manifest import load_index, load_manifest
from megaclass.data.members import read_samples
from megaclass.data.open_order import OrderOptions
from megaclass.data.stream import StreamReader
from megaclass.errors import DataError
from tests.support.readers import opened
from tests.support.tiny_dataset import write_manifest, write_tiny_dataset
from tests.unit.test_data_indexed import AUGMENT, SIZE, bad_members, break_image, open_indexed, replace_sample


def open_stream(folder: Path, batch_size: int, rank: int = 0, world_size: int = 1, **options: Any) -> StreamReader:
    fixed: dict[str, Any] = {"seed": 4, "image_size": SIZE, "channels": 1, **options}
    return opened(StreamReader, folder, "train", batch_size=batch_size, rank=rank, world_size=world_size, **fixed)


def read(reader: StreamReader, num_batches: int, position: int = 0) -> list[Batch]:
    reader.seek(position)
    batches = list(islice(reader, num_batches))
    reader.close()
    return batches


def all_ids(batches: list[Batch]) -> list[int]:
    return [i for batch in batches for i in batch.ids.tolist()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """60 samples of 15 classes in 7 shards of 8 or 9."""
    return write_tiny_dataset(tmp_path / "data", 15, 4, SIZE, 7)


def test_images_and_labels_are_those_of_the_indexed_reader(folder: Path) -> None:
    streamed = read(open_stream(folder, 12, shuffle=False, augment=AUGMENT), 10)
    reader = open_indexed(folder, 12, order=OrderOptions(shuffle=False), augment=AUGMENT)
    for one, other in zip(streamed, islice(reader, 10), strict=True):
        assert torch.equal(one.ids, other.ids)
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.images, other.images)
        assert one.position == other.position
    reader.close()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_rank_always_has_full_batches_and_ranks_share_no_shard_of_an_epoch(folder: Path, world_size: int) -> None:
    _, shard_of = load_index(folder, "train", load_manifest(folder).splits["train"])
    owners: Counter[int] = Counter()
    for rank in range(world_size):
        batches = read(open_stream(folder, 5, rank, world_size), 30)
        assert {len(batch.ids) for batch in batches} == {5}
        assert [batch.position for batch in batches] == [5 * world_size * (n + 1) for n in range(30)]
        # No rank has fewer samples in its first epoch.
        first = all_ids(batches)[: 7 // world_size * 8]
        assert len(set(first)) == len(first)
        owners.update(set(shard_of[first].tolist()))
    assert set(owners.values()) == {1}


def test_an_epoch_of_all_ranks_holds_every_sample_once(folder: Path) -> None:
    for world_size in (1, 2, 3, 7):
        seen: Counter[int] = Counter()
        for rank in range(world_size):
            reader = open_stream(folder, 1, rank, world_size, shuffle=False)
            sizes = [9, 9, 9, 9, 8, 8, 8][rank::world_size]
            seen.update(all_ids(read(reader, sum(sizes))))
        assert sorted(seen.elements()) == list(range(60))


def test_the_order_is_shuffled_repeatable_and_of_the_seed(folder: Path) -> None:
    ids = all_ids(read(open_stream(folder, 12), 10))
    assert ids == all_ids(read(open_stream(folder, 12), 10))
    assert ids != all_ids(read(open_stream(folder, 12, seed=5), 10))
    assert ids[:60] != sorted(ids[:60])
    assert sorted(ids[:60]) == sorted(ids[60:]) == list(range(60))
    assert ids[:60] != ids[60:]


def test_the_window_says_how_far_samples_are_mixed(folder: Path) -> None:
    usual = all_ids(read(open_stream(folder, 12), 5))
    assert usual == all_ids(read(open_stream(folder, 12, shuffle_buffer=1000), 5))
    small = all_ids(read(open_stream(folder, 12, shuffle_buffer=6), 5))
    assert small == all_ids(read(open_stream(folder, 12, shuffle_buffer=6), 5))
    alone = all_ids(read(open_stream(folder, 12, shuffle_buffer=1), 5))
    assert sorted(usual) == sorted(small) == sorted(alone) == list(range(60))
    assert len({tuple(usual), tuple(small), tuple(alone)}) == 3
    place = {sample: number for number, sample in enumerate(alone)}
    # A sample comes early by the window at most; how late it comes has no bound.
    assert max(place[sample] - number for number, sample in enumerate(small)) < 6
    _, shard_of = load_index(folder, "train", load_manifest(folder).splits["train"])
    shards = [shard for n, shard in enumerate(shard_of[alone]) if n == 0 or shard != shard_of[alone[n - 1]]]
    assert len(shards) == 7, "with a window of one, whole shards in a shuffled order"


def test_seek_goes_to_the_beginning_of_the_shard(folder: Path) -> None:
    reader = open_stream(folder, 4, shuffle=False)
    # Shards of 9, 9, 9, 9, 8, 8, 8: sample 20 is in the third, sample 61 in the first of the next epoch.
    assert all_ids(read(reader, 2, 20)) == list(range(18, 26))
    assert all_ids(read(reader, 2, 18)) == list(range(18, 26))
    assert all_ids(read(reader, 2, 61)) == list(range(8))
    assert all_ids(read(reader, 2, 117)) == list(range(52, 60))
    assert read(reader, 1, 20)[0].position == 24
    # Of two ranks each has consumed half: sample 10 of rank 1 is in its second shard, the fourth of all.
    assert all_ids(read(open_stream(folder, 4, 1, 2, shuffle=False), 1, 20)) == [27, 28, 29, 30]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_workers_change_no_number_and_lose_nothing(folder: Path) -> None:
    alone = read(open_stream(folder, 12, augment=AUGMENT), 10)
    together = read(open_stream(folder, 12, augment=AUGMENT, workers=2), 10)
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.ids, other.ids)
        assert one.position == other.position


def test_fewer_shards_than_ranks_and_empty_shards(tmp_path: Path) -> None:
    folder = write_tiny_dataset(tmp_path / "two", 3, 2, SIZE, 2)
    with pytest.raises(
        DataError, match=r"has 2 shards with samples for 3 ranks; use dataset\.reader: indexed, or make the data set"
    ):
        open_stream(folder, 1, 0, 3)
    folder = write_tiny_dataset(tmp_path / "nine", 3, 2, SIZE, 9)
    assert sorted(all_ids(read(open_stream(folder, 6), 1))) == list(range(6))
    with pytest.raises(DataError, match=r"fewer than train\.global_batch_size 8"):
        open_stream(folder, 8)


@pytest.mark.parametrize("kind", ["broken image", "short label", "negative label", "other label"])
def test_a_bad_sample_stops_or_is_replaced(folder: Path, kind: str) -> None:
    label = int(np.load(folder / "train-000001.index.npy")["label"][3])
    bad = replace_sample(folder, 1, 3, bad_members(kind, label))
    with pytest.raises(DataError, match=r"shard .*train-000001\.tar, key 'k': .*on_bad_sample: skip"):
        read(open_stream(folder, 12), 6)
    batches = read(open_stream(folder, 12, shuffle=False, on_bad_sample="skip", bad_sample_budget=0.05), 5)
    (skipped,) = [skip for batch in batches for skip in batch.skipped]
    assert skipped.sample_id == bad
    ids = all_ids(batches)
    assert set(ids) == set(range(60)) - {bad}
    assert len(ids) == 60
    labels = load_index(folder, "train", load_manifest(folder).splits["train"])[0]["label"]
    assert [i for batch in batches for i in batch.labels.tolist()] == labels[ids].tolist()


def test_the_budget_holds(folder: Path) -> None:
    for place in range(5):
        break_image(folder, 0, place)
    with pytest.raises(DataError, match="allowed are 3 "):
        read(open_stream(folder, 6, on_bad_sample="skip", bad_sample_budget=0.05), 10)
    with pytest.raises(DataError, match="no usable sample in a whole batch"):
        read(open_stream(folder, 5, shuffle=False, on_bad_sample="skip", bad_sample_budget=1.0), 1)


def test_a_link_in_a_shard_is_refused_before_the_library_sees_it(folder: Path) -> None:
    replace_sample(folder, 1, 3, bad_members("link", 3))
    with pytest.raises(DataError, match=r"train-000001\.tar: at byte \d+: member 'k\.png' is of tar type b'2'"):
        read(open_stream(folder, 12, on_bad_sample="skip"), 6)


def test_a_shard_is_never_read_in_part(folder: Path) -> None:
    path = folder / "train-000002.tar"
    whole = path.read_bytes()
    records = np.load(folder / "train-000002.index.npy")
    at = int(records["offset"][4])
    changed = bytearray(whole)
    changed[at : at + 512] = b"\xaa" * 512
    ended = bytearray(whole)
    ended[at : at + 1024] = bytes(1024)
    for content, text in (
        (bytes(changed), rf"train-000002\.tar: at byte {at}: no valid tar header"),
        (bytes(ended), r"train-000002\.tar holds 4 samples but dataset\.json says 9; run `megaclass data verify"),
        (gzip.compress(whole, mtime=0).ljust(len(whole), b"\0"), "at byte 0: no valid tar header"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=text):
            read(open_stream(folder, 12, on_bad_sample="skip", bad_sample_budget=1.0), 6)


@pytest.mark.parametrize("keep", [8, 1, 0])
def test_a_shard_that_gives_fewer_samples_than_it_should_is_noticed(
    folder: Path, keep: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "read_samples", lambda file: islice(read_samples(file), keep))
    with pytest.raises(DataError, match=rf"train-000000\.tar gave {keep} samples but dataset\.json says 9; run"):
        read(open_stream(folder, 12, shuffle=False), 2)


def test_a_shard_that_changes_after_its_check_is_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "check_shard", lambda *_: None)
    path = folder / "train-000000.tar"
    whole = path.read_bytes()
    for content, text in (
        (whole[:520], r"train-000000\.tar cannot be read: member '.*' ends after \d+ of \d+ bytes"),
        (b"?" + whole[1:], r"train-000000\.tar cannot be read: no valid tar header \(wrong checksum\)"),
    ):
        reader = open_stream(folder, 12, shuffle=False)
        path.write_bytes(content)
        with pytest.raises(DataError, match=text):
            read(reader, 2)
        path.write_bytes(whole)


@pytest.mark.parametrize("name", ["pipe:touch canary", "file:x.tar", "http://localhost/x.tar", "../x.tar", "a b.tar"])
def test_commands_and_addresses_are_no_shards(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    content = load_manifest(folder).model_dump()
    content["splits"]["train"]["shards"][0]["file"] = name
    write_manifest(folder, content)
    with pytest.raises(DataError, match=r"not a valid manifest: splits\.train\.shards\.0\.file"):
        open_stream(folder, 12)
    assert not (folder / "canary").exists()
