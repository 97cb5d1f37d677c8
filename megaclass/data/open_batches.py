"""The maker of a reader's batches: samples in an order that was asked for, with the labels that training sees.

Separate because every reader with an order begins with it, whether its images are stored, computed, or decoded by DALI.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from megaclass.config import Augment
from megaclass.data.label_noise import labels_seen, with_label_noise
from megaclass.data.open_order import OrderOptions, open_order
from megaclass.data.ordered import OrderedBatches, Samples
from megaclass.data.reader import check_enough_samples


def open_batches(
    samples: Samples,
    *,
    num_classes: int,
    shard_sizes: NDArray[np.int64],
    true_labels: Callable[[], NDArray[np.int64]],
    label_noise: float,
    order: OrderOptions | None,
    batch_size: int,
    rank: int,
    world_size: int,
    accumulation_steps: int,
    seed: int,
    augment: Augment | None,
    is_skipping: bool,
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
    check_enough_samples(samples.num_samples, batch_size, world_size, accumulation_steps, what)
    seen = with_label_noise(samples, num_classes, label_noise, seed)
    return OrderedBatches(
        samples=seen,
        order=open_order(
            order or OrderOptions(),
            shard_sizes=shard_sizes,
            labels=lambda: labels_seen(seen, true_labels()),
            seed=seed,
            micro_batch_size=batch_size * world_size,
            what=what,
        ),
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        seed=seed,
        augment=augment or Augment(),
        is_skipping=is_skipping,
    )
