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

    Args:
        dataset: the options; `dataset.path` is set unless the reader is `synthetic`.
        batch_size: of one rank and one micro-batch: global batch / (world size * accumulation steps).
        accumulation_steps: micro-batches per step.
        rank: of this process.
        world_size: number of ranks.
        seed: `train.seed`, same on every rank.
        device: that the trainer computes on, where reader `dali` decodes and augments; default: the CPU.

    Raises:
        ConfigError, DataError: as the readers do.
    """
    common: dict[str, Any] = {
        "batch_size": batch_size,
        "accumulation_steps": accumulation_steps,
        "rank": rank,
        "world_size": world_size,
        "seed": seed,
        "image_size": dataset.image_size,
        "channels": dataset.channels,
        "augment": dataset.augment,
        "workers": dataset.workers,
    }
    ordered: dict[str, Any] = {
        "label_noise": dataset.label_noise,
        "order": OrderOptions(
            shuffle_window=dataset.shuffle_window,
            class_balance=dataset.class_balance,
            samples_per_class=dataset.samples_per_class,
            repeats=dataset.repeats,
        ),
    }
    if dataset.reader == "synthetic":
        return SyntheticReader(**dataset.synthetic.model_dump(), **common, **ordered)
    assert dataset.path is not None
    policy: dict[str, Any] = {"on_bad_sample": dataset.on_bad_sample, "bad_sample_budget": dataset.bad_sample_budget}
    if dataset.reader == "stream":
        from megaclass.data.stream import StreamReader

        stream: dict[str, Any] = {"shuffle_buffer": dataset.shuffle_buffer, "remote": dataset.remote}
        return StreamReader(dataset.path, dataset.split, **common, **policy, **stream)
    assert isinstance(dataset.path, Path), dataset.path
    if dataset.reader == "dali-stream":
        from megaclass.data.dali_stream import DaliStreamReader

        return DaliStreamReader(
            dataset.path, dataset.split, **common, shuffle_buffer=dataset.shuffle_buffer,
            device=device or torch.device("cpu"),
        )  # fmt: skip
    chosen: dict[str, Any] = {"num_classes": dataset.num_classes, **ordered}
    if dataset.reader == "dali":
        from megaclass.data.dali import DaliReader

        return DaliReader(
            dataset.path, dataset.split, **common, **policy, **chosen, device=device or torch.device("cpu")
        )
    return IndexedReader(dataset.path, dataset.split, **common, **policy, **chosen)
