"""Importing images by a list of names and labels."""

from __future__ import annotations

import sys
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from megaclass.cli import main
from megaclass.data.manifest import load_class_names, load_index, load_manifest
from megaclass.errors import ConfigError, DataError
from megaclass.prepare.import_list import import_list
from megaclass.prepare.lists import read_list
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
    with pytest.raises(
        ConfigError, match=r"the ending says what a list is; allowed are \.csv, \.tsv, \.txt, \.parquet"
    ):
        read_list(tmp_path / "train.json")
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


def written(path: Path, **columns: Any) -> Path:
    parquet.write_table(pyarrow.table(columns), path)
    return path


NAMES = ["a/2.png", "a/1.png", "b, c.png"]


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["owl", "cat, black", " owl "], ["cat, black", "owl"]),
        ([10, 2, 10], ["02", "10"]),
        ([-1, 10, 2], ["-1", "10", "2"]),
        ([True, False, True], ["False", "True"]),
        ([0.5, 2.0, 0.5], ["0.5", "2.0"]),
        ([Decimal("1.50"), Decimal("2.00"), Decimal("1.50")], ["1.50", "2.00"]),
        ([date(2024, 5, 1), date(1999, 12, 31), date(2024, 5, 1)], ["1999-12-31", "2024-05-01"]),
        ([b"owl", "k\u00e4uz".encode(), b"owl"], ["k\u00e4uz", "owl"]),
        (pyarrow.array(["owl", "cat", "owl"]).dictionary_encode(), ["cat", "owl"]),
    ],
)
def test_labels_of_any_type_are_the_names_of_classes(labels: Any, classes: list[str], tmp_path: Path) -> None:
    root = make_folder(tmp_path / "all", FILES)
    path = written(tmp_path / "train.parquet", file=NAMES, label=labels)
    report = import_list(path, root, tmp_path / "out")
    split = load_manifest(tmp_path / "out").splits["train"]
    assert load_class_names(tmp_path / "out", split).names == classes
    assert (report.num_read, report.num_stored) == (3, 3)


def test_parquet_in_many_pieces_gives_what_the_same_text_gives(tmp_path: Path) -> None:
    rows = [(f"{number % 7}/{number}.png", number % 11) for number in range(70_000)]
    columns = {"fold": [1] * len(rows), "label": [row[1] for row in rows], "file": [row[0] for row in rows]}
    path = tmp_path / "train.parquet"
    parquet.write_table(pyarrow.table(columns), path, row_group_size=999)
    text = listed(tmp_path, "".join(f"{name},{label}\n" for name, label in rows))
    found = read_list(path, ["file", "label"])
    assert [entry[1:] for entry in found] == [entry[1:] for entry in read_list(text)]
    assert found[-1].place == "row 70000"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"file": ["a", None], "label": [1, 2]}, r"row 2 is \[None, 2\]; an image and a label are needed"),
        ({"file": ["a", "b"], "label": [1, None]}, r"row 2 is \['b', None\]; an image and a label are needed"),
        ({"file": ["a", "b"], "label": [1.0, float("nan")]}, r"row 2 is \['b', nan\]; an image and a label"),
        ({"file": ["a", "a"], "label": [1, 1]}, "row 2 names 'a' again, after row 1; an image has one label"),
        ({"file": [b"a"], "label": [1]}, "row 1 has an image of type bytes in column 'file'; names of files"),
        ({"file": ["a"], "label": [[1, 2]]}, "row 1 has a label of type list; text, numbers, dates and true or false"),
        ({"file": ["a"], "label": [b"\xff"]}, "row 1 has a label of bytes that are no UTF-8"),
        ({"file": ["a"]}, "has one column, file; an image and a label are needed"),
        ({"file": pyarrow.array([], "string"), "label": pyarrow.array([], "int64")}, "names no image"),
    ],
)
def test_a_parquet_list_that_does_not_fit_is_refused(columns: Any, message: str, tmp_path: Path) -> None:
    path = written(tmp_path / "train.parquet", **columns)
    with pytest.raises(DataError, match=message):
        read_list(path)


def test_parquet_that_is_none(tmp_path: Path) -> None:
    path = written(tmp_path / "train.parquet", file=NAMES, label=[1, 2, 3])
    with pytest.raises(ConfigError, match="has no column 'product'; it has file, label"):
        read_list(path, ["file", "product"])
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"train\.parquet cannot be read as a list: Parquet magic bytes not found"):
        read_list(path)
    with pytest.raises(DataError, match=r"nowhere\.parquet cannot be read as a list: "):
        read_list(tmp_path / "nowhere.parquet")


def test_without_pyarrow_its_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"needs pyarrow \(.*; install it with: pip install 'megaclass\[parquet\]'"):
        read_list(tmp_path / "train.parquet")
