"""Names for the parts of a step on a profiler's timeline.

Separate, and at the bottom, because the parts lie in files of every layer. Whoever profiles sees them: `run.profile`,
and any torch profiler around the same code.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch.autograd import profiler

PREFIX = "megaclass: "
STEP = "step"
# In the order in which a step comes to them first. A part inside of another is not counted in the outer one.
PARTS = (
    "data wait", "label gather", "backbone forward", "class layer forward", "gather", "sums", "backbone backward",
    "batch norm", "class layer backward", "reduce-scatter", "weight pass", "update", "norm", "row update",
)  # fmt: skip

_NOTHING = nullcontext()


def part(name: str) -> AbstractContextManager[Any]:
    """A block that is shown as `name`, one of `PARTS` or `STEP`; while no profiler runs it costs one look at a flag."""
    # torch's own flag, for the whole process: the backward pass on a GPU runs in another thread.
    if not profiler._is_profiler_enabled:
        return _NOTHING
    assert name in PARTS or name == STEP, name
    return profiler.record_function(PREFIX + name)
