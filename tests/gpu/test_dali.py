"""The DALI reader on a CUDA device against the default reader: samples, errors, substitutes, pixels, streams."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megaclass.config import Augment
from megaclass.data.dali import DaliReader
from tests.support.image_files import every_kind, image_file, picture, write_files
from tests.support.readers import opened
from tests.support.tiny_dataset import tar_member, write_tiny_dataset
from tests.unit.test_data_dali import (
    BEHIND_SOUND_HEADERS,
    IN_ORDER,
    MOVED,
    RESIZED,
    ROUNDING,
    WARPED,
    arguments,
    assert_same_samples,
    both,
    levels,
    message,
)
from tests.unit.test_data_decode import BAD_IMAGES
from tests.unit.test_data_indexed import IndexedReader, replace_sample

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here"),
]
GPU = torch.device("cuda", 0)
# nvJPEG against libjpeg-turbo's fast transform, in grey levels: expected, not measured; no device was at hand.
JPEG_MAX, JPEG_MEAN = 16.0, 2.0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """60 samples of 15 classes in 4 shards."""
    return write_tiny_dataset(tmp_path / "data", 15, 4, 9, 4)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"num_classes": 7}, {"label_noise": 0.4}], ids=str)
def test_same_samples_at_every_world_size(folder: Path, world_size: int, options: dict[str, Any]) -> None:
    for rank in range(world_size):
        fixed = {"batch_size": 5, "rank": rank, "world_size": world_size, "augment": Augment(flip=0.5, erase=0.5)}
        one, two = both(folder, 8, 35, GPU, **fixed, **options)
        assert_same_samples(one, two)
        assert all(batch.images.device == GPU and batch.labels.device == GPU for batch in one)
        assert levels(one, two).max() <= ROUNDING


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("augment", [Augment(), MOVED], ids=["plain", "moved"])
def test_every_kind_of_file_in_odd_sizes(tmp_path: Path, channels: int, augment: Augment) -> None:
    kinds = [every_kind(height, width) for height, width in ((24, 24), (40, 31), (13, 61), (90, 115))]
    files = [file for kind in kinds for file in kind.values()]
    names = [name for kind in kinds for name in kind]
    fixed: dict[str, Any] = {"batch_size": 5, "image_size": 24, "channels": channels, "order": IN_ORDER}
    one, two = both(write_files(tmp_path / "data", files), len(files), device=GPU, **fixed, augment=augment)
    assert_same_samples(one, two)
    found = levels(one, two)[: len(files)].flatten(1)
    for number, name in enumerate(names):
        is_jpeg = name.startswith("jpg")
        limit = RESIZED + WARPED + (1 if channels == 1 else 0) + ROUNDING
        assert found[number].max() <= (JPEG_MAX if is_jpeg else limit), name
        assert found[number].mean() <= (JPEG_MEAN if is_jpeg else limit), name


def test_the_tolerance_of_warping_holds_at_112_pixels(tmp_path: Path) -> None:
    files = [image_file(picture(112, 112, seed), "png") for seed in range(6)]
    augment = Augment(flip=0.5, shift=0.2, scale=0.2, rotation=30, shear=10)
    folder = write_files(tmp_path / "data", files)
    found = levels(*both(folder, 4, device=GPU, batch_size=6, image_size=112, channels=3, augment=augment))
    assert found.max() <= WARPED


@pytest.mark.parametrize(("data", "extension", "reason", "text"), [*BAD_IMAGES, *BEHIND_SOUND_HEADERS])
def test_a_bad_image_is_named_or_replaced_as_by_the_default_reader(
    folder: Path, data: bytes, extension: str, reason: str, text: str
) -> None:
    label = np.load(folder / "train-000001.index.npy")["label"][3]
    members = tar_member(f"k.{extension}", data) + tar_member("k.label", label.astype("<i8").tobytes())
    bad = replace_sample(folder, 1, 3, members)
    told = message(opened(DaliReader, folder, "train", **arguments(), device=GPU), 5)
    assert told == message(opened(IndexedReader, folder, "train", **arguments()), 5)
    one, two = both(folder, 10, device=GPU, on_bad_sample="skip", bad_sample_budget=0.1)
    assert_same_samples(one, two)
    assert levels(one, two).max() <= ROUNDING
    assert [skip.sample_id for batch in one for skip in batch.skipped] == [bad, bad]


def test_batches_are_whole_on_a_stream_of_ones_own(tmp_path: Path) -> None:
    """What DALI frees must not be written before torch has read it, whatever torch's stream is busy with."""
    folder = write_files(tmp_path / "data", [image_file(picture(112, 112, seed), "jpg") for seed in range(64)])
    fixed = arguments(batch_size=32, image_size=112, channels=3, augment=MOVED)
    reader = opened(DaliReader, folder, "train", **fixed, device=GPU)
    expected = [batch.images.cpu() for batch in islice(reader, 12)]
    reader.seek(0)
    ballast = torch.randn(4096, 4096, device=GPU)
    stream = torch.cuda.Stream()
    kept = []
    with torch.cuda.stream(stream):
        for batch in islice(reader, 12):
            for _ in range(4):
                ballast = (ballast @ ballast).clamp(-1, 1)
            kept.append(batch.images)
    reader.close()
    stream.synchronize()
    assert all(torch.equal(one.cpu(), two) for one, two in zip(kept, expected, strict=True))


def test_nothing_is_left_on_the_device(folder: Path) -> None:
    def once() -> int:
        reader = opened(DaliReader, folder, "train", **arguments(augment=MOVED), device=GPU)
        list(islice(reader, 2))
        reader.close()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(GPU)[0]

    free = [once() for _ in range(12)]
    # DALI keeps a pool for the life of the process; it must not grow.
    assert free[-1] >= free[2] - 2**20
