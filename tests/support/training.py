"""Small real training runs inside `spawn`: the same code as `megaclass train`, without starting Python anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megaclass import config
from megaclass.observe.journal import read_metrics
from megaclass.parallel.process import World
from megaclass.train import build, loop
from megaclass.train.attempt import Attempt
from megaclass.train.guard import own_run_directory
from tests.support.spawn import spawn
from tests.support.tiny_dataset import write_tiny_dataset


def small_dataset(folder: Path) -> Path:
    """37 classes of 5 samples, and 6 unseen ones: nothing divides by anything."""
    return write_tiny_dataset(folder, num_classes=37, samples_per_class=5, num_shards=3, unseen_classes=6)


def small_config(dataset: Path, run_dir: Path, /, **sections: dict[str, Any]) -> dict[str, Any]:
    """A configuration for it as a plain dictionary; `sections` are merged over it.

    The learning rate is low on purpose. Runs that differ by rounding drift apart in float32 as fast as training moves:
    at a hundred times this rate 1e-7 becomes 6e-4 within 50 steps, in any implementation.
    """
    content: dict[str, Any] = {
        "dataset": {"path": str(dataset), "image_size": 16, "channels": 1, "augment": {"shift": 0.1, "rotation": 10}},
        "backbone": {"name": "tiny", "dim": 16, "width": 0.5, "batch_norm": "sync"},
        "classifier": {"preset": "d-softmax-k", "scale": 16, "sampling_rate": 0.3},
        "optim": {"lr": 0.003, "warmup_steps": 5, "ema_decay": 0.9},
        "train": {"steps": 50, "global_batch_size": 36, "checkpoint_every": 100, "seed": 3},
        "evaluate": {"protocols": ["retrieval"]},
        "run": {"dir": str(run_dir), "log_every": 1, "log_sample_ids": True, "hang_seconds": 60},
    }
    for name, options in sections.items():
        content[name] = {**content.get(name, {}), **options}
    return content


def train_rank(world: World, content: dict[str, Any]) -> int:
    """One rank of a run; its exit code."""
    resolved = config.validate(content)
    with own_run_directory(resolved.run.dir, world):
        run = Attempt(resolved, world)
        try:
            return run.go()
        finally:
            run.close()


def train_all(world: World, contents: list[dict[str, Any]]) -> list[int]:
    """One rank of several runs, one after the other in the same processes."""
    return [train_rank(world, content) for content in contents]


def train(content: dict[str, Any], world_size: int = 1, code: int = 0) -> list[dict[str, Any]]:
    """Run to the end on `world_size` ranks; the lines of metrics.jsonl that stand."""
    assert spawn(train_rank, world_size, content) == [code] * world_size
    return read_metrics(Path(content["run"]["dir"]))


def fit_all(world: World, runs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """On one rank: the losses, norms, samples, final class weights and averaged backbone of every run."""
    return {name: fit(world, content) for name, content in runs.items()}


def fit(world: World, content: dict[str, Any]) -> dict[str, Any]:
    """One run on one rank, without what is written around the steps."""
    training = build.build(config.validate(content), world)
    results: list[loop.StepResult] = []
    try:
        assert loop.fit(training, loop.Hooks(lambda step: False, lambda batches: None, results.append))
    finally:
        training.reader.close()
    if training.classifier.host_rows is not None:
        training.classifier.host_rows.close()
    return {
        "losses": [float(result.output.loss.detach()) for result in results],
        "norms": [float(result.grad_norm) for result in results],
        "ids": [result.ids for result in results],
        "weight": training.classifier.weight.detach().clone(),
        "average": {} if training.average is None else training.average.state_dict(),
    }


def sample_ids(run_dir: Path) -> dict[int, list[int]]:
    """Ids used in each step over all ranks, in rank order; of several attempts the highest stands."""
    import json

    found: dict[tuple[int, int], dict[int, list[int]]] = {}
    for path in sorted((run_dir / "samples").glob("*.jsonl")):
        rank = int(path.stem.rsplit("-", 1)[1])
        for text in path.read_text().splitlines():
            line = json.loads(text)
            found.setdefault((line["step"], line["attempt"]), {})[rank] = line["ids"]
    steps: dict[int, list[int]] = {}
    for step, attempt in sorted(found):
        ranks = found[step, attempt]
        steps[step] = [sample for rank in sorted(ranks) for sample in ranks[rank]]
    return steps
