"""Between a running `Training` and the `Snapshot` a checkpoint holds: which tensors there are and under which names.

    backbone/NAME          parameters and buffers of the backbone            replicated
    optimizer/NAME/KEY     state of its optimizer                            replicated
    average/NAME           moving average of the backbone, if there is one   replicated
    loss_scale/NAME        the scale of the loss of float16                  replicated
    loss/NAME              a learned bias, its optimizer's state, a running state   replicated
    class_weight           the class weights                                 one row per class
    class_optimizer/KEY    state of the row optimizer                        one row per class
    neighbours/KEY         the nearest-class graph of the sampler `hard`     one row per class

With sub-centres a class's rows are one entry of its own, [classes, sub-centres, ...].

Everything random in a run is a function of the seed and of counters, so there is no generator state to keep.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megaclass.checkpoint import Snapshot
from megaclass.errors import CheckpointError
from megaclass.train.loop import Training


def take(training: Training, attempt: int, extra: dict[str, Any]) -> Snapshot:
    """The state after the steps taken so far; on all ranks together, and whole on rank 0.

    The tensors are the live ones where they are whole, not copies.
    """
    replicated = _prefixed("backbone", training.strategy.backbone_state())
    replicated |= _prefixed("optimizer", training.strategy.optimizer_state())
    if training.average is not None:
        replicated |= _prefixed("average", training.average.state_dict())
    if training.scaler is not None:
        replicated |= _prefixed("loss_scale", training.scaler.state())
    replicated |= _prefixed("loss", _loss_tensors(training))
    return Snapshot(
        step=training.step,
        position=training.position,
        attempt=attempt,
        replicated=replicated,
        sharded=_sharded(training),
        num_classes=training.classifier.shard.num_classes,
        config=training.config.model_dump(mode="json"),
        extra=extra,
    )


def restore(training: Training, snapshot: Snapshot) -> None:
    """Put a snapshot into a freshly built training.

    Raises:
        CheckpointError: a tensor is missing or has another shape; names it.
    """
    training.strategy.load_backbone(_stripped("backbone", snapshot.replicated))
    training.strategy.load_optimizer(_stripped("optimizer", snapshot.replicated))
    if training.average is not None:
        training.average.load_state_dict(_stripped("average", snapshot.replicated))
    if training.scaler is not None:
        training.scaler.load_state(_stripped("loss_scale", snapshot.replicated))
    loss, own_loss = _stripped("loss", snapshot.replicated), _loss_tensors(training)
    if own_loss.keys() != loss.keys():
        different = ", ".join(f"loss/{name}" for name in sorted(own_loss.keys() ^ loss.keys()))
        raise CheckpointError(f"the checkpoint's loss is not this run's: {different}; start in a new run.dir")
    for name, tensor in own_loss.items():
        _copy(f"loss/{name}", loss[name], tensor)
    own = _sharded(training)
    if own.keys() != snapshot.sharded.keys():
        different = ", ".join(sorted(own.keys() ^ snapshot.sharded.keys()))
        raise CheckpointError(f"the checkpoint's class tensors are not this run's: {different}; start in a new run.dir")
    for name, tensor in own.items():
        _copy(name, snapshot.sharded[name], tensor)
    if training.graph is not None:
        training.graph.load_state(_stripped("neighbours", snapshot.sharded), int(loss["neighbours_count_from"]))
    training.step = snapshot.step
    training.position = snapshot.position
    training.reader.seek(snapshot.position)


def _sharded(training: Training) -> dict[str, Tensor]:
    """This rank's tensors with one row per class; live ones, or views of them."""
    classifier, per_class = training.classifier, training.classifier.loss.rows_per_class
    if classifier.host_rows is not None:
        classifier.host_rows.flush()
    rows = {"class_weight": classifier.weight.detach()} | _prefixed("class_optimizer", training.row_optimizer.state)
    if per_class > 1:
        rows = {name: tensor.view(-1, per_class, *tensor.shape[1:]) for name, tensor in rows.items()}
    return rows if training.graph is None else rows | _prefixed("neighbours", training.graph.state())


def _loss_tensors(training: Training) -> dict[str, Tensor]:
    """Tensors of the loss that are the same on every rank."""
    classifier = training.classifier
    tensors = {}
    if classifier.bias is not None and training.bias_optimizer is not None:
        tensors = {"bias": classifier.bias.detach()} | _prefixed("bias_optimizer", training.bias_optimizer.state)
    if classifier.state is not None:
        tensors["state"] = classifier.state
    if training.graph is not None:
        tensors["neighbours_count_from"] = torch.tensor(training.graph.counts_from)
    return tensors


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
