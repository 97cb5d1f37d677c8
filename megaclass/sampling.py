"""Which rows are negatives, and which samples have an inter term: `Draw` and the samplers that make one.

A sampler is a pure function of the labels, the shard and the number of the draw: it has no state, so there is nothing
to checkpoint, and its randomness knows neither rank nor world size. The global class range is cut into as many strata
as classes are wanted, of sizes that differ by one at most, and one class is picked from each by a counter hash of
(seed, draw, stratum); a rank keeps the picks that are its rows. The strata are shifted round by a random offset every
draw, so that each class is drawn with the same probability and any two can meet. The picks come sorted and distinct, at
a cost of the number drawn and not of the number of classes, and without reading anything back from a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megaclass.errors import ConfigError
from megaclass.parallel.shard import ClassShard

_MASK = (1 << 64) - 1
# What a draw is for; keeps draws of rows and draws of batch positions apart.
_STREAM_ROWS, _STREAM_BATCH = 1, 2


@dataclass(frozen=True)
class Draw:
    """One sampler result.

    Attributes:
        rows: [n] int64, unique and sorted local rows of this shard that are negative candidates; None: all.
        batch_rows: [m] int64, sorted positions in the global batch that have an inter term, the same on every rank;
            None: all.
        log_weight: added to every negative logit; ln(1 / inclusion probability) makes the sum unbiased.
    """

    rows: Tensor | None = None
    batch_rows: Tensor | None = None
    log_weight: float = 0.0


class Sampler(Protocol):
    """Makes the draw of one forward pass."""

    def draw(self, labels: Tensor, shard: ClassShard, draw_id: int) -> Draw:
        """Draw number `draw_id` for the global batch's `labels` [global batch] int64 (same on every rank)."""
        ...


@dataclass(frozen=True)
class AllRows:
    """Every class is a negative of every sample."""

    def draw(self, labels: Tensor, shard: ClassShard, draw_id: int) -> Draw:
        """Nothing is drawn."""
        return Draw()


@dataclass(frozen=True)
class ClassSample:
    """A random part of the classes is negative for the whole batch: D-Softmax-K, and Partial-FC with its positives.

    Attributes:
        rate: share of all classes that is drawn; at least one class.
        seed: seed of the run.
        batch_positives: whether the batch's own classes join the drawn ones (beyond the quota).
    """

    rate: float
    seed: int
    batch_positives: bool = False

    def draw(self, labels: Tensor, shard: ClassShard, draw_id: int) -> Draw:
        """This shard's part of max(1, round(rate * classes)) stratified picks; cost O(picks / ranks)."""
        rows = stratified(
            shard.num_classes, number_drawn(self.rate, shard.num_classes), shard.start, shard.stop,
            key=stream_key(self.seed, _STREAM_ROWS, draw_id), device=labels.device,
        ) - shard.start  # fmt: skip
        if self.batch_positives:
            own = shard.to_row(labels)
            rows = torch.unique(torch.cat([rows, own[own >= 0]]))
        return Draw(rows=rows)


@dataclass(frozen=True)
class BatchSample:
    """A random part of the batch meets all classes: D-Softmax-B.

    Attributes:
        rate: share of the global batch that has an inter term; at least one sample.
        seed: seed of the run.
    """

    rate: float
    seed: int

    def draw(self, labels: Tensor, shard: ClassShard, draw_id: int) -> Draw:
        """max(1, round(rate * global batch)) stratified positions, the same on every rank."""
        size = len(labels)
        positions = stratified(
            size, number_drawn(self.rate, size), 0, size,
            key=stream_key(self.seed, _STREAM_BATCH, draw_id), device=labels.device,
        )  # fmt: skip
        return Draw(batch_rows=positions)


def build(kind: str, rate: float | None, seed: int, batch_positives: bool) -> Sampler:
    """The sampler `all`, `classes` or `batch` (see `objectives.presets`)."""
    if kind == "all":
        return AllRows()
    assert rate is not None
    if not 0 < rate <= 1:
        raise ConfigError(f"classifier.sampling_rate {rate} is outside (0, 1]; usual are 1/4 to 1/256")
    return ClassSample(rate, seed, batch_positives) if kind == "classes" else BatchSample(rate, seed)


def number_drawn(rate: float, total: int) -> int:
    """How many of `total` are drawn at `rate`: the nearest whole number, at least one."""
    return min(max(1, round(rate * total)), total)


def stream_key(seed: int, stream: int, draw_id: int) -> int:
    """A 64-bit key for one use of randomness in one draw."""
    return mix((mix((mix(seed & _MASK) + stream) & _MASK) + draw_id) & _MASK)


def stratified(total: int, num_picks: int, start: int, stop: int, *, key: int, device: torch.device) -> Tensor:
    """Those of `num_picks` stratified picks from [0, total) that lie in [start, stop), sorted, [n] int64.

    Every number is picked with probability exactly num_picks / total, because the strata's offset is uniform. The picks
    of neighbouring ranges fit together: any partition of [0, total) yields the same set.
    """
    if start >= stop:
        return torch.empty(0, dtype=torch.int64, device=device)
    offset = mix(key) % total
    # In the unshifted range [0, total) this range is one interval, or two where it wraps round. First the one that
    # holds `start`, so that the picks come out sorted.
    low = (start - offset) % total
    high = low + stop - start
    intervals = [(low, min(high, total), offset)]
    if high > total:
        intervals.append((0, high - total, offset))
    parts = []
    for low, high, shift in intervals:
        first, last = _stratum_of(low, total, num_picks), _stratum_of(high - 1, total, num_picks)
        # Only the strata at the two ends may have their pick outside; asking on the host keeps the shape known.
        first += _pick(first, total, num_picks, key) < low
        last -= _pick(last, total, num_picks, key) >= high
        strata = torch.arange(first, last + 1, device=device)
        begin = strata * total // num_picks
        size = (strata + 1) * total // num_picks - begin
        parts.append(
            (begin + _mix_tensor(strata + _signed(key + 1)).bitwise_and_(_SHIFT_MASKS[1]) % size + shift) % total
        )
    return torch.cat(parts)


def mix(x: int) -> int:
    """A 64-bit number scrambled by the finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014)."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


# After a right shift by n, an int64 keeps copies of its sign; the mask clears them: the shift becomes a logical one.
_SHIFT_MASKS = {n: (1 << (64 - n)) - 1 for n in (1, 27, 30, 31)}


def _signed(x: int) -> int:
    """The int64 with the same bits as the unsigned 64-bit number `x` (modulo 2^64)."""
    x &= _MASK
    return x - (1 << 64) if x >> 63 else x


def _mix_tensor(x: Tensor) -> Tensor:
    """`mix` of int64 tensors, whose products wrap like unsigned ones."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ ((x >> 30) & _SHIFT_MASKS[30])) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & _SHIFT_MASKS[27])) * _signed(0x94D049BB133111EB)
    return x ^ ((x >> 31) & _SHIFT_MASKS[31])


def _stratum_of(number: int, total: int, num_picks: int) -> int:
    """The stratum j whose range [j total // picks, (j + 1) total // picks) holds `number`."""
    return ((number + 1) * num_picks - 1) // total


def _pick(stratum: int, total: int, num_picks: int, key: int) -> int:
    """The pick of one stratum before the shift: what `stratified` computes for many on the device."""
    begin = stratum * total // num_picks
    size = (stratum + 1) * total // num_picks - begin
    return begin + (mix((stratum + key + 1) & _MASK) & _SHIFT_MASKS[1]) % size
