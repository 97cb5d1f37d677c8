"""The DALI reader on a CPU against the default reader: same samples, order, errors and substitutes; pixels."""

from __future__ import annotations

import os
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from megaclass import config
from megaclass.config import Augment, Dataset
from megaclass.config.augment import DALI_AUGMENT, beyond_dali
from megaclass.data.batch import Batch
from megaclass.data.dali import DaliReader
from megaclass.data.dali_pipeline import DaliPipeline, filter_gain
from megaclass.data.indexed import IndexedReader
from megaclass.data.open_order import OrderOptions
from megaclass.errors import ConfigError, DataError
from tests.support.image_files import every_kind, image_file, picture, write_files
from tests.support.readers import opened
from tests.support.tiny_dataset import tar_member, write_tiny_dataset
from tests.unit.test_data_decode import BAD_IMAGES, blank_png
from tests.unit.test_data_indexed import break_image, replace_sample

# Largest differences to the default reader in grey levels of 255, of pictures made to show them.
EXACT = 0.0
RESIZED = 1.0  # rounded once by DALI, twice by Pillow
WARPED = 0.2  # the place an output pixel is read from, at up to 112 pixels
ROUNDING = 1e-3

CPU = torch.device("cpu")
IN_ORDER = OrderOptions(shuffle=False)


def damaged(file: tuple[bytes, str], place: int) -> tuple[bytes, str, str, str]:
    """A file with two bytes changed, to the mark of a JPEG's end; nothing at its own ends shows it."""
    data, kind = bytearray(file[0]), file[1]
    data[place : place + 2] = b"\xff\xd9"
    return bytes(data), kind, "bad-image", "does not decode"


BEHIND_SOUND_HEADERS = [
    damaged(image_file(picture(9, 9), "png"), -26),  # for DALI to reject
    damaged(image_file(picture(40, 40), "jpg", subsampling=0), -400),
    damaged(image_file(picture(40, 40), "jpg", subsampling=2), -400),
]
SIZE = 9
MOVED = Augment(flip=0.5, shift=0.1, scale=0.2, rotation=20, shear=10, erase=0.5)


def arguments(**options: Any) -> dict[str, Any]:
    fixed = {"batch_size": 12, "rank": 0, "world_size": 1, "seed": 4, "image_size": SIZE, "channels": 1}
    return {**fixed, **options}


def read(reader: DaliReader | IndexedReader, num_batches: int, position: int = 0) -> list[Batch]:
    reader.seek(position)
    try:
        return [batch.to(batch.images.device) for batch in islice(reader, num_batches)]
    finally:
        reader.close()


def both(
    folder: Path, num_batches: int, position: int = 0, device: torch.device = CPU, **options: Any
) -> tuple[list[Batch], list[Batch]]:
    """The same batches of the DALI reader on a device, and of the default one."""
    fixed = arguments(**options)
    dali = opened(DaliReader, folder, "train", **fixed, workers=2, device=device)
    indexed = opened(IndexedReader, folder, "train", **fixed)
    assert (dali.num_classes, dali.num_samples) == (indexed.num_classes, indexed.num_samples)
    assert np.array_equal(dali.class_counts, indexed.class_counts)
    return read(dali, num_batches, position), read(indexed, num_batches, position)


def assert_same_samples(one: list[Batch], two: list[Batch]) -> None:
    for first, second in zip(one, two, strict=True):
        assert first.ids.tolist() == second.ids.tolist()
        assert first.labels.tolist() == second.labels.tolist()
        assert (first.position, first.skipped) == (second.position, second.skipped)
        assert first.num_read == second.num_read
        assert first.ids.dtype == first.labels.dtype == torch.int64
        assert first.images.dtype == torch.float32
        assert first.images.is_contiguous()
        assert first.images.shape == second.images.shape


def levels(one: list[Batch], two: list[Batch]) -> Tensor:
    """Differences of the images in grey levels."""
    first, second = (torch.cat([batch.images for batch in batches]).cpu() for batches in (one, two))
    return (first - second).abs() * 127.5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 samples of 15 classes in 4 shards."""
    return write_tiny_dataset(tmp_path_factory.mktemp("dali") / "data", 15, 4, SIZE, 4)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """The same, to be damaged."""
    return write_tiny_dataset(tmp_path / "data", 15, 4, SIZE, 4)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_classes": 7},
        {"label_noise": 0.4},
        {"order": OrderOptions(shuffle_window=2)},
        {"order": OrderOptions(class_balance=0.5, repeats=5)},
        {"order": OrderOptions(samples_per_class=5), "label_noise": 0.2},
        {"num_classes": 13, "label_noise": 0.2, "order": IN_ORDER},
    ],
    ids=str,
)
def test_same_samples_and_bits_at_every_world_size_over_the_end_of_an_epoch(
    folder: Path, world_size: int, options: dict[str, Any]
) -> None:
    augment = Augment(flip=0.5, erase=0.5)
    for rank in range(world_size):
        # A batch of five ends no epoch: the second epoch begins inside one.
        fixed = {"batch_size": 5, "rank": rank, "world_size": world_size, "augment": augment, **options}
        one, two = both(folder, 8, 35, **fixed)
        assert_same_samples(one, two)
        assert levels(one, two).max() == EXACT


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("augment", "tolerance"),
    [
        (Augment(), EXACT),
        (Augment(flip=0.5), EXACT),
        (Augment(erase=0.7), EXACT),
        (Augment(flip=0.5, erase=0.7), EXACT),
        (Augment(shift=0.3), WARPED),
        (Augment(scale=0.5), WARPED),
        (Augment(rotation=180), WARPED),
        (Augment(shear=40), WARPED),
        (Augment(crop=1, crop_area=(0.1, 0.6)), WARPED),
        (Augment(flip=0.5, crop=0.5, rotation=40, rotation_probability=0.4, shift=0.2, shift_probability=0.3), WARPED),
        (Augment(scale=0.5, scale_probability=0.5, shear=20, shear_probability=0.5), WARPED),
        (MOVED, WARPED),
    ],
    ids=str,
)
def test_every_change_of_an_image_of_the_right_size(
    tmp_path: Path, channels: int, augment: Augment, tolerance: float
) -> None:
    files = [image_file(picture(31, 31, seed), "png") for seed in range(11)]
    files += [image_file(picture(31, 31, seed), "jpg", quality=90) for seed in range(11)]
    if channels == 1:
        files = [image_file(picture(31, 31, seed).convert("L"), "png") for seed in range(22)]
    folder = write_files(tmp_path / "data", files, channels)
    one, two = both(folder, 6, batch_size=11, image_size=31, channels=channels, augment=augment)
    assert_same_samples(one, two)
    found = levels(one, two)
    assert found.max() <= tolerance
    assert found.mean() <= tolerance / 10
    if augment != Augment():
        plain, _ = both(folder, 6, batch_size=11, image_size=31, channels=channels)
        assert levels(one, plain).mean() > 1, "nothing was changed"


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("augment", [Augment(), MOVED], ids=["plain", "moved"])
def test_every_kind_of_file_in_odd_sizes(tmp_path: Path, channels: int, augment: Augment) -> None:
    kinds = [every_kind(height, width) for height, width in ((24, 24), (40, 7), (13, 61), (1, 1), (90, 115))]
    files = [file for kind in kinds for file in kind.values()]
    names = [name for kind in kinds for name in kind]
    fixed: dict[str, Any] = {"batch_size": 1, "image_size": 24, "channels": channels, "order": IN_ORDER}
    folder = write_files(tmp_path / "data", files)
    one, two = both(folder, len(files), **{**fixed, "batch_size": 5}, augment=augment)
    assert_same_samples(one, two)
    for number, found in enumerate(levels(one, two)[: len(files)].amax((1, 2, 3)).tolist()):
        is_of_this_size = number < len(kinds[0])
        # Colour becomes grey in another rounding than Pillow's.
        is_rounded = channels == 1 and names[number].startswith("png")
        limit = (
            (EXACT if is_of_this_size else RESIZED) + (1 if is_rounded else 0) + (WARPED if augment != Augment() else 0)
        )
        assert found <= limit + ROUNDING, names[number]


@pytest.mark.parametrize(("size", "tolerance"), [(112, WARPED), (224, 0.5), (448, 1.5), (1024, 4.0)])
def test_the_tolerance_of_warping_grows_with_the_image(tmp_path: Path, size: int, tolerance: float) -> None:
    """DALI walks along each row in steps that were rounded once; white noise shows it best."""
    noise = np.random.default_rng(0).integers(0, 256, (4, size, size), dtype=np.uint8)
    files = [image_file(Image.fromarray(one), "png", compress_level=0) for one in noise]
    folder = write_files(tmp_path / "data", files, 1)
    augment = Augment(flip=0.5, shift=0.2, scale=0.2, rotation=180, shear=10)
    found = levels(*both(folder, 2, batch_size=4, image_size=size, augment=augment))
    assert found.max() <= tolerance
    assert found.mean() <= tolerance / 10


def test_the_share_of_the_resizing_filter_inside_the_image() -> None:
    assert filter_gain(9, 9)[1].tolist() == [1.0] * 9
    # Two pixels to one: the first output pixel, at 1, takes (1, 3, 3, 1) / 8 of the pixels from -1 to 2.
    margin, gain = filter_gain(16, 8)
    assert margin == 3
    assert gain[1:-1] == pytest.approx(np.ones(6))
    assert gain[0] == gain[-1] == pytest.approx(8 / 7)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_threads_change_no_number(folder: Path, workers: int) -> None:
    fixed = arguments(augment=MOVED, image_size=14)
    one = read(opened(DaliReader, folder, "train", **fixed, workers=workers), 6)
    two = read(opened(DaliReader, folder, "train", **fixed, workers=2), 4, 24)
    assert_same_samples(one[2:], two)
    assert all(torch.equal(first.images, second.images) for first, second in zip(one[2:], two, strict=True))


def test_iterating_again_starts_at_the_position_last_sought(folder: Path) -> None:
    reader = opened(DaliReader, folder, "train", **arguments())
    first = next(iter(reader))
    assert torch.equal(next(iter(reader)).ids, first.ids)
    reader.seek(24)
    iterator = iter(reader)
    assert next(iterator).position == 36
    reader.seek(0)
    with pytest.raises(StopIteration):
        next(iterator)
    assert torch.equal(next(iter(reader)).ids, first.ids)
    reader.close()
    reader.close()


def test_global_random_state_is_not_touched(folder: Path) -> None:
    state = torch.get_rng_state()
    read(opened(DaliReader, folder, "train", **arguments(augment=MOVED)), 3)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_batch_keeps_its_pixels_while_others_are_made(folder: Path) -> None:
    reader = opened(DaliReader, folder, "train", **arguments(augment=MOVED))
    batches = iter(reader)
    first = next(batches)
    kept = first.images.clone()
    list(islice(batches, 8))
    reader.close()
    assert torch.equal(first.images, kept)


def message(reader: DaliReader | IndexedReader, num_batches: int) -> str:
    with pytest.raises(DataError) as caught:
        read(reader, num_batches)
    return str(caught.value)


@pytest.mark.parametrize(
    ("data", "extension", "reason", "text"),
    [*BAD_IMAGES, *BEHIND_SOUND_HEADERS, (blank_png(13_300), "png", "", "allowed")],
)
def test_a_bad_image_is_named_or_replaced_as_by_the_default_reader(
    own: Path, data: bytes, extension: str, reason: str, text: str
) -> None:
    label = np.load(own / "train-000001.index.npy")["label"][3]
    bad = replace_sample(
        own, 1, 3, tar_member(f"k.{extension}", data) + tar_member("k.label", label.astype("<i8").tobytes())
    )
    fixed = arguments(augment=Augment(flip=0.5))
    told = message(opened(DaliReader, own, "train", **fixed), 5)
    assert told == message(opened(IndexedReader, own, "train", **fixed), 5)
    assert "train-000001.tar" in told
    assert "key 'k'" in told
    one, two = both(own, 10, augment=Augment(flip=0.5), on_bad_sample="skip", bad_sample_budget=0.1)
    assert_same_samples(one, two)
    assert levels(one, two).max() == EXACT
    assert [skip.sample_id for batch in one for skip in batch.skipped] == [bad, bad]


@pytest.mark.parametrize("kind", ["no label", "other label", "zeros"])
def test_bad_members_too(own: Path, kind: str) -> None:
    from tests.unit.test_data_indexed import bad_members

    label = int(np.load(own / "train-000001.index.npy")["label"][3])
    replace_sample(own, 1, 3, bad_members(kind, label))
    assert message(opened(DaliReader, own, "train", **arguments()), 5) == message(
        opened(IndexedReader, own, "train", **arguments()), 5
    )


def test_many_bad_samples_and_the_budget(own: Path) -> None:
    for place in range(5):
        break_image(own, 0, place)
    for world_size in (1, 2):
        for rank in range(world_size):
            where = {"batch_size": 6, "rank": rank, "world_size": world_size}
            one, two = both(own, 10, **where, on_bad_sample="skip", bad_sample_budget=0.5)
            assert_same_samples(one, two)
            assert any(batch.skipped for batch in one)
    fixed = arguments(batch_size=6, on_bad_sample="skip", bad_sample_budget=0.05)
    told = message(opened(DaliReader, own, "train", **fixed), 10)
    assert "samples this rank read had to be skipped, allowed are 3" in told
    assert told == message(opened(IndexedReader, own, "train", **fixed), 10)


def test_only_sound_headers_reach_dali(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    label = np.load(own / "train-000001.index.npy")["label"][3]
    bomb = blank_png(13_300)
    replace_sample(own, 1, 3, tar_member("k.png", bomb) + tar_member("k.label", label.astype("<i8").tobytes()))
    fed: list[int] = []
    feed = DaliPipeline.feed

    def spy(self: DaliPipeline, feeds: dict[str, Any]) -> None:
        fed.extend(len(image) for image in feeds["encoded"])
        feed(self, feeds)

    monkeypatch.setattr(DaliPipeline, "feed", spy)
    read(opened(DaliReader, own, "train", **arguments(on_bad_sample="skip", bad_sample_budget=0.1)), 5)
    assert fed
    assert max(fed) < len(bomb)


def test_a_failure_that_no_sample_is_to_blame_for_is_not_hidden(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take = DaliPipeline.take
    calls: list[DaliPipeline] = []

    def fail_later(self: DaliPipeline) -> Tensor:
        calls.append(self)
        if calls.count(self) > 2 and len(calls) > 4:  # two blanks, and the first batches
            raise RuntimeError("out of memory")
        return take(self)

    monkeypatch.setattr(DaliPipeline, "take", fail_later)
    reader = opened(DaliReader, folder, "train", **arguments())
    with pytest.raises(RuntimeError, match="out of memory"):
        read(reader, 9)


def test_a_pipeline_that_takes_no_more_batches_says_so_when_their_turn_comes(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one does that an earlier batch broke: everything after it is fed to a new one."""
    break_image(own)
    feed = DaliPipeline._feed
    broken: set[int] = set()

    def feed_unless_broken(self: DaliPipeline, feeds: dict[str, Any]) -> None:
        if id(self) in broken:
            raise RuntimeError("the pipeline is no longer valid")
        feed(self, feeds)
        if len(feeds["encoded"]) > 1:
            broken.add(id(self))

    monkeypatch.setattr(DaliPipeline, "_feed", feed_unless_broken)
    one, two = both(own, 5, on_bad_sample="skip", bad_sample_budget=0.1)
    assert_same_samples(one, two)
    assert levels(one, two).max() == EXACT


def test_damaged_files_are_refused_and_accepted_alike(tmp_path: Path) -> None:
    """DALI's own decoders pass over much damage inside the compressed data of a JPEG."""
    random = np.random.default_rng(0)
    whole = [
        image_file(picture(40, 40), "jpg", quality=90, subsampling=0),
        image_file(picture(40, 40), "jpg", quality=90, progressive=True),
        image_file(picture(40, 40).convert("L"), "jpg", quality=90),
        image_file(picture(40, 40).convert("P"), "png"),
        image_file(picture(40, 40), "png"),
    ]
    files = []
    for number in range(150):
        data, kind = whole[number % len(whole)]
        changed = bytearray(data)
        for _ in range(random.integers(1, 3)):
            changed[random.integers(30, len(data))] = random.integers(256)
        files.append((bytes(changed[: len(data) if number % 7 else random.integers(30, len(data))]), kind))
    folder = write_files(tmp_path / "data", files)
    options: dict[str, Any] = {"batch_size": 1, "image_size": 40, "channels": 3, "order": IN_ORDER}
    one, two = both(folder, len(files), **options, on_bad_sample="skip", bad_sample_budget=1.0)
    assert_same_samples(one, two)
    assert levels(one, two).max() <= RESIZED  # a damaged header may say another size
    assert 40 < sum(bool(batch.skipped) for batch in one) < 140


def test_without_dali_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(ConfigError, match=r"dataset.reader dali needs NVIDIA DALI .*pip install 'megaclass\[dali\]'"):
        opened(DaliReader, folder, "train", **arguments())


def test_dali_is_imported_by_its_reader_alone() -> None:
    import subprocess

    program = "import sys, megaclass.data.dali, megaclass.data.open; sys.exit('nvidia.dali' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_device_that_dali_cannot_use_is_named(folder: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    reader = opened(DaliReader, folder, "train", **arguments(), device=torch.device("cuda", 0))
    with pytest.raises(ConfigError, match=r"DALI cannot run on cuda:0: .*use dataset.reader: indexed"):
        next(iter(reader))
    reader.close()


@pytest.mark.parametrize("name", Augment.model_fields)
def test_changes_are_supported_one_by_one(name: str) -> None:
    """A new option of the augmentation is refused until it is listed, and listed only with a test of its pixels."""
    changed = Augment.model_construct(**{**Augment().model_dump(), name: 0.5})
    assert beyond_dali(changed, "dali") == ([] if name in DALI_AUGMENT else [name])
    assert beyond_dali(Augment(), "dali") == []


def test_other_changes_are_refused_by_name() -> None:
    Dataset(path=Path("x"), reader="dali", augment=Augment(flip=0.5))
    Dataset(path=Path("x"), reader="indexed", augment=Augment(blur=0.5))
    with pytest.raises(ValueError, match=r"dataset\.reader dali does not make blur, jpeg equal to the default reader"):
        Dataset(path=Path("x"), reader="dali", augment=Augment(flip=0.5, blur=0.1, jpeg=0.2))
    assert config.validate({"dataset": {"path": "x", "reader": "dali", "augment": {"flip": 0.5, "erase": 1}},
                            "train": {"steps": 9}}).dataset.augment.flip == 0.5  # fmt: skip


def test_nothing_is_left_of_fifty_readers(folder: Path) -> None:
    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))

    read(opened(DaliReader, folder, "train", **arguments(augment=MOVED), workers=2), 1)
    before = held()
    for number in range(50):
        reader = opened(DaliReader, folder, "train", **arguments(augment=MOVED), workers=2)
        batches = iter(reader)
        next(batches)
        if number % 2:
            reader.seek(12)
        reader.close()
    assert held() == before
