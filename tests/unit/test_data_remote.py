"""Data sets behind an address, from a real server that misbehaves."""

from __future__ import annotations

import base64
import errno
import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper

from megaclass.config import Remote
from megaclass.data import download as download_module
from megaclass.data import folder as folder_module
from megaclass.data import sources as sources_module
from megaclass.data.address import Address, parse_location
from megaclass.data.folder import files_of, open_folder
from megaclass.data.manifest import load_manifest
from megaclass.data.stream import StreamReader
from megaclass.errors import ConfigError, DataError
from tests.support.readers import opened
from tests.support.shard_server import Fault, ShardServer, serve
from tests.support.tiny_dataset import write_manifest, write_tiny_dataset
from tests.unit.test_data_indexed import SIZE
from tests.unit.test_data_stream import all_ids, open_stream, read

SHARD = "train-000002.tar"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """60 samples of 15 classes in 7 shards of 8 or 9, and 3 classes unseen."""
    return write_tiny_dataset(tmp_path / "data", 15, 4, SIZE, 7, unseen_classes=3)


@pytest.fixture
def server(folder: Path) -> Iterator[ShardServer]:
    with serve(folder) as running:
        yield running


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download_module, "_FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setenv("NO_PROXY", "*")


def remote(tmp_path: Path, **options: Any) -> Remote:
    return Remote.model_validate({"cache_dir": tmp_path / "cache", "timeout_seconds": 0.4, "attempts": 3, **options})


def open_remote(server: ShardServer, tmp_path: Path, batch_size: int = 12, *, options: Any = None, **more: Any) -> Any:
    location = parse_location(server.url)
    fixed: dict[str, Any] = {"rank": 0, "world_size": 1, "seed": 4, "image_size": SIZE, "channels": 1, **more}
    own = remote(tmp_path, **(options or {}))
    return opened(StreamReader, location, "train", batch_size=batch_size, remote=own, **fixed)


def hold(server: ShardServer, tmp_path: Path, name: str = SHARD, **options: Any) -> bytes:
    """The bytes of one file through the cache."""
    files = open_folder(parse_location(server.url), remote(tmp_path, **options))
    with files.hold(name):
        return (files.folder / name).read_bytes()


def cached(tmp_path: Path) -> int:
    """Bytes in the cache, complete or not."""
    return sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*") if path.is_file())


def kept_file(tmp_path: Path) -> Path:
    """The complete shard in the cache."""
    (kept,) = (path for path in (tmp_path / "cache").rglob(SHARD) if path.parent.name != "locks")
    return kept


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_batches_are_those_of_the_same_files_on_disk(
    server: ShardServer, folder: Path, tmp_path: Path, workers: int
) -> None:
    local = read(open_stream(folder, 12), 12, 36)
    reader = open_remote(server, tmp_path, workers=workers)
    fetched = read(reader, 12, 36)
    for one, other in zip(local, fetched, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.ids, other.ids)
        assert one.position == other.position
    assert set(server.counts().values()) == {1}, "everything is fetched once"
    assert "fetch-ahead" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize(
    ("faults", "num_requests"),
    [
        ([Fault("reset", 700), Fault("reset", 100)], 3),
        ([Fault("short", 600), Fault("short", 0)], 3),
        ([Fault("stall", 512)], 2),
        ([Fault("stall-first")], 2),
        ([Fault("status", 500), Fault("status", 503)], 3),
        ([Fault("status", 429)], 2),
        ([Fault("wrong")], 2),
        ([Fault("huge")], 2),
        ([Fault("drip")], 2),
        ([Fault("reset", 700), Fault("no-range")], 2),
        ([Fault("short", 700), Fault("status", 416)], 3),
    ],
    ids=lambda value: "+".join(fault.kind for fault in value) if isinstance(value, list) else "",
)
def test_what_passes_is_tried_again_and_nothing_is_lost(
    server: ShardServer, folder: Path, tmp_path: Path, faults: list[Fault], num_requests: int
) -> None:
    server.faults[SHARD] = list(faults)
    reader = open_remote(server, tmp_path)
    assert sorted(all_ids(read(reader, 5))) == list(range(60))
    assert server.counts()[SHARD] == num_requests
    assert server.sent[SHARD] < 2**22, "a body without end is left"
    kept = kept_file(tmp_path)
    assert [path.name for path in kept.parent.iterdir() if path.name.startswith(SHARD)] == [SHARD]
    assert kept.read_bytes() == (folder / SHARD).read_bytes()


def test_a_cut_off_file_goes_on_where_it_ended(server: ShardServer, folder: Path, tmp_path: Path) -> None:
    size = (folder / SHARD).stat().st_size
    server.faults[SHARD] = [Fault("short", 1000), Fault("short", 500)]
    hold(server, tmp_path)
    assert [asked for name, asked in server.requests if name == SHARD] == ["", "bytes=1000-", "bytes=1500-"]
    assert server.sent[SHARD] == size


def test_a_file_cut_off_by_a_kill_goes_on_in_the_next_process(
    server: ShardServer, folder: Path, tmp_path: Path
) -> None:
    server.faults[SHARD] = [Fault("short", 1000), Fault("status", 503), Fault("status", 503)]
    with pytest.raises(DataError, match="in 3 attempts; the last ended with: the server answers 503"):
        hold(server, tmp_path)
    server.requests.clear()
    assert hold(server, tmp_path) == (folder / SHARD).read_bytes()
    assert (SHARD, "bytes=1000-") in server.requests


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (Fault("reset", 0), r"the last ended with: Client\w+"),
        (Fault("short", 100), r"the last ended with: ClientPayloadError"),
        (Fault("stall", 64), r"the last ended with: nothing came for 0\.2 s"),
        (Fault("stall-first"), r"the last ended with: nothing came for 0\.2 s"),
        (Fault("status", 502), r"the last ended with: the server answers 502 Bad Gateway"),
        (Fault("wrong"), r"the last ended with: its SHA-256 is \w{16}\.\.\. and not the \w{16}\.\.\. of dataset\.json"),
        (Fault("huge"), r"the last ended with: it is longer than the \d+ bytes dataset\.json says"),
        (Fault("drip"), r"the last ended with: only \d+ bytes came in 0\.\d s"),
    ],
    ids=lambda value: value.kind if isinstance(value, Fault) else "",
)
def test_what_does_not_pass_ends_with_address_attempts_and_cause(
    server: ShardServer, tmp_path: Path, fault: Fault, text: str
) -> None:
    server.faults[SHARD] = [fault] * 3
    with pytest.raises(DataError, match=rf"http://127\.0\.0\.1:\d+/sets/tiny/{SHARD} could not .* in 3 att.*; {text}"):
        hold(server, tmp_path, timeout_seconds=0.2)
    assert server.counts()[SHARD] == 3
    assert not [path for path in (tmp_path / "cache").rglob(SHARD) if path.parent.name != "locks"]


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (Fault("status", 404), "the server answers 404 Not Found; check the address"),
        (Fault("status", 401), r"the server answers 401 Unauthorized; give access to it, or credentials in ~/\.netrc"),
        (Fault("status", 403), "the server answers 403 Forbidden; give access to it"),
        (Fault("gzip"), "the server sends the file as 'gzip', though asked for it as it is"),
        (Fault("redirect", "file:///etc/passwd"), r"redirected to 'file:///etc/passwd'; only http\(s\) addresses"),
        (Fault("redirect", "pipe:touch canary"), r"redirected to 'pipe:touch canary'"),
        (
            Fault("redirect", "http://u:hush@127.0.0.1/x"),
            r"redirected to 'http://\.\.\.@127\.0\.0\.1/x'; only http\(s\)",
        ),
        (
            Fault("redirect", "http://169.254.169.254/latest/meta-data?token=hush"),
            r"redirected to 'http://169\.254\.169\.254/latest/meta-data\?\.\.\.' on another host or port; if the files "
            r"lie there, name '169\.254\.169\.254' in dataset\.remote\.redirect_hosts",
        ),
        (Fault("redirect", "//localhost/x"), "on another host or port"),
    ],
    ids=lambda value: f"{value.kind} {value.value}" if isinstance(value, Fault) else "",
)
def test_what_never_passes_is_asked_once(server: ShardServer, tmp_path: Path, fault: Fault, text: str) -> None:
    server.faults[SHARD] = [fault] * 3
    with pytest.raises(DataError, match=rf"{SHARD} could not be fetched \(attempt 1\): .*{text}") as caught:
        hold(server, tmp_path)
    assert "hush" not in str(caught.value)
    assert server.counts()[SHARD] == 1


def test_redirects_within_the_host_and_to_named_hosts_are_followed(
    server: ShardServer, folder: Path, tmp_path: Path
) -> None:
    server.faults[SHARD] = [Fault("redirect", f"/elsewhere/{SHARD}?signature=hush")]
    assert hold(server, tmp_path) == (folder / SHARD).read_bytes()
    other = "train-000003.tar"
    server.faults[other] = [Fault("redirect", f"http://localhost:{server.port}/x/{other}")]
    assert hold(server, tmp_path, other, redirect_hosts=["localhost"]) == (folder / other).read_bytes()
    third = "train-000004.tar"
    server.faults[third] = [Fault("redirect", third)] * 9
    with pytest.raises(DataError, match="redirected more than 5 times"):
        hold(server, tmp_path, third)


def test_retry_after_is_honoured_up_to_a_bound(
    server: ShardServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download_module, "LONGEST_WAIT_SECONDS", 0.3)
    server.faults[SHARD] = [Fault("status", 503, {"Retry-After": "100"})]
    start = time.monotonic()
    with caplog.at_level(logging.WARNING):
        hold(server, tmp_path)
    assert 0.3 <= time.monotonic() - start < 5
    assert "attempt 1 of 3: the server answers 503 Service Unavailable; again in 0.3 s" in caplog.text


def test_waits_grow_and_differ_between_addresses() -> None:
    waits = [download_module._back_off("https://host/a", attempt) for attempt in range(1, 12)]
    for attempt, wait in enumerate(waits):
        longest = min(30.0, 0.01 * 2**attempt)
        assert longest / 2 <= wait <= longest
    assert waits[0] != download_module._back_off("https://host/b", 1)


def test_a_server_that_is_not_there(server: ShardServer, tmp_path: Path) -> None:
    server.port = 1
    with pytest.raises(DataError, match=r"http://127\.0\.0\.1:1/sets/tiny/dataset\.json could not .*ClientConnector"):
        open_folder(parse_location(server.url), remote(tmp_path))


@pytest.mark.parametrize("content", [b"<html>busy</html>", b'{"format": 1'])
def test_a_manifest_that_is_none(server: ShardServer, folder: Path, tmp_path: Path, content: bytes) -> None:
    (folder / "dataset.json").write_bytes(content)
    with pytest.raises(DataError, match=r"/sets/tiny/dataset\.json could not .* in 3 attempts; .* it is no JSON"):
        open_folder(parse_location(server.url), remote(tmp_path))


def test_a_manifest_of_another_format_is_named_by_its_address(
    server: ShardServer, folder: Path, tmp_path: Path
) -> None:
    write_manifest(folder, {"format": 2})
    with pytest.raises(DataError, match=r"^http://.*/sets/tiny/dataset\.json has format 2; this version reads"):
        open_folder(parse_location(server.url), remote(tmp_path))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("../../escaped.tar", "not a valid manifest"),
        ("/etc/passwd", "not a valid manifest"),
        ("dataset.json", "names 'dataset.json' twice, or as a file that it cannot be"),
        ("train-000000.index.npy", "names 'train-000000.index.npy' twice"),
        ("x.5.part", "names 'x.5.part' twice, or as a file"),
        ("locks", "names 'locks' twice, or as a file"),
    ],
)
def test_names_of_a_manifest_lead_nowhere_else(
    server: ShardServer, folder: Path, tmp_path: Path, name: str, text: str
) -> None:
    content = load_manifest(folder).model_dump()
    content["splits"]["train"]["shards"][1]["file"] = name
    write_manifest(folder, content)
    before = {path for path in tmp_path.rglob("*") if "cache" not in path.parts}
    with pytest.raises(DataError, match=text):
        open_remote(server, tmp_path)
    assert {path for path in tmp_path.rglob("*") if "cache" not in path.relative_to(tmp_path).parts} == before


def test_sizes_of_a_manifest_are_not_believed(server: ShardServer, folder: Path, tmp_path: Path) -> None:
    content = load_manifest(folder).model_dump()
    content["splits"]["train"]["shards"][2]["num_bytes"] = 2**60
    write_manifest(folder, content)
    with pytest.raises(DataError, match=rf"{SHARD} of {2**60} bytes is more than dataset\.remote\.cache_gib 32 holds"):
        hold(server, tmp_path)
    content["splits"]["train"]["shards"][2]["num_bytes"] = -1
    write_manifest(folder, content)
    (tmp_path / "cache" / "addresses").rename(tmp_path / "cache" / "old")
    with pytest.raises(DataError, match="not a valid manifest"):
        hold(server, tmp_path)


def test_the_cache_stays_within_its_bound(server: ShardServer, folder: Path, tmp_path: Path) -> None:
    sizes = [shard.num_bytes for shard in load_manifest(folder).splits["train"].shards]
    bound = 3 * max(sizes) + (folder / "dataset.json").stat().st_size + 20000
    most = []
    server.before = lambda name: most.append(cached(tmp_path))
    reader = open_remote(server, tmp_path, options={"cache_gib": bound / 2**30})
    assert sorted(all_ids(read(reader, 10))) == sorted([*range(60), *range(60)])
    assert max(most) <= bound
    assert sum(sizes) > bound
    assert max(server.counts()[f"train-{n:06d}.tar"] for n in range(7)) == 2


def test_what_is_in_use_is_never_removed(server: ShardServer, folder: Path, tmp_path: Path) -> None:
    names = [f"train-{n:06d}.tar" for n in range(7)]
    size = max((folder / name).stat().st_size for name in names)
    bound = (2 * size + (folder / "dataset.json").stat().st_size + 2000) / 2**30
    files = open_folder(parse_location(server.url), remote(tmp_path, cache_gib=bound))
    with files.hold(names[0], names[1]):
        files.fetch_ahead(names[2])
        with (
            pytest.raises(DataError, match=rf"no room for {names[2]} of \d+ bytes: \d+ of \d+ are in use; set dataset"),
            files.hold(names[2]),
        ):
            raise AssertionError("there is no room")
        assert (files.folder / names[0]).exists()
    with files.hold(names[2]):
        assert not (files.folder / names[0]).exists(), "the one unused for longest goes first"
        assert (files.folder / names[1]).exists()
    files.close()


def test_many_at_once_fetch_everything_once(server: ShardServer, folder: Path, tmp_path: Path) -> None:
    """No herd after a restart, and no half files."""
    contents, failures = [], []

    def run() -> None:
        try:
            files = open_folder(parse_location(server.url), remote(tmp_path))
            with files.hold(*files_of(files.manifest.splits["train"])):
                contents.append((files.folder / SHARD).read_bytes())
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert contents == [(folder / SHARD).read_bytes()] * 6
    assert set(server.counts().values()) == {1}


def test_close_ends_the_fetching_of_the_next_shard_at_once(server: ShardServer, tmp_path: Path) -> None:
    reader = open_remote(server, tmp_path, 4, options={"timeout_seconds": 60.0}, shuffle=False)
    server.faults["train-000001.tar"] = [Fault("stall", 512), Fault("stall-first")]
    batches = iter(reader)
    next(batches)
    while server.counts()["train-000001.tar"] == 0:
        time.sleep(0.01)
    start = time.monotonic()
    reader.close()
    assert time.monotonic() - start < 3
    assert "fetch-ahead" not in {thread.name for thread in threading.enumerate()}


def test_a_shard_that_cannot_be_fetched_ahead_ends_the_run_when_it_is_due(server: ShardServer, tmp_path: Path) -> None:
    server.faults["train-000001.tar"] = [Fault("status", 404)] * 2
    reader = open_remote(server, tmp_path, 3, shuffle=False)
    batches = iter(reader)
    assert all_ids([next(batches) for _ in range(3)]) == list(range(9))
    with pytest.raises(
        DataError, match=r"train-000001\.tar could not be fetched \(attempt 1\): the server answers 404"
    ):
        next(batches)
    assert server.counts()["train-000001.tar"] == 1
    reader.close()


def test_a_changed_file_of_the_cache_is_fetched_again(server: ShardServer, folder: Path, tmp_path: Path) -> None:
    hold(server, tmp_path)
    kept_file(tmp_path).write_bytes(b"cut off")
    assert hold(server, tmp_path) == (folder / SHARD).read_bytes()


def test_a_new_manifest_at_the_address_is_another_data_set(
    server: ShardServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert open_folder(parse_location(server.url), remote(tmp_path)).manifest.name == "tiny"
    write_manifest(folder, {**json.loads((folder / "dataset.json").read_text()), "name": "changed"})
    assert open_folder(parse_location(server.url), remote(tmp_path)).manifest.name == "tiny", "asked a moment ago"
    monkeypatch.setattr(folder_module, "_MANIFEST_SECONDS", 0.0)
    assert open_folder(parse_location(server.url), remote(tmp_path)).manifest.name == "changed"
    assert server.counts()["dataset.json"] == 2


def test_a_cache_that_cannot_be_written(server: ShardServer, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(
        DataError, match=r"cache folder .*/cache cannot be used: .*give another dataset\.remote\.cache_dir"
    ):
        open_folder(parse_location(server.url), remote(tmp_path))


def test_a_full_disk_is_told_and_is_no_fault_of_the_server(
    server: ShardServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = open_folder(parse_location(server.url), remote(tmp_path))

    def full(part: object, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(download_module._Part, "add", full)
    text = r"cache folder .* cannot be used: No space left on device; make room, or give"
    with pytest.raises(DataError, match=text), files.hold(SHARD):
        raise AssertionError("nothing was written")
    assert server.counts()[SHARD] == 1
    assert not list(files.folder.glob("*.part"))


def test_a_password_comes_from_netrc_and_goes_to_its_host_only(
    server: ShardServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password hush\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    server.faults[SHARD] = [Fault("redirect", f"http://localhost:{server.port}/x/{SHARD}")]
    hold(server, tmp_path, redirect_hosts=["localhost"])
    basic = "Basic " + base64.b64encode(b"me:hush").decode()
    assert server.authorizations == [basic, basic, ""]


@pytest.fixture
def failures(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Exception]:
    """An object store of fsspec's own, in memory, that raises these errors first, of the kinds s3fs and gcsfs have."""
    memory = fsspec.filesystem("memory", skip_instance_cache=True)
    monkeypatch.setattr(type(memory), "store", {})
    for path in folder.iterdir():
        memory.pipe_file(f"/bucket/sets/{path.name}", path.read_bytes())
    store, waiting = AsyncFileSystemWrapper(memory, asynchronous=False), []
    whole = store._cat_file

    async def failing(path: str, **options: Any) -> bytes:
        if waiting:
            raise waiting.pop(0)
        found: bytes = await whole(path, **options)
        return found

    monkeypatch.setattr(store, "_cat_file", failing)
    monkeypatch.setattr(fsspec, "filesystem", lambda scheme, **options: store)
    return waiting


def test_an_object_store_is_read_in_ranges(
    failures: list[Exception], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources_module, "_RANGE_BYTES", 1000)
    files = open_folder(Address("s3", "bucket", "/sets"), remote(tmp_path))
    failures.extend([OSError("SlowDown"), TimeoutError()])
    with files.hold(SHARD):
        assert (files.folder / SHARD).read_bytes() == (folder / SHARD).read_bytes()
    assert not failures
    for errors, text in (
        ([PermissionError("AccessDenied")], r"train-000001\.tar .*\(attempt 1\): access is denied: PermissionError"),
        ([RuntimeError("no credentials")], r"\(attempt 1\): RuntimeError: no credentials"),
        (
            [OSError("SlowDown https://x/?sig=hush") for _ in range(3)],
            r"in 3 attempts; the last ended with: OSError: SlowDown https://x/\?\.\.\.;",
        ),
    ):
        failures.extend(errors)
        with pytest.raises(DataError, match=text), files.hold("train-000001.tar"):
            raise AssertionError("it was not fetched")
    with pytest.raises(DataError, match=r"s3://bucket/none/dataset\.json .*: there is no such object; check"):
        open_folder(Address("s3", "bucket", "/none"), remote(tmp_path))


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs")])
def test_object_stores_name_the_extra_they_need(
    tmp_path: Path, scheme: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ConfigError, match=rf"{scheme}://bucket/x needs the package {package}; pip install 'megaclass\[{scheme}\]'"
    ):
        open_folder(Address(scheme, "bucket", "/x"), remote(tmp_path))
