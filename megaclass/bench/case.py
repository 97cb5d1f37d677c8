"""`Case`: one class layer and one batch to measure, as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megaclass.parallel.process import World


@dataclass(frozen=True)
class Case:
    """What is measured; the same on every rank.

    Attributes:
        num_classes: over all ranks.
        dim: width of the embeddings.
        batch_size: samples of each rank.
        sampling_rate: share of the classes drawn in a step; 1 for all.
        preset: our loss.
        optimizer: of the class rows.
        row_dtype: `float32` or `bfloat16`.
        row_update: `deferred` or `fused`.
        row_memory: `device` or `host`; ours.
        kernel: ours.
        world_size: ranks.
    """

    num_classes: int
    dim: int = 512
    batch_size: int = 64
    sampling_rate: float = 1.0
    preset: str = "partial-fc"
    optimizer: str = "sgd"
    row_dtype: str = "float32"
    row_update: str = "deferred"
    row_memory: str = "device"
    kernel: str = "auto"
    world_size: int = 1

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


class Head(Protocol):
    """One implementation of the class layer with its optimizer."""

    def step(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """One step on this rank's batch, rows updated: the gradient of the embeddings [batch, dim]."""
        ...


def batch(case: Case, world: World, number: int) -> tuple[Tensor, Tensor]:
    """Embeddings [batch, dim] and labels [batch] of step `number` on this rank; the same for every implementation."""
    generator = torch.Generator().manual_seed(1_000_003 * number + world.rank)
    embeddings = torch.randn(case.batch_size, case.dim, generator=generator)
    labels = torch.randint(case.num_classes, (case.batch_size,), generator=generator)
    return embeddings.to(world.device), labels.to(world.device)
