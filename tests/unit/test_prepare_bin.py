"""Verification sets as `lfw.bin`: pairs come through to the figures of an evaluation."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megaclass.cli import main
from megaclass.data.manifest import PAIR_DTYPE, load_class_names, load_manifest, load_pairs
from megaclass.data.samples import StoredSamples
from megaclass.errors import ConfigError, DataError
from megaclass.prepare.copying import copy_dataset
from megaclass.prepare.verification_bin import import_pairs, read_pairs
from megaclass.prepare.verify import verify
from tests.unit.test_prepare_images import picture
from tests.unit.test_prepare_writer import write

# Pair 0 is of images 0 and 1, and so on; images 0 and 5 are the same file.
IMAGES = [picture(number, "RGB", "JPEG") for number in (3, 40, 80, 120, 160, 3, 200, 240)]
ANSWERS = [True, False, True, False]


def packed(path: Path, images: list[Any] = IMAGES, answers: list[Any] = ANSWERS, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps((images, answers), protocol))
    return path


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_pairs_name_the_images_of_the_file(protocol: int, tmp_path: Path) -> None:
    seen = []
    path = packed(tmp_path / "lfw.bin", protocol=protocol)
    report = import_pairs([path], tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (7, 7)
    assert report.counts == {"images that stand in several pairs, stored once": 1}
    split = load_manifest(tmp_path / "out").splits["lfw"]
    assert (split.num_classes, split.num_samples) == (7, 7)
    assert load_class_names(tmp_path / "out", split).names == ["0", "1", "2", "3", "4", "6", "7"]
    pairs = load_pairs(tmp_path / "out", split)
    assert pairs is not None
    assert pairs["is_same"].tolist() == [1, 0, 1, 0]
    samples = StoredSamples(tmp_path / "out", "lfw", image_size=9, channels=3)
    for number, pair in enumerate(pairs):
        assert samples.stored(int(pair["left"]))[0].image == IMAGES[2 * number]
        assert samples.stored(int(pair["right"]))[0].image == IMAGES[2 * number + 1]
    samples.close()
    assert verify(tmp_path / "out").ok


def test_every_file_becomes_a_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(packed(tmp_path / f"{name}.bin")) for name in ("lfw", "agedb_30")]
    assert main(["data", "bin", *paths, "--out", str(tmp_path / "out"), "--image-size", "12"]) == 0
    assert "agedb_30: 7 classes, 7 samples" in capsys.readouterr().out
    manifest = load_manifest(tmp_path / "out")
    assert (list(manifest.splits), manifest.name) == (["lfw", "agedb_30"], "lfw agedb_30")
    with pytest.raises(ConfigError, match="two files are called lfw, and a split is named after its file; rename one"):
        import_pairs([tmp_path / "lfw.bin", tmp_path / "again" / "lfw.bin"], tmp_path / "new")
    with pytest.raises(ConfigError, match="its name becomes the split's and may hold letters, digits, - and _ alone"):
        import_pairs([tmp_path / "l f w.bin"], tmp_path / "new")


def test_data_sets_without_pairs_say_nothing_of_them(tmp_path: Path) -> None:
    packed(tmp_path / "lfw.bin")
    import_pairs([tmp_path / "lfw.bin"], tmp_path / "out")
    content = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert content["splits"]["lfw"]["pairs"] == "lfw.pairs.npy"
    write(tmp_path / "other")
    assert "pairs" not in (tmp_path / "other" / "dataset.json").read_text()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([IMAGES], "it holds a value of type list of 1; a list of images and a list of true or false"),
        (7, "it holds a value of type int; "),
        ((IMAGES, 7), "in place of the answers stands a value of type int"),
        ((b"images", ANSWERS), "in place of the images stands a value of type bytes of 6"),
        ((IMAGES, ANSWERS[:3]), "it has 8 images for 3 pairs; twice as many are needed"),
        (([], []), "it has 0 images for 0 pairs"),
        ((["text", *IMAGES[1:]], ANSWERS), "image 0 is a value of type str of 4 and not bytes"),
        (([*IMAGES[:7], [1]], ANSWERS), "image 7 is a value of type list of 1 and not bytes"),
        ((IMAGES, [True, 2, True, True]), "the answer to pair 1 is 2; it must be true or false"),
        ((IMAGES, [True, True, None, True]), "the answer to pair 2 is None"),
        ((IMAGES, [True, True, 1.0, True]), "the answer to pair 2 is 1.0"),
    ],
)
def test_what_is_no_set_of_pairs(value: object, message: str, tmp_path: Path) -> None:
    (tmp_path / "lfw.bin").write_bytes(pickle.dumps(value))
    with pytest.raises(DataError, match=rf"lfw\.bin is no verification set as lfw.bin: {message}"):
        import_pairs([tmp_path / "lfw.bin"], tmp_path / "out")


def test_answers_may_be_an_array(tmp_path: Path) -> None:
    images = [np.frombuffer(image, dtype=np.uint8)[:, None] for image in IMAGES]
    (tmp_path / "own.bin").write_bytes(pickle.dumps([images, np.array(ANSWERS)], protocol=4))
    found = read_pairs(tmp_path / "own.bin")
    assert found.pairs.tolist() == [(0, 1, 1), (2, 3, 0), (4, 0, 1), (5, 6, 0)]
    assert found.first.tolist() == [0, 1, 2, 3, 4, 6, 7]


def test_a_damaged_image_stops_and_is_named(tmp_path: Path) -> None:
    packed(tmp_path / "lfw.bin", [*IMAGES[:6], b"no image", IMAGES[7]])
    with pytest.raises(DataError, match=r"lfw\.bin: image 6 cannot be read: not a PNG"):
        import_pairs([tmp_path / "lfw.bin"], tmp_path / "out")
    assert not (tmp_path / "out" / "dataset.json").exists()


@pytest.fixture
def made(tmp_path: Path) -> Path:
    import_pairs([packed(tmp_path / "lfw.bin")], tmp_path / "out")
    return tmp_path / "out"


def test_a_copy_has_the_same_pairs(made: Path, tmp_path: Path) -> None:
    copy_dataset(made, tmp_path / "copy", samples_per_shard=3)
    assert (tmp_path / "copy" / "lfw.pairs.npy").read_bytes() == (made / "lfw.pairs.npy").read_bytes()
    assert verify(tmp_path / "copy").ok


def test_of_pairs_no_part_can_be_taken(tmp_path: Path) -> None:
    import_pairs([packed(tmp_path / "train.bin")], tmp_path / "out")
    with pytest.raises(ConfigError, match=r"split 'train' of .* has given pairs, of which no part can be taken"):
        copy_dataset(tmp_path / "out", tmp_path / "copy", num_classes=3)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.unlink(), "lfw.pairs.npy is missing; make the data set again"),
        (lambda path: path.write_bytes(b"no array"), "lfw.pairs.npy cannot be read: "),
        (
            lambda path: np.save(path, np.arange(3)),
            r"its header does not declare what its bytes are: 1 records of type \[\('left'",
        ),
        (
            lambda path: np.save(path, np.array([(0, 7, 1)], PAIR_DTYPE)),
            r"pair 0 is \(0, 7, 1\); samples are in \[0, 7",
        ),
        (lambda path: np.save(path, np.array([(0, 1, 1), (-1, 1, 1)], PAIR_DTYPE)), r"pair 1 is \(-1, 1, 1\)"),
        (lambda path: np.save(path, np.array([(0, 1, 2)], PAIR_DTYPE)), r"pair 0 is \(0, 1, 2\)"),
    ],
)
def test_spoiled_pairs_are_a_fault(spoil: Any, message: str, made: Path) -> None:
    spoil(made / "lfw.pairs.npy")
    with pytest.raises(DataError, match=message):
        load_pairs(made, load_manifest(made).splits["lfw"])
    faults = verify(made).faults
    assert len(faults) == 1
    assert "lfw.pairs.npy" in faults[0]


def test_changed_pairs_are_a_fault(made: Path) -> None:
    path = made / "lfw.pairs.npy"
    pairs = np.load(path)
    pairs["is_same"][1] = 1
    np.save(path, pairs)
    assert verify(made).faults == ["lfw.pairs.npy: SHA-256 differs from dataset.json"]
    (made / "old.pairs.npy").write_bytes(b"")
    assert "old.pairs.npy: extra file that dataset.json does not list" in verify(made).faults
    content = json.loads((made / "dataset.json").read_text())
    del content["splits"]["lfw"]["pairs_sha256"]
    (made / "dataset.json").write_text(json.dumps(content))
    assert "dataset.json: split lfw has pairs without their SHA-256, or the other way round" in verify(made).faults
