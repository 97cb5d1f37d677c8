from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megaclass.checkpoint import Snapshot, compare_config, load, load_replicated, save, snapshot, verify
from megaclass.config import option_table
from megaclass.errors import CheckpointError
from megaclass.parallel.shard import ClassShard
from tests.support.checkpoints import ALONE, assert_same, make_snapshot, save_good


@pytest.mark.parametrize("num_classes", [13, 1003, 2])
def test_four_ranks_save_and_any_number_loads_bit_equal(tmp_path: Path, num_classes: int) -> None:
    path = save_good(tmp_path / "checkpoints", num_classes, size=4)
    assert path.name == "step-000000010"
    assert sorted(file.name for file in path.iterdir()) == [
        *(f"classes-{rank:05d}-of-00004.safetensors" for rank in range(4)),
        "manifest.json",
        "replicated.safetensors",
    ]
    for count in (1, 3, 4, 5):
        for index in range(count):
            shard = ClassShard(num_classes, index, count)
            assert_same(load(path, shard), make_snapshot(shard))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(num_classes=st.integers(1, 40), writers=st.integers(1, 5), readers=st.integers(1, 6), step=st.integers(0, 10**9))
def test_every_row_arrives_whatever_the_world_sizes(
    tmp_path_factory: pytest.TempPathFactory, num_classes: int, writers: int, readers: int, step: int
) -> None:
    path = save_good(tmp_path_factory.mktemp("run"), num_classes, size=writers, step=step)
    for index in range(readers):
        shard = ClassShard(num_classes, index, readers)
        assert_same(load(path, shard), make_snapshot(shard, step))


def test_verification_does_not_depend_on_how_many_ranks_wrote(tmp_path: Path) -> None:
    paths = [save_good(tmp_path / str(size), 13, size=size) for size in (1, 2, 5)]
    reports = [verify(path).as_dict() for path in paths]
    assert [report.pop("world_size") for report in reports] == [1, 2, 5]
    assert reports[0] == reports[1] == reports[2]
    assert verify(save_good(tmp_path / "other", 13, step=11)).digest != reports[0]["digest"]


def test_sharing_memory_and_odd_layouts_are_saved_by_value(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {"a": base, "b": base, "view": base[1:3, 2:], "transposed": base.T}
    shard = ClassShard(6, 0, 1)
    snapshot = Snapshot(1, 1, 1, tensors, {"rows": base.T, "rows.alias": base.T}, 6, {}, {})
    assert_same(load(save(tmp_path, snapshot, shard, ALONE, keep=2), shard), snapshot)


def test_loading_leaves_nothing_tied_to_the_files(tmp_path: Path) -> None:
    path = save_good(tmp_path, 13, size=1)
    shard = ClassShard(13, 0, 1)
    loaded = load(path, shard)
    for file in path.iterdir():
        file.write_bytes(b"\0" * file.stat().st_size)
    assert_same(loaded, make_snapshot(shard))


def test_other_number_of_classes_names_both(tmp_path: Path) -> None:
    path = save_good(tmp_path, 13)
    with pytest.raises(CheckpointError, match=r"has 13 classes but this run has 14; train on the data set it was made"):
        load(path, ClassShard(14, 0, 1))


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(CheckpointError, match=r"manifest.json is missing; give the folder of one checkpoint"):
            load(path, ClassShard(13, 0, 1))


def test_load_reads_only_the_files_of_its_rows(tmp_path: Path) -> None:
    path = save_good(tmp_path, 12, size=4)
    broken = path / "classes-00003-of-00004.safetensors"
    raw = bytearray(broken.read_bytes())
    raw[-1] ^= 1
    broken.write_bytes(raw)
    load(path, ClassShard(12, 0, 4))
    with pytest.raises(CheckpointError, match=r"classes-00003-of-00004.safetensors is damaged: its SHA-256"):
        load(path, ClassShard(12, 3, 4))


def test_the_replicated_part_alone_needs_no_class_file(tmp_path: Path) -> None:
    path = save_good(tmp_path, 13)
    shard = ClassShard(13, 0, 1)
    for rank in range(2):
        file = path / f"classes-{rank:05d}-of-00002.safetensors"
        file.write_bytes(b"\0" * file.stat().st_size)
    assert_same(load_replicated(path), dataclasses.replace(make_snapshot(shard), sharded={}))
    (path / "replicated.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"replicated\.safetensors has 0 bytes instead of"):
        load_replicated(path)


def test_files_are_as_readable_as_their_folder(tmp_path: Path) -> None:
    path = save_good(tmp_path)
    modes = {file.stat().st_mode & 0o777 for file in path.iterdir()}
    assert modes == {path.stat().st_mode & 0o666}


def test_differences_of_configurations() -> None:
    saved = {"train": {"steps": 100, "seed": 0, "epochs": None}, "run": {"dir": "a", "log_every": 20}, "evaluate": {}}
    same = {
        "train": {"steps": 100, "seed": 0, "epochs": None},
        "run": {"dir": "b", "log_every": 1},
        "evaluate": {"x": 1},
        "dataset": {"remote": {"cache_dir": "/scratch"}},
    }
    assert compare_config(saved, same) == []
    other = {"train": {"steps": None, "seed": 3, "epochs": 2.5}, "run": saved["run"], "optim": {"lr": 0.1}}
    assert compare_config(saved, other) == [
        "optim.lr: absent -> 0.1",
        "train.epochs: none -> 2.5 (the schedule follows from it; give a new run.dir to train for longer)",
        "train.seed: 0 -> 3",
        "train.steps: 100 -> none (the schedule follows from it; give a new run.dir to train for longer)",
    ]


def test_options_that_may_change_exist() -> None:
    names = {name for name, _, _ in option_table()}
    assert names >= snapshot._MAY_CHANGE | snapshot._LENGTH
    assert {name.rpartition(".")[0] for name in names} >= snapshot._SECTIONS_MAY_CHANGE
