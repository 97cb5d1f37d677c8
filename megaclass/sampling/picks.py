"""Numbers drawn from a range without a generator and without a number for every member of the range.

`stratified`: the range is cut into as many strata as numbers are wanted, of sizes that differ by one at most, and one
number is picked from each by a counter hash of (key, stratum). The strata are shifted round by a random offset every
draw, so that each number is drawn with the same probability and any two can meet. The picks come sorted and distinct,
at a cost of the number drawn, and without reading anything back from a GPU.

`uniform`: every subset alike. A small range is sorted by a hash of its numbers. In a large one, the first so many
places of a permutation that Feistel rounds define (Luby, Rackoff, 1988); numbers outside the range go round again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megaclass.counter import hashed, hashed_on_host, mix

# How unevenly pairs of numbers meet falls as 2^-(h (rounds / 2 - 1)), 2^(2 h) being the range: one in 64 after four
# rounds over 4,096 numbers, one in 4,096 after six. Smaller ranges are uneven still, but there sorting costs nothing.
_FEISTEL_ROUNDS = 6
_SORTED = 4096
# Of the 63 bits of a hash the upper 31 choose the place in a stratum; times its size they still fit 63.
_PLACE_SHIFT = 32


def number_drawn(rate: float, total: int) -> int:
    """How many of `total` are drawn at `rate`: the nearest whole number, at least one."""
    return min(max(1, round(rate * total)), total)


def stratified(total: int, num_picks: int, start: int, stop: int, *, key: int, device: torch.device) -> Tensor:
    """Those of `num_picks` stratified picks from [0, total) that lie in [start, stop), sorted, [n] int64.

    Every number is picked with probability exactly num_picks / total, because the strata's offset is uniform. The picks
    of neighbouring ranges fit together: any partition of [0, total) yields the same set.
    """
    if start >= stop or num_picks == 0:
        return torch.empty(0, dtype=torch.int64, device=device)
    offset = mix(key) % total
    # In the unshifted range [0, total) this range is one interval, or two where it wraps round. First the one that
    # holds `start`, so that the picks come out sorted.
    low = (start - offset) % total
    high = low + stop - start
    intervals = [(low, min(high, total), start - low)]
    if high > total:
        intervals.append((0, high - total, start - low + total))
    parts = []
    for low, high, shift in intervals:
        first, last = _stratum_of(low, total, num_picks), _stratum_of(high - 1, total, num_picks)
        # Only the strata at the two ends may have their pick outside; asking on the host keeps the shape known.
        first += _pick(first, total, num_picks, key) < low
        last -= _pick(last, total, num_picks, key) >= high
        if first <= last:
            parts.append(_picks(first, last, total, num_picks, key, device).add_(shift))
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=device)


def uniform(total: int, num_picks: int, start: int, stop: int, *, key: int, device: torch.device) -> Tensor:
    """Those of `num_picks` numbers drawn without replacement from [0, total) that lie in [start, stop), sorted.

    Every subset of that size is as likely as any other, up to the hash, and every number is picked with probability
    exactly num_picks / total. Cost: O(num_picks) on every rank, a sort, and reads from the device: `stratified` is the
    faster one.
    """
    if start >= stop or num_picks == 0:
        return torch.empty(0, dtype=torch.int64, device=device)
    if total <= _SORTED:
        picks = hashed(key, torch.arange(total, device=device)).argsort(stable=True)[:num_picks]
    else:
        picks = _first_of_permutation(total, num_picks, key, device)
    return picks[(picks >= start) & (picks < stop)].sort().values


def _first_of_permutation(total: int, num_picks: int, key: int, device: torch.device) -> Tensor:
    """The first places of a permutation of [0, total), [num_picks], shifted round by a random offset."""
    half_bits = max(1, ((total - 1).bit_length() + 1) // 2)
    picks = _permuted(torch.arange(num_picks, device=device), half_bits, key)
    outside = (picks >= total).nonzero()[:, 0]
    while len(outside):
        picks[outside] = _permuted(picks[outside], half_bits, key)
        outside = outside[picks[outside] >= total]
    # Going round again favours some numbers a little; the offset makes all alike.
    return (picks + mix(key ^ _FEISTEL_ROUNDS) % total) % total


def _permuted(x: Tensor, half_bits: int, key: int) -> Tensor:
    """A permutation of [0, 2^(2 half_bits)), elementwise."""
    mask = (1 << half_bits) - 1
    left, right = x >> half_bits, x & mask
    for number in range(_FEISTEL_ROUNDS):
        left, right = right, left ^ (hashed(mix(key ^ number), right) & mask)
    return (left << half_bits) | right


def _stratum_of(number: int, total: int, num_picks: int) -> int:
    """The stratum j whose range [j total // picks, (j + 1) total // picks) holds `number`."""
    return ((number + 1) * num_picks - 1) // total


def _picks(first: int, last: int, total: int, num_picks: int, key: int, device: torch.device) -> Tensor:
    """The picks of strata [first, last] before the shift, [last - first + 1] int64.

    Divisions of 64-bit numbers would take most of the time: the strata's bounds j total // picks are found with one
    in float64 (exact below 2^53), or none where all strata are alike; and a random place in a stratum is the upper part
    of a product.
    """
    strata = torch.arange(first, last + 2, device=device)
    whole, rest = divmod(total, num_picks)
    assert whole + 1 < 1 << 32, whole
    bounds = strata * whole
    if rest:
        assert (last + 1) * rest < 1 << 53, (last, rest)
        bounds += (strata * rest).double().div_(num_picks).floor_().long()
    place = hashed(key, strata[:-1]).bitwise_right_shift_(_PLACE_SHIFT)
    place.mul_(bounds[1:] - bounds[:-1] if rest else whole).bitwise_right_shift_(63 - _PLACE_SHIFT)
    return place.add_(bounds[:-1])


def _pick(stratum: int, total: int, num_picks: int, key: int) -> int:
    """The pick of one stratum before the shift: what `_picks` computes for many on the device."""
    begin = stratum * total // num_picks
    size = (stratum + 1) * total // num_picks - begin
    return begin + ((hashed_on_host(key, stratum) >> _PLACE_SHIFT) * size >> (63 - _PLACE_SHIFT))
