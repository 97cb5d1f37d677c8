"""`Machine`: what one machine was measured to take for single operators and messages, and how it is kept in a file.

Nothing in it is a measurement of a training step: operators alone, one after another, as many processes at once as the
run has ranks, and messages of two sizes. `megaclass bench machine` makes it, `megaclass plan --machine` uses it.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megaclass.errors import ConfigError
from megaclass.plan.operators import Operator

FORMAT = 2


@dataclass(frozen=True)
class Message:
    """One collective of a group: `start + per_byte * bytes` seconds, where bytes are those of a rank's own tensor.

    Attributes:
        wall: start and seconds per byte until it is done, all ranks having begun.
        cpu: of the rank's processor, all its threads.
    """

    wall: tuple[float, float]
    cpu: tuple[float, float]

    def seconds(self, num_bytes: float) -> float:
        """Until it is done."""
        return self.wall[0] + self.wall[1] * num_bytes

    def cpu_seconds(self, num_bytes: float) -> float:
        """Of the processor."""
        return self.cpu[0] + self.cpu[1] * num_bytes


@dataclass(frozen=True)
class Known:
    """A measured operator.

    Attributes:
        kind: its name without library and overload.
        flops, num_bytes: what it does.
        seconds: median, of the processor.
    """

    kind: str
    flops: int
    num_bytes: int
    seconds: float


@dataclass(frozen=True)
class Machine:
    """Measured seconds.

    Attributes:
        name: of the processor and system.
        cores: processors that the ranks share.
        ranks: processes that measured at once.
        flops: float32 matrix products per second of one process.
        copied: bytes per second that one process reads and writes.
        overhead: of one call from Python, with its part of autograd, beside the operator itself.
        jitter: relative standard deviation of the whole round of operators from one round to the next.
        operators: by `Operator.key`.
        messages: by name of the collective, among other work.
        wrapper: of the processor, what DistributedDataParallel takes in a step for itself and for each parameter,
            beside its messages and the copies of gradients.
        sample_seconds: of the processor to read one sample; 0 where the reader was not measured.
    """

    name: str
    cores: int
    ranks: int
    flops: float
    copied: float
    overhead: float
    jitter: float
    operators: dict[str, Known]
    messages: dict[str, Message] = field(default_factory=dict)
    wrapper: tuple[float, float] = (0.0, 0.0)
    sample_seconds: float = 0.0

    def seconds(self, operator: Operator) -> tuple[float, str]:
        """Of one call, and where that is from: `measured`, `scaled` from the nearest of its kind, or `floor`.

        Scaled: the time of the measured operator of the same kind whose operations and bytes are nearest (distance of
        logarithms), in proportion to operations, or to bytes where it has none. Floor: no operator of its kind was
        measured; operations and bytes at the machine's rates.
        """
        if operator.is_free:
            return 0.0, "measured"
        known = self.operators.get(operator.key)
        if known is not None:
            return known.seconds, "measured"
        alike = [one for one in self.operators.values() if one.kind == operator.kind]
        if not alike:
            return max(operator.flops / self.flops, operator.num_bytes / self.copied), "floor"
        nearest = min(alike, key=lambda one: _distance(one, operator))
        ratio = operator.flops / nearest.flops if operator.flops and nearest.flops else (
            operator.num_bytes / max(1, nearest.num_bytes))  # fmt: skip
        # A small operator takes a time of its own that no size changes; below a microsecond there is nothing to scale.
        fixed = min(nearest.seconds, 1e-6)
        return fixed + (nearest.seconds - fixed) * ratio, "scaled"

    def save(self, file: Path) -> None:
        """Write it as JSON."""
        file.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n", encoding="utf-8")


def load(file: Path) -> Machine:
    """The machine of a file that `Machine.save` wrote.

    Raises:
        ConfigError: it cannot be read, or is none.
    """
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if content.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        messages = {
            name: Message(tuple(one["wall"]), tuple(one["cpu"])) for name, one in content.pop("messages").items()
        }
        operators = {key: Known(**one) for key, one in content.pop("operators").items()}
        wrapper = tuple(content.pop("wrapper"))
        return Machine(**content, operators=operators, messages=messages, wrapper=wrapper)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"--machine {file}: not a profile of a machine ({error}); make one with `megaclass bench machine`"
        ) from None


def _distance(known: Known, operator: Operator) -> float:
    return abs(math.log((known.flops + 1) / (operator.flops + 1))) + abs(
        math.log((known.num_bytes + 1) / (operator.num_bytes + 1))
    )
