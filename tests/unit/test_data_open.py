from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megaclass.config import Augment, Dataset, Synthetic
from megaclass.data.dali import DaliReader
from megaclass.data.indexed import IndexedReader
from megaclass.data.open import open_reader
from megaclass.data.stream import StreamReader
from megaclass.data.synthetic import SyntheticReader
from megaclass.errors import DataError
from tests.support.tiny_dataset import write_tiny_dataset


@pytest.mark.parametrize(
    ("name", "kind"),
    [("indexed", IndexedReader), ("dali", DaliReader), ("stream", StreamReader), ("synthetic", SyntheticReader)],
)
def test_the_reader_named_is_opened_with_its_options(tmp_path: Path, name: str, kind: type) -> None:
    folder = write_tiny_dataset(tmp_path, 13, 4, 9, 3)
    dataset = Dataset.model_validate(
        {
            "path": folder,
            "reader": name,
            "image_size": 11,
            "channels": 3,
            "augment": Augment(flip=1.0),
            "synthetic": Synthetic(num_classes=13, samples_per_class=4),
        }
    )
    reader = open_reader(dataset, batch_size=5, accumulation_steps=2, rank=1, world_size=2, seed=3)
    assert type(reader) is kind
    assert (reader.num_classes, reader.num_samples) == (13, 52)
    batch = next(iter(reader))
    assert batch.images.shape == (5, 3, 11, 11)
    assert batch.labels.dtype == batch.ids.dtype == torch.int64
    assert batch.position == 10
    reader.close()
    with pytest.raises(DataError, match=r"52 samples, fewer than .* 60"):
        open_reader(dataset, batch_size=15, accumulation_steps=2, rank=0, world_size=2, seed=3)
