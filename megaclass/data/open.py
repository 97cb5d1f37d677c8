"""The reader a configuration asks for, by name.

Separate so that only this file knows all readers, and so that webdataset and DALI are imported only where they are
used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megaclass.config import Dataset
from megaclass.data.batch import Reader
from megaclass.data.indexed import IndexedReader
from megaclass.data.open_order import OrderOptions
from megaclass.data.options import ReaderOptions
from megaclass.data.synthetic import SyntheticReader


def open_reader(
    dataset: Dataset,
    *,
    batch_size: int,
    accumulation_steps: int,
    rank: int,
    world_size: int,
    seed: int,
    device: torch.device | None = None,
) -> Reader:
    """The training reader `dataset.reader` of one rank.

    `dataset.path` is set unless the reader is `synthetic`. `device` is the one that the trainer computes on, where DALI
    decodes and augments; default: the CPU. The rest is as in `ReaderOptions`.

    Raises:
        ConfigError, DataError: as the readers do.
    """
    options = ReaderOptions(
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        seed=seed,
        image_size=dataset.image_size,
        channels=dataset.channels,
        augment=dataset.augment,
        workers=dataset.workers,
        on_bad_sample=dataset.on_bad_sample,
        bad_sample_budget=dataset.bad_sample_budget,
        accumulation_steps=accumulation_steps,
    )
    ordered: dict[str, Any] = {
        "label_noise": dataset.label_noise,
        "order": OrderOptions(
            shuffle_window=dataset.shuffle_window,
            class_balance=dataset.class_balance,
            samples_per_class=dataset.samples_per_class,
            repeats=dataset.repeats,
        ),
    }
    device = device or torch.device("cpu")
    if dataset.reader == "synthetic":
        return SyntheticReader(options, **dataset.synthetic.model_dump(), **ordered)
    assert dataset.path is not None
    if dataset.reader == "stream":
        from megaclass.data.stream import StreamReader

        return StreamReader(
            dataset.path, dataset.split, options, shuffle_buffer=dataset.shuffle_buffer, remote=dataset.remote
        )
    assert isinstance(dataset.path, Path), dataset.path
    if dataset.reader == "dali-stream":
        from megaclass.data.dali_stream import DaliStreamReader

        return DaliStreamReader(
            dataset.path, dataset.split, options, shuffle_buffer=dataset.shuffle_buffer, device=device
        )
    ordered["num_classes"] = dataset.num_classes
    if dataset.reader == "dali":
        from megaclass.data.dali import DaliReader

        return DaliReader(dataset.path, dataset.split, options, **ordered, device=device)
    return IndexedReader(dataset.path, dataset.split, options, **ordered)
