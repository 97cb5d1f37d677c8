"""Importing images by a list of names and labels."""

from __future__ import annotations

from pathlib import Path

import pytest

from megaclass.cli import main
from megaclass.data.manifest import load_class_names, load_index, load_manifest
from megaclass.errors import ConfigError, DataError
from megaclass.prepare.import_list import import_list, read_list
from tests.unit.test_prepare_images import make_folder, make_zip, picture

FILES = {"a/1.png": picture(1), "a/2.png": picture(2), "b, c.png": picture(3), "not-named.png": picture(4)}


def listed(folder: Path, text: str, name: str = "train.csv") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


@pytest.mark.parametrize("is_zip", [False, True])
def test_labels_become_class_names(is_zip: bool, tmp_path: Path) -> None:
    root = make_zip(tmp_path / "all.zip", FILES) if is_zip else make_folder(tmp_path / "all", FILES)
    path = listed(tmp_path, 'a/2.png,owl\na/1.png,"cat, black"\n\n"b, c.png",owl\n')
    report = import_list(path, root, tmp_path / "out")
    assert report.counts == {"images left out as unreadable": 0, "images that the list does not name": 1}
    split = load_manifest(tmp_path / "out").splits["train"]
    assert load_class_names(tmp_path / "out", split).names == ["cat, black", "owl"]
    records, _ = load_index(tmp_path / "out", "train", split)
    assert sorted(records["label"].tolist()) == [0, 1, 1]


def test_numbers_keep_their_order_and_columns_have_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_folder(tmp_path, FILES)
    path = listed(tmp_path, "\ufefffold\tlabel\tfile\n1\t10\ta/1.png\n1\t2\ta/2.png\n2\t10\tb, c.png\n", "train.tsv")
    assert main(["data", "list", str(path), "--out", str(tmp_path / "out"), "--columns", "file", "label"]) == 0
    assert "images that the list does not name: 1" in capsys.readouterr().out
    split = load_manifest(tmp_path / "out").splits["train"]
    assert load_class_names(tmp_path / "out", split).names == ["02", "10"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a/1.png,owl\na/9.png,owl\nx.png,owl\n", r"2 of 3 images are not in .*, the first is 'a/9.png' on line 2; "),
        ("../all/a/1.png,owl\n", r"1 of 1 images are not in .*, the first is '../all/a/1.png' on line 1"),
        ("a/1.png,owl\na/2.png\n", r"train.csv: line 2 is \['a/2.png'\]; an image and a label are needed"),
        ("a/1.png,owl\na/2.png, \n", r"line 2 is \['a/2.png', ' '\]; an image and a label are needed"),
        ("a/1.png,owl\na/1.png,cat\n", r"line 2 names 'a/1.png' again, after line 1; an image has one label"),
        ('a/1.png,"owl\n', r"train.csv cannot be read as a list: unexpected end of data"),
        ("", r"train.csv names no image"),
    ],
)  # fmt: skip
def test_a_list_that_does_not_fit_is_refused(text: str, message: str, tmp_path: Path) -> None:
    root = make_folder(tmp_path / "all", FILES)
    with pytest.raises(DataError, match=message):
        import_list(listed(tmp_path, text), root, tmp_path / "out")
    assert not (tmp_path / "out" / "dataset.json").exists()


def test_what_is_no_list(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the ending says what a list is; allowed are \.csv, \.tsv, \.txt"):
        read_list(tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"nowhere\.csv cannot be read as a list"):
        read_list(tmp_path / "nowhere.csv")
    with pytest.raises(ConfigError, match="has no column 'product'; its first line has file, label"):
        read_list(listed(tmp_path, "file,label\na,b\n"), ["file", "product"])
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe,\x80\n")
    with pytest.raises(DataError, match=r"bytes\.csv cannot be read as a list: 'utf-8' codec"):
        read_list(tmp_path / "bytes.csv")


def test_an_unreadable_image_is_named_by_its_line(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "all", FILES | {"bad.png": b"no image"})
    path = listed(tmp_path, "a/1.png,owl\nbad.png,owl\n")
    with pytest.raises(DataError, match=r"image bad\.png \(line 2 of .*train\.csv\) cannot be read: not a PNG"):
        import_list(path, root, tmp_path / "out")
    report = import_list(path, root, tmp_path / "out", on_bad="skip", overwrite=True)
    assert report.counts["images left out as unreadable"] == 1
