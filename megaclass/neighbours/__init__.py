"""The nearest classes of every class: searched in the background while training goes on, for hard-negative samplers."""

from megaclass.neighbours.graph import NeighbourGraph

__all__ = ["NeighbourGraph"]
