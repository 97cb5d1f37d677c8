"""The manifest and the index as untrusted files: whatever is in them, a `DataError` says what is wrong."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megaclass.data.manifest import load_class_names, load_index, load_manifest, load_split
from megaclass.errors import DataError
from tests.support.tiny_dataset import write_tiny_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_dataset(tmp_path_factory.mktemp("data") / "tiny")


def change(dataset: Path, tmp_path: Path, **split_options: object) -> Path:
    content = json.loads((dataset / "dataset.json").read_text())
    content["splits"]["train"] |= split_options
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    return tmp_path


def test_a_good_one_loads(dataset: Path) -> None:
    manifest = load_manifest(dataset)
    split = load_split(dataset, manifest, "train")
    records, shards = load_index(dataset, "train", split)
    assert len(records) == len(shards) == 52
    assert len(load_class_names(dataset, split).names) == 13


@pytest.mark.parametrize("name", ["../x.tar", "..", ".hidden", "a/b.tar", "/etc/passwd", "", "x" * 201, "x.json\n"])
def test_names_that_are_paths_are_refused(dataset: Path, tmp_path: Path, name: str) -> None:
    folder = change(dataset, tmp_path, classes=name)
    with pytest.raises(DataError, match=r"is not a valid manifest: splits\.train\.classes"):
        load_manifest(folder)


@pytest.mark.parametrize("text", ["", "[]", "{", "null", '{"format": 2}', "\x00", "[" * 100_000])
def test_broken_manifests(tmp_path: Path, text: str) -> None:
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(DataError, match=r"dataset.json"):
        load_manifest(tmp_path)


def test_a_number_of_more_digits_than_python_reads(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text('{"format": 1, "name": ' + "9" * 10_000 + "}")
    with pytest.raises(DataError, match="cannot be read as JSON: Exceeds the limit"):
        load_manifest(tmp_path)


def test_a_format_is_told_in_a_few_words(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text(json.dumps({"format": "x" * 100_000}))
    with pytest.raises(DataError, match="has format 'xxx") as caught:
        load_manifest(tmp_path)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_manifest_that_is_no_file_does_not_block(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "dataset.json")
    with pytest.raises(DataError, match=r"dataset\.json is no file; make the data set again"):
        load_manifest(tmp_path)


def test_more_classes_than_there_can_be_names(dataset: Path, tmp_path: Path) -> None:
    """Refused before memory is taken for them: a number is written more quickly than arrays are filled."""
    (tmp_path / "train.classes.json").write_bytes((dataset / "train.classes.json").read_bytes())
    num_bytes = (dataset / "train.classes.json").stat().st_size
    split = load_split(tmp_path, load_manifest(change(dataset, tmp_path, num_classes=num_bytes // 3)), "train")
    assert split.num_classes == num_bytes // 3
    for number in (num_bytes // 3 + 1, 10**12):
        manifest = load_manifest(change(dataset, tmp_path, num_classes=number))
        told = f"has {number} classes in dataset.json but train.classes.json of {num_bytes} bytes cannot name as many"
        with pytest.raises(DataError, match=told):
            load_split(tmp_path, manifest, "train")
    (tmp_path / "train.classes.json").unlink()
    with pytest.raises(DataError, match=r"class names file .*train\.classes\.json cannot be read: No such file"):
        load_split(tmp_path, manifest, "train")


def test_shards_that_do_not_add_up_or_are_there_twice(dataset: Path, tmp_path: Path) -> None:
    shards = json.loads((dataset / "dataset.json").read_text())["splits"]["train"]["shards"]
    manifest = load_manifest(change(dataset, tmp_path, shards=shards[1:]))
    missing = 52 - shards[0]["num_samples"]
    with pytest.raises(DataError, match=f"has {missing} samples in its shards but dataset.json says 52"):
        load_split(tmp_path, manifest, "train")
    twice = {"shards": [*shards, shards[0]], "num_samples": 52 + shards[0]["num_samples"]}
    with pytest.raises(DataError, match=r"lists train-000000\.tar twice; make the data set again"):
        load_split(tmp_path, load_manifest(change(dataset, tmp_path, **twice)), "train")


@pytest.mark.parametrize("raw", [b"PK\x03\x04", b"\x80\x04N.", b"\x93NUMPY\1\0\xff\xff" + b"[0," * 30000])
def test_an_index_that_is_an_archive_a_pickle_or_has_a_huge_header(dataset: Path, tmp_path: Path, raw: bytes) -> None:
    split = load_split(dataset, load_manifest(dataset), "train")
    (tmp_path / split.shards[0].index).write_bytes(raw)
    with pytest.raises(
        DataError, match=r"train-000000\.index\.npy cannot be read: .*make the data set again"
    ) as caught:
        load_index(tmp_path, "train", split)
    assert "\n" not in str(caught.value)


def test_missing_split_lists_those_there_are(dataset: Path) -> None:
    with pytest.raises(DataError, match=r"has no split .test.; it has train"):
        load_split(dataset, load_manifest(dataset), "test")


def test_a_pipe_in_place_of_an_index_does_not_block(dataset: Path, tmp_path: Path) -> None:
    split = load_split(dataset, load_manifest(dataset), "train")
    os.mkfifo(tmp_path / split.shards[0].index)
    with pytest.raises(DataError, match="is missing"):
        load_index(tmp_path, "train", split)


@given(data=st.data())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_index_files(dataset: Path, tmp_path: Path, data: st.DataObject) -> None:
    split = load_split(dataset, load_manifest(dataset), "train")
    for shard in split.shards:
        raw = bytearray((dataset / shard.index).read_bytes())
        for _ in range(data.draw(st.integers(1, 3))):
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
        (tmp_path / shard.index).write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
    try:
        records, _ = load_index(tmp_path, "train", split)
    except DataError:
        return
    assert bool(np.all((records["label"] >= 0) & (records["label"] < 13)))
