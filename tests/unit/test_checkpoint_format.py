from __future__ import annotations

import hashlib
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from megaclass.checkpoint import find_latest, load, verify
from megaclass.checkpoint import format as checkpoint_format
from megaclass.checkpoint.format import Manifest, decode, encode, read_manifest
from megaclass.errors import CheckpointError
from megaclass.parallel.shard import ClassShard
from tests.support.checkpoints import save_good

WEIGHT = "class.weight"
FIRST = "classes-00000-of-00002.safetensors"


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


def rewrite(path: Path, change: Any) -> None:
    """Change a manifest as an attacker would: with the right digest, and past the checks of the model."""
    content = json.loads((path / "manifest.json").read_bytes())
    content.pop("digest")
    change(content)
    digest = hashlib.sha256(checkpoint_format._canonical(content)).hexdigest()
    (path / "manifest.json").write_bytes(checkpoint_format._canonical({**content, "digest": digest}))


def test_rewriting_without_a_change_is_accepted(tmp_path: Path) -> None:
    path = save_good(tmp_path)
    rewrite(path, lambda content: None)
    assert verify(path).ok


@pytest.mark.parametrize("file", [FIRST, "manifest.json", "replicated.safetensors", "data.pkl"])
def test_pickles_are_never_executed(tmp_path: Path, file: str) -> None:
    path = save_good(tmp_path / "run")
    raw = pickle.dumps(Canary(tmp_path / "executed"))
    (path / file).write_bytes(raw)
    if file.startswith(("classes", "replicated")):
        facts = {"num_bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
        rewrite(path, lambda content: content["files"].update({file: facts}))
    assert not verify(path).ok
    for call in (lambda: load(path, ClassShard(13, 0, 1)), lambda: find_latest(tmp_path / "run")):
        with pytest.raises(CheckpointError):
            call()
    assert not (tmp_path / "executed").exists()


def test_a_pickle_with_the_right_hash_and_a_fitting_size_is_refused_by_the_reader(tmp_path: Path) -> None:
    path = save_good(tmp_path / "run")
    raw = pickle.dumps(Canary(tmp_path / "executed")).ljust((path / FIRST).stat().st_size, b"\0")
    (path / FIRST).write_bytes(raw)
    facts = {"num_bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    rewrite(path, lambda content: content["files"].update({FIRST: facts}))
    with pytest.raises(CheckpointError, match=rf"{FIRST} cannot be read"):
        load(path, ClassShard(13, 0, 1))
    assert any(f"{FIRST} cannot be read" in fault for fault in verify(path).faults)
    assert not (tmp_path / "executed").exists()


def set_tensor(**facts: Any) -> Any:
    return lambda content: content["tensors"][WEIGHT].update(facts)


def set_part(index: int, **facts: Any) -> Any:
    return lambda content: content["tensors"][WEIGHT]["parts"][index].update(facts)


def rename_file(name: str) -> Any:
    def change(content: dict[str, Any]) -> None:
        content["files"][name] = content["files"].pop(FIRST)
        for entry in content["tensors"].values():
            for part in entry["parts"]:
                part["file"] = name if part["file"] == FIRST else part["file"]

    return change


HOSTILE = {
    "parent": (rename_file("../classes.safetensors"), "String should match pattern"),
    "absolute": (rename_file("/etc/classes.safetensors"), "String should match pattern"),
    "hidden": (rename_file(".safetensors"), "String should match pattern"),
    "newline": (rename_file("a.safetensors\n"), "String should match pattern"),
    "terminal": (rename_file("\x1b[2J.safetensors"), "String should match pattern"),
    "unlisted": (set_part(0, file="other.safetensors"), "other.safetensors is not among the files"),
    "huge": (set_tensor(shape=[13, 2**40]), "does not fit into the"),
    "huge rows": (set_tensor(shape=[2**47, 7]), "has not a row for each of 13 classes"),
    "too large": (set_tensor(shape=[13, 2**60]), "less than or equal to"),
    "negative": (set_tensor(shape=[13, -7]), "greater than or equal to 0"),
    "many dimensions": (set_tensor(shape=[13] + [1] * 50), "at most 8 items"),
    "float": (set_tensor(shape=[13, 7.0]), "valid integer"),
    "object": (set_tensor(dtype="object"), "type 'object' is not one of float64"),
    "gap": (set_part(1, start=8), "rows 8 to 13 do not follow row 7"),
    "overlap": (set_part(1, start=6), "rows 6 to 13 do not follow row 7"),
    "short": (set_part(1, stop=12), "parts end at row 12 of 13"),
    "twice": (set_part(1, file=FIRST), "two parts lie in one file"),
    "unknown key": (lambda content: content.update(code="x"), "Extra inputs are not permitted"),
    "step": (lambda content: content.update(step=-1), "step: Input should be greater"),
    "step as text": (lambda content: content.update(step="10"), "step: Input should be a valid integer"),
    "no classes": (lambda content: content.update(num_classes=0), "num_classes: Input should be greater"),
    "format": (lambda content: content.update(format=2), "has format 2; this version of megaclass reads format 1"),
    "hash": (lambda content: content["files"][FIRST].update(sha256="x"), "String should match pattern"),
    "missing": (lambda content: content.pop("position"), "position: Field required"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_manifests_are_refused(tmp_path: Path, name: str) -> None:
    path = save_good(tmp_path)
    change, expected = HOSTILE[name]
    rewrite(path, change)
    with pytest.raises(CheckpointError) as caught:
        load(path, ClassShard(13, 0, 1))
    assert expected in str(caught.value)
    assert str(caught.value).isprintable()
    assert verify(path).faults == [str(caught.value).removeprefix(f"checkpoint {path}: ")]


def test_header_of_a_file_must_agree_with_the_manifest(tmp_path: Path) -> None:
    path = save_good(tmp_path)
    rewrite(path, lambda content: content["tensors"][WEIGHT].update(dtype="int32"))
    with pytest.raises(CheckpointError, match=rf"{FIRST} holds other tensors than the manifest says"):
        load(path, ClassShard(13, 0, 1))
    assert not verify(path).ok


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"9" * 10_000, "is not JSON"),
        (b"[]", "is not a JSON object"),
        (b'{"format": 1}', "Field required"),
        (b'{"step": NaN}', "is not valid"),
    ],
)
def test_junk_is_one_line(raw: bytes, expected: str) -> None:
    with pytest.raises(CheckpointError, match=expected) as caught:
        decode(raw)
    assert "\n" not in str(caught.value)


def test_size_and_kind_of_the_manifest_are_limited(tmp_path: Path) -> None:
    with (tmp_path / "manifest.json").open("wb") as file:
        file.truncate(checkpoint_format.MAX_MANIFEST_BYTES + 1)
    with pytest.raises(CheckpointError, match=r"has 16777217 bytes; at most 16777216 are read"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").unlink()
    os.mkfifo(tmp_path / "manifest.json")
    with pytest.raises(CheckpointError, match="is not a regular file"):
        read_manifest(tmp_path)


def test_manifest_survives_the_round_trip() -> None:
    manifest = Manifest(
        format=1, step=3, position=7, attempt=1, world_size=1, num_classes=1, config={"é": [1e-5, None]}, extra={},
        files={}, tensors={},
    )  # fmt: skip
    assert decode(encode(manifest)) == manifest
    with pytest.raises(ValueError, match="JSON compliant"):
        encode(manifest.model_copy(update={"extra": {"x": float("nan")}}))
