"""What DeepSpeed's engine is told: the options of the run, merged with the user's own file of settings.

Separate because it is plain data and needs no DeepSpeed. What the trainer decides itself (batch, accumulation,
optimizer, clipping, types) is fixed here, and a file that says otherwise is refused: the engine would follow the file
and train something else than the run's configuration says.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megaclass.config import Config
from megaclass.errors import ConfigError

# Numbers that travel together unless a file says otherwise; 80 MB.
_BUCKET = 20_000_000
# What a file may set: traffic, buffers and what the engine reports. None of it changes what is computed.
_FREE = {"steps_per_print", "wall_clock_breakdown", "memory_breakdown", "comms_logger", "zero_optimization"}
_FREE_OF_ZERO = {
    "allgather_bucket_size", "allgather_partitions", "contiguous_gradients", "overlap_comm", "reduce_bucket_size",
    "reduce_scatter", "stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_param_persistence_threshold",
    "stage3_prefetch_bucket_size", "sub_group_size",
}  # fmt: skip


def settings(config: Config, world_size: int) -> dict[str, Any]:
    """The engine's settings for a run of `world_size` ranks, as its JSON has them.

    Raises:
        ConfigError: `train.deepspeed_config` cannot be read, sets what the run's options fix to another value, or sets
            what the strategy does not provide for; names file, key and value.
    """
    train = config.train
    zero: dict[str, Any] = {
        "stage": 1 if train.zero_stage is None else train.zero_stage,
        # Its own default, half a billion numbers, is allocated at once whatever the size of the backbone.
        "reduce_bucket_size": _BUCKET,
        "allgather_bucket_size": _BUCKET,
    }
    if train.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if train.offload == "all":
        zero["offload_param"] = {"device": "cpu"}
    made = {
        "train_batch_size": train.global_batch_size,
        "train_micro_batch_size_per_gpu": train.global_batch_size // (world_size * train.accumulation_steps),
        "gradient_accumulation_steps": train.accumulation_steps,
        "zero_optimization": zero,
        # The joint norm with the class rows is the trainer's to clip.
        "gradient_clipping": 0.0,
        # The engine's parameters stay float32; `train.precision` is autocast within its forward pass.
        "fp16": {"enabled": False},
        "bf16": {"enabled": False},
        # Torch's own optimizers, also for offloaded parts: the engine's are compiled on first use, for minutes.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    if train.deepspeed_config is not None:
        _merge(made, _read(train.deepspeed_config), train.deepspeed_config)
    return made


# What decides each fixed key instead.
_FIXED_BY = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.global_batch_size, train.accumulation_steps and the number of ranks",
    "gradient_accumulation_steps": "train.accumulation_steps",
    "gradient_clipping": "optim.clip_norm, which limits one norm over backbone and class rows",
    "fp16": "train.precision",
    "bf16": "train.precision",
    "amp": "train.precision",
    "torch_autocast": "train.precision",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
    "zero_allow_untested_optimizer": "the strategy, which uses torch's optimizers",
    "zero_force_ds_cpu_optimizer": "the strategy, which uses torch's optimizers",
    "zero_optimization.stage": "train.zero_stage",
    "zero_optimization.offload_optimizer": "train.offload",
    "zero_optimization.offload_param": "train.offload",
    "activation_checkpointing": "train.activation_checkpointing",
    "checkpoint": "the run's own checkpoints",
}


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"train.deepspeed_config {path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:  # neither JSON nor text
        raise ConfigError(f"train.deepspeed_config {path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"train.deepspeed_config {path} holds {type(content).__name__}; it must be a JSON object")
    return content


def _merge(made: dict[str, Any], given: dict[str, Any], path: Path) -> None:
    """Put what the file sets freely into `made`; all that is wrong with it is reported together."""
    faults = []
    for key, value in given.items():
        if key == "zero_optimization" and isinstance(value, dict):
            for inner, setting in value.items():
                fault = _take(made[key], inner, setting, f"{key}.{inner}", inner in _FREE_OF_ZERO)
                faults += [fault] if fault else []
            continue
        fault = _take(made, key, value, key, key in _FREE - {"zero_optimization"})
        faults += [fault] if fault else []
    if faults:
        raise ConfigError("\n".join(f"train.deepspeed_config {path}: {fault}" for fault in faults))


def _take(target: dict[str, Any], key: str, value: Any, name: str, is_free: bool) -> str:
    """Take one setting over, or say why not."""
    if is_free:
        target[key] = value
        return ""
    # "auto" is how files that serve several trainers leave a value to the one that reads them.
    if value == "auto" or (key in target and _agrees(target[key], value)):
        return ""
    shown = json.dumps(value)
    if name in _FIXED_BY:
        fixed = f" ({json.dumps(target[key])})" if key in target else ""
        return f"{name} is {shown}, but it follows from {_FIXED_BY[name]}{fixed}; take it out of the file"
    allowed = sorted(_FREE - {"zero_optimization"}) + sorted(f"zero_optimization.{one}" for one in _FREE_OF_ZERO)
    return f"{name} is {shown}, which this trainer does not provide for; it may set {', '.join(allowed)}"


def _agrees(fixed: Any, value: Any) -> bool:
    """Whether a file's value says the same; of a section, as far as the trainer fixes it, and nothing beside it."""
    if isinstance(fixed, dict) and isinstance(value, dict):
        return value.keys() <= fixed.keys() and all(_agrees(fixed[key], one) for key, one in value.items())
    return bool(fixed == value) and isinstance(fixed, bool) == isinstance(value, bool)
