"""The folder that `DatasetWriter` writes: layout, order, reproducibility, and what it refuses."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from webdataset import tariterators

from megaclass.data.manifest import load_class_names, load_index, load_manifest
from megaclass.errors import ConfigError, DataError
from megaclass.prepare.encode import EncodedImage, encode_array, one_by_one
from megaclass.prepare.plans import Samples, plan_splits, write_dataset
from megaclass.prepare.writer import DatasetWriter, SplitPlan, check_output, writing_order

NUM_CLASSES, PER_CLASS = 13, 5
ORDER_OF_TEN = [2, 4, 6, 8, 5, 1, 7, 0, 9, 3]


def image_of(number: int) -> EncodedImage:
    pixels = np.full((9, 7), 255, dtype=np.uint8)
    pixels.flat[: number % 60] = number % 256
    return encode_array(pixels)


def plan_of(num_classes: int = NUM_CLASSES, per_class: int = PER_CLASS) -> SplitPlan:
    labels = np.repeat(np.arange(num_classes), per_class)
    return SplitPlan(
        names=[f"class {number:02d}" for number in range(num_classes)],
        groups=[f"group {number % 3}" for number in range(num_classes)],
        source_names=["pen", "bruşh"],
        labels=labels,
        sources=(np.arange(len(labels), dtype=np.int32) % 3) - 1,
        images=one_by_one(image_of),
    )


def write(folder: Path, **options: object) -> None:
    with DatasetWriter(folder, "tiny", samples_per_shard=20, **options) as writer:  # type: ignore[arg-type]
        writer.write_split("train", plan_of())
        writer.write_split("unseen", plan_of(3))
        writer.finish()


def test_everything_can_be_read_back(tmp_path: Path) -> None:
    write(tmp_path / "set")
    manifest = load_manifest(tmp_path / "set")
    split = manifest.splits["train"]
    assert (split.num_classes, split.num_samples) == (13, 65)
    assert [shard.num_samples for shard in split.shards] == [20, 20, 20, 5]
    records, shard_numbers = load_index(tmp_path / "set", "train", split)
    plan, order = plan_of(), writing_order(65)
    assert np.array_equal(records["label"], plan.labels[order])
    assert np.array_equal(records["source"], plan.sources[order])
    for number, (record, shard) in enumerate(zip(records, shard_numbers, strict=True)):
        path = tmp_path / "set" / split.shards[shard].file
        data = path.read_bytes()[record["offset"] : record["offset"] + record["length"]]
        size = int(data[124:135], 8)
        assert data[:100].rstrip(b"\0") == f"{number:09d}.png".encode()
        assert data[512 : 512 + size] == image_of(order[number]).data
        assert data[-512:-504] == int(record["label"]).to_bytes(8, "little", signed=True)
    names = load_class_names(tmp_path / "set", split)
    assert names.names == plan.names
    assert names.groups == plan.groups
    assert not (tmp_path / "set" / ".unfinished").exists()


def test_index_covers_the_tar_without_gaps(tmp_path: Path) -> None:
    write(tmp_path)
    for shard in load_manifest(tmp_path).splits["train"].shards:
        records = np.load(tmp_path / shard.index, allow_pickle=False)
        with tarfile.open(tmp_path / shard.file) as tar:
            members = tar.getmembers()
        assert [member.name.partition(".")[2] for member in members] == ["png", "label"] * len(records)
        assert records["offset"].tolist() == [member.offset for member in members[::2]]
        assert records["offset"][1:].tolist() == (records["offset"] + records["length"])[:-1].tolist()
        assert {(member.mtime, member.uid, member.gid, member.mode, member.uname) for member in members} == {
            (0, 0, 0, 0o444, "")
        }


def test_webdataset_reads_the_same_samples(tmp_path: Path) -> None:
    write(tmp_path)
    shard = load_manifest(tmp_path).splits["train"].shards[0]
    with (tmp_path / shard.file).open("rb") as stream:
        members = tariterators.tar_file_expander([{"url": shard.file, "stream": stream}])
        samples = list(tariterators.group_by_keys(members))
    labels = [int.from_bytes(sample["label"], "little", signed=True) for sample in samples]
    assert labels == np.load(tmp_path / shard.index)["label"].tolist()
    assert all(sample["png"].startswith(b"\x89PNG") for sample in samples)


def test_two_runs_write_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b")
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir())
    assert len(names) == 1 + (4 + 4 + 1) + (1 + 1 + 1)
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


@given(st.integers(0, 500))
def test_writing_order_is_a_permutation(num_samples: int) -> None:
    assert sorted(writing_order(num_samples).tolist()) == list(range(num_samples))


def test_writing_order_is_fixed_and_mixes_classes() -> None:
    assert writing_order(10).tolist() == ORDER_OF_TEN
    labels = np.repeat(np.arange(100), 10)[writing_order(1000)]
    assert len(np.unique(labels[:100])) > 50


def test_left_out_samples_leave_no_gap(tmp_path: Path) -> None:
    plan = plan_of()
    labels = plan.labels
    holes = SplitPlan(
        plan.names,
        None,
        plan.source_names,
        labels,
        plan.sources,
        one_by_one(lambda i: None if i % 4 == 0 else image_of(i)),
    )
    calls: list[tuple[int, int]] = []
    with DatasetWriter(tmp_path, "holes", samples_per_shard=100) as writer:
        info = writer.write_split("train", holes, lambda done, total: calls.append((done, total)))
        manifest = writer.finish()
    assert info.num_samples == 48
    records, _ = load_index(tmp_path, "train", manifest.splits["train"])
    kept = [label for number, label in enumerate(labels) if number % 4]
    assert sorted(records["label"].tolist()) == kept
    assert calls[-1] == (65, 65)


def test_a_finished_set_is_refused_unless_overwritten(tmp_path: Path) -> None:
    write(tmp_path)
    before = (tmp_path / "dataset.json").read_bytes()
    with pytest.raises(ConfigError, match="already holds a data set; give another folder, or --overwrite"):
        write(tmp_path)
    assert (tmp_path / "dataset.json").read_bytes() == before
    with DatasetWriter(tmp_path, "other", overwrite=True) as writer:
        assert not (tmp_path / "dataset.json").exists()
        assert not list(tmp_path.glob("*.tar"))
        writer.write_split("train", plan_of(3))
        writer.finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "dataset.json",
        "train-000000.index.npy",
        "train-000000.tar",
        "train.classes.json",
    ]


def test_an_interrupted_run_is_unfinished_and_can_be_repeated(tmp_path: Path) -> None:
    def fail(number: int) -> EncodedImage:
        if number == 40:
            raise KeyboardInterrupt
        return image_of(number)

    plan = plan_of()
    with pytest.raises(KeyboardInterrupt), DatasetWriter(tmp_path, "cut", samples_per_shard=7) as writer:
        writer.write_split("train", SplitPlan(plan.names, None, [], plan.labels, plan.sources, one_by_one(fail)))
    with pytest.raises(DataError, match="is not a finished data set"):
        load_manifest(tmp_path)
    write(tmp_path)
    assert load_manifest(tmp_path).splits["train"].num_samples == 65
    assert len(list(tmp_path.glob("*.tar"))) == 5


def test_foreign_files_and_files_as_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "train-000000.tar").write_bytes(b"somebody's")
    with pytest.raises(ConfigError, match=r"holds other files \(train-000000.tar\); give an empty or new folder"):
        write(tmp_path)
    assert (tmp_path / "train-000000.tar").read_bytes() == b"somebody's"
    with pytest.raises(ConfigError, match="is not a folder"):
        check_output(tmp_path / "train-000000.tar", overwrite=True)
    with pytest.raises(ConfigError, match="cannot be written: Not a directory; choose another"):
        write(tmp_path / "train-000000.tar" / "below")
    with pytest.raises(ConfigError, match="samples-per-shard is 0"):
        DatasetWriter(tmp_path / "new", "x", samples_per_shard=0)


def test_image_mode_is_rgb_if_any_image_is(tmp_path: Path) -> None:
    plan = plan_of(2, 2)
    colour = EncodedImage(image_of(1).data, "png", "RGB")
    mixed = SplitPlan(
        plan.names,
        None,
        plan.source_names,
        plan.labels,
        plan.sources,
        one_by_one(lambda i: colour if i == 3 else image_of(i)),
    )
    with DatasetWriter(tmp_path, "mixed") as writer:
        writer.write_split("train", mixed)
        assert writer.finish().image_mode == "RGB"


def samples_of(load: Callable[[int], EncodedImage | None] = image_of) -> Samples:
    plan = plan_of()
    return Samples(plan.names, plan.groups, plan.source_names, plan.labels, plan.sources, one_by_one(load))


def test_splits_have_labels_of_their_own() -> None:
    unseen = np.arange(NUM_CLASSES) % 4 == 1
    plans = plan_splits(samples_of(), unseen)
    assert plans["unseen"].names == ["class 01", "class 05", "class 09"]
    assert plans["unseen"].groups == ["group 1", "group 2", "group 0"]
    assert plans["unseen"].labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert plans["train"].labels.tolist() == np.repeat(np.arange(10), 5).tolist()
    assert list(plans["unseen"].images(np.array([0, 7]))) == [image_of(5), image_of(27)]
    assert list(plan_splits(samples_of(), np.ones(NUM_CLASSES, dtype=bool))) == ["unseen"]


def test_progress_counts_over_all_splits(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    report = write_dataset(
        tmp_path,
        samples_of(),
        np.arange(NUM_CLASSES) < 2,
        name="n",
        description="",
        conditions=None,
        options={"samples_per_shard": 50, "progress": lambda done, total: calls.append((done, total))},
    )
    assert calls == [(55, 65), (65, 65)]
    assert "train: 11 classes, 55 samples, 2 sources, 2 shards" in report.text()
    assert report.as_dict()["splits"]["unseen"] == {"num_classes": 2, "num_samples": 10, "num_shards": 1}  # type: ignore[index]


def test_nothing_to_write_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no sample was left to write"):
        write_dataset(
            tmp_path,
            samples_of(lambda number: None),
            np.zeros(NUM_CLASSES, dtype=bool),
            name="n",
            description="",
            conditions=None,
            options={},
        )
    assert not (tmp_path / "dataset.json").exists()
