"""Which rows are negatives, and which samples have an inter term.

`picks.py` draws numbers from a range, `draw.py` says what a draw is, `samplers.py` makes one. A sampler is a pure
function of the labels, the shard and the number of the draw: it has no state, so there is nothing to checkpoint, and
its randomness knows neither rank nor world size. (The nearest-class graph behind `HardSample` has a state of its own.)
"""

from megaclass.sampling.draw import Draw, Sampler
from megaclass.sampling.samplers import (
    AllRows,
    BatchSample,
    ClassSample,
    HardSample,
    PartialFC,
    PositivesOnly,
    build,
)

__all__ = [
    "AllRows",
    "BatchSample",
    "ClassSample",
    "Draw",
    "HardSample",
    "PartialFC",
    "PositivesOnly",
    "Sampler",
    "build",
]
