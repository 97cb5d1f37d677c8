"""Every sample accounted for: counts by reason over ranks, restarts and world sizes, and the list of the bad ones."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megaclass import config
from megaclass.cli import main
from megaclass.data.open import open_reader
from megaclass.observe.report import write_report
from megaclass.parallel.process import World
from megaclass.train import loop
from megaclass.train.attempt import Attempt
from megaclass.train.guard import own_run_directory
from tests.support.spawn import spawn
from tests.support.tiny_dataset import encode, shard_entry, tar_member, tiny_image, write_manifest, write_shard
from tests.support.training import sample_ids, small_config, small_dataset, train

STEPS = 31  # six epochs of 185 samples in batches of 36, and six samples more
REASONS = {5: "bad-image", 70: "bad-label", 140: "bad-tar"}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """185 samples in shards of unequal size; three of them cannot be used, each for another reason."""
    folder = small_dataset(tmp_path_factory.mktemp("data") / "tiny")
    samples: list[tuple[bytes, int, int]] = []
    for number in range(185):
        label = number % 37
        image = tar_member(f"{number}.png", encode(tiny_image(label, number, 16, 1)))
        if number == 5:
            image = tar_member(f"{number}.png", b"not an image at all")
        value = np.array(99 if number == 70 else label, "<i8").tobytes()
        name = f"{number}.label" if number != 140 else "other.label"
        samples.append((image + tar_member(name, value), label, 0))
    content = json.loads((folder / "dataset.json").read_text())
    content["splits"]["train"]["shards"] = []
    for place, (start, stop) in enumerate([(0, 4), (4, 101), (101, 185)]):
        write_shard(folder, f"train-{place:06d}", samples[start:stop])
        content["splits"]["train"]["shards"].append(shard_entry(folder, f"train-{place:06d}"))
    write_manifest(folder, content)
    return folder


def config_for(dataset: Path, run_dir: Path, **options: Any) -> dict[str, Any]:
    content = small_config(dataset, run_dir, train={"steps": STEPS, "checkpoint_every": 8})
    content["dataset"] |= {"on_bad_sample": "skip", "bad_sample_budget": 0.05, **options}
    content["evaluate"] = {"protocols": []}
    return content


def samples_of(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "summary.json").read_text())["samples"]


def listed(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in (run_dir / "skipped").iterdir() for line in path.read_text().splitlines()]


def expected_skips(dataset: Path) -> Counter[str]:
    """By reason, over the positions of the run, as a reader of its own meets them."""
    options = config.validate(config_for(dataset, Path("unused"))).dataset
    reader = open_reader(options, batch_size=36, accumulation_steps=1, rank=0, world_size=1, seed=3)
    batches = iter(reader)
    skipped = [sample for _ in range(STEPS) for sample in next(batches).skipped]
    reader.close()
    return Counter(sample.reason for sample in skipped)


def crash_at(world: World, content: dict[str, Any], last: int) -> None:
    """Train up to a step and end there without a word, as a rank that is killed: nothing is saved or written."""
    with own_run_directory(Path(content["run"]["dir"]), world):
        run = Attempt(config.validate(content), world)
        original = loop.Hooks.__init__

        def hooks(self: Any, should_stop: Any, *rest: Any) -> None:
            def stop(step: int) -> bool:
                if step >= last:
                    raise KeyboardInterrupt
                return False

            original(self, stop, *rest)

        loop.Hooks.__init__ = hooks  # type: ignore[method-assign]
        try:
            run.go()
        except KeyboardInterrupt:
            pass
        finally:
            loop.Hooks.__init__ = original  # type: ignore[method-assign]
            run.close()


@pytest.mark.distributed
@pytest.mark.slow
def test_counts_survive_crashes_and_other_world_sizes(dataset: Path, tmp_path: Path) -> None:
    straight, moved = tmp_path / "straight", tmp_path / "moved"
    train(config_for(dataset, straight), 1)
    by_reason = expected_skips(dataset)
    assert set(by_reason) == set(REASONS.values())
    trained = STEPS * 36
    assert samples_of(straight) == {
        "read": trained + by_reason.total(), "trained": trained, "skipped": dict(by_reason), "unlisted": 0,
        "step": STEPS, "epochs_checked": 6, "replayed": 0,
    }  # fmt: skip
    content = config_for(dataset, moved)
    for world_size, last in ((2, 13), (3, 19), (4, 28)):  # 8, 16 and 24 are saved; the rest is lost
        spawn(crash_at, world_size, content, last)
    train(content, 1)
    assert samples_of(moved) == {**samples_of(straight), "replayed": 36 * (5 + 3 + 4)}
    assert sample_ids(moved) == sample_ids(straight)
    assert len(listed(straight)) == 3  # of one rank: each once
    for run_dir in (straight, moved):
        lines = listed(run_dir)
        assert {(line["sample"], line["reason"]) for line in lines} == set(REASONS.items())
        for line in lines:
            assert line["shard"].endswith("train-000001.tar" if line["sample"] < 101 else "train-000002.tar")
            assert line["key"] == str(line["sample"])
            assert line["detail"].startswith(f"shard {line['shard']}, byte ")
    page = write_report(moved).read_text()
    assert "read = trained + skipped" in page
    assert "ends of epochs at which this was checked" in page


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_streamed_run_accounts_for_its_samples(dataset: Path, tmp_path: Path, workers: int) -> None:
    """The stream reader must see whole shards, so only the samples that its check of a shard passes can be bad."""
    folder = tmp_path / "data"
    folder.mkdir()
    for path in dataset.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tar = folder / "train-000002.tar"
    other = tar_member("other.label", np.array(140 % 37, "<i8").tobytes())
    tar.write_bytes(tar.read_bytes().replace(other, tar_member("140.label", other[512:520])))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config_for(folder, tmp_path / "run", reader="stream", workers=workers)))
    assert main(["train", str(path), "--train.checkpoint-every", "100"]) == 0
    samples = samples_of(tmp_path / "run")
    assert samples["skipped"].keys() == {"bad-image", "bad-label"}
    assert samples["read"] == STEPS * 36 + sum(samples["skipped"].values())
    assert {(line["sample"], line["key"]) for line in listed(tmp_path / "run")} == {(5, "5"), (70, "70")}


def test_a_failed_run_tells_what_it_knows(dataset: Path, tmp_path: Path) -> None:
    """The counts are those of the last checkpoint or end of an epoch, and say which step that was."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config_for(dataset, tmp_path / "run", bad_sample_budget=0.012)))
    assert main(["train", str(path), "--train.checkpoint-every", "4"]) == 3
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    samples = summary["samples"]
    assert summary["status"] == "failed"
    assert samples["trained"] == samples["step"] * 36
    assert samples["read"] == samples["trained"] + sum(samples["skipped"].values())
