"""Takes two training steps and prints the peak memory above the interpreter beside the forecast; run as a process."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from megaclass import config
from megaclass.parallel.process import World
from megaclass.plan import find, forecast, number_of_classes
from megaclass.train import build, loop


def highest_bytes() -> int:
    """Highest resident memory of this process so far."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def main(options: str) -> None:
    """Prints JSON: measured and forecast bytes."""
    # A step of a small model first: what torch loads and allocates once is not the run's.
    content = json.loads(options)
    _steps(config.validate({**content, "dataset": {**content["dataset"], "synthetic": {"num_classes": 50}},
                            "classifier": {**content["classifier"], "sampling_rate": None}}))  # fmt: skip
    before = highest_bytes()
    resolved = config.validate(content)
    _steps(resolved)
    plan = forecast(resolved, number_of_classes(resolved), 1, find("cpu"))
    print(json.dumps({"measured": highest_bytes() - before, "forecast": plan.peak_bytes, "parts": plan.memory_bytes,
                      "moment": plan.peak_moment}))  # fmt: skip


def _steps(resolved: config.Config) -> None:
    training = build.build(resolved, World(0, 1, 0, torch.device("cpu"), None, None))
    batches = iter(training.reader)
    for _ in range(2):
        loop.train_step(training, batches, lambda _: None)
        training.step += 1
    training.reader.close()


if __name__ == "__main__":
    main(sys.argv[1])
