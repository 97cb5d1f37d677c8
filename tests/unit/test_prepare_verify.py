"""Verification: a sound set has no fault, and every kind of damage is named, all at once."""

from __future__ import annotations

import io
import json
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from megaclass.data.manifest import INDEX_DTYPE
from megaclass.prepare.digest import file_sha256
from megaclass.prepare.encode import encode_array, one_by_one
from megaclass.prepare.verify import verify
from megaclass.prepare.writer import DatasetWriter, SplitPlan

NUM_CLASSES, PER_CLASS = 13, 3
TAR, INDEX = "train-000000.tar", "train-000000.index.npy"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    labels = np.repeat(np.arange(NUM_CLASSES), PER_CLASS)
    plan = SplitPlan(
        names=[f"{number:02d}" for number in range(NUM_CLASSES)],
        groups=None,
        source_names=["a", "b"],
        labels=labels,
        sources=np.zeros(len(labels), dtype=np.int32),
        images=one_by_one(lambda number: encode_array(np.full((9, 7), number, dtype=np.uint8))),
    )
    with DatasetWriter(tmp_path / "set", "tiny", samples_per_shard=20) as writer:
        writer.write_split("train", plan)
        writer.finish()
    return tmp_path / "set"


def edit_manifest(folder: Path, change: Callable[[dict], None]) -> None:
    content = json.loads((folder / "dataset.json").read_text())
    change(content["splits"]["train"])
    (folder / "dataset.json").write_text(json.dumps(content))


def seal(folder: Path) -> None:
    """Make sizes and hashes of the manifest fit what lies in the folder: only deeper faults are left."""

    def change(split: dict) -> None:
        split["classes_sha256"] = file_sha256(folder / split["classes"])
        for shard in split["shards"]:
            shard["num_bytes"] = (folder / shard["file"]).stat().st_size
            shard["sha256"] = file_sha256(folder / shard["file"])
            shard["index_sha256"] = file_sha256(folder / shard["index"])

    edit_manifest(folder, change)


def patch(folder: Path, offset: int, data: bytes) -> None:
    content = bytearray((folder / TAR).read_bytes())
    content[offset : offset + len(data)] = data
    (folder / TAR).write_bytes(content)
    seal(folder)


def rewrite(folder: Path, members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    with tarfile.open(folder / TAR, "w", format=tarfile.GNU_FORMAT) as tar:
        for info, data in members:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    seal(folder)


def members_of(folder: Path) -> list[tuple[tarfile.TarInfo, bytes]]:
    with tarfile.open(folder / TAR) as tar:
        return [(info, tar.extractfile(info).read()) for info in tar.getmembers()]  # type: ignore[union-attr]


def change_index(folder: Path, change: Callable[[np.ndarray], np.ndarray | None]) -> None:
    records = np.load(folder / INDEX)
    result = change(records)
    np.save(folder / INDEX, records if result is None else result)
    seal(folder)


def faults_of(folder: Path) -> str:
    report = verify(folder)
    assert not report.ok
    return "\n".join(report.faults)


def test_a_sound_set(folder: Path) -> None:
    calls: list[tuple[int, int]] = []
    report = verify(folder, lambda done, total: calls.append((done, total)))
    assert report.ok
    assert report.warnings == []
    counts = {"num_classes": 13, "num_samples": 39, "num_shards": 2, "num_classes_without_samples": 0}
    assert report.as_dict() == {
        "folder": str(folder),
        "ok": True,
        "faults": [],
        "warnings": [],
        "splits": {"train": counts},
    }
    assert report.text() == f"{folder}: sound\n  train: 13 classes, 39 samples, 2 shards"
    assert calls[-1] == (39, 39)


def test_missing_manifest_and_folder(tmp_path: Path) -> None:
    assert "is missing" in faults_of(tmp_path)
    assert "does not exist" in faults_of(tmp_path / "none")


def test_many_faults_at_once(folder: Path) -> None:
    (folder / "train-000001.tar").unlink()
    (folder / "train-000007.tar").write_bytes(b"")
    (folder / "train.classes.json").write_text('{"names": ["a"]}')
    data = (folder / TAR).read_bytes()
    (folder / TAR).write_bytes(data[: len(data) // 2])
    edit_manifest(folder, lambda split: split.update(num_samples=50))
    faults = faults_of(folder)
    for expected in (
        "train-000001.tar: missing",
        "train-000007.tar: extra file that dataset.json does not list",
        "train.classes.json has 1 names for 13 classes",
        "train-000000.tar: has ",
        "train-000000.tar: truncated at byte ",
        " samples but dataset.json says 20",
        "train.classes.json: SHA-256 differs from dataset.json",
        "split train has 50 samples but its shards add up to 39",
    ):
        assert expected in faults
    assert verify(folder).text().startswith(f"{folder}: ")


def test_hashes(folder: Path) -> None:
    edit_manifest(folder, lambda split: split.update(classes_sha256="0" * 64))
    edit_manifest(folder, lambda split: split["shards"][0].update(sha256="0" * 64, index_sha256="1" * 64))
    assert verify(folder).faults == [
        "train.classes.json: SHA-256 differs from dataset.json",
        f"{INDEX}: SHA-256 differs from dataset.json",
        f"{TAR}: SHA-256 differs from dataset.json",
    ]


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("offset", 512, "byte range is not where the sample is: sample 000000003 is at"),
        ("length", 1024, "byte range is not where the sample is"),
        ("label", 12, "label differs from the tar's: sample 000000003 has"),
        ("source", 2, "source outside [-1, 2): sample 000000003 has source 2"),
    ],
)
def test_wrong_records(folder: Path, field: str, value: int, expected: str) -> None:
    def change(records: np.ndarray) -> None:
        records[field][3] = value

    change_index(folder, change)
    faults = verify(folder).faults
    assert len(faults) == 1
    assert faults[0].startswith(f"{INDEX}: {expected}")


def test_index_of_wrong_length_type_or_content(folder: Path) -> None:
    change_index(folder, lambda records: records[:-1])
    faults = faults_of(folder)
    assert f"{INDEX}: lists 19 samples but dataset.json says 20" in faults
    assert f"{TAR}: holds 20 samples but its index lists 19" in faults
    change_index(folder, lambda records: records["label"].copy())
    assert f"{INDEX}: cannot be read: its header does not declare what its bytes are" in faults_of(folder)
    np.save(folder / INDEX, np.array([{}], dtype=object), allow_pickle=True)
    seal(folder)
    assert f"{INDEX}: cannot be read" in faults_of(folder)
    header = {"descr": INDEX_DTYPE.descr, "fortran_order": False, "shape": (10**14,)}
    with (folder / INDEX).open("wb") as stream:
        np.lib.format.write_array_header_1_0(stream, header)
    seal(folder)
    assert f"{INDEX}: cannot be read" in faults_of(folder)
    (folder / INDEX).unlink()
    assert f"{INDEX}: missing" in faults_of(folder)


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        (13, "label outside [0, 13): sample 000000000 has 13"),
        (-1, "label outside [0, 13): sample 000000000 has -1"),
        (2**62, "label outside [0, 13): sample 000000000 has 4611686018427387904"),
    ],
)
def test_labels_out_of_range(folder: Path, label: int, expected: str) -> None:
    members = members_of(folder)
    members[1] = (members[1][0], label.to_bytes(8, "little", signed=True))
    rewrite(folder, members)
    faults = faults_of(folder)
    assert f"{TAR}: {expected}" in faults
    assert f"{INDEX}: label differs from the tar's: sample 000000000 has {label}" in faults


def test_missing_and_malformed_labels_and_images(folder: Path) -> None:
    members = members_of(folder)
    members[3] = (members[3][0], b"7")
    members[4] = (members[4][0], members[4][1][:-30])
    members[6] = (members[6][0], b"no image")
    del members[9]
    rewrite(folder, members)
    faults = faults_of(folder)
    assert f"{TAR}: label is not 8 bytes: sample 000000001 has 1" in faults
    assert f"{TAR}: unreadable image: 000000002.png: " in faults
    assert f"{TAR}: unreadable image: 000000003.png: not a PNG image" in faults
    assert f"{TAR}: label missing: sample 000000004" in faults
    assert f"{TAR}: sample is not KEY.png or KEY.jpg, then KEY.label: 000000004 has png" in faults


def test_label_before_image(folder: Path) -> None:
    members = members_of(folder)
    members[0], members[1] = members[1], members[0]
    rewrite(folder, members)
    assert "then KEY.label: 000000000 has label, png" in faults_of(folder)


def test_duplicate_keys(folder: Path) -> None:
    members = members_of(folder)
    rewrite(folder, members + members[:2])
    faults = faults_of(folder)
    assert f"{TAR}: duplicate key: 000000000" in faults
    assert f"{TAR}: holds 21 samples but dataset.json says 20" in faults


def test_image_mode(folder: Path) -> None:
    content = json.loads((folder / "dataset.json").read_text())
    content["image_mode"] = "RGB"
    (folder / "dataset.json").write_text(json.dumps(content))
    assert verify(folder).ok
    members = members_of(folder)
    members[0] = (members[0][0], encode_array(np.zeros((4, 4, 3), dtype=np.uint8)).data)
    rewrite(folder, members)
    content["image_mode"] = "L"
    (folder / "dataset.json").write_text(json.dumps(content))
    seal(folder)
    assert f"{TAR}: image mode does not fit L: 000000000.png is RGB" in faults_of(folder)


@pytest.mark.parametrize(
    ("kind", "name", "expected"),
    [
        (tarfile.SYMTYPE, "x.png", "member 'x.png' at byte 0 is no regular file (type b'2')"),
        (tarfile.LNKTYPE, "x.png", "is no regular file"),
        (tarfile.CHRTYPE, "x.png", "is no regular file"),
        (tarfile.FIFOTYPE, "x.png", "is no regular file"),
        (tarfile.DIRTYPE, "x", "is no regular file"),
        (tarfile.REGTYPE, "../x.png", "member '../x.png' at byte 0 has a name with folders"),
        (tarfile.REGTYPE, "/etc/x.png", "has a name with folders"),
        (tarfile.REGTYPE, "y" * 150, "is no regular file (type b'L')"),
    ],
)
def test_links_devices_and_paths(folder: Path, kind: bytes, name: str, expected: str) -> None:
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = "/etc/passwd" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
    rewrite(folder, [(info, b""), *members_of(folder)])
    assert expected in faults_of(folder)


def header(size_field: bytes) -> bytes:
    block = bytearray(tarfile.TarInfo("000000000.png").tobuf(tarfile.USTAR_FORMAT))
    block[124:136] = size_field
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize(
    ("size_field", "expected"),
    [
        ((-512 + 256**12).to_bytes(12, "big"), "declares -512 bytes, which leaves the file"),
        ((-(2**60) + 256**12).to_bytes(12, "big"), "which leaves the file"),
        (b"\x80" + (2**70).to_bytes(11, "big"), "which leaves the file"),
        (b"77777777777\0", "declares 8589934591 bytes, which leaves the file"),
        (b"zzzzzzzzzzz\0", "damaged header at byte 0"),
    ],
)
def test_sizes_that_would_spin_or_leave_the_file(folder: Path, size_field: bytes, expected: str) -> None:
    started = time.monotonic()
    patch(folder, 0, header(size_field))
    assert expected in faults_of(folder)
    assert time.monotonic() - started < 5


def test_a_smashed_header_in_the_middle(folder: Path) -> None:
    patch(folder, int(np.load(folder / INDEX)["offset"][10]), b"\xaa" * 512)
    faults = faults_of(folder)
    assert "damaged header at byte" in faults
    assert "holds 10 samples but dataset.json says 20" in faults


def test_something_after_the_end_mark(folder: Path) -> None:
    size = (folder / TAR).stat().st_size
    patch(folder, size, b"hidden")
    assert f"{TAR}: bytes after the end mark" in faults_of(folder)


def test_files_that_are_no_files(folder: Path) -> None:
    (folder / TAR).unlink()
    (folder / TAR).mkdir()
    assert f"{TAR}: missing" in faults_of(folder)
    edit_manifest(folder, lambda split: split["shards"][0].update(file="same", index="same"))
    assert "same: missing" in faults_of(folder)
    assert "dataset.json: same is listed 2 times" in faults_of(folder)
    edit_manifest(folder, lambda split: split["shards"][0].update(file="..", index=".."))
    assert "splits.train.shards.0.file" in faults_of(folder)


def test_long_lists_are_cut_with_a_count(folder: Path) -> None:
    def change(split: dict) -> None:
        split["num_classes"] = 0
        for shard in split["shards"]:
            shard["num_samples"] = 39

    edit_manifest(folder, change)
    (folder / "train-000001.tar").unlink()
    rewritten = members_of(folder)
    rewrite_members = [
        (tarfile.TarInfo(f"{number:09d}.{info.name[10:]}"), data)
        for number in range(2)
        for info, data in rewritten
        for number in (number * 100 + int(info.name[:9]),)
    ]
    with tarfile.open(folder / TAR, "w") as tar:
        for info, data in rewrite_members:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    faults = verify(folder).faults
    listed = [fault for fault in faults if "label outside [0, 0)" in fault]
    assert len(listed) == 21
    assert listed[-1] == f"{TAR}: label outside [0, 0): 20 more like these"


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damage_anywhere_is_found_and_never_raises(folder: Path, draw: st.DataObject) -> None:
    name = draw.draw(st.sampled_from([TAR, INDEX, "train.classes.json", "dataset.json"]))
    original = (folder / name).read_bytes()
    data = bytearray(original)
    for _ in range(3):
        data[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    (folder / name).write_bytes(data)
    try:
        report = verify(folder)
        assert report.ok == (bytes(data) == original) or name == "dataset.json"
        assert report.text()
    finally:
        (folder / name).write_bytes(original)


def test_what_the_readers_refuse_is_a_fault(folder: Path) -> None:
    """Pillow reads an animation's first frame, and on over damage that other decoders stop at; training would stop."""
    members = members_of(folder)
    first, second = (Image.fromarray(np.full((9, 7), value, np.uint8)) for value in (1, 2))
    stream = io.BytesIO()
    first.save(stream, "PNG", save_all=True, append_images=[second])
    members[0] = (members[0][0], stream.getvalue())
    stream = io.BytesIO()
    Image.fromarray(np.arange(63, dtype=np.uint8).reshape(9, 7)).save(stream, "JPEG")
    damaged = stream.getvalue()
    damaged = damaged[:11] + b"\x55" + damaged[11:]
    name = members[2][0].name.replace(".png", ".jpg")
    members[2] = (tarfile.TarInfo(name), damaged)
    rewrite(folder, members)
    told = faults_of(folder)
    assert f"{TAR}: the readers refuse an image: {members[0][0].name}: animated PNG" in told
    assert f"{TAR}: the readers refuse an image: {name}: JPEG does not decode: " in told


@pytest.mark.parametrize("size", [b"+0000000010\0", b"1_0\0\0\0\0\0\0\0\0\0", b"\x80" + bytes(10) + b"\x08"])
def test_a_size_that_only_tarfile_understands_is_a_fault(folder: Path, size: bytes) -> None:
    """All of them mean eight bytes to `tarfile`, and nothing to the readers."""
    members = members_of(folder)
    place = 512 + -(-len(members[0][1]) // 512) * 512
    header = bytearray((folder / TAR).read_bytes()[place : place + 512])
    header[124:136] = size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    patch(folder, place, bytes(header))
    assert f"damaged header at byte {place}: member '{members[1][0].name}' has size field" in faults_of(folder)


def test_faults_are_lines(folder: Path) -> None:
    """What numpy says about a huge header has three."""
    (folder / INDEX).write_bytes(b"\x93NUMPY\1\0\xff\xff" + b"[0," * 30000)
    seal(folder)
    assert all("\n" not in fault for fault in verify(folder).faults)
