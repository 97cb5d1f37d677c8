"""Random numbers as functions of counters, in torch: no generator, no state, the same on every device and rank.

Separate and below everything else because draws of classes and random margins both need it. A number depends on a key
(of the seed, of what it is for, and of the draw) and on its own index; whoever asks for some of the indices gets those
of the whole.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
# What a draw is for; keeps the uses of randomness in one draw apart.
STREAM_ROWS, STREAM_BATCH, STREAM_MARGIN, STREAM_ROUNDING = 1, 2, 3, 4


def mix(x: int) -> int:
    """A 64-bit number scrambled by the finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014)."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def stream_key(seed: int, stream: int, draw_id: int) -> int:
    """A 64-bit key for one use of randomness in one draw."""
    return mix((mix((mix(seed & _MASK) + stream) & _MASK) + draw_id) & _MASK)


def hashed(key: int, counters: Tensor) -> Tensor:
    """Evenly distributed int64 numbers in [0, 2^63), one for each counter [n] int64."""
    return _mix_in_place(counters + signed(key + 1)).bitwise_and_(_SHIFT_MASKS[1])


def hashed_bits(key: int, counters: Tensor) -> Tensor:
    """64 random bits as an int64 for each counter [...] int64; the counters are used up."""
    return _mix_in_place(counters.add_(signed(key + 1)))


def hashed_on_host(key: int, counter: int) -> int:
    """What `hashed` gives for one counter, without a device."""
    return mix((counter + key + 1) & _MASK) & _SHIFT_MASKS[1]


def normal(key: int, counters: Tensor, dtype: torch.dtype) -> Tensor:
    """Standard normal numbers, one for each counter [n] int64 (Box and Muller, 1958)."""
    first, second = (hashed(mix((key + which) & _MASK), counters) for which in (1, 2))
    # 53 random bits as a number in (0, 1]: never zero, whose logarithm would be infinite.
    radius = torch.sqrt(-2.0 * torch.log(((first >> 10).double() + 1.0) / (1 << 53)))
    return (radius * torch.cos((second >> 10).double() * (2.0 * math.pi / (1 << 53)))).to(dtype)


def signed(x: int) -> int:
    """The int64 with the same bits as the unsigned 64-bit number `x` (modulo 2^64)."""
    x &= _MASK
    return x - (1 << 64) if x >> 63 else x


# After a right shift by n, an int64 keeps copies of its sign; the mask clears them: the shift becomes a logical one.
_SHIFT_MASKS = {n: (1 << (64 - n)) - 1 for n in (1, 27, 30, 31)}


def _mix_in_place(x: Tensor) -> Tensor:
    """`mix` of int64 tensors, whose products wrap like unsigned ones; in place."""
    x.add_(signed(0x9E3779B97F4A7C15))
    x.bitwise_xor_((x >> 30).bitwise_and_(_SHIFT_MASKS[30])).mul_(signed(0xBF58476D1CE4E5B9))
    x.bitwise_xor_((x >> 27).bitwise_and_(_SHIFT_MASKS[27])).mul_(signed(0x94D049BB133111EB))
    return x.bitwise_xor_((x >> 31).bitwise_and_(_SHIFT_MASKS[31]))
