"""The order that the options of a data set ask for.

Separate so that every reader with an order has all of them, by the same rules, and knows none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megaclass.data.class_order import BalancedOrder, ClassBatchOrder, ClassMembers
from megaclass.data.order import Order, RepeatedOrder, SampleOrder
from megaclass.data.windows import WindowOrder
from megaclass.errors import DataError


@dataclass(frozen=True)
class OrderOptions:
    """How samples are ordered; which of these go together is checked with the configuration.

    Attributes:
        shuffle: False keeps manifest order in every epoch.
        shuffle_window: shuffle within this many shards at a time; see `WindowOrder`.
        class_balance: how far rates of classes are evened out; see `BalancedOrder`.
        samples_per_class: of each class in a micro-batch over all ranks; see `ClassBatchOrder`.
        repeats: how often each sample stands in a micro-batch over all ranks; see `RepeatedOrder`.
    """

    shuffle: bool = True
    shuffle_window: int | None = None
    class_balance: float = 0.0
    samples_per_class: int | None = None
    repeats: int = 1

    def __post_init__(self) -> None:
        by_class = bool(self.class_balance) + (self.samples_per_class is not None)
        assert by_class + (self.shuffle_window is not None) + (not self.shuffle) <= 1, self
        assert self.samples_per_class is None or self.repeats == 1, self


def open_order(
    options: OrderOptions,
    *,
    shard_sizes: NDArray[np.int64],
    labels: Callable[[], NDArray[np.int64]],
    seed: int,
    micro_batch_size: int,
    what: str,
) -> Order:
    """The order of some samples.

    Args:
        options: which one.
        shard_sizes: [shards] int64, samples of each shard; their sum is the number of samples.
        labels: gives the label [samples] int64 of every sample as training sees it; called only where needed.
        seed: same on every rank.
        micro_batch_size: over all ranks.
        what: the samples in words.

    Raises:
        DataError: too few classes for `samples_per_class`.
    """
    order: Order
    if options.class_balance:
        order = BalancedOrder(ClassMembers(labels(), seed), options.class_balance, seed)
    elif options.samples_per_class is not None:
        members = ClassMembers(labels(), seed)
        num_together = micro_batch_size // options.samples_per_class
        if num_together > len(members.sizes):
            raise DataError(
                f"{what} has {len(members.sizes)} classes with samples, fewer than the {num_together} of a micro-batch "
                f"of {micro_batch_size} with dataset.samples_per_class {options.samples_per_class}; raise that, or "
                "lower train.global_batch_size"
            )
        order = ClassBatchOrder(members, options.samples_per_class, micro_batch_size, seed)
    elif options.shuffle_window is not None:
        order = WindowOrder(shard_sizes, seed, options.shuffle_window)
    else:
        order = SampleOrder(int(shard_sizes.sum()), seed, options.shuffle)
    return RepeatedOrder(order, options.repeats) if options.repeats > 1 else order
