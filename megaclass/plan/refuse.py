"""Refusing a run that cannot fit, before anything of its size is allocated."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from megaclass.config import Config
from megaclass.errors import ConfigError
from megaclass.plan import memory
from megaclass.plan.devices import DEVICES, Device
from megaclass.plan.forecast import Plan, forecast, readable

# Any GPU: its memory is asked for, and the time does not matter here.
_SOME_GPU = "h200"


def device_of(device: torch.device) -> Device:
    """The entry that stands for a rank's device when only memory is of interest."""
    return DEVICES["cpu" if device.type == "cpu" else _SOME_GPU]


def available_bytes(device: torch.device, local_world_size: int | None = None) -> int | None:
    """Memory a rank may use: of its GPU, or its part of what the host has left; None where nobody knows.

    Ranks of a node share the host's memory: LOCAL_WORLD_SIZE, as torchrun sets it, says how many they are.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    ranks = local_world_size or int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    free = [size for size in (_host_bytes(), _cgroup_bytes()) if size is not None]
    return min(free) // ranks if free else None


def check_fits(config: Config, num_classes: int, world_size: int, device: torch.device) -> Plan:
    """The plan of a run that fits.

    Raises:
        ConfigError: it needs more memory than there is: how much, its largest part, and what would make it fit.
    """
    plan = forecast(config, num_classes, world_size, device_of(device))
    limit = available_bytes(device)
    if limit is not None and plan.peak_bytes > limit:
        raise ConfigError(_refusal(config, plan, limit))
    limit = available_bytes(torch.device("cpu"))
    if limit is not None and plan.host_bytes > limit:
        raise ConfigError(
            f"classifier.row_memory host needs {readable(plan.host_bytes)} of the host's memory for each of its ranks "
            f"and {readable(limit)} are there; use classifier.row_dtype bfloat16, optim.class_name adagrad, fewer "
            "classes or more hosts"
        )
    return plan


def _refusal(config: Config, plan: Plan, limit: int) -> str:
    alive = memory.alive(plan.memory_bytes, plan.peak_moment)
    largest = max(alive, key=lambda name: alive[name])
    ways = remedies(config, plan, limit)
    advice = f"any of these would make it fit: {'; '.join(ways)}" if ways else "use fewer classes or a smaller batch"
    return (
        f"this run needs {readable(plan.peak_bytes)} of memory on each of {plan.work.world_size} ranks and "
        f"{readable(limit)} are there; the largest part is {largest} with {readable(alive[largest])}; {advice}"
    )


def remedies(config: Config, plan: Plan, limit: int) -> list[str]:
    """Single changes, each of which alone would bring the peak under `limit` bytes."""
    changes: list[tuple[str, dict[str, dict[str, object]]]] = [
        ("classifier.row_dtype bfloat16", {"classifier": {"row_dtype": "bfloat16"}}),
        ("optim.class_name adagrad", {"optim": {"class_name": "adagrad", "row_momentum_dtype": "float32"}}),
        ("optim.row_update fused with optim.clip_norm null", {"optim": {"row_update": "fused", "clip_norm": None}}),
        ("classifier.sampling_rate 0.015625", {"classifier": {"sampling_rate": 1 / 64}}),
        ("classifier.row_memory host", {"classifier": {"row_memory": "host"}}),
        (
            "bfloat16 rows with adagrad",
            {
                "classifier": {"row_dtype": "bfloat16"},
                "optim": {"class_name": "adagrad", "row_momentum_dtype": "float32"},
            },
        ),
    ]
    found = [name for name, change in changes if _fits(config, change, plan, plan.work.world_size, limit)]
    ranks = plan.work.world_size * 2
    while ranks <= 1024:
        if _fits(config, {}, plan, ranks, limit):
            return [*found, f"{ranks} ranks with as much memory each"]
        ranks *= 2
    return found


def _fits(config: Config, change: dict[str, dict[str, object]], plan: Plan, ranks: int, limit: int) -> bool:
    content = config.model_dump()
    for section, values in change.items():
        content[section] |= values
    try:
        changed = forecast(Config.model_validate(content), plan.work.num_classes, ranks, plan.device)
    except (ValueError, ConfigError):  # the change does not go with the rest of the configuration
        return False
    return changed.peak_bytes <= limit


def _host_bytes() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _cgroup_bytes() -> int | None:
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text(encoding="ascii").strip()
        used = int((folder / "memory.current").read_text(encoding="ascii"))
        counts = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):
        return None
    # Pages of files are given back when memory is needed.
    return None if limit == "max" else max(0, int(limit) - used + int(counts.get("inactive_file", 0)))
