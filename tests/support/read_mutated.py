"""Reads mutated data sets in every way there is, and tells of each what came of it; run as a process that may die.

`python -m tests.support.read_mutated SEED START STOP FOLDER` makes each case in FOLDER/data and prints a JSON line
before and after each. A pass that takes over 10 s ends the process. While a case is read an audit hook watches every
file that is opened and every way to start a program.
"""

from __future__ import annotations

import faulthandler
import functools
import json
import os
import resource
import socket
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megaclass.config import Dataset
from megaclass.data.bad_samples import REASONS
from megaclass.data.open import open_reader
from megaclass.errors import DataError
from megaclass.prepare.verify import verify
from tests.support.mutations import KINDS, NUM_CLASSES, SIZES, good_parts, mutate, to_files

PASS_SECONDS = 10
EXTRA_MEMORY_BYTES = 2 << 30
_FORBIDDEN = (
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "subprocess.Popen",
    "pickle.find_class", "socket.connect", "socket.bind", "socket.getaddrinfo", "os.remove", "os.rename",
    "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.chown", "os.truncate", "os.utime",
    "shutil.", "tempfile.", "urllib.", "marshal.loads",
)  # fmt: skip
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Watch:
    """Notes what a reader has no business doing, while it is on."""

    def __init__(self, folder: Path) -> None:
        self.is_on = False
        self.seen: list[str] = []
        self._folder = f"{folder}/"
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.is_on:
            return
        if event == "open":
            path, mode, flags = arguments
            if isinstance(path, int):
                return
            name = os.fsdecode(path)
            # Importing a part of a library reads its file.
            is_library = name.endswith((".py", ".pyc", ".so")) and name.startswith((sys.prefix, sys.base_prefix))
            is_read = not (flags or 0) & _WRITES and not set(mode or "r") & set("wax+")
            if not (is_read and ((name.startswith(self._folder) and ".." not in name) or is_library)):
                self.seen.append(f"open {name!r} mode {mode!r} flags {flags}")
        elif event.startswith(_FORBIDDEN) and not _is_import(event):
            self.seen.append(f"{event} {arguments!r:.200}")


def _is_import(event: str) -> bool:
    """Whether a cached library is being loaded, which is by `marshal` too."""
    frame = sys._getframe(2) if event == "marshal.loads" else None
    return frame is not None and "importlib" in frame.f_code.co_filename


def read(folder: Path, reader: str, policy: str) -> str:
    """Read one epoch; what came of it in a word. Anything but batches and a `DataError` of one line is raised."""
    options = Dataset(
        path=folder, reader=reader, image_size=8, channels=1, on_bad_sample=policy, bad_sample_budget=1.0
    )  # fmt: skip
    num_skipped = 0
    try:
        made = open_reader(options, batch_size=5, accumulation_steps=1, rank=0, world_size=1, seed=1)
        try:
            batches = iter(made)
            for _ in range(min(-(-made.num_samples // 5), 8)):
                batch = next(batches).to(torch.device("cpu"))
                num_skipped += len(batch.skipped)
                assert batch.images.shape == (5, 1, 8, 8)
                assert torch.isfinite(batch.images).all()
                assert batch.images.abs().max() <= 1
                assert ((batch.labels >= 0) & (batch.labels < made.num_classes)).all()
                assert ((batch.ids >= 0) & (batch.ids < made.num_samples)).all()
                assert batch.num_read == 5 + len(batch.skipped)
                assert all(sample.reason in REASONS for sample in batch.skipped)
                assert policy == "skip" or not batch.skipped
        finally:
            made.close()
    except DataError as error:
        told = str(error)
        assert "\n" not in told, told
        assert len(told) < 4000, told
        return "refused"
    return f"read, {num_skipped} skipped" if num_skipped else "read"


def check(folder: Path) -> str:
    """What `megaclass data verify` says in a word."""
    report = verify(folder)
    assert all("\n" not in fault for fault in report.faults), report.faults
    return "faults" if report.faults else "ok"


def passes(folder: Path) -> list[tuple[str, Callable[[], str]]]:
    """Every way a data set is read, by name."""
    made: list[tuple[str, Callable[[], str]]] = [("verify", lambda: check(folder))]
    ways = [(reader, policy) for reader in ("indexed", "stream") for policy in ("stop", "skip")]
    return made + [("/".join(way), functools.partial(read, folder, *way)) for way in ways]


def run_case(number: int, seed: int, folder: Path, watch: Watch) -> None:
    """Make one case, read it in every way, and print what came of it."""
    files, what, may_pass = mutate(number, seed)
    print(json.dumps({"case": number, "what": what}), flush=True)
    write(folder, files)
    outcomes, faults = {}, []
    for name, call in passes(folder):
        faulthandler.dump_traceback_later(PASS_SECONDS, exit=True)
        watch.seen.clear()
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            watch.is_on = True
            try:
                outcomes[name] = call()
            except BaseException as error:
                watch.is_on = False  # a traceback reads source files
                outcomes[name] = "traceback"
                faults.append(f"{name}: {''.join(traceback.format_exception(error))[-1500:]}")
            finally:
                watch.is_on = False
                faulthandler.cancel_dump_traceback_later()
        faults += [f"{name}: {seen}" for seen in watch.seen]
        faults += [f"{name}: warning {warning.message}" for warning in warned]
    faults += disagreements(outcomes, may_pass)
    print(json.dumps({"done": number, "what": what, "outcomes": outcomes, "faults": faults}), flush=True)


def disagreements(outcomes: dict[str, str], may_pass: bool) -> list[str]:
    """What the ways to read it say that cannot all be true."""
    found = []
    if outcomes["verify"] == "ok" and not may_pass:
        found.append("verify finds nothing, but the files are not those of the manifest")
    if outcomes["verify"] == "ok":
        found += [
            f"verify finds nothing, but {name}: {told}" for name, told in outcomes.items() if told not in ("ok", "read")
        ]
    return found


def write(folder: Path, files: dict[str, bytes]) -> None:
    """Make `folder` hold these files and nothing else."""
    for path in folder.iterdir():
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    for name, content in files.items():
        if content in (kind.encode() for kind in KINDS):
            make_kind(folder / name, content.decode())
        else:
            (folder / name).write_bytes(content)


def make_kind(path: Path, kind: str) -> None:
    """Something that is no file."""
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(path))


def main(seed: int, start: int, stop: int, sandbox: Path) -> None:
    """Run the cases [start, stop)."""
    folder = sandbox / "data"
    folder.mkdir(exist_ok=True)
    os.chdir(folder)  # where a relative path would hit
    write(folder, to_files(good_parts()))
    assert [call() for _, call in passes(folder)] == ["ok", "read", "read", "read", "read"]
    assert sum(SIZES) == 20
    assert NUM_CLASSES == 5
    watch = Watch(folder)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + EXTRA_MEMORY_BYTES, resource.RLIM_INFINITY))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(start, stop):
        run_case(number, seed, folder, watch)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    print(json.dumps({"end": True, "grown_bytes": grown}), flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), Path(sys.argv[4]))
