"""Our class layer as a benchmark runs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megaclass import loss
from megaclass.bench.case import Case
from megaclass.classifier import ShardedClassifier
from megaclass.errors import ConfigError
from megaclass.host_rows import HostRows
from megaclass.objectives import presets
from megaclass.optim import rowwise
from megaclass.optim.hosted import HostedRowOptimizer
from megaclass.parallel.process import World
from megaclass.parallel.shard import ClassShard
from megaclass.sampling.samplers import FEW_ROWS

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class _RowOptions:
    """What `rowwise.build` reads of the options of a run."""

    momentum: float = 0.9
    betas: tuple[float, float] = (0.9, 0.999)
    row_momentum_dtype: str = "float32"
    untouched_rows: str = "lazy"


def row_options() -> Any:
    """Momentum 0.9 and lazy rows: what the row optimizers of a benchmark are built with."""
    return _RowOptions()


class Ours:
    """`ShardedClassifier` with a row optimizer.

    Raises:
        ConfigError: the preset or its rate cannot be used.
    """

    def __init__(self, case: Case, world: World) -> None:
        shard = ClassShard(case.num_classes, world.rank, world.size)
        is_sampled = presets.PRESETS[case.preset].sampler != "all" if case.preset in presets.PRESETS else True
        if not is_sampled and case.sampling_rate < 1:
            raise ConfigError(
                f"preset {case.preset!r} uses all classes, so --sampling-rate {case.sampling_rate} means nothing; give "
                "1, or a sampled preset such as partial-fc or d-softmax-k"
            )
        given = {"sampling_rate": case.sampling_rate} if is_sampled else {}
        preset = presets.resolve(case.preset, hyper={}, schedule={}, **given)
        self.classifier = ShardedClassifier(
            case.dim,
            shard,
            loss.build(preset, case.num_classes, seed=0),
            seed=0,
            group=world.group,
            kernel=case.kernel,
            dtype=_DTYPES[case.row_dtype],
            device=world.device,
            on_host=case.row_memory == "host",
        )
        weight = self.classifier.weight.detach()
        optimizer = rowwise.build(case.optimizer, weight, row_options(), seed=0, first_row=shard.start)
        self.optimizer: rowwise.RowOptimizer | HostedRowOptimizer = optimizer
        if case.row_memory == "host":
            if preset.sampler not in FEW_ROWS:
                raise ConfigError(
                    f"--row-memory host: preset {case.preset!r} needs all rows; use d-softmax-k or partial-fc"
                )
            self.classifier.host_rows = HostRows({"weight": weight, **optimizer.state}, 1, world.device)
            self.optimizer = HostedRowOptimizer(optimizer, self.classifier.host_rows)
        self._number = 0
        if case.row_update == "fused":
            self.classifier.row_update = lambda blocks, rows, own: self.optimizer.step_in_backward(
                blocks, rows, own, 0.1, self._number
            )

    def step(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """See `Head.step`."""
        embeddings = embeddings.detach().requires_grad_()
        self._number += 1
        self.classifier(embeddings, labels, draw_id=self._number).loss.backward()
        gradient = self.classifier.take_row_gradient()
        if gradient is not None:
            self.optimizer.step(gradient, 0.1, self._number)
        self.classifier.keep_state(True)
        assert embeddings.grad is not None
        return embeddings.grad
