"""`train --dry-run`: the resolved configuration, the plan of shards and memory, and how the data begins.

Separate because it must allocate nothing and join nobody: it can be asked on a login node.
"""

from __future__ import annotations

import os

import torch

from megaclass.config import Config
from megaclass.evaluate.split import open_evaluation
from megaclass.objectives import presets
from megaclass.parallel.process import World, choose_device
from megaclass.parallel.shard import ClassShard
from megaclass.plan.forecast import forecast
from megaclass.plan.refuse import device_of
from megaclass.train import build

_BATCHES_SHOWN = 2


def describe(config: Config) -> str:
    """Everything a run would do first, as text; opens the data set and finds what is wrong with it.

    Raises:
        ConfigError, DataError: as the run would.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    build.check_batch(config, size)
    world = World(0, 1, 0, choose_device("cpu", 0), None, None)
    reader = build.build_reader(config, world)
    evaluation = open_evaluation(config)
    preset = build.resolve_preset(config)
    presets.check_negatives(preset, reader.num_classes)
    presets.check_exponents(preset, reader.num_classes, config.classifier.normalisation)
    with torch.device("meta"):  # shapes without memory
        backbone = build.build_backbone(config, World(0, 1, 0, torch.device("meta"), None, None))
    plan = forecast(config, reader.num_classes, size, device_of(choose_device(config.train.device, 0)))
    steps = build.number_of_steps(config, reader)
    shards = [ClassShard(reader.num_classes, rank, size) for rank in range(size)]
    lines = [
        "# resolved configuration",
        config.to_yaml(),
        "# plan",
        f"loss: {preset.objective} with margin {preset.margin_kind} and negative map {preset.negative_map}, sampler "
        f"{preset.sampler}; at the start {preset.values(0.0)}, at the end {preset.values(1.0)}",
        f"ranks: {size}; rows per rank: {', '.join(str(shard.num_rows) for shard in shards[:8])}"
        f"{', ...' if size > 8 else ''}",
        "class rows and optimizer state of the largest shard: "
        f"{plan.memory_bytes['class rows'] + plan.memory_bytes['row optimizer state']:,} bytes",
        plan.to_text().rstrip(),
        f"backbone: {sum(parameter.numel() for parameter in backbone.parameters()):,} parameters",
        f"steps: {steps}, {steps * config.train.global_batch_size / reader.num_samples:.2f} epochs of "
        f"{reader.num_samples:,} samples",
        "evaluation: none" if evaluation is None else f"evaluation: {len(evaluation.sources):,} samples",
        "# order of the data (global batch, all ranks)",
    ]
    batches = iter(reader)
    for number in range(_BATCHES_SHOWN):
        ids = next(batches).ids.tolist()
        lines.append(f"micro-batch {number}: samples {', '.join(map(str, ids[:12]))}{', ...' if len(ids) > 12 else ''}")
    reader.close()
    return "\n".join(lines) + "\n"
