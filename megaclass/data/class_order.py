"""Orders that go by class: classes visited at chosen rates, and micro-batches of a few samples of each of some classes.

Separate from `order.py` because they must know the class of every sample. What they promise is the same: the sample at
a position and the number of its visit are pure functions of the seed and the position, so the whole state is one
integer and neither ranks nor restarts change the sequence.

Both deal like a card player: from a pack of n members in a fixed random order, again and again from the front, and each
hand of consecutive cards is shuffled. So after any number of hands each member came equally often, to one; within a
hand of at most n none comes twice; and which member is dealt as which number is known without dealing those before.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from megaclass.data.class_quotas import ClassQuotas
from megaclass.data.counter import Stream, hash_counters
from megaclass.data.order import SampleOrder, permuted

# So few are sorted sooner than a network over a power of two finds its way down to them.
_FEW = 64
_PACK, _HAND = 0, 1
_CLASSES, _SAMPLES = 0, 1

Integers = NDArray[np.int64]


def dealt(
    numbers: Integers, sizes: Integers, hand_sizes: Integers, keys: NDArray[np.uint64]
) -> tuple[Integers, Integers]:
    """What is dealt as `numbers`, each from a pack of its own: members in [0, size), and how often each came before.

    Args:
        numbers: [n], not negative.
        sizes: [n], of the packs, at least 1.
        hand_sizes: [n], from 1 to the size of the pack.
        keys: [n] uint64, of the packs.
    """
    hands, places = np.divmod(numbers, hand_sizes)
    places = hands * hand_sizes + _shuffled(places, hand_sizes, hash_counters(_HAND, Stream.DEAL, keys, hands))
    rounds, places = np.divmod(places, sizes)
    return _shuffled(places, sizes, hash_counters(_PACK, Stream.DEAL, keys)), rounds


class ClassMembers:
    """The samples of each class, each class a pack of its own; classes without samples are left out.

    Args:
        labels: [samples] int64, the class of each sample as training sees it; at least one sample.
        seed: of the packs.

    Attributes:
        sizes: [classes] int64, samples of each class that has any.

    Cost: 4 bytes of memory per sample (8 from 2**31 samples on) and 16 per class; making it, one sort.
    """

    def __init__(self, labels: Integers, seed: int) -> None:
        assert len(labels) >= 1
        counts = np.bincount(labels)
        self.sizes = counts[counts > 0]
        self._starts = np.cumsum(self.sizes) - self.sizes
        self._ids = np.argsort(labels, kind="stable").astype(np.int32 if len(labels) < 1 << 31 else np.int64)
        self._seed = seed

    def visits(self, classes: Integers, numbers: Integers, hand_sizes: Integers) -> tuple[Integers, Integers]:
        """Sample ids [n] of visits `numbers` [n] to places [n] among the classes, and how often each came before."""
        keys = hash_counters(self._seed, Stream.DEAL, _SAMPLES, classes)
        members, before = dealt(numbers, self.sizes[classes], hand_sizes, keys)
        return self._ids[self._starts[classes] + members].astype(np.int64), before


class BalancedOrder:
    """Position → sample, with classes of n samples visited in proportion to n^(1 - balance).

    An epoch has as many positions as there are samples. In each a class comes as often as its share says, to one, and
    the positions of an epoch are permuted. A class's samples are used up before any comes again, to the epoch.

    Args:
        members: the samples of each class.
        balance: above 0, at most 1.
        seed: of the shares' rounding and of the permutations.

    Cost: 64 bytes of memory per class with samples, and time once per epoch in proportion to the classes and to the
    epochs before; otherwise that of `SampleOrder`, a binary search and a deal.
    """

    def __init__(self, members: ClassMembers, balance: float, seed: int) -> None:
        self._members = members
        self._quotas = ClassQuotas(members.sizes, balance, seed)
        self._places = SampleOrder(int(members.sizes.sum()), seed, stream=Stream.BALANCE)
        # A batch lies in two epochs at most, since an epoch holds a global batch.
        self._layout = lru_cache(maxsize=2)(self._make_layout)

    def visits(self, positions: Integers) -> tuple[Integers, Integers]:
        """Sample ids [n] at positions [n], and how often each sample came before, [n]."""
        positions = np.asarray(positions, np.int64)
        epochs = positions // self._places.num_samples
        places = self._places.sample_ids(positions)
        classes, numbers = np.empty_like(places), np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            ends, offsets = self._layout(epoch)
            classes[here] = np.searchsorted(ends, places[here], side="right")
            numbers[here] = places[here] + offsets[classes[here]]
        return self._members.visits(classes, numbers, self._members.sizes[classes])

    def _make_layout(self, epoch: int) -> tuple[Integers, Integers]:
        """Where each class ends among the places of an epoch, and what makes the number of a visit of a place."""
        before, after = self._quotas.visits_before(epoch), self._quotas.visits_before(epoch + 1)
        ends = np.cumsum(after - before)
        return ends, after - ends


class ClassBatchOrder:
    """Position → sample, in micro-batches of distinct classes with `samples_per_class` samples each, one after another.

    Classes come equally often, to two at any moment and to one after each hand, and so do the samples of a class. A
    class of too few samples repeats them within a micro-batch, as evenly as can be and each time as another visit; in
    others no sample comes twice in one.

    Args:
        members: the samples of each class.
        samples_per_class: divides `micro_batch_size`.
        micro_batch_size: over all ranks; no more classes than have samples.
        seed: of the order of classes.

    Source: Hermans, Beyer, Leibe, *In defense of the triplet loss for person re-identification*, 2017 (PK batches).
    """

    def __init__(self, members: ClassMembers, samples_per_class: int, micro_batch_size: int, seed: int) -> None:
        num_classes, num_together = len(members.sizes), micro_batch_size // samples_per_class
        assert micro_batch_size % samples_per_class == 0
        assert 1 <= num_together <= num_classes, (num_together, num_classes)
        self._members = members
        self._samples_per_class = samples_per_class
        self._key = hash_counters(seed, Stream.DEAL, _CLASSES)
        # Whole micro-batches, so that none takes from two hands, and as many as can be, for their mixing.
        self._hand_size = num_classes // num_together * num_together

    def visits(self, positions: Integers) -> tuple[Integers, Integers]:
        """Sample ids [n] at positions [n], and how often each sample came before, [n]."""
        slots, copies = np.divmod(np.asarray(positions, np.int64), self._samples_per_class)
        num_classes, hand_size = np.full_like(slots, len(self._members.sizes)), np.full_like(slots, self._hand_size)
        classes, before = dealt(slots, num_classes, hand_size, np.broadcast_to(self._key, slots.shape))
        # Whole groups again; from a class of fewer samples straight from the pack, which spreads them best.
        hand_sizes = self._members.sizes[classes] // self._samples_per_class * self._samples_per_class
        numbers = before * self._samples_per_class + copies
        return self._members.visits(classes, numbers, np.maximum(hand_sizes, 1))


def _shuffled(places: Integers, sizes: Integers, keys: NDArray[np.uint64]) -> Integers:
    """Where places [n] go in permutations of [0, size), one for each key and size [n]."""
    result = np.empty_like(places)
    is_few = sizes <= _FEW
    result[~is_few] = permuted(places[~is_few], sizes[~is_few], keys[~is_few])
    if is_few.any():
        few_places, few_sizes, few_keys = places[is_few], sizes[is_few], keys[is_few]
        members = np.arange(int(few_sizes.max()))
        bits = hash_counters(_HAND, Stream.DEAL, few_keys[:, None], members)
        bits[members >= few_sizes[:, None]] = np.iinfo(np.uint64).max
        result[is_few] = np.take_along_axis(np.argsort(bits, axis=1, kind="stable"), few_places[:, None], 1)[:, 0]
    return result
