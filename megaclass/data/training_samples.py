"""The samples that a run was trained on, by id and not in batches, with where each lies and what its class is called.

Separate from the readers, which have an order and augment: a report on the data looks at every sample once as it is,
but must see the labels that training saw. What `open.py` does to the samples of a reader is done here, too.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaclass.config import Config
from megaclass.data.bad_samples import BadSample
from megaclass.data.folder import files_of, open_folder
from megaclass.data.label_noise import with_label_noise
from megaclass.data.manifest import load_class_names, load_split
from megaclass.data.samples import StoredSamples
from megaclass.data.synthetic import SyntheticSamples


class TrainingSamples:
    """The samples a run was trained on, with the labels it was trained with, and what people call them.

    Ids and labels are those of the run's reader: with `dataset.num_classes` they count the classes of the subset
    alone, and with `dataset.label_noise` some labels are wrong.

    Attributes:
        num_samples: ids are in [0, num_samples).
        num_classes: labels are in [0, num_classes).
        is_skipping: whether the run passed over samples that cannot be used.
        what: the samples in words.

    Raises:
        ConfigError: more classes asked for than there are, or wrong labels of a single class.
        DataError: the data set is missing or inconsistent.
    """

    def __init__(self, config: Config) -> None:
        dataset = config.dataset
        self._stored: StoredSamples | None = None
        self._held = ExitStack()
        self.is_skipping = dataset.on_bad_sample == "skip"
        samples: StoredSamples | SyntheticSamples
        if dataset.reader == "synthetic":
            self.what = "the synthetic data set"
            samples = SyntheticSamples(
                **dataset.synthetic.model_dump(), image_size=dataset.image_size, channels=dataset.channels,
                seed=config.train.seed,
            )  # fmt: skip
        else:
            assert dataset.path is not None
            self.what = f"split {dataset.split!r} of {dataset.path}"
            self._files = open_folder(dataset.path, dataset.remote)
            split = load_split(dataset.path, self._files.manifest, dataset.split)
            # Samples are read in any order: behind an address all files are fetched and held.
            self._held.enter_context(self._files.hold(split.classes, *files_of(split)))
            samples = self._stored = StoredSamples(
                self._files.folder,
                dataset.split,
                image_size=dataset.image_size,
                channels=dataset.channels,
                num_classes=dataset.num_classes,
            )
            self._names = load_class_names(self._files.folder, split).names
        self.num_classes, self.num_samples = samples.num_classes, samples.num_samples
        self._samples = with_label_noise(samples, self.num_classes, dataset.label_noise, config.train.seed)

    def read(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.int64], dict[int, BadSample]]:
        """Images [n, size, size, channels] uint8, labels [n] int64, and the bad ones by place."""
        return self._samples.read(ids)

    def class_name(self, label: int) -> str:
        """The name of a class in the data set; its number where there are no names."""
        return str(label) if self._stored is None else self._names[int(self._stored.classes[label])]

    def locate(self, sample_id: int) -> dict[str, Any]:
        """Where a sample lies: `sample`, its id, `key` and `shard`; the two are None for samples that are computed.

        Raises:
            DataError: the sample cannot be read.

        Cost: one read of the sample.
        """
        key, shard = (None, None) if self._stored is None else self._stored.locate(sample_id)
        return {"sample": sample_id, "key": key, "shard": shard}

    def close(self) -> None:
        """Close the shards."""
        if self._stored is not None:
            self._stored.close()
        self._held.close()
