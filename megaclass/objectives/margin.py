"""`Margin` and its registry: what is done to the cosine of a sample and its own class before the scale.

Separate from the implementations so that each of them imports this file and nothing else of ours. Margins are
differentiated truly; one that is not says so in its name.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megaclass.errors import ConfigError
from megaclass.objectives.registry import Registry


@dataclass(frozen=True)
class Facts:
    """What a margin may know of the samples beside their cosines; the same on every rank.

    Attributes:
        norm: [batch] lengths of the raw embeddings, for a margin that `needs_norm`.
        key: of the random numbers of this draw (see `megaclass.counter`).
    """

    norm: Tensor | None = None
    key: int = 0


class Margin(ABC):
    """The positive map: [batch] cosines -> [batch] adjusted cosines, elementwise.

    An implementation is a frozen dataclass whose fields are its own hyper-parameters beside the size of the margin.

    Attributes:
        needs_norm: whether the lengths of the raw embeddings matter; they are then gathered along with them.
        needs_angle: whether the cosine must really be one, in [-1, 1].
        default: size of the margin if none is given; None for a margin without a size.
        largest: the largest size that means something.
        unit: what the size is measured in.
    """

    needs_norm: ClassVar[bool] = False
    needs_angle: ClassVar[bool] = False
    default: ClassVar[float | None] = None
    largest: ClassVar[float] = 1.0
    unit: ClassVar[str] = "in cosine"

    @abstractmethod
    def __call__(self, cosine: Tensor, size: Tensor, facts: Facts) -> Tensor:
        """Adjusted cosines [batch]; `size` is the margin, a scalar or one for each sample."""

    @property
    def limit(self) -> float:
        """The largest size with these hyper-parameters: that of its kind, or less."""
        return self.largest

    def penalty(self, facts: Facts) -> Tensor | None:
        """A loss of each sample's own, [batch], that is added to its intra term; None for most."""
        return None


MARGINS: Registry[Margin] = Registry("margin_kind")


def check_size(margin: Margin, size: float) -> None:
    """Refuse a size of the margin outside the range in which it means something.

    Raises:
        ConfigError: with the range.
    """
    if not 0 <= size <= margin.limit:
        raise ConfigError(
            f"classifier.margin {size} is outside [0, {margin.limit:.4g}] ({margin.unit}); usual are 0.3 to 0.5"
        )


def angle_of(cosine: Tensor) -> Tensor:
    """The angle [batch] of a cosine, with a finite derivative at both ends."""
    edge = 1e-7 if cosine.dtype == torch.float32 else 1e-14
    return torch.arccos(cosine.clamp(-1.0 + edge, 1.0 - edge))


def continued_cosine(angle: Tensor) -> Tensor:
    """cos(angle) up to pi and from there on falling without end: (-1)^k cos(angle) - 2 k on [k pi, (k + 1) pi]."""
    k = torch.floor(angle.detach() / math.pi)
    return (1.0 - 2.0 * torch.remainder(k, 2.0)) * torch.cos(angle) - 2.0 * k
