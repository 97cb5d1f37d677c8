"""Copying data sets: the same samples in the same order, or a part of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megaclass.cli import main
from megaclass.data.manifest import load_class_names, load_manifest
from megaclass.data.samples import StoredSamples
from megaclass.errors import ConfigError, DataError
from megaclass.prepare.copying import copy_dataset
from megaclass.prepare.images import import_images
from megaclass.prepare.verify import verify
from tests.unit.test_prepare_images import make_folder, picture

NAMES = [f"{group}/{number}" for group in ("x", "y") for number in range(6)]


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    files = {
        f"{name}/{sample}_{sample % 2}.png": picture(17 * place + sample)
        for place, name in enumerate(NAMES)
        for sample in range(3 + place % 3)
    }
    out = tmp_path / "data"
    import_images(
        make_folder(tmp_path / "all", files), out, class_depth=2, source_pattern=r"_(\d)\.png$", unseen_classes=3,
        samples_per_shard=10, name="odd",
    )  # fmt: skip
    return out


def content(folder: Path, split: str) -> list[tuple[str, str | None, str, bytes]]:
    """Class, group, source and image of every sample, in the order of the ids."""
    info = load_manifest(folder).splits[split]
    names = load_class_names(folder, info)
    samples = StoredSamples(folder, split, image_size=1, channels=1)
    found = []
    for number, (label, source) in enumerate(zip(samples.labels.tolist(), samples.sources.tolist(), strict=True)):
        group = None if names.groups is None else names.groups[label]
        found.append((names.names[label], group, info.sources[source], samples.stored(number)[0].image))
    samples.close()
    return found


@pytest.mark.parametrize("samples_per_shard", [1, 7, 1000])
def test_other_shards_hold_the_same_samples_in_the_same_order(
    samples_per_shard: int, dataset: Path, tmp_path: Path
) -> None:
    out = tmp_path / "copy"
    seen: list[tuple[int, int]] = []
    copy_dataset(dataset, out, samples_per_shard=samples_per_shard, progress=lambda *now: seen.append(now))
    manifest = load_manifest(out)
    assert (manifest.name, manifest.image_mode) == ("odd", "L")
    for split in ("train", "unseen"):
        assert content(out, split) == content(dataset, split)
        assert len(manifest.splits[split].shards) == -(-manifest.splits[split].num_samples // samples_per_shard)
    total = sum(split.num_samples for split in manifest.splits.values())
    assert seen[-1] == (total, total)
    assert verify(out).ok


def test_a_part_has_the_classes_that_training_on_a_part_would_take(dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    copy_dataset(dataset, out, num_classes=4, samples_per_class=2, name="small")
    wanted = StoredSamples(dataset, "train", image_size=1, channels=1, num_classes=4)
    names = load_class_names(dataset, load_manifest(dataset).splits["train"]).names
    copied = load_manifest(out).splits["train"]
    assert load_class_names(out, copied).names == [names[number] for number in wanted.classes.tolist()]
    samples = StoredSamples(out, "train", image_size=1, channels=1)
    assert samples.class_counts.tolist() == [2] * 4
    images = [wanted.stored(i)[0].image for i in range(wanted.num_samples)]
    first = [images[i] for i in range(wanted.num_samples) if np.sum(wanted.labels[:i] == wanted.labels[i]) < 2]
    assert [samples.stored(i)[0].image for i in range(8)] == first
    assert content(out, "unseen") == content(dataset, "unseen")
    assert load_manifest(out).name == "small"


def test_by_the_commands(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "reshard", str(dataset), "--out", str(tmp_path / "a"), "--samples-per-shard", "4"]) == 0
    assert main(["data", "subset", str(dataset), "--out", str(tmp_path / "b"), "--num-classes", "2"]) == 0
    assert "train: 2 classes" in capsys.readouterr().out
    assert (
        main(["data", "reshard", str(dataset), "--out", str(dataset), "--samples-per-shard", "4", "--overwrite"]) == 2
    )
    assert "is the data set itself; give another folder" in capsys.readouterr().err
    assert verify(dataset).ok


def test_what_cannot_be_is_refused(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="samples-per-class is 0; it must be at least 1"):
        copy_dataset(dataset, tmp_path / "copy", samples_per_class=0)
    with pytest.raises(ConfigError, match="num_classes is 99 but split 'train'"):
        copy_dataset(dataset, tmp_path / "copy", num_classes=99)
    with pytest.raises(DataError, match="does not exist"):
        copy_dataset(tmp_path / "nowhere", tmp_path / "copy")


def test_a_damaged_image_stops_the_copy_with_its_place(dataset: Path, tmp_path: Path) -> None:
    shard = dataset / load_manifest(dataset).splits["train"].shards[0].file
    spoiled = bytearray(shard.read_bytes())
    spoiled[512 + 40 : 512 + 60] = b"\0" * 20
    shard.write_bytes(spoiled)
    with pytest.raises(DataError, match=r"train-000000\.tar, byte 0, key '000000000': the image cannot be read"):
        copy_dataset(dataset, tmp_path / "copy")
    assert not (tmp_path / "copy" / "dataset.json").exists()
