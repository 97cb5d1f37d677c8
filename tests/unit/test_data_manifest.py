"""The manifest and the index as untrusted files: whatever is in them, a `DataError` says what is wrong."""

from __future__ import annotations

import json
import os
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


@pytest.mark.parametrize("name", ["../x.tar", "..", ".hidden", "a/b.tar", "/etc/passwd", ""])
def test_names_that_are_paths_are_refused(dataset: Path, tmp_path: Path, name: str) -> None:
    folder = change(dataset, tmp_path, classes=name)
    with pytest.raises(DataError, match=r"is not a valid manifest: splits\.train\.classes"):
        load_manifest(folder)


@pytest.mark.parametrize("text", ["", "[]", "{", "null", '{"format": 2}', "\x00", "[" * 100_000])
def test_broken_manifests(tmp_path: Path, text: str) -> None:
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(DataError, match=r"dataset.json"):
        load_manifest(tmp_path)


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
