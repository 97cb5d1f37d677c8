"""Wrong labels on purpose: a fixed share of the training samples get another class.

Separate because it wraps any source of samples by id, and only training and the report on it go through it: an
evaluation reads the samples themselves. For studies of how a loss stands up to mislabelled data.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megaclass.data.bad_samples import BadSample
from megaclass.data.counter import Stream, hash_counters, uniform
from megaclass.data.ordered import Samples
from megaclass.errors import ConfigError

_IS_WRONG, _WHICH = 0, 1


def with_label_noise(samples: Samples, num_classes: int, share: float, seed: int) -> Samples:
    """The samples that `dataset.label_noise` trains on: `samples` themselves without noise, else `NoisyLabels` of them.

    One function, so that whatever looks at a run's samples after training sees the labels that training saw.
    """
    return NoisyLabels(samples, num_classes, share, seed) if share else samples


def labels_seen(samples: Samples, true_labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """The labels [num_samples] that training sees, of all `samples` of `with_label_noise` with these true ones."""
    return samples.noisy(np.arange(len(true_labels)), true_labels) if isinstance(samples, NoisyLabels) else true_labels


class NoisyLabels:
    """`Samples` whose labels are wrong with probability `share`; images and ids are those of `samples`.

    Whether a sample is mislabelled, and as what, is a function of (seed, sample id): the same in every epoch, on any
    rank and in any worker. Every other class is equally likely. The share is exact in expectation; the deviation of n
    samples is sqrt(n * share * (1 - share)).

    Args:
        samples: where images and true labels come from.
        num_classes: labels are in [0, num_classes).
        share: in [0, 1).
        seed: same on every rank.

    Raises:
        ConfigError: there is no other class.
    """

    def __init__(self, samples: Samples, num_classes: int, share: float, seed: int) -> None:
        assert 0 <= share < 1, share
        if share and num_classes < 2:
            raise ConfigError(f"dataset.label_noise is {share} but there is no other class to name; give 0")
        self._samples = samples
        self._num_classes = num_classes
        self._share = share
        self._seed = seed

    @property
    def num_samples(self) -> int:
        """Ids are in [0, num_samples)."""
        return self._samples.num_samples

    def read(self, sample_ids: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.int64], dict[int, BadSample]]:
        """Images [n, size, size, channels] uint8, labels [n] int64 some of them wrong, and the bad ones by place."""
        images, labels, bad = self._samples.read(sample_ids)
        return images, self.noisy(sample_ids, labels), bad

    def noisy(self, sample_ids: NDArray[np.int64], labels: NDArray[np.int64]) -> NDArray[np.int64]:
        """The labels [n] int64 in place of the true ones [n] of the samples [n]."""
        is_wrong = uniform(hash_counters(self._seed, Stream.LABEL_NOISE, sample_ids, _IS_WRONG)) < self._share
        ids = sample_ids[is_wrong]
        steps = hash_counters(self._seed, Stream.LABEL_NOISE, ids, _WHICH) % np.uint64(max(self._num_classes - 1, 1))
        result = labels.copy()
        result[is_wrong] = (labels[is_wrong] + 1 + steps.astype(np.int64)) % self._num_classes
        return result
