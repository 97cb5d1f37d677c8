from __future__ import annotations

import os
from pathlib import Path

import pytest

from megaclass.checkpoint import find_latest, latest_attempt, listing, newest_name, prune, remove_leftovers
from megaclass.checkpoint.format import FolderName
from megaclass.errors import CheckpointError
from tests.support.checkpoints import save_good


def damage(path: Path) -> None:
    file = path / "replicated.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("step*"))


def test_nothing_there_is_a_new_run(tmp_path: Path) -> None:
    assert find_latest(tmp_path) is None
    assert find_latest(tmp_path / "nowhere") is None
    assert (listing(tmp_path), prune(tmp_path, 2), remove_leftovers(tmp_path / "nowhere")) == ([], [], [])
    assert latest_attempt(tmp_path) == 0
    with pytest.raises(CheckpointError, match="there is no checkpoint in"):
        newest_name(tmp_path)


def test_order_is_by_start_then_step_and_never_by_time(tmp_path: Path) -> None:
    old = save_good(tmp_path, step=300, keep=9)
    save_good(tmp_path, step=100, keep=9, attempt=2)
    new = save_good(tmp_path, step=200, keep=9, attempt=10)
    os.utime(old, (2**31, 2**31))
    (tmp_path / "latest").write_text("step-000000300\n")
    assert find_latest(tmp_path) == new
    assert latest_attempt(tmp_path) == 10
    assert [line.name for line in listing(tmp_path)] == ["step-000000300", "step-000000100-a2", "step-000000200-a10"]


def test_all_damaged_is_an_error_and_not_a_new_start(tmp_path: Path) -> None:
    for step in (1, 2):
        damage(save_good(tmp_path, step=step))
    assert newest_name(tmp_path) == tmp_path / "step-000000002"
    with pytest.raises(CheckpointError, match=r"none of the 2 checkpoints in .* can be used: .*step-000000002: repl"):
        find_latest(tmp_path)


def test_prune_keeps_the_newest_good_and_the_best(tmp_path: Path) -> None:
    for step in range(1, 7):
        save_good(tmp_path, step=step, keep=9, best=step == 1)
    damage(tmp_path / "step-000000005")
    assert [line.is_best for line in listing(tmp_path)] == [True] + [False] * 5
    removed = prune(tmp_path, 2)
    assert [path.name for path in removed] == ["step-000000003", "step-000000002"]
    assert names(tmp_path) == ["step-000000001", "step-000000004", "step-000000005", "step-000000006"]


def test_prune_never_removes_while_too_few_are_good(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_good(tmp_path, step=step, keep=9)
    damage(tmp_path / "step-000000002")
    damage(tmp_path / "step-000000003")
    assert prune(tmp_path, 2) == []
    assert prune(tmp_path, 1) == []
    assert find_latest(tmp_path) == tmp_path / "step-000000001"


def test_saving_over_a_truncated_newest_keeps_the_older_good_one(tmp_path: Path) -> None:
    for step in (1, 2):
        save_good(tmp_path, step=step)
    (tmp_path / "step-000000002" / "manifest.json").write_text("")
    save_good(tmp_path, step=3)
    assert names(tmp_path) == ["step-000000001", "step-000000002", "step-000000003"]


def test_a_best_hint_from_elsewhere_is_only_a_name(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_good(tmp_path, step=step, keep=9)
    (tmp_path / "best").write_text("../../etc\n")
    assert [path.name for path in prune(tmp_path, 2)] == ["step-000000001"]


def test_leftovers_are_never_chosen_and_are_removed(tmp_path: Path) -> None:
    path = save_good(tmp_path)
    (tmp_path / "step-000000099.tmp-1").mkdir()
    (tmp_path / "step-000000099.tmp-1" / "manifest.json").write_text("{}")
    (tmp_path / "latest.tmp-7").write_text("")
    assert find_latest(tmp_path) == path
    assert len(remove_leftovers(tmp_path)) == 2
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-000000010"]


def test_listing_shows_faults_of_size(tmp_path: Path) -> None:
    save_good(tmp_path, step=1)
    (save_good(tmp_path, step=2) / "replicated.safetensors").unlink()
    good, bad = (line.as_dict() for line in listing(tmp_path))
    assert good["fault"] is None
    assert good["world_size"] == 2
    assert good["num_bytes"] > 1000
    assert "replicated.safetensors is missing" in bad["fault"]


def test_names_of_folders() -> None:
    for name in ("step-000000010", "step-000000010-a2", "step-1234567890-a12"):
        assert str(FolderName.parse(name)) == name
    for name in (
        "step-10",
        "step-000000010-a1",
        "step-000000010-a0",
        "step-0000000010",
        "step-000000010.tmp-1",
        "latest",
    ):
        assert FolderName.parse(name) is None
