"""The samples that a run was trained on, by id and not in batches, with where each lies and what its class is called.

Separate from the readers, which have an order and augment: a report on the data looks at every sample once as it is,
but must see the labels that training saw. What `open.py` does to the samples of a reader is done here, too.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaclass.config import Config
from megaclass.data.bad_samples import BadSample
from megaclass.data.manifest import load_class_names, load_index, load_manifest, load_split
from megaclass.data.members import parse_sample
from megaclass.data.samples import StoredSamples
from megaclass.data.synthetic import SyntheticSamples


class TrainingSamples:
    """The samples a run was trained on, with the labels it was trained with, and what people call them.

    Attributes:
        num_samples: ids are in [0, num_samples).
        num_classes: labels are in [0, num_classes).
        is_skipping: whether the run passed over samples that cannot be used.
        what: the samples in words.

    Raises:
        DataError: the data set is missing or inconsistent.
    """

    def __init__(self, config: Config) -> None:
        dataset = self._dataset = config.dataset
        self._names: list[str] | None = None
        self._samples: StoredSamples | SyntheticSamples
        self.is_skipping = dataset.on_bad_sample == "skip"
        if dataset.reader == "synthetic":
            self.what = "the synthetic data set"
            self._samples = SyntheticSamples(
                **dataset.synthetic.model_dump(), image_size=dataset.image_size, channels=dataset.channels,
                seed=config.train.seed,
            )  # fmt: skip
        else:
            assert dataset.path is not None
            self.what = f"split {dataset.split!r} of {dataset.path}"
            self._samples = StoredSamples(
                dataset.path, dataset.split, image_size=dataset.image_size, channels=dataset.channels
            )
            self._split = load_split(dataset.path, load_manifest(dataset.path), dataset.split)
            self._names = load_class_names(dataset.path, self._split).names
        self.num_classes, self.num_samples = self._samples.num_classes, self._samples.num_samples

    def read(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.int64], dict[int, BadSample]]:
        """Images [n, size, size, channels] uint8, labels [n] int64, and the bad ones by place."""
        return self._samples.read(ids)

    def class_name(self, label: int) -> str:
        """The name of a class in the data set; its number where there are no names."""
        return str(label) if self._names is None else self._names[label]

    def locate(self, sample_id: int) -> dict[str, Any]:
        """Where a sample lies: `sample`, its id, `key` and `shard`; the two are None for samples that are computed.

        Cost: one read of the sample; the first call loads the index of the split.
        """
        if self._names is None:
            return {"sample": sample_id, "key": None, "shard": None}
        assert self._dataset.path is not None
        records, shards = self._index
        record, shard = records[sample_id], self._split.shards[int(shards[sample_id])]
        with (self._dataset.path / shard.file).open("rb") as file:
            file.seek(int(record["offset"]))
            try:
                key = parse_sample(file.read(int(record["length"]))).key
            except BadSample as error:
                raise error.as_data_error() from None
        return {"sample": sample_id, "key": key, "shard": shard.file}

    @cached_property
    def _index(self) -> tuple[NDArray[Any], NDArray[Any]]:
        assert self._dataset.path is not None
        return load_index(self._dataset.path, self._dataset.split, self._split)

    def close(self) -> None:
        """Close the shards."""
        if isinstance(self._samples, StoredSamples):
            self._samples.close()
