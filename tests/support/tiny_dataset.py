"""Writes a small valid data set in the format of `megaclass.data.manifest`, for tests.

Separate from `megaclass.prepare`, so that the readers are tested against the format and not against our own writer.
Each class is a coarse random pattern and each sample that pattern with noise: separable, and no two images are equal.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from megaclass.data.manifest import FORMAT, INDEX_DTYPE, MANIFEST_NAME


def write_tiny_dataset(
    folder: Path,
    num_classes: int = 13,
    samples_per_class: int = 4,
    image_size: int = 16,
    num_shards: int = 2,
    *,
    channels: int = 1,
    image_format: str = "png",
    unseen_classes: int = 0,
    seed: int = 0,
) -> Path:
    """Write the data set and return its folder.

    Samples are dealt over the shards in contiguous runs after a fixed shuffle, so a shard holds many classes. With
    more shards than samples the last shards are empty. Two sources (`writer-0`, `writer-1`) alternate within a class,
    and classes alternate between two groups. With `unseen_classes` there is a second split `unseen` of other classes.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    splits = {"train": _write_split(folder, "train", num_classes, 0, locals())}
    if unseen_classes:
        splits["unseen"] = _write_split(folder, "unseen", unseen_classes, num_classes, locals())
    write_manifest(
        folder, {"format": FORMAT, "name": "tiny", "image_mode": "L" if channels == 1 else "RGB", "splits": splits}
    )
    return folder


def write_manifest(folder: Path, content: dict) -> None:
    """Write `dataset.json`."""
    (folder / MANIFEST_NAME).write_text(json.dumps(content))


def tiny_image(class_number: int, sample: int, image_size: int, channels: int, seed: int = 0) -> np.ndarray:
    """The image of one sample, uint8 [image_size, image_size, channels]."""
    cells = np.random.default_rng((seed, class_number)).integers(40, 216, (4, 4, channels))
    rows = np.arange(image_size) * 4 // image_size
    noise = np.random.default_rng((seed, class_number, sample)).integers(-30, 31, (image_size, image_size, channels))
    return (cells[rows][:, rows] + noise).astype(np.uint8)


def encode(image: np.ndarray, image_format: str = "png") -> bytes:
    """The image file's bytes."""
    stream = io.BytesIO()
    picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
    picture.save(stream, "JPEG" if image_format == "jpg" else "PNG", quality=95)
    return stream.getvalue()


def tar_member(name: str, data: bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    """One tar member: header block, data, padding."""
    info = tarfile.TarInfo(name)
    info.size, info.type = len(data), kind
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % 512)


def write_shard(folder: Path, stem: str, samples: list[tuple[bytes, int, int]]) -> dict:
    """Write one shard of (members' bytes, label, source) and its index; returns its entry in the manifest."""
    records, offset = np.zeros(len(samples), INDEX_DTYPE), 0
    for record, (members, label, source) in zip(records, samples, strict=True):
        record["offset"], record["length"], record["source"], record["label"] = offset, len(members), source, label
        offset += len(members)
    (folder / f"{stem}.tar").write_bytes(b"".join(members for members, _, _ in samples) + bytes(1024))
    np.save(folder / f"{stem}.index.npy", records)
    return shard_entry(folder, stem)


def shard_entry(folder: Path, stem: str) -> dict:
    """The manifest's entry for a shard as it lies in `folder`."""
    tar, index = folder / f"{stem}.tar", folder / f"{stem}.index.npy"
    return {
        "file": tar.name,
        "index": index.name,
        "num_samples": len(np.load(index)),
        "num_bytes": tar.stat().st_size,
        "sha256": _sha256(tar),
        "index_sha256": _sha256(index),
    }


def _write_split(folder: Path, split: str, num_classes: int, first_class: int, options: dict) -> dict:
    seed, per_class, image_format = options["seed"], options["samples_per_class"], options["image_format"]
    samples = []
    for number in np.random.default_rng(seed).permutation(num_classes * per_class).tolist():
        label, sample = divmod(number, per_class)
        image = tiny_image(first_class + label, sample, options["image_size"], options["channels"], seed)
        key = f"{label:05d}-{sample:03d}"
        members = tar_member(f"{key}.{image_format}", encode(image, image_format))
        members += tar_member(f"{key}.label", np.array(label, "<i8").tobytes())
        samples.append((members, label, sample % 2))
    shares = np.array_split(np.arange(len(samples)), options["num_shards"])
    shards = [write_shard(folder, f"{split}-{n:06d}", [samples[i] for i in part]) for n, part in enumerate(shares)]
    classes = folder / f"{split}.classes.json"
    names = [f"class-{first_class + label}" for label in range(num_classes)]
    classes.write_text(json.dumps({"names": names, "groups": [f"group-{label % 2}" for label in range(num_classes)]}))
    return {
        "num_classes": num_classes,
        "num_samples": len(samples),
        "classes": classes.name,
        "classes_sha256": _sha256(classes),
        "sources": ["writer-0", "writer-1"],
        "shards": shards,
    }


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
