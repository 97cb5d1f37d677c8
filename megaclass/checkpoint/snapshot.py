"""The state of a run between two steps, and which changes of the configuration may continue it.

Separate because it is what the loop, the saving and the loading have in common; it knows nothing of files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

_MAY_CHANGE = {
    "run.dir",
    "run.log_every",
    "run.log_sample_ids",
    "run.hang_seconds",
    "run.profile",
    "run.profile_after",
    "dataset.workers",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.device",
    "train.strategy",
    "train.fsdp_reshard",
    "train.zero_stage",
    "train.offload",
    "train.deepspeed_config",
    "train.channels_last",
    "train.compile",
    "train.activation_checkpointing",
}
_SECTIONS_MAY_CHANGE = {"observe", "evaluate", "dataset.remote"}
_LENGTH = {"train.steps", "train.epochs"}


@dataclass(frozen=True)
class Snapshot:
    """The whole state of a run after `step` steps, as one rank holds it.

    Attributes:
        step: steps taken.
        position: samples consumed by them, over all ranks; the reader goes on there.
        attempt: which start in its run directory wrote this, from 1.
        replicated: tensors that are the same on every rank; rank 0 has and writes them, others need not have them.
        sharded: this rank's rows of tensors with one row per class, [rows of the shard, ...].
        num_classes: rows of the sharded tensors over all ranks.
        config: the resolved configuration, plain JSON (`Config.model_dump(mode="json")`).
        extra: anything else, plain JSON.
    """

    step: int
    position: int
    attempt: int
    replicated: dict[str, Tensor]
    sharded: dict[str, Tensor]
    num_classes: int
    config: dict[str, Any]
    extra: dict[str, Any]


def compare_config(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """The differences that keep a run from being continued, each as `key: saved value -> new value`.

    Options that change neither the model nor the numbers nor the order of the samples may change and are left out.
    The length of the run may not: the learning rates of the steps already taken followed from it.

    Args:
        saved: `Snapshot.config`.
        current: `Config.model_dump(mode="json")` of the configuration to go on with.
    """
    before, now = _flatten(saved), _flatten(current)
    lines = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key, "absent"), now.get(key, "absent")
        if old == new or key in _MAY_CHANGE or key.rpartition(".")[0] in _SECTIONS_MAY_CHANGE:
            continue
        hint = " (the schedule follows from it; give a new run.dir to train for longer)" if key in _LENGTH else ""
        lines.append(f"{key}: {_show(old)} -> {_show(new)}{hint}")
    return lines


def _flatten(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Options by their full names, `train.steps`."""
    flat: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _show(value: Any) -> str:
    return "none" if value is None else str(value)
