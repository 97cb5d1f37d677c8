"""Importing RecordIO files that a writer of our own makes, from the format's public definition."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path

import numpy as np
import pytest

from megaclass.cli import main
from megaclass.data.manifest import load_class_names, load_index, load_manifest
from megaclass.errors import DataError
from megaclass.prepare.import_records import import_records
from megaclass.prepare.recordio import RecordFile
from megaclass.prepare.verify import verify
from tests.unit.test_prepare_images import picture

MAGIC = struct.pack("<I", 0xCED7230A)


def packed(payload: bytes) -> bytes:
    """One record: cut wherever the magic number stands at a multiple of four bytes."""
    parts, begin = [], 0
    for at in range(0, len(payload) - 3, 4):
        if payload[at : at + 4] == MAGIC:
            parts.append(payload[begin:at])
            begin = at + 4
    parts.append(payload[begin:])
    kinds = [0] if len(parts) == 1 else [1, *[2] * (len(parts) - 2), 3]
    return b"".join(
        MAGIC + struct.pack("<I", kind << 29 | len(part)) + part + b"\0" * (-len(part) % 4)
        for kind, part in zip(kinds, parts, strict=True)
    )


def headed(label: float | list[float], key: int, image: bytes = b"") -> bytes:
    if isinstance(label, list):
        return struct.pack("<IfQQ", len(label), 0.0, key, 0) + struct.pack(f"<{len(label)}f", *label) + image
    return struct.pack("<IfQQ", 0, label, key, 0) + image


def write(folder: Path, payloads: list[bytes], *, num_classes: int | None = None, has_index: bool = True) -> Path:
    folder.mkdir(exist_ok=True)
    lines, content = [], b""
    for key, payload in enumerate(payloads):
        lines.append(f"{key}\t{len(content)}\n")
        content += packed(payload)
    (folder / "train.rec").write_bytes(content)
    if has_index:
        (folder / "train.idx").write_text("".join(lines))
    if num_classes is not None:
        (folder / "property").write_text(f"{num_classes},9,9\n")
    return folder / "train.rec"


def tricky(value: int) -> bytes:
    """A picture whose file holds the magic number, at every place of four: the writer must cut it."""
    return picture(value, "RGB", "JPEG") + MAGIC * 3 + b"\1" + MAGIC * 2


IMAGES = [(3, picture(1)), (3, tricky(2)), (0, picture(3, "RGB", "JPEG")), (11, tricky(4)), (0, picture(5))]


def face_set(folder: Path, **options: int | bool) -> Path:
    """As face sets are: record 0 tells where images end, then images, then a record of each identity."""
    images = [headed(label if key % 2 else [float(label), 7.0], key, image)
              for key, (label, image) in enumerate(IMAGES, 1)]  # fmt: skip
    first = headed([float(len(IMAGES) + 1), float(len(IMAGES) + 4)], 0)
    identities = [headed([1.0, 3.0], 6), headed([3.0, 4.0], 7), headed([4.0, 5.0], 8)]
    return write(folder, [first, *images, *identities], **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("has_index", [True, False])
def test_a_face_set_comes_through_byte_for_byte(has_index: bool, tmp_path: Path) -> None:
    path = face_set(tmp_path / "faces", num_classes=12, has_index=has_index)
    seen = []
    report = import_records(path, tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (5, 5)
    assert report.counts == {"images left out as unreadable": 0, "records without an image": 4}
    assert report.warnings == ["the file property tells of 12 classes and 3 have images"]
    manifest = load_manifest(tmp_path / "out")
    split = manifest.splits["train"]
    assert load_class_names(tmp_path / "out", split).names == ["00", "03", "11"]
    found = []
    records, shards = load_index(tmp_path / "out", "train", split)
    for record, shard in zip(records, shards, strict=True):
        member = (tmp_path / "out" / split.shards[int(shard)].file).read_bytes()[int(record["offset"]) :]
        size = int(member[124:136].rstrip(b"\0 "), 8)  # of a tar header
        found.append((int(record["label"]), member[512 : 512 + size]))
    assert sorted(found) == sorted((["00", "03", "11"].index(f"{label:02d}"), image) for label, image in IMAGES)
    assert verify(tmp_path / "out").ok


def test_without_records_of_identities(tmp_path: Path) -> None:
    """As `im2rec` writes: images from the first record on, one label each."""
    path = write(tmp_path, [headed(float(label), key, image) for key, (label, image) in enumerate(IMAGES)])
    with RecordFile(path) as file:
        layout = file.layout()
        assert layout.labels.tolist() == [label for label, _ in IMAGES]
        assert [file.image(int(offset)) for offset in layout.offsets] == [image for _, image in IMAGES]
        assert layout.num_others == 0
        assert file.num_classes_told() is None


def test_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = face_set(tmp_path / "faces")
    options = ["--out", str(tmp_path / "out"), "--image-size", "12", "--image-mode", "RGB", "--unseen-classes", "1"]
    assert main(["data", "recordio", str(path), *options]) == 0
    assert "records without an image: 4" in capsys.readouterr().out
    splits = load_manifest(tmp_path / "out").splits
    assert {name: split.num_classes for name, split in splits.items()} == {"train": 2, "unseen": 1}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda c: c[:-5],
            r"the record at byte [\d,]+ of [\d,]+ is broken: the file ends inside it; the file is cut off",
        ),
        (lambda c: c[: len(packed(headed([6.0, 9.0], 0)))], r"tells of 5 images and there are 0"),
        (lambda c: b"\1" + c[1:], r"the record at byte 0 of [\d,]+ is broken: it begins with 0xced72301 and not 0xced"),
        (lambda c: c + packed(b"short"), r"it has 5 bytes, an image's header has 24"),
        (lambda c: c + packed(headed(2.5, 9, b"x")), r"its label is 2.5; class ids are whole numbers from 0"),
        (lambda c: c + packed(headed(float("nan"), 9, b"x")), r"its label is nan"),
        (lambda c: c + packed(headed(-1.0, 9, b"x")), r"its label is -1.0"),
        (lambda c: c + packed(struct.pack("<IfQQ", 9, 0.0, 1, 0)), r"its header tells of 9 labels"),
        (lambda c: c + packed(headed(1.0, 9, picture())), r"tells of 5 images and there are 6; the file is not the"),
        (lambda c: c + packed(headed([1.0], 9)), r"train.idx tells of 9 records and train.rec has 10"),
        (lambda c: c + MAGIC + struct.pack("<I", 2 << 29), r"is broken: its parts are not in order"),
        (lambda c: c + MAGIC + struct.pack("<I", 1 << 29), r"is broken: the file ends inside it"),
        (lambda c: b"", r"train.rec cannot be read: .*; give a .rec file"),
    ],
)
def test_a_broken_file_is_refused(spoil: object, message: str, tmp_path: Path) -> None:
    assert callable(spoil)
    path = face_set(tmp_path / "faces")
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(DataError, match=message):
        import_records(path, tmp_path / "out")
    assert not (tmp_path / "out" / "dataset.json").exists()


def test_what_stands_beside_must_fit(tmp_path: Path) -> None:
    path = face_set(tmp_path / "faces", num_classes=11)
    with pytest.raises(DataError, match="has the label 11 and the file property beside it tells of 11 classes"):
        import_records(path, tmp_path / "out")
    path.with_name("property").write_text("many")
    with pytest.raises(DataError, match="property begins with 'many'; the number of classes is needed"):
        import_records(path, tmp_path / "out")
    path.with_name("property").unlink()
    path.with_suffix(".idx").write_text("0\t0\n1 two\n")
    with pytest.raises(DataError, match=r"train\.idx: line 2 is '1 two'; a key and an offset are needed"):
        import_records(path, tmp_path / "out")
    with pytest.raises(DataError, match=r"nowhere\.rec cannot be read: "):
        import_records(tmp_path / "nowhere.rec", tmp_path / "out")


def test_an_unreadable_image_is_named_or_skipped(tmp_path: Path) -> None:
    path = write(tmp_path, [headed(4.0, 0, picture(1)), headed(7.0, 1, b"no image"), headed(4.0, 2, picture(2))])
    with pytest.raises(
        DataError, match=r"the image of class 7 at byte [\d,]+ cannot be read: not a PNG.*--on-bad skip"
    ):
        import_records(path, tmp_path / "out")
    report = import_records(path, tmp_path / "out", on_bad="skip", overwrite=True)
    assert report.counts["images left out as unreadable"] == 1
    assert load_manifest(tmp_path / "out").splits["train"].num_samples == 2


@pytest.mark.parametrize("seed", range(40))
def test_spoiled_bytes_end_in_a_reason(seed: int, tmp_path: Path) -> None:
    """Any byte may be wrong: the import works all the same, or says why not."""
    path = face_set(tmp_path / "faces")
    generator = np.random.default_rng(seed)
    content = bytearray(path.read_bytes())
    for _ in range(3):
        content[int(generator.integers(len(content)))] = int(generator.integers(256))
    path.write_bytes(bytes(content[: int(generator.integers(1, len(content) + 1))] if seed % 4 == 0 else content))
    with contextlib.suppress(DataError):
        import_records(path, tmp_path / "out", on_bad="skip")
