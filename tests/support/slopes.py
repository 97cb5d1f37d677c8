"""Derivatives by finite differences, for comparison with those the code gives."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import assume


def numeric_slope(function: Callable[[float], float], at: float, step: float = 1e-6) -> float:
    """The central difference of a float64 function; a point at which it jumps or has a kink is not an example."""
    below, here, above = function(at - step), function(at), function(at + step)
    # A smooth function is a straight line over so short a way, up to its rounding.
    assume(abs((above - here) - (here - below)) <= 0.01 * abs(above - below) + 1e-11)
    return (above - below) / (2 * step)
