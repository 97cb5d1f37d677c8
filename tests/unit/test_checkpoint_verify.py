from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from megaclass.checkpoint import find_latest, load, verify, verifying
from megaclass.errors import CheckpointError
from megaclass.parallel.shard import ClassShard
from tests.support.checkpoints import make_snapshot, save_good

FILES = [
    "classes-00000-of-00002.safetensors",
    "classes-00001-of-00002.safetensors",
    "manifest.json",
    "replicated.safetensors",
]


def truncate(keep: Callable[[int], int]) -> Callable[[Path, Path], None]:
    def mutate(file: Path, other: Path) -> None:
        raw = file.read_bytes()
        file.write_bytes(raw[: keep(len(raw))])

    return mutate


def flip(file: Path, other: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[len(raw) * 2 // 3] ^= 4
    file.write_bytes(raw)


def delete(file: Path, other: Path) -> None:
    file.unlink()


def swap(file: Path, other: Path) -> None:
    shutil.copyfile(other, file)


def link(file: Path, other: Path) -> None:
    moved = file.parent.parent / "elsewhere"
    file.rename(moved)
    file.symlink_to(moved)


MUTATIONS = {
    "empty": truncate(lambda size: 0),
    "half": truncate(lambda size: size // 2),
    "one byte less": truncate(lambda size: size - 1),
    "flip": flip,
    "delete": delete,
    "swap": swap,
    "link": link,
}


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("intact")
    for step in (10, 20):
        save_good(directory, 13, step=step)
    return directory


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_damage_is_named_and_passed_over(
    tmp_path: Path, intact: Path, file: str, mutation: str, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "run"
    shutil.copytree(intact, directory)
    newest, older = directory / "step-000000020", directory / "step-000000010"
    MUTATIONS[mutation](newest / file, older / file)
    report = verify(newest).as_dict()
    assert report["ok"] is False
    assert any(file in fault for fault in report["faults"]), report["faults"]
    assert find_latest(directory) == older
    assert file in caplog.text
    assert "falling back" in caplog.text
    for index in range(2):
        shard = ClassShard(13, index, 2)
        needed = file in (FILES[index], "manifest.json", "replicated.safetensors")
        if needed or mutation not in ("flip", "swap"):
            with pytest.raises(CheckpointError, match=file):
                load(newest, shard)


def test_every_single_flipped_bit_of_a_manifest_is_found(tmp_path: Path, intact: Path) -> None:
    path = tmp_path / "step-000000020"
    shutil.copytree(intact / path.name, path)
    raw = (path / "manifest.json").read_bytes()
    random = np.random.Generator(np.random.Philox(0))
    for bit in random.choice(len(raw) * 8, 400, replace=False):
        changed = bytearray(raw)
        changed[bit // 8] ^= 1 << (bit % 8)
        (path / "manifest.json").write_bytes(changed)
        assert not verify(path).ok, bit
        with pytest.raises(CheckpointError, match=r"manifest\.json"):
            load(path, ClassShard(13, 0, 1))


def test_extra_file_and_several_faults_at_once(tmp_path: Path, intact: Path) -> None:
    path = tmp_path / "step-000000020"
    shutil.copytree(intact / path.name, path)
    (path / "extra.pkl").write_bytes(b"x")
    flip(path / FILES[0], path)
    (path / FILES[1]).unlink()
    report = verify(path)
    assert sorted(report.faults) == [
        "classes-00000-of-00002.safetensors is damaged: its SHA-256 is not the one written",
        "classes-00001-of-00002.safetensors is missing",
        "extra.pkl does not belong to the checkpoint",
    ]
    assert report.digest is None
    assert set(report.tensors) == set(make_snapshot(ClassShard(13, 0, 1)).replicated)
    with pytest.raises(CheckpointError, match=r"extra\.pkl does not belong"):
        load(path, ClassShard(13, 0, 2))


def test_folder_of_another_step_is_refused(tmp_path: Path, intact: Path) -> None:
    shutil.copytree(intact / "step-000000010", tmp_path / "step-000000030")
    assert verify(tmp_path / "step-000000030").faults == ["manifest.json is of step 10 (start 1), not of this folder"]
    shutil.copytree(intact / "step-000000010", tmp_path / "my-favourite")
    assert verify(tmp_path / "my-favourite").ok


def test_hashes_are_those_of_the_global_bytes(intact: Path) -> None:
    report = verify(intact / "step-000000010").as_dict()
    snapshot = make_snapshot(ClassShard(13, 0, 1))
    assert list(report) == ["ok", "step", "world_size", "num_classes", "faults", "tensors", "digest"]
    assert (report["ok"], report["step"], report["world_size"], report["num_classes"]) == (True, 10, 2, 13)
    for name, tensor in {**snapshot.replicated, **snapshot.sharded}.items():
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        dtype = str(tensor.dtype).removeprefix("torch.")
        expected = {"shape": list(tensor.shape), "dtype": dtype, "sha256": hashlib.sha256(raw).hexdigest()}
        assert report["tensors"].pop(name) == expected
    assert report["tensors"] == {}
    json.dumps(report)


def test_streaming_in_small_chunks_gives_the_same_hashes(intact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = verify(intact / "step-000000010")
    monkeypatch.setattr(verifying, "_CHUNK_BYTES", 60)
    assert verify(intact / "step-000000010") == whole
