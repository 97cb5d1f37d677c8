"""Between a running `Training` and the `Snapshot` a checkpoint holds: which tensors there are and under which names.

    backbone/NAME          parameters and buffers of the backbone            replicated
    optimizer/NAME/KEY     state of its optimizer                            replicated
    average/NAME           moving average of the backbone, if there is one   replicated
    class_weight           the class weights                                 one row per class
    class_optimizer/KEY    state of the row optimizer                        one row per class

Everything random in a run is a function of the seed and of counters, so there is no generator state to keep.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from megaclass.checkpoint import Snapshot
from megaclass.errors import CheckpointError
from megaclass.train.loop import Training


def take(training: Training, attempt: int, extra: dict[str, Any]) -> Snapshot:
    """The state after the steps taken so far; the tensors are the live ones, not copies."""
    replicated = _prefixed("backbone", dict(training.strategy.backbone.state_dict()))
    replicated |= _prefixed("optimizer", training.strategy.state())
    if training.average is not None:
        replicated |= _prefixed("average", training.average.state_dict())
    sharded = {"class_weight": training.classifier.weight.detach()}
    sharded |= _prefixed("class_optimizer", training.row_optimizer.state)
    return Snapshot(
        step=training.step,
        position=training.position,
        attempt=attempt,
        replicated=replicated,
        sharded=sharded,
        num_classes=training.classifier.shard.num_classes,
        config=training.config.model_dump(mode="json"),
        extra=extra,
    )


def restore(training: Training, snapshot: Snapshot) -> None:
    """Put a snapshot into a freshly built training.

    Raises:
        CheckpointError: a tensor is missing or has another shape; names it.
    """
    load_module(training.strategy.backbone, _stripped("backbone", snapshot.replicated))
    training.strategy.load_state(_stripped("optimizer", snapshot.replicated))
    if training.average is not None:
        training.average.load_state_dict(_stripped("average", snapshot.replicated))
    own = {"class_weight": training.classifier.weight.detach()}
    own |= _prefixed("class_optimizer", training.row_optimizer.state)
    if own.keys() != snapshot.sharded.keys():
        different = ", ".join(sorted(own.keys() ^ snapshot.sharded.keys()))
        raise CheckpointError(f"the checkpoint's class tensors are not this run's: {different}; start in a new run.dir")
    for name, tensor in own.items():
        _copy(name, snapshot.sharded[name], tensor)
    training.step = snapshot.step
    training.position = snapshot.position
    training.reader.seek(snapshot.position)


def load_module(module: Any, tensors: dict[str, Tensor]) -> None:
    """Copy named tensors into a module's parameters and buffers; names must match exactly."""
    own = dict(module.state_dict())
    if own.keys() != tensors.keys():
        different = ", ".join(sorted(own.keys() ^ tensors.keys())[:5])
        raise CheckpointError(f"the checkpoint's backbone is not this run's: {different}; check the backbone options")
    for name, tensor in own.items():
        _copy(name, tensors[name], tensor)


def backbone_tensors(snapshot: Snapshot) -> dict[str, Tensor]:
    """The backbone to judge: the moving average where the run keeps one, else the backbone itself."""
    average = _stripped("average", snapshot.replicated)
    average.pop("num_updates", None)
    return average or _stripped("backbone", snapshot.replicated)


def _copy(name: str, source: Tensor, target: Tensor) -> None:
    if source.shape != target.shape:
        raise CheckpointError(
            f"tensor {name} has shape {list(source.shape)} in the checkpoint and {list(target.shape)} here; "
            "check the backbone and classifier options"
        )
    target.copy_(source)


def _prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def _stripped(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    start = f"{prefix}/"
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
