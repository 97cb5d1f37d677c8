"""Stochastic rounding of float32 to bfloat16, with random bits that are functions of counters.

A weight moves by far less in a step than the spacing of bfloat16 (2^-8 of its size); rounded to the nearest it would
mostly stay where it is. Rounded up with the probability that its place between two neighbours says, it is right on
average. The bits depend on a key, the global row and the column, and so on no rank, no world size and no order.

Source: Gupta et al., "Deep Learning with Limited Numerical Precision", ICML 2015, section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megaclass.counter import hashed_bits, mix, signed

# One counter gives 64 bits, which is 16 for each of four columns.
_COLUMNS_PER_COUNTER = 4
_ODD = signed(0xD6E8FEB86659FD93)


def stochastically(values: Tensor, rows: Tensor, key: int) -> Tensor:
    """`values` [n, dim] float32 as bfloat16, each rounded up or down with the probabilities that keep its mean.

    Numbers that bfloat16 can hold stay as they are, whatever the bits. Not for infinities and NaN.

    Args:
        values: [n, dim] float32; used up.
        rows: [n] int64 global rows, which with the column number the random bits.
        key: of the use and the step.

    Cost: a quarter of a 64-bit product for each number; temporaries of the size of `values`.
    """
    dim = values.shape[1]
    width = -(-dim // _COLUMNS_PER_COUNTER)
    lanes = hashed_bits(mix(key), torch.arange(width, device=values.device))
    # Both sides are thoroughly mixed already; one product and one shift make the words of one row differ as much as
    # those of one column, at a third of what mixing every word would cost.
    words = (hashed_bits(key, rows.clone())[:, None] ^ lanes).mul_(_ODD)
    bits = words.bitwise_xor_((words >> 32).bitwise_and_(0xFFFFFFFF)).view(torch.int16)[:, :dim]
    # The lower half of a float32 is what bfloat16 drops: adding 16 random bits carries into the upper half with the
    # probability that the dropped part is of the spacing. int16 -> int32 keeps the sign; the mask makes it 0 ... 65535.
    raised = values.view(torch.int32).add_(bits.to(torch.int32).bitwise_and_(0xFFFF))
    # The upper halves stand second: all machines torch runs on are little-endian.
    return raised.view(torch.int16)[:, 1::2].contiguous().view(torch.bfloat16)
