"""Importing a folder or zip with one folder per class: layout, sources, and what untrusted roots get."""

from __future__ import annotations

import io
import os
import stat
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megaclass.data.manifest import load_class_names, load_index, load_manifest
from megaclass.errors import ConfigError, DataError
from megaclass.prepare import files as files_module
from megaclass.prepare.files import open_root
from megaclass.prepare.images import import_images
from megaclass.prepare.verify import verify


def picture(value: int = 0, mode: str = "L", form: str = "PNG", size: int = 9) -> bytes:
    pixels = np.full((size, size), 255, dtype=np.uint8)
    pixels[1, :] = value
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stream, format=form)
    return stream.getvalue()


def bomb() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 13_300, 13_300, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


ALPHABETS = {
    f"top/{alphabet}/character{character:02d}/{character:04d}_{drawer:02d}.png": picture(character, "1")
    for alphabet in ("Greek", "Korean", "Tifinagh")
    for character in (1, 2, 3)
    for drawer in (1, 2, 7)
}


def make_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def make_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize("make", [make_folder, make_zip])
def test_alphabets(tmp_path: Path, make: object) -> None:
    root = make(tmp_path / "alphabets.zip", ALPHABETS)  # type: ignore[operator]
    report = import_images(
        root, tmp_path / "out", class_depth=2, source_pattern=r"_(\d+)\.png$", unseen_groups="last:1"
    )
    manifest = load_manifest(tmp_path / "out")
    assert (manifest.name, manifest.image_mode) == ("alphabets", "L")
    train, unseen = manifest.splits["train"], manifest.splits["unseen"]
    assert (train.num_classes, train.num_samples, train.sources) == (6, 18, ["01", "02", "07"])
    names = load_class_names(tmp_path / "out", unseen)
    assert names.names == [f"Tifinagh/character{number:02d}" for number in (1, 2, 3)]
    assert names.groups == ["Tifinagh"] * 3
    records, _ = load_index(tmp_path / "out", "train", train)
    assert sorted(zip(records["label"].tolist(), records["source"].tolist(), strict=True)) == [
        (label, source) for label in range(6) for source in range(3)
    ]
    assert verify(tmp_path / "out").ok
    assert not report.warnings


def test_folder_and_zip_give_the_same_bytes(tmp_path: Path) -> None:
    make_folder(tmp_path / "set", ALPHABETS)
    make_zip(tmp_path / "set.zip", dict(reversed(ALPHABETS.items())))
    import_images(tmp_path / "set", tmp_path / "a", class_depth=2)
    import_images(tmp_path / "set.zip", tmp_path / "b", class_depth=2)
    for path in sorted((tmp_path / "a").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_depth_one_takes_deeper_folders_as_sorting(tmp_path: Path) -> None:
    root = make_folder(
        tmp_path / "set", {"a/x/1.png": picture(), "a/y/1.png": picture(), "b/2.jpg": picture(form="JPEG")}
    )
    report = import_images(root, tmp_path / "out")
    split = report.manifest.splits["train"]
    names = load_class_names(tmp_path / "out", split)
    assert (names.names, names.groups, split.num_samples, split.sources) == (["a", "b"], None, 3, [])


def test_one_class_in_a_top_folder(tmp_path: Path) -> None:
    report = import_images(make_zip(tmp_path / "s.zip", {"top/only/1.png": picture()}), tmp_path / "out")
    assert load_class_names(tmp_path / "out", report.manifest.splits["train"]).names == ["only"]


def test_resize_mode_and_encoding(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "set", {"a/1.png": picture(size=20), "b/2.png": picture(mode="RGB", size=30)})
    assert import_images(root, tmp_path / "mixed").manifest.image_mode == "RGB"
    report = import_images(root, tmp_path / "out", image_size=10, image_mode="L", encoding="jpg")
    assert report.manifest.image_mode == "L"
    data = (tmp_path / "out" / "train-000000.tar").read_bytes()
    assert Image.open(io.BytesIO(data[512:])).size == (10, 10)
    assert verify(tmp_path / "out").ok


def test_unreadable_images_stop_or_are_counted(tmp_path: Path) -> None:
    good = {f"{name}/{number}.png": picture(number) for name in "abc" for number in range(4)}
    bad = {"a/9.png": picture()[:40], "b/9.png": bomb(), "d/0.png": b"text"}
    root = make_folder(tmp_path / "set", good | bad)
    with pytest.raises(DataError, match=r"image [abd]/[09]\.png cannot be read: .*; replace or remove it, or give"):
        import_images(root, tmp_path / "out")
    with pytest.raises(DataError, match="not a finished data set"):
        load_manifest(tmp_path / "out")
    report = import_images(root, tmp_path / "out", on_bad="skip")
    assert report.counts["images left out as unreadable"] == 3
    assert report.manifest.splits["train"].num_samples == 12
    assert "3 unreadable images left out, the first is a/9.png" in report.warnings
    assert "1 classes have no readable image but keep their label, e.g. d" in report.warnings
    assert "images left out as unreadable: 3" in report.text()
    result = verify(tmp_path / "out")
    assert result.ok
    assert result.warnings == ["split train: 1 classes without samples, the first is 3"]


def test_zip_bombs_and_large_files_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_module, "MAX_FILE_BYTES", 5000)
    files = {"a/1.png": picture(), "a/2.png": picture() + bytes(6000)}
    for root in (make_zip(tmp_path / "s.zip", files), make_folder(tmp_path / "set", files)):
        with pytest.raises(DataError, match=r"image a/2.png cannot be read: .*5,000"):
            import_images(root, tmp_path / "out")


def test_other_files_hidden_files_and_empty_folders(tmp_path: Path) -> None:
    files = {"a/1.png": picture(), "a/notes.txt": b"", "b/._2.png": b"", ".git/x.png": b"", "__MACOSX/a/1.png": b""}
    root = make_folder(tmp_path / "set", files)
    (root / "empty").mkdir()
    report = import_images(root, tmp_path / "out")
    assert report.manifest.splits["train"].num_classes == 1
    assert report.counts["files ignored (no image by extension, or hidden)"] == 2
    assert report.counts["empty folders ignored"] == 2
    assert report.warnings == ["folder b holds no image and makes no class"]
    report = import_images(make_zip(tmp_path / "s.zip", {**files, "empty/": b""}), tmp_path / "out2")
    assert report.counts["files ignored (no image by extension, or hidden)"] == 4
    assert report.warnings == ["folder empty holds no image and makes no class"]


def test_no_image_no_root_no_zip(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere does not exist; give a folder or a \.zip"):
        import_images(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(DataError, match="holds no image"):
        import_images(make_folder(tmp_path / "set", {"a/readme.txt": b""}), tmp_path / "out")
    (tmp_path / "text.zip").write_bytes(b"no zip")
    with pytest.raises(DataError, match="neither a folder nor a readable zip"):
        import_images(tmp_path / "text.zip", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_links_that_leave_the_root_are_refused(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "set", {"a/1.png": picture()})
    (root / "a" / "2.png").symlink_to(root / "a" / "1.png")
    assert import_images(root, tmp_path / "out").manifest.splits["train"].num_samples == 2
    (tmp_path / "secret.png").write_bytes(picture())
    (root / "a" / "3.png").symlink_to("../../secret.png")
    with pytest.raises(DataError, match=r"3\.png is a link that leads out of"):
        open_root(root)
    (root / "a" / "3.png").unlink()
    (root / "a" / "4.png").symlink_to("4.png")
    with pytest.raises(DataError, match=r"4\.png cannot be read: not a regular file"):
        import_images(root, tmp_path / "out", overwrite=True)
    (root / "a" / "4.png").unlink()
    (root / "loop").symlink_to(root)
    with pytest.raises(DataError, match="loop is a link; put the folder itself in its place"):
        open_root(root)


def test_the_root_itself_may_be_a_link(tmp_path: Path) -> None:
    make_folder(tmp_path / "set", {"a/1.png": picture()})
    (tmp_path / "link").symlink_to(tmp_path / "set")
    with open_root(tmp_path / "link") as files:
        assert files.read(0) == picture()


def test_pipes_do_not_block(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "set", {"a/1.png": picture()})
    os.mkfifo(root / "a" / "2.png")
    with pytest.raises(DataError, match=r"2\.png cannot be read: not a regular file"):
        import_images(root, tmp_path / "out")


@pytest.mark.parametrize("name", ["../a/1.png", "/a/1.png", "a/../../1.png", "a\\1.png", "C:/a/1.png"])
def test_zip_names_that_lead_elsewhere(tmp_path: Path, name: str) -> None:
    path = make_zip(tmp_path / "s.zip", {name: picture()})
    with pytest.raises(DataError, match=r"allowed are relative paths without"):
        open_root(path)


def test_zip_links_doubles_and_passwords(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("a/1.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "link.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(DataError, match="holds the link"):
        open_root(tmp_path / "link.zip")
    with zipfile.ZipFile(tmp_path / "double.zip", "w") as archive:
        archive.writestr("a/1.png", picture())
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("a/1.png", picture())
    with pytest.raises(DataError, match=r"holds 'a/1\.png' twice"):
        open_root(tmp_path / "double.zip")
    data = bytearray(make_zip(tmp_path / "s.zip", {"a/1.png": picture()}).read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "s.zip").write_bytes(data)
    with pytest.raises(DataError, match="holds the encrypted file"):
        open_root(tmp_path / "s.zip")


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "set", {"a/1.png": picture()})
    with open(os.fsencode(root) + b"/a/\xff.png", "wb") as stream:
        stream.write(picture())
    with pytest.raises(DataError, match="which is not UTF-8; rename it"):
        open_root(root)


@pytest.mark.parametrize(("raw", "is_utf8"), [("ü".encode(), True), (b"\xff\xfe", False)])
def test_zip_names_without_the_utf8_flag(tmp_path: Path, raw: bytes, is_utf8: bool) -> None:
    data = make_zip(tmp_path / "s.zip", {"XX/1.png": picture()}).read_bytes()
    (tmp_path / "s.zip").write_bytes(data.replace(b"XX/1.png", raw + b"/1.png"))
    if is_utf8:
        with open_root(tmp_path / "s.zip") as files:
            assert files.names == ["ü/1.png"]
    else:
        with pytest.raises(DataError, match="which is not UTF-8; rename it and zip again"):
            open_root(tmp_path / "s.zip")


def test_a_damaged_zip_entry_is_a_bad_image(tmp_path: Path) -> None:
    path = tmp_path / "s.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/1.png", picture(size=40))
    data = bytearray(path.read_bytes())
    data[60] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"a/1\.png cannot be read: damaged in the zip"):
        import_images(path, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"class_depth": 0}, ConfigError, "class-depth is 0"),
        ({"class_depth": 3}, DataError, "lies 2 folders deep but a class-depth of 3 needs that many"),
        ({"image_size": 4}, ConfigError, "image-size is 4; allowed is 8 to 4096"),
        ({"on_bad": "ignore"}, ConfigError, "on-bad is 'ignore'; allowed is stop or skip"),
        ({"source_pattern": "("}, ConfigError, "is no regular expression"),
        ({"source_pattern": "x"}, ConfigError, "has 0 groups; it must have exactly one"),
        ({"source_pattern": "(zzz)"}, ConfigError, "fits no file name, e.g. not '1.png'"),
        ({"unseen_groups": "last:1"}, ConfigError, "the classes have no groups"),
    ],
)
def test_options_are_checked(tmp_path: Path, options: dict[str, object], error: type[Exception], message: str) -> None:
    root = make_folder(tmp_path / "set", {"g/a/1.png": picture(), "h/a/1.png": picture()})
    with pytest.raises(error) as caught:
        import_images(root, tmp_path / "out", **options)  # type: ignore[arg-type]
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_files_without_a_source_are_counted(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "set", {"a/x_1.png": picture(), "a/y.png": picture()})
    report = import_images(root, tmp_path / "out", source_pattern=r"_(\d)")
    assert report.counts["samples without a source"] == 1
    records, _ = load_index(tmp_path / "out", "train", report.manifest.splits["train"])
    assert sorted(records["source"].tolist()) == [-1, 0]


def test_quarter_turns_multiply_the_trained_classes_only(tmp_path: Path) -> None:
    from megaclass.data.samples import iterate_split

    for name in ("a", "b", "c"):
        (tmp_path / "root" / name).mkdir(parents=True)
        for number in range(2):
            (tmp_path / "root" / name / f"{number}.png").write_bytes(picture(40 * number + len(name)))
    import_images(tmp_path / "root", tmp_path / "out", quarter_turns=True, unseen_classes=1)
    manifest = load_manifest(tmp_path / "out")
    train, unseen = manifest.splits["train"], manifest.splits["unseen"]
    assert (train.num_classes, train.num_samples) == (8, 16)
    assert (unseen.num_classes, unseen.num_samples) == (1, 2)
    names = load_class_names(tmp_path / "out", train).names
    kept = sorted({name.partition("@")[0] for name in names})
    assert names == sorted(f"{name}{turn}" for name in kept for turn in ("", "@90", "@180", "@270"))
    seen: dict[str, set[bytes]] = {}
    for batch in iterate_split(
        tmp_path / "out", "train", rank=0, world_size=1, batch_size=16, image_size=9, channels=1
    ):
        for image, label in zip(batch.images, batch.labels.tolist(), strict=True):
            seen.setdefault(names[label], set()).add(image[0].numpy().tobytes())
    for name in kept:
        for turn in (1, 2, 3):
            turned = {
                np.ascontiguousarray(np.rot90(np.frombuffer(data, np.float32).reshape(9, 9), turn)).tobytes()
                for data in seen[name]
            }
            assert seen[f"{name}@{90 * turn}"] == turned
    assert verify(tmp_path / "out").ok
