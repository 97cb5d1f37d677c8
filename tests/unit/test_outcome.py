from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from megaclass.train.outcome import exit_code_for_process, forget_outcome, is_under_agent, record_outcome


@pytest.fixture(autouse=True)
def _no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEGACLASS_OUTCOME_DIR", raising=False)


def recorded(folder: Path, name: str = "outcome.json") -> dict[str, object]:
    content: dict[str, object] = json.loads((folder / name).read_text())
    return content


def test_record(tmp_path: Path) -> None:
    record_outcome(tmp_path, 0, 75, "told to stop\nby SIGTERM", 12)
    assert recorded(tmp_path) == {"code": 75, "reason": "told to stop by SIGTERM", "rank": 0, "step": 12}
    assert [path.name for path in tmp_path.iterdir()] == ["outcome.json"]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_the_cause_wins_over_those_who_lost_a_peer(tmp_path: Path, order: tuple[int, ...]) -> None:
    codes = {0: 6, 1: 6, 2: 3}
    for rank in order:
        record_outcome(tmp_path, rank, codes[rank], f"rank {rank}", None)
    assert recorded(tmp_path)["rank"] == 2
    record_outcome(tmp_path, 1, 5, "later", 3)
    assert recorded(tmp_path)["code"] == 3


def test_only_rank_0_tells_of_a_good_end(tmp_path: Path) -> None:
    record_outcome(tmp_path, 1, 0, "done", 5)
    assert list(tmp_path.iterdir()) == []
    record_outcome(tmp_path, 0, 0, "done", 5)
    record_outcome(tmp_path, 3, 1, "AssertionError", 5)
    assert recorded(tmp_path)["rank"] == 3


def test_every_rank_writes_its_own_where_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGACLASS_OUTCOME_DIR", str(tmp_path))
    monkeypatch.setenv("LOCAL_RANK", "3")
    record_outcome(None, 7, 2, "run directory in use", None)
    monkeypatch.setenv("LOCAL_RANK", "1")
    record_outcome(None, 5, 0, "done", 9)
    assert recorded(tmp_path, "rank-3.json") == {"code": 2, "reason": "run directory in use", "rank": 7, "step": None}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rank-1.json", "rank-3.json"]


def test_a_node_that_gets_other_ranks_keeps_no_record_of_the_old_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEGACLASS_OUTCOME_DIR", str(tmp_path))
    monkeypatch.setenv("LOCAL_RANK", "1")
    record_outcome(None, 5, 6, "lost a peer", 3)  # this node was the third
    record_outcome(None, 1, 0, "done", 9)  # and is the first now
    assert [json.loads(path.read_text())["code"] for path in tmp_path.iterdir()] == [0]
    forget_outcome()
    forget_outcome()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.delenv("MEGACLASS_OUTCOME_DIR")
    forget_outcome()


def test_never_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("MEGACLASS_OUTCOME_DIR", str(tmp_path / "missing"))
    record_outcome(tmp_path / "gone", 0, 3, "x", 1)
    assert caplog.text.count("could not be written") == 2
    (tmp_path / "outcome.json").write_text("junk")
    record_outcome(tmp_path, 0, 3, "x", 1)
    assert recorded(tmp_path)["code"] == 3


def test_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = (0, 1, 2, 3, 4, 5, 6, 75, 139)
    assert tuple(exit_code_for_process(code, False) for code in codes) == codes
    assert [exit_code_for_process(code, True) for code in codes] == [0, 1, 0, 0, 0, 0, 6, 0, 139]
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert not is_under_agent()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert is_under_agent()


PARENT = """
    import os, subprocess, sys
    child = "from megaclass.train.outcome import end_agent; end_agent()"
    environment = os.environ | {"LOCAL_RANK": sys.argv[1], "MEGACLASS_OUTCOME_DIR": sys.argv[2]}
    subprocess.run([sys.executable, "-c", child], env=environment, check=True)
    print("still there")
"""


@pytest.mark.parametrize(
    ("local_rank", "folder", "is_ended"), [("0", "mine", True), ("1", "mine", False), ("0", "other", False)]
)
def test_the_first_rank_of_a_node_ends_its_own_agent_and_no_other_parent(
    local_rank: str, folder: str, is_ended: bool
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PARENT), local_rank, folder], capture_output=True, text=True,
        env={**os.environ, "MEGACLASS_OUTCOME_DIR": "mine"},
    )  # fmt: skip
    assert done.returncode == (-signal.SIGTERM if is_ended else 0), done.stderr
    assert done.stdout == ("" if is_ended else "still there\n")
