"""The maker of a reader's batches: samples in an order that was asked for, with the labels that training sees.

Separate because every reader with an order begins with it, whether its images are stored, computed, or decoded by DALI.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from megaclass.data.label_noise import labels_seen, with_label_noise
from megaclass.data.open_order import OrderOptions, open_order
from megaclass.data.options import ReaderOptions
from megaclass.data.ordered import OrderedBatches, Samples
from megaclass.data.reader import check_enough_samples


def open_batches(
    samples: Samples,
    options: ReaderOptions,
    *,
    num_classes: int,
    shard_sizes: NDArray[np.int64],
    true_labels: Callable[[], NDArray[np.int64]],
    label_noise: float,
    order: OrderOptions | None,
    what: str,
) -> OrderedBatches:
    """The batches of one rank, of these samples.

    `num_classes`: labels are in [0, num_classes). `shard_sizes`: [shards] int64, samples of each shard. `true_labels`
    gives the labels [samples] int64, and is called only where the order goes by class. `what`: the samples in words.
    The rest is as for `IndexedReader`.

    Raises:
        ConfigError: wrong labels of a single class.
        DataError: an epoch is smaller than a global batch, or there are too few classes for the order.
    """
    check_enough_samples(samples.num_samples, options, what)
    seen = with_label_noise(samples, num_classes, label_noise, options.seed)
    return OrderedBatches(
        samples=seen,
        order=open_order(
            order or OrderOptions(),
            shard_sizes=shard_sizes,
            labels=lambda: labels_seen(seen, true_labels()),
            seed=options.seed,
            micro_batch_size=options.micro_batch_size,
            what=what,
        ),
        options=options,
    )
