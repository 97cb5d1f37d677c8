from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megaclass.checkpoint import files, find_latest, load, remove_leftovers, save, saving, verify
from megaclass.errors import CheckpointError, PeerError
from megaclass.parallel.shard import ClassShard
from tests.support.checkpoints import ALONE, assert_same, make_snapshot, make_worlds, on_threads, save_good, save_on


def contents(directory: Path) -> dict[str, bytes]:
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


@pytest.fixture
def full_disk_of_rank(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make writing the file of one rank fail as on a full disk, after half of it has been written."""

    def install(file: str) -> None:
        original = files.write_tensors

        def write(path: Path, tensors: dict[str, torch.Tensor]) -> Any:
            if path.name == file:
                path.write_bytes(b"half")
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(path, tensors)

        monkeypatch.setattr(saving, "write_tensors", write)

    return install


@pytest.mark.parametrize("failing", [0, 2])
def test_full_disk_of_one_rank_fails_all_alike_and_touches_nothing(
    tmp_path: Path, full_disk_of_rank: Any, failing: int
) -> None:
    worlds = make_worlds(4)
    assert save_on(worlds, tmp_path, 13) == [tmp_path / "step-000000010"] * 4
    before = contents(tmp_path)
    full_disk_of_rank(f"classes-{failing:05d}-of-00004.safetensors")
    results = save_on(worlds, tmp_path, 13, step=20)
    assert {type(result) for result in results} == {CheckpointError}
    assert len({str(result) for result in results}) == 1
    assert str(results[0]).startswith(
        f"checkpoint of step 20 failed: rank {failing}: classes-{failing:05d}-of-00004.safetensors: No space left on "
        "device (needs 0.0 MiB, "
    )
    assert f"MiB free in {tmp_path}); earlier checkpoints are as they were" in str(results[0])
    assert contents(tmp_path) == before
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-000000010"]


def test_same_step_can_be_saved_after_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worlds = make_worlds(3)
    with monkeypatch.context() as patch:
        patch.setattr(saving, "encode", lambda manifest: (_ for _ in ()).throw(OSError(errno.EIO, "bad")))
        results = save_on(worlds, tmp_path, 13)
        assert all("rank 0: manifest.json: bad" in str(result) for result in results), results
        assert list(tmp_path.iterdir()) == []
    assert save_on(worlds, tmp_path, 13) == [tmp_path / "step-000000010"] * 3
    assert verify(tmp_path / "step-000000010").ok


def test_real_limit_of_the_file_size(tmp_path: Path) -> None:
    save_good(tmp_path, 13, size=1)
    before = contents(tmp_path)
    shard = ClassShard(10_007, 0, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"step 20 failed: rank 0: classes-00000-of-00001.*File too large"):
            save(tmp_path, make_snapshot(shard, 20), shard, ALONE, keep=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(tmp_path) == before


def test_unwritable_folder_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    results = save_on(make_worlds(2), tmp_path / "file", 13)
    assert all(isinstance(result, CheckpointError) for result in results), results
    assert "rank 0: file: File exists" in str(results[1])


def test_error_of_our_own_on_one_rank_reaches_all(tmp_path: Path) -> None:
    def run(world: Any) -> None:
        shard = ClassShard(13, world.rank, 3)
        snapshot = make_snapshot(shard)
        if world.rank == 1:
            snapshot.sharded["class.weight"] = snapshot.sharded["class.weight"][:1]
        save(tmp_path, snapshot, shard, world, keep=2, timeout_seconds=20)

    results = on_threads(make_worlds(3), run)
    assert all("rank 1: classes-00001-of-00003.safetensors" in str(result) for result in results), results
    assert list(tmp_path.iterdir()) == []


def test_rank_that_dies_is_a_peer_error_on_the_others(tmp_path: Path) -> None:
    def run(world: Any) -> None:
        if world.rank != 1:
            shard = ClassShard(13, world.rank, 3)
            save(tmp_path, make_snapshot(shard), shard, world, keep=2, timeout_seconds=0.3 if world.is_main else 5)

    results = on_threads(make_worlds(3), run)
    assert isinstance(results[0], PeerError)
    assert isinstance(results[2], PeerError)
    assert "checkpoint of step 10 failed: rank 0 waited" in str(results[2])
    assert list(tmp_path.iterdir()) == []


def test_interrupted_at_any_point_leaves_the_old_or_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state of the disk is copied before every call that changes it: what a kill at that moment would leave."""
    directory = tmp_path / "run"
    worlds = make_worlds(1)
    for step in (1, 2):
        save_on(worlds, directory, 13, step=step)
    states: list[Path] = []
    copying: list[bool] = []

    def watch(patch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if not copying:
                copying.append(True)
                states.append(tmp_path / f"state-{len(states)}")
                shutil.copytree(directory, states[-1], copy_function=shutil.copyfile)
                copying.clear()
            return original(*args, **kwargs)

        patch.setattr(owner, name, call)

    with monkeypatch.context() as patch:
        for owner, name in ((os, "fsync"), (os, "replace"), (os, "mkdir"), (os, "rmdir"), (os, "unlink")):
            watch(patch, owner, name)
        for name in ("rename", "chmod", "mkdir"):
            watch(patch, Path, name)
        watch(patch, files, "save_file")
        assert save_on(worlds, directory, 13, step=3) == [directory / "step-000000003"]
    assert len(states) >= 20
    found = set()
    shard = ClassShard(13, 0, 1)
    for state in states:
        latest = find_latest(state)
        assert latest is not None
        step = int(latest.name[5:])
        found.add(step)
        assert_same(load(latest, shard), make_snapshot(shard, step))
        remove_leftovers(state)
        again = save_good(state, 13, size=1, step=3, attempt=2)
        assert find_latest(state) == again
        assert not list(state.glob("*.tmp-*"))
    assert found == {2, 3}


def test_killed_while_writing(tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import os, signal, sys
        from pathlib import Path
        from megaclass.parallel.shard import ClassShard
        from megaclass.checkpoint import saving
        from megaclass.checkpoint import save
        from tests.support.checkpoints import ALONE, make_snapshot
        shard, directory = ClassShard(13, 0, 1), Path(sys.argv[1])
        save(directory, make_snapshot(shard, 1), shard, ALONE, keep=2)
        saving.encode = lambda manifest: os.kill(os.getpid(), signal.SIGKILL)
        save(directory, make_snapshot(shard, 2), shard, ALONE, keep=2)
        """
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert [path.name for path in tmp_path.glob("*.tmp-*")] == ["step-000000002.tmp-1"]
    assert find_latest(tmp_path) == tmp_path / "step-000000001"
    assert remove_leftovers(tmp_path) == [tmp_path / "step-000000002.tmp-1"]
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-000000001"]


def test_a_name_is_never_used_twice(tmp_path: Path) -> None:
    first = save_good(tmp_path)
    before = contents(first)
    results = save_on(make_worlds(2), tmp_path, 13)
    assert all("exists already and is never overwritten" in str(result) for result in results), results
    assert contents(first) == before
    second = save_good(tmp_path, attempt=2)
    assert second.name == "step-000000010-a2"
    assert find_latest(tmp_path) == second


def test_many_saves_through_a_tcp_store(tmp_path: Path) -> None:
    store = dist.PrefixStore("megaclass", dist.TCPStore("127.0.0.1", 0, is_master=True))
    worlds = make_worlds(2, store)
    for step in range(1, 6):
        assert save_on(worlds, tmp_path, 13, step=step, best=step == 2)[1].name == f"step-{step:09d}"
    assert (tmp_path / "latest").read_text() == "step-000000005\n"
    assert (tmp_path / "best").read_text() == "step-000000002\n"
    assert sorted(path.name for path in tmp_path.glob("step*")) == [f"step-{step:09d}" for step in (2, 4, 5)]


def test_failure_of_the_hint_is_only_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(saving, "write_hint", fail)
    path = save_good(tmp_path)
    assert find_latest(tmp_path) == path
    assert "is saved, but its folder could not be tidied" in caplog.text
