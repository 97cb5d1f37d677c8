"""Training on a data set behind an address, from a server that misbehaves: the run as from a disk, or the cause."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from megaclass.cli import main
from megaclass.config import Remote
from megaclass.data.address import parse_location
from megaclass.data.folder import open_folder
from megaclass.observe.journal import read_metrics
from megaclass.parallel.process import World
from tests.support.interrupted import digest, start
from tests.support.shard_server import Fault, ShardServer, serve
from tests.support.spawn import spawn
from tests.support.tiny_dataset import write_tiny_dataset
from tests.support.training import sample_ids, small_config, train

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
NUM_SAMPLES = 185


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """37 classes of 5 samples in 7 shards, and 6 unseen ones."""
    return write_tiny_dataset(tmp_path / "tiny", num_classes=37, samples_per_class=5, num_shards=7, unseen_classes=6)


@pytest.fixture
def server(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ShardServer]:
    monkeypatch.setenv("NO_PROXY", "*")
    with serve(dataset) as running:
        yield running


def config_of(where: Path | str, tmp_path: Path, name: str, **sections: dict[str, Any]) -> dict[str, Any]:
    remote = {"cache_dir": str(tmp_path / f"cache-{name}"), "attempts": 4, "timeout_seconds": 1}
    dataset = {"reader": "stream", "shuffle_buffer": 20, "remote": remote, **sections.pop("dataset", {})}
    sections = {"train": {"steps": 12, "checkpoint_every": 4}, "run": {"hang_seconds": 200}, **sections}
    return small_config(Path("x"), tmp_path / name, **sections, dataset={"path": str(where), **dataset})


def outcome(run_dir: Path) -> tuple[Any, Any, str]:
    losses = [(line["step"], line["loss_hex"]) for line in read_metrics(run_dir)]
    return losses, sample_ids(run_dir), digest(run_dir)


@pytest.mark.distributed
@pytest.mark.slow
def test_two_ranks_over_a_bad_connection_train_as_from_a_disk(
    dataset: Path, server: ShardServer, tmp_path: Path
) -> None:
    train(config_of(dataset, tmp_path, "local"), 2)
    server.faults = {
        "dataset.json": [Fault("status", 503), Fault("reset", 50)],
        "train-000000.tar": [Fault("reset", 3000), Fault("stall", 100)],
        "train-000001.tar": [Fault("wrong")],
        "train-000002.index.npy": [Fault("short", 100)],
        "train-000003.tar": [Fault("huge"), Fault("status", 429), Fault("stall-first")],
        "train-000004.tar": [Fault("drip")],
        "unseen-000000.tar": [Fault("short", 1000)],
    }
    expected = Counter({path.name: 1 for path in dataset.iterdir() if path.name != "train.classes.json"})
    expected.update({name: len(faults) for name, faults in server.faults.items()})
    train(config_of(server.url, tmp_path, "remote"), 2)
    assert outcome(tmp_path / "remote") == outcome(tmp_path / "local")
    evaluations = [
        json.loads((tmp_path / name / "summary.json").read_text())["evaluation"] for name in ("remote", "local")
    ]
    assert evaluations[0] == evaluations[1]
    assert server.counts() == expected, "two ranks fetch each file once, but for what failed"


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_is_lost_in_an_epoch(dataset: Path, server: ShardServer, tmp_path: Path, workers: int) -> None:
    """Also with a cache that holds but three of the seven shards."""
    server.faults = {f"train-{n:06d}.tar": [Fault("reset", 500 * n), Fault("status", 500)] for n in range(7)}
    size = max(path.stat().st_size for path in dataset.glob("train-*.tar"))
    content = config_of(
        server.url, tmp_path, "run", train={"steps": 10, "global_batch_size": 37}, evaluate={"protocols": []},
        dataset={"workers": workers},
    )  # fmt: skip
    content["dataset"]["remote"]["cache_gib"] = (3 * size + 30000) / 2**30
    assert main(["train", str(run_file(content, tmp_path))]) == 0
    ids = [sample for _, used in sorted(sample_ids(tmp_path / "run").items()) for sample in used]
    for epoch in range(2):
        assert Counter(ids[epoch * NUM_SAMPLES : (epoch + 1) * NUM_SAMPLES]) == Counter(range(NUM_SAMPLES))


@pytest.mark.slow
def test_killed_in_mid_download_and_continued(dataset: Path, server: ShardServer, tmp_path: Path) -> None:
    """Continued from the shard it was in, as a run from a disk is: both were killed after step 2, and go on alike."""
    # So many shards that the first epoch still has some to fetch by then.
    write_tiny_dataset(dataset, num_classes=37, samples_per_class=5, num_shards=14, unseen_classes=6)
    stalled: list[str] = []

    def stall_after_a_checkpoint(name: str) -> None:
        if not stalled and name.endswith(".tar") and saved(tmp_path / "remote"):
            stalled.append(name)
            server.faults[name] = [Fault("stall", 3000)]

    server.before = stall_after_a_checkpoint

    def content(name: str, where: Path | str) -> dict[str, Any]:
        made = config_of(where, tmp_path, name, train={"steps": 14, "checkpoint_every": 2}, run={"hang_seconds": 300})
        made["dataset"]["remote"]["timeout_seconds"] = 20
        return made

    def kill_when(name: str, where: Path | str, is_time: Callable[[], bool]) -> list[int]:
        process = start(content(name, where), 1)
        try:
            deadline = time.monotonic() + 100
            while not is_time():
                assert time.monotonic() < deadline
                assert process.poll() is None, process.communicate()[0]
                time.sleep(0.002)
        finally:
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()
        return saved(tmp_path / name)

    def is_part_on_disk() -> bool:  # what the server has sent may still be on its way
        parts = (tmp_path / "cache-remote").rglob(f"{stalled[0]}.*.part") if stalled else ()
        return [path.stat().st_size for path in parts] == [3000]

    assert kill_when("remote", server.url, is_part_on_disk) == [2]
    for _ in range(5):  # it may be faster than we are
        shutil.rmtree(tmp_path / "local", ignore_errors=True)
        if kill_when("local", dataset, lambda: bool(saved(tmp_path / "local"))) == [2]:
            break
    server.requests.clear()
    for name, where in (("remote", server.url), ("local", dataset)):
        process = start(content(name, where), 1)
        told, _ = process.communicate(timeout=120)
        assert process.returncode == 0, told
    assert outcome(tmp_path / "remote") == outcome(tmp_path / "local")
    asked = [part for name, part in server.requests if name == stalled[0]]
    assert asked[0] == "bytes=3000-", "the rest of what the killed process had begun"


def saved(run_dir: Path) -> list[int]:
    """Steps of the complete checkpoints of a run."""
    return [int(path.parent.name[5:]) for path in (run_dir / "checkpoints").glob("step-?????????/manifest.json")]


def _read_over_and_over(world: World, url: str, remote: dict[str, Any], digests: dict[str, str]) -> int:
    """Every rank reads all shards in orders of its own, with one ahead; the most that was ever in the cache."""
    files = open_folder(parse_location(url), Remote.model_validate(remote))
    rng, most = np.random.default_rng(world.rank), 0
    for _ in range(4):
        names = rng.permutation(sorted(digests)).tolist()
        for name, following in pairwise([*names, names[0]]):
            with files.hold(name):
                files.fetch_ahead(following)
                assert hashlib.sha256((files.folder / name).read_bytes()).hexdigest() == digests[name]
                most = max(most, _cached(Path(remote["cache_dir"])))
    files.close()
    return most


def _cached(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total


@pytest.mark.distributed
def test_processes_share_a_cache_that_is_too_small_for_what_they_fetch_ahead(
    dataset: Path, server: ShardServer, tmp_path: Path
) -> None:
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in dataset.glob("train-*.tar")}
    size = max(path.stat().st_size for path in dataset.glob("train-*.tar"))
    bound = 4 * size + (dataset / "dataset.json").stat().st_size + 1000
    remote = {"cache_dir": str(tmp_path / "cache"), "cache_gib": bound / 2**30, "timeout_seconds": 20}
    most = spawn(_read_over_and_over, 3, server.url, remote, digests)
    assert 3 * size < max(most) <= bound
    assert sum(server.counts()[name] for name in digests) < 3 * 4 * 7, "what others fetched is used"


def run_file(content: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_run_ends_with_address_attempt_and_cause(
    server: ShardServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.faults["train-000002.tar"] = [Fault("status", 503)] * 2
    content = config_of(server.url, tmp_path, "run")
    content["dataset"]["remote"]["attempts"] = 2
    assert main(["train", str(run_file(content, tmp_path))]) == 3
    told = capsys.readouterr().err
    assert f"{server.url}/train-000002.tar could not be fetched in 2 attempts; the last ended with: " in told
    assert "the server answers 503 Service Unavailable" in told
    assert "Traceback" not in told
    assert json.loads((tmp_path / "run" / "outcome.json").read_text())["code"] == 3


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (
            "pipe:touch canary",
            ".path: 'pipe:touch canary' is not allowed: scheme pipe: is refused; allowed are http",
        ),
        ("file:///etc/passwd", "scheme file: is refused; allowed are http, https, s3, gs, or a folder"),
        ("ftp://host/x", "scheme ftp: is refused"),
        ("simplecache::s3://host/x", "scheme simplecache: is refused"),
        ("https://me:hush@host/x", "'https://...@host/x' is not allowed: no user or password in an address"),
        ("https://host/x?sig=hush", "'https://host/x?...' is not allowed: no query or signature"),
        ("https://host/../x", "an address has no . or .. in it"),
        ("s3://bucket/*", "not an address; give s3://host/folder"),
        ("https:/host/x", "not an address; give https://host/folder"),
    ],
)
def test_what_is_no_address_is_refused_without_its_secrets(
    tmp_path: Path, path: str, text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for content in (config_of(path, tmp_path, "run"), config_of("data", tmp_path, "run", evaluate={"path": path})):
        assert main(["train", str(run_file(content, tmp_path))]) == 2
        told = capsys.readouterr().err
        assert text in told
        assert "hush" not in told
    assert not (tmp_path / "canary").exists()


def test_options_that_do_not_go_together(
    server: ShardServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = config_of(server.url, tmp_path, "run", run={"hang_seconds": 60})
    content["dataset"] |= {"reader": "indexed", "shuffle_buffer": 5}
    assert main(["train", str(run_file(content, tmp_path))]) == 2
    told = capsys.readouterr().err
    assert "dataset.shuffle_buffer: 5 is not allowed: only dataset.reader stream and dali-stream have a buffer" in told
    content["dataset"]["shuffle_buffer"] = None
    assert main(["train", str(run_file(content, tmp_path))]) == 2
    told = capsys.readouterr().err
    assert f"dataset.reader indexed reads single samples of all shards, and {server.url} is not a disk" in told
    assert (
        "dataset.remote.attempts 4 of 1 s may take 94 s with the waits between, and run.hang_seconds 60 would" in told
    )
    assert not server.requests


def test_every_command_works_with_an_address_or_says_why_not(
    server: ShardServer, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_file(config_of(server.url, tmp_path, "run", train={"steps": 6}), tmp_path)
    local = run_file(config_of(dataset, tmp_path, "run", train={"steps": 6}), dataset)
    pictures = []
    for where in (path, local):
        assert main(["data", "preview", str(where), "--out", str(tmp_path / "x.png"), "--count", "9"]) == 0
        pictures.append((tmp_path / "x.png").read_bytes())
    assert pictures[0] == pictures[1]
    assert main(["train", str(path), "--dry-run"]) == 0
    assert f"path: {server.url}" in capsys.readouterr().out
    assert main(["train", str(path)]) == 0
    assert f"path: {server.url}" in (tmp_path / "run" / "config.yaml").read_text()
    capsys.readouterr()
    told = []
    for more in ([], ["--data", str(dataset)], ["--data", server.url, "--split", "unseen"]):
        assert main(["evaluate", str(tmp_path / "run"), "--json", *more]) == 0
        told.append(capsys.readouterr().out)
    assert told[0] == told[1] == told[2]
    assert main(["classes", str(tmp_path / "run"), "--json", str(tmp_path / "classes.json")]) == 0
    assert main(["report", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    for command in (["verify"], ["reshard", "--out", "x", "--samples-per-shard", "5"], ["subset", "--out", "x"]):
        assert main(["data", command[0], server.url, *command[1:]]) == 2
        assert f"DIR {server.url}: this needs the whole data set on a disk; copy it" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path / "run"), "--data", "pipe:touch canary"]) == 2
    assert "--data pipe:touch canary: scheme pipe: is refused" in capsys.readouterr().err
