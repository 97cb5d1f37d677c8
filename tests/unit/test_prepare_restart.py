"""Conversions in several processes, and interrupted ones: the same bytes as in one go and one process."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megaclass.cli import main
from megaclass.errors import ConfigError, DataError
from megaclass.prepare import writer as writer_module
from megaclass.prepare.copying import copy_dataset
from megaclass.prepare.images import import_images
from megaclass.prepare.import_list import import_list
from megaclass.prepare.import_records import import_records
from megaclass.prepare.report import PreparationReport
from megaclass.prepare.unfinished import MARKER, Unfinished
from megaclass.prepare.verification_bin import import_pairs
from megaclass.prepare.verify import verify
from tests.unit.test_prepare_images import make_folder, make_zip, picture
from tests.unit.test_prepare_recordio import headed, write

NUM_IMAGES = 65
FILES = {
    f"class {number % 13:02d}/{number:03d}.{'jpg' if number % 3 else 'png'}": picture(
        number * 3, "RGB" if number % 4 == 0 else "L", "JPEG" if number % 3 else "PNG"
    )
    for number in range(NUM_IMAGES)
}
OPTIONS: dict[str, Any] = {"samples_per_shard": 7, "unseen_classes": 3, "image_size": 8}


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("root") / "images", FILES)


@pytest.fixture(scope="module")
def whole(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an uninterrupted conversion in one process writes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    import_images(root, out, **OPTIONS)
    assert verify(out).ok
    return content(out)


@pytest.mark.parametrize("is_zip", [False, True])
@pytest.mark.parametrize("turns", [False, True])
def test_more_processes_change_no_byte_of_images(is_zip: bool, turns: bool, tmp_path: Path) -> None:
    root = make_zip(tmp_path / "all.zip", FILES) if is_zip else make_folder(tmp_path / "all", FILES)
    made = []
    for jobs in (1, 2, 5):
        report = import_images(root, tmp_path / f"out-{jobs}", **OPTIONS, jobs=jobs, quarter_turns=turns)
        assert report.num_read == report.num_stored == (50 * 4 + 15 if turns else 65)
        made.append(content(tmp_path / f"out-{jobs}"))
    assert made[0] == made[1] == made[2]


def test_more_processes_change_no_byte_of_other_sources(root: Path, tmp_path: Path) -> None:
    images = list(FILES.values())
    (tmp_path / "all.csv").write_text("".join(f"{name},{number % 4}\n" for number, name in enumerate(FILES)))
    records = write(tmp_path / "records", [headed(float(number % 5), number, im) for number, im in enumerate(images)])
    (tmp_path / "lfw.bin").write_bytes(pickle.dumps((images[:64], [True, False] * 16)))
    made = []
    for jobs in (1, 3):
        out = tmp_path / f"out-{jobs}"
        import_list(tmp_path / "all.csv", root, out / "list", samples_per_shard=20, jobs=jobs)
        import_records(records, out / "records", samples_per_shard=20, jobs=jobs)
        import_pairs([tmp_path / "lfw.bin"], out / "bin", samples_per_shard=20, jobs=jobs)
        made.append({kind: content(out / kind) for kind in ("list", "records", "bin")})
    assert made[0] == made[1]


@pytest.mark.parametrize("jobs", [1, 3])
def test_the_first_bad_image_in_order_is_the_one_named(jobs: int, tmp_path: Path) -> None:
    bad = {f"class 0{number % 7}/bad {number}.png": b"no image" for number in range(9)}
    root = make_folder(tmp_path / "all", FILES | bad)
    with pytest.raises(DataError, match=r"image class 06/bad 6.png cannot be read: not a PNG.*--on-bad skip"):
        import_images(root, tmp_path / "out", jobs=jobs)
    report = import_images(root, tmp_path / "out", on_bad="skip", jobs=jobs)
    assert report.counts["images left out as unreadable"] == 9
    assert "  counted: 74 read, 65 stored, 9 left out; the indexes of 1 shards hold 65" in report.text()
    assert report.as_dict()["num_read"] == 74


DIE = """
import os, signal, sys
from pathlib import Path
from megaclass.prepare import unfinished, writer
from megaclass.prepare.images import import_images
from tests.unit.test_prepare_restart import OPTIONS

owner, name, when, count = sys.argv[3], sys.argv[4], sys.argv[5], int(sys.argv[6])
holder = {"shard": writer._Shard, "unfinished": unfinished.Unfinished, "os": os}[owner]
original, calls = getattr(holder, name), 0

def dying(*arguments, **options):
    global calls
    calls += 1
    if calls == count and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    result = original(*arguments, **options)
    if calls == count and when == "after":
        os.kill(os.getpid(), signal.SIGKILL)
    return result

setattr(holder, name, dying)
if __name__ == "__main__":
    import_images(Path(sys.argv[1]), Path(sys.argv[2]), **OPTIONS, jobs=int(sys.argv[7]))
"""


def die(root: Path, out: Path, point: tuple[str, str, str, int], jobs: int = 1) -> None:
    script = out.parent / "die.py"
    script.write_text(DIE)
    ended = subprocess.run(
        [sys.executable, script, root, out, *map(str, point), str(jobs)], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}, timeout=120,
    )  # fmt: skip
    assert ended.returncode == -signal.SIGKILL, ended.stderr


@pytest.mark.parametrize(
    ("point", "num_continued"),
    [
        (("shard", "add", "before", 3), 0),
        (("shard", "add", "after", 30), 4),
        (("unfinished", "add", "before", 3), 2),
        (("unfinished", "add", "after", 3), 3),
        (("unfinished", "add", "after", 8), 8),  # the first split is complete
        (("unfinished", "add", "after", 9), 9),
        (("os", "replace", "before", 1), 11),
    ],
)
def test_killed_and_started_again_it_writes_the_same_bytes(
    point: tuple[str, str, str, int], num_continued: int, root: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    die(root, out, point, jobs=2 if num_continued == 4 else 1)
    assert not (out / "dataset.json").exists()
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    report = import_images(root, out, **OPTIONS, jobs=2 if num_continued == 2 else 1)
    assert report.num_continued == num_continued
    assert content(out) == whole
    same = [path.name for path in out.glob("*.tar") if kept.get(path.name) == path.stat().st_mtime_ns]
    assert len(same) == num_continued
    said = f"continued: {num_continued:,} shards were complete"
    assert (said in report.text()) == bool(num_continued)


def test_killed_behind_the_manifest_the_data_set_is_finished(
    root: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    die(root, tmp_path / "out", ("os", "replace", "after", 1))
    assert verify(tmp_path / "out").ok
    with pytest.raises(ConfigError, match="already holds a data set"):
        import_images(root, tmp_path / "out", **OPTIONS)
    report = import_images(root, tmp_path / "out", **OPTIONS, overwrite=True)
    assert report.num_continued == 0
    assert content(tmp_path / "out") == whole


class Stop(BaseException):
    """An interruption."""


def interrupt(monkeypatch: pytest.MonkeyPatch, root: Path, out: Path, after: int, **options: Any) -> None:
    """Begin a conversion and end it after so many samples."""
    original, calls = writer_module._Shard.add, 0

    def add(self: Any, *arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > after:
            raise Stop
        original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(writer_module._Shard, "add", add)
        with pytest.raises(Stop):
            import_images(root, out, **(OPTIONS | options))


@pytest.fixture
def cut(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with three complete shards and a half one."""
    interrupt(monkeypatch, root, tmp_path / "out", 25)
    return tmp_path / "out"


def test_a_marker_cut_off_anywhere_is_understood(
    cut: Path, root: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    marker = (cut / MARKER).read_bytes()
    ends = [place + 1 for place, byte in enumerate(marker) if byte == ord("\n")]
    assert len(ends) == 4
    for length in sorted({0, 1, *ends, *(end - 1 for end in ends), *(end + 1 for end in ends[:-1]), ends[2] + 40}):
        out = tmp_path / f"out-{length}"
        shutil.copytree(cut, out)
        os.truncate(out / MARKER, length)
        report = import_images(root, out, **OPTIONS)
        assert report.num_continued == max(0, sum(end <= length for end in ends) - 1), length
        assert content(out) == whole, length


@pytest.mark.parametrize(
    ("name", "num_continued"),
    [("train-000001.tar", 1), ("train-000000.index.npy", 0), ("train-000002.tar", 2), ("train.classes.json", 3)],
)
@pytest.mark.parametrize("is_gone", [False, True])
def test_a_shard_that_was_spoiled_since_is_written_again(
    name: str, num_continued: int, is_gone: bool, cut: Path, root: Path, whole: dict[str, bytes]
) -> None:
    if is_gone:
        (cut / name).unlink()
    else:
        spoiled = bytearray((cut / name).read_bytes())
        spoiled[len(spoiled) // 2] ^= 1
        (cut / name).write_bytes(spoiled)
    assert import_images(root, cut, **OPTIONS).num_continued == num_continued
    assert content(cut) == whole


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"image_size": 9}, "image-size was 8, now 9"),
        ({"samples_per_shard": 8}, "samples-per-shard was 7, now 8"),
        ({"image_mode": "L", "name": "other"}, "image-mode was None, now L, name was images, now other"),
        ({"encoding": "jpg"}, "encoding was png, now jpg"),
        ({"unseen_classes": 2}, "plan-of-train differ, plan-of-unseen differ"),
    ],
)
def test_another_command_does_not_continue(
    options: dict[str, Any], said: str, cut: Path, root: Path, whole: dict[str, bytes]
) -> None:
    before = content(cut)
    with pytest.raises(ConfigError) as raised:
        import_images(root, cut, **(OPTIONS | options))
    assert str(raised.value).endswith(
        f"holds an unfinished data set, 3 of its shards complete, that was begun otherwise: {said}; run the same "
        "command again to continue it, or give --overwrite to begin anew"
    )
    assert content(cut) == before
    report = import_images(root, cut, **(OPTIONS | options), overwrite=True)
    assert report.num_continued == 0
    assert report.warnings[0] == f"an unfinished data set of 3 complete shards was discarded: {said}"
    assert verify(cut).ok


def test_changed_inputs_do_not_continue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_folder(tmp_path / "images", FILES)
    interrupt(monkeypatch, root, tmp_path / "out", 25)
    (root / "class 03" / "003.png").write_bytes(picture(99))
    with pytest.raises(ConfigError, match="that was begun otherwise: inputs differ; run the same"):
        import_images(root, tmp_path / "out", **OPTIONS)


def test_overwriting_can_be_continued_as_well(
    cut: Path, root: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    import_images(root, cut, **(OPTIONS | {"image_size": 9}), overwrite=True)
    interrupt(monkeypatch, root, cut, 25, overwrite=True)
    assert import_images(root, cut, **OPTIONS, overwrite=True).num_continued == 3
    assert content(cut) == whole


def test_after_a_bad_image_it_goes_on_with_skip_but_not_the_other_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_folder(tmp_path / "images", FILES | {"class 05/bad.png": b"no image"})
    for out in ("out", "whole"):
        with pytest.raises(DataError, match=r"class 05/bad\.png cannot be read"):
            import_images(root, tmp_path / out, **OPTIONS)
    shutil.rmtree(tmp_path / "whole")
    reports: list[PreparationReport] = []
    for out in ("out", "whole"):
        reports.append(import_images(root, tmp_path / out, **OPTIONS, on_bad="skip"))
        assert reports[-1].counts["images left out as unreadable"] == 1
    assert reports[0].num_continued > 0
    assert content(tmp_path / "out") == content(tmp_path / "whole")

    interrupt(monkeypatch, root, tmp_path / "new", 60, on_bad="skip")
    with pytest.raises(ConfigError, match="begun otherwise: it left images out, and on-bad is stop; run the same"):
        import_images(root, tmp_path / "new", **OPTIONS)
    report = import_images(root, tmp_path / "new", **OPTIONS, on_bad="skip")
    assert report.num_continued > 0
    assert report.counts["images left out as unreadable"] == 1
    assert report.warnings == reports[0].warnings
    assert content(tmp_path / "new") == content(tmp_path / "whole")


def test_two_cannot_write_at_the_same_time(cut: Path, root: Path, tmp_path: Path) -> None:
    holder = Unfinished(cut, None, may_leave_out=True, is_fresh=False, overwrite=False)
    with pytest.raises(ConfigError, match=r"out is being written by another process; wait until it has ended, or give"):
        import_images(root, cut, **OPTIONS)
    holder.release()
    holder.release()
    import_images(root, cut, **OPTIONS)


def test_copies_continue(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import_images(root, tmp_path / "set", **OPTIONS)
    copy_dataset(tmp_path / "set", tmp_path / "whole", samples_per_shard=10)
    original = writer_module._Shard.close

    def close(self: Any) -> Any:
        made = original(self)
        if made.file == "train-000002.tar":
            raise Stop
        return made

    with monkeypatch.context() as patch:
        patch.setattr(writer_module._Shard, "close", close)
        with pytest.raises(Stop):
            copy_dataset(tmp_path / "set", tmp_path / "copy", samples_per_shard=10)
    assert copy_dataset(tmp_path / "set", tmp_path / "copy", samples_per_shard=10).num_continued == 2
    assert content(tmp_path / "copy") == content(tmp_path / "whole")


def test_jobs_of_the_command_are_the_cores_unless_given(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, bytes]
) -> None:
    seen: list[int] = []

    def in_order(work: Any, items: Any, jobs: int) -> Any:
        seen.append(jobs)
        return (work(item) for item in items)

    monkeypatch.setattr("megaclass.prepare.storing.in_order", in_order)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    given = ["--samples-per-shard", "7", "--unseen-classes", "3", "--image-size", "8"]
    for name, jobs in (("a", []), ("b", ["--jobs", "5"])):
        assert main(["data", "images", str(root), "--out", str(tmp_path / name), *given, *jobs]) == 0
        assert content(tmp_path / name) == whole
    assert seen == [3, 3, 5, 5]
    assert main(["data", "images", str(root), "--out", str(tmp_path / "c"), "--jobs", "0"]) == 2
