"""Writes the tables and pictures of docs/scaling from the planner: `.venv/bin/python docs/scaling/make.py`.

A minute or two on one core. Nothing is trained and nothing of a run's size is allocated.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megaclass import config as configuration
from megaclass import plan
from megaclass.bench import plot
from megaclass.plan import backbone, work
from megaclass.plan.program import backbone_calls, program
from megaclass.plan.scale import Scaled, Scenario, assembled
from megaclass.train import build

HERE = Path(__file__).parent
BATCH = 128
RANKS = (8, 64, 256, 1024)
CLASSES = (1_000_000, 10_000_000, 100_000_000, 1_000_000_000)
PRESETS: dict[str, dict[str, Any]] = {
    "d-softmax-k 1/64": {"preset": "d-softmax-k", "sampling_rate": 1 / 64},
    "d-softmax-k 1/1,000": {"preset": "d-softmax-k", "sampling_rate": 1 / 1000},
    "d-softmax-k 1/64, fused": {"preset": "d-softmax-k", "sampling_rate": 1 / 64, "kernel": "triton"},
    "d-softmax": {"preset": "d-softmax", "sampling_rate": None},
    "partial-fc 1/10": {"preset": "partial-fc", "sampling_rate": 0.1},
}


def rows() -> list[tuple[str, str, Scaled]]:
    """Device, preset and row of every case: all sizes with the first preset, 100 million and 1 billion with others."""
    base = configuration.load(Path("configs/internet.yaml"), [])
    calls, network = backbone_calls(base, BATCH), backbone.trace(base, BATCH)
    found = []
    for name, classifier in PRESETS.items():
        is_first = name == next(iter(PRESETS))
        for num_classes in CLASSES if is_first else (10_000_000, 1_000_000_000):
            for ranks in RANKS if is_first else (64, 1024):
                content = base.model_dump(mode="json")
                content["classifier"] |= classifier
                content["train"]["global_batch_size"] = BATCH * ranks
                resolved = configuration.validate(content)
                preset = build.resolve_preset(resolved)
                done = work.count(resolved, preset, num_classes, ranks)
                made = program(resolved, preset, done, calls, device_type="cuda")
                for device in ("h100", "h200"):
                    row = assembled(resolved, done, made, network, plan.find(device), Scenario())
                    found.append((device, name, row))
                    print(device, name, f"{num_classes:,}", ranks, f"{row.samples_per_second:,.0f}", flush=True)
    return found


def markdown(device: str, found: list[tuple[str, str, Scaled]]) -> str:
    """One device's table."""
    lines = [
        "| loss | classes | GPUs | step ms | samples/s | GB a GPU | head | sent | useful | save every | useful then "
        "| limited by |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for name, preset, row in found:
        if name == device:
            size = f"{row.peak_bytes / 1e9:.1f}" + ("" if row.fits else " (too much)")
            lines.append(
                f"| {preset} | {row.num_classes:,} | {row.ranks:,} | {1e3 * row.time.seconds:.1f} | "
                f"{row.samples_per_second:,.0f} | {size} | {row.time.head_share:.0%} | "
                f"{row.time.communication_share:.0%} | {row.shares['progress']:.1%} | "
                f"{row.best_interval_seconds / 60:.0f} min | {row.best_goodput:.1%} | {row.time.limit} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """All files of this folder but the page."""
    found = rows()
    for device in ("h100", "h200"):
        (HERE / f"{device}.md").write_text(markdown(device, found), encoding="utf-8")
    first = next(iter(PRESETS))
    for num_classes in (10_000_000, 1_000_000_000):
        chosen = [row for device, name, row in found
                  if (device, name) == ("h200", first) and row.num_classes == num_classes]  # fmt: skip
        plot.draw_scaling(chosen, "h200", HERE / f"h200-{num_classes // 1_000_000}m.svg")
    content = [{"device": device, "loss": name} | row.to_json() for device, name, row in found]
    (HERE / "table.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
