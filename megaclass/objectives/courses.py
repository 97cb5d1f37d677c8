"""How a hyper-parameter moves over a run: points between which it is held, or runs straight or along a cosine.

Pure functions of the share of the run that is over, so there is no state to save and nothing depends on where a run was
interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from megaclass.errors import ConfigError

SHAPES = ("step", "linear", "cosine")


@dataclass(frozen=True)
class Course:
    """Values at some shares of the run, and what lies between them.

    Attributes:
        shape: `step` holds each value until the next point; `linear` and `cosine` go from one to the next.
        points: (share of the run in [0, 1], value), shares rising. Before the first point its value holds, after the
            last one that one's; a single point is a constant.
    """

    shape: str
    points: tuple[tuple[float, float], ...]

    def at(self, share: float) -> float:
        """The value when `share` of the run is over."""
        if share <= self.points[0][0]:
            return self.points[0][1]
        for (begin, first), (end, last) in pairwise(self.points):
            if share < end:
                passed = (share - begin) / (end - begin)
                weight = {"step": 0.0, "linear": passed, "cosine": (1.0 - math.cos(math.pi * passed)) / 2.0}[self.shape]
                return first + (last - first) * weight
        return self.points[-1][1]

    @property
    def values(self) -> list[float]:
        """The values at the points; nothing outside their range is ever reached."""
        return [value for _, value in self.points]


def course(option: str, shape: str, points: Sequence[Sequence[float]]) -> Course:
    """A checked course of the option called `option`.

    Raises:
        ConfigError: no points, a share outside [0, 1], or shares that do not rise.
    """
    if shape not in SHAPES:
        raise ConfigError(f"{option}.shape {shape!r} does not exist; there are {', '.join(SHAPES)}")
    if not points or any(len(point) != 2 for point in points):
        raise ConfigError(f"{option}.points {list(points)}: give [share of the run, value] pairs, at least one")
    shares = [float(share) for share, _ in points]
    if any(not 0 <= share <= 1 for share in shares):
        raise ConfigError(f"{option}.points {list(points)}: shares of the run must lie in [0, 1]")
    for (begin, _), (end, _) in pairwise(points):
        if end <= begin:
            raise ConfigError(
                f"{option}.points {list(points)}: the point at {end} ends before it starts, at {begin}; "
                "shares of the run must rise"
            )
    return Course(shape, tuple((float(share), float(value)) for share, value in points))
