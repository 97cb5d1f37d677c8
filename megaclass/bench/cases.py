"""The cases of `megaclass bench model`: backbones, class counts, samplers, losses, optimizers, batches."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Modelled:
    """One configuration on so many ranks.

    Attributes:
        name: for people.
        ranks: of this machine.
        options: the configuration, as its file would hold it.
    """

    name: str
    ranks: int
    options: dict[str, Any]


def _options(num_classes: int, batch: int, side: int = 16, **sections: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "dataset": {
            "reader": "synthetic", "image_size": side, "channels": 1,
            "synthetic": {"num_classes": num_classes, "samples_per_class": 2},
        },
        "backbone": {"name": "tiny", "dim": 128, "batch_norm": "local"},
        "classifier": {},
        "train": {"steps": 1000, "global_batch_size": batch, "device": "cpu"},
        "evaluate": {"protocols": []},
        "run": {"log_every": 1000000},
    }  # fmt: skip
    for name, values in sections.items():
        found[name] = found.get(name, {}) | values
    return found


FUSED = {"class_name": "adagrad", "row_update": "fused", "clip_norm": None}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "tiny, all of 5,000": _options(5_000, 120, 32, classifier={"preset": "d-softmax"}),
    "tiny, 1/64 of 1,000,000": _options(1_000_000, 120, classifier={"preset": "d-softmax-k", "sampling_rate": 1 / 64}),
    "tiny, sync, partial-fc, adamw": _options(
        200_000, 240, backbone={"batch_norm": "sync"}, classifier={"preset": "partial-fc", "sampling_rate": 0.1},
        optim={"class_name": "adamw", "name": "adamw"},
    ),
    "mobilefacenet, arcface": _options(
        20_000, 24, 32, backbone={"name": "mobilefacenet"}, classifier={"preset": "arcface"}
    ),
    "iresnet18, 1/10 of 100,000, fused": _options(
        100_000, 24, 32, backbone={"name": "iresnet18", "dim": 256},
        classifier={"preset": "d-softmax-k", "sampling_rate": 0.1, "row_dtype": "bfloat16"}, optim=FUSED,
    ),
    "vit-tiny, batch 1/4 of 50,000": _options(
        50_000, 12, 8, backbone={"name": "vit-tiny"}, classifier={"preset": "d-softmax-b", "sampling_rate": 0.25}
    ),
}  # fmt: skip


def cases(ranks: list[int], names: list[str]) -> list[Modelled]:
    """All configurations (or those whose names hold one of `names`) on each number of ranks."""
    chosen = [name for name in CONFIGURATIONS if not names or any(part in name for part in names)]
    found = [Modelled(name, 1, deepcopy(CONFIGURATIONS[name])) for name in chosen]
    return [replace(case, ranks=number) for number in ranks for case in found]
