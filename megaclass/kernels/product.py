"""Matrix products of bfloat16 rows: operands of eight bits' precision, sums in float32.

Torch's own product of two bfloat16 matrices rounds its result to bfloat16, and a cosine so rounded, times a scale of
64, is wrong by up to an eighth. Here only the operands are rounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# Products of up to so many multiplications are rounded by us: torch's own limit is 16^3.
_SMALL = 1 << 18


@contextmanager
def low_precision(is_low: bool, device: torch.device) -> Iterator[None]:
    """Inside the block the CPU multiplies float32 matrices rounded to bfloat16, where it can do so faster.

    oneDNN rounds the operands itself, adds up in float32 and gives float32; on a CPU without bfloat16 products it
    multiplies in float32. On CUDA `product` does the rounding and this does nothing.
    """
    if not is_low or device.type != "cpu":
        yield
        return
    backend: Any = torch.backends.mkldnn
    backend = backend.matmul
    before = backend.fp32_precision
    backend.fp32_precision = "bf16"
    try:
        yield
    finally:
        backend.fp32_precision = before


def product(left: Tensor, right: Tensor, is_low: bool, out: Tensor | None = None) -> Tensor:
    """`left` @ `right`, float32 or wider; rounded to bfloat16 first if `is_low` (on the CPU inside `low_precision`).

    `out` is memory for the result, which is used on the CPU.
    """
    if not is_low:
        return torch.mm(left, right, out=out)
    if left.is_cuda:
        return torch.mm(left.bfloat16(), right.bfloat16(), out_dtype=torch.float32)
    if left.numel() * right.shape[1] <= _SMALL:
        # torch does not give the smallest products to oneDNN; rounded here, they do not depend on how the rows are cut.
        left, right = left.bfloat16().to(left.dtype), right.bfloat16().to(right.dtype)
    return torch.mm(left, right, out=out)
